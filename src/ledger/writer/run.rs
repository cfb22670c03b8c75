//! Running the commands of a turn: what they decide, in order of arrival, and the statement that writes it.

use smallvec::SmallVec;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::kernel::{Refusal, Timestamp, ids};
use crate::ledger::command::{Failure, Tx};
use crate::ledger::entry::Sealed;
use crate::ledger::facts::AuthzFacts;
use crate::ledger::hot::{At, Hot, HotKeys, Made, Rows, Texts};
use crate::ledger::job::Job;
use crate::ledger::known::{Known, Overlay};
use crate::ledger::merkle::Frontier;
use crate::ledger::store::{self, Batch};
use crate::ledger::touch::Touch;

use super::{Place, Writer};

/// What running a batch's jobs comes to.
pub(super) struct Run {
    id: Uuid,
    time: Timestamp,
    /// The index it began at, and the one up to which it was written.
    before: i64,
    written: i64,
    frontier: Frontier,
    /// Decided and not yet written.
    entries: Vec<Sealed>,
    rows: Rows,
    /// What its entries touch.
    touched: Vec<Vec<Touch>>,
    /// What [`Known::begun`] said when what is known heard of that, if it has.
    heard: Option<u64>,
    overlay: Overlay,
    /// Rows were written by a command itself.
    wrote: bool,
    tell: bool,
}

/// What the place takes over from a run that committed.
pub(super) struct Done {
    pub touched: Vec<Vec<Touch>>,
    pub overlay: Overlay,
    pub time: Timestamp,
    pub frontier: Frontier,
}

impl Run {
    pub fn new(place: &Place, now: Timestamp, tell: bool) -> Self {
        let time = now.max(place.time);
        Self {
            id: ids::new_id(time),
            time,
            before: place.index,
            written: place.index,
            frontier: place.frontier.clone(),
            entries: Vec::new(),
            rows: Rows::default(),
            touched: Vec::new(),
            heard: None,
            overlay: Overlay::default(),
            wrote: false,
            tell,
        }
    }

    pub fn id(&self) -> Uuid {
        self.id
    }

    pub fn before(&self) -> i64 {
        self.before
    }

    /// Whether there is anything to commit.
    pub fn wrote(&self) -> bool {
        self.wrote || self.has_entries()
    }

    pub fn has_entries(&self) -> bool {
        !self.touched.is_empty()
    }

    /// Tells what is known of what its entries touch: to be called while its statement is on its way, and the writer would only
    /// wait. To hear of what then does not come to be does no harm.
    pub fn foresee(&mut self, known: &Known) {
        self.heard = Some(known.begun());
        self.touched.iter().flatten().for_each(|t| known.heard(t));
    }

    /// It has committed.
    pub fn done(mut self, known: &Known) -> Done {
        // What was heard before may be forgotten, and was not yet there for whoever read it again.
        if self.heard != Some(known.begun()) {
            self.foresee(known);
        }
        Done { touched: self.touched, overlay: self.overlay, time: self.time, frontier: self.frontier }
    }

    fn next(&self) -> At {
        At { index: self.written + 1 + self.entries.len() as i64, now: self.time, position: 0 }
    }

    fn push(&mut self, mut sealed: Sealed) {
        self.frontier.push(sealed.hash);
        self.touched.push(std::mem::take(&mut sealed.touches));
        self.entries.push(sealed);
    }

    /// Reads the facts that these commands decide on and that are not known, one statement a kind. They go into the overlay:
    /// only a commit proves that they were read at the place we think we are.
    pub async fn learn(&mut self, conn: &mut PgConnection, place: &Place, keys: &[HotKeys]) -> Result<(), sqlx::Error> {
        let mut unknown: Vec<(&'static dyn Hot, Vec<Vec<u8>>)> = Vec::new();
        for (kind, key) in keys.iter().flat_map(|all| all.keys.iter().map(move |key| (&all.kind, key))) {
            if self.overlay.get(&place.known, kind.name(), key).is_some() {
                continue;
            }
            // Until it is read, it is not there; what is read replaces this.
            self.overlay.set(*kind, key.clone(), None);
            if self.overlay.lacks(&place.known, kind.name(), key) {
                continue;
            }
            match unknown.iter_mut().find(|(k, _)| k.name() == kind.name()) {
                Some((_, keys)) => keys.push(key.clone()),
                None => unknown.push((*kind, vec![key.clone()])),
            }
        }
        for (kind, keys) in unknown {
            for (key, fact) in kind.load(conn, &keys).await? {
                self.overlay.set(kind, key, Some(fact));
            }
        }
        Ok(())
    }

    /// Decides a hot command.
    pub fn decide(&mut self, place: &Place, job: &mut dyn Job, on: HotKeys) -> Result<(), Failure> {
        let (at, HotKeys { kind, keys }) = (self.next(), on);
        let made = {
            let fact = |key: &Vec<u8>| self.overlay.get(&place.known, kind.name(), key).and_then(Option::as_ref);
            let facts: SmallVec<[_; 1]> = keys.iter().map(fact).collect();
            job.decide(&facts, at)?
        };
        if let Some(Made { sealed, after, rows }) = made {
            keys.into_iter().zip(after).for_each(|(key, after)| self.overlay.set(kind, key, after));
            rows.into_iter().for_each(|row| self.rows.push(kind, row));
            self.push(sealed);
        }
        Ok(())
    }

    /// What is decided and not yet written, as a batch.
    pub fn batch(&mut self) -> Batch {
        let entries = std::mem::take(&mut self.entries);
        let before = self.written;
        self.written += entries.len() as i64;
        Batch {
            id: self.id,
            before,
            root: self.frontier.root(),
            frontier: self.frontier.encode(),
            time: self.time,
            entries,
            columns: std::mem::take(&mut self.rows).columns(),
            tell: self.tell,
        }
    }

    /// Writes what is decided, under the lock.
    async fn flush(&mut self, conn: &mut PgConnection, texts: &Texts) -> Result<(), Failure> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let batch = self.batch();
        if store::advance(conn, texts, &batch).await? {
            return Ok(());
        }
        Err(sqlx::Error::Protocol("the head moved although it was locked".into()).into())
    }
}

impl Writer {
    /// Runs each job in order of arrival, under the lock, and writes what they come to. On failure says whose.
    pub(super) async fn run_jobs(
        &mut self,
        conn: &mut PgConnection,
        jobs: &mut [Box<dyn Job>],
    ) -> Result<Run, (usize, Failure)> {
        let Some(place) = self.place.as_ref() else {
            return Err((0, Failure::Refused(Refusal::internal("a turn without a place"))));
        };
        let texts = &self.shared.texts;
        let mut run = Run::new(place, self.shared.clock.now(), self.shared.heard());
        let mut fresh = AuthzFacts::from(-1);
        let mut i = 0;
        while i < jobs.len() {
            // Hot commands that follow each other read what they do not know in one statement.
            let mut keys: Vec<HotKeys> = jobs[i..].iter().map_while(|j| j.hot()).collect();
            if !keys.is_empty() {
                run.learn(conn, place, &keys).await.map_err(|e| (i, e.into()))?;
                for key in keys.drain(..) {
                    match place.authz.stale(jobs[i].permit()).or_else(|| fresh.stale(jobs[i].permit())) {
                        Some(since) => jobs[i].stale(since),
                        None => run.decide(place, jobs[i].as_mut(), key).map_err(|e| (i, e))?,
                    }
                    i += 1;
                }
                continue;
            }
            if let Some(since) = place.authz.stale(jobs[i].permit()).or_else(|| fresh.stale(jobs[i].permit())) {
                jobs[i].stale(since);
                i += 1;
                continue;
            }
            // SQL of its own sees what the commands before it did (rule 5).
            if !run.rows.is_empty() {
                run.flush(conn, texts).await.map_err(|e| (i, e))?;
            }
            let at = run.next();
            let mut tx = Tx::new(conn, at.index, at.now);
            let done = jobs[i].run(&mut tx, &self.shared.means).await;
            run.wrote |= tx.wrote();
            match done {
                Ok(Some(sealed)) => {
                    // Whoever comes later in this batch must see what this one changed, about permissions too.
                    fresh.note(at.index, &sealed.touches);
                    run.overlay.drop(sealed.touches.clone());
                    run.push(sealed);
                }
                Ok(None) => {}
                Err(failure) => return Err((i, failure)),
            }
            i += 1;
        }
        run.flush(conn, texts).await.map_err(|e| (0, e))?;
        Ok(run)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::ledger::hot::ENTRIES;
    use crate::ledger::present::Present;

    #[test]
    fn what_was_heard_before_its_commit_is_heard_again_if_it_was_forgotten_meanwhile() {
        let present = Arc::new(Present::new(&ENTRIES, prometheus::IntCounter::new("spared", "in this test").unwrap()));
        let (time, known) = (Timestamp::from_millis(0), Known::nothing(present.clone()));
        let place = Place { index: 6, time, frontier: Frontier::default(), authz: AuthzFacts::from(6), known };
        for forgotten in [false, true] {
            let mut run = Run::new(&place, time, false);
            run.touched.push(vec![Touch::key("entry", "k")]);
            run.foresee(&place.known);
            if forgotten {
                present.begin();
            }
            present.filled();
            assert_eq!(present.lacks("entry", b"k"), forgotten);
            let done = run.done(&place.known);
            present.filled();
            assert!(!present.lacks("entry", b"k"));
            assert_eq!(done.touched.len(), 1);
        }
    }
}
