//! Where the keys of a transaction stand, as its operations change it.

use std::sync::Arc;

use crate::state::span::Span;
use crate::state::store::Standing;

/// Keys in order, each once, and where each stands by now. Which they are is known before the first operation, so they are found
/// by halving.
#[derive(Default)]
pub(super) struct Standings {
    keys: Arc<[Vec<u8>]>,
    at: Vec<Option<Standing>>,
}

impl Standings {
    /// `at`: of each of `keys`, which are in order, where it stands; `None`, it is not there.
    pub fn new(keys: Arc<[Vec<u8>]>, at: Vec<Option<Standing>>) -> Self {
        debug_assert!(keys.len() == at.len() && keys.is_sorted());
        Self { keys, at }
    }

    fn place(&self, key: &[u8]) -> Option<usize> {
        self.keys.binary_search_by(|k| k.as_slice().cmp(key)).ok()
    }

    pub fn get(&self, key: &[u8]) -> Option<Standing> {
        self.at[self.place(key)?]
    }

    /// Where it stands from now on; where it stood.
    pub fn set(&mut self, key: &[u8], now: Option<Standing>) -> Option<Standing> {
        let place = self.place(key);
        debug_assert!(place.is_some(), "a key was changed that was not said to be");
        std::mem::replace(&mut self.at[place?], now)
    }

    /// Those of a span are not there any more.
    pub fn clear(&mut self, span: &Span) {
        for (key, at) in self.keys.iter().zip(&mut self.at) {
            if span.contains(key) {
                *at = None;
            }
        }
    }

    /// Where they stand, in their order.
    pub fn iter(&self) -> impl Iterator<Item = Option<Standing>> {
        self.at.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_stands_where_it_was_last_put() {
        let standing = |index| Some(Standing { index, created_index: 1, version: 1 });
        let keys: Arc<[Vec<u8>]> = ["a", "a/b", "a/c", "b"].map(|k| k.as_bytes().to_vec()).into();
        let mut standings = Standings::new(keys, vec![standing(1), None, standing(2), standing(3)]);
        let index = |s: Option<Standing>| s.map(|s| s.index);
        assert_eq!(
            (index(standings.get(b"a")), index(standings.get(b"a/b")), index(standings.get(b"c"))),
            (Some(1), None, None)
        );
        assert_eq!(index(standings.set(b"a/b", standing(4))), None);
        assert_eq!(index(standings.set(b"a/b", standing(5))), Some(4));
        standings.clear(&Span::prefix("a/"));
        let all: Vec<_> = standings.iter().map(index).collect();
        assert_eq!(all, [Some(1), None, None, Some(3)]);
    }
}
