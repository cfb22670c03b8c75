//! Bundles in shadow: every decision that is recorded is decided again by them, behind the commits, and what would have been
//! otherwise is counted and listed.
//!
//! It is a replay that follows the head: exact, with the entities of each decision's index, of the decisions of all daemons, and
//! nothing of it is on the way of a request. One daemon at a time does it; it works for a share of the time and rests for the
//! remainder, so under more load than that it falls behind, says by how much, and catches up later.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::kernel::supervisor::{Stop, TaskError};
use crate::kernel::web::{Ask, Caller};
use crate::kernel::{Refusal, problem};
use crate::ledger::{Claim, Command, Committed, Entry, Failure, Tx};

use super::Governance;
use super::replay::{Flip, Groups, Run};
use super::store::bundles as bundle_rows;
use super::store::shadows::{self as rows, Shadow};

/// One daemon at a time tries bundles.
const CLAIM: Duration = Duration::from_secs(6);
/// Bundles in shadow at once.
const MOST: usize = 4;
/// Entries decided again in one piece, as long as that takes the time that a piece should: a request that comes meanwhile waits for it.
const PIECES: std::ops::Range<i64> = 1..64;
/// How long a piece should take.
const PIECE: Duration = Duration::from_millis(4);
/// What was found is written down this often: each time is a commit.
const SAVE: Duration = Duration::from_millis(250);
/// How long nothing may be heard before it looks all the same.
const POLL: Duration = Duration::from_secs(1);
/// Behind the newest decisions it rests at least this long, with nothing behind it looks no more often than that.
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(50));
/// Differences listed of one trial; all are counted.
const LISTED: i64 = 10_000;

/// A trial as the API shows it.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = ShadowTrial)]
pub struct Trial {
    /// The bundle
    pub bundle: String,
    /// Decisions recorded after this index are decided again
    pub since: i64,
    /// Where it ended; `null` while it goes on
    pub until: Option<i64>,
    /// All up to here were
    pub reached: i64,
    /// How many that was
    pub read: i64,
    /// Those whose record does not have all of what was asked
    pub skipped: i64,
    /// How many would have been other ones
    pub changed: i64,
    /// These, counted
    pub groups: Groups,
}

impl From<Shadow> for Trial {
    fn from(s: Shadow) -> Self {
        let groups = serde_json::from_slice(&s.groups).unwrap_or_default();
        let Shadow { bundle, since, until, reached, read, skipped, changed, .. } = s;
        Self { bundle, since, until, reached, read, skipped, changed, groups }
    }
}

impl Governance {
    /// Begins to try a bundle beside what is in force, or ends that.
    pub(super) async fn set_shadow(&self, caller: &Caller, id: &str, on: bool) -> Result<Committed<Trial>, Refusal> {
        // Compiled before it is tried: what does not open is told to whoever asks.
        let (row, _) = self.open(id).await?;
        let set = SetShadow { id: row.id, on };
        self.ledger.write(caller, &[Ask::new("governance:shadow", "Bundle", id)], set).await
    }

    /// What a trial found: its numbers, and the differences after a place.
    pub(super) async fn shadow(
        &self,
        caller: &Caller,
        id: &str,
        after: (i64, i64),
        limit: usize,
    ) -> Result<(Trial, Vec<Flip>), Refusal> {
        self.ledger.permit(caller, &[Ask::new("governance:decision-read", "Bundle", id)]).await?;
        let mut conn = self.connection().await?;
        let found = rows::one(&mut conn, id).await.map_err(|e| self.store.refusal(e))?;
        let found = found.ok_or_else(|| Refusal::not_found(format!("trial of bundle {id}")))?;
        let limit = i64::try_from(limit).unwrap_or(1000);
        let flips = rows::flips(&mut conn, id, after, limit).await.map_err(|e| self.store.refusal(e))?;
        let flips = flips.iter().filter_map(|f| serde_json::from_slice(&f.flip).ok()).collect();
        Ok((found.into(), flips))
    }

    /// Tries what is in shadow, until stopped.
    pub(super) async fn follow_shadows(&self, stop: Stop) -> Result<(), TaskError> {
        let claim = self.ledger.claim("governance/shadow", CLAIM);
        let mut trials = Trials { claim, open: Vec::new(), looked: None, size: PIECES.start };
        let mut index = self.ledger.watch_index();
        loop {
            index.mark_unchanged();
            let began = self.rules.clock.elapsed();
            let more = self.step(&mut trials).await?;
            let worked = self.rules.clock.elapsed().saturating_sub(began);
            let share = self.rules.settings.shadow_share.clamp(1, 100);
            let rest = (worked * (100 - share) / share).max(if more { PAUSES.0 } else { PAUSES.1 });
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(rest) => {}
            }
            if !more {
                tokio::select! {
                    () = stop.cancelled() => break,
                    _ = index.changed() => {}
                    () = tokio::time::sleep(POLL) => {}
                }
            }
        }
        trials.claim.release().await;
        Ok(())
    }

    /// One piece of each trial that goes on; whether there is more to look at.
    async fn step(&self, trials: &mut Trials) -> Result<bool, Refusal> {
        if !self.look(trials).await? {
            self.rules.metrics.shadow_lag.set(0);
            return Ok(false);
        }
        let (head, mut lag, size) = (self.ledger.index(), 0, trials.size);
        let mut longest = Duration::ZERO;
        for trial in &mut trials.open {
            let began = self.rules.clock.elapsed();
            let until = (trial.reached() + size).min(head);
            self.try_on(trial, until, until == head).await?;
            longest = longest.max(self.rules.clock.elapsed().saturating_sub(began));
            lag = lag.max(head - trial.reached());
        }
        trials.size = (if longest < PIECE { size * 2 } else { size / 2 }).clamp(PIECES.start, PIECES.end);
        self.rules.metrics.shadow_lag.set(lag);
        Ok(lag > 0)
    }

    /// Looks what is in shadow, now and then; whether this daemon has any of it to try.
    async fn look(&self, trials: &mut Trials) -> Result<bool, Refusal> {
        let now = self.rules.clock.elapsed();
        if trials.looked.is_none_or(|then| now.saturating_sub(then) >= SAVE) {
            let mut conn = self.connection().await?;
            let open = rows::open(&mut conn).await.map_err(|e| self.store.refusal(e))?;
            drop(conn);
            trials.looked = Some(now);
            // What another daemon did meanwhile is not ours: then it begins anew from what is stored.
            let mut known = std::mem::take(&mut trials.open);
            for row in open {
                let same = |t: &Trying| t.is(&row);
                let trying = known.iter().position(same).map(|at| known.swap_remove(at));
                trials.open.push(trying.unwrap_or(Trying { row, run: None, saved: now }));
            }
        }
        if trials.open.is_empty() {
            trials.claim.release().await;
            return Ok(false);
        }
        let held = trials.claim.held().await?;
        if !held {
            trials.open.clear();
            trials.looked = None;
        }
        Ok(held)
    }

    /// One piece of one trial.
    async fn try_on(&self, trial: &mut Trying, until: i64, last: bool) -> Result<(), Refusal> {
        let from = trial.reached() + 1;
        if from <= until {
            if trial.run.is_none() {
                let (row, _) = self.open(&trial.row.bundle).await?;
                let mut run = self.run(&row.id, &row.scope, from).await?;
                (run.done.reached, run.listed) = (trial.row.reached, usize::try_from(LISTED).unwrap_or(usize::MAX));
                trial.run = Some(run);
            }
            if let Some(run) = &mut trial.run {
                self.go_on(run, from, until).await?;
            }
        }
        let now = self.rules.clock.elapsed();
        if trial.reached() > trial.row.reached && (last || now.saturating_sub(trial.saved) >= SAVE) {
            trial.saved = now;
            self.save(trial).await?;
        }
        Ok(())
    }

    /// Writes down what a trial found since it was last written down.
    async fn save(&self, trial: &mut Trying) -> Result<(), Refusal> {
        let Some(run) = &mut trial.run else { return Ok(()) };
        let found = run.take();
        let (now, flips) = added(&trial.row, &found);
        let mut conn = self.connection().await?;
        if !rows::advance(&mut conn, &trial.row, &now, &flips).await.map_err(|e| self.store.refusal(e))? {
            // It has ended, or another daemon has come further: what is stored is where it goes on.
            trial.run = None;
            return Ok(());
        }
        trial.row = now;
        let counted = |outcome: &str, n: u64| {
            self.rules.metrics.shadowed.with_label_values(&[&trial.row.bundle, outcome]).inc_by(n);
        };
        counted("other", found.changed);
        counted("skipped", found.skipped);
        counted("same", found.read - found.changed - found.skipped);
        Ok(())
    }
}

/// What this daemon knows of the trials that go on.
struct Trials {
    claim: Claim,
    open: Vec<Trying>,
    /// When it last looked what is in shadow.
    looked: Option<Duration>,
    /// Entries of the next piece.
    size: i64,
}

/// A trial that this daemon works at.
struct Trying {
    /// As it was last written down.
    row: Shadow,
    /// What it is at; nothing yet at the start.
    run: Option<Run>,
    saved: Duration,
}

impl Trying {
    fn reached(&self) -> i64 {
        self.run.as_ref().map_or(self.row.reached, |run| run.done.reached)
    }

    /// Whether this is the row as this daemon left it.
    fn is(&self, row: &Shadow) -> bool {
        self.row.bundle == row.bundle && self.row.since == row.since && self.row.reached == row.reached
    }
}

/// A trial after one more step, and the differences of it that are listed.
fn added(was: &Shadow, found: &super::replay::Replay) -> (Shadow, Vec<rows::Flip>) {
    let count = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let mut groups: Groups = serde_json::from_slice(&was.groups).unwrap_or_default();
    groups.merge(&found.groups);
    let now = Shadow {
        reached: found.reached,
        read: was.read + count(found.read),
        skipped: was.skipped + count(found.skipped),
        changed: was.changed + count(found.changed),
        groups: serde_json::to_vec(&groups).unwrap_or_else(|_| was.groups.clone()),
        ..was.clone()
    };
    let room = usize::try_from(LISTED - was.changed).unwrap_or(0);
    let flip = |f: &Flip| {
        let position = i64::try_from(f.position).unwrap_or(i64::MAX);
        Some(rows::Flip { index: f.index, position, flip: serde_json::to_vec(f).ok()? })
    };
    (now, found.flips.iter().take(room).filter_map(flip).collect())
}

/// Begins or ends a trial.
struct SetShadow {
    id: String,
    on: bool,
}

impl Command for SetShadow {
    type Out = Trial;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Trial, Entry), Failure> {
        let row = bundle_rows::one(tx.read(), &self.id).await?;
        let row = row.ok_or_else(|| Refusal::not_found(format!("bundle {}", self.id)))?;
        let conflict = |detail: String| Failure::from(Refusal::new(&problem::CONFLICT, detail));
        let index = tx.index();
        if self.on {
            if matches!(row.status.as_str(), "shadow" | "canary" | "active") {
                return Err(conflict(format!("bundle {} is {}", self.id, row.status)));
            }
            if rows::open(tx.read()).await?.len() >= MOST {
                return Err(conflict(format!("{MOST} bundles are in shadow; end one before you begin another")));
            }
            rows::begin(tx.write(), &self.id, index).await?;
            bundle_rows::set_status(tx.write(), &self.id, "shadow", index).await?;
        } else {
            if row.status != "shadow" {
                return Err(conflict(format!("bundle {} is not in shadow", self.id)));
            }
            rows::end(tx.write(), &self.id, index).await?;
            bundle_rows::rest(tx.write(), &self.id, index).await?;
        }
        let trial = rows::one(tx.read(), &self.id).await?;
        let trial = trial.ok_or_else(|| Failure::Database(sqlx::Error::RowNotFound))?;
        let entry = Entry::ok("governance:shadow", format!("bundle/{}", self.id)).change("on", self.on);
        Ok((trial.into(), entry))
    }
}
