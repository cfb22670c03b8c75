//! The turn of a writer that is alone: one statement, no lock.
//!
//! Sound because the statement advances the head only where it still is at the index this writer knows, and the head never
//! goes backwards: if it succeeds, nobody wrote between the moment our facts are of and the commit. So facts that were read on
//! the way were read at that very index. If it does not, nothing was written, and the turn is taken again under the lock.

use crate::ledger::hot::HotKeys;
use crate::ledger::job::Job;
use crate::ledger::store;

use super::recover::Unknown;
use super::run::Run;
use super::{Session, Turn, Writer, again, is_broken};

/// What became of it.
pub(super) enum Tried {
    /// The turn has ended.
    Ended(Turn),
    /// It takes the lock.
    Lock(Vec<Box<dyn Job>>),
}

impl Writer {
    /// Tries a turn without the lock. Not for commands that run SQL of their own.
    pub(super) async fn optimistic(&mut self, s: &mut Session, mut jobs: Vec<Box<dyn Job>>) -> Tried {
        self.drain(&mut jobs);
        let keys: Vec<HotKeys> = jobs.iter().map_while(|j| j.hot()).collect();
        let Some(place) = self.place.as_ref().filter(|_| keys.len() == jobs.len()) else { return Tried::Lock(jobs) };
        let mut run = Run::new(place, self.shared.clock.now(), self.shared.heard());
        if let Err(e) = run.learn(&mut s.conn, place, &keys).await {
            return lost(jobs, e);
        }
        for (job, key) in jobs.iter_mut().zip(keys) {
            match place.authz.stale(job.permit()) {
                Some(since) => job.stale(since),
                // Ours to blame: the locked turn finds out whose it is and tells only them.
                None => match run.decide(place, job.as_mut(), key) {
                    Ok(()) => {}
                    Err(_) => return locked(jobs),
                },
            }
        }
        let here = place.index;
        self.sets_out(jobs.len());
        if run.has_entries() {
            return self.advance(s, jobs, run).await;
        }
        // Nothing to write, but what is said rests on facts: a look at the head that began after the jobs arrived (rule 11).
        match store::head_index(&mut s.conn).await {
            Ok(head) if head == here => {
                self.shared.metrics.optimistic.inc();
                self.shared.answer(jobs);
                Tried::Ended(Turn::Fine)
            }
            Ok(_) => self.missed(jobs),
            Err(e) => lost(jobs, e),
        }
    }

    async fn advance(&mut self, s: &mut Session, jobs: Vec<Box<dyn Job>>, mut run: Run) -> Tried {
        let Some(place) = self.place.as_ref() else { return locked(jobs) };
        let batch = run.batch();
        let wrote = store::advance(&mut s.conn, &self.shared.texts, &batch);
        let wrote = self.shared.unblocked(s.backend, wrote);
        // In this order: the statement is sent first.
        let (wrote, ()) = tokio::join!(biased; wrote, async { run.foresee(&place.known) });
        match wrote {
            Ok(true) => {
                self.shared.metrics.optimistic.inc();
                let news = self.advance_place(run);
                // First who waits for it, then who follows: waking another thread takes a while.
                self.shared.answer(jobs);
                self.shared.lately.push(batch.before + 1, batch.entries);
                self.tell(s.who, news);
                Tried::Ended(Turn::Fine)
            }
            Ok(false) => self.missed(jobs),
            Err(e) if is_broken(&e) => {
                // It may have happened, or may happen yet: no lock of ours tells when it is over (rule 12).
                let (id, before) = (batch.id, batch.before);
                self.unknown = Some(Unknown { batch: id, before, jobs, again: Some(Box::new((batch, run))) });
                self.shared.metrics.unknown.inc();
                Tried::Ended(Turn::Broken(Vec::new(), e))
            }
            // The statement failed, so nothing was written; under the lock it is found out whose fault it is.
            Err(_) => locked(jobs),
        }
    }

    /// The head has moved: others write. For a while every turn is a locked one.
    fn missed(&mut self, jobs: Vec<Box<dyn Job>>) -> Tried {
        self.shared.metrics.missed.inc();
        self.foreign = Some(self.shared.clock.elapsed());
        locked(jobs)
    }
}

fn locked(mut jobs: Vec<Box<dyn Job>>) -> Tried {
    jobs.iter_mut().for_each(|j| j.reset());
    Tried::Lock(jobs)
}

/// A failure before anything was written.
fn lost(jobs: Vec<Box<dyn Job>>, e: sqlx::Error) -> Tried {
    if is_broken(&e) { Tried::Ended(again(jobs, e)) } else { locked(jobs) }
}
