//! Keys, their history, and who watches them.
//!
//! **Invariants.** A key's `index` is the index of the entry that last changed it. Every change has one history row, tombstones
//! included, and history rows never change: the state as of any index that was not compacted can be read. A list is of one
//! moment, over all its pages.
//!
//! **Not here.** Who may (`governance`), how a change commits (`ledger`), the record of it (`audit`).
//!
//! **Why this way.** Values stand twice, in `kv` and in `history`: a read of the present is one look-up in a small hot table,
//! and a read of the past needs no undo.

pub mod http;
pub mod kv;
mod metrics;
pub mod model;
mod recent;
mod store;
mod watch;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sqlx::PgConnection;

use crate::kernel::web::{Ask, Caller, cursor};
use crate::kernel::{Refusal, problem};
use crate::ledger::{Committed, Ledger};
use crate::store::Store;

pub use metrics::Metrics;
use model::{Condition, Deleted, Item, Written};
pub use watch::Hub;

/// How a read chooses its moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    /// As of this index; otherwise the present.
    pub at: Option<i64>,
}

/// The room. Cheap to clone.
#[derive(Clone)]
pub struct State {
    ledger: Ledger,
    store: Store,
    hub: Arc<Hub>,
    metrics: Metrics,
}

/// A page of keys.
pub struct Page {
    /// The moment it is of.
    pub index: i64,
    /// In order of the key.
    pub items: Vec<Item>,
    /// Where the next page begins.
    pub next: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Cursor {
    at: i64,
    key: String,
}

impl State {
    /// On the ledger; `hub` is the projection that feeds watches.
    #[must_use]
    pub fn new(ledger: Ledger, store: Store, hub: Arc<Hub>, metrics: Metrics) -> Self {
        Self { ledger, store, hub, metrics }
    }

    /// Puts a value.
    ///
    /// # Errors
    /// 412 when the condition does not hold.
    pub async fn put(&self, caller: &Caller, put: kv::Put) -> Result<Committed<Written>, Refusal> {
        let ask = Ask::new("state:put", "Key", put.key.clone());
        let done = self.ledger.write(caller, &[ask], put).await?;
        self.metrics.count("put");
        Ok(done)
    }

    /// Deletes a key.
    ///
    /// # Errors
    /// 404 when it is not there, 412 when the condition does not hold.
    pub async fn delete(
        &self,
        caller: &Caller,
        key: String,
        condition: Condition,
    ) -> Result<Committed<Deleted>, Refusal> {
        let ask = Ask::new("state:delete", "Key", key.clone());
        let done = self.ledger.write(caller, &[ask], kv::Delete { key, condition }).await?;
        self.metrics.count("delete");
        Ok(done)
    }

    /// Reads a key: the state and the index it is of.
    ///
    /// # Errors
    /// 404 when it is not there, 400 beyond the head, 410 before the compaction mark.
    pub async fn get(&self, caller: &Caller, key: &str, moment: Moment) -> Result<(i64, Arc<Item>), Refusal> {
        self.ledger.permit(caller, &[Ask::new("state:get", "Key", key)]).await?;
        self.metrics.count("get");
        let head = self.ledger.index();
        let (index, item) = match moment.at {
            None => (head, self.present(key.as_bytes()).await?),
            Some(at) => {
                self.in_history(at, head)?;
                let mut conn = self.connection().await?;
                let item = store::as_of(&mut conn, key.as_bytes(), at).await.map_err(|e| self.store.refusal(e))?;
                self.not_compacted(&mut conn, at).await?;
                (at, item.map(Arc::new))
            }
        };
        match item {
            // The row may be newer than the index this daemon reflects; the answer says the newer.
            Some(item) => Ok((index.max(item.index), item)),
            None => Err(Refusal::not_found(format!("key {key}")).recorded_at(index)),
        }
    }

    /// Lists the keys under a prefix. All pages are of the first one's moment.
    ///
    /// # Errors
    /// 400 on a cursor that is not ours, 410 when that moment was compacted meanwhile.
    pub async fn list(
        &self,
        caller: &Caller,
        prefix: &str,
        moment: Moment,
        limit: usize,
        after: Option<&str>,
    ) -> Result<Page, Refusal> {
        self.ledger.permit(caller, &[Ask::new("state:list", "Key", prefix)]).await?;
        self.metrics.count("list");
        let head = self.ledger.index();
        let from: Option<Cursor> = after.map(cursor::decode).transpose()?;
        let at = from.as_ref().map(|c| c.at).or(moment.at);
        let take = i64::try_from(limit).unwrap_or(1000) + 1;
        let mut conn = self.connection().await?;
        let refusal = |e| self.store.refusal(e);
        let (index, mut items) = match at {
            None => store::list_current(&mut conn, prefix.as_bytes(), take).await.map_err(refusal)?,
            Some(at) => {
                self.in_history(at, head)?;
                let after = from.as_ref().and_then(|c| crate::kernel::crypto::from_base64(&c.key));
                let items = store::list_as_of(&mut conn, prefix.as_bytes(), after.as_deref(), at, take)
                    .await
                    .map_err(refusal)?;
                self.not_compacted(&mut conn, at).await?;
                (at, items)
            }
        };
        let more = items.len() > limit;
        items.truncate(limit);
        let next = items
            .last()
            .filter(|_| more)
            .map(|last| cursor::encode(&Cursor { at: index, key: crate::kernel::crypto::base64(&last.key) }));
        Ok(Page { index, items, next })
    }

    /// The key as it is, from memory if nothing changed it since it was read.
    async fn present(&self, key: &[u8]) -> Result<Option<Arc<Item>>, Refusal> {
        let recent = &self.hub.recent;
        if let Some(item) = recent.get(key) {
            return Ok(Some(item));
        }
        let changes = recent.changes(key);
        let mut conn = self.connection().await?;
        let item = store::current(&mut conn, key).await.map_err(|e| self.store.refusal(e))?.map(Arc::new);
        if let Some(item) = &item {
            recent.keep(changes, item);
        }
        Ok(item)
    }

    async fn connection(&self) -> Result<sqlx::pool::PoolConnection<sqlx::Postgres>, Refusal> {
        self.store.reader().acquire().await.map_err(|e| self.store.refusal(e))
    }

    fn in_history(&self, at: i64, head: i64) -> Result<(), Refusal> {
        if at > head {
            return Err(Refusal::new(&problem::BEYOND_HEAD, format!("index {at} is beyond the head, which is {head}")));
        }
        Ok(())
    }

    /// Checked after the history was read: compaction commits its mark before it drops a row.
    async fn not_compacted(&self, conn: &mut PgConnection, at: i64) -> Result<(), Refusal> {
        let mark = store::mark(conn).await.map_err(|e| self.store.refusal(e))?;
        if at < mark {
            return Err(Refusal::new(&problem::COMPACTED, format!("history before index {mark} was compacted")));
        }
        Ok(())
    }
}
