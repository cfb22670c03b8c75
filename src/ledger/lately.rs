//! Entries that this daemon's writer wrote lately, for who derives something from all of them: what is at hand need not be read.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::Ledger;
use super::entry::Sealed;

/// Bytes held at most.
const HELD: usize = 8 * 1024 * 1024;

/// An entry as it was written.
pub struct Whole {
    /// Its index.
    pub index: i64,
    /// The exact bytes of the leaf.
    pub leaf: Vec<u8>,
    /// Canonical JSON.
    pub details: Vec<u8>,
}

impl Whole {
    /// Index, leaf and details.
    #[must_use]
    pub fn parts(&self) -> (i64, &[u8], Option<&[u8]>) {
        (self.index, &self.leaf, Some(&self.details))
    }

    fn size(&self) -> usize {
        self.leaf.len() + self.details.len() + size_of::<Self>()
    }
}

#[derive(Default)]
struct Held {
    entries: VecDeque<Whole>,
    bytes: usize,
}

impl Held {
    fn pop(&mut self) -> Option<Whole> {
        let oldest = self.entries.pop_front()?;
        self.bytes -= oldest.size();
        Some(oldest)
    }
}

/// The entries that are held, in order; some may be missing between them.
#[derive(Default)]
pub(super) struct Lately(Mutex<Held>);

impl Lately {
    /// Holds what has been committed, from this index on. What is too much goes, the oldest first.
    pub fn push(&self, from: i64, sealed: Vec<Sealed>) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, sealed) in (from..).zip(sealed) {
            let whole = Whole { index, leaf: sealed.leaf, details: sealed.details };
            held.bytes += whole.size();
            held.entries.push_back(whole);
        }
        while held.bytes > HELD {
            held.pop();
        }
    }

    /// Gives these away, if all of them are held. What is before them goes.
    pub fn take(&self, range: Range<i64>) -> Option<Vec<Whole>> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while held.entries.front().is_some_and(|oldest| oldest.index < range.start) {
            held.pop();
        }
        let all = range.clone().zip(&held.entries).all(|(index, whole)| index == whole.index);
        let most = usize::try_from(range.end - range.start).unwrap_or(0);
        (all && held.entries.len() >= most).then(|| (0..most).filter_map(|_| held.pop()).collect())
    }
}

impl Ledger {
    /// The entries of this range, if this daemon's writer wrote all of them lately; they are given away once, to one follower.
    #[must_use]
    pub fn lately(&self, range: Range<i64>) -> Option<Vec<Whole>> {
        self.0.shared.lately.take(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed(n: usize, size: usize) -> Vec<Sealed> {
        let one = |_| Sealed {
            leaf: vec![b'l'; size],
            hash: [0; 32],
            touched: Vec::new(),
            touches: Vec::new(),
            salt: [0; 32],
            details: Vec::new(),
            segment: None,
        };
        (0..n).map(one).collect()
    }

    fn indexes(taken: Option<Vec<Whole>>) -> Option<Vec<i64>> {
        taken.map(|all| all.iter().map(|w| w.index).collect())
    }

    #[test]
    fn what_is_held_is_given_away_only_whole() {
        let lately = Lately::default();
        lately.push(10, sealed(5, 1));
        assert_eq!(indexes(lately.take(9..12)), None, "9 is not there");
        assert_eq!(indexes(lately.take(10..12)), Some(vec![10, 11]));
        assert_eq!(indexes(lately.take(10..12)), None, "once");
        // Another daemon wrote 15.
        lately.push(16, sealed(3, 1));
        assert_eq!(indexes(lately.take(13..17)), None);
        assert_eq!(indexes(lately.take(16..18)), Some(vec![16, 17]));
        assert_eq!(indexes(lately.take(18..20)), None, "19 is not written yet");
        lately.push(19, sealed(1, 1));
        assert_eq!(indexes(lately.take(18..20)), Some(vec![18, 19]));
        assert_eq!(lately.0.lock().unwrap().bytes, 0);
    }

    #[test]
    fn it_holds_so_much_and_no_more() {
        let lately = Lately::default();
        lately.push(0, sealed(100, HELD / 10));
        assert!(lately.0.lock().unwrap().bytes <= HELD);
        assert_eq!(indexes(lately.take(98..100)), Some(vec![98, 99]));
    }
}
