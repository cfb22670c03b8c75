//! How a client proves who it is: by its secret, or by an assertion signed with its key (RFC 7523).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::http::HeaderMap;
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use serde_json::Value;

use crate::kernel::web::{Ask, Authority, Caller, Identity, Permit, RequestInfo, block};
use crate::kernel::{BoxFuture, Clock, Refusal, Timestamp, crypto, problem};
use crate::ledger::{Command, Entry, Failure, Ledger, Tx, authz_fact};

use super::Token;
use super::form::{Claimed, Form, OAuthError};
use super::jwt::{self, Audience, LEEWAY};
use super::model::{AuthMethod, Client};
use super::snapshot::Snapshot;
use super::store::{self, Registered};

/// The longest an assertion may be good for, seconds: that long its id is remembered.
const ASSERTION_MOST: i64 = 3600;

/// A client that has proven who it is.
pub(super) struct Proven {
    pub registered: Arc<Registered>,
    /// The assertion it used.
    pub assertion: Option<Once>,
    /// The index as of which it has: what ended the client's tokens up to it does not end one that is given now.
    pub at: i64,
}

impl Proven {
    /// `reflected` is the index this daemon reflected before it looked. A registration is shown a moment before the daemon says
    /// that it reflects its index (other projections follow first), so it may be of a later one.
    fn new(registered: Arc<Registered>, assertion: Option<Once>, reflected: i64) -> Self {
        let at = reflected.max(registered.index);
        Self { registered, assertion, at }
    }

    pub fn client(&self) -> &Client {
        &self.registered.client
    }
}

/// Speaks for a client that has proven who it is, as long as its registration is the one it proved itself by, it is not locked out
/// and no key has changed: what is given to it rests on these, and the ledger looks whether they still hold.
struct Vouched {
    snapshot: Arc<Snapshot>,
    ledger: Ledger,
    clock: Clock,
    client_id: String,
    block: String,
    index: i64,
}

impl Authority for Vouched {
    fn decide<'a>(&'a self, _: &'a Caller, _: &'a [Ask]) -> BoxFuture<'a, Result<Permit, Refusal>> {
        Box::pin(async move {
            let at = self.ledger.index();
            let same = self.snapshot.client(&self.client_id).is_some_and(|r| r.index == self.index);
            if !same || self.snapshot.locked(&self.client_id, &self.block, self.clock.now()) {
                return Err(Refusal::new(&problem::UNAUTHENTICATED, "the client's registration has just changed"));
            }
            let depends = [fact(&self.client_id), authz_fact(b"lockout"), authz_fact(b"key")].into_iter().collect();
            Ok(Permit { allowed: true, at, depends, decision: None, denied: None, waits: None, proposal: None })
        })
    }
}

/// What the ledger knows a client's registration by.
pub(super) fn fact(client_id: &str) -> u64 {
    authz_fact(format!("client/{client_id}").as_bytes())
}

#[derive(Deserialize)]
struct Assertion {
    iss: String,
    sub: String,
    aud: Audience,
    // Numbers that may have fractions (RFC 7519, 2).
    exp: f64,
    jti: String,
    #[serde(default)]
    nbf: Option<f64>,
    #[serde(default)]
    iat: Option<f64>,
}

impl Token {
    /// A client that has proven who it is, as the record and policies see it.
    pub(super) fn vouched(&self, proven: &Proven, info: Arc<RequestInfo>) -> Caller {
        let client = proven.client();
        let identity = Identity {
            actor: client.client_id.as_str().into(),
            principal: client.entity(),
            scopes: Vec::new(),
            credential: None,
            via: Vec::new(),
        };
        let authority = Vouched {
            snapshot: self.snapshot.clone(),
            ledger: self.ledger.clone(),
            clock: self.clock.clone(),
            block: block(info.peer),
            client_id: client.client_id.clone(),
            index: proven.registered.index,
        };
        Caller::new(Arc::new(identity), info, Arc::new(authority))
    }

    /// Who the client is. `newest`: what is newest is looked up first, because the answer rests on nothing else. Without it a client
    /// that this daemon does not know (any more) is looked up anew: it may have been registered, or deleted, on another.
    pub(super) async fn prove(
        &self,
        headers: &HeaderMap,
        form: &Form,
        info: &Arc<RequestInfo>,
        newest: bool,
    ) -> Result<Proven, OAuthError> {
        let claimed = Claimed::find(headers, form)?;
        if newest {
            self.ledger.fence().await?;
        }
        let mut looked = self.look(&claimed, info).await;
        if looked.is_err() && !newest {
            self.ledger.fence().await?;
            looked = self.look(&claimed, info).await;
        }
        match looked {
            Ok(proven) => {
                proven.registered.used.store(self.clock.now().millis(), Ordering::Relaxed);
                Ok(proven)
            }
            Err(locked) => {
                if let (Some(id), false) = (claimed.client(), locked) {
                    self.failed(&id, info).await;
                }
                self.counted.refused.with_label_values(&[if locked { "locked" } else { "client" }]).inc();
                Err(OAuthError::invalid_client(matches!(claimed, Claimed::Secret { basic: true, .. })))
            }
        }
    }

    /// Who the client is, where nothing is recorded by which its assertion would be used up: it is used up here.
    pub(super) async fn prove_once(
        &self,
        headers: &HeaderMap,
        form: &Form,
        info: &Arc<RequestInfo>,
    ) -> Result<Proven, OAuthError> {
        let proven = self.prove(headers, form, info, true).await?;
        let Some(assertion) = proven.assertion else { return Ok(proven) };
        let use_up = UseUp { client_id: proven.client().client_id.clone(), assertion };
        match self.ledger.write(&self.vouched(&proven, info.clone()), &[], use_up).await {
            Ok(_) => Ok(proven),
            Err(r) if r.problem() == &problem::CONFLICT => {
                self.counted.refused.with_label_values(&["replay"]).inc();
                Err(OAuthError::invalid_client(false))
            }
            Err(r) if r.problem() == &problem::UNAUTHENTICATED => Err(OAuthError::changed()),
            Err(r) => Err(r.into()),
        }
    }

    /// The client, as far as this daemon knows. `Err(true)`: it is locked out.
    async fn look(&self, claimed: &Claimed, info: &RequestInfo) -> Result<Proven, bool> {
        let at = self.ledger.index();
        let proven = match claimed {
            Claimed::Secret { id, secret, .. } => self.secret(id, secret, at),
            Claimed::Assertion { assertion, id } => self.assertion(assertion, id.as_deref(), at).await,
        };
        // Looked at last, so that a lock-out takes the same time and is answered as a wrong secret is.
        let locked = claimed.client().is_some_and(|id| self.locked(&id, info));
        proven.filter(|_| !locked).ok_or(locked)
    }

    fn secret(&self, id: &str, secret: &str, at: i64) -> Option<Proven> {
        let found = self.snapshot.client(id);
        // The same work for an unknown client: no oracle in the time it takes.
        let kept = found.as_ref().and_then(|r| r.secret.as_deref()).unwrap_or(&[0; 32]);
        let now = self.clock.now();
        let before = found.as_ref().and_then(|r| r.previous.as_ref()).filter(|(_, until)| *until > now);
        let before = before.map_or(&[0; 32][..], |(digest, _)| digest);
        let shown = crypto::sha256(secret.as_bytes());
        let good = crypto::same(kept, &shown) | crypto::same(before, &shown);
        let fits = |r: &Arc<Registered>| good && !r.disabled && r.client.auth_method != AuthMethod::PrivateKeyJwt;
        found.filter(fits).map(|registered| Proven::new(registered, None, at))
    }

    /// Checks a client assertion (RFC 7523, 3). Whether it was used before is seen when it is used.
    async fn assertion(&self, text: &str, id: Option<&str>, at: i64) -> Option<Proven> {
        let header: Signed = serde_json::from_slice(&jwt::head(text)?).ok()?;
        // Typed otherwise, it was made for something else (RFC 8725, 3.11).
        if !matches!(header.typ.as_deref(), None | Some("JWT" | "jwt" | "client-authentication+jwt")) {
            return None;
        }
        let (algorithm, kind) = header.algorithm()?;
        if [&header.crit, &header.jwk, &header.jku, &header.x5u].iter().any(|m| m.is_some()) {
            return None;
        }
        // Whose keys to use is what it says of itself; that it says the truth is what the signature then shows.
        let body = text.split('.').nth(1).and_then(crypto::from_base64url)?;
        let claimed: Assertion = serde_json::from_slice(&body).ok()?;
        let registered = self.snapshot.client(&claimed.iss).filter(|r| !r.disabled)?;
        let client = &registered.client;
        let same = claimed.iss == claimed.sub && id.is_none_or(|id| id == claimed.iss);
        if !same || client.auth_method != AuthMethod::PrivateKeyJwt {
            return None;
        }
        let kid = header.kid.as_deref();
        let fetched;
        let keys = match (&client.jwks_uri, &client.jwks) {
            (Some(uri), _) => {
                fetched = self.fetcher.keys(uri, kid).await;
                &*fetched
            }
            (None, Some(jwks)) => jwks["keys"].as_array()?,
            (None, None) => return None,
        };
        let signed = keys.iter().filter(|k| header.fits(k, kind)).any(|key| signed(text, key, algorithm));
        let now = self.clock.now().seconds() as f64;
        let for_us = claimed.aud.names(&self.issuer) || self.endpoints.iter().any(|e| claimed.aud.names(e));
        let (leeway, most) = (LEEWAY as f64, (ASSERTION_MOST + LEEWAY) as f64);
        let timely = claimed.exp > now
            && claimed.exp <= now + most
            && claimed.nbf.is_none_or(|t| t <= now + leeway)
            && claimed.iat.is_none_or(|t| t <= now + leeway);
        if !signed || !for_us || !timely || claimed.jti.is_empty() {
            return None;
        }
        let digest = crypto::sha256(format!("{}\n{}", client.client_id, claimed.jti).as_bytes());
        let assertion = Some((digest, Timestamp::from_millis((claimed.exp * 1000.0) as i64)));
        Some(Proven::new(registered, assertion, at))
    }
}

/// The header of an assertion. Others make these: what is not understood is ignored, unless `crit` says that it must not be. One
/// that brings a key, or says where there is one, is an attack or a mistake (RFC 8725, 3.10).
#[derive(Deserialize)]
struct Signed {
    alg: String,
    #[serde(default)]
    typ: Option<String>,
    #[serde(default)]
    kid: Option<String>,
    #[serde(default)]
    crit: Option<Value>,
    #[serde(default)]
    jwk: Option<Value>,
    #[serde(default)]
    jku: Option<Value>,
    #[serde(default)]
    x5u: Option<Value>,
}

impl Signed {
    fn algorithm(&self) -> Option<(Algorithm, &'static str)> {
        match self.alg.as_str() {
            // Two names of one (RFC 8037, RFC 9864).
            "EdDSA" | "Ed25519" => Some((Algorithm::EdDSA, "OKP")),
            "ES256" => Some((Algorithm::ES256, "EC")),
            "RS256" => Some((Algorithm::RS256, "RSA")),
            "PS256" => Some((Algorithm::PS256, "RSA")),
            _ => None,
        }
    }

    /// Whether a key may have signed it: by its id, its type, and what it says it is for.
    fn fits(&self, key: &Value, kind: &str) -> bool {
        let same = |name: &str| if name == "Ed25519" { "EdDSA".to_owned() } else { name.to_owned() };
        let said = |name: &str| key[name].as_str();
        self.kid.as_deref().is_none_or(|kid| said("kid").is_none_or(|have| have == kid))
            && said("kty") == Some(kind)
            && said("alg").is_none_or(|alg| same(alg) == same(&self.alg))
            && said("use").is_none_or(|used| used == "sig")
    }
}

/// Whether this key signed it.
fn signed(text: &str, key: &Value, algorithm: Algorithm) -> bool {
    let mut bare = key.clone();
    if let Some(members) = bare.as_object_mut() {
        // Looked at already, and not all of their values are known to who reads the key.
        ["alg", "use", "key_ops"].iter().for_each(|name| drop(members.remove(*name)));
    }
    let jwk: Result<jsonwebtoken::jwk::Jwk, _> = serde_json::from_value(bare);
    let Some(key) = jwk.ok().and_then(|jwk| DecodingKey::from_jwk(&jwk).ok()) else { return false };
    let Some((message, signature)) = text.rsplit_once('.') else { return false };
    jsonwebtoken::crypto::verify(signature, message.as_bytes(), &key, algorithm).unwrap_or(false)
}

/// An assertion: the digest of its id, and when it ends.
pub(super) type Once = ([u8; 32], Timestamp);

/// Uses up an assertion: it is good once, on whichever daemon.
///
/// # Errors
/// 409 if it was used before.
pub(super) async fn use_up(tx: &mut Tx<'_>, (digest, expires): &Once) -> Result<(), Failure> {
    if store::assertion_used(tx.read(), digest).await? {
        return Err(Refusal::new(&problem::CONFLICT, "the assertion was used before").into());
    }
    Ok(store::use_assertion(tx.write(), digest, *expires).await?)
}

/// The use of an assertion for something that is not recorded with it.
struct UseUp {
    client_id: String,
    assertion: Once,
}

impl Command for UseUp {
    type Out = ();

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<((), Entry), Failure> {
        use_up(tx, &self.assertion).await?;
        Ok(((), Entry::ok("token:prove", format!("client/{}", self.client_id))))
    }
}
