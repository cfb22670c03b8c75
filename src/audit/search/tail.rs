//! The live tail: entries as they come, from an index on, without loss or repeats, on any daemon.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::audit::model::{Filter, Stored};
use crate::audit::{Audit, store};
use crate::kernel::Refusal;
use crate::kernel::web::{Ask, Caller};
use crate::ledger::Entry;

/// How often it says how far it has come, and looks whether its caller still may.
const BOOKMARK: Duration = Duration::from_secs(5);
/// Entries read at a time.
const PAGE: i64 = 500;

/// What is told.
pub enum Told {
    /// An entry that fits.
    Entry(Box<Stored>),
    /// All up to this index was told.
    Bookmark(i64),
    /// The tail ends here, and why.
    End(Refusal),
}

/// One reader's place in the record.
pub struct Tail {
    audit: Audit,
    caller: Caller,
    filter: Filter,
    /// All up to here was looked at.
    read: i64,
    news: watch::Receiver<i64>,
    waiting: VecDeque<Stored>,
    bookmark: Interval,
    ended: bool,
}

impl Audit {
    /// Tells entries that fit, from the one after `after`, or from now on; that it was asked for is recorded.
    ///
    /// # Errors
    /// 403 when denied, 504 when `after` is not reached in time.
    pub async fn tail(&self, caller: &Caller, filter: Filter, after: Option<i64>) -> Result<Tail, Refusal> {
        let permit = self.ledger.permit(caller, &[Ask::new("audit:read", "Entry", "")]).await?;
        if let Some(after) = after {
            self.ledger.reach(after, Duration::from_secs(5)).await?;
        }
        // Begun before it is recorded, so that nothing between the two is missed.
        let read = after.unwrap_or_else(|| self.ledger.index());
        let entry = Entry::ok("audit:read", "entry").change("tail", read);
        self.ledger.record(caller, permit, entry).await?;
        let mut bookmark = interval(BOOKMARK);
        bookmark.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Tail {
            audit: self.clone(),
            caller: caller.clone(),
            filter,
            read,
            news: self.ledger.watch_index(),
            waiting: VecDeque::new(),
            bookmark,
            ended: false,
        })
    }
}

impl Tail {
    /// What comes next; `None` after the end.
    pub async fn next(&mut self) -> Option<Told> {
        if self.ended {
            return None;
        }
        Some(self.step().await.unwrap_or_else(|refusal| {
            self.ended = true;
            Told::End(refusal)
        }))
    }

    async fn step(&mut self) -> Result<Told, Refusal> {
        let closing = self.audit.ledger.closing();
        loop {
            if let Some(entry) = self.waiting.pop_front() {
                return Ok(Told::Entry(Box::new(entry)));
            }
            let head = *self.news.borrow_and_update();
            if self.read < head {
                self.look(head).await?;
                continue;
            }
            tokio::select! {
                biased;
                () = closing.cancelled() => {
                    return Err(Refusal::unavailable("the daemon is stopping; go on with `Last-Event-ID`"));
                }
                _ = self.bookmark.tick() => {
                    self.audit.ledger.permit(&self.caller, &[Ask::new("audit:read", "Entry", "")]).await?;
                    return Ok(Told::Bookmark(self.read));
                }
                heard = self.news.changed() => {
                    heard.map_err(|_| Refusal::unavailable("the daemon is stopping"))?;
                }
            }
        }
    }

    async fn look(&mut self, head: i64) -> Result<(), Refusal> {
        let mut conn = self.audit.connection().await?;
        let most = PAGE.min(head - self.read);
        let found = store::unindexed(&mut conn, self.read, most).await;
        let found = found.map_err(|e| self.audit.store.refusal(e))?;
        self.read = found.last().map_or(self.read + most, |e| e.index);
        let fits = |e: &Stored| self.filter.fits(&e.found()) && self.filter.says(e.details.as_deref());
        self.waiting.extend(found.into_iter().filter(|e| fits(e)));
        Ok(())
    }
}
