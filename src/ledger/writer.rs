//! The writer: one task, one connection, one turn after another.
//!
//! A turn: take the fence (lock the head row), catch up with what other daemons wrote, drain the queue, run each command,
//! write all entries and the new head as one statement, commit, answer. What goes wrong on the way is in [`recover`].

mod recover;

pub(super) use recover::empty_root;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use sqlx::PgConnection;
use tokio::sync::mpsc;

use crate::kernel::supervisor::{Stop, TaskError};
use crate::kernel::web::Caller;
use crate::kernel::{Refusal, Timestamp, ids, problem};

use super::command::{Failure, Tx};
use super::entry::Sealed;
use super::facts::AuthzFacts;
use super::follower::News;
use super::hot::{At, Facts, Hot};
use super::job::Job;
use super::merkle::Frontier;
use super::store::{self, Head};
use super::touch::Touched;
use super::{Entry, Shared};

use recover::Unknown;

/// How far ahead of the database's clock an entry's time may be.
const AHEAD_MS: i64 = 5_000;
/// How often in a row a batch is tried on new connections before its callers are told that the database is away.
const BROKEN_MOST: u32 = 4;
/// Entries read at a time when catching up.
const PAGE: i64 = 10_000;

/// Where the writer's view of the record ends.
struct Place {
    index: i64,
    time: Timestamp,
    frontier: Frontier,
    authz: AuthzFacts,
}

pub(super) struct Writer {
    shared: Arc<Shared>,
    queue: mpsc::Receiver<Box<dyn Job>>,
    /// What this daemon last saw committed, and must find extended whenever it looks again (rule 13).
    place: Option<Place>,
    unknown: Option<Unknown>,
}

/// A connection of the writer, with the process id of its backend, by which who blocks it can be found.
struct Session {
    conn: PgConnection,
    backend: i32,
}

/// How a turn ended for its connection.
enum Turn {
    Fine,
    /// The connection is of no use any more; whoever still waits is in the `Vec`.
    Broken(Vec<Box<dyn Job>>, sqlx::Error),
}

impl Writer {
    pub fn new(shared: Arc<Shared>, queue: mpsc::Receiver<Box<dyn Job>>) -> Self {
        Self { shared, queue, place: None, unknown: None }
    }

    /// Runs until told to stop, and then until what queued before is written.
    pub async fn run(&mut self, stop: Stop) -> Result<(), TaskError> {
        let mut session: Option<Session> = None;
        let mut waiting: Vec<Box<dyn Job>> = Vec::new();
        let mut broken = 0;
        loop {
            if waiting.is_empty() && self.unknown.is_none() {
                tokio::select! {
                    biased;
                    job = self.queue.recv() => match job {
                        Some(job) => waiting.push(job),
                        None => return Ok(()),
                    },
                    () = stop.cancelled() => {
                        self.queue.close();
                        match self.queue.recv().await {
                            Some(job) => waiting.push(job),
                            None => return Ok(()),
                        }
                    }
                }
            }
            let mut s = match session.take() {
                Some(s) => s,
                None => match self.connect().await {
                    Ok(s) => s,
                    Err(e) => {
                        self.away(std::mem::take(&mut waiting), &e).await;
                        if stop.is_cancelled() && self.unknown.is_none() {
                            return Ok(());
                        }
                        continue;
                    }
                },
            };
            match self.turn(&mut s, std::mem::take(&mut waiting)).await {
                Turn::Fine => {
                    session = Some(s);
                    broken = 0;
                }
                Turn::Broken(jobs, e) => {
                    tracing::warn!(error = %e, "the writer lost its connection");
                    self.shared.metrics.broken.inc();
                    broken += 1;
                    waiting = jobs;
                    if broken >= BROKEN_MOST {
                        self.away(std::mem::take(&mut waiting), &e).await;
                    }
                }
            }
        }
    }

    async fn connect(&mut self) -> Result<Session, sqlx::Error> {
        let mut conn = self.shared.store.dedicated("writer").await?;
        let backend = store::backend_pid(&mut conn).await?;
        Ok(Session { conn, backend })
    }

    /// One turn. `jobs` were taken before the lock: the one that woke us, or those of a turn that was broken off.
    async fn turn(&mut self, s: &mut Session, mut jobs: Vec<Box<dyn Job>>) -> Turn {
        let head = match self.lock(s).await {
            Ok(head) => head,
            Err(e) => return Turn::Broken(jobs, e),
        };
        let settled = match self.settle_unknown(&mut s.conn).await {
            Ok(again) => again,
            Err(e) => return Turn::Broken(jobs, e),
        };
        // What was tried before goes first: it arrived first.
        if let Some(mut again) = settled {
            again.append(&mut jobs);
            jobs = again;
        }
        match self.catch_up(&mut s.conn, &head).await {
            Ok(true) => {}
            Ok(false) => return self.behind(&mut s.conn, jobs).await,
            Err(e) => return Turn::Broken(jobs, e),
        }
        // After the lock is held, never before: what arrived while we waited goes along (rule 3).
        while jobs.len() < self.shared.batch
            && let Ok(job) = self.queue.try_recv()
        {
            jobs.push(job);
        }
        if let Some(refusal) = self.refuse_all(&head) {
            jobs.iter_mut().for_each(|j| j.refuse(refusal.clone()));
            return finish_read(&mut s.conn, jobs).await;
        }
        self.shared.metrics.batch.observe(jobs.len() as f64);
        self.apply(s, &head, jobs).await
    }

    /// Runs the jobs and commits. If one fails, all run again one by one.
    async fn apply(&mut self, s: &mut Session, head: &Head, mut jobs: Vec<Box<dyn Job>>) -> Turn {
        match self.run_jobs(&mut s.conn, head, &mut jobs).await {
            Ok(sealed) => self.commit(s, jobs, sealed).await,
            Err((_, Failure::Database(e))) if is_broken(&e) => {
                jobs.iter_mut().for_each(|j| j.reset());
                Turn::Broken(jobs, e)
            }
            Err((culprit, failure)) => {
                if let Err(e) = store::rollback(&mut s.conn).await {
                    jobs.iter_mut().for_each(|j| j.reset());
                    return Turn::Broken(jobs, e);
                }
                if jobs.len() == 1 {
                    jobs[culprit].refuse(refusal_of(failure));
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
                    Ok(true) => Box::pin(self.apply(s, &head, vec![job])).await,
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

    /// Runs each job in order of arrival. On failure says whose.
    async fn run_jobs(
        &mut self,
        conn: &mut PgConnection,
        head: &Head,
        jobs: &mut [Box<dyn Job>],
    ) -> Result<Run, (usize, Failure)> {
        let Some(place) = self.place.as_ref() else {
            return Err((0, Failure::Refused(Refusal::internal("a turn without a place"))));
        };
        let now = self.shared.clock.now().max(head.time);
        let mut run = Run { entries: Vec::with_capacity(jobs.len()), wrote: false, time: now };
        let mut fresh = AuthzFacts::from(-1);
        let mut i = 0;
        while i < jobs.len() {
            if let Some(since) = place.authz.stale(jobs[i].permit()).or_else(|| fresh.stale(jobs[i].permit())) {
                jobs[i].stale(since);
                i += 1;
                continue;
            }
            if let Some(first) = jobs[i].hot() {
                let fits = |j: &dyn Job| {
                    let still = place.authz.stale(j.permit()).is_none() && fresh.stale(j.permit()).is_none();
                    still && j.hot().is_some_and(|h| h.kind.name() == first.kind.name())
                };
                let length = jobs[i..].iter().take_while(|j| fits(j.as_ref())).count();
                run.hot(conn, place.index, first.kind, &mut jobs[i..i + length]).await.map_err(|(n, e)| (i + n, e))?;
                i += length;
                continue;
            }
            let index = place.index + 1 + run.entries.len() as i64;
            let mut tx = Tx::new(conn, index, now);
            let done = jobs[i].run(&mut tx, &self.shared.master).await;
            run.wrote |= tx.wrote();
            match done {
                Ok(Some(sealed)) => {
                    // Whoever comes later in this batch must see what this one changed about permissions.
                    fresh.note(index, &Touched::decode(&sealed.touched).unwrap_or_default());
                    run.entries.push(sealed);
                }
                Ok(None) => {}
                Err(failure) => return Err((i, failure)),
            }
            i += 1;
        }
        Ok(run)
    }

    async fn commit(&mut self, s: &mut Session, jobs: Vec<Box<dyn Job>>, run: Run) -> Turn {
        let Some(place) = self.place.as_mut() else {
            return finish_read(&mut s.conn, jobs).await;
        };
        if run.entries.is_empty() && !run.wrote {
            return finish_read(&mut s.conn, jobs).await;
        }
        let before = place.index;
        let id = ids::new_id(run.time);
        let mut frontier = place.frontier.clone();
        run.entries.iter().for_each(|e| frontier.push(e.hash));
        if !run.entries.is_empty() {
            let batch = store::Batch {
                id,
                before,
                root: frontier.root(),
                frontier: frontier.encode(),
                time: run.time,
                entries: &run.entries,
            };
            match store::advance(&mut s.conn, &batch).await {
                Ok(true) => {}
                Ok(false) => {
                    let e = sqlx::Error::Protocol("the head moved although it was locked".into());
                    return again(jobs, e);
                }
                Err(e) if is_broken(&e) => return again(jobs, e),
                Err(e) => {
                    let _ = store::rollback(&mut s.conn).await;
                    tracing::error!(error = %e, "the ledger's own statement failed");
                    return refused(jobs, &Refusal::internal(e));
                }
            }
        }
        if let Err(e) = store::commit(&mut s.conn).await {
            // Unknown: it may have happened (rule 12). Nobody is answered until it is known.
            self.unknown = Some(Unknown { batch: id, before, jobs, wrote_entries: !run.entries.is_empty() });
            self.shared.metrics.unknown.inc();
            return Turn::Broken(Vec::new(), e);
        }
        self.advance_place(run, frontier);
        jobs.into_iter().for_each(Job::settle);
        Turn::Fine
    }

    /// Moves the place past a batch of ours that committed, and tells the follower.
    fn advance_place(&mut self, run: Run, frontier: Frontier) {
        let Some(place) = self.place.as_mut() else { return };
        let after = place.index;
        let mut news = Vec::with_capacity(run.entries.len());
        for (i, sealed) in run.entries.iter().enumerate() {
            let index = after + 1 + i as i64;
            for t in Touched::decode(&sealed.touched).unwrap_or_default() {
                place.authz.note(index, std::slice::from_ref(&t));
                news.push((index, t));
            }
        }
        place.index = after + run.entries.len() as i64;
        place.time = run.time;
        place.frontier = frontier;
        if !run.entries.is_empty() {
            self.shared.head.store(place.index, Ordering::Release);
            self.shared.metrics.entries.inc_by(run.entries.len() as u64);
            self.shared.news(News { after, to: place.index, touched: news });
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
        (next.millis() - head.database_time.millis() > AHEAD_MS).then(|| {
            Refusal::new(&problem::CLOCK_UNSURE, "this daemon's clock is more than 5 seconds ahead of the database's; check time synchronisation on both")
        })
    }

    /// Entry of a session that was ended because it kept the fence too long.
    fn note_ended(&self, who: &str) {
        let entry = Entry::ok("ledger:end-session", format!("session/{who}"))
            .reason("it held the head of the ledger longer than ledger.lock_wait")
            .signal("warning", format!("ledger/stalled/{who}"));
        self.shared.record_detached(Caller::daemon("ledger"), entry);
    }
}

/// What running a batch's jobs came to.
struct Run {
    entries: Vec<Sealed>,
    /// Rows were written; without entries these are outcomes kept for refusals.
    wrote: bool,
    time: Timestamp,
}

impl Run {
    /// Decides a run of hot commands on facts that are read at once, and writes what they came to at once. It never touches a
    /// fact that permission rests on.
    async fn hot(
        &mut self,
        conn: &mut PgConnection,
        before: i64,
        kind: &'static dyn Hot,
        jobs: &mut [Box<dyn Job>],
    ) -> Result<(), (usize, Failure)> {
        let keys: Vec<Vec<u8>> = jobs.iter().filter_map(|j| j.hot()).map(|h| h.key).collect();
        let mut facts = Facts::load(conn, kind, keys.clone()).await.map_err(|e| (0, e.into()))?;
        let mut rows = Vec::with_capacity(jobs.len());
        for (n, (job, key)) in jobs.iter_mut().zip(keys).enumerate() {
            let at = At { index: before + 1 + self.entries.len() as i64, now: self.time };
            if let Some(made) = job.decide(facts.get(&key), at).map_err(|e| (n, e))? {
                facts.set(key, made.after);
                rows.push(made.row);
                self.entries.push(made.sealed);
            }
        }
        if !rows.is_empty() {
            self.wrote = true;
            kind.flush(conn, rows).await.map_err(|e| (0, e.into()))?;
        }
        Ok(())
    }
}

/// Ends a transaction that wrote nothing. Its answers rest on rows read under the lock, so the lock was their fence.
async fn finish_read(conn: &mut PgConnection, jobs: Vec<Box<dyn Job>>) -> Turn {
    match store::rollback(conn).await {
        Ok(()) => {
            jobs.into_iter().for_each(Job::settle);
            Turn::Fine
        }
        Err(e) => again(jobs, e),
    }
}

fn again(mut jobs: Vec<Box<dyn Job>>, e: sqlx::Error) -> Turn {
    jobs.iter_mut().for_each(|j| j.reset());
    Turn::Broken(jobs, e)
}

fn refused(mut jobs: Vec<Box<dyn Job>>, refusal: &Refusal) -> Turn {
    for mut job in jobs.drain(..) {
        job.refuse(refusal.clone());
        job.settle();
    }
    Turn::Fine
}

/// Whether the connection, and not the statement, is at fault.
fn is_broken(e: &sqlx::Error) -> bool {
    match e {
        sqlx::Error::Database(db) => {
            // Class 57: operator intervention (terminated, shut down); 08: connection; 25P03: idle in transaction too long.
            db.code().is_some_and(|c| c.starts_with("57") || c.starts_with("08") || c == "25P03")
        }
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => true,
        _ => false,
    }
}

fn refusal_of(failure: Failure) -> Refusal {
    match failure {
        Failure::Refused(r) => r,
        Failure::Database(e) => Refusal::internal(e),
    }
}
