//! What this daemon holds in memory to authenticate: clients, signing keys, revoked tokens.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use sqlx::PgConnection;

use crate::kernel::crypto::{self, MasterKey};
use crate::kernel::{BoxFuture, Timestamp};
use crate::ledger::{AUTHZ, Projection, Touch, What};

use super::keys::{Alg, PublicKey, TokenKey};
use super::lockout::Locked;
use super::store::{self, Registered};

/// Seals signing keys.
pub(super) const PURPOSE: &str = "token/signing-key";

/// A signing key and its times.
pub(super) struct Kept {
    pub key: Arc<TokenKey>,
    pub active_at: Timestamp,
    pub ends_at: Option<Timestamp>,
}

#[derive(Default)]
struct View {
    clients: HashMap<String, Arc<Registered>>,
    /// Newest first.
    keys: Vec<Arc<Kept>>,
    public: Arc<Vec<PublicKey>>,
    /// By what [`short`] makes of their ids.
    revoked: HashMap<u128, Timestamp>,
    locked: Vec<Locked>,
}

/// The room's view in memory.
pub struct Snapshot {
    master: Arc<MasterKey>,
    view: RwLock<View>,
}

impl Snapshot {
    /// Empty until the follower loads it.
    #[must_use]
    pub fn new(master: Arc<MasterKey>) -> Self {
        Self { master, view: RwLock::default() }
    }

    fn view(&self) -> RwLockReadGuard<'_, View> {
        self.view.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn client(&self, id: &str) -> Option<Arc<Registered>> {
        self.view().clients.get(id).cloned()
    }

    pub(super) fn has_client(&self, id: &str) -> bool {
        self.view().clients.contains_key(id)
    }

    /// Whether a token counts that was issued at `index`, as far as its clients go; who brings it was seen now.
    pub(super) fn accepts(&self, clients: &[String], index: i64, now: Timestamp) -> bool {
        let view = self.view();
        let good = clients.iter().all(|c| view.clients.get(c).is_some_and(|r| r.accepts(index)));
        if let Some(seen) = clients.first().and_then(|c| view.clients.get(c)).filter(|_| good) {
            seen.used.store(now.millis(), Ordering::Relaxed);
        }
        good
    }

    /// Clients that were seen since `after`, and when.
    pub(super) fn seen(&self, after: Timestamp) -> Vec<(String, Timestamp)> {
        let view = self.view();
        let at = |r: &Registered| Timestamp::from_millis(r.used.load(Ordering::Relaxed));
        view.clients.iter().map(|(id, r)| (id.clone(), at(r))).filter(|(_, at)| *at > after).collect()
    }

    pub(super) fn has_clients(&self) -> bool {
        !self.view().clients.is_empty()
    }

    /// The key that signs now: of those that may, the one that was announced last.
    pub(super) fn signer(&self, alg: Alg, now: Timestamp) -> Option<Arc<TokenKey>> {
        self.signing(alg, now).map(|k| k.key.clone())
    }

    /// Since when the key signs that signs now.
    pub(super) fn signing_since(&self, alg: Alg, now: Timestamp) -> Option<Timestamp> {
        self.signing(alg, now).map(|k| k.active_at)
    }

    fn signing(&self, alg: Alg, now: Timestamp) -> Option<Arc<Kept>> {
        let may = |k: &&Arc<Kept>| k.key.alg() == alg && k.active_at <= now && k.ends_at.is_none_or(|t| t > now);
        self.view().keys.iter().find(may).cloned()
    }

    /// How many tokens are held as revoked.
    pub(super) fn revocations(&self) -> usize {
        self.view().revoked.len()
    }

    /// The keys that are listed, newest first.
    pub(super) fn listed(&self, now: Timestamp) -> Vec<Arc<Kept>> {
        self.view().keys.iter().filter(|k| k.ends_at.is_none_or(|t| t > now)).cloned().collect()
    }

    /// When the oldest of the keys that are not being replaced began to sign.
    pub(super) fn newest(&self) -> Option<Timestamp> {
        self.view().keys.iter().filter(|k| k.ends_at.is_none()).map(|k| k.active_at).min()
    }

    /// Whether what this key signed counts.
    pub(super) fn counts(&self, kid: &str, now: i64) -> bool {
        self.view().public.iter().any(|k| k.kid == kid && k.counts(now))
    }

    pub(super) fn public(&self) -> Arc<Vec<PublicKey>> {
        self.view().public.clone()
    }

    /// Whether any of these tokens was revoked.
    pub(super) fn revoked(&self, tokens: &[String]) -> bool {
        let view = self.view();
        !view.revoked.is_empty() && tokens.iter().any(|jti| view.revoked.contains_key(&short(jti)))
    }

    pub(super) fn locked(&self, client: &str, block: &str, now: Timestamp) -> bool {
        self.view().locked.iter().any(|l| l.client_id == client && l.block == block && l.until > now)
    }

    pub(super) fn lockouts(&self, now: Timestamp) -> Vec<Locked> {
        self.view().locked.iter().filter(|l| l.until > now).cloned().collect()
    }

    /// Forgets revocations of tokens that have expired by themselves.
    pub(super) fn forget(&self, now: Timestamp) {
        self.view.write().unwrap_or_else(PoisonError::into_inner).revoked.retain(|_, expires| *expires > now);
    }

    fn open(&self, stored: &store::StoredKey) -> Option<Arc<Kept>> {
        let secret = self.master.open(PURPOSE, &stored.sealed)?;
        let key = TokenKey::open(stored.alg, &secret).ok()?;
        let (active_at, ends_at) = (stored.active_at, stored.ends_at);
        (key.kid() == stored.kid).then(|| Arc::new(Kept { key: Arc::new(key), active_at, ends_at }))
    }

    async fn load_keys(&self, conn: &mut PgConnection) -> Result<(), sqlx::Error> {
        let stored = store::keys(conn).await?;
        let keys: Vec<Arc<Kept>> = stored.iter().filter_map(|k| self.open(k)).collect();
        if keys.len() < stored.len() {
            tracing::error!("a signing key does not open under this master key and is left out");
        }
        let mut view = self.view.write().unwrap_or_else(PoisonError::into_inner);
        view.public = Arc::new(keys.iter().map(|k| PublicKey::of(&k.key, k.ends_at)).collect());
        view.keys = keys;
        Ok(())
    }
}

/// A token's id in 16 bytes, so that a million that were revoked fit into memory: ours are UUIDs, others are digested.
fn short(jti: &str) -> u128 {
    let digest = || crypto::sha256(jti.as_bytes()).iter().take(16).fold(0, |n, b| (n << 8) | u128::from(*b));
    uuid::Uuid::parse_str(jti).map_or_else(|_| digest(), |id| id.as_u128())
}

/// A registration that was read anew; when its client was last seen stays.
fn kept(mut r: Registered, was: &HashMap<String, Arc<Registered>>) -> (String, Arc<Registered>) {
    if let Some(was) = was.get(&r.client.client_id) {
        r.used = was.used.clone();
    }
    (r.client.client_id.clone(), Arc::new(r))
}

impl Projection for Snapshot {
    fn name(&self) -> &'static str {
        "token/snapshot"
    }

    fn kinds(&self) -> &'static [&'static str] {
        &[AUTHZ]
    }

    fn load<'a>(&'a self, conn: &'a mut PgConnection, _: i64) -> BoxFuture<'a, Result<(), sqlx::Error>> {
        Box::pin(async move {
            let clients = store::clients(conn).await?;
            let revoked = store::revocations(conn, -1).await?;
            let locked = store::lockouts(conn).await?;
            {
                let mut view = self.view.write().unwrap_or_else(PoisonError::into_inner);
                let was = std::mem::take(&mut view.clients);
                view.clients = clients.into_iter().map(|r| kept(r, &was)).collect();
                view.revoked = revoked.into_iter().map(|(jti, expires)| (short(&jti), expires)).collect();
                view.locked = locked;
            }
            self.load_keys(conn).await
        })
    }

    fn advance<'a>(
        &'a self,
        conn: &'a mut PgConnection,
        after: i64,
        _: i64,
        touched: &'a [(i64, Touch)],
    ) -> BoxFuture<'a, Result<(), sqlx::Error>> {
        Box::pin(async move {
            let facts: Vec<&str> = touched
                .iter()
                .filter(|(_, t)| t.kind == AUTHZ)
                .filter_map(|(_, t)| if let What::Key(k) = &t.what { std::str::from_utf8(k).ok() } else { None })
                .collect();
            let ids: Vec<String> = facts.iter().filter_map(|f| f.strip_prefix("client/")).map(str::to_owned).collect();
            if !ids.is_empty() {
                let found = store::some_clients(conn, &ids).await?;
                let mut view = self.view.write().unwrap_or_else(PoisonError::into_inner);
                let was: HashMap<_, _> = ids.iter().filter_map(|id| view.clients.remove_entry(id)).collect();
                view.clients.extend(found.into_iter().map(|r| kept(r, &was)));
            }
            if facts.iter().any(|f| f.starts_with("token/")) {
                let revoked = store::revocations(conn, after).await?;
                let revoked = revoked.into_iter().map(|(jti, expires)| (short(&jti), expires));
                self.view.write().unwrap_or_else(PoisonError::into_inner).revoked.extend(revoked);
            }
            if facts.contains(&"lockout") {
                let locked = store::lockouts(conn).await?;
                self.view.write().unwrap_or_else(PoisonError::into_inner).locked = locked;
            }
            if facts.contains(&"key") {
                self.load_keys(conn).await?;
            }
            Ok(())
        })
    }
}
