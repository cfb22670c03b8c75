//! The hub: what the follower tells of changes, sorted to those who watch them.
//!
//! Watchers stand under the keys and prefixes they named, so that a change finds them by its key: however many watch something
//! else, it costs nothing. Each has a box of its own that holds so much and no more; one that lets it fill is cut off.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sqlx::PgConnection;
use tokio::sync::Notify;

use crate::kernel::{BoxFuture, Refusal};
use crate::ledger::{Projection, Touch, What};

use super::board::Board;
use super::locks::{LOCK, TURN};
use super::model::Change;
use super::recent::Recent;
use super::{kv, store};

/// Groups of changes a watcher may be behind before it is cut off. It resumes where it was.
const BEHIND_MOST: usize = 4096;
/// The same in bytes; a single group may have more.
const BEHIND_BYTES: usize = 8 * 1024 * 1024;

/// Changes of one index that a watcher wants.
pub(super) type Group = Vec<Arc<Change>>;

/// What a watcher wants to hear of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Selection {
    pub keys: Vec<Vec<u8>>,
    pub prefixes: Vec<Vec<u8>>,
}

/// Where the follower tells of changes, and watchers join.
#[derive(Default)]
pub struct Hub {
    inner: Mutex<Inner>,
    /// What was read lately, kept true by the same news.
    pub(super) recent: Recent,
    /// Who waits for locks.
    pub(super) locks: Board,
}

#[derive(Default)]
struct Inner {
    /// Who joins hears of changes after this index; up to it they are in history.
    at: i64,
    /// All changes up to here were told to whoever wants them.
    told: i64,
    next: u64,
    watchers: HashMap<u64, Watcher>,
    keys: HashMap<Vec<u8>, Vec<u64>>,
    prefixes: HashMap<Vec<u8>, Vec<u64>>,
    /// How many prefixes there are of each length.
    lengths: BTreeMap<usize, usize>,
}

struct Watcher {
    selection: Selection,
    mail: Arc<Mail>,
}

/// A watcher's box.
#[derive(Default)]
struct Mail {
    held: Mutex<Held>,
    news: Notify,
}

#[derive(Default)]
struct Held {
    groups: VecDeque<Group>,
    bytes: usize,
    cut: Option<Refusal>,
}

fn weight(group: &Group) -> usize {
    group.iter().map(|c| c.item.key.len() + c.item.value.len() + c.item.content_type.len() + 128).sum()
}

impl Mail {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it was taken in.
    fn put(&self, group: Group) -> bool {
        let bytes = weight(&group);
        let mut held = self.lock();
        let full = held.groups.len() >= BEHIND_MOST || held.bytes + bytes > BEHIND_BYTES;
        if full && !held.groups.is_empty() {
            drop(held);
            self.cut(Refusal::unavailable(
                "the watcher did not keep up and was cut off; resume with `after`, from the last id it has",
            ));
            return false;
        }
        held.bytes += bytes;
        held.groups.push_back(group);
        drop(held);
        self.news.notify_one();
        true
    }

    /// What it holds is given up at once: whoever does not read must not cost memory.
    fn cut(&self, why: Refusal) {
        let mut held = self.lock();
        held.groups = VecDeque::new();
        held.cut = Some(why);
        drop(held);
        self.news.notify_one();
    }
}

/// A watcher's place in the hub; it leaves when this is dropped.
pub(super) struct Seat {
    hub: Arc<Hub>,
    id: u64,
    mail: Arc<Mail>,
    /// Every change after this index comes through the box.
    pub joined: i64,
}

impl Seat {
    /// The next group.
    ///
    /// # Errors
    /// Why the watcher was cut off.
    pub async fn next(&self) -> Result<Group, Refusal> {
        loop {
            let news = self.mail.news.notified();
            {
                let mut held = self.mail.lock();
                if let Some(why) = &held.cut {
                    return Err(why.clone());
                }
                if let Some(group) = held.groups.pop_front() {
                    held.bytes -= weight(&group);
                    return Ok(group);
                }
            }
            news.await;
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.hub.lock().leave(self.id);
    }
}

impl Inner {
    fn leave(&mut self, id: u64) {
        let Some(watcher) = self.watchers.remove(&id) else { return };
        for key in &watcher.selection.keys {
            forget(&mut self.keys, key, id);
        }
        for prefix in &watcher.selection.prefixes {
            if forget(&mut self.prefixes, prefix, id)
                && let Some(n) = self.lengths.get_mut(&prefix.len())
            {
                *n -= 1;
                if *n == 0 {
                    self.lengths.remove(&prefix.len());
                }
            }
        }
    }

    /// Who wants to hear of a key; whoever named it twice comes twice.
    fn of<'a>(&'a self, key: &'a [u8]) -> impl Iterator<Item = u64> + 'a {
        let by_prefix = self.lengths.range(..=key.len()).filter_map(|(n, _)| self.prefixes.get(&key[..*n]));
        self.keys.get(key).into_iter().chain(by_prefix).flatten().copied()
    }

    /// Whether somebody may want to hear of what was touched.
    fn wanted(&self, touched: &Touch) -> bool {
        match &touched.what {
            What::Key(key) => self.of(key).next().is_some(),
            What::Prefix(_) | What::All => !self.watchers.is_empty(),
        }
    }
}

/// Takes an id off a list; whether it was the last.
fn forget(lists: &mut HashMap<Vec<u8>, Vec<u64>>, name: &[u8], id: u64) -> bool {
    let Some(list) = lists.get_mut(name) else { return false };
    list.retain(|other| *other != id);
    let last = list.is_empty();
    if last {
        lists.remove(name);
    }
    last
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

    /// Joins: every change after the seat's index comes through it, in order, those of one index together.
    pub(super) fn join(self: &Arc<Self>, selection: Selection) -> Seat {
        let mail = Arc::new(Mail::default());
        let mut inner = self.lock();
        let id = inner.next;
        inner.next += 1;
        for key in &selection.keys {
            inner.keys.entry(key.clone()).or_default().push(id);
        }
        for prefix in &selection.prefixes {
            let list = inner.prefixes.entry(prefix.clone()).or_default();
            list.push(id);
            if list.len() == 1 {
                *inner.lengths.entry(prefix.len()).or_default() += 1;
            }
        }
        inner.watchers.insert(id, Watcher { selection, mail: mail.clone() });
        Seat { hub: self.clone(), id, mail, joined: inner.at }
    }

    fn tell(&self, changes: Vec<Change>, to: i64) {
        let changes: Vec<Arc<Change>> = changes.into_iter().map(Arc::new).collect();
        let mut inner = self.lock();
        for group in changes.chunk_by(|a, b| a.item.index == b.item.index) {
            let mut told: HashMap<u64, Group> = HashMap::new();
            for change in group {
                for id in inner.of(&change.item.key) {
                    let mine = told.entry(id).or_default();
                    if !mine.last().is_some_and(|last| Arc::ptr_eq(last, change)) {
                        mine.push(change.clone());
                    }
                }
            }
            for (id, mine) in told {
                // One that is full is out; it finds its box cut.
                if inner.watchers.get(&id).is_some_and(|w| !w.mail.put(mine)) {
                    inner.leave(id);
                }
            }
        }
        inner.at = inner.at.max(to);
        inner.told = inner.told.max(to);
    }

    /// What was to be told is not in history any more: whoever watches must begin anew.
    fn cut_all(&self, why: &Refusal) {
        let mut inner = self.lock();
        for id in inner.watchers.keys().copied().collect::<Vec<_>>() {
            if let Some(w) = inner.watchers.get(&id) {
                w.mail.cut(why.clone());
            }
            inner.leave(id);
        }
    }
}

impl Projection for Hub {
    fn name(&self) -> &'static str {
        "state/watch"
    }

    fn kinds(&self) -> &'static [&'static str] {
        &[kv::KEY, LOCK, TURN]
    }

    fn load<'a>(&'a self, _: &'a mut PgConnection, at: i64) -> BoxFuture<'a, Result<(), sqlx::Error>> {
        let mut inner = self.lock();
        (inner.at, inner.told) = (at, at);
        drop(inner);
        Box::pin(async { Ok(()) })
    }

    fn advance<'a>(
        &'a self,
        conn: &'a mut PgConnection,
        after: i64,
        to: i64,
        touched: &'a [(i64, Touch)],
    ) -> BoxFuture<'a, Result<(), sqlx::Error>> {
        self.recent.changed(touched);
        self.locks.changed(touched);
        Box::pin(async move {
            let (wanted, from) = {
                let mut inner = self.lock();
                // An advance that is repeated after an error tells only what was not told.
                let from = inner.told.max(after);
                let fits = |(index, t): &&(i64, Touch)| *index > from && t.kind == kv::KEY && inner.wanted(t);
                let mut wanted: Vec<i64> = touched.iter().filter(fits).map(|(index, _)| *index).collect();
                wanted.dedup();
                // Said under the lock: who joins after this reads history up to `to` for itself, be it wanted or not.
                inner.at = inner.at.max(to);
                (wanted, from)
            };
            if !wanted.is_empty() {
                let (mark, changes) = store::history::changes_at(conn, &wanted).await?;
                if mark > from {
                    self.cut_all(&super::compacted(mark));
                }
                self.tell(changes, to);
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(key: &str, index: i64, size: usize) -> Change {
        let mut change = Change::deletion(key.into(), index, index, 0);
        change.item.value = vec![0; size];
        change
    }

    fn selection(keys: &[&str], prefixes: &[&str]) -> Selection {
        let bytes = |all: &[&str]| all.iter().map(|s| s.as_bytes().to_vec()).collect();
        Selection { keys: bytes(keys), prefixes: bytes(prefixes) }
    }

    async fn heard(seat: &Seat) -> Vec<String> {
        let group = seat.next().await.unwrap();
        group.iter().map(|c| String::from_utf8(c.item.key.clone()).unwrap()).collect()
    }

    #[tokio::test]
    async fn each_hears_what_it_named_once_and_nothing_else() {
        let hub = Arc::new(Hub::new());
        let all = hub.join(selection(&[], &[""]));
        let some = hub.join(selection(&["a/1", "b"], &["a/", "a/1"]));
        let none = hub.join(selection(&["a"], &["a/2/"]));
        hub.tell(vec![change("a/1", 1, 0), change("a/2", 1, 0), change("c", 1, 0), change("b", 2, 0)], 2);
        assert_eq!(heard(&all).await, ["a/1", "a/2", "c"]);
        assert_eq!(heard(&all).await, ["b"]);
        assert_eq!(heard(&some).await, ["a/1", "a/2"], "those of one index together");
        assert_eq!(heard(&some).await, ["b"]);
        assert!(none.mail.lock().groups.is_empty());
        drop((all, some, none));
        let inner = hub.lock();
        assert!(inner.watchers.is_empty() && inner.keys.is_empty() && inner.prefixes.is_empty());
        assert!(inner.lengths.is_empty() && inner.at == 2);
    }

    #[tokio::test]
    async fn whoever_does_not_keep_up_is_cut_off_and_holds_nothing() {
        let hub = Arc::new(Hub::new());
        let slow = hub.join(selection(&[], &["a"]));
        for index in 1..=10 {
            hub.tell(vec![change("a", index, 1024 * 1024)], index);
        }
        assert!(slow.mail.lock().groups.is_empty() && hub.lock().watchers.is_empty());
        assert!(slow.next().await.unwrap_err().detail().contains("did not keep up"));
        let large = hub.join(selection(&[], &["a"]));
        hub.tell(vec![change("a", 11, 2 * BEHIND_BYTES)], 11);
        assert_eq!(heard(&large).await, ["a"], "one group may have any size");
        for index in 12..=12 + BEHIND_MOST as i64 {
            hub.tell(vec![change("a", index, 0)], index);
        }
        assert!(large.next().await.is_err());
    }
}
