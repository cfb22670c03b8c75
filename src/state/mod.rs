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

mod board;
mod compaction;
mod election;
mod etcd;
pub mod http;
mod hub;
pub mod kv;
mod leases;
mod locks;
mod metrics;
pub mod model;
mod places;
mod range;
mod recent;
mod span;
mod store;
mod txn;
mod verbs;
mod waiting;
mod watch;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::config::History;
use crate::kernel::supervisor::Supervisor;
use crate::kernel::web::{Ask, Caller, cursor};
use crate::kernel::{Clock, Refusal, crypto, problem};
use crate::ledger::{Committed, Failure, Ledger};
use crate::store::Store;

pub use hub::Hub;
pub use kv::kind_of_keys;
use leases::Renewals;
pub use metrics::Metrics;
use model::{Condition, Deleted, Item, Written};
use places::Places;
use store::{Wanted, history};
use txn::{Answered, Txn};
pub use waiting::fenced;

/// What the room is made from.
pub struct Parts<'a> {
    /// Where it writes.
    pub ledger: Ledger,
    /// Where it reads.
    pub store: Store,
    /// Durations.
    pub clock: Clock,
    /// The projection that feeds watches.
    pub hub: Arc<Hub>,
    /// Where it counts.
    pub metrics: Metrics,
    /// How much of the past is kept.
    pub history: History,
    /// The address that was bound.
    pub url: &'a str,
}

/// How a read chooses its moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    /// As of this index; otherwise the present.
    pub at: Option<i64>,
}

/// The room. Cheap to clone: every request does so more than once.
#[derive(Clone)]
pub struct State(Arc<Room>);

/// What the room holds.
pub struct Room {
    ledger: Ledger,
    store: Store,
    clock: Clock,
    hub: Arc<Hub>,
    metrics: Metrics,
    renewals: Renewals,
    places: Places,
    face: etcd::Face,
}

impl std::ops::Deref for State {
    type Target = Room;

    fn deref(&self) -> &Room {
        &self.0
    }
}

/// The table of the room that is partitioned by index as the entries are.
pub const PARTITIONED: &str = "state.renewals";

/// The records of renewals, for who gives receipts of them.
#[must_use]
pub fn records(store: &Store) -> Arc<dyn crate::audit::Records> {
    Arc::new(leases::Renewed(store.clone()))
}

/// What a list asks for.
pub struct List<'a> {
    /// Keys that begin so.
    pub prefix: &'a str,
    /// As of this index; otherwise the present.
    pub at: Option<i64>,
    /// Keys on the page at most.
    pub limit: usize,
    /// `next` of the page before.
    pub after: Option<&'a str>,
    /// With their values.
    pub values: bool,
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
    /// Opens the room and starts its tasks.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn start(parts: Parts<'_>, tasks: &Supervisor) -> Result<Self, Refusal> {
        let Parts { ledger, store, clock, hub, metrics, history, url } = parts;
        let face = etcd::Face::settled(&ledger, url).await?;
        let renewals = Renewals::start(ledger.clone(), metrics.clone(), tasks);
        leases::expire(store.clone(), ledger.clone(), clock.clone(), metrics.clone(), tasks);
        compaction::start(store.clone(), ledger.clone(), clock.clone(), metrics.clone(), history, tasks);
        Ok(Self(Arc::new(Room { ledger, store, clock, hub, metrics, renewals, places: Places::default(), face })))
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
                let read = history::as_of(&mut conn, key.as_bytes(), at).await;
                let (mark, item) = read.map_err(|e| self.store.refusal(e))?;
                not_compacted(at, mark)?;
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
    pub async fn list(&self, caller: &Caller, asked: List<'_>) -> Result<Page, Refusal> {
        self.ledger.permit(caller, &[Ask::new("state:list", "Key", asked.prefix)]).await?;
        self.metrics.count("list");
        let head = self.ledger.index();
        let from: Option<Cursor> = asked.after.map(cursor::decode).transpose()?;
        if let (Some(from), Some(at)) = (&from, asked.at)
            && from.at != at
        {
            return Err(Refusal::malformed("?at", format!("the pages of this list are of index {}", from.at)));
        }
        let at = from.as_ref().map(|c| c.at).or(asked.at);
        let after = from.map(|c| crypto::from_base64(&c.key).filter(|key| key.starts_with(asked.prefix.as_bytes())));
        if after == Some(None) {
            return Err(Refusal::malformed("?after", "it is of a list of other keys"));
        }
        let after = after.flatten();
        let wanted = Wanted {
            prefix: asked.prefix.as_bytes(),
            after: after.as_deref(),
            limit: i64::try_from(asked.limit).unwrap_or(1000),
            values: asked.values,
            bytes: store::PAGE_BYTES,
        };
        let mut conn = self.connection().await?;
        let found = match at {
            None => store::list(&mut conn, &wanted).await.map_err(|e| self.store.refusal(e))?,
            Some(at) => {
                self.in_history(at, head)?;
                let found = history::list_as_of(&mut conn, &wanted, at).await.map_err(|e| self.store.refusal(e))?;
                not_compacted(at, found.mark)?;
                found
            }
        };
        let (index, items) = (found.head, found.items);
        let next = items
            .last()
            .filter(|_| found.more)
            .map(|last| cursor::encode(&Cursor { at: index, key: crypto::base64(&last.key) }));
        Ok(Page { index, items, next })
    }

    /// Compares, then does one of two lists of operations, all at one index. What only reads takes none.
    async fn txn(&self, caller: &Caller, mut txn: Txn) -> Result<(i64, Answered), Refusal> {
        let asks = txn.asks();
        caller.actor().clone_into(&mut txn.owner);
        let answered = if txn.reads() {
            self.ledger.permit(caller, &asks).await?;
            // A read like any other: what was acknowledged before it arrived is in it.
            self.ledger.fence().await?;
            self.snapshot(&txn).await?
        } else {
            self.change(caller, &asks, txn).await?
        };
        self.metrics.count("txn");
        Ok((answered.index, answered))
    }

    /// Reads a transaction that changes nothing, of one moment.
    async fn snapshot(&self, txn: &Txn) -> Result<Answered, Refusal> {
        let refusal = |e| self.store.refusal(e);
        let mut tx = self.store.moment().await.map_err(refusal)?;
        let index = store::head(&mut tx).await.map_err(refusal)?;
        let answered = match txn.read(&mut tx, index).await {
            Ok(answered) => answered,
            Err(Failure::Refused(r)) => return Err(r),
            Err(Failure::Database(e)) => return Err(refusal(e)),
        };
        tx.commit().await.map_err(refusal)?;
        Ok(answered)
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
        if at < 0 {
            return Err(Refusal::malformed("?at", "at is an index, from 0"));
        }
        if at > head {
            return Err(Refusal::new(&problem::BEYOND_HEAD, format!("index {at} is beyond the head, which is {head}")));
        }
        Ok(())
    }
}

/// What was read of history at `at` is whole unless the mark, seen in the same snapshot, is past it.
fn not_compacted(at: i64, mark: i64) -> Result<(), Refusal> {
    if at < mark { Err(compacted(mark)) } else { Ok(()) }
}

fn compacted(mark: i64) -> Refusal {
    Refusal::new(&problem::COMPACTED, format!("history before index {mark} was compacted")).with("before", mark)
}
