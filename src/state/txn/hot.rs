//! Transactions that are decided in memory, and written with their neighbours in one statement: of single keys, by where they
//! stand. What asks for values, rows of keys or leases is not one of them, and runs SQL of its own.

use std::collections::HashSet;
use std::sync::Arc;

use crate::kernel::Refusal;
use crate::ledger::Failure;
use crate::ledger::hot::{At, DecidedMany, Fact, HotKeys, Row};

use super::doing::{Done, Known};
use super::{Answered, Lease, Op, Target, Txn};
use crate::state::kv::KEYS;
use crate::state::store::Standing;
use crate::state::store::txn::Compared;

impl Txn {
    fn is_hot(&self) -> bool {
        let stands = |target: Target| !matches!(target, Target::Value | Target::Lease);
        let single = |op: &Op| match op {
            Op::Put(put) => !put.keeps() && put.lease == Lease::On(None) && !put.before,
            Op::Delete(delete) => delete.keys.single().is_some() && !delete.before,
            Op::Get(_) => false,
        };
        self.compares.iter().all(|c| c.keys.single().is_some() && stands(c.target))
            && self.then.iter().chain(&self.otherwise).all(single)
    }

    /// All keys that it names, each once.
    fn keys(&self) -> Vec<&[u8]> {
        let compared = self.compares.iter().filter_map(|c| c.keys.single());
        let mut seen = HashSet::new();
        let all = compared.chain(self.then.iter().chain(&self.otherwise).filter_map(changed));
        all.filter(|key| seen.insert(*key)).collect()
    }

    /// Where its keys stand, if that is all it has to know.
    pub(super) fn decided_on(&self) -> Option<HotKeys> {
        let keys = self.is_hot().then(|| self.keys()).filter(|keys| !keys.is_empty())?;
        Some(HotKeys { kind: &KEYS, keys: keys.into_iter().map(<[u8]>::to_vec).collect() })
    }

    /// Decides it, on where its keys stand.
    pub(super) fn decided(&self, facts: &[Option<&Fact>], at: At) -> Result<DecidedMany<Answered>, Refusal> {
        let keys = self.keys();
        let standing = |fact: &Option<&Fact>| fact.and_then(|f| f.downcast_ref::<Standing>()).copied();
        let known = keys.iter().zip(facts).filter_map(|(key, fact)| Some((key.to_vec(), standing(fact)?)));
        let mut done = Done::new(Known::standing(known), at.index, self.tell);
        let holds = |c: &super::Compare| {
            let was = c.keys.single().and_then(|key| done.standing(key));
            let was = was.map(|w| Compared {
                index: w.index,
                created_index: w.created_index,
                version: w.version,
                ..Compared::default()
            });
            c.holds(&was.unwrap_or_default())
        };
        let succeeded = self.compares.iter().all(holds);
        for op in self.branch(succeeded) {
            match op {
                Op::Put(put) => done.put(put).map_err(refusal)?,
                Op::Delete(delete) => done.delete_one(delete),
                Op::Get(_) => return Err(Refusal::internal("a transaction that gets was decided in memory")),
            }
        }
        let after = keys.iter().map(|key| done.standing(key).map(|now| Arc::new(now) as Fact)).collect();
        let rows = done.changes().into_iter().map(|change| Box::new(change) as Row).collect();
        let (results, entry) = done.entry(succeeded);
        let index = if entry.is_nothing() { at.index - 1 } else { at.index };
        Ok(DecidedMany { value: Answered { succeeded, index, results }, entry, after, rows })
    }
}

/// The key that an operation changes.
fn changed(op: &Op) -> Option<&[u8]> {
    match op {
        Op::Put(put) => Some(put.key.as_slice()),
        Op::Delete(delete) => delete.keys.single(),
        Op::Get(_) => None,
    }
}

fn refusal(failure: Failure) -> Refusal {
    match failure {
        Failure::Refused(refusal) => refusal,
        Failure::Database(e) => Refusal::internal(e),
    }
}
