//! Which facts an entry changed. Every daemon drops what it held of them when it catches up (rule 9).

use smol_str::SmolStr;

/// A fact, a group of facts by prefix, or all of a kind.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Touch {
    /// `kv`, `authz`, `topic`, ...: a short ASCII word. As read back it is whatever was written, even by a newer binary.
    pub kind: SmolStr,
    /// Which of that kind.
    pub what: What,
}

/// Which facts of a kind.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum What {
    /// The one of this key.
    Key(Vec<u8>),
    /// All whose key starts so.
    Prefix(Vec<u8>),
    /// All.
    All,
}

impl Touch {
    /// One fact.
    pub fn key(kind: &'static str, key: impl Into<Vec<u8>>) -> Self {
        Self { kind: SmolStr::new_static(kind), what: What::Key(key.into()) }
    }

    /// All facts of a kind under a prefix.
    pub fn prefix(kind: &'static str, prefix: impl Into<Vec<u8>>) -> Self {
        Self { kind: SmolStr::new_static(kind), what: What::Prefix(prefix.into()) }
    }

    /// All facts of a kind.
    #[must_use]
    pub const fn all(kind: &'static str) -> Self {
        Self { kind: SmolStr::new_static(kind), what: What::All }
    }

    /// For the column: per touch, the kind's length and bytes, a tag, the key's length (u32) and bytes.
    #[must_use]
    pub fn encode(touches: &[Self]) -> Vec<u8> {
        let mut out = Vec::with_capacity(touches.len() * 32);
        for t in touches {
            let (tag, key): (u8, &[u8]) = match &t.what {
                What::Key(k) => (b'k', k),
                What::Prefix(p) => (b'p', p),
                What::All => (b'a', &[]),
            };
            out.push(u8::try_from(t.kind.len()).unwrap_or(u8::MAX));
            out.extend_from_slice(t.kind.as_bytes());
            out.push(tag);
            out.extend_from_slice(&u32::try_from(key.len()).unwrap_or(u32::MAX).to_be_bytes());
            out.extend_from_slice(key);
        }
        out
    }

    /// Reads the column; `None` if it is not what [`Touch::encode`] writes.
    #[must_use]
    pub fn decode(mut data: &[u8]) -> Option<Vec<Self>> {
        fn take<'a>(data: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
            let (head, rest) = data.split_at_checked(n)?;
            *data = rest;
            Some(head)
        }
        let mut out = Vec::new();
        while !data.is_empty() {
            let n = usize::from(take(&mut data, 1)?[0]);
            let kind = std::str::from_utf8(take(&mut data, n)?).ok()?.into();
            let tag = take(&mut data, 1)?[0];
            let n = u32::from_be_bytes(take(&mut data, 4)?.try_into().ok()?);
            let key = take(&mut data, usize::try_from(n).ok()?)?.to_vec();
            let what = match tag {
                b'k' => What::Key(key),
                b'p' => What::Prefix(key),
                b'a' => What::All,
                _ => return None,
            };
            out.push(Self { kind, what });
        }
        Some(out)
    }

    /// Whether it covers the fact of this kind and key.
    #[must_use]
    pub fn covers(&self, kind: &str, key: &[u8]) -> bool {
        self.kind == kind
            && match &self.what {
                What::Key(k) => k == key,
                What::Prefix(p) => key.starts_with(p),
                What::All => true,
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_reads_back(keys in prop::collection::vec((0..3u8, prop::collection::vec(any::<u8>(), 0..40)), 0..8)) {
            let touches: Vec<Touch> = keys.into_iter().map(|(tag, k)| match tag {
                0 => Touch::key("kv", k),
                1 => Touch::prefix("authz", k),
                _ => Touch::all("topic"),
            }).collect();
            prop_assert_eq!(Touch::decode(&Touch::encode(&touches)), Some(touches));
        }

        #[test]
        fn garbage_is_refused_or_read_never_a_panic(data in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = Touch::decode(&data);
        }
    }
}
