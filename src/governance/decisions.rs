//! The recorder: a decision is in the record before it is answered. Those that queue while the last segment commits share the next.

use std::sync::Arc;

use serde_json::json;
use tokio::sync::{Mutex, mpsc, oneshot};
use uuid::Uuid;

use crate::audit::Records;
use crate::kernel::supervisor::{Supervisor, Task};
use crate::kernel::web::Caller;
use crate::kernel::{BoxFuture, Clock, Refusal, crypto, ids, problem};
use crate::ledger::entry::canonical;
use crate::ledger::{Command, Entry, Failure, Ledger, Tx, segment};

use crate::store::Store;

use super::authzen::Evaluation;
use super::rules::Evaluated;
use super::store::{self, Kept};

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
pub(super) struct Record {
    pub id: Uuid,
    pub decision: bool,
    bytes: Vec<u8>,
}

impl Record {
    /// What is kept of a decision. The salt keeps its siblings' digests from being guessed when one record is shown.
    pub fn new(clock: &Clock, caller: &Caller, asked: &Evaluation, evaluated: &Evaluated) -> Result<Self, Refusal> {
        let (now, decision) = (clock.now(), evaluated.answered.allowed);
        let id = ids::new_id(now);
        let bytes = canonical(&json!({
            "id": id.to_string(), "time": now.to_string(), "origin": "authzen", "actor": caller.actor(),
            "request_id": caller.request().id, "decision": decision, "policies": evaluated.answered.policies,
            "bundle": &evaluated.bundles[..], "at": evaluated.at,
            // As text: numbers of others need not survive being written again.
            "request": asked.asked.to_string(), "salt": crypto::base64(crypto::random::<16>()?),
        }));
        Ok(Self { id, decision, bytes })
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
        kept.extend(records.into_iter().map(|r| Kept { id: r.id, record: r.bytes, decision: r.decision }));
    }
    let done = ledger.write(&Caller::daemon("governance"), &[], Keep(kept)).await;
    for (range, tell) in answers {
        let places = done.as_ref().map(|c| range.map(|position| Place { index: c.index, position }).collect());
        let _ = tell.send(places.map_err(Clone::clone));
    }
}

struct Keep(Vec<Kept>);

impl Command for Keep {
    type Out = ();

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<((), Entry), Failure> {
        let (index, now) = (tx.index(), tx.now());
        store::keep(tx.write(), index, &self.0, now).await?;
        let segment = segment::over(self.0.iter().map(|k| k.record.as_slice()));
        let allowed = self.0.iter().filter(|k| k.decision).count();
        Ok(((), Entry::ok("governance:evaluate", "bundle/active").change("allowed", allowed).segment(segment)))
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
            store::records(&mut conn, index).await.map_err(|e| self.0.refusal(e))
        })
    }
}
