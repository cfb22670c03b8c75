//! The recorder: a decision is in the record before it is answered. Those that queue while the last segment commits share the next.

use std::sync::Arc;

use sqlx::PgConnection;
use tokio::sync::{Mutex, mpsc, oneshot};
use uuid::Uuid;

use crate::audit::Records;
use crate::kernel::supervisor::{Supervisor, Task};
use crate::kernel::web::Caller;
use crate::kernel::{BoxFuture, Clock, Refusal, crypto, ids, problem};
use crate::ledger::entry::Object;
use crate::ledger::hot::{self, At, Column, Decided, Fact, Hot, HotKey, Loaded, Row};
use crate::ledger::{Command, Entry, Failure, Ledger, Segment, Tx, segment};

use crate::store::Store;

use super::authzen::Evaluation;
use super::rules::Evaluated;
use super::store;

/// Decisions that may wait.
const QUEUE: usize = 4096;
/// Records in a segment at most.
const SEGMENT: usize = 1000;

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
        Ok(Self { id, decision, bytes: record.end() })
    }
}

type Waiting = (Vec<Record>, oneshot::Sender<Result<Vec<Place>, Refusal>>);

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
                    let mut batch = Vec::new();
                    tokio::select! {
                        () = stop.cancelled() => return Ok(()),
                        n = receive.recv_many(&mut batch, SEGMENT) => if n == 0 { stop.cancelled().await; return Ok(()) },
                    }
                    record(&ledger, batch).await;
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

async fn record(ledger: &Ledger, batch: Vec<Waiting>) {
    let mut kept = Vec::new();
    let mut answers = Vec::new();
    for (records, tell) in batch {
        answers.push((kept.len()..kept.len() + records.len(), tell));
        kept.extend(records);
    }
    let done = ledger.write(&Caller::daemon("governance"), &[], Keep::new(&kept)).await;
    for (range, tell) in answers {
        let places = done.as_ref().map(|c| range.map(|position| Place { index: c.index, position }).collect());
        let _ = tell.send(places.map_err(Clone::clone));
    }
}

/// Keeps a segment: a hot command, for it decides on nothing.
pub(super) struct Keep {
    segment: Segment,
    /// They were answered before, while the store was away.
    late: bool,
    allowed: usize,
    first: Uuid,
    last: Uuid,
    framed: Vec<u8>,
}

impl Keep {
    fn new(records: &[Record]) -> Self {
        let mut framed = Vec::with_capacity(records.iter().map(|r| r.bytes.len() + 4).sum());
        for record in records {
            framed.extend_from_slice(&u32::try_from(record.bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
            framed.extend_from_slice(&record.bytes);
        }
        Self {
            segment: segment::over(records.iter().map(|r| r.bytes.as_slice())),
            late: false,
            allowed: records.iter().filter(|r| r.decision).count(),
            first: records.iter().map(|r| r.id).min().unwrap_or_default(),
            last: records.iter().map(|r| r.id).max().unwrap_or_default(),
            framed,
        }
    }

    /// Of what was answered while the store was away.
    pub fn late(records: &[Record]) -> Self {
        Self { late: true, ..Self::new(records) }
    }
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

impl Command for Keep {
    type Out = ();

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<((), Entry), Failure> {
        hot::alone(self, tx).await
    }

    fn hot(&self) -> Option<HotKey> {
        Some(HotKey { kind: &SEGMENTS, key: Vec::new() })
    }

    fn decide(&mut self, _: Option<&Fact>, at: At) -> Result<Decided<()>, Refusal> {
        let row = store::decisions::Segment {
            index: at.index,
            count: i64::try_from(self.segment.count).unwrap_or(i64::MAX),
            first: self.first,
            last: self.last,
            records: self.framed.clone(),
        };
        let mut entry = Entry::ok("governance:evaluate", "bundle/active").change("allowed", self.allowed);
        if self.late {
            entry = entry.change("late", true).reason("they were answered while the store was away");
        }
        let entry = entry.segment(self.segment.clone());
        Ok(Decided { value: (), entry, after: None, row: Some(Box::new(row)) })
    }
}

struct Segments;

static SEGMENTS: Segments = Segments;

impl Hot for Segments {
    fn name(&self) -> &'static str {
        "decision"
    }

    fn parts(&self) -> &'static str {
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
