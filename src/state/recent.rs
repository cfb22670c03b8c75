//! Values that were read lately, so that a key that is read often costs no look-up in the database.
//!
//! A read is linearizable by the head check that started after it arrived: by then the follower has told of every change up to
//! that head, and each change makes what is held of its key worthless. A value is held with the count of changes (of all keys
//! that share its slot) seen *before* it was read, so one that changed meanwhile is never used.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use moka::sync::Cache;

use crate::ledger::{Touch, What};

use super::kv;
use super::model::Item;

/// Slots of the counts of changes.
const SLOTS: usize = 4096;
/// Bytes held at most.
const HELD: u64 = 16 * 1024 * 1024;

/// The values.
pub(super) struct Recent {
    held: Cache<Vec<u8>, (u64, Arc<Item>)>,
    changes: Vec<AtomicU64>,
    hasher: RandomState,
}

impl Default for Recent {
    fn default() -> Self {
        let weigh = |key: &Vec<u8>, (_, item): &(u64, Arc<Item>)| {
            u32::try_from(2 * key.len() + item.value.len() + item.content_type.len() + 256).unwrap_or(u32::MAX)
        };
        Self {
            held: Cache::builder().weigher(weigh).max_capacity(HELD).build(),
            changes: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
            hasher: RandomState::new(),
        }
    }
}

impl Recent {
    fn slot(&self, key: &[u8]) -> &AtomicU64 {
        let at = usize::try_from(self.hasher.hash_one(key)).unwrap_or(usize::MAX) % SLOTS;
        &self.changes[at]
    }

    /// How often what shares a slot with `key` has changed. To be asked before the key is read.
    pub fn changes(&self, key: &[u8]) -> u64 {
        self.slot(key).load(Ordering::Acquire)
    }

    /// The key's value, if nothing changed since it was read.
    pub fn get(&self, key: &[u8]) -> Option<Arc<Item>> {
        let changes = self.changes(key);
        self.held.get(key).filter(|(then, _)| *then == changes).map(|(_, item)| item)
    }

    /// Holds what was read after `changes` was asked.
    pub fn keep(&self, changes: u64, item: &Arc<Item>) {
        self.held.insert(item.key.clone(), (changes, item.clone()));
    }

    /// Takes note of changes.
    pub fn changed(&self, touched: &[(i64, Touch)]) {
        for (_, t) in touched.iter().filter(|(_, t)| t.kind == kv::KEY) {
            match &t.what {
                What::Key(key) => {
                    self.slot(key).fetch_add(1, Ordering::AcqRel);
                }
                What::Prefix(_) | What::All => self.changes.iter().for_each(|slot| {
                    slot.fetch_add(1, Ordering::AcqRel);
                }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(key: &str) -> Arc<Item> {
        Arc::new(Item {
            key: key.into(),
            index: 1,
            created_index: 1,
            version: 1,
            content_type: String::new(),
            value: b"v".to_vec(),
            lease: None,
        })
    }

    #[test]
    fn a_value_that_changed_is_not_used_even_if_it_is_kept_late() {
        let recent = Recent::default();
        let before = recent.changes(b"a");
        recent.keep(before, &item("a"));
        assert!(recent.get(b"a").is_some());
        recent.changed(&[(2, Touch::key(kv::KEY, "a"))]);
        assert!(recent.get(b"a").is_none());
        recent.keep(before, &item("a"));
        assert!(recent.get(b"a").is_none(), "it was read before the change");
        recent.keep(recent.changes(b"a"), &item("a"));
        recent.changed(&[(2, Touch::key("authz", "a"))]);
        assert!(recent.get(b"a").is_some(), "another kind");
        recent.changed(&[(2, Touch::prefix(kv::KEY, "x"))]);
        assert!(recent.get(b"a").is_none(), "a prefix may be any");
    }
}
