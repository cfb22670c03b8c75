//! Watches: the hub that the follower feeds, and one watcher's way from history into the present without loss or repeats.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sqlx::PgConnection;
use tokio::sync::mpsc;
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::kernel::supervisor::Stop;
use crate::kernel::web::{Ask, Caller};
use crate::kernel::{BoxFuture, Refusal, problem};
use crate::ledger::{Projection, Touched};

use super::model::Change;
use super::recent::Recent;
use super::{State, kv, store};

/// Groups of changes a watcher may be behind before it is cut off. It resumes where it was.
const BEHIND_MOST: usize = 4096;
/// Changes read from history at a time.
const PAGE: i64 = 1000;
/// How often a watcher hears that all up to an index was sent, and its permission is looked at again.
const BOOKMARK: Duration = Duration::from_secs(5);

/// Where the follower tells of changes, and watchers join.
#[derive(Default)]
pub struct Hub {
    inner: Mutex<Inner>,
    /// What was read lately, kept true by the same news.
    pub(super) recent: Recent,
}

#[derive(Default)]
struct Inner {
    /// All changes up to here were told.
    at: i64,
    watchers: Vec<Watcher>,
}

struct Watcher {
    prefix: Vec<u8>,
    tell: mpsc::Sender<Vec<Change>>,
}

impl Hub {
    /// With no watchers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Joins: every change after the returned index comes through the channel, in order, those of one index together.
    fn join(&self, prefix: &[u8]) -> (i64, mpsc::Receiver<Vec<Change>>) {
        let (tell, hear) = mpsc::channel(BEHIND_MOST);
        let mut inner = self.lock();
        inner.watchers.push(Watcher { prefix: prefix.to_vec(), tell });
        (inner.at, hear)
    }

    /// How many watch.
    #[must_use]
    pub fn watchers(&self) -> usize {
        self.lock().watchers.iter().filter(|w| !w.tell.is_closed()).count()
    }

    fn tell(&self, changes: Vec<Change>, to: i64) {
        let mut inner = self.lock();
        for group in changes.chunk_by(|a, b| a.item.index == b.item.index) {
            // A watcher whose channel is full or closed is dropped; a live one sees its channel end and says so.
            inner.watchers.retain(|w| {
                let mine: Vec<Change> = group.iter().filter(|c| c.item.key.starts_with(&w.prefix)).cloned().collect();
                mine.is_empty() || w.tell.try_send(mine).is_ok()
            });
        }
        inner.at = inner.at.max(to);
    }
}

impl Projection for Hub {
    fn name(&self) -> &'static str {
        "state/watch"
    }

    fn kinds(&self) -> &'static [&'static str] {
        &[kv::KEY]
    }

    fn load<'a>(&'a self, _: &'a mut PgConnection, at: i64) -> BoxFuture<'a, Result<(), sqlx::Error>> {
        self.lock().at = at;
        Box::pin(async { Ok(()) })
    }

    fn advance<'a>(
        &'a self,
        conn: &'a mut PgConnection,
        after: i64,
        to: i64,
        touched: &'a [(i64, Touched)],
    ) -> BoxFuture<'a, Result<(), sqlx::Error>> {
        self.recent.changed(touched);
        Box::pin(async move {
            let watched = {
                let mut inner = self.lock();
                inner.watchers.retain(|w| !w.tell.is_closed());
                if inner.watchers.is_empty() {
                    // Nobody to tell. Said under the lock: who joins after this reads history up to `to` for itself.
                    inner.at = inner.at.max(to);
                    false
                } else {
                    // An advance that is repeated after an error tells only what was not told.
                    inner.at < to
                }
            };
            if watched {
                let from = self.lock().at.max(after);
                self.tell(store::history::changes(conn, from, to, i64::MAX).await?.1, to);
            }
            Ok(())
        })
    }
}

/// What a watcher hears.
#[derive(Debug)]
pub enum Event {
    /// Changes of one index.
    Changes(Vec<Change>),
    /// All up to this index was sent.
    Bookmark(i64),
    /// The watch ends here, and why.
    End(Refusal),
}

/// One watcher.
pub struct Watch {
    state: State,
    caller: Caller,
    prefix: String,
    /// All up to here was sent.
    sent: i64,
    /// Up to here history is read; from here on the channel tells.
    joined: i64,
    hear: mpsc::Receiver<Vec<Change>>,
    backlog: VecDeque<Vec<Change>>,
    /// Its first tick is at once: a watcher hears where it stands before anything happens.
    bookmark: Interval,
    closing: Stop,
    ended: bool,
}

impl State {
    /// Watches the keys under a prefix, from the index after `after`, or from now.
    ///
    /// # Errors
    /// 410 when what comes after `after` was compacted, 504 when `after` lies ahead and is not reached in time.
    pub async fn watch(
        &self,
        caller: &Caller,
        prefix: String,
        after: Option<i64>,
        wait: Duration,
    ) -> Result<Watch, Refusal> {
        self.ledger.permit(caller, &[Ask::new("state:watch", "Key", prefix.clone())]).await?;
        if let Some(after) = after {
            self.ledger.reach(after, wait).await?;
        }
        let (joined, hear) = self.hub.join(prefix.as_bytes());
        let sent = after.unwrap_or(joined);
        let mut conn = self.connection().await?;
        let mark = store::history::mark(&mut conn).await.map_err(|e| self.store.refusal(e))?;
        if after.is_some_and(|a| a < mark) {
            return Err(Refusal::new(&problem::COMPACTED, format!("changes before index {mark} were compacted")));
        }
        let mut bookmark = interval(BOOKMARK);
        bookmark.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.metrics.count("watch");
        self.metrics.watchers.inc();
        Ok(Watch {
            state: self.clone(),
            caller: caller.clone(),
            prefix,
            sent,
            joined,
            hear,
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
        loop {
            if let Some(changes) = self.backlog.pop_front() {
                self.sent = changes.last().map_or(self.sent, |c| c.item.index);
                return Ok(Event::Changes(changes));
            }
            if self.sent < self.joined {
                self.read_history().await?;
                continue;
            }
            // Read before the channel is looked into: everything up to it is in the channel already.
            let reflected = self.state.ledger.index();
            tokio::select! {
                biased;
                () = self.closing.cancelled() => {
                    return Err(Refusal::unavailable("the daemon is stopping; resume with `after`"));
                }
                heard = self.hear.recv() => match heard {
                    Some(changes) => {
                        let index = changes.last().map_or(0, |c| c.item.index);
                        if index > self.sent {
                            self.sent = index;
                            return Ok(Event::Changes(changes));
                        }
                    }
                    None => return Err(Refusal::unavailable("the watcher did not keep up and was cut off; resume with `after`")),
                },
                _ = self.bookmark.tick() => {
                    self.state.ledger.permit(&self.caller, &[Ask::new("state:watch", "Key", self.prefix.clone())]).await?;
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
        let (mut mark, mut changes) =
            store::history::changes(&mut conn, self.sent, self.joined, PAGE).await.map_err(refusal)?;
        let full = changes.len() as i64 == PAGE;
        if full && let (Some(first), Some(last)) = (changes.first(), changes.last()) {
            let (first, last) = (first.item.index, last.item.index);
            if first == last {
                (mark, changes) =
                    store::history::changes(&mut conn, self.sent, first, i64::MAX).await.map_err(refusal)?;
            } else {
                changes.retain(|c| c.item.index < last);
            }
        }
        let read = if full { changes.last().map_or(self.joined, |c| c.item.index) } else { self.joined };
        if self.sent < mark {
            return Err(Refusal::new(&problem::COMPACTED, format!("changes before index {mark} were compacted")));
        }
        for group in changes.chunk_by(|a, b| a.item.index == b.item.index) {
            let mine: Vec<Change> =
                group.iter().filter(|c| c.item.key.starts_with(self.prefix.as_bytes())).cloned().collect();
            if !mine.is_empty() {
                self.backlog.push_back(mine);
            }
        }
        if self.backlog.is_empty() {
            self.sent = read;
        }
        Ok(())
    }
}
