//! The checker of histories itself: it must refuse what cannot be, and agree with a search of all orders on what can.

use std::collections::BTreeMap;

use crate::support::dice::Dice;
use crate::support::history::{
    Answer, Asked, Holds, Key, Operation, Record, Saw, Settled, Verdict, Version, check, replay, search, settle,
};

const NEVER: u64 = u64::MAX;

fn op(when: &[(Key, Holds)], change: &[(Key, Option<u64>)], answer: Answer, (from, to): (u64, u64)) -> Operation {
    let asked = Asked { when: when.to_vec(), change: change.to_vec() };
    Operation { asked, answer, saw: Vec::new(), least: 0, most: i64::MAX, from, to }
}

fn put(value: u64, answer: Answer, time: (u64, u64)) -> Operation {
    op(&[], &[(0, Some(value))], answer, time)
}

fn delete(answer: Answer, time: (u64, u64)) -> Operation {
    op(&[(0, Holds::Exists)], &[(0, None)], answer, time)
}

fn read(is: &[(Key, Option<Version>)], time: (u64, u64)) -> Operation {
    let saw = is.iter().map(|(key, is)| match is {
        Some((value, index)) => Saw { key: *key, index: *index, value: Some(*value) },
        None => Saw { key: *key, index: 0, value: None },
    });
    Operation { saw: saw.collect(), ..op(&[], &[], Answer::Read, time) }
}

fn record(changes: &[(i64, Key, Option<u64>)]) -> Record {
    let mut record = Record::default();
    for (index, key, value) in changes {
        record.0.entry(*key).or_default().push((*index, *value));
    }
    record
}

fn why(ops: &[Operation], record: &Record) -> String {
    check(ops, record).map_or_else(|wrong| wrong.why, |order| format!("accepted as {order:?}"))
}

use Answer::{Done, Never, Refused, Unknown};

#[test]
fn what_cannot_be_is_refused() {
    let (one, two) = (put(1, Done(5), (0, 10)), put(2, Done(7), (20, 30)));
    let both = record(&[(5, 0, Some(1)), (7, 0, Some(2))]);
    let is = |v: u64, i: i64, time| read(&[(0, Some((v, i)))], time);
    let base = [one.clone(), two.clone(), is(1, 5, (11, 25)), is(2, 7, (31, 32))];
    assert!(check(&base, &both).is_ok());
    let with = |more: &[Operation]| [&base[..], more].concat();
    let gone = record(&[(5, 0, Some(1)), (7, 0, Some(2)), (9, 0, None)]);
    let deleted = with(&[delete(Done(9), (40, 41))]);
    assert!(check(&deleted, &gone).is_ok());
    let swapped = [put(1, Done(7), (0, 10)), put(2, Done(5), (20, 30))];
    let lost = put(3, Unknown, (33, NEVER));
    let at = |index| op(&[(0, Holds::At(index))], &[(0, Some(4))], Done(8), (33, 34));
    for (what, ops, record, because) in [
        ("a stale read", with(&[is(1, 5, (31, 33))]), &both, "no moment"),
        ("a stale read of nothing", with(&[read(&[(0, None)], (11, 12))]), &both, "no moment"),
        ("seen, then unseen", with(&[is(2, 7, (21, 22)), is(1, 5, (23, 24))]), &both, "no moment"),
        ("a lost write", base.to_vec(), &record(&[(5, 0, Some(1))]), "is lost"),
        ("writes in another order", swapped.to_vec(), &record(&[(5, 0, Some(2)), (7, 0, Some(1))]), "has index 5"),
        ("a deleted value", [&deleted[..], &[is(2, 7, (42, 43))]].concat(), &gone, "no moment"),
        ("a value nobody put", base.to_vec(), &record(&[(5, 0, Some(1)), (7, 0, Some(2)), (8, 0, Some(9))]), "nobody"),
        ("a deletion of nobody's", base.to_vec(), &gone, "nobody can have deleted"),
        ("one index for two", with(&[put(3, Done(7), (20, 30))]), &both, "two changes"),
        ("what was refused", with(&[at(5)]), &record(&[(5, 0, Some(1)), (7, 0, Some(2)), (8, 0, Some(4))]), "fit"),
        ("a deletion of nothing", vec![delete(Done(5), (0, 1))], &record(&[(5, 0, None)]), "not what was asked"),
        ("refused without cause", with(&[Operation { answer: Refused, ..at(7) }]), &both, "no moment"),
    ] {
        assert!(why(&ops, record).contains(because), "{what}: {}", why(&ops, record));
    }
    // What became of an answer that was lost.
    let late = record(&[(5, 0, Some(1)), (7, 0, Some(2)), (8, 0, Some(3))]);
    let twice = record(&[(5, 0, Some(1)), (7, 0, Some(2)), (8, 0, Some(3)), (9, 0, Some(3))]);
    let early = record(&[(5, 0, Some(1)), (6, 0, Some(3)), (7, 0, Some(2))]);
    assert!(check(&with(std::slice::from_ref(&lost)), &both).is_ok(), "it never happened");
    assert!(check(&with(&[lost.clone(), is(2, 7, (34, 35)), is(3, 8, (36, 37))]), &late).is_ok(), "it happened later");
    let unseen = with(&[lost.clone(), is(3, 8, (34, 35)), is(2, 7, (36, 37))]);
    assert!(why(&unseen, &late).contains("no moment"), "{}", why(&unseen, &late));
    let lost = with(&[lost]);
    assert!(why(&lost, &early).contains("it has index 6"), "before it was sent: {}", why(&lost, &early));
    assert!(why(&lost, &twice).contains("done twice"), "{}", why(&lost, &twice));
    let denied = with(&[put(3, Never, (33, 34))]);
    assert!(why(&denied, &late).contains("all the same"), "{}", why(&denied, &late));
    // Of lost deletions, each explains one, and only where its condition held.
    let one_at = |index| op(&[(0, Holds::At(index))], &[(0, None)], Unknown, (33, NEVER));
    assert!(check(&with(&[one_at(7)]), &gone).is_ok());
    assert!(why(&with(&[one_at(5)]), &gone).contains("nobody can have deleted"));
    let again = record(&[(5, 0, Some(1)), (7, 0, Some(2)), (9, 0, None), (10, 0, Some(6)), (11, 0, None)]);
    let six = put(6, Done(10), (50, 51));
    assert!(check(&with(&[delete(Unknown, (33, NEVER)), one_at(7), six.clone()]), &again).is_ok());
    assert!(why(&with(&[delete(Unknown, (33, NEVER)), six]), &again).contains("nobody can have deleted"));
}

#[test]
fn several_keys_are_one_moment() {
    let txn = |value, index, time| op(&[], &[(0, Some(value)), (1, Some(value + 100))], Done(index), time);
    let both = [txn(1, 5, (0, 1)), txn(2, 7, (10, 20))];
    let whole = record(&[(5, 0, Some(1)), (5, 1, Some(101)), (7, 0, Some(2)), (7, 1, Some(102))]);
    let see = |a, b| [&both[..], &[read(&[(0, Some(a)), (1, Some(b))], (11, 19))]].concat();
    assert!(check(&see((1, 5), (101, 5)), &whole).is_ok());
    assert!(check(&see((2, 7), (102, 7)), &whole).is_ok());
    assert!(why(&see((2, 7), (101, 5)), &whole).contains("no moment"), "half of a transaction was seen");
    let half = record(&[(5, 0, Some(1)), (5, 1, Some(101)), (7, 0, Some(2))]);
    assert!(why(&both, &half).contains("half of it"), "half of a transaction was done");
    // Two reads of different keys, each fine by itself, that no order explains together.
    let crossed = [
        put(1, Done(5), (0, 10)),
        op(&[], &[(1, Some(2))], Done(6), (0, 10)),
        read(&[(0, Some((1, 5))), (1, None)], (0, 10)),
        read(&[(0, None), (1, Some((2, 6)))], (0, 10)),
    ];
    assert!(why(&crossed, &record(&[(5, 0, Some(1)), (6, 1, Some(2))])).contains("no moment"));
    // An answer that says which index it is of is held to it.
    let mut pinned = read(&[(0, Some((1, 5)))], (11, 19));
    (pinned.least, pinned.most) = (6, 6);
    assert!(check(&[&both[..], &[pinned.clone()]].concat(), &whole).is_ok());
    (pinned.least, pinned.most) = (7, 8);
    assert!(why(&[&both[..], &[pinned]].concat(), &whole).contains("no moment"));
}

/// A map and clients of it, one step at a time; what they would have seen.
struct Play {
    dice: Dice,
    keys: BTreeMap<Key, Version>,
    record: Record,
    ops: Vec<Operation>,
    /// Of each client what it does, and whether that took effect.
    doing: Vec<Option<(usize, bool)>>,
    /// What may take effect though nobody waits for it.
    adrift: Vec<usize>,
    index: i64,
    time: u64,
}

impl Play {
    fn of(seed: u64, ops: usize) -> (Vec<Operation>, Record) {
        let mut play = Self {
            dice: Dice::new(seed),
            keys: BTreeMap::new(),
            record: Record::default(),
            ops: Vec::new(),
            doing: vec![None; 3],
            adrift: Vec::new(),
            index: 0,
            time: 0,
        };
        while play.ops.len() < ops || play.doing.iter().any(Option::is_some) {
            play.time += 1;
            let client = play.dice.up_to(3);
            match play.doing[client] {
                None if play.ops.len() < ops => play.begin(client),
                None => {}
                Some((o, false)) => {
                    let adrift = play.dice.up_to(12) == 0 && play.ops[o].asked.change.iter().any(|c| c.1.is_some());
                    if adrift {
                        play.adrift.push(o);
                        play.lose(client, o);
                    } else {
                        play.happen(o);
                        play.doing[client] = Some((o, true));
                    }
                }
                Some((o, true))
                    if play.dice.up_to(12) == 0 && play.ops[o].asked.change.iter().any(|c| c.1.is_some()) =>
                {
                    play.lose(client, o);
                }
                Some((o, true)) => {
                    play.ops[o].to = play.time;
                    play.doing[client] = None;
                }
            }
            if play.dice.up_to(6) == 0
                && let Some(o) = play.adrift.pop()
            {
                play.happen(o);
                play.ops[o].answer = Unknown;
                play.ops[o].saw.clear();
            }
        }
        (play.ops, play.record)
    }

    fn begin(&mut self, client: usize) {
        let (key, other) = (self.dice.up_to(2), self.dice.up_to(2));
        let value = self.ops.len() as u64 * 2 + 1;
        let seen = self.keys.get(&key).copied().filter(|_| self.dice.up_to(3) > 0);
        let (mut when, mut change) = (Vec::new(), Vec::new());
        match self.dice.up_to(8) {
            0..3 => {}
            3 => change.push((key, Some(value))),
            4 => {
                when.push((key, seen.map_or(Holds::Absent, |v| Holds::At(v.1))));
                change.push((key, Some(value)));
            }
            5 => {
                when.push((key, Holds::Exists));
                change.push((key, None));
            }
            _ => {
                when.push((other, seen.map_or(Holds::Absent, |v| Holds::Value(v.0))));
                change.push((0, Some(value)));
                change.push((1, Some(value + 1).filter(|_| key == 0)));
            }
        }
        self.doing[client] = Some((self.ops.len(), false));
        let mut begun = op(&when, &change, Unknown, (self.time, NEVER));
        begun.saw = (0..=self.dice.up_to(2)).map(|n| Saw { key: (key + n) % 2, index: 0, value: None }).collect();
        self.ops.push(begun);
    }

    fn happen(&mut self, o: usize) {
        let (keys, op) = (&mut self.keys, &mut self.ops[o]);
        let holds = op.asked.when.iter().all(|(key, holds)| match (holds, keys.get(key)) {
            (Holds::Exists, there) => there.is_some(),
            (Holds::Absent, there) => there.is_none(),
            (Holds::At(index), there) => there.is_some_and(|v| v.1 == *index),
            (Holds::Value(value), there) => there.is_some_and(|v| v.0 == *value),
        });
        for saw in &mut op.saw {
            let (value, index) = keys.get(&saw.key).map_or((None, 0), |v| (Some(v.0), v.1));
            (saw.value, saw.index) = (value, index);
        }
        if op.asked.change.is_empty() || !holds {
            op.answer = if op.asked.change.is_empty() { Answer::Read } else { Refused };
            (op.least, op.most) = match self.dice.up_to(3) {
                0 => (self.index, self.index),
                1 => (self.index, i64::MAX),
                _ => (0, i64::MAX),
            };
            return;
        }
        self.index += 1 + i64::from(self.dice.up_to(3) == 0);
        op.answer = Done(self.index);
        for (key, value) in &op.asked.change {
            let was = match value {
                Some(value) => keys.insert(*key, (*value, self.index)),
                None => keys.remove(key),
            };
            if value.is_some() || was.is_some() {
                self.record.0.entry(*key).or_default().push((self.index, *value));
            }
        }
    }

    fn lose(&mut self, client: usize, o: usize) {
        (self.ops[o].answer, self.ops[o].to) = (Unknown, NEVER);
        (self.ops[o].least, self.ops[o].most) = (0, i64::MAX);
        self.ops[o].saw.clear();
        self.doing[client] = None;
    }
}

/// Spoils a history somewhere; often it can still be.
fn spoil(dice: &mut Dice, ops: &mut [Operation], record: &mut Record) {
    let o = dice.up_to(ops.len());
    let versions: Vec<(Key, i64, Option<u64>)> =
        record.0.iter().flat_map(|(key, all)| all.iter().map(|(index, value)| (*key, *index, *value))).collect();
    match dice.up_to(6) {
        0 => ops[o].from = ops[o].from.saturating_sub(dice.up_to(12) as u64),
        1 => ops[o].from = (ops[o].from + dice.up_to(6) as u64).min(ops[o].to),
        2 if ops[o].to != NEVER => ops[o].to = ops[o].from.max(ops[o].to.saturating_sub(dice.up_to(6) as u64)),
        3 if matches!(ops[o].answer, Answer::Read) => ops[o].answer = Unknown,
        4 if !versions.is_empty() => {
            let (key, index, value) = versions[dice.up_to(versions.len())];
            for saw in ops[o].saw.iter_mut().filter(|s| s.key == key) {
                (saw.index, saw.value) = if value.is_some() { (index, value) } else { (0, None) };
            }
        }
        _ if matches!(ops[o].answer, Answer::Read | Refused) => {
            (ops[o].least, ops[o].most) = (dice.up_to(8) as i64, 3 + dice.up_to(8) as i64);
        }
        _ => {
            for saw in &mut ops[o].saw {
                (saw.index, saw.value) = (0, None);
            }
        }
    }
}

#[test]
fn the_checker_agrees_with_a_search_of_all_orders() {
    let (mut can, mut cannot) = (0, 0);
    for seed in 1..=20_000 {
        let (mut ops, mut record) = Play::of(seed, 4 + usize::try_from(seed % 9).unwrap());
        assert!(check(&ops, &record).is_ok(), "seed {seed}: {} of {ops:#?} {record:?}", why(&ops, &record));
        let mut dice = Dice::new(seed);
        for _ in 0..=dice.up_to(2) {
            spoil(&mut dice, &mut ops, &mut record);
        }
        // What the record contradicts is not for a search.
        let Ok(settled) = settle(&ops, &record) else { continue };
        let Settled { ref index, .. } = settled;
        let found = search(&ops, &settled, true, 1_000_000);
        let direct = check(&ops, &record);
        let expected = if direct.is_ok() { Verdict::Linearizable } else { Verdict::Not };
        assert_eq!(found, expected, "seed {seed}: {direct:?} of {ops:#?} {record:?} {index:?}");
        match direct {
            Ok(order) => {
                can += 1;
                assert_eq!(search(&ops, &settled, false, 1_000_000), Verdict::Linearizable, "seed {seed}");
                // The order is a proof; turned round it is none, unless it has nothing to say.
                let turned = order.iter().rev().copied().collect();
                let changes = order.iter().filter(|(_, index)| index.is_some()).count();
                assert!(changes < 2 || replay(&ops, &turned).is_err(), "seed {seed}");
            }
            Err(_) => cannot += 1,
        }
    }
    println!("{can} histories can be, {cannot} cannot");
    assert!(can > 2000 && cannot > 2000, "{can} can be, {cannot} cannot: too few to say");
}
