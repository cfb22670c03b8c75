//! Who callers are, and what they may do once: clients, access tokens, operation tokens.
//!
//! **Invariants.** Secrets are kept as digests, keys sealed. An access token is in the record before it is answered. A token
//! counts as good only if its client is registered, its key is ours, and neither was changed after the index its use commits at.
//!
//! **Not here.** What a client may (`governance`); the order in which a request is looked at (`api`).
//!
//! **Why this way.** Authentication reads nothing from the database: clients, keys and revocations are a projection, and the
//! ledger refuses what was authenticated before one of them changed.

mod clients;
mod ending;
mod exchange;
mod form;
pub mod http;
mod jwks;
mod jwt;
mod keys;
mod lockout;
mod metrics;
mod model;
mod oauth;
mod operations;
mod prove;
mod snapshot;
mod store;
mod verbs;
mod wanted;

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use prometheus::Registry;

use crate::config::{self, Agents};
use crate::governance::Bearers;
use crate::kernel::crypto::{self, Hash, MasterKey};
use crate::kernel::quota::{self, Quotas};
use crate::kernel::supervisor::{Supervisor, Task};
use crate::kernel::web::{Authority, Caller, Credential, Identity};
use crate::kernel::{BoxFuture, Clock, Refusal, Timestamp, problem};
use crate::ledger::{Ledger, authz_fact};
use crate::store::Store;

use jwks::Fetcher;
use jwt::Claims;
use keys::Alg;
use lockout::{Failures, Limits};
use metrics::Counted;
pub use model::Allowance;
use model::entity;
pub use snapshot::Snapshot;

/// How many verified tokens are remembered.
const REMEMBER: usize = 100_000;

/// The hourly quotas of this room.
const VERIFICATIONS: &str = "verifications";
const GENERATIONS: &str = "generations";

/// How often it is kept when clients were last seen.
const SEEN: Duration = Duration::from_secs(5);

/// The room. Cheap to clone.
#[derive(Clone)]
pub struct Token(Arc<Room>);

impl std::ops::Deref for Token {
    type Target = Room;

    fn deref(&self) -> &Room {
        &self.0
    }
}

/// What the room holds.
pub struct Room {
    ledger: Ledger,
    store: Store,
    clock: Clock,
    snapshot: Arc<Snapshot>,
    master: Arc<MasterKey>,
    issuer: Arc<str>,
    scheme: &'static str,
    /// The URLs of its token endpoint, one of which an assertion may be for.
    endpoints: Vec<String>,
    ttl: Duration,
    lead: Duration,
    lockout: Limits,
    agents: Arc<Agents>,
    quotas: Quotas,
    fetcher: Fetcher,
    private: bool,
    failures: Failures,
    authority: Arc<OnceLock<Weak<dyn Authority>>>,
    services: Arc<OnceLock<Arc<dyn Services>>>,
    verified: quick_cache::sync::Cache<Hash, Arc<Verified>>,
    counted: Counted,
}

/// Knows the registered services, and which clients they are.
pub trait Services: Send + Sync {
    /// Whether this client has registered an instance of this service, which is still there.
    fn provides<'a>(&'a self, client: &'a str, service: &'a str) -> BoxFuture<'a, Result<bool, Refusal>>;

    /// Whether there is an instance of this service.
    fn registered<'a>(&'a self, service: &'a str) -> BoxFuture<'a, Result<bool, Refusal>>;
}

/// What the room is made from.
pub struct Parts {
    /// The ledger.
    pub ledger: Ledger,
    /// The database.
    pub store: Store,
    /// The clock.
    pub clock: Clock,
    /// The room's projection.
    pub snapshot: Arc<Snapshot>,
    /// Seals signing keys.
    pub master: Arc<MasterKey>,
    /// What the configuration says of it.
    pub config: config::Token,
    /// What the issuer is where none is configured: the address that was bound.
    pub url: String,
    /// Where its metrics go.
    pub registry: Registry,
}

/// A token that was verified: what it claims, and whom it makes of its bearer.
struct Verified {
    claims: Claims,
    kid: String,
    bearer: Arc<Identity>,
}

impl Verified {
    fn new(claims: Claims, kid: String) -> Self {
        let mut clients = vec![claims.client_id.clone()];
        if claims.sub != claims.client_id {
            clients.push(claims.sub.clone());
        }
        let tokens: Vec<String> = std::iter::once(&claims.jti).chain(&claims.family).cloned().collect();
        let rests_on = clients.iter().map(|c| format!("client/{c}"));
        let rests_on = rests_on.chain(tokens.iter().map(|t| format!("token/{t}"))).chain([format!("key/{kid}")]);
        let depends = rests_on.map(|f| authz_fact(f.as_bytes())).collect();
        let credential = Credential {
            tokens,
            key: kid.clone(),
            clients,
            expires: claims.exp,
            issued: claims.iat * 1000,
            index: claims.sop_index,
            depends,
        };
        let bearer = Identity {
            actor: claims.sub.as_str().into(),
            principal: entity(&claims.sub),
            via: claims.act.iter().flat_map(|a| a.chain()).map(str::to_owned).collect(),
            scopes: clients::scopes(&claims.scope).unwrap_or_default(),
            credential: Some(credential),
        };
        Self { claims, kid, bearer: Arc::new(bearer) }
    }
}

/// What the token endpoint of this daemon is called: by the issuer, by the address that was bound, and, if that is a loopback one,
/// by the others of the same port. Never by the `Host` of a request: whoever sends it could make an assertion that was meant for
/// another server one for this.
fn endpoints(bound: &str, issuer: &str) -> Vec<String> {
    let mut names = vec![issuer.to_owned(), bound.to_owned()];
    let port = |prefix: &str| bound.strip_prefix(prefix).and_then(|rest| rest.split_once(':'));
    for scheme in ["http", "https"] {
        if let Some(("127.0.0.1" | "[", port)) = port(&format!("{scheme}://")) {
            let port = port.rsplit(':').next().unwrap_or(port);
            names.extend(["127.0.0.1", "localhost", "[::1]"].map(|host| format!("{scheme}://{host}:{port}")));
        }
    }
    names.sort();
    names.dedup();
    names.into_iter().map(|name| format!("{name}/oauth2/token")).collect()
}

impl Token {
    /// Opens the room: settles the issuer, and makes the first signing key.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn start(parts: Parts, tasks: &Supervisor) -> Result<Self, Refusal> {
        let config = parts.config;
        let lockout = Limits {
            failures: config.lockout_failures,
            window: config.lockout_window.get(),
            period: config.lockout_period.get(),
        };
        let scheme = if parts.url.starts_with("https:") { "https" } else { "http" };
        let offered = config.issuer.unwrap_or_else(|| parts.url.clone());
        let issuer = parts.ledger.settle("token.issuer", offered.as_bytes()).await?;
        let counted = Counted::new(&parts.registry).map_err(Refusal::internal)?;
        let private = config.jwks_private;
        let fetcher = Fetcher::new(private, parts.clock.clone(), counted.fetched.clone()).map_err(Refusal::internal)?;
        let room = Self(Arc::new(Room {
            ledger: parts.ledger,
            store: parts.store,
            clock: parts.clock.clone(),
            snapshot: parts.snapshot,
            scheme,
            endpoints: endpoints(&parts.url, &String::from_utf8_lossy(&issuer)),
            issuer: String::from_utf8_lossy(&issuer).into(),
            master: parts.master,
            ttl: config.ttl.get(),
            lead: config.key_lead.get(),
            lockout,
            agents: Arc::new(config.agents),
            quotas: Quotas::new(parts.clock.clone()),
            failures: lockout::none_yet(lockout),
            authority: Arc::default(),
            services: Arc::default(),
            verified: quick_cache::sync::Cache::new(REMEMBER),
            fetcher,
            private,
            counted,
        }));
        room.first_keys().await?;
        room.start_rotation(Some(config.key_rotation.get()).filter(|every| !every.is_zero()), tasks);
        room.start_tasks(tasks);
        Ok(room)
    }

    fn start_tasks(&self, tasks: &Supervisor) {
        let (room, kept) = (self.clone(), Arc::new(AtomicI64::new(0)));
        tasks.start(Task::periodic("token/seen", SEEN, move || {
            let (room, kept) = (room.clone(), kept.clone());
            async move {
                let now = room.clock.now();
                room.count_keys(now);
                let seen = room.snapshot.seen(Timestamp::from_millis(kept.load(Ordering::Relaxed)));
                if !seen.is_empty() {
                    let mut conn = room.store.reader().acquire().await?;
                    store::saw(&mut conn, &seen).await?;
                }
                kept.store(now.millis() - 1, Ordering::Relaxed);
                Ok(())
            }
        }));
        let room = self.clone();
        tasks.start(Task::periodic("token/tidy", Duration::from_secs(60), move || {
            let room = room.clone();
            async move {
                let now = room.clock.now();
                room.snapshot.forget(now);
                let mut conn = room.store.reader().acquire().await?;
                store::tidy(&mut conn, now).await.map_err(Into::into)
            }
        }));
    }

    /// Says how old the keys are that sign now, and how many tokens are held as revoked.
    fn count_keys(&self, now: Timestamp) {
        for alg in Alg::ALL {
            let age = self.snapshot.signing_since(alg, now).map_or(0, |since| now.since(since).as_secs());
            self.counted.key_age.with_label_values(&[alg.as_str()]).set(i64::try_from(age).unwrap_or(i64::MAX));
        }
        self.counted.held.set(i64::try_from(self.snapshot.revocations()).unwrap_or(i64::MAX));
    }

    /// A connection for reading.
    async fn reader(&self) -> Result<sqlx::pool::PoolConnection<sqlx::Postgres>, Refusal> {
        self.store.reader().acquire().await.map_err(|e| self.store.refusal(e))
    }

    /// Who decides whether a client may exchange a token.
    pub fn decided_by(&self, authority: Weak<dyn Authority>) {
        let _ = self.authority.set(authority);
    }

    /// Who knows which client a service is.
    pub fn served_by(&self, services: Arc<dyn Services>) {
        let _ = self.services.set(services);
    }

    /// The issuer of this database's tokens.
    #[must_use]
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// Makes the first administrator, if there is no client at all. True if it was made now.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn ensure_admin(&self, client_id: &str, secret: &str) -> Result<bool, Refusal> {
        // A start that has nothing to write must not fail because nothing can be written.
        if self.snapshot.has_clients() {
            return Ok(false);
        }
        match self.make_admin(client_id, secret, clients::Why::First).await {
            Ok(_) => {
                self.ledger.fence().await?;
                Ok(true)
            }
            Err(r) if r.problem() == &problem::CONFLICT => Ok(false),
            Err(r) => Err(r),
        }
    }

    /// Makes an administrator although there are clients: the way back in for an operator at the machine who has lost the
    /// others. The entry asks to be noticed.
    ///
    /// # Errors
    /// 409 when there is no client at all, and so nothing was lost.
    pub async fn recover_admin(&self, client_id: &str, secret: &str) -> Result<i64, Refusal> {
        if !self.snapshot.has_clients() {
            return Err(Refusal::new(
                &problem::CONFLICT,
                "this database has no client yet: sop serve makes the first administrator",
            ));
        }
        self.make_admin(client_id, secret, clients::Why::Recovery).await
    }

    async fn make_admin(&self, client_id: &str, secret: &str, why: clients::Why) -> Result<i64, Refusal> {
        let metadata: clients::Metadata = serde_json::from_value(
            serde_json::json!({"client_name": "admin", "scope": "admin", "agent_type": "system"}),
        )
        .map_err(Refusal::internal)?;
        let client = metadata.client(client_id.to_owned(), self).map_err(|e| Refusal::internal(e.code))?;
        let issued = clients::Issued { client, secret: Some(secret.to_owned()), registration: clients::secret()? };
        let who = Caller::daemon(if why == clients::Why::First { "token" } else { "operator" });
        Ok(self.ledger.write(&who, &[], clients::Register { issued, why }).await?.index)
    }

    /// What a client may have.
    #[must_use]
    pub fn allowance(&self, client_id: &str) -> Allowance {
        self.snapshot.client(client_id).map_or_else(Allowance::default, |r| r.client.allowance(&self.agents))
    }

    /// Uses some of what a client may have in an hour.
    fn spend(&self, client_id: &str, what: &'static str, quota: u32, amount: usize) -> Result<(), Refusal> {
        let amount = u32::try_from(amount).unwrap_or(u32::MAX);
        if quota == 0 {
            return Ok(());
        }
        self.quotas.spend(&client_id.into(), what, quota, amount).map(|_| ()).map_err(|limit| {
            self.counted.limited.with_label_values(&[what]).inc();
            quota::exceeded(format!("more than {quota} {what} an hour"), &[limit])
        })
    }

    /// Whether there is any client.
    #[must_use]
    pub fn has_client(&self, id: &str) -> bool {
        self.snapshot.has_client(id)
    }

    /// Verifies an access token: form, signature, issuer, times, client, revocation.
    fn verify(&self, token: &str) -> Result<Arc<Verified>, &'static str> {
        let digest = crypto::sha256(token.as_bytes());
        let now = self.clock.now();
        let verified = match self.verified.get(&digest) {
            Some(verified) if verified.claims.exp > now.seconds() => verified,
            Some(_) => return Err("expired"),
            None => {
                let public = self.snapshot.public();
                let (claims, key) = jwt::verify(token, &public, &self.issuer, now.seconds())?;
                let verified = Arc::new(Verified::new(claims, key.kid.clone()));
                self.verified.insert(digest, verified.clone());
                verified
            }
        };
        if !self.snapshot.counts(&verified.kid, now.seconds()) {
            return Err("kid");
        }
        if let Some(shown) = &verified.bearer.credential {
            if !self.snapshot.accepts(&shown.clients, shown.index, now) {
                return Err("client");
            }
            if self.snapshot.revoked(&shown.tokens) {
                return Err("revoked");
            }
        }
        Ok(verified)
    }

    /// Authenticates an `Authorization` header.
    ///
    /// # Errors
    /// 401, with one text for every reason.
    pub fn authenticate(&self, authorization: Option<&str>) -> Result<Arc<Identity>, Refusal> {
        let bearer = authorization.and_then(|a| {
            let (scheme, token) = a.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
        });
        let Some(token) = bearer else {
            return Err(Refusal::new(&problem::UNAUTHENTICATED, "this needs a bearer token")
                .with_header("www-authenticate", "Bearer realm=\"sop\""));
        };
        let refuse = |reason: &str| {
            self.counted.refused.with_label_values(&[reason]).inc();
            Refusal::new(&problem::UNAUTHENTICATED, "the bearer token is not valid (any more), or not for this daemon")
                .with_header("www-authenticate", "Bearer realm=\"sop\", error=\"invalid_token\"")
        };
        let began = self.clock.elapsed();
        let verified = self.verify(token);
        self.counted.verify.observe(self.clock.elapsed().saturating_sub(began).as_secs_f64());
        let verified = verified.map_err(refuse)?;
        if !verified.claims.aud.names(&self.issuer) {
            return Err(refuse("aud"));
        }
        Ok(verified.bearer.clone())
    }

    /// Whether what was shown still holds, as far as this daemon knows.
    #[must_use]
    pub fn holds(&self, c: &Credential) -> bool {
        let now = self.clock.now();
        c.expires > now.seconds()
            && self.snapshot.counts(&c.key, now.seconds())
            && self.snapshot.accepts(&c.clients, c.index, now)
            && !self.snapshot.revoked(&c.tokens)
    }
}

impl Bearers for Token {
    fn bearer(&self, token: &str) -> Option<Arc<Identity>> {
        self.verify(token).ok().map(|verified| verified.bearer.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::endpoints;

    #[test]
    fn the_token_endpoint_has_the_names_of_the_daemon_and_no_other() {
        let all = endpoints("http://127.0.0.1:7070", "http://127.0.0.1:7070").join(" ");
        assert_eq!(
            all,
            "http://127.0.0.1:7070/oauth2/token http://[::1]:7070/oauth2/token http://localhost:7070/oauth2/token"
        );
        assert!(
            endpoints("http://[::1]:7070", "https://sop.example")
                .contains(&"http://localhost:7070/oauth2/token".into())
        );
        let outside = endpoints("https://10.0.0.7:443", "https://sop.example");
        assert_eq!(outside, ["https://10.0.0.7:443/oauth2/token", "https://sop.example/oauth2/token"]);
    }
}
