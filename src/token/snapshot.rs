//! What this daemon holds in memory to authenticate: clients, signing keys, revoked tokens.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use sqlx::PgConnection;

use crate::kernel::crypto::{Hash, MasterKey, SigningKey};
use crate::kernel::{BoxFuture, Timestamp};
use crate::ledger::{AUTHZ, Projection, Touched, What};

use super::jwt::TokenKey;
use super::store::{self, Registered};

/// Seals signing keys.
pub(super) const PURPOSE: &str = "token/signing-key";

#[derive(Default)]
struct View {
    clients: HashMap<String, Registered>,
    /// Newest first: the first signs.
    keys: Vec<Arc<TokenKey>>,
    public: Arc<Vec<(String, Hash)>>,
    revoked: HashMap<String, Timestamp>,
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

    pub(super) fn client(&self, id: &str) -> Option<Registered> {
        self.view().clients.get(id).cloned()
    }

    pub(super) fn has_client(&self, id: &str) -> bool {
        self.view().clients.contains_key(id)
    }

    pub(super) fn has_clients(&self) -> bool {
        !self.view().clients.is_empty()
    }

    pub(super) fn signer(&self) -> Option<Arc<TokenKey>> {
        self.view().keys.first().cloned()
    }

    pub(super) fn keys(&self) -> Vec<Arc<TokenKey>> {
        self.view().keys.clone()
    }

    pub(super) fn public(&self) -> Arc<Vec<(String, Hash)>> {
        self.view().public.clone()
    }

    pub(super) fn revoked(&self, jti: &str) -> bool {
        self.view().revoked.contains_key(jti)
    }

    /// Forgets revocations of tokens that have expired by themselves.
    pub(super) fn forget(&self, now: Timestamp) {
        self.view.write().unwrap_or_else(PoisonError::into_inner).revoked.retain(|_, expires| *expires > now);
    }

    fn open(&self, stored: &store::StoredKey) -> Option<Arc<TokenKey>> {
        let seed = self.master.open(PURPOSE, &stored.sealed)?;
        let key = TokenKey::new(SigningKey::from_seed(&seed).ok()?);
        (key.kid() == stored.kid).then(|| Arc::new(key))
    }

    async fn load_keys(&self, conn: &mut PgConnection) -> Result<(), sqlx::Error> {
        let stored = store::keys(conn).await?;
        let keys: Vec<Arc<TokenKey>> = stored.iter().filter_map(|k| self.open(k)).collect();
        if keys.len() < stored.len() {
            tracing::error!("a signing key does not open under this master key and is left out");
        }
        let mut view = self.view.write().unwrap_or_else(PoisonError::into_inner);
        view.public = Arc::new(keys.iter().map(|k| (k.kid().to_owned(), k.public())).collect());
        view.keys = keys;
        Ok(())
    }
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
            {
                let mut view = self.view.write().unwrap_or_else(PoisonError::into_inner);
                view.clients = clients.into_iter().map(|r| (r.client.client_id.clone(), r)).collect();
                view.revoked = revoked.into_iter().collect();
            }
            self.load_keys(conn).await
        })
    }

    fn advance<'a>(
        &'a self,
        conn: &'a mut PgConnection,
        after: i64,
        _: i64,
        touched: &'a [(i64, Touched)],
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
                ids.iter().for_each(|id| drop(view.clients.remove(id)));
                view.clients.extend(found.into_iter().map(|r| (r.client.client_id.clone(), r)));
            }
            if facts.iter().any(|f| f.starts_with("token/")) {
                let revoked = store::revocations(conn, after).await?;
                self.view.write().unwrap_or_else(PoisonError::into_inner).revoked.extend(revoked);
            }
            if facts.contains(&"key") {
                self.load_keys(conn).await?;
            }
            Ok(())
        })
    }
}
