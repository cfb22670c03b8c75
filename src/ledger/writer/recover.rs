//! What the writer does when something is in the way: a holder that stalls, a record that moved on or went back, a commit
//! whose fate is unknown, a database that is away.

use std::time::Duration;

use sqlx::PgConnection;
use uuid::Uuid;

use crate::kernel::crypto::sha256;
use crate::kernel::{Refusal, problem};

use super::{AuthzFacts, Frontier, Head, Job, PAGE, Place, Session, Turn, Writer, finish_read, store};
use crate::ledger::follower::News;
use crate::ledger::store::Holder;

/// A batch whose commit was answered with an error, or not at all.
pub(super) struct Unknown {
    pub batch: Uuid,
    /// The head it was made on.
    pub before: i64,
    pub jobs: Vec<Box<dyn Job>>,
    /// A batch of refusals whose outcomes were kept has no entries to find it by; it simply runs again.
    pub wrote_entries: bool,
}

impl Writer {
    /// Takes the fence. A daemon's session that keeps it longer than the limit is ended (rule 14): a frozen one would keep it
    /// for good, and the idle limit of its session does not see every kind of stall.
    ///
    /// We look twice while we wait, and end a holder only if it is the same both times and nothing came from it in between:
    /// one that waited beside us may have got the lock a moment ago.
    pub(super) async fn lock(&mut self, s: &mut Session) -> Result<Head, sqlx::Error> {
        let began = self.shared.clock.elapsed();
        let backend = s.backend;
        let lock = store::lock_head(&mut s.conn);
        tokio::pin!(lock);
        let mut seen = None;
        let head = loop {
            tokio::select! {
                done = &mut lock => break done?,
                () = tokio::time::sleep(self.shared.lock_wait / 2) => {
                    seen = self.look(backend, seen).await.unwrap_or_else(|e| {
                        tracing::warn!(error = %e, "could not look who holds the head of the ledger");
                        None
                    });
                }
            }
        };
        self.shared.metrics.lock.observe(self.shared.clock.elapsed().saturating_sub(began).as_secs_f64());
        head.ok_or_else(|| {
            sqlx::Error::Decode("ledger.head has no row: the database is not one of sop's, or was emptied".into())
        })
    }

    /// Looks who holds the head, and ends the session if it is the one that was seen before and has not moved.
    async fn look(&mut self, backend: i32, before: Option<Holder>) -> Result<Option<Holder>, sqlx::Error> {
        let mut conn = self.shared.store.dedicated("unblock").await?;
        let Some(holder) = store::holder(&mut conn, backend).await? else { return Ok(None) };
        if before.as_ref() != Some(&holder) {
            return Ok(Some(holder));
        }
        if store::end_session(&mut conn, holder.pid).await? {
            tracing::warn!(session = %holder.name, "ended the session {}: it held the head of the ledger too long", holder.name);
            self.shared.metrics.ended.inc();
            self.note_ended(&holder.name);
        }
        Ok(None)
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
            self.place = Some(Place { index: head.index, time: head.time, frontier, authz });
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
                news.extend(e.touched.into_iter().map(|t| (e.index, t)));
            }
        }
        if frontier.root() != head.root {
            return Ok(false);
        }
        place.frontier = frontier;
        place.index = head.index;
        place.time = head.time;
        self.shared.head.store(head.index, std::sync::atomic::Ordering::Release);
        self.shared.metrics.caught_up.inc_by(u64::try_from(head.index - start).unwrap_or(0));
        self.shared.news(News { after: start, to: head.index, touched: news });
        Ok(true)
    }

    /// Finds out, under the lock, whether a commit of unknown fate happened. If it did, its callers hear so; if not, its jobs
    /// are handed back to be decided again.
    ///
    /// Deciding again is sound here because the transaction that may have committed held the head's lock until its end: that
    /// we hold it now means that it has ended, and no late attempt can follow.
    pub(super) async fn settle_unknown(
        &mut self,
        conn: &mut PgConnection,
    ) -> Result<Option<Vec<Box<dyn Job>>>, sqlx::Error> {
        let Some((before, batch, wrote)) = self.unknown.as_ref().map(|u| (u.before, u.batch, u.wrote_entries)) else {
            return Ok(None);
        };
        let stands = wrote && store::batch_stands(conn, before, batch).await?;
        let Some(unknown) = self.unknown.take() else { return Ok(None) };
        let mut jobs = unknown.jobs;
        if stands {
            tracing::info!(batch = %unknown.batch, "a commit of unknown fate did happen");
            jobs.into_iter().for_each(Job::settle);
            return Ok(None);
        }
        tracing::info!(batch = %unknown.batch, "a commit of unknown fate did not happen; its commands run again");
        jobs.iter_mut().for_each(|j| j.reset());
        Ok(Some(jobs))
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
        finish_read(conn, jobs).await
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

/// The root of a log without leaves (RFC 6962 section 2.1).
pub(in crate::ledger) fn empty_root() -> [u8; 32] {
    sha256(b"")
}
