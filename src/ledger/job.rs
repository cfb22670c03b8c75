//! A command on its way through the writer: what the caller may, what came of it, whom to tell.

use std::sync::Arc;

use prometheus::IntCounter;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sqlx::PgConnection;
use tokio::sync::oneshot;
use uuid::Uuid;

use crate::kernel::crypto::{self, MasterKey};
use crate::kernel::problem;
use crate::kernel::web::{Caller, Permit};
use crate::kernel::{BoxFuture, Refusal, Timestamp};

use super::command::{Approvals, Command, Committed, Failure, Tx};
use super::entry::{self, Entry, Sealed};
use super::hot::{At, DecidedMany, Fact, HotKeys, Made};
use super::store;

/// Whether a fencing token is good, seen by a connection: why not, if not. Given at boot by the room that has locks.
pub type Fencing =
    for<'a> fn(&'a mut PgConnection, &'a str, i64) -> BoxFuture<'a, Result<Option<Refusal>, sqlx::Error>>;

/// What a job needs besides its command.
pub(super) struct Means {
    /// Seals stored outcomes.
    pub master: Arc<MasterKey>,
    pub fencing: Fencing,
    /// Changes refused by their fencing token.
    pub fenced: IntCounter,
}

/// What the writer does with a job, whatever its command.
pub(super) trait Job: Send {
    /// What was decided for it, and at which index.
    fn permit(&self) -> &Permit;
    /// Whether nobody waits for it any more, and it need not be made.
    fn is_given_up(&self) -> bool;
    /// Runs it. `Ok(None)` took no index: it was refused, or its outcome was stored before.
    fn run<'a>(&'a mut self, tx: &'a mut Tx<'_>, means: &'a Means) -> BoxFuture<'a, Result<Option<Sealed>, Failure>>;
    /// The facts it decides on, if it is hot.
    fn hot(&self) -> Option<HotKeys>;
    /// Decides in memory, on these facts. `None`: it was refused, or changed nothing.
    fn decide(&mut self, facts: &[Option<&Fact>], at: At) -> Result<Option<Made>, Failure>;
    /// Forgets what a run came to, because it was rolled back.
    fn reset(&mut self);
    /// Refuses it, whatever a run came to.
    fn refuse(&mut self, refusal: Refusal);
    /// Marks it as decided on something that changed since.
    fn stale(&mut self, since: i64);
    /// Tells the caller.
    fn settle(self: Box<Self>);
}

/// What the caller hears.
pub(super) enum Heard<C: Command> {
    /// It committed, or was stored as committed.
    Committed(Committed<C::Out>),
    /// It was refused.
    Refused(Refusal),
    /// Permission was decided before `since`, where something it rests on changed. Decide again; here is the command.
    Stale { command: C, since: i64 },
}

/// The outcome kept under an `Idempotency-Key`.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Stored {
    Ok(Box<RawValue>),
    Refused(Refusal),
}

enum State<T> {
    Waiting,
    Done(Committed<T>),
    Refused(Refusal),
    Stale(i64),
}

/// A command with its caller.
pub(super) struct Ticket<C: Command> {
    command: C,
    caller: Caller,
    permit: Permit,
    /// The decision as the record keeps it.
    decision: Option<Vec<u8>>,
    /// Of its entry; drawn before it queues, so that the writer need not ask the system for each.
    salt: Result<[u8; 32], Refusal>,
    keyed: bool,
    /// The proposal that the change rests on, and who uses it up.
    approved: Option<(Uuid, Arc<dyn Approvals>)>,
    state: State<C::Out>,
    reply: oneshot::Sender<Heard<C>>,
}

impl<C: Command> Ticket<C> {
    /// `keyed` says whether the request's `Idempotency-Key` and `If-Fencing-Token` are about this command (not about a denial
    /// of it).
    pub fn new(command: C, caller: Caller, permit: Permit, keyed: bool) -> (Box<Self>, oneshot::Receiver<Heard<C>>) {
        let (reply, heard) = oneshot::channel();
        let decision = permit.decision.as_ref().map(entry::decided);
        let (salt, state) = (crypto::random(), State::Waiting);
        (Box::new(Self { command, caller, permit, decision, salt, keyed, approved: None, state, reply }), heard)
    }

    /// It rests on this proposal.
    pub fn approved(&mut self, proposal: Uuid, approvals: Arc<dyn Approvals>) {
        self.approved = Some((proposal, approvals));
    }

    /// Makes the change, and uses up the proposal it rests on.
    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(C::Out, Entry), Failure> {
        let Some((proposal, approvals)) = self.approved.clone() else { return self.command.apply(tx).await };
        approvals.check(tx, proposal).await?;
        let (value, entry) = self.command.apply(tx).await?;
        if entry.is_nothing() {
            return Ok((value, entry));
        }
        approvals.spend(tx, proposal).await?;
        Ok((value, entry.change("proposal", proposal.to_string())))
    }

    fn seal(&self, entry: Entry, time: Timestamp) -> Result<Sealed, Refusal> {
        Ok(entry.with_decision(self.decision.clone()).seal(&self.caller, time, self.salt.clone()?))
    }

    async fn execute(&mut self, tx: &mut Tx<'_>, means: &Means) -> Result<Option<Sealed>, Failure> {
        let master = &*means.master;
        let key = self.caller.request().idempotency.clone().filter(|_| self.keyed);
        if let Some(key) = &key
            && let Some(stored) = store::outcome(tx.read(), &key.key).await?
        {
            self.state = if stored.fingerprint == key.fingerprint {
                self.replay(stored, master)
            } else {
                State::Refused(Refusal::new(
                    &problem::IDEMPOTENCY_MISMATCH,
                    "this Idempotency-Key was used with another body; use a fresh key for a new request",
                ))
            };
            return Ok(None);
        }
        let fencing = self.caller.request().fencing.as_ref().filter(|_| self.keyed);
        if let Some((lock, token)) = fencing
            && let Some(refusal) = (means.fencing)(tx.read(), lock, *token).await?
        {
            // Not kept under an Idempotency-Key: it is a refusal of the layer around the command.
            means.fenced.inc();
            self.state = State::Refused(refusal);
            return Ok(None);
        }
        match self.apply(tx).await {
            Ok((value, entry)) => {
                let nothing = entry.is_nothing();
                let (index, time) = (tx.index() - i64::from(nothing), tx.now());
                let sealed = self.seal(entry, time)?;
                if let Some(key) = &key {
                    let raw = serde_json::value::to_raw_value(&value).map_err(Refusal::internal)?;
                    let outcome = seal_outcome(master, &Stored::Ok(raw))?;
                    store::keep_outcome(tx.write(), key, Some(index), &outcome, time).await?;
                }
                self.state = State::Done(Committed { index, time, value, replayed: false });
                Ok((!nothing).then_some(sealed))
            }
            Err(Failure::Refused(refusal)) if !tx.wrote() => {
                if let Some(key) = &key
                    && storable(&refusal)
                {
                    let outcome = seal_outcome(master, &Stored::Refused(refusal.clone()))?;
                    let time = tx.now();
                    store::keep_outcome(tx.write(), key, None, &outcome, time).await?;
                }
                self.state = State::Refused(refusal);
                Ok(None)
            }
            Err(failure) => Err(failure),
        }
    }

    fn replay(&self, stored: store::Outcome, master: &MasterKey) -> State<C::Out> {
        let opened =
            master.open(OUTCOME, &stored.sealed).and_then(|plain| serde_json::from_slice::<Stored>(&plain).ok());
        match opened {
            Some(Stored::Refused(refusal)) => State::Refused(refusal),
            Some(Stored::Ok(raw)) => match serde_json::from_str(raw.get()) {
                Ok(value) => {
                    let index = stored.index.unwrap_or(-1);
                    State::Done(Committed { index, time: stored.time, value, replayed: true })
                }
                Err(e) => State::Refused(Refusal::internal(e)),
            },
            None => State::Refused(Refusal::internal("a stored outcome does not open under this master key")),
        }
    }
}

const OUTCOME: &str = "ledger/outcome";

fn seal_outcome(master: &MasterKey, outcome: &Stored) -> Result<Vec<u8>, Refusal> {
    let plain = serde_json::to_vec(outcome).map_err(Refusal::internal)?;
    master.seal(OUTCOME, &plain)
}

/// A refusal of the command itself is its outcome; one of the layers around it, or a failure of ours, is not (rule 19).
fn storable(refusal: &Refusal) -> bool {
    !matches!(refusal.problem().status, 401 | 403 | 429 | 500..)
}

impl<C: Command> Job for Ticket<C> {
    fn permit(&self) -> &Permit {
        &self.permit
    }

    fn is_given_up(&self) -> bool {
        self.reply.is_closed() && !self.command.has_happened()
    }

    fn run<'a>(&'a mut self, tx: &'a mut Tx<'_>, means: &'a Means) -> BoxFuture<'a, Result<Option<Sealed>, Failure>> {
        Box::pin(self.execute(tx, means))
    }

    fn hot(&self) -> Option<HotKeys> {
        // A stored outcome, a proposal, and who holds a lock, is looked up in the database: a command that needs that is not hot.
        let request = self.caller.request();
        let looks = self.keyed && (request.idempotency.is_some() || request.fencing.is_some());
        if looks || self.approved.is_some() {
            return None;
        }
        self.command.hot_keys()
    }

    fn decide(&mut self, facts: &[Option<&Fact>], at: At) -> Result<Option<Made>, Failure> {
        match self.command.decide_many(facts, at) {
            Ok(DecidedMany { value, entry, .. }) if entry.is_nothing() => {
                // It holds at the index before: that it does is found out with the head.
                self.state = State::Done(Committed { index: at.index - 1, time: at.now, value, replayed: false });
                Ok(None)
            }
            Ok(DecidedMany { value, entry, after, rows }) => {
                let sealed = self.seal(entry, at.now)?;
                self.state = State::Done(Committed { index: at.index, time: at.now, value, replayed: false });
                Ok(Some(Made { sealed, after, rows }))
            }
            Err(refusal) => {
                self.state = State::Refused(refusal);
                Ok(None)
            }
        }
    }

    fn reset(&mut self) {
        self.state = State::Waiting;
    }

    fn refuse(&mut self, refusal: Refusal) {
        self.state = State::Refused(refusal);
    }

    fn stale(&mut self, since: i64) {
        self.state = State::Stale(since);
    }

    fn settle(self: Box<Self>) {
        let heard = match self.state {
            State::Done(committed) => Heard::Committed(committed),
            State::Refused(refusal) => Heard::Refused(refusal),
            State::Stale(since) => Heard::Stale { command: self.command, since },
            State::Waiting => Heard::Refused(Refusal::internal("a job was settled before it ran")),
        };
        // A caller that hung up does not hear; what was committed stands.
        let _ = self.reply.send(heard);
    }
}

/// The time of the newest outcome that may be dropped: a day old.
pub(super) fn outcome_horizon(now: Timestamp) -> Timestamp {
    Timestamp::from_millis(now.millis() - 86_400_000)
}
