//! The operations of a branch, one after the other: what is known before the first, and what was done so far.

use std::collections::HashMap;

use serde_json::{Map, Value};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::kernel::{Refusal, problem};
use crate::ledger::{Entry, Failure, Touch, Tx};

use super::ahead::Ahead;
use super::nested::Results;
use super::standings::Standings;
use super::{Delete, Lease, Op, Outcome, Put, Tell, Told};
use crate::state::kv::KEY;
use crate::state::leases;
use crate::state::model::{Change, Item};
use crate::state::range::{self, Found, Range};
use crate::state::span::{Span, shown};
use crate::state::store::{self, Standing, history, leases as lease_rows, ranges, txn as rows};

/// Values that a transaction gives at most, bytes.
pub(super) const READ_MOST: i64 = 4 * 1024 * 1024;
/// Keys that it gives at most.
const KEYS_MOST: i64 = 100_000;

/// Refuses puts that keep what is not there, or are to hang on what is not there or not their owner's; the first of them.
async fn possible(conn: &mut PgConnection, branch: &[&Op], owner: &str, known: &Known) -> Result<(), Failure> {
    let puts = || branch.iter().filter_map(|op| if let Op::Put(put) = op { Some(put) } else { None });
    let on = |put: &Put| if let Lease::On(lease) = put.lease { lease } else { None };
    let wanted: Vec<Uuid> = puts().filter_map(on).collect();
    let there = if wanted.is_empty() { Vec::new() } else { lease_rows::owned(conn, &wanted, owner).await? };
    for put in puts() {
        if put.keeps() && !known.items.contains_key(&put.key) {
            // Only etcd's gateway can ask for it, in its own words.
            return Err(Refusal::new(&problem::MALFORMED, "etcdserver: key not found").into());
        }
        if let Some(missing) = on(put).filter(|lease| !there.contains(lease)) {
            return Err(leases::absent(missing).into());
        }
    }
    Ok(())
}

/// What must be known before the first change: after it nothing may be refused.
#[derive(Default)]
pub(super) struct Known {
    /// Of the keys that may change.
    standings: Standings,
    /// Keys whose value, type or lease stays, or is told.
    items: HashMap<Vec<u8>, Item>,
    /// What is read of the past, by the operation's place.
    past: HashMap<usize, Found>,
}

impl Known {
    /// Only where keys stand.
    pub fn standing(standings: Standings) -> Self {
        Self { standings, ..Self::default() }
    }

    /// `branch`: what is done, one after the other, transactions inside taken apart.
    pub async fn load(conn: &mut PgConnection, branch: &[&Op], owner: &str, head: i64) -> Result<Self, Failure> {
        let mut known = Self::default();
        let (mut changed, mut whole) = (Vec::new(), Vec::new());
        for op in branch {
            match op {
                Op::Put(put) => {
                    changed.push(put.key.clone());
                    if put.before || put.keeps() {
                        whole.push(put.key.as_slice());
                    }
                }
                Op::Delete(delete) => changed.extend(delete.keys.single().map(<[u8]>::to_vec)),
                Op::Get(_) | Op::Txn(_) => {}
            }
        }
        if !changed.is_empty() {
            changed.sort_unstable();
            changed.dedup();
            let found: HashMap<_, _> = store::standings(conn, &changed).await?.into_iter().collect();
            let at = changed.iter().map(|key| found.get(key).copied()).collect();
            known.standings = Standings::new(changed.into(), at);
        }
        if !whole.is_empty() {
            known.items = ranges::items(conn, &whole).await?.into_iter().map(|i| (i.key.clone(), i)).collect();
        }
        possible(conn, branch, owner, &known).await?;
        light(conn, branch).await?;
        known.past = past(conn, branch, head).await?;
        Ok(known)
    }

    /// What the operation at a place gets.
    pub async fn get(&self, conn: &mut PgConnection, i: usize, range: &Range) -> Result<Found, sqlx::Error> {
        match (self.past.get(&i), range.keys.single()) {
            (Some(found), _) => Ok(found.clone()),
            (None, Some(key)) => Ok(range::alone(range, 0, store::current(conn, key).await?.as_ref())),
            (None, None) => ranges::read(conn, range, i64::MAX).await,
        }
    }
}

async fn past(conn: &mut PgConnection, branch: &[&Op], head: i64) -> Result<HashMap<usize, Found>, Failure> {
    let mut past = HashMap::new();
    for (i, op) in branch.iter().enumerate() {
        if let Op::Get(range) = op
            && let Some(at) = range.at
        {
            range::reachable(at, head, history::mark(conn).await?)?;
            let found = ranges::read(conn, range, READ_MOST).await?;
            range::reachable(at, head, found.mark)?;
            if found.cut {
                return Err(heavy().into());
            }
            past.insert(i, found);
        }
    }
    Ok(past)
}

pub(super) fn heavy() -> Refusal {
    let detail = format!("this transaction would give more than {READ_MOST} bytes of values, or {KEYS_MOST} keys");
    Refusal::new(&problem::UNPROCESSABLE, detail)
}

/// Refuses a branch that would give too much at once.
async fn light(conn: &mut PgConnection, branch: &[&Op]) -> Result<(), Failure> {
    let (mut keys, mut bytes) = (0, 0);
    for op in branch {
        let (span, limit, values) = match op {
            Op::Get(range) if range.at.is_none() => {
                (range.keys.clone(), if range.plain() { range.limit } else { i64::MAX }, range.values)
            }
            Op::Put(put) if put.before => (Span::one(put.key.clone()), 1, true),
            Op::Delete(delete) if delete.before => (delete.keys.clone(), i64::MAX, true),
            _ => continue,
        };
        let (some, size) = ranges::weight(conn, &span, limit).await?;
        keys += some;
        bytes += if values { size } else { 0 };
    }
    if bytes > READ_MOST || keys > KEYS_MOST { Err(heavy().into()) } else { Ok(()) }
}

/// What a transaction has done so far.
pub(super) struct Done {
    known: Known,
    index: i64,
    results: Results,
    /// Decided and not yet written.
    pending: Vec<Change>,
    touched: Vec<Touch>,
    put: Vec<Value>,
    deleted: Vec<Value>,
    spans: Map<String, Value>,
}

impl Done {
    pub fn new(known: Known, index: i64, tell: Tell) -> Self {
        let (results, pending, touched) = (Results::new(tell), Vec::new(), Vec::new());
        let (put, deleted, spans) = (Vec::new(), Vec::new(), Map::new());
        Self { known, index, results, pending, touched, put, deleted, spans }
    }

    /// The index that its changes stand at so far.
    fn stands(&self) -> i64 {
        if self.touched.is_empty() { self.index - 1 } else { self.index }
    }

    fn tell(&mut self, outcome: Outcome<'_>) {
        let index = self.stands();
        self.results.push(outcome, index);
    }

    /// A transaction inside begins.
    pub fn begin(&mut self, succeeded: bool) {
        self.results.begin(succeeded);
    }

    /// The one that began last ends.
    pub fn end(&mut self) {
        let index = self.stands();
        self.results.end(index);
    }

    /// Does the operation at a place.
    pub async fn op(&mut self, tx: &mut Tx<'_>, i: usize, op: &Op) -> Result<(), Failure> {
        match op {
            Op::Put(put) => self.put(put),
            Op::Delete(delete) => self.delete(tx, delete).await,
            Op::Get(range) => self.get(tx, i, range).await,
            Op::Txn(_) => Err(Refusal::internal("a transaction inside was not taken apart").into()),
        }
    }

    fn put(&mut self, put: &Put) -> Result<(), Failure> {
        let was = self.known.standings.get(&put.key);
        let before = self.known.items.remove(&put.key);
        let kept = || before.as_ref().ok_or_else(|| Refusal::internal("a key that is kept was not read"));
        let (value, content_type) = match &put.value {
            Some(given) => given.clone(),
            None => kept().map(|b| (b.value.clone(), b.content_type.clone()))?,
        };
        let lease = match put.lease {
            Lease::On(lease) => lease,
            Lease::Same => kept()?.lease,
        };
        let (created_index, version) = was.map_or((self.index, 1), |w| (w.created_index, w.version + 1));
        let (key, index) = (put.key.clone(), self.index);
        self.known.standings.set(&key, Some(Standing { index, created_index, version }));
        let item = Item { key, index, created_index, version, content_type, value, lease };
        self.touched.push(Touch::key(KEY, put.key.clone()));
        self.put.push(shown(&put.key).into());
        self.tell(Outcome::Put { item: &item, before: before.as_ref().filter(|_| put.before) });
        self.pending.push(Change { item, deleted: false, previous: was.map_or(0, |w| w.index) });
        Ok(())
    }

    async fn delete(&mut self, tx: &mut Tx<'_>, delete: &Delete) -> Result<(), Failure> {
        let keys = &delete.keys;
        let mut before = Vec::new();
        if delete.before {
            self.flush(tx).await?;
            before = ranges::read(tx.read(), &Range::of(keys.clone()), i64::MAX).await?.items;
        }
        let (deleted, previous) = match keys.single() {
            Some(key) => self.delete_key(key),
            None => (self.delete_span(tx, keys).await?, None),
        };
        self.tell(Outcome::Delete { keys, deleted, previous, before: &before });
        Ok(())
    }

    /// Does an operation on a single key, of which all that is to be known was read ahead.
    pub fn one(&mut self, op: &Op, ahead: &mut Ahead) -> Result<(), Failure> {
        match op {
            Op::Put(put) => {
                if put.before
                    && let Some(item) = ahead.item(&put.key)
                {
                    self.known.items.insert(put.key.clone(), (**item).clone());
                }
                self.put(put)?;
                ahead.set(&put.key, || self.pending.last().map(|change| change.item.clone()));
            }
            Op::Delete(delete) => {
                let keys = &delete.keys;
                let key = keys.single().ok_or_else(|| Refusal::internal("a row of keys was decided in memory"))?;
                let before: Vec<Item> =
                    ahead.item(key).filter(|_| delete.before).map(|item| (**item).clone()).into_iter().collect();
                let (deleted, previous) = self.delete_key(key);
                self.tell(Outcome::Delete { keys, deleted, previous, before: &before });
                ahead.set(key, || None);
            }
            Op::Get(range) => {
                let item = range.keys.single().and_then(|key| ahead.item(key));
                self.tell(Outcome::Get { range, found: &range::alone(range, 0, item.map(|item| &**item)) });
            }
            Op::Txn(_) => return Err(Refusal::internal("a transaction inside was decided in memory").into()),
        }
        Ok(())
    }

    /// How many went, and the index that it had.
    fn delete_key(&mut self, key: &[u8]) -> (i64, Option<i64>) {
        let was = self.known.standings.set(key, None);
        if let Some(was) = was {
            self.touched.push(Touch::key(KEY, key));
            self.deleted.push(shown(key).into());
            self.pending.push(Change::deletion(key.to_vec(), self.index, was.created_index, was.index));
        }
        (i64::from(was.is_some()), was.map(|w| w.index))
    }

    /// Where a key stands by now.
    pub fn standing(&self, key: &[u8]) -> Option<Standing> {
        self.known.standings.get(key)
    }

    /// Where all keys stand by now, in their order.
    pub fn standings(&self) -> impl Iterator<Item = Option<Standing>> {
        self.known.standings.iter()
    }

    /// What is decided and not written.
    pub fn changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.pending)
    }

    async fn delete_span(&mut self, tx: &mut Tx<'_>, keys: &Span) -> Result<i64, Failure> {
        // What was deleted before it is not deleted twice.
        self.flush(tx).await?;
        if !rows::any(tx.read(), keys).await? {
            return Ok(0);
        }
        let deleted = rows::delete_span(tx.write(), keys, self.index).await?;
        self.known.standings.clear(keys);
        self.touched.push(Touch::prefix(KEY, keys.covering()));
        self.spans.insert(keys.to_string(), deleted.into());
        Ok(deleted)
    }

    async fn get(&mut self, tx: &mut Tx<'_>, i: usize, range: &Range) -> Result<(), Failure> {
        // It sees what those before it did.
        self.flush(tx).await?;
        let found = self.known.get(tx.read(), i, range).await?;
        self.tell(Outcome::Get { range, found: &found });
        Ok(())
    }

    pub async fn flush(&mut self, tx: &mut Tx<'_>) -> Result<(), sqlx::Error> {
        if !self.pending.is_empty() {
            rows::write(tx.write(), &std::mem::take(&mut self.pending)).await?;
        }
        Ok(())
    }

    pub fn entry(self, succeeded: bool) -> (Vec<Told>, Entry) {
        if self.touched.is_empty() {
            return (self.results.told(), Entry::nothing());
        }
        let one = match (&self.put[..], &self.deleted[..], self.spans.is_empty()) {
            ([key], [], true) | ([], [key], true) => format!("key/{}", key.as_str().unwrap_or_default()),
            _ => "keys".to_owned(),
        };
        let mut entry = Entry::ok("state:txn", one).change("succeeded", succeeded);
        for (name, keys) in [("put", self.put), ("deleted", self.deleted)] {
            if !keys.is_empty() {
                entry = entry.change(name, keys);
            }
        }
        if !self.spans.is_empty() {
            entry = entry.change("deleted_prefixes", self.spans);
        }
        let inside = self.results.inside();
        if !inside.is_empty() {
            entry = entry.change("inside", inside.to_vec());
        }
        (self.results.told(), self.touched.into_iter().fold(entry, Entry::touch))
    }
}
