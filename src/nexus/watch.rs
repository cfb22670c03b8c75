//! Watches of a service: what happened to its instances, from an index on, without loss or repeats.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::kernel::Refusal;
use crate::kernel::web::{Ask, Caller};

use super::Nexus;
use super::store::services as rows;

/// How often a watcher hears that all up to an index was sent, and its permission is looked at again.
const BOOKMARK: Duration = Duration::from_secs(5);
/// Changes read at a time. More than one entry ever makes.
const PAGE: i64 = 1000;

/// What a watcher hears.
pub(super) enum Event {
    /// Something happened to an instance: index, what, the instance as JSON.
    Change(i64, String, String),
    /// All up to this index was sent.
    Bookmark(i64),
    /// The watch ends here, and why.
    End(Refusal),
}

/// One watcher.
pub(super) struct Watch {
    nexus: Nexus,
    caller: Caller,
    service: String,
    /// All up to here was sent.
    sent: i64,
    news: watch::Receiver<i64>,
    backlog: VecDeque<(i64, String, String)>,
    /// Its first tick is at once: a watcher hears where it stands before anything happens.
    bookmark: Interval,
    /// Whether there may be rows that were not read.
    look: bool,
    ended: bool,
}

impl Nexus {
    /// Watches a service from the index after `after`, or from now.
    pub(super) async fn watch(
        &self,
        caller: &Caller,
        service: String,
        after: Option<i64>,
        wait: Duration,
    ) -> Result<Watch, Refusal> {
        self.ledger.permit(caller, &[Ask::new("nexus:service-read", "Service", service.clone())]).await?;
        if let Some(after) = after {
            self.ledger.reach(after, wait).await?;
        }
        let news = self.board.service(&service);
        let sent = after.unwrap_or_else(|| self.ledger.index());
        let mut bookmark = interval(BOOKMARK);
        bookmark.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.metrics.watchers.inc();
        Ok(Watch {
            nexus: self.clone(),
            caller: caller.clone(),
            service,
            sent,
            news,
            backlog: VecDeque::new(),
            bookmark,
            look: true,
            ended: false,
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.nexus.metrics.watchers.dec();
    }
}

impl Watch {
    /// What comes next; `None` after the end.
    pub async fn next(&mut self) -> Option<Event> {
        if self.ended {
            return None;
        }
        match self.step().await {
            Ok(event) => Some(event),
            Err(refusal) => {
                self.ended = true;
                Some(Event::End(refusal))
            }
        }
    }

    async fn step(&mut self) -> Result<Event, Refusal> {
        let closing = self.nexus.ledger.closing();
        loop {
            if let Some((index, event, instance)) = self.backlog.pop_front() {
                self.sent = index;
                return Ok(Event::Change(index, event, instance));
            }
            if self.look {
                self.news.mark_unchanged();
                let mut conn = self.nexus.connection().await?;
                let found = rows::changes(&mut conn, &self.service, self.sent, PAGE).await;
                let found = found.map_err(|e| self.nexus.store.refusal(e))?;
                self.look = found.len() as i64 == PAGE;
                let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap_or_default();
                self.backlog.extend(found.into_iter().map(|(i, e, instance)| (i, e, text(instance))));
                if !self.backlog.is_empty() {
                    continue;
                }
            }
            // Read before news are waited for: what came up to it has been told to the board.
            let reflected = self.nexus.ledger.index();
            tokio::select! {
                biased;
                () = closing.cancelled() => {
                    return Err(Refusal::unavailable("the daemon is stopping; resume with `after`"));
                }
                heard = self.news.changed() => {
                    heard.map_err(|_| Refusal::unavailable("the daemon is stopping"))?;
                    self.look = true;
                }
                _ = self.bookmark.tick() => {
                    let ask = Ask::new("nexus:service-read", "Service", self.service.clone());
                    self.nexus.ledger.permit(&self.caller, &[ask]).await?;
                    self.sent = self.sent.max(reflected);
                    return Ok(Event::Bookmark(self.sent));
                }
            }
        }
    }
}
