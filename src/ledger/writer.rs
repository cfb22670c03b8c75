//! The writer: one turn after another.
//!
//! Turns are taken by the writer's own thread, which the queue's bell wakes, each with whatever queued; or, where nobody else
//! writes, on the spot by who brings a command ([`Writer::express`]).
//!
//! A locked turn: take the fence (lock the head row), catch up with what other daemons wrote, drain the queue, run each command
//! ([`run`]), write all entries and the new head as one statement, commit, answer. A writer that is alone, with commands that
//! are all hot, leaves the lock out: that one statement is the whole turn ([`optimistic`]). What goes wrong on the way is in
//! [`recover`].

mod express;
mod gather;
mod optimistic;
mod recover;
mod run;

pub(super) use recover::empty_root;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use sqlx::PgConnection;
use tokio::sync::{Mutex, mpsc};

use crate::kernel::supervisor::{Stop, TaskError};
use crate::kernel::{Refusal, Timestamp, problem};
use crate::store::broke_off;

use super::Shared;
use super::command::Failure;
use super::facts::AuthzFacts;
use super::follower::News;
use super::job::Job;
use super::known::Known;
use super::merkle::Frontier;
use super::store::{self, Head};

use gather::Gather;
use recover::{Settled, Unknown};
use run::Run;

/// How often in a row a batch is tried on new connections before its callers are told that the database is away.
const BROKEN_MOST: u32 = 4;
/// For how long after another daemon wrote every turn is a locked one.
const ALONE: Duration = Duration::from_millis(100);
/// From so many on, those who wait are told by a task of their runtime.
const MANY: usize = 16;
/// Entries read at a time when catching up.
const PAGE: i64 = 10_000;

/// Where the writer's view of the record ends.
struct Place {
    index: i64,
    time: Timestamp,
    frontier: Frontier,
    authz: AuthzFacts,
    known: Known,
}

pub(super) struct Writer {
    shared: Arc<Shared>,
    queue: mpsc::Receiver<Box<dyn Job>>,
    /// Taken from the queue, and not served yet.
    waiting: Vec<Box<dyn Job>>,
    /// The session of turns on the spot, on the runtime of the requests.
    express: Option<Session>,
    /// What the follower is to be told of a turn on the spot.
    untold: Option<News>,
    /// How often a session was lost. One of an earlier era is not used: it may be of a host that takes no writes any more.
    era: u64,
    /// When another daemon was last seen to have written.
    foreign: Option<Duration>,
    /// What this daemon last saw committed, and must find extended whenever it looks again (rule 13).
    place: Option<Place>,
    unknown: Option<Unknown>,
    gather: Gather,
    /// When this turn began.
    began: Duration,
}

/// A connection of the writer, with the process id of its backend, by which who blocks it can be found.
struct Session {
    conn: PgConnection,
    backend: i32,
    era: u64,
    who: Who,
}

/// Who takes a turn; each has a session, on the runtime it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Who {
    /// The writer's thread.
    Thread,
    /// Who brought the command.
    Bringer,
}

/// How a turn ended for its connection.
enum Turn {
    Fine,
    /// The connection is of no use any more; whoever still waits is in the `Vec`.
    Broken(Vec<Box<dyn Job>>, sqlx::Error),
}

impl Writer {
    pub fn new(shared: Arc<Shared>, queue: mpsc::Receiver<Box<dyn Job>>) -> Self {
        let (waiting, gather, began) = (Vec::new(), Gather::default(), Duration::ZERO);
        let (express, untold, place, unknown) = (None, None, None, None);
        Self { shared, queue, waiting, express, untold, era: 0, foreign: None, place, unknown, gather, began }
    }

    /// Runs until told to stop, and then until what queued before is written.
    pub async fn run(writer: &Mutex<Self>, shared: &Shared, stop: Stop) -> Result<(), TaskError> {
        let mut session: Option<Session> = None;
        loop {
            // First, and not when the bell rings: it may have rung for an attempt that ended.
            let mut w = writer.lock().await;
            if stop.is_cancelled() {
                w.queue.close();
                w.serve(&mut session, &stop).await;
                return Ok(());
            }
            w.serve(&mut session, &stop).await;
            drop(w);
            tokio::select! {
                biased;
                () = shared.bell.notified() => {}
                () = stop.cancelled() => {}
            }
        }
    }

    /// Takes turns until nothing waits.
    async fn serve(&mut self, session: &mut Option<Session>, stop: &Stop) {
        let mut broken = 0;
        loop {
            let mut waiting = std::mem::take(&mut self.waiting);
            if waiting.is_empty() && self.unknown.is_none() {
                match self.next() {
                    Some(job) => waiting.push(job),
                    None => return,
                }
            }
            self.gather.wait(&self.queue, &self.shared.clock);
            let mut s = match session.take().filter(|s| s.era == self.era) {
                Some(s) => s,
                None => match self.connect(Who::Thread).await {
                    Ok(s) => s,
                    Err(e) => {
                        self.away(waiting, &e).await;
                        if stop.is_cancelled() && self.unknown.is_none() {
                            return;
                        }
                        continue;
                    }
                },
            };
            match self.turn(&mut s, waiting).await {
                Turn::Fine => {
                    *session = Some(s);
                    broken = 0;
                }
                Turn::Broken(jobs, e) => {
                    self.lost(Who::Thread, jobs, &e);
                    broken += 1;
                    if broken >= BROKEN_MOST {
                        let waiting = std::mem::take(&mut self.waiting);
                        self.away(waiting, &e).await;
                    }
                }
            }
        }
    }

    /// A session is of no use any more: whoever still waits is served by the next.
    fn lost(&mut self, who: Who, jobs: Vec<Box<dyn Job>>, e: &sqlx::Error) {
        tracing::warn!(error = %e, "the writer lost its connection");
        self.shared.metrics.broken.inc();
        // What became of its last statement may be heard by its notification alone.
        self.shared.writers[who as usize].store(0, Ordering::Release);
        self.era += 1;
        self.waiting.extend(jobs);
    }

    async fn connect(&mut self, who: Who) -> Result<Session, sqlx::Error> {
        let mut conn = self.shared.store.dedicated("writer").await?;
        let backend = store::backend_pid(&mut conn).await?;
        self.shared.writers[who as usize].store(backend.cast_unsigned(), Ordering::Release);
        Ok(Session { conn, backend, era: self.era, who })
    }

    /// One turn. `jobs` were taken before it: the one that woke us, or those of a turn that was broken off.
    async fn turn(&mut self, s: &mut Session, jobs: Vec<Box<dyn Job>>) -> Turn {
        self.began = self.shared.clock.elapsed();
        if self.alone() {
            match self.optimistic(s, jobs).await {
                optimistic::Tried::Ended(turn) => return turn,
                optimistic::Tried::Lock(jobs) => return self.locked(s, jobs).await,
            }
        }
        self.locked(s, jobs).await
    }

    /// Whether nobody else has been seen to write for a while, and nothing is to be found out first.
    fn alone(&self) -> bool {
        let now = self.shared.clock.elapsed();
        let quiet = self.foreign.is_none_or(|seen| now.saturating_sub(seen) >= ALONE);
        quiet && self.place.is_some() && self.unknown.is_none() && !self.shared.store.storage_full()
    }

    /// A turn under the lock of the head.
    async fn locked(&mut self, s: &mut Session, mut jobs: Vec<Box<dyn Job>>) -> Turn {
        let head = loop {
            let head = match self.lock(s).await {
                Ok(head) => head,
                Err(e) => return Turn::Broken(jobs, e),
            };
            match self.settle_unknown(s, &head).await {
                Ok(Settled::Nothing) => break head,
                // The lock went with a commit.
                Ok(Settled::Committed) => {}
                // What was tried before goes first: it arrived first.
                Ok(Settled::Again(mut again)) => {
                    again.append(&mut jobs);
                    jobs = again;
                    break head;
                }
                Err(e) => return Turn::Broken(jobs, e),
            }
        };
        match self.catch_up(&mut s.conn, &head).await {
            Ok(true) => {}
            Ok(false) => return self.behind(&mut s.conn, jobs).await,
            Err(e) => return Turn::Broken(jobs, e),
        }
        // After the lock is held, never before: what arrived while we waited goes along (rule 3).
        self.drain(&mut jobs);
        if let Some(refusal) = self.refuse_all(&head) {
            jobs.iter_mut().for_each(|j| j.refuse(refusal.clone()));
            return self.shared.finish_read(&mut s.conn, jobs).await;
        }
        self.sets_out(jobs.len());
        self.shared.metrics.locked.inc();
        self.apply(s, jobs).await
    }

    fn drain(&mut self, jobs: &mut Vec<Box<dyn Job>>) {
        while jobs.len() < self.shared.batch
            && let Some(job) = self.next()
        {
            jobs.push(job);
        }
    }

    /// The next of the queue. A change whose caller has hung up, or has waited for as long as is waited, is not begun: callers who
    /// try again would make the queue longer with each attempt, and those who still wait would wait for them all.
    fn next(&mut self) -> Option<Box<dyn Job>> {
        loop {
            let job = self.queue.try_recv().ok()?;
            if !job.is_given_up() {
                return Some(job);
            }
            self.shared.metrics.given_up.inc();
        }
    }

    /// A turn sets out with so many.
    fn sets_out(&mut self, jobs: usize) {
        self.shared.metrics.batch.observe(jobs as f64);
        self.gather.took(jobs);
        self.shared.calm.store(self.gather.calm(), Ordering::Relaxed);
    }

    /// Runs the jobs and commits. If one fails, all run again one by one.
    async fn apply(&mut self, s: &mut Session, mut jobs: Vec<Box<dyn Job>>) -> Turn {
        match self.run_jobs(&mut s.conn, &mut jobs).await {
            Ok(run) => self.commit(s, jobs, run).await,
            Err((_, Failure::Database(e))) if is_broken(&e) => again(jobs, e),
            Err((culprit, failure)) => {
                if let Err(e) = store::rollback(&mut s.conn).await {
                    return again(jobs, e);
                }
                if jobs.len() == 1 {
                    jobs[culprit].refuse(self.refusal(failure));
                    jobs.into_iter().for_each(Job::settle);
                    return Turn::Fine;
                }
                self.one_by_one(s, jobs).await
            }
        }
    }

    /// A batch that failed runs again, each command in a transaction of its own: one bad command never takes a neighbour along.
    async fn one_by_one(&mut self, s: &mut Session, jobs: Vec<Box<dyn Job>>) -> Turn {
        self.shared.metrics.singled.inc();
        let mut rest = jobs.into_iter();
        while let Some(mut job) = rest.next() {
            job.reset();
            let turn = match self.lock(s).await {
                Ok(head) => match self.catch_up(&mut s.conn, &head).await {
                    Ok(true) => Box::pin(self.apply(s, vec![job])).await,
                    Ok(false) => self.behind(&mut s.conn, vec![job]).await,
                    Err(e) => Turn::Broken(vec![job], e),
                },
                Err(e) => Turn::Broken(vec![job], e),
            };
            if let Turn::Broken(mut again, e) = turn {
                again.extend(rest);
                again.iter_mut().for_each(|j| j.reset());
                return Turn::Broken(again, e);
            }
        }
        Turn::Fine
    }

    async fn commit(&mut self, s: &mut Session, jobs: Vec<Box<dyn Job>>, run: Run) -> Turn {
        if !run.wrote() {
            return self.shared.finish_read(&mut s.conn, jobs).await;
        }
        if let Err(e) = store::commit(&mut s.conn).await {
            // Unknown: it may have happened (rule 12). Nobody is answered until it is known. A batch of refusals whose outcomes
            // were kept has no entries to find it by; it simply runs again.
            self.unknown = Some(Unknown { batch: run.id(), before: run.before(), jobs, again: None });
            self.shared.metrics.unknown.inc();
            return Turn::Broken(Vec::new(), e);
        }
        let news = self.advance_place(run);
        self.shared.answer(jobs);
        self.tell(s.who, news);
        Turn::Fine
    }

    /// Moves the place past a batch of ours that committed; what there is to tell the follower.
    fn advance_place(&mut self, run: Run) -> Option<News> {
        let place = self.place.as_mut()?;
        let after = place.index;
        let done = run.done(&place.known);
        let entries = done.touched.len();
        let mut news = Vec::with_capacity(entries);
        for (index, touched) in (after + 1..).zip(done.touched) {
            place.authz.note(index, &touched);
            news.extend(touched.into_iter().map(|t| (index, t)));
        }
        done.overlay.merge(&mut place.known);
        place.index = after + entries as i64;
        place.time = done.time;
        place.frontier = done.frontier;
        (place.index > after).then(|| {
            self.shared.head.store(place.index, Ordering::Release);
            self.shared.metrics.entries.inc_by(entries as u64);
            News { after, to: place.index, touched: news, began: self.began }
        })
    }

    /// Tells the follower of a turn whose callers are being answered. On the runtime of the requests whoever was woken last runs
    /// first, and that is to be the caller: there it is told when the turn is over ([`express`]).
    fn tell(&mut self, who: Who, news: Option<News>) {
        let now = match who {
            Who::Thread => news,
            Who::Bringer => std::mem::replace(&mut self.untold, news),
        };
        if let Some(news) = now {
            self.shared.news(news);
        }
    }

    /// What whoever asked is told of a failure that was found to be theirs.
    fn refusal(&self, failure: Failure) -> Refusal {
        match failure {
            Failure::Refused(r) => r,
            Failure::Database(e) => self.shared.store.refusal(e),
        }
    }

    /// Why nothing may be written now, if so.
    fn refuse_all(&self, head: &Head) -> Option<Refusal> {
        if self.shared.store.storage_full() {
            return Some(Refusal::new(
                &problem::STORAGE_FULL,
                "the disk of the data folder is nearly full: reads go on, writes resume by themselves when there is room",
            ));
        }
        let next = self.shared.clock.now().max(head.time);
        (next.millis() - head.database_time.millis() > store::AHEAD_MS).then(|| {
            Refusal::new(&problem::CLOCK_UNSURE, "this daemon's clock is more than 5 seconds ahead of the database's; check time synchronisation on both")
        })
    }
}

impl Shared {
    /// Tells those who wait what came of it. Where they are many a task of their own runtime does: from another thread each of
    /// them is woken through a queue that its threads share, and the next turn waits for all of it.
    fn answer(&self, jobs: Vec<Box<dyn Job>>) {
        if jobs.len() < MANY {
            return jobs.into_iter().for_each(Job::settle);
        }
        self.requests.detach(async move { jobs.into_iter().for_each(Job::settle) });
    }

    /// Ends a transaction that wrote nothing. Its answers rest on rows read under the lock, so the lock was their fence.
    async fn finish_read(&self, conn: &mut PgConnection, jobs: Vec<Box<dyn Job>>) -> Turn {
        match store::rollback(conn).await {
            Ok(()) => {
                self.answer(jobs);
                Turn::Fine
            }
            Err(e) => again(jobs, e),
        }
    }
}

fn again(mut jobs: Vec<Box<dyn Job>>, e: sqlx::Error) -> Turn {
    jobs.iter_mut().for_each(|j| j.reset());
    Turn::Broken(jobs, e)
}

/// Whether the connection, and not the statement, is at fault.
fn is_broken(e: &sqlx::Error) -> bool {
    match e {
        sqlx::Error::Database(db) => broke_off(&**db),
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => true,
        _ => false,
    }
}
