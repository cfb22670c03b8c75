//! Whether a history of concurrent clients is linearizable, decided without a search: the order of the changes is known, for
//! each has its index, and the record says what became of those whose answer was lost.
//!
//! Every operation has a position. A change stands at its index; what changes nothing stands between two changes, where the
//! keys were as its answer says. An operation that had ended before another began must not stand after it. So operations are
//! taken as they began, each at the earliest position that those which had ended leave open; if one has none, no other choice
//! of positions would give it one, for all of them are as early as they can be. The order that comes out is then done step by
//! step on a map, so that an acceptance does not rest on the reasoning above.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};

/// A key, by number.
pub type Key = usize;

/// A condition on a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    Exists,
    Absent,
    At(i64),
    Value(u64),
}

/// What was asked: `change`, if all of `when` holds. Values are put once each, so a value says which put it is of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    pub when: Vec<(Key, Holds)>,
    /// `None` deletes.
    pub change: Vec<(Key, Option<u64>)>,
}

/// What was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was only asked what is there.
    Read,
    /// The change was made, at this index.
    Done(i64),
    /// Not all conditions held.
    Refused,
    /// Nobody knows whether it was made, or will be.
    Unknown,
    /// It was said that nothing was changed, or it was never sent.
    Never,
}

/// What an answer said of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saw {
    pub key: Key,
    /// Of its last change; 0 if it was not there.
    pub index: i64,
    /// Its value, if that was said.
    pub value: Option<u64>,
}

/// One operation of one client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    pub asked: Asked,
    pub answer: Answer,
    pub saw: Vec<Saw>,
    /// The answer reflects this index at least, and this at most.
    pub least: i64,
    pub most: i64,
    /// When it was sent and when its answer was there; never, if there was none.
    pub from: u64,
    pub to: u64,
}

/// A value and the index it was put at.
pub type Version = (u64, i64);

impl Operation {
    /// Whether it could have been answered so where the keys are as `at` says.
    fn explained(&self, at: &dyn Fn(Key) -> Option<Version>) -> bool {
        let seen = self.saw.iter().all(|saw| match at(saw.key) {
            None => saw.index == 0,
            Some((value, index)) => saw.index == index && saw.value.is_none_or(|v| v == value),
        });
        let holds = self.asked.when.iter().all(|(key, holds)| match (holds, at(*key)) {
            (Holds::Exists, there) => there.is_some(),
            (Holds::Absent, there) => there.is_none(),
            (Holds::At(index), there) => there.is_some_and(|v| v.1 == *index),
            (Holds::Value(value), there) => there.is_some_and(|v| v.0 == *value),
        });
        seen && match self.answer {
            Answer::Read => true,
            Answer::Refused => !holds,
            Answer::Done(_) | Answer::Unknown => holds,
            Answer::Never => false,
        }
    }
}

/// What the record says was changed: of each key its changes, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record(pub BTreeMap<Key, Vec<(i64, Option<u64>)>>);

impl Record {
    /// The key as it was at an index.
    fn at(&self, key: Key, index: i64) -> Option<Version> {
        let changes = self.0.get(&key)?;
        let newest = changes.partition_point(|c| c.0 <= index).checked_sub(1)?;
        changes[newest].1.map(|value| (value, changes[newest].0))
    }

    /// The first index after `index` at which one of the keys changed.
    fn next(&self, keys: &[Key], index: i64) -> Option<i64> {
        let of = |key: &Key| {
            let changes = self.0.get(key)?;
            changes.get(changes.partition_point(|c| c.0 <= index)).map(|c| c.0)
        };
        keys.iter().filter_map(of).min()
    }

    fn by_index(&self) -> BTreeMap<i64, Vec<(Key, Option<u64>)>> {
        let mut all = BTreeMap::<i64, Vec<_>>::new();
        for (key, changes) in &self.0 {
            for (index, value) in changes {
                all.entry(*index).or_default().push((*key, *value));
            }
        }
        all
    }
}

/// Why a history cannot be, with the numbers of the operations that show it.
#[derive(Debug)]
pub struct Wrong {
    pub why: String,
    pub of: Vec<usize>,
}

fn wrong<T>(why: impl Into<String>, of: &[usize]) -> Result<T, Wrong> {
    Err(Wrong { why: why.into(), of: of.to_vec() })
}

/// An order of the operations that explains every answer and that time allows, with the index of each change.
pub type Order = Vec<(usize, Option<i64>)>;

/// Finds such an order, or says why there is none.
pub fn check(ops: &[Operation], record: &Record) -> Result<Order, Wrong> {
    let settled = settle(ops, record)?;
    let order = place(ops, record, settled)?;
    replay(ops, &order)?;
    Ok(order)
}

/// What the record says of each operation, and the deletions in it that nobody's acknowledged change explains.
pub struct Settled {
    /// The index of each that changed something.
    pub index: Vec<Option<i64>>,
    deletions: Vec<(i64, Key)>,
}

/// Compares answers with the record: what was acknowledged is there, once and whole; what was refused is not; what is there was
/// asked for.
pub fn settle(ops: &[Operation], record: &Record) -> Result<Settled, Wrong> {
    let mut index = vec![None; ops.len()];
    let (mut of_value, mut of_index) = (HashMap::new(), HashMap::new());
    for (o, op) in ops.iter().enumerate() {
        for value in op.asked.change.iter().filter_map(|c| c.1) {
            assert!(of_value.insert(value, o).is_none(), "the test put {value} twice");
        }
        if let Answer::Done(at) = op.answer {
            index[o] = Some(at);
            if let Some(other) = of_index.insert(at, o) {
                return wrong(format!("two changes have index {at}"), &[o, other]);
            }
        }
    }
    let all = record.by_index();
    if let Some((at, o)) = of_index.iter().find(|(at, _)| !all.contains_key(at)) {
        return wrong(format!("the change acknowledged at {at} is lost"), &[*o]);
    }
    let mut deletions = Vec::new();
    for (at, changes) in &all {
        let put = changes.iter().find_map(|(_, value)| *value);
        let owner = match (of_index.get(at), put) {
            (Some(o), _) => *o,
            (None, Some(value)) => match of_value.get(&value) {
                Some(o) => *o,
                None => return wrong(format!("nobody put {value}, which is there at {at}"), &[]),
            },
            (None, None) => {
                deletions.extend(changes.iter().map(|(key, _)| (*at, *key)));
                continue;
            }
        };
        match (ops[owner].answer, index[owner]) {
            (Answer::Done(told), _) if told != *at => {
                return wrong(format!("acknowledged at {told}, done at {at}"), &[owner]);
            }
            (Answer::Unknown, Some(before)) => return wrong(format!("done twice, at {before} and {at}"), &[owner]),
            (Answer::Done(_) | Answer::Unknown, _) => index[owner] = Some(*at),
            (said, _) => return wrong(format!("answered {said:?}, and done at {at} all the same"), &[owner]),
        }
        let there = |(key, value): &&(Key, Option<u64>)| value.is_some() || record.at(*key, at - 1).is_some();
        let mut asked: Vec<_> = ops[owner].asked.change.iter().filter(there).copied().collect();
        asked.sort_unstable();
        if asked != *changes {
            return wrong(format!("at {at} there is {changes:?}: not what was asked, or half of it"), &[owner]);
        }
    }
    Ok(Settled { index, deletions })
}

/// Gives every operation its position.
fn place(ops: &[Operation], record: &Record, mut settled: Settled) -> Result<Order, Wrong> {
    let mut began: Vec<usize> = (0..ops.len()).collect();
    began.sort_by_key(|o| ops[*o].from);
    let mut position = settled.index.clone();
    // Those that have not ended, by when they will; the newest position of those that have, and whose it is.
    let (mut going, mut floor) = (BinaryHeap::new(), (-1, None::<usize>));
    let mut free = Vec::new();
    for o in began {
        let op = &ops[o];
        while let Some(&Reverse((to, at, other))) = going.peek()
            && to < op.from
        {
            going.pop();
            floor = floor.max((at, Some(other)));
        }
        let of: Vec<usize> = [Some(o), floor.1].into_iter().flatten().collect();
        match (op.answer, settled.index[o]) {
            (_, Some(index)) if index <= floor.0 => {
                return wrong(format!("it has index {index}, and what ended before it began saw {}", floor.0), &of);
            }
            (_, Some(index)) if !op.explained(&|key| record.at(key, index - 1)) => {
                return wrong(format!("it was done at {index}, where its conditions or its answer do not fit"), &of);
            }
            (Answer::Done(_), index) => going.push(Reverse((op.to, index.unwrap_or_default(), o))),
            (Answer::Read | Answer::Refused, _) => match moment(op, record, floor.0) {
                Some(at) => {
                    position[o] = Some(at);
                    going.push(Reverse((op.to, at, o)));
                }
                None => return wrong(format!("no moment from {} on explains its answer", floor.0), &of),
            },
            (Answer::Unknown, None) => free.push((o, floor.0)),
            (Answer::Unknown | Answer::Never, _) => {}
        }
    }
    for (at, key) in &settled.deletions {
        let Some(o) = explain_deletion(ops, record, &free, (*at, *key)) else {
            return wrong(format!("nobody can have deleted key {key} at {at}"), &[]);
        };
        free.retain(|f| f.0 != o);
        (position[o], settled.index[o]) = (Some(*at), Some(*at));
    }
    let mut order: Vec<(i64, bool, u64, usize)> = Vec::new();
    for (o, at) in position.iter().enumerate() {
        order.extend(at.map(|at| (at, settled.index[o].is_none(), ops[o].from, o)));
    }
    order.sort_unstable();
    Ok(order.into_iter().map(|(.., o)| (o, settled.index[o])).collect())
}

/// The earliest position from `floor` on that explains an answer.
fn moment(op: &Operation, record: &Record, floor: i64) -> Option<i64> {
    let keys: Vec<Key> = op.saw.iter().map(|s| s.key).chain(op.asked.when.iter().map(|w| w.0)).collect();
    let mut at = floor.max(op.least);
    while at <= op.most {
        if op.explained(&|key| record.at(key, at)) {
            return Some(at);
        }
        at = record.next(&keys, at)?;
    }
    None
}

/// Which of those whose answer was lost deleted the key at that index. One that wanted the key at an index fits nowhere else, so
/// it goes first; of the others all that fit now would fit later too.
fn explain_deletion(ops: &[Operation], record: &Record, free: &[(usize, i64)], (at, key): (i64, Key)) -> Option<usize> {
    let fits = |(o, floor): &&(usize, i64)| {
        let op = &ops[*o];
        *floor < at && op.asked.change == [(key, None)] && op.explained(&|key| record.at(key, at - 1))
    };
    let particular = |o: &usize| !ops[*o].asked.when.iter().any(|(_, holds)| matches!(holds, Holds::At(_)));
    free.iter().filter(fits).map(|f| f.0).min_by_key(particular)
}

/// Does the operations in that order, one by one: every answer must be the one that was given, none may stand after one that
/// began when it had ended, and indexes must grow.
pub fn replay(ops: &[Operation], order: &Order) -> Result<(), Wrong> {
    let mut keys: HashMap<Key, Version> = HashMap::new();
    let (mut newest, mut began, mut done) = (-1, (0, None::<usize>), HashSet::new());
    for (o, index) in order {
        let op = &ops[*o];
        if op.to < began.0 {
            return wrong("it stands after one that began when it had ended", &[*o, began.1.unwrap_or_default()]);
        }
        if !op.explained(&|key| keys.get(&key).copied()) {
            return wrong(format!("done at its turn its answer is another; then keys are {keys:?}"), &[*o]);
        }
        began = began.max((op.from, Some(*o)));
        done.insert(*o);
        if let Some(index) = index {
            if *index <= newest {
                return wrong(format!("index {index} follows {newest}"), &[*o]);
            }
            newest = *index;
            for (key, value) in &op.asked.change {
                match value {
                    Some(value) => keys.insert(*key, (*value, newest)),
                    None => keys.remove(key),
                };
            }
        }
    }
    let answered = |op: &Operation| !matches!(op.answer, Answer::Unknown | Answer::Never);
    match (0..ops.len()).find(|o| answered(&ops[*o]) && !done.contains(o)) {
        Some(o) => wrong("it has no place in the order", &[o]),
        None => Ok(()),
    }
}

/// What a search says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Linearizable,
    Not,
    /// It took more steps than it was given.
    Undecided,
}

/// The same question answered by search, as Wing and Gong do it and Lowe made it fast: operations are taken in every order that
/// time allows, and no pair of (operations taken, state) is looked into twice. For short histories, to judge [`check`] by.
/// `ordered` wants the order to be that of the indexes, which is more than to be linearizable.
pub fn search(ops: &[Operation], settled: &Settled, ordered: bool, most: usize) -> Verdict {
    let wanted: Vec<usize> = (0..ops.len())
        .filter(|o| settled.index[*o].is_some() || matches!(ops[*o].answer, Answer::Read | Answer::Refused))
        .collect();
    assert!(wanted.len() <= 64 && settled.deletions.is_empty(), "this search is for short histories");
    let mut search = Search { ops, settled, ordered, wanted, seen: HashSet::new(), left: most };
    match search.from(0, &BTreeMap::new(), -1) {
        Some(true) => Verdict::Linearizable,
        Some(false) => Verdict::Not,
        None => Verdict::Undecided,
    }
}

struct Search<'a> {
    ops: &'a [Operation],
    settled: &'a Settled,
    ordered: bool,
    wanted: Vec<usize>,
    seen: HashSet<(u64, BTreeMap<Key, Version>, i64)>,
    left: usize,
}

impl Search<'_> {
    /// `None` when the steps are used up.
    fn from(&mut self, taken: u64, keys: &BTreeMap<Key, Version>, newest: i64) -> Option<bool> {
        if taken.count_ones() as usize == self.wanted.len() {
            return Some(true);
        }
        if !self.seen.insert((taken, keys.clone(), newest)) {
            return Some(false);
        }
        self.left = self.left.checked_sub(1)?;
        let open: Vec<usize> = (0..self.wanted.len()).filter(|w| taken & (1 << w) == 0).collect();
        // Nothing may come before an operation that had ended before it began.
        let bound = open.iter().map(|w| self.ops[self.wanted[*w]].to).min().unwrap_or_default();
        for w in open {
            let o = self.wanted[w];
            let (op, index) = (&self.ops[o], self.settled.index[o]);
            if op.from > bound || !op.explained(&|key| keys.get(&key).copied()) {
                continue;
            }
            let (mut after, at) = (keys.clone(), index.unwrap_or(newest.max(op.least)));
            if self.ordered && (index.is_some() && at <= newest || index.is_none() && at > op.most) {
                continue;
            }
            for (key, value) in index.iter().flat_map(|_| &op.asked.change) {
                match value {
                    Some(value) => after.insert(*key, (*value, at)),
                    None => after.remove(key),
                };
            }
            if self.from(taken | 1 << w, &after, if self.ordered { at } else { -1 })? {
                return Some(true);
            }
        }
        Some(false)
    }
}
