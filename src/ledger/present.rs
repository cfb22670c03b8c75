//! Which facts of a kind there may be: so that what is certainly new need not be looked up before it is decided.
//!
//! A Bloom filter over the keys of one kind. It is gathered from a place in the record on (every key that an entry touches, ours
//! or of others), and at the same time filled with all keys that the table has; once those are in, a key that it lacks is at the
//! writer's place not there. A key that was deleted stays in it, and is looked up in vain.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus::IntCounter;
use sqlx::PgConnection;
use tokio::sync::Notify;

use crate::kernel::supervisor::{Stop, TaskError};
use crate::store::Store;

use super::hot::Hot;
use super::touch::{Touch, What};

/// Lines of 512 bits: 2 MiB.
const LINES: u64 = 1 << 15;
/// Bits set for a key.
const SET: u32 = 4;
/// Keys taken in before it is gathered anew; of so many it passes every sixth in vain. A table with half as many has no filter.
const MOST: u64 = 4_000_000;

/// What the processor fetches at once. All bits of a key are in one line: spread over the filter they would be as many fetches,
/// which was a quarter of the writer's time with transactions of eight keys.
#[derive(Default)]
#[repr(align(64))]
struct Line([AtomicU64; 8]);

/// The filter.
pub(super) struct Present {
    kind: &'static dyn Hot,
    hasher: RandomState,
    lines: Box<[Line]>,
    /// Keys that were new to it.
    taken: AtomicU64,
    /// How often it was begun, and the one of those that has all keys of the table.
    begun: AtomicU64,
    whole: AtomicU64,
    bell: Notify,
    spared: IntCounter,
}

impl Present {
    /// Of the keys of a kind; what it spares is counted.
    pub fn new(kind: &'static dyn Hot, spared: IntCounter) -> Self {
        Self {
            kind,
            hasher: RandomState::new(),
            lines: (0..LINES).map(|_| Line::default()).collect(),
            taken: AtomicU64::new(0),
            begun: AtomicU64::new(0),
            whole: AtomicU64::new(0),
            bell: Notify::new(),
            spared,
        }
    }

    /// Begins anew: the writer is at a place of which nothing is known here.
    pub fn begin(&self) {
        self.lines.iter().flat_map(|line| &line.0).for_each(|word| word.store(0, Ordering::Relaxed));
        self.taken.store(0, Ordering::Relaxed);
        // After it is empty: who fills it from now on must not be emptied out. Only the writer begins and asks.
        self.begun.fetch_add(1, Ordering::SeqCst);
        self.bell.notify_one();
    }

    fn bits(&self, key: &[u8]) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let hash = self.hasher.hash_one(key);
        // The low 36 bits of the hash say which bits of the line, the others which line.
        let line = &self.lines[usize::try_from((hash >> 36) % LINES).unwrap_or_default()];
        (0..SET).map(move |i| {
            let bit = hash >> (9 * i) & 511;
            (&line.0[usize::try_from(bit / 64).unwrap_or_default()], 1 << (bit % 64))
        })
    }

    fn add(&self, key: &[u8]) {
        let new = self.bits(key).fold(false, |new, (word, bit)| {
            // Most are there: what is only read stays in the caches of both.
            let had = word.load(Ordering::Relaxed) & bit != 0 || word.fetch_or(bit, Ordering::Relaxed) & bit != 0;
            new | !had
        });
        if new {
            self.taken.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A fact may be there.
    fn there(&self, kind: &str, key: &[u8]) {
        if kind == self.kind.name() {
            self.add(key);
        }
        if self.taken.load(Ordering::Relaxed) > MOST {
            self.begin();
        }
    }

    /// An entry changed something. What is touched together with others does not come into being by it ([`Hot::every`]).
    pub fn touched(&self, touched: &Touch) {
        if let What::Key(key) = &touched.what {
            self.there(&touched.kind, key);
        }
    }

    /// How often it was begun: what was taken in before the last time may be in it no more.
    pub fn begun(&self) -> u64 {
        self.begun.load(Ordering::SeqCst)
    }

    /// As if all keys of the table were in it.
    #[cfg(test)]
    pub fn filled(&self) {
        self.whole.store(self.begun(), Ordering::SeqCst);
    }

    /// Whether a fact is certainly not there, at the writer's place.
    pub fn lacks(&self, kind: &str, key: &[u8]) -> bool {
        let lacks = kind == self.kind.name()
            && self.whole.load(Ordering::SeqCst) == self.begun.load(Ordering::SeqCst)
            && self.bits(key).any(|(word, bit)| word.load(Ordering::Relaxed) & bit == 0);
        self.spared.inc_by(u64::from(lacks));
        lacks
    }

    /// Takes in what the table has, whenever it was begun anew.
    ///
    /// What comes into being meanwhile is not missed: the writer takes in whatever is written after its place, and the table is
    /// read after that. What another daemon writes and the writer has not seen yet is behind its place: what it decides then
    /// finds the head moved.
    pub async fn run(&self, store: &Store, stop: &Stop) -> Result<(), TaskError> {
        loop {
            let begun = self.begun.load(Ordering::SeqCst);
            if begun != self.whole.load(Ordering::SeqCst) {
                let mut conn = store.background("present").await?;
                if self.fill(&mut conn, begun, stop).await? {
                    self.whole.store(begun, Ordering::SeqCst);
                }
            }
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = self.bell.notified() => {}
            }
        }
    }

    /// `false` if there are too many, or it was begun anew.
    async fn fill(&self, conn: &mut PgConnection, begun: u64, stop: &Stop) -> Result<bool, TaskError> {
        let (mut last, mut all): (Option<Vec<u8>>, u64) = (None, 0);
        loop {
            let page = self.kind.every(conn, last.as_deref()).await?;
            let Some(end) = page.last() else { return Ok(true) };
            page.iter().for_each(|key| self.add(key));
            all += page.len() as u64;
            if all > MOST / 2 || self.begun.load(Ordering::SeqCst) != begun || stop.is_cancelled() {
                return Ok(false);
            }
            last = Some(end.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::hot::ENTRIES;
    use super::*;

    const KIND: &str = "entry";

    fn empty() -> Present {
        Present::new(&ENTRIES, IntCounter::new("spared", "in this test").unwrap())
    }

    fn whole() -> Present {
        let present = empty();
        present.begin();
        present.filled();
        present
    }

    fn key(n: u64) -> Vec<u8> {
        format!("bench/{n}").into_bytes()
    }

    #[test]
    fn what_is_there_is_never_lacked_and_what_is_not_mostly() {
        let present = whole();
        (0..100_000).for_each(|n| present.there(KIND, &key(n)));
        assert!((0..100_000).all(|n| !present.lacks(KIND, &key(n))));
        let lacked = (100_000..200_000).filter(|n| present.lacks(KIND, &key(*n))).count();
        assert!(lacked > 99_900, "{lacked}");
        assert!(!present.lacks("other", &key(100_000)), "of other kinds nothing is known");
    }

    #[test]
    fn it_lacks_nothing_until_it_is_whole() {
        let present = empty();
        present.begin();
        assert!(!present.lacks(KIND, b"k"));
        present.filled();
        assert!(present.lacks(KIND, b"k"));
        present.touched(&Touch::key(KIND, "k"));
        assert!(!present.lacks(KIND, b"k"), "another daemon may have made it");
        present.begin();
        assert!(!present.lacks(KIND, b"j"), "begun anew");
    }

    #[test]
    fn too_many_begin_it_anew() {
        let present = whole();
        present.taken.store(MOST, Ordering::Relaxed);
        present.there(KIND, b"k");
        assert_eq!((present.begun.load(Ordering::SeqCst), present.taken.load(Ordering::Relaxed)), (2, 0));
        assert!(!present.lacks(KIND, b"j"));
    }
}
