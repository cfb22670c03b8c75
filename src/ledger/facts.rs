//! What the writer knows about the present without asking: when the things that permission rests on last changed.

use std::collections::HashMap;

use crate::kernel::crypto;
use crate::kernel::web::Permit;

use super::touch::{Touch, What};

/// The kind of touch that permission rests on: policy, clients, tokens, entities, keys.
pub const AUTHZ: &str = "authz";

/// How many changes are remembered before the oldest are forgotten.
const REMEMBER: usize = 100_000;

/// The digest by which [`Permit::depends`] names a fact of kind [`AUTHZ`].
#[must_use]
pub fn authz_fact(key: &[u8]) -> u64 {
    let h = crypto::sha256(key);
    u64::from_be_bytes([h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7]])
}

/// When each fact that permission rests on last changed.
///
/// Not in memory means unknown, never unchanged: below `floor` nothing is known, so a permit decided before it is stale.
pub(super) struct AuthzFacts {
    floor: i64,
    all: i64,
    changed: HashMap<u64, i64>,
}

impl AuthzFacts {
    /// Knowing nothing of what happened up to `index`.
    pub fn from(index: i64) -> Self {
        Self { floor: index, all: -1, changed: HashMap::new() }
    }

    /// Takes note of an entry's touches.
    pub fn note(&mut self, index: i64, touched: &[Touch]) {
        for t in touched.iter().filter(|t| t.kind == AUTHZ) {
            match &t.what {
                What::Key(key) => {
                    self.changed.insert(authz_fact(key), index);
                }
                What::Prefix(_) | What::All => self.all = index,
            }
        }
        if self.changed.len() > REMEMBER {
            // Forgetting raises the floor: whatever was decided before is decided again.
            let mut indexes: Vec<i64> = self.changed.values().copied().collect();
            indexes.sort_unstable();
            self.floor = indexes[indexes.len() / 2];
            let floor = self.floor;
            self.changed.retain(|_, i| *i > floor);
        }
    }

    /// The index since which `permit` no longer holds, if it does not.
    pub fn stale(&self, permit: &Permit) -> Option<i64> {
        if permit.at < self.floor {
            return Some(self.floor);
        }
        let newest = permit.depends.iter().filter_map(|d| self.changed.get(d)).copied().max().unwrap_or(-1);
        let newest = newest.max(self.all);
        (newest > permit.at).then_some(newest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::web::Depends;

    fn permit(at: i64, on: &[&str]) -> Permit {
        let depends: Depends = on.iter().map(|k| authz_fact(k.as_bytes())).collect();
        Permit { allowed: true, at, depends, decision: None, denied: None, waits: None, proposal: None }
    }

    #[test]
    fn a_permit_is_stale_when_what_it_rests_on_changed_after_it() {
        let mut f = AuthzFacts::from(10);
        f.note(12, &[Touch::key(AUTHZ, "client/a")]);
        f.note(13, &[Touch::key("kv", "client/b")]);
        assert_eq!(f.stale(&permit(11, &["client/a", "bundle"])), Some(12));
        assert_eq!(f.stale(&permit(12, &["client/a", "bundle"])), None, "decided at that very index");
        assert_eq!(f.stale(&permit(11, &["client/b"])), None, "another kind, another fact");
        assert_eq!(f.stale(&permit(9, &["client/b"])), Some(10), "unknown is not unchanged");
        f.note(14, &[Touch::all(AUTHZ)]);
        assert_eq!(f.stale(&permit(13, &["client/b"])), Some(14));
    }

    #[test]
    fn forgetting_makes_stale_not_fresh() {
        let mut f = AuthzFacts::from(0);
        for i in 1..=i64::try_from(REMEMBER).unwrap() + 1 {
            f.note(i, &[Touch::key(AUTHZ, i.to_be_bytes())]);
        }
        assert!(f.changed.len() <= REMEMBER);
        assert!(f.stale(&permit(1, &["x"])).is_some());
        assert!(f.stale(&permit(i64::try_from(REMEMBER).unwrap() + 1, &["x"])).is_none());
    }
}
