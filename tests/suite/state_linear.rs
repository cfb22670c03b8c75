//! Concurrent histories of registers with conditions, on two daemons, while daemons and database sessions are killed: each
//! must be what one register, one operation at a time, could have done.
//!
//! The checker is that of Wing and Gong as Lowe made it fast: operations are taken in every order that time allows, depth first,
//! and no pair of (operations taken, state) is looked into twice. An operation whose answer was lost may have happened at any
//! time after it was sent, or never.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use reqwest::{Method, Response};
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::support::client::Client;
use crate::support::daemon::Launch;
use crate::support::postgres::database_alone;
use crate::support::record;

/// What was asked of a register. Values are written once each, so that a read says which write it saw.
#[derive(Clone, Debug, PartialEq)]
enum Asked {
    Read,
    Write(u64),
    /// Only if the register is at this index.
    WriteIf(i64, u64),
    /// By a transaction: only if it has this value.
    Swap(Option<u64>, u64),
    Delete,
}

/// What was answered.
#[derive(Clone, Debug, PartialEq)]
enum Answered {
    Is(Option<(u64, i64)>),
    Done(i64),
    /// The condition did not hold, or it was not there.
    No,
    /// Nobody knows.
    Lost,
}

#[derive(Clone, Debug)]
struct Operation {
    asked: Asked,
    answered: Answered,
    /// When it was sent, and when its answer was there.
    from: u64,
    to: u64,
}

/// A register: its value and the index of its last change, where known: of a change whose answer was lost it is not.
type State = Option<(u64, Option<i64>)>;

/// The states after an operation, if it could have happened there with that answer. The index of a lost change is found out by
/// whoever reads it.
fn step(state: State, op: &Operation) -> Option<State> {
    let at = |index: i64| matches!(state, Some((_, known)) if known.is_none_or(|k| k == index));
    match (&op.asked, &op.answered) {
        (Asked::Read, Answered::Is(None)) => state.is_none().then_some(state),
        (Asked::Read, Answered::Is(Some((value, index)))) => match state {
            Some((v, known)) if v == *value && known.is_none_or(|k| k == *index) => Some(Some((v, Some(*index)))),
            _ => None,
        },
        (Asked::Write(value), Answered::Done(index)) => Some(Some((*value, Some(*index)))),
        (Asked::Write(value), Answered::Lost) => Some(Some((*value, None))),
        (Asked::WriteIf(expected, value), Answered::Done(index)) => {
            at(*expected).then_some(Some((*value, Some(*index))))
        }
        (Asked::WriteIf(expected, value), Answered::Lost) => at(*expected).then_some(Some((*value, None))),
        // Where the index is not known, it may well have been another.
        (Asked::WriteIf(expected, _), Answered::No) => {
            (!matches!(state, Some((_, Some(k))) if k == *expected)).then_some(state)
        }
        (Asked::Swap(expected, value), Answered::Done(index)) => {
            (state.map(|s| s.0) == *expected).then_some(Some((*value, Some(*index))))
        }
        (Asked::Swap(expected, value), Answered::Lost) => {
            (state.map(|s| s.0) == *expected).then_some(Some((*value, None)))
        }
        (Asked::Swap(expected, _), Answered::No) => (state.map(|s| s.0) != *expected).then_some(state),
        (Asked::Delete, Answered::Done(_) | Answered::Lost) => state.is_some().then_some(None),
        (Asked::Delete, Answered::No) => state.is_none().then_some(state),
        _ => None,
    }
}

/// Whether there is an order of the operations that time allows and that explains every answer.
fn linearizable(operations: &[Operation]) -> bool {
    let n = operations.len();
    // Those with an answer must be taken; the others may be.
    let must = operations.iter().filter(|o| o.answered != Answered::Lost).count();
    let mut taken = vec![false; n];
    let mut seen: HashSet<(Vec<bool>, State)> = HashSet::new();
    // What was tried at each depth: the operation taken, and the state before it.
    let mut stack: Vec<(usize, State)> = Vec::new();
    let (mut state, mut next, mut answered): (State, usize, usize) = (None, 0, 0);
    loop {
        if answered == must {
            return true;
        }
        // Nothing may come before an operation that had ended before it began.
        let bound = (0..n).filter(|i| !taken[*i]).map(|i| operations[i].to).min().unwrap_or(u64::MAX);
        let chosen = (next..n).find_map(|i| {
            if taken[i] || operations[i].from > bound {
                return None;
            }
            let after = step(state, &operations[i])?;
            taken[i] = true;
            let new = seen.insert((taken.clone(), after));
            taken[i] = false;
            new.then_some((i, after))
        });
        if let Some((i, after)) = chosen {
            taken[i] = true;
            answered += usize::from(operations[i].answered != Answered::Lost);
            stack.push((i, state));
            (state, next) = (after, 0);
            continue;
        }
        let Some((i, before)) = stack.pop() else { return false };
        taken[i] = false;
        answered -= usize::from(operations[i].answered != Answered::Lost);
        (state, next) = (before, i + 1);
    }
}

#[test]
fn the_checker_tells_right_from_wrong() {
    let op = |asked, answered, from, to| Operation { asked, answered, from, to };
    let write = |v, i, from, to| op(Asked::Write(v), Answered::Done(i), from, to);
    let read = |is, from, to| op(Asked::Read, Answered::Is(is), from, to);
    assert!(linearizable(&[write(1, 5, 0, 10), read(Some((1, 5)), 11, 12)]));
    assert!(!linearizable(&[write(1, 5, 0, 10), read(None, 11, 12)]), "a stale read");
    assert!(linearizable(&[write(1, 5, 0, 10), read(None, 3, 12)]), "side by side either is right");
    let twice = [write(1, 5, 0, 1), write(2, 6, 2, 9), read(Some((2, 6)), 3, 4), read(Some((1, 5)), 5, 6)];
    assert!(!linearizable(&twice), "seen, and then unseen");
    let lost = op(Asked::Write(2), Answered::Lost, 2, u64::MAX);
    assert!(linearizable(&[write(1, 5, 0, 1), lost.clone(), read(Some((1, 5)), 3, 4), read(Some((2, 9)), 5, 6)]));
    assert!(!linearizable(&[write(1, 5, 0, 1), lost, read(Some((2, 9)), 3, 4), read(Some((1, 5)), 5, 6)]));
    let cas = |e, v, answered, from, to| op(Asked::WriteIf(e, v), answered, from, to);
    let both = [write(1, 5, 0, 1), cas(5, 2, Answered::Done(6), 2, 9), cas(5, 3, Answered::Done(7), 2, 9)];
    assert!(!linearizable(&both), "two swaps of one value");
    assert!(linearizable(&[write(1, 5, 0, 1), cas(5, 2, Answered::Done(6), 2, 9), cas(5, 3, Answered::No, 2, 9)]));
    let swap = |e, v, answered, from, to| op(Asked::Swap(e, v), answered, from, to);
    assert!(!linearizable(&[swap(None, 1, Answered::Done(3), 0, 1), swap(None, 2, Answered::Done(4), 2, 3)]));
    assert!(!linearizable(&[write(1, 5, 0, 1), op(Asked::Delete, Answered::No, 2, 3)]));
    // Of many that overlap, all but one order is wrong, and it is found soon.
    let mut many: Vec<Operation> = (0..40).map(|i| write(i, i64::try_from(i).unwrap(), 0, 100)).collect();
    many.push(read(Some((17, 17)), 101, 102));
    assert!(linearizable(&many));
}

const KEYS: u64 = 6;
const WORKERS: u64 = 8;

/// One worker: what it asked of which key, and what was answered.
struct Worker {
    client: Client,
    urls: [watch::Receiver<String>; 2],
    clock: Instant,
    values: Arc<AtomicU64>,
    dice: u64,
    /// The last index and value it saw of each key.
    last: Vec<(i64, Option<u64>)>,
}

impl Worker {
    fn roll(&mut self, sides: u64) -> u64 {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        self.dice % sides
    }

    fn now(&self) -> u64 {
        u64::try_from(self.clock.elapsed().as_nanos()).unwrap()
    }

    async fn act(&mut self) -> (usize, Operation) {
        let key = usize::try_from(self.roll(KEYS)).unwrap();
        let value = self.values.fetch_add(1, Ordering::Relaxed) + 1;
        let (index, seen) = self.last[key];
        let asked = match self.roll(10) {
            0..4 => Asked::Read,
            4..6 => Asked::Write(value),
            6..8 => Asked::WriteIf(index, value),
            8 => Asked::Swap(seen, value),
            _ => Asked::Delete,
        };
        let url = self.urls[usize::try_from(self.roll(2)).unwrap()].borrow().clone();
        let client = self.client.clone_at(&url);
        let from = self.now();
        let answered = ask(&client, key, &asked).await;
        let to = if answered == Answered::Lost { u64::MAX } else { self.now() };
        match (&asked, &answered) {
            (Asked::Read, Answered::Is(Some((v, i)))) => self.last[key] = (*i, Some(*v)),
            (Asked::Read, Answered::Is(None)) => self.last[key] = (0, None),
            (Asked::Write(v) | Asked::WriteIf(_, v) | Asked::Swap(_, v), Answered::Done(i)) => {
                self.last[key] = (*i, Some(*v));
            }
            _ => {}
        }
        (key, Operation { asked, answered, from, to })
    }
}

async fn ask(client: &Client, key: usize, asked: &Asked) -> Answered {
    let path = format!("/v1/state/kv/lin/{key}");
    let request = match asked {
        Asked::Read => client.request(Method::GET, &path).await,
        Asked::Write(value) => client.request(Method::PUT, &path).await.body(value.to_string()),
        Asked::WriteIf(index, value) => {
            let put = client.request(Method::PUT, &path).await.body(value.to_string());
            put.header("if-match", format!("\"{index}\""))
        }
        Asked::Delete => client.request(Method::DELETE, &path).await,
        Asked::Swap(expected, value) => {
            let key = format!("lin/{key}");
            let condition = match expected {
                Some(v) => {
                    json!({"key": key, "target": "value", "op": "eq", "operand": sop::kernel::crypto::base64(v.to_string())})
                }
                None => json!({"key": key, "target": "exists", "op": "eq", "operand": false}),
            };
            let put = json!({"put": {"key": key, "value": sop::kernel::crypto::base64(value.to_string())}});
            client.request(Method::POST, "/v1/state/txn").await.json(&json!({"if": [condition], "then": [put]}))
        }
    };
    match request.send().await {
        Ok(answer) => understood(answer, asked).await.unwrap_or(Answered::Lost),
        Err(_) => Answered::Lost,
    }
}

async fn understood(answer: Response, asked: &Asked) -> Option<Answered> {
    let status = answer.status().as_u16();
    match (asked, status) {
        (Asked::Read, 200) => {
            let index = answer.headers()["etag"].to_str().unwrap().trim_matches('"').parse().unwrap();
            Some(Answered::Is(Some((answer.text().await.ok()?.parse().unwrap(), index))))
        }
        (Asked::Read, 404) => Some(Answered::Is(None)),
        (Asked::Delete, 404) | (Asked::WriteIf(..), 412) => Some(Answered::No),
        (Asked::Swap(..), 200) => {
            let said: serde_json::Value = answer.json().await.ok()?;
            let done = said["succeeded"].as_bool().unwrap();
            Some(if done { Answered::Done(said["index"].as_i64().unwrap()) } else { Answered::No })
        }
        (_, 200) => {
            let said: serde_json::Value = answer.json().await.ok()?;
            Some(Answered::Done(said["index"].as_i64().unwrap()))
        }
        (_, 503 | 504) => None,
        (_, other) => panic!("{other} to {asked:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn histories_under_kills_are_linearizable() {
    let seconds = std::env::var("SOP_TEST_LINEAR_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(20);
    let db = database_alone().await;
    let mut daemons = vec![Launch::on(db.url()).start().await];
    daemons.push(Launch::beside(&daemons[0], db.url()).start().await);
    let client = Client::of(&daemons[0]);
    client.token().await;
    let (tell, urls): (Vec<_>, Vec<_>) = daemons.iter().map(|d| watch::channel(d.url.clone())).unzip();
    let (stop, values, clock) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)), Instant::now());
    let mut workers = JoinSet::new();
    for w in 0..WORKERS {
        let mut worker = Worker {
            client: client.clone_at_self(),
            urls: [urls[0].clone(), urls[1].clone()],
            clock,
            values: values.clone(),
            dice: 0x9e37_79b9_7f4a_7c15 ^ (w + 1),
            last: vec![(0, None); usize::try_from(KEYS).unwrap()],
        };
        let stop = stop.clone();
        workers.spawn(async move {
            let mut done = Vec::new();
            while !stop.load(Ordering::Acquire) {
                done.push(worker.act().await);
                if matches!(done.last(), Some((_, op)) if op.answered == Answered::Lost) {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
            done
        });
    }
    let mut round = 0;
    while clock.elapsed() < Duration::from_secs(seconds) {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        if round % 2 == 0 {
            let which = (round / 2) % 2;
            let daemon = daemons.remove(which).restart().await;
            tell[which].send_replace(daemon.url.clone());
            daemons.insert(which, daemon);
        } else {
            let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'sop/%'";
            sqlx::query(sql).execute(&mut db.cluster.admin().await).await.unwrap();
        }
        round += 1;
    }
    stop.store(true, Ordering::Release);
    let mut histories: Vec<Vec<Operation>> = vec![Vec::new(); usize::try_from(KEYS).unwrap()];
    while let Some(done) = workers.join_next().await {
        for (key, op) in done.unwrap() {
            // A read that was not answered constrains nothing.
            if op.asked != Asked::Read || op.answered != Answered::Lost {
                histories[key].push(op);
            }
        }
    }
    let total: usize = histories.iter().map(Vec::len).sum();
    let unknown = histories.iter().flatten().filter(|o| o.answered == Answered::Lost).count();
    println!("{total} operations, {unknown} of unknown fate, {round} kills");
    assert!(
        total > 500 && unknown > 0 && round > 3,
        "{total} operations, {unknown} lost, {round} kills: too little to say"
    );
    for (key, mut history) in histories.into_iter().enumerate() {
        // What may have been nothing is tried last.
        history.sort_by_key(|o| (o.answered == Answered::Lost, o.from));
        assert!(linearizable(&history), "key {key}: no order explains {history:#?}");
    }
    record::check(&db).await;
}
