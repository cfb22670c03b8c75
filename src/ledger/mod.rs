//! The one way to write.
//!
//! **Invariants.** A change and its entry commit together or not at all. Indexes have no gap and commit in order. The head
//! row holds the RFC 6962 root over every leaf up to its index. Nothing is answered that a fence newer than the request does
//! not cover.
//!
//! **Not here.** What is recorded and how it is shown (`audit`), what is allowed (`governance`), the rows of the rooms (each
//! room's `store.rs`).
//!
//! **Why this way.** One writer a daemon takes whatever queued while the last commit was on its way and commits it as one
//! batch under the head row's lock: a transaction for each request was 27 times slower, and a leader to elect is a leader to lose.

mod claims;
mod command;
pub mod entry;
mod facts;
mod fence;
mod follower;
pub mod hot;
mod job;
mod known;
mod lately;
pub mod merkle;
mod metrics;
mod moments;
mod present;
pub mod segment;
mod signals;
mod store;
mod tasks;
mod together;
pub mod touch;
mod upkeep;
pub mod verbs;
mod vigil;
mod writer;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Mutex, Notify, mpsc, oneshot, watch};

use crate::kernel::crypto::MasterKey;
use crate::kernel::problem::Problem;
use crate::kernel::supervisor::{self, Requests, Stop, Supervisor};
use crate::kernel::web::{Ask, Caller};
use crate::kernel::{Clock, Refusal, problem};
use crate::store::Store;

pub use crate::kernel::web::Permit;
pub use claims::Claim;
pub use command::{Approvals, Command, Committed, Failure, Record, Tx};
pub use entry::{Entry, Outcome, Sealed, Segment, Signal};
pub use facts::{AUTHZ, authz_fact};
pub use follower::Projection;
pub use job::Fencing;
pub use lately::Whole;
pub use moments::newest_at;
pub use signals::Signalled;
pub use store::attached;
pub use together::{TX, Together};
pub use touch::{Touch, What};
pub use vigil::{Sign, Vigil};

use follower::{Follower, News};
use job::{Heard, Job, Means, Ticket};
use metrics::Metrics;
use writer::Writer;

/// How often a command is decided again because permission changed in between, before the caller is asked to come back.
const DECIDE_AGAIN: u32 = 16;

/// What the ledger is made from.
pub struct Parts {
    /// The database.
    pub store: Store,
    /// The clock.
    pub clock: Clock,
    /// Seals stored outcomes.
    pub master: Arc<MasterKey>,
    /// Where its metrics go.
    pub registry: prometheus::Registry,
    /// Commands that may wait; more are refused.
    pub queue: usize,
    /// Commands in a turn at most.
    pub batch: usize,
    /// How long another session may keep the head before it is ended.
    pub lock_wait: Duration,
    /// How long a caller waits for its commit.
    pub write_timeout: Duration,
    /// What this daemon keeps in memory.
    pub projections: Vec<Arc<dyn Projection>>,
    /// Says whether a fencing token is good.
    pub fencing: Fencing,
    /// Tables of the rooms that are partitioned by index as the entries are.
    pub partitioned: &'static [&'static str],
    /// The kind of hot command whose keys are known to be new without being read.
    pub present: &'static dyn hot::Hot,
}

/// The ledger as the rooms see it. Cheap to clone.
#[derive(Clone)]
pub struct Ledger(Arc<Inner>);

struct Inner {
    shared: Arc<Shared>,
    writer: Arc<Mutex<Writer>>,
    checks: mpsc::Sender<fence::Asked>,
    at: watch::Receiver<i64>,
    closing: Stop,
}

/// What the ledger's tasks share.
struct Shared {
    store: Store,
    clock: Clock,
    means: Means,
    batch: usize,
    lock_wait: Duration,
    write_timeout: Duration,
    metrics: Metrics,
    /// Where those are who wait for answers.
    requests: Requests,
    /// The statement that writes, by the kinds of rows it carries.
    texts: hot::Texts,
    partitioned: &'static [&'static str],
    queue: mpsc::Sender<Box<dyn Job>>,
    news: mpsc::Sender<News>,
    /// The newest index this daemon knows to be committed.
    head: AtomicI64,
    /// When the follower last had everything there was, milliseconds of the clock's elapsed time.
    confirmed: AtomicU64,
    behind: AtomicBool,
    /// The processes of PostgreSQL that our writer's sessions are, 0 without one.
    writers: [AtomicU32; 2],
    /// Another daemon may listen for news.
    others: AtomicBool,
    /// The last turns were of one command each.
    calm: AtomicBool,
    /// Which keys there may be.
    present: Arc<present::Present>,
    /// What was written lately.
    lately: lately::Lately,
    /// Rung when something was queued.
    bell: Arc<Notify>,
    /// Why nothing may be written, if somebody above found a reason.
    halted: std::sync::OnceLock<Refusal>,
    /// Who uses up the proposals that changes rest on.
    approvals: std::sync::OnceLock<Arc<dyn Approvals>>,
    /// What can be combined in a transaction.
    verbs: std::sync::OnceLock<verbs::Verbs>,
}

impl Shared {
    /// Tells the follower. If it is too far behind to listen it reads for itself.
    fn news(&self, news: News) {
        let _ = self.news.try_send(news);
    }

    fn set_behind(&self) {
        if !self.behind.swap(true, Ordering::AcqRel) {
            self.metrics.behind.set(1);
            tracing::error!("the record went backwards or elsewhere: nothing is written by this daemon any more");
        }
    }

    fn record_detached(&self, caller: Caller, entry: Entry) {
        if self.halted.get().is_some() {
            return;
        }
        let permit = Permit::granted();
        let (job, _) = Ticket::new(Record(entry), caller, permit, false);
        if let Err(e) = self.enqueue(job) {
            // The queue is full because the head was held: the entry waits for room like everyone else.
            let (TrySendError::Full(job) | TrySendError::Closed(job)) = e;
            let (queue, bell) = (self.queue.clone(), self.bell.clone());
            supervisor::detach(async move {
                let sent = queue.send(job).await.is_ok();
                bell.notify_one();
                sent
            });
        }
    }

    /// Hands a command to the writer's thread.
    fn enqueue(&self, job: Box<dyn Job>) -> Result<(), TrySendError<Box<dyn Job>>> {
        self.queue.try_send(job)?;
        self.bell.notify_one();
        Ok(())
    }
}

impl Ledger {
    /// Opens the ledger: makes the head of an empty log, reads the projections, starts writer, follower and head check, and
    /// writes leaf 0 if there is none.
    ///
    /// # Errors
    /// When the database cannot be read, or a metric is registered twice.
    pub async fn start(parts: Parts, tasks: &Supervisor) -> Result<Self, Refusal> {
        let metrics = Metrics::new(&parts.registry).map_err(Refusal::internal)?;
        let (queue, jobs) = mpsc::channel(parts.queue);
        let (news, heard) = mpsc::channel(1024);
        let (checks, asked) = mpsc::channel(16_384);
        let (at_tx, at) = watch::channel(-1);
        let shared = Arc::new(Shared {
            store: parts.store,
            clock: parts.clock,
            means: Means { master: parts.master, fencing: parts.fencing, fenced: metrics.fenced.clone() },
            batch: parts.batch,
            lock_wait: parts.lock_wait,
            write_timeout: parts.write_timeout,
            requests: Requests::here(),
            texts: hot::Texts::default(),
            partitioned: parts.partitioned,
            queue,
            news,
            head: AtomicI64::new(-1),
            confirmed: AtomicU64::new(0),
            behind: AtomicBool::new(false),
            writers: Default::default(),
            others: AtomicBool::new(true),
            calm: AtomicBool::new(false),
            present: Arc::new(present::Present::new(parts.present, metrics.spared.clone())),
            metrics,
            lately: lately::Lately::default(),
            bell: Arc::default(),
            halted: std::sync::OnceLock::new(),
            approvals: std::sync::OnceLock::new(),
            verbs: std::sync::OnceLock::new(),
        });
        shared.prepare().await.map_err(|e| shared.store.refusal(e))?;
        let mut follower = Follower::new(shared.clone(), parts.projections, heard, at_tx);
        follower.load().await.map_err(|e| shared.store.refusal(e))?;
        let writer = Arc::new(Mutex::new(Writer::new(shared.clone(), jobs)));
        tasks::start(tasks, &shared, follower, writer.clone(), asked);
        let ledger = Self(Arc::new(Inner { shared, writer, checks, at, closing: Stop::new() }));
        if ledger.index() < 0 {
            ledger.begin().await?;
        }
        Ok(ledger)
    }

    async fn begin(&self) -> Result<(), Refusal> {
        match self.write(&Caller::daemon("ledger"), &[], Begin).await {
            // Another daemon began the log at the same moment.
            Err(r) if r.problem() == &problem::CONFLICT => Ok(()),
            other => other.map(|_| ()),
        }
    }

    /// Writes: decides `asks` for the caller, runs the command, commits it with its entry, and answers with its index.
    /// A denial is an entry too. When something that the decision rests on changed before the commit, it is decided again.
    ///
    /// # Errors
    /// What the layers and the command refuse; 503 when the database is away or the queue is full.
    pub async fn write<C: Command>(
        &self,
        caller: &Caller,
        asks: &[Ask],
        command: C,
    ) -> Result<Committed<C::Out>, Refusal> {
        let mut command = command;
        for _ in 0..DECIDE_AGAIN {
            let permit = caller.decide(asks).await?;
            if !permit.allowed {
                // Boxed, as the others below: what is rare and large is not to take room in every request.
                match Box::pin(self.deny(caller, asks, permit)).await? {
                    Some(refusal) => return Err(refusal),
                    None => continue,
                }
            }
            match self.submit(command, caller, permit, true).await? {
                Heard::Committed(c) => return Ok(c),
                Heard::Refused(r) => return Err(r),
                Heard::Stale { command: back, since } => {
                    command = back;
                    self.0.shared.metrics.stale.inc();
                    Box::pin(self.reach(since, self.0.shared.write_timeout)).await?;
                }
            }
        }
        Err(Refusal::unavailable("what the caller may do changed faster than it could be decided; nothing was changed"))
    }

    /// Decides `asks` for a read. A denial is recorded before it is answered.
    ///
    /// # Errors
    /// 403 when denied, 401 when the credential no longer holds.
    pub async fn permit(&self, caller: &Caller, asks: &[Ask]) -> Result<Permit, Refusal> {
        for _ in 0..DECIDE_AGAIN {
            let permit = caller.decide(asks).await?;
            if permit.allowed {
                return Ok(permit);
            }
            if let Some(refusal) = Box::pin(self.deny(caller, asks, permit)).await? {
                return Err(refusal);
            }
        }
        Err(Refusal::unavailable("what the caller may do changed faster than it could be decided"))
    }

    /// Decides `asks` for a change that no command of the caller's commits (a heartbeat, a renewal). A proposal that it rests on is
    /// used up here, by an entry of its own.
    ///
    /// # Errors
    /// As [`permit`](Self::permit); 409 when the proposal does not stand any more.
    pub async fn pass(&self, caller: &Caller, asks: &[Ask]) -> Result<(), Refusal> {
        let permit = self.permit(caller, asks).await?;
        let (Some(_), Some(ask)) = (permit.proposal, asks.first()) else { return Ok(()) };
        let used = Record(Entry::ok(ask.action, ask.resource()));
        match self.submit(used, caller, permit, true).await? {
            Heard::Committed(_) => Ok(()),
            Heard::Refused(r) => Err(r),
            Heard::Stale { .. } => Err(Refusal::unavailable("what the caller may do changed; nothing was changed")),
        }
    }

    /// Records a denial; `None` if it went stale and must be decided again.
    async fn deny(&self, caller: &Caller, asks: &[Ask], mut permit: Permit) -> Result<Option<Refusal>, Refusal> {
        let ask = permit.denied.and_then(|i| asks.get(i)).or(asks.first());
        let Some(ask) = ask else { return Err(Refusal::internal("a denial of nothing")) };
        let id = permit.decision.as_ref().map(|d| d.id.to_string()).unwrap_or_default();
        let detail = format!("{} on {} is not allowed for {}", ask.action, ask.resource(), caller.actor());
        let refusal =
            permit.waits.take().unwrap_or_else(|| Refusal::new(&problem::DENIED, detail)).with("decision", id);
        let entry = Entry::ok(ask.action, ask.resource()).outcome(Outcome::Denied).reason(refusal.detail());
        match self.submit(Record(entry), caller, permit, false).await? {
            Heard::Committed(c) => Ok(Some(refusal.recorded_at(c.index))),
            Heard::Refused(r) => Err(r),
            Heard::Stale { since, .. } => {
                self.reach(since, self.0.shared.write_timeout).await?;
                Ok(None)
            }
        }
    }

    async fn submit<C: Command>(
        &self,
        command: C,
        caller: &Caller,
        permit: Permit,
        keyed: bool,
    ) -> Result<Heard<C>, Refusal> {
        if let Some(refusal) = self.0.shared.halted.get() {
            return Err(refusal.clone());
        }
        let proposal = permit.proposal.filter(|_| keyed);
        let (mut job, heard) = Ticket::new(command, caller.clone(), permit, keyed);
        if let Some(proposal) = proposal {
            let approvals = self.0.shared.approvals.get().cloned();
            job.approved(proposal, approvals.ok_or_else(|| Refusal::internal("nobody uses up proposals"))?);
        }
        let left = Writer::express(&self.0.writer, &self.0.shared, job);
        match left.map_or(Ok(()), |job| self.0.shared.enqueue(job)) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => {
                self.0.shared.metrics.refused_full.inc();
                return Err(Refusal::new(&problem::OVERLOADED, "the queue of changes is full; nothing was changed"));
            }
            Err(TrySendError::Closed(_)) => {
                return Err(Refusal::unavailable("the daemon is stopping; nothing was changed"));
            }
        }
        // Boxed: a timer is as large and as aligned as little else, and every future around it would be so too.
        match Box::pin(tokio::time::timeout(self.0.shared.write_timeout, heard)).await {
            Ok(Ok(heard)) => Ok(heard),
            Ok(Err(_)) => Err(Refusal::unavailable(
                "the daemon stopped before it could answer; whether the change was made is not known",
            )),
            Err(_) => Err(Refusal::unavailable(
                "the database did not answer in time; whether the change was made is not known: ask again with the same Idempotency-Key, or read",
            )),
        }
    }

    /// Proposals that changes rest on are used up by `approvals`; set once, at the start.
    pub fn approved_by(&self, approvals: Arc<dyn Approvals>) {
        let _ = self.0.shared.approvals.set(approvals);
    }

    /// Records something that changes no rows. Not subject to policy: whoever calls has decided.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn record(&self, caller: &Caller, permit: Permit, entry: Entry) -> Result<Committed<()>, Refusal> {
        let mut permit = permit;
        // The decision was made; what is recorded is that it was used.
        permit.at = i64::MAX;
        match self.submit(Record(entry), caller, permit, false).await? {
            Heard::Committed(c) => Ok(c),
            Heard::Refused(r) => Err(r),
            Heard::Stale { .. } => Err(Refusal::internal("a record went stale")),
        }
    }

    /// The newest index that was committed before this call, on any daemon; this daemon's projections reflect it on return.
    ///
    /// # Errors
    /// 503 when the head cannot be read, 504 when this daemon does not catch up in time.
    pub async fn fence(&self) -> Result<i64, Refusal> {
        let began = self.0.shared.clock.elapsed();
        let (tx, rx) = oneshot::channel();
        let full = |_| Refusal::new(&problem::OVERLOADED, "too many reads wait for the head of the ledger");
        self.0.checks.try_send(tx).map_err(full)?;
        let gone = |_| Refusal::unavailable("the daemon is stopping");
        let index = rx.await.map_err(gone)??;
        self.reach(index, self.0.shared.write_timeout).await?;
        self.0.shared.confirm(began);
        Ok(index)
    }

    /// Waits until this daemon's projections reflect `index`.
    ///
    /// # Errors
    /// 504 when they do not within that time.
    pub async fn reach(&self, index: i64, within: Duration) -> Result<(), Refusal> {
        if *self.0.at.borrow() >= index {
            return Ok(());
        }
        let mut at = self.0.at.clone();
        match tokio::time::timeout(within, at.wait_for(|i| *i >= index)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(Refusal::unavailable("the daemon is stopping")),
            Err(_) => Err(Refusal::new(
                &problem::BEHIND,
                format!("index {index} was not reached in time; this daemon reflects {}", self.index()),
            )),
        }
    }

    /// The newest index this daemon's projections reflect.
    #[must_use]
    pub fn index(&self) -> i64 {
        *self.0.at.borrow()
    }

    /// Tells of each new index, once the projections reflect it.
    #[must_use]
    pub fn watch_index(&self) -> watch::Receiver<i64> {
        self.0.at.clone()
    }

    /// Cancelled when the daemon begins to stop: whoever waits for news answers and goes.
    #[must_use]
    pub fn closing(&self) -> Stop {
        self.0.closing.clone()
    }

    /// Writes nothing from here on: `why` is wrong with the record. Reads go on. Only a restart ends it.
    pub fn halt(&self, problem: &'static Problem, why: &str) {
        let refusal = Refusal::new(problem, format!("{why}; nothing is written until that is settled"));
        if self.0.shared.halted.set(refusal).is_ok() {
            self.0.shared.metrics.behind.set(1);
            tracing::error!(why, "{}: nothing is written by this daemon any more: {why}", problem.slug);
        }
    }

    /// Why the ledger does not write now, if it does not: the problem's slug, and what is wrong.
    #[must_use]
    pub fn stopped(&self) -> Option<(&'static str, String)> {
        if let Some(refusal) = self.0.shared.halted.get() {
            return Some((refusal.problem().slug, refusal.detail().to_owned()));
        }
        let behind = self.0.shared.behind.load(Ordering::Acquire);
        behind.then(|| ("record-behind", "this daemon writes no more".to_owned()))
    }

    /// How many commands wait.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.0.shared.queue.max_capacity() - self.0.shared.queue.capacity()
    }

    /// A fact about this database that is set once: what it is, after `value` was offered.
    ///
    /// # Errors
    /// 503 when the database is away.
    pub async fn settle(&self, name: &str, value: &[u8]) -> Result<Vec<u8>, Refusal> {
        let refusal = |e| self.0.shared.store.refusal(e);
        let mut conn = self.0.shared.store.reader().acquire().await.map_err(refusal)?;
        store::settle_setting(&mut conn, name, value).await.map_err(refusal)
    }
}

/// The first leaf: the log's own beginning.
struct Begin;

impl Command for Begin {
    type Out = ();

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<((), Entry), Failure> {
        if tx.index() != 0 {
            return Err(Refusal::new(&problem::CONFLICT, "the log has begun").into());
        }
        Ok(((), Entry::ok("ledger:begin", "log/0").change("version", 1)))
    }
}
