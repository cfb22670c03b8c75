//! The recorder: a decision is in the record before it is answered. Those that queue while the last segment commits share the next.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use futures_util::future::join_all;
use serde::Deserialize;
use smallvec::SmallVec;
use sqlx::PgConnection;
use tokio::sync::{Mutex, mpsc, oneshot};
use uuid::Uuid;

use crate::audit::Records;
use crate::kernel::supervisor::{Supervisor, Task};
use crate::kernel::web::Caller;
use crate::kernel::{BoxFuture, Clock, Refusal, crypto, ids, problem};
use crate::ledger::entry::Object;
use crate::ledger::hot::{self, At, Column, Decided, Fact, Hot, HotKey, Loaded, Row};
use crate::ledger::{Command, Entry, Failure, Ledger, Tx, segment};
use crate::store::Store;

use super::authzen::Evaluation;
use super::rules::Evaluated;
use super::sieve::{self, About, Things};
use super::store;

/// Decisions that may wait.
const QUEUE: usize = 4096;
/// Records in a segment at most, and their bytes: whoever asks for one of them reads them all.
pub(super) const SEGMENT: usize = 1000;
pub(super) const BYTES: usize = 4 * 1024 * 1024;
/// Segments that are written together.
const TOGETHER: usize = 8;

/// Where a record is: the segment's entry and its place in it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub index: i64,
    pub position: usize,
}

/// A decision to be recorded.
#[derive(Clone)]
pub(super) struct Record {
    pub id: Uuid,
    pub decision: bool,
    pub bytes: Vec<u8>,
    /// What it is about, for the sieve of its segment; `None` where that cannot be read.
    pub about: Option<Things>,
}

impl Record {
    /// What is kept of a decision. The salt keeps its siblings' digests from being guessed when one record is shown.
    pub fn new(clock: &Clock, caller: &Caller, asked: &Evaluation, evaluated: &Evaluated) -> Result<Self, Refusal> {
        let (now, decision) = (clock.now(), evaluated.answered.allowed);
        let id = ids::new_id(now);
        let mut record = Object::new();
        record.member("actor", caller.actor());
        record.member("at", &evaluated.at);
        record.member("bundle", &evaluated.bundles[..]);
        record.member("decision", &decision);
        record.member("id", &id);
        record.member("origin", "authzen");
        record.member("policies", &evaluated.answered.policies);
        // As text: numbers of others need not survive being written again.
        record.member("request", &asked.asked);
        record.member("request_id", &caller.request().id);
        record.member("salt", &crypto::base64(crypto::random::<16>()?));
        record.member("time", &now);
        let about = About {
            subject: &asked.subject.name.id,
            action: &asked.action.0,
            resource: &asked.resource.name.id,
            policies: &evaluated.answered.policies,
            bundles: &evaluated.bundles,
            allowed: decision,
        };
        Ok(Self { id, decision, bytes: record.end(), about: Some(about.things()) })
    }
}

type Tell = oneshot::Sender<Result<Vec<Place>, Refusal>>;
type Waiting = (Vec<Record>, Tell);

/// Takes decisions and answers where they are recorded.
#[derive(Clone)]
pub(super) struct Recorder(mpsc::Sender<Waiting>);

impl Recorder {
    pub fn start(ledger: Ledger, tasks: &Supervisor) -> Self {
        let (send, receive) = mpsc::channel::<Waiting>(QUEUE);
        let receive = Arc::new(Mutex::new(receive));
        tasks.start(Task::restarting("governance/recorder", move |stop| {
            let (receive, ledger) = (receive.clone(), ledger.clone());
            async move {
                let mut receive = receive.lock().await;
                loop {
                    let mut turn = Turn::default();
                    tokio::select! {
                        () = stop.cancelled() => return Ok(()),
                        first = receive.recv() => match first {
                            Some(first) => turn.add(first),
                            None => { stop.cancelled().await; return Ok(()) }
                        },
                    }
                    while !turn.is_full()
                        && let Ok(next) = receive.try_recv()
                    {
                        turn.add(next);
                    }
                    turn.record(&ledger).await;
                }
            }
        }));
        Self(send)
    }

    /// Records, and answers once it is durable.
    pub async fn keep(&self, records: Vec<Record>) -> Result<Vec<Place>, Refusal> {
        let (tell, told) = oneshot::channel();
        self.0
            .try_send((records, tell))
            .map_err(|_| Refusal::new(&problem::OVERLOADED, "too many decisions wait to be recorded"))?;
        told.await.map_err(|_| Refusal::unavailable("the daemon is stopping"))?
    }
}

/// Where a batch is: places of segments, of which nearly always one is enough.
type Places = SmallVec<[(usize, Range<usize>); 1]>;

/// What waited together, in segments.
#[derive(Default)]
struct Turn {
    segments: Vec<Vec<Record>>,
    /// Bytes of the last.
    bytes: usize,
    /// Whom to tell, and where the records are.
    waiting: Vec<(Places, Tell)>,
}

impl Turn {
    fn add(&mut self, (records, tell): Waiting) {
        let bytes = records.iter().map(|r| r.bytes.len()).sum();
        // What one segment takes is not torn apart for the room that is left in another.
        if records.len() <= SEGMENT && bytes <= BYTES && !self.fits(records.len(), bytes) {
            self.begin();
        }
        let mut places = Places::new();
        for record in records {
            if !self.fits(1, record.bytes.len()) {
                self.begin();
            }
            let last = self.segments.len() - 1;
            let position = self.segments[last].len();
            match places.last_mut() {
                Some((segment, range)) if *segment == last => range.end += 1,
                _ => places.push((last, position..position + 1)),
            }
            self.bytes += record.bytes.len();
            self.segments[last].push(record);
        }
        self.waiting.push((places, tell));
    }

    /// Whether the last segment takes as much more. An empty one takes anything.
    fn fits(&self, records: usize, bytes: usize) -> bool {
        let fits = |s: &Vec<Record>| s.is_empty() || s.len() + records <= SEGMENT && self.bytes + bytes <= BYTES;
        self.segments.last().is_some_and(fits)
    }

    fn begin(&mut self) {
        self.segments.push(Vec::new());
        self.bytes = 0;
    }

    fn is_full(&self) -> bool {
        self.segments.len() >= TOGETHER
    }

    async fn record(self, ledger: &Ledger) {
        let daemon = Caller::daemon("governance");
        let mut done = Vec::with_capacity(self.segments.len());
        for together in self.segments.chunks(TOGETHER) {
            done.extend(join_all(together.iter().map(|s| ledger.write(&daemon, &[], Keep::new(s)))).await);
        }
        for (segments, tell) in self.waiting {
            let mut places = Ok(Vec::new());
            for (segment, range) in segments {
                match (&mut places, &done[segment]) {
                    (Ok(places), Ok(c)) => places.extend(range.map(|position| Place { index: c.index, position })),
                    (Ok(_), Err(refusal)) => places = Err(refusal.clone()),
                    (Err(_), _) => {}
                }
            }
            let _ = tell.send(places);
        }
    }
}

/// Keeps a segment: a hot command, for it decides on nothing.
struct Keep {
    entry: Entry,
    ids: Vec<Uuid>,
    framed: Vec<u8>,
    sieve: Vec<u8>,
}

impl Keep {
    fn new(records: &[Record]) -> Self {
        let (entry, ids) = (entry(records), records.iter().map(|r| r.id).collect());
        Self { entry, ids, framed: framed(records), sieve: sieve_of(records) }
    }
}

/// The entry of a segment.
fn entry(records: &[Record]) -> Entry {
    let allowed = records.iter().filter(|r| r.decision).count();
    let segment = segment::over(records.iter().map(|r| r.bytes.as_slice()));
    Entry::ok("governance:evaluate", "bundle/active").change("allowed", allowed).segment(segment)
}

/// The sieve of a segment; empty if it may hold what cannot be read.
fn sieve_of(records: &[Record]) -> Vec<u8> {
    let mut all = Vec::with_capacity(records.len() * 8);
    for record in records {
        let Some(about) = &record.about else { return Vec::new() };
        all.extend_from_slice(about);
    }
    sieve::make(all)
}

fn framed(records: &[Record]) -> Vec<u8> {
    let mut framed = Vec::with_capacity(records.iter().map(|r| r.bytes.len() + 4).sum());
    for record in records {
        framed.extend_from_slice(&u32::try_from(record.bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
        framed.extend_from_slice(&record.bytes);
    }
    framed
}

/// The records that were framed together.
pub(super) fn unframe(mut framed: &[u8]) -> Vec<&[u8]> {
    let mut records = Vec::new();
    while let Some((length, rest)) = framed.split_first_chunk::<4>() {
        let Some((record, rest)) = rest.split_at_checked(u32::from_be_bytes(*length) as usize) else { break };
        records.push(record);
        framed = rest;
    }
    records
}

/// The id of a record.
fn id(record: &[u8]) -> Option<Uuid> {
    #[derive(Deserialize)]
    struct Named {
        id: Uuid,
    }
    serde_json::from_slice::<Named>(record).ok().map(|named| named.id)
}

/// Where in a segment the record of this id is.
pub(super) fn find<'a>(framed: &'a [u8], wanted: &Uuid) -> Option<(usize, &'a [u8])> {
    unframe(framed).into_iter().enumerate().find(|(_, record)| id(record).as_ref() == Some(wanted))
}

impl Command for Keep {
    type Out = ();

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<((), Entry), Failure> {
        hot::alone(self, tx).await
    }

    fn hot(&self) -> Option<HotKey> {
        Some(HotKey { kind: &SEGMENTS, key: Vec::new() })
    }

    fn decide(&mut self, _: Option<&Fact>, at: At) -> Result<Decided<()>, Refusal> {
        // Copied: a run that is rolled back decides again.
        let row = store::decisions::Segment::new(at.index, &self.ids, self.framed.clone(), self.sieve.clone());
        Ok(Decided { value: (), entry: self.entry.clone(), after: None, row: Some(Box::new(row)) })
    }
}

/// Keeps what was answered before, while the store was away; how much of it that was.
///
/// Some of it may be in the record: an answer of the store that was lost, a crash after the commit. So each is looked for by its
/// id, and under the head's lock, where no earlier attempt can be on its way any more. That is why it is not hot.
pub(super) struct Late(pub Vec<Record>);

impl Command for Late {
    type Out = usize;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(usize, Entry), Failure> {
        let mut seen = there(tx.read(), &self.0).await?;
        let missing: Vec<Record> = self.0.iter().filter(|r| seen.insert(r.id)).cloned().collect();
        if missing.is_empty() {
            return Ok((0, Entry::nothing()));
        }
        let ids: Vec<Uuid> = missing.iter().map(|r| r.id).collect();
        let row = store::decisions::Segment::new(tx.index(), &ids, framed(&missing), sieve_of(&missing));
        store::decisions::keep(tx.write(), &row).await?;
        let entry = entry(&missing).change("late", true).reason("they were answered while the store was away");
        Ok((missing.len(), entry))
    }
}

/// Which of these are in the record.
async fn there(conn: &mut PgConnection, records: &[Record]) -> Result<HashSet<Uuid>, sqlx::Error> {
    let ids: Vec<Uuid> = records.iter().map(|r| r.id).collect();
    let wanted: HashSet<&Uuid> = ids.iter().collect();
    let mut there = HashSet::new();
    for index in store::decisions::holding(conn, &ids).await? {
        let framed = store::decisions::records(conn, index).await?.unwrap_or_default();
        there.extend(unframe(&framed).into_iter().filter_map(id).filter(|id| wanted.contains(id)));
    }
    Ok(there)
}

struct Segments;

static SEGMENTS: Segments = Segments;

impl Hot for Segments {
    fn name(&self) -> &'static str {
        "decision"
    }

    fn parts(&self, _: &[Column]) -> &'static str {
        store::decisions::SEGMENTS
    }

    fn columns(&self, rows: Vec<Row>) -> Vec<Column> {
        store::decisions::columns(rows.into_iter().filter_map(|r| r.downcast().ok()).map(|s| *s).collect())
    }

    fn load<'a>(&'a self, _: &'a mut PgConnection, _: &'a [Vec<u8>]) -> BoxFuture<'a, Loaded> {
        Box::pin(async { Ok(Vec::new()) })
    }
}

/// The records of decisions, for who gives receipts of them.
pub(super) struct Decisions(pub Store);

impl Records for Decisions {
    fn action(&self) -> &'static str {
        "governance:evaluate"
    }

    fn of(&self, index: i64) -> BoxFuture<'_, Result<Vec<Vec<u8>>, Refusal>> {
        Box::pin(async move {
            let mut conn = self.0.reader().acquire().await.map_err(|e| self.0.refusal(e))?;
            let framed = store::decisions::records(&mut conn, index).await.map_err(|e| self.0.refusal(e))?;
            Ok(unframe(&framed.unwrap_or_default()).into_iter().map(<[u8]>::to_vec).collect())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(n: usize, bytes: usize) -> Vec<Record> {
        (0..n).map(|_| Record { id: Uuid::now_v7(), decision: true, bytes: vec![b'x'; bytes], about: None }).collect()
    }

    /// The sizes of the segments that batches of these sizes make; each record is where it is said to be.
    fn segments(batches: &[(usize, usize)]) -> Vec<usize> {
        let (mut turn, mut ids) = (Turn::default(), Vec::new());
        for (n, bytes) in batches {
            let batch = records(*n, *bytes);
            ids.push(batch.iter().map(|r| r.id).collect::<Vec<_>>());
            turn.add((batch, oneshot::channel().0));
        }
        for (ids, (places, _)) in ids.iter().zip(&turn.waiting) {
            let placed = places.iter().flat_map(|(s, range)| turn.segments[*s][range.clone()].iter().map(|r| r.id));
            assert_eq!(placed.collect::<Vec<_>>(), *ids);
        }
        let bytes = |s: &Vec<Record>| s.iter().map(|r| r.bytes.len()).sum::<usize>();
        assert!(turn.segments.iter().all(|s| s.len() == 1 || s.len() <= SEGMENT && bytes(s) <= BYTES));
        turn.segments.iter().map(Vec::len).collect()
    }

    #[test]
    fn batches_share_segments_and_are_torn_apart_only_where_none_takes_them() {
        assert_eq!(segments(&[(50, 9); 30]), [1000, 500]);
        assert_eq!(segments(&[(1, 9); 1001]), [1000, 1]);
        assert_eq!(segments(&[(600, 9), (600, 9), (300, 9)]), [600, 900]);
        assert_eq!(segments(&[(10, 9), (2500, 9), (10, 9)]), [1000, 1000, 520]);
        assert_eq!(segments(&[(10, BYTES / 4)]), [4, 4, 2]);
        assert_eq!(segments(&[(1, 9), (2, BYTES + 1), (1, 9)]), [1, 1, 1, 1]);
        assert_eq!(segments(&[(1, 9), (0, 0)]), [1]);
    }
}
