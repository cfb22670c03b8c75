//! Transactions that are decided in memory, and written with their neighbours in one statement: of single keys, on where they
//! stand and what was read of them ahead. What asks for rows of keys, or puts on leases, runs SQL of its own.

use std::sync::Arc;

use crate::kernel::Refusal;
use crate::ledger::hot::{At, DecidedMany, Fact, HotKeys, Row};
use crate::ledger::{Entry, Failure};

use super::ahead::Ahead;
use super::doing::{Done, Known, READ_MOST, heavy};
use super::standings::Standings;
use super::{Answered, Compare, Lease, Op, Operand, Txn};
use crate::state::kv::KEYS;
use crate::state::model::Item;
use crate::state::store::Standing;
use crate::state::store::txn::Compared;

impl Txn {
    /// Whether it is about single keys of the present, and no more.
    pub(super) fn of_single_keys(&self) -> bool {
        let single = |op: &Op| match op {
            Op::Put(put) => !put.keeps() && put.lease == Lease::On(None),
            Op::Delete(delete) => delete.keys.single().is_some(),
            Op::Get(range) => range.keys.single().is_some() && range.at.is_none(),
            Op::Txn(_) => false,
        };
        self.what.compares.iter().all(|c| c.keys.single().is_some()) && self.what.ops().all(single)
    }

    /// Where its keys stand, if that and what was read ahead is all it has to know.
    pub(super) fn decided_on(&self) -> Option<HotKeys> {
        let keys = self.ahead.as_ref()?.named();
        (!keys.is_empty()).then(|| HotKeys { kind: &KEYS, keys: keys.iter().cloned().collect() })
    }

    /// Decides it, on where its keys stand.
    pub(super) fn decided(&self, facts: &[Option<&Fact>], at: At) -> Result<DecidedMany<Answered>, Refusal> {
        let mut ahead = self.ahead.clone().ok_or_else(|| Refusal::internal("nothing was read ahead"))?;
        let standing = |fact: &Option<&Fact>| fact.and_then(|f| f.downcast_ref::<Standing>()).copied();
        let standings = Standings::new(ahead.named().clone(), facts.iter().map(standing).collect());
        let mut done = Done::new(Known::standing(standings), at.index, self.tell);
        if !ahead.holds(|key| done.standing(key)) {
            let value = Answered { succeeded: false, index: at.index - 1, results: Vec::new(), again: true };
            return Ok(DecidedMany {
                value,
                entry: Entry::nothing(),
                after: Default::default(),
                rows: Default::default(),
            });
        }
        let holds = |c: &Compare| {
            c.holds(&c.keys.single().map_or_else(Compared::default, |key| compared(c, &done, &ahead, key)))
        };
        let succeeded = self.what.compares.iter().all(holds);
        let branch = self.what.branch(succeeded);
        if branch.iter().filter_map(|op| told(op, &ahead)).map(|item| item.value.len()).sum::<usize>() as i64
            > READ_MOST
        {
            return Err(heavy());
        }
        for op in branch {
            done.one(op, &mut ahead).map_err(refusal)?;
        }
        let after = done.standings().map(|at| at.map(|now| Arc::new(now) as Fact)).collect();
        let rows = done.changes().into_iter().map(|change| Box::new(change) as Row).collect();
        let (results, entry) = done.entry(succeeded);
        let index = if entry.is_nothing() { at.index - 1 } else { at.index };
        Ok(DecidedMany { value: Answered { succeeded, index, results, again: false }, entry, after, rows })
    }
}

/// What a condition looks at of its key.
fn compared(c: &Compare, done: &Done, ahead: &Ahead, key: &[u8]) -> Compared {
    let Some(was) = done.standing(key) else { return Compared::default() };
    let item = ahead.item(key);
    let value = match &c.operand {
        Operand::Bytes(operand) => item.map(|item| item.value.cmp(operand) as i32),
        Operand::Number(_) => None,
    };
    let lease = item.and_then(|item| item.lease);
    Compared { index: was.index, created_index: was.created_index, version: was.version, value, lease }
}

/// What an operation gives the value of.
fn told<'a>(op: &Op, ahead: &'a Ahead) -> Option<&'a Item> {
    let tells = match op {
        Op::Put(put) => put.before,
        Op::Delete(delete) => delete.before,
        Op::Get(range) => range.values,
        Op::Txn(_) => false,
    };
    ahead.item(op.key().filter(|_| tells)?).map(Arc::as_ref)
}

fn refusal(failure: Failure) -> Refusal {
    match failure {
        Failure::Refused(refusal) => refusal,
        Failure::Database(e) => Refusal::internal(e),
    }
}
