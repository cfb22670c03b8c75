//! What the writer does when something is in the way: a holder that stalls, a record that moved on or went back, a commit
//! whose fate is unknown, a database that is away.

use std::future::Future;
use std::time::Duration;

use sqlx::PgConnection;
use uuid::Uuid;

use crate::kernel::crypto::sha256;
use crate::kernel::web::Caller;
use crate::kernel::{Refusal, problem};
use crate::ledger::{Entry, Shared};

use super::{AuthzFacts, Frontier, Head, Job, Known, PAGE, Place, Run, Session, Turn, Writer, store};
use crate::ledger::follower::News;
use crate::ledger::store::{Batch, Holder};

/// A batch whose commit was answered with an error, or not at all.
pub(super) struct Unknown {
    pub batch: Uuid,
    /// The head it was made on.
    pub before: i64,
    pub jobs: Vec<Box<dyn Job>>,
    /// The very bytes, if they were sent without the lock.
    pub again: Option<Box<(Batch, Run)>>,
}

/// What became of a batch of unknown fate.
pub(super) enum Settled {
    /// There was none.
    Nothing,
    /// It stands, or was written again just now, and its callers have heard; the lock went with a commit.
    Committed,
    /// It did not happen and cannot any more; its jobs are to be decided again.
    Again(Vec<Box<dyn Job>>),
}

impl Writer {
    /// Takes the fence. A daemon's session that keeps it longer than the limit is ended (rule 14): a frozen one would keep it
    /// for good, and the idle limit of its session does not see every kind of stall.
    ///
    /// We look twice while we wait, and end a holder only if it is the same both times and nothing came from it in between:
    /// one that waited beside us may have got the lock a moment ago.
    pub(super) async fn lock(&mut self, s: &mut Session) -> Result<Head, sqlx::Error> {
        let began = self.shared.clock.elapsed();
        let head = self.shared.unblocked(s.backend, store::lock_head(&mut s.conn)).await?;
        self.shared.metrics.lock.observe(self.shared.clock.elapsed().saturating_sub(began).as_secs_f64());
        head.ok_or_else(|| {
            sqlx::Error::Decode("ledger.head has no row: the database is not one of sop's, or was emptied".into())
        })
    }

    /// Reads what others wrote since, checks that the head extends what this daemon last saw (rule 13), and drops the facts
    /// that were touched. `false` if the record went backwards or elsewhere.
    ///
    /// Pushing every leaf hash since then onto our frontier and comparing roots *is* the proof that the head extends our
    /// record: no other history gives that root.
    pub(super) async fn catch_up(&mut self, conn: &mut PgConnection, head: &Head) -> Result<bool, sqlx::Error> {
        let Some(place) = self.place.as_mut() else {
            let size = u64::try_from(head.index + 1).unwrap_or(0);
            let frontier = Frontier::decode(&head.frontier, size).filter(|f| f.root() == head.root);
            let Some(frontier) = frontier else {
                tracing::error!("the head of the ledger contradicts itself: its frontier does not give its root");
                return Ok(false);
            };
            let authz = AuthzFacts::from(head.index);
            let known = Known::nothing(self.shared.present.clone());
            self.place = Some(Place { index: head.index, time: head.time, frontier, authz, known });
            self.shared.head.store(head.index, std::sync::atomic::Ordering::Release);
            return Ok(true);
        };
        if head.index == place.index {
            return Ok(place.frontier.root() == head.root);
        }
        if head.index < place.index {
            return Ok(false);
        }
        let (start, mut frontier, mut index) = (place.index, place.frontier.clone(), place.index);
        let mut news = Vec::new();
        while index < head.index {
            let entries = store::entries_after(conn, index, head.index, PAGE).await?;
            if entries.is_empty() {
                return Ok(false);
            }
            for e in entries {
                if e.index != index + 1 {
                    return Ok(false);
                }
                index = e.index;
                frontier.push(e.hash);
                place.authz.note(e.index, &e.touched);
                e.touched.iter().for_each(|t| place.known.drop(t));
                e.touched.iter().for_each(|t| place.known.heard(t));
                news.extend(e.touched.into_iter().map(|t| (e.index, t)));
            }
        }
        if frontier.root() != head.root {
            return Ok(false);
        }
        place.frontier = frontier;
        place.index = head.index;
        place.time = head.time;
        self.foreign = Some(self.shared.clock.elapsed());
        self.shared.head.store(head.index, std::sync::atomic::Ordering::Release);
        self.shared.metrics.caught_up.inc_by(u64::try_from(head.index - start).unwrap_or(0));
        self.shared.news(News { after: start, to: head.index, touched: news, began: self.began });
        Ok(true)
    }

    /// Finds out, under the lock, whether a commit of unknown fate happened. If it did, its callers hear so. If not:
    ///
    /// A transaction that held the head's lock has ended now that we hold it, and no late attempt can follow: its jobs are
    /// decided again. A statement that was sent without the lock may still be on its way, and would find the head where it
    /// expects it: so **the same bytes under the same batch id** are written here, and the late one finds the head moved. (A new
    /// decision might refuse, leave the head where it is, and then the late attempt would commit what was refused.)
    pub(super) async fn settle_unknown(&mut self, s: &mut Session, head: &Head) -> Result<Settled, sqlx::Error> {
        let Some((before, batch)) = self.unknown.as_ref().map(|u| (u.before, u.batch)) else {
            return Ok(Settled::Nothing);
        };
        let stands = store::batch_stands(&mut s.conn, before, batch).await?;
        if !stands && self.here(head) && self.unknown.as_ref().is_some_and(|u| u.again.is_some()) {
            return self.write_again(s).await;
        }
        if stands {
            // On this host. If it waited for a standby when it was broken off, nobody knows whether that has it: it does once a
            // later commit was acknowledged. Until then its fate stays unknown.
            store::touch_head(&mut s.conn).await?;
            store::commit(&mut s.conn).await?;
        }
        let Some(unknown) = self.unknown.take() else { return Ok(Settled::Nothing) };
        let mut jobs = unknown.jobs;
        if stands {
            tracing::info!(batch = %unknown.batch, "a commit of unknown fate did happen");
            self.shared.answer(jobs);
            return Ok(Settled::Committed);
        }
        tracing::info!(batch = %unknown.batch, "a commit of unknown fate did not happen; its commands run again");
        jobs.iter_mut().for_each(|j| j.reset());
        Ok(Settled::Again(jobs))
    }

    /// Whether the head is where this writer knows it.
    fn here(&self, head: &Head) -> bool {
        self.place.as_ref().is_some_and(|p| p.index == head.index && p.frontier.root() == head.root)
    }

    async fn write_again(&mut self, s: &mut Session) -> Result<Settled, sqlx::Error> {
        let Some(again) = self.unknown.as_ref().and_then(|u| u.again.as_ref()) else { return Ok(Settled::Nothing) };
        if !store::advance(&mut s.conn, &self.shared.texts, &again.0).await? {
            return Err(sqlx::Error::Protocol("the head moved although it was locked".into()));
        }
        // Until this is answered its fate stays unknown, and the bytes the same.
        store::commit(&mut s.conn).await?;
        let Some(Unknown { batch, jobs, again: Some(again), .. }) = self.unknown.take() else {
            return Ok(Settled::Nothing);
        };
        tracing::info!(%batch, "a commit of unknown fate had not happened; it was written again");
        let news = self.advance_place(again.1);
        self.shared.answer(jobs);
        self.tell(s.who, news);
        Ok(Settled::Committed)
    }

    /// Refuses to write on a record that does not extend what was acknowledged.
    pub(super) async fn behind(&mut self, conn: &mut PgConnection, mut jobs: Vec<Box<dyn Job>>) -> Turn {
        self.shared.set_behind();
        let refusal = Refusal::new(
            &problem::RECORD_BEHIND,
            "the database's record does not extend what this daemon has acknowledged: a failover lost commits, or a backup was put back; this daemon writes no more",
        );
        while let Ok(job) = self.queue.try_recv() {
            jobs.push(job);
        }
        jobs.iter_mut().for_each(|j| j.refuse(refusal.clone()));
        self.shared.finish_read(conn, jobs).await
    }

    /// The database cannot be reached: whoever waits is told so at once, but for those whose commit is of unknown fate.
    pub(super) async fn away(&mut self, mut jobs: Vec<Box<dyn Job>>, e: &sqlx::Error) {
        tracing::warn!(error = %e, "the database cannot be reached for writing");
        self.shared.metrics.away.inc();
        while let Ok(job) = self.queue.try_recv() {
            jobs.push(job);
        }
        let refusal = Refusal::unavailable("the database cannot be reached; nothing was changed");
        for mut job in jobs {
            job.refuse(refusal.clone());
            job.settle();
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

impl Shared {
    /// Waits for a statement of session `backend` that may wait for the head's lock.
    pub(super) async fn unblocked<T>(
        &self,
        backend: i32,
        statement: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        tokio::pin!(statement);
        let mut seen = None;
        loop {
            tokio::select! {
                done = &mut statement => return done,
                () = tokio::time::sleep(self.lock_wait / 2) => {
                    seen = self.look(backend, seen).await.unwrap_or_else(|e| {
                        tracing::warn!(error = %e, "could not look who holds the head of the ledger");
                        None
                    });
                }
            }
        }
    }

    /// Looks who holds the head, and ends the session if it is the one that was seen before and has not moved.
    async fn look(&self, backend: i32, before: Option<Holder>) -> Result<Option<Holder>, sqlx::Error> {
        let mut conn = self.store.dedicated("unblock").await?;
        let Some(holder) = store::holder(&mut conn, backend).await? else { return Ok(None) };
        if before.as_ref() != Some(&holder) {
            return Ok(Some(holder));
        }
        if store::end_session(&mut conn, holder.pid).await? {
            tracing::warn!(session = %holder.name, "ended the session {}: it held the head of the ledger too long", holder.name);
            self.metrics.ended.inc();
            self.note_ended(&holder.name);
        }
        Ok(None)
    }

    /// Entry of a session that was ended because it kept the fence too long.
    fn note_ended(&self, who: &str) {
        let entry = Entry::ok("ledger:end-session", format!("session/{who}"))
            .reason("it held the head of the ledger longer than ledger.lock_wait")
            .signal("warning", format!("ledger/stalled/{who}"));
        self.record_detached(Caller::daemon("ledger"), entry);
    }
}

/// The root of a log without leaves (RFC 6962 section 2.1).
pub(in crate::ledger) fn empty_root() -> [u8; 32] {
    sha256(b"")
}
