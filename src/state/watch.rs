//! Watches: one watcher's way from history into the present, without loss or repeats.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::kernel::Refusal;
use crate::kernel::supervisor::Stop;
use crate::kernel::web::{Ask, Caller};

use super::hub::{Group, Seat, Selection};
use super::span::shown;
use super::store::history;
use super::{State, compacted};

/// Changes read from history at a time.
const PAGE: i64 = 1000;
/// Indexes looked through at a time: no statement takes long, however little of what it passes fits.
const WINDOW: i64 = 50_000;
/// How often a watcher hears that all up to an index was sent, and its permission is looked at again.
const BOOKMARK: Duration = Duration::from_secs(5);
/// Changes in an answer to a watcher that polls, at least, if there are so many.
const POLLED: usize = 1000;

/// What a watcher hears.
pub(super) enum Event {
    /// Changes of one index.
    Changes(Group),
    /// All up to this index was sent.
    Bookmark(i64),
    /// The watch ends here, and why.
    End(Refusal),
}

/// One watcher.
pub(super) struct Watch {
    state: State,
    caller: Caller,
    asks: Vec<Ask>,
    selection: Selection,
    /// All up to here was sent.
    sent: i64,
    seat: Seat,
    backlog: VecDeque<Group>,
    /// Its first tick is at once: a watcher hears where it stands before anything happens.
    bookmark: Interval,
    closing: Stop,
    ended: bool,
}

fn asks(selection: &Selection) -> Vec<Ask> {
    let names = selection.keys.iter().chain(&selection.prefixes);
    names.map(|name| Ask::new("state:watch", "Key", shown(name))).collect()
}

impl State {
    /// Watches keys, from the index after `after`, or from now.
    ///
    /// # Errors
    /// 410 when what comes after `after` was compacted, 504 when `after` lies ahead and is not reached in time.
    pub(super) async fn watch(
        &self,
        caller: &Caller,
        selection: Selection,
        after: Option<i64>,
        wait: Duration,
    ) -> Result<Watch, Refusal> {
        let asks = asks(&selection);
        self.ledger.permit(caller, &asks).await?;
        if let Some(after) = after {
            self.ledger.reach(after, wait).await?;
        }
        let seat = self.hub.join(selection.clone());
        let sent = after.unwrap_or(seat.joined);
        if after.is_some() {
            let mut conn = self.connection().await?;
            let mark = history::mark(&mut conn).await.map_err(|e| self.store.refusal(e))?;
            if sent < mark {
                return Err(compacted(mark));
            }
        }
        let mut bookmark = interval(BOOKMARK);
        bookmark.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.metrics.count("watch");
        self.metrics.watchers.inc();
        Ok(Watch {
            state: self.clone(),
            caller: caller.clone(),
            asks,
            selection,
            sent,
            seat,
            backlog: VecDeque::new(),
            bookmark,
            closing: self.ledger.closing(),
            ended: false,
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.state.metrics.watchers.dec();
    }
}

impl Watch {
    /// Every change after this index comes as it is made.
    pub fn joined(&self) -> i64 {
        self.seat.joined
    }

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

    /// Waits for changes, for so long at most; all up to the index was then given.
    pub async fn poll(mut self, wait: Duration) -> Result<(i64, Vec<Group>), Refusal> {
        let until = tokio::time::sleep(wait);
        tokio::pin!(until);
        let mut groups: Vec<Group> = Vec::new();
        loop {
            // What there was when it was asked is told, however short the wait; only then is there nothing.
            let caught_up = self.sent >= self.seat.joined;
            let event = tokio::select! {
                biased;
                event = self.next() => event,
                () = &mut until, if caught_up => return Ok((self.sent, groups)),
            };
            match event {
                Some(Event::Changes(group)) => groups.push(group),
                Some(Event::Bookmark(_)) | None => {}
                Some(Event::End(refusal)) if groups.is_empty() => return Err(refusal),
                Some(Event::End(_)) => return Ok((self.sent, groups)),
            }
            // What is at hand goes along.
            let some = groups.iter().map(Vec::len).sum::<usize>();
            if some >= POLLED || some > 0 && self.backlog.is_empty() && self.sent >= self.seat.joined {
                return Ok((self.sent, groups));
            }
        }
    }

    async fn step(&mut self) -> Result<Event, Refusal> {
        loop {
            if let Some(changes) = self.backlog.pop_front() {
                self.sent = changes.last().map_or(self.sent, |c| c.item.index);
                return Ok(Event::Changes(changes));
            }
            if self.sent < self.seat.joined {
                // In boxes of their own, this and what is asked at a bookmark: ten thousand who only wait pay for neither.
                Box::pin(self.read_history()).await?;
                continue;
            }
            // Read before the box is looked into: everything up to it is in the box already.
            let reflected = self.state.ledger.index();
            tokio::select! {
                biased;
                () = self.closing.cancelled() => {
                    return Err(Refusal::unavailable("the daemon is stopping; resume with `after`"));
                }
                heard = self.seat.next() => {
                    let changes = heard.inspect_err(|_| self.state.metrics.cut.inc())?;
                    let index = changes.last().map_or(0, |c| c.item.index);
                    if index > self.sent {
                        self.sent = index;
                        return Ok(Event::Changes(changes));
                    }
                }
                _ = self.bookmark.tick() => {
                    Box::pin(self.state.ledger.permit(&self.caller, &self.asks)).await?;
                    self.sent = self.sent.max(reflected);
                    return Ok(Event::Bookmark(self.sent));
                }
            }
        }
    }

    /// Reads on from history; what is left of the last index of a page is read with the next.
    async fn read_history(&mut self) -> Result<(), Refusal> {
        let refusal = |e| self.state.store.refusal(e);
        let mut conn = self.state.connection().await?;
        let to = self.seat.joined.min(self.sent + WINDOW);
        let (selection, sent) = (&self.selection, self.sent);
        let (mut mark, mut changes) = history::changes(&mut conn, selection, sent, to, PAGE).await.map_err(refusal)?;
        let full = changes.len() as i64 == PAGE;
        if full && let (Some(first), Some(last)) = (changes.first(), changes.last()) {
            let (first, last) = (first.item.index, last.item.index);
            if first == last {
                (mark, changes) =
                    history::changes(&mut conn, selection, sent, first, i64::MAX).await.map_err(refusal)?;
            } else {
                changes.retain(|c| c.item.index < last);
            }
        }
        if sent < mark {
            return Err(compacted(mark));
        }
        let read = if full { changes.last().map_or(to, |c| c.item.index) } else { to };
        let changes: Vec<_> = changes.into_iter().map(Arc::new).collect();
        self.backlog.extend(changes.chunk_by(|a, b| a.item.index == b.item.index).map(<[_]>::to_vec));
        if self.backlog.is_empty() {
            self.sent = read;
        }
        Ok(())
    }
}
