//! Keys in a row: one, those under a prefix, or those from one to another.

use std::fmt::Write as _;

use crate::kernel::web::Ask;

use super::store::prefix_end;

/// Keys from `from` on, up to and without `end`; without an end, all there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub from: Vec<u8>,
    pub end: Option<Vec<u8>>,
}

impl Span {
    /// One key: nothing comes between it and itself with a zero byte.
    pub fn one(key: impl Into<Vec<u8>>) -> Self {
        let from = key.into();
        let end = Some([from.as_slice(), &[0]].concat());
        Self { from, end }
    }

    /// All that begin so.
    pub fn prefix(prefix: impl Into<Vec<u8>>) -> Self {
        let from = prefix.into();
        let end = prefix_end(&from);
        Self { from, end }
    }

    /// The key, if it is one.
    pub fn single(&self) -> Option<&[u8]> {
        let end = self.end.as_deref()?;
        (end.split_last() == Some((&0, self.from.as_slice()))).then_some(self.from.as_slice())
    }

    pub fn contains(&self, key: &[u8]) -> bool {
        key >= self.from.as_slice() && self.end.as_deref().is_none_or(|end| key < end)
    }

    pub fn overlaps(&self, other: &Self) -> bool {
        self.end.as_ref().is_none_or(|end| other.from < *end) && other.end.as_ref().is_none_or(|end| self.from < *end)
    }

    /// The longest prefix that all its keys have: what is decided on is that, so that who may do something under a prefix may do
    /// it to any part of it, and nobody to more than they may.
    pub fn covering(&self) -> &[u8] {
        let whole = |n: &usize| match (prefix_end(&self.from[..*n]), self.end.as_ref()) {
            (None, _) => true,
            (Some(past), Some(end)) => *end <= past,
            (Some(_), None) => false,
        };
        let n = (0..=self.from.len()).rev().find(whole).unwrap_or(0);
        &self.from[..n]
    }

    /// The question whether something may be done to it: to the key, or to what begins as all its keys do.
    pub fn ask(&self, to_one: &'static str, to_many: &'static str) -> Ask {
        match self.single() {
            Some(key) => Ask::new(to_one, "Key", shown(key)),
            None => Ask::new(to_many, "Key", shown(self.covering())),
        }
    }
}

impl std::fmt::Display for Span {
    /// As entries name it: a key or a prefix by itself, anything else as `[from, end)`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let from = shown(&self.from);
        if self.single().is_some() || self.end == prefix_end(&self.from) {
            return f.write_str(&from);
        }
        write!(f, "[{from}, {})", self.end.as_deref().map(shown).unwrap_or_default())
    }
}

/// A key as policies and the record name it. A name is itself; any other byte is percent-encoded. No two keys have one text, and
/// what begins alike does so here too: a policy about `arp/*` is about all keys under `arp/`, be they names or not.
#[must_use]
pub(super) fn shown(key: &[u8]) -> String {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"._:-/".contains(b);
    if let Some(name) = std::str::from_utf8(key).ok().filter(|_| key.iter().all(plain)) {
        return name.to_owned();
    }
    let mut out = String::with_capacity(key.len());
    for b in key {
        if plain(b) {
            out.push(char::from(*b));
        } else {
            let _ = write!(out, "%{b:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn span(from: &[u8], end: &[u8]) -> Span {
        Span { from: from.to_vec(), end: (!end.is_empty()).then(|| end.to_vec()) }
    }

    #[test]
    fn what_is_decided_on_is_the_longest_prefix_of_all() {
        for (from, end, wanted) in [
            (&b"arp/"[..], &b"arp0"[..], &b"arp/"[..]),
            (b"arp/a", b"arp/c", b"arp/"),
            (b"a/b", b"a0", b"a/"),
            (b"a", b"c", b""),
            (b"a", b"", b""),
            (b"\xff\xff", b"", b"\xff\xff"),
            (b"k", b"k\0", b"k"),
            (b"k", b"k\0\0", b"k"),
            (b"b", b"a", b"b"),
        ] {
            assert_eq!(span(from, end).covering(), wanted, "{from:?} {end:?}");
        }
        assert_eq!(Span::one("k").single(), Some(&b"k"[..]));
        assert_eq!(Span::prefix("k").single(), None);
        assert_eq!(Span::prefix("").covering(), b"");
        assert_eq!(span(b"a", b"c").to_string(), "[a, c)");
        assert_eq!((Span::prefix("a/").to_string(), Span::one("a\n").to_string()), ("a/".into(), "a%0A".into()));
    }

    proptest! {
        #[test]
        fn every_key_of_a_span_begins_as_it_says(from in prop::collection::vec(97..100u8, 0..4), end in prop::collection::vec(97..100u8, 0..4), key in prop::collection::vec(96..101u8, 0..5)) {
            let span = span(&from, &end);
            prop_assert!(!span.contains(&key) || key.starts_with(span.covering()));
            let (one, both) = (Span::one(key.clone()), span.contains(&key));
            prop_assert_eq!(span.overlaps(&one) && one.overlaps(&span), both);
        }

        #[test]
        fn the_text_of_a_key_is_its_own_and_begins_alike(a in any::<Vec<u8>>(), b in any::<Vec<u8>>()) {
            prop_assert_eq!(shown(&a) == shown(&b), a == b);
            prop_assert_eq!(shown(&[a.as_slice(), &b].concat()), shown(&a) + &shown(&b));
        }
    }
}
