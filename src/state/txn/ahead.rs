//! What a transaction looks at, read before its turn.
//!
//! What a key is at an index never changes. So what was read ahead is right if the key still stands where it stood when the
//! transaction is decided, and where keys stand the writer knows. If one has moved meanwhile nothing is done, and the
//! transaction is taken again, with SQL of its own under the lock.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Answered, Op, Target, Txn};
use crate::kernel::Refusal;
use crate::kernel::web::{Ask, Caller};
use crate::state::State;
use crate::state::model::Item;
use crate::state::store::{Standing, txn as rows};

/// Of larger values none is read ahead, bytes.
const SMALL: i32 = 64 * 1024;

/// The keys it names, and those of them that were read.
#[derive(Clone, Debug)]
pub(super) struct Ahead {
    /// All, in order, each once.
    named: Arc<[Vec<u8>]>,
    /// Each as it was or not there.
    read: HashMap<Vec<u8>, Option<Arc<Item>>>,
}

impl Ahead {
    /// All keys that the transaction names, in order, each once.
    pub fn named(&self) -> &Arc<[Vec<u8>]> {
        &self.named
    }

    /// Whether all of them still stand where they stood.
    pub fn holds(&self, standing: impl Fn(&[u8]) -> Option<Standing>) -> bool {
        self.read.iter().all(|(key, was)| standing(key).map(|s| s.index) == was.as_ref().map(|item| item.index))
    }

    /// What a key is.
    pub fn item(&self, key: &[u8]) -> Option<&Arc<Item>> {
        self.read.get(key).and_then(Option::as_ref)
    }

    /// What the operations before have made of a key, if it is looked at.
    pub fn set(&mut self, key: &[u8], item: impl FnOnce() -> Option<Item>) {
        if let Some(was) = self.read.get_mut(key) {
            *was = item().map(Arc::new);
        }
    }
}

/// In order, each once.
fn distinct(mut keys: Vec<&[u8]>) -> Vec<&[u8]> {
    keys.sort_unstable();
    keys.dedup();
    keys
}

impl Txn {
    /// All keys that it names.
    fn names(&self) -> Vec<&[u8]> {
        let compared = self.what.compares.iter().filter_map(|c| c.keys.single());
        distinct(compared.chain(self.what.ops().filter_map(Op::key)).collect())
    }

    /// Keys of which it has to know more than where they stand.
    fn looks_at(&self) -> Vec<&[u8]> {
        let compared = self.what.compares.iter().filter(|c| matches!(c.target, Target::Value | Target::Lease));
        let done = self.what.ops().filter_map(|op| match op {
            Op::Put(put) => put.before.then_some(put.key.as_slice()),
            Op::Delete(delete) => delete.keys.single().filter(|_| delete.before),
            Op::Get(range) => range.keys.single(),
            Op::Txn(_) => None,
        });
        distinct(compared.filter_map(|c| c.keys.single()).chain(done).collect())
    }
}

impl State {
    /// Does a transaction that changes something.
    pub(in crate::state) async fn change(
        &self,
        caller: &Caller,
        asks: &[Ask],
        mut txn: Txn,
    ) -> Result<Answered, Refusal> {
        let request = caller.request();
        // These take the lock anyhow.
        let locked = request.idempotency.is_some() || request.fencing.is_some();
        if !locked && txn.of_single_keys() {
            txn.ahead = self.read_ahead(&txn).await;
        }
        if txn.ahead.as_ref().is_some_and(|ahead| !ahead.read.is_empty()) {
            // The command is gone with its answer.
            let answered = self.ledger.write(caller, asks, txn.clone()).await?.value;
            if !answered.again {
                return Ok(answered);
            }
            self.metrics.again.inc();
            txn.ahead = None;
        }
        Ok(self.ledger.write(caller, asks, txn).await?.value)
    }

    /// Reads what it looks at; `None` if something is too large, or could not be read: then its turn finds out.
    async fn read_ahead(&self, txn: &Txn) -> Option<Ahead> {
        let (recent, mut found, mut unknown) = (&self.hub.recent, HashMap::new(), Vec::new());
        for key in txn.looks_at() {
            match recent.get(key) {
                Some(item) => drop(found.insert(key.to_vec(), Some(item))),
                None => unknown.push((key, recent.changes(key))),
            }
        }
        if !unknown.is_empty() {
            let mut conn = self.connection().await.ok()?;
            let keys: Vec<&[u8]> = unknown.iter().map(|(key, _)| *key).collect();
            let mut read: HashMap<_, _> = rows::small(&mut conn, &keys, SMALL).await.ok()?.into_iter().collect();
            for (key, changes) in unknown {
                let item = match read.remove(key) {
                    Some(item) => Some(Arc::new(item?)),
                    None => None,
                };
                if let Some(item) = &item {
                    recent.keep(changes, item);
                }
                found.insert(key.to_vec(), item);
            }
        }
        Some(Ahead { named: txn.names().into_iter().map(<[u8]>::to_vec).collect(), read: found })
    }
}
