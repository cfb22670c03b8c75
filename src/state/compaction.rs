//! Compaction: history before a mark is given up. The mark is an entry; the rows go later, when no read that began before it
//! can be under way any more (rule 16).

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use crate::config::History;
use crate::kernel::supervisor::{Supervisor, Task, TaskError};
use crate::kernel::web::{Ask, Caller};
use crate::kernel::{Clock, Refusal, Timestamp, problem};
use crate::ledger::{self, Claim, Command, Committed, Entry, Failure, Ledger, Tx};
use crate::store::Store;

use super::metrics::Metrics;
use super::store::history as rows;
use super::{State, store};

/// How long the claim on compaction lasts without renewal.
const CLAIM: Duration = Duration::from_secs(10);
/// Between two looks whether there are rows to drop.
const LOOK: Duration = Duration::from_secs(1);
/// Between two steps of dropping rows.
const PAUSE: Duration = Duration::from_millis(20);

/// What compaction answers
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = Compacted)]
pub(super) struct Compacted {
    /// History can be read from this index on
    pub before: i64,
    /// The index of the entry of it
    pub index: i64,
}

/// Gives up history before an index.
pub(super) struct Compact(pub i64);

impl Command for Compact {
    type Out = Compacted;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Compacted, Entry), Failure> {
        let (before, index) = (self.0, tx.index());
        if before >= index {
            let detail = format!("index {before} is beyond the head, which is {}", index - 1);
            return Err(Refusal::new(&problem::BEYOND_HEAD, detail).into());
        }
        let mark = rows::mark(tx.read()).await?;
        if before <= mark {
            let detail = format!("history before index {mark} was compacted already");
            return Err(Refusal::new(&problem::CONFLICT, detail).with("before", mark).into());
        }
        rows::set_mark(tx.write(), before).await?;
        let entry = Entry::ok("state:compact", "history/keys").change("before", before).change("previous", mark);
        Ok((Compacted { before, index }, entry))
    }
}

impl State {
    pub(super) async fn compact(&self, caller: &Caller, before: i64) -> Result<Committed<Compacted>, Refusal> {
        let ask = Ask::new("state:compact", "Key", "");
        let done = self.ledger.write(caller, &[ask], Compact(before)).await?;
        self.metrics.mark.set(before);
        self.metrics.count("compact");
        Ok(done)
    }
}

/// What the task knows between two looks.
struct Work {
    store: Store,
    ledger: Ledger,
    clock: Clock,
    metrics: Metrics,
    history: History,
    claim: Claim,
    /// The mark, and since when this daemon has seen it.
    seen: Option<(i64, Duration)>,
    /// All up to this mark was dropped.
    dropped: i64,
    /// When the mark was last thought about.
    considered: Option<Duration>,
}

/// Moves the mark as the configuration says, and drops rows that a mark gave up. One daemon at a time does it.
pub(super) fn start(
    store: Store,
    ledger: Ledger,
    clock: Clock,
    metrics: Metrics,
    history: History,
    tasks: &Supervisor,
) {
    let claim = ledger.claim("state/compaction", CLAIM);
    let (seen, dropped, considered) = (None, -1, None);
    let work = Work { store, ledger, clock, metrics, history, claim, seen, dropped, considered };
    let work = Arc::new(Mutex::new(work));
    tasks.start(Task::restarting("state/compaction", move |stop| {
        let work = work.clone();
        async move {
            let mut work = work.lock().await;
            loop {
                tokio::select! {
                    () = stop.cancelled() => {
                        work.claim.release().await;
                        return Ok(());
                    }
                    () = tokio::time::sleep(LOOK) => work.look().await?,
                }
            }
        }
    }));
}

impl Work {
    async fn look(&mut self) -> Result<(), TaskError> {
        let mark = {
            let mut conn = self.store.reader().acquire().await?;
            rows::mark(&mut conn).await?
        };
        self.metrics.mark.set(mark);
        let now = self.clock.elapsed();
        if self.seen.is_none_or(|(seen, _)| seen != mark) {
            self.seen = Some((mark, now));
        }
        let due = self.considered.is_none_or(|then| now.saturating_sub(then) >= self.period());
        if due && let Some(wanted) = self.wanted(mark).await? {
            if self.claim.held().await? {
                self.considered = Some(now);
                self.advance(wanted).await?;
            }
        } else if due {
            self.considered = Some(now);
        }
        let old = self.seen.is_some_and(|(_, since)| now.saturating_sub(since) >= self.history.grace.get());
        if old && mark > self.dropped && mark > 0 && self.claim.held().await? {
            self.drop_rows(mark).await?;
        }
        Ok(())
    }

    /// How often the mark is thought about: it need not be more exact than a twentieth of what is kept.
    fn period(&self) -> Duration {
        let by_age = match self.history.keep.get() {
            Duration::ZERO => Duration::MAX,
            keep => (keep / 20).clamp(Duration::from_secs(1), Duration::from_secs(3600)),
        };
        let by_count = if self.history.keep_versions > 0 { Duration::from_secs(60) } else { Duration::MAX };
        by_age.min(by_count)
    }

    /// Where the mark should be, if that is further and gives up anything.
    async fn wanted(&self, mark: i64) -> Result<Option<i64>, TaskError> {
        let (keep, keep_versions) = (self.history.keep.get(), self.history.keep_versions);
        if keep.is_zero() && keep_versions == 0 {
            return Ok(None);
        }
        let mut conn = self.store.reader().acquire().await?;
        let mut wanted = mark;
        if !keep.is_zero() {
            let kept = i64::try_from(keep.as_millis()).unwrap_or(i64::MAX);
            let moment = Timestamp::from_millis(self.clock.now().millis().saturating_sub(kept));
            wanted = wanted.max(ledger::newest_at(&mut conn, moment).await?.unwrap_or(0));
        }
        if keep_versions > 0 {
            wanted = wanted.max(rows::beyond(&mut conn, keep_versions).await?.unwrap_or(0));
        }
        // A mark that gives up nothing is not worth an entry.
        Ok(if rows::changed(&mut conn, mark, wanted).await? { Some(wanted) } else { None })
    }

    async fn advance(&self, wanted: i64) -> Result<(), TaskError> {
        match self.ledger.write(&Caller::daemon("state"), &[], Compact(wanted)).await {
            Ok(_) => Ok(()),
            // Somebody was quicker.
            Err(r) if r.problem() == &problem::CONFLICT => Ok(()),
            Err(r) => Err(r.detail().to_owned().into()),
        }
    }

    async fn drop_rows(&mut self, mark: i64) -> Result<(), TaskError> {
        let mut conn = self.store.dedicated("compaction").await?;
        while let Some(gone) = store::history::drop_rows(&mut conn, mark).await? {
            self.metrics.compacted.inc_by(u64::try_from(gone).unwrap_or(0));
            if !self.claim.held().await? {
                return Ok(());
            }
            tokio::time::sleep(PAUSE).await;
        }
        self.dropped = mark;
        Ok(())
    }
}
