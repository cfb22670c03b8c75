//! The nouns of the room: a key's state, a change, a condition.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::kernel::crypto::base64;
use crate::kernel::ids;

/// A key as it is, or was at an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// The key's bytes.
    pub key: Vec<u8>,
    /// Index of its last change.
    pub index: i64,
    /// Index of its creation.
    pub created_index: i64,
    /// 1 when created, one more with each change.
    pub version: i64,
    /// As the writer sent it.
    pub content_type: String,
    /// The value's bytes.
    pub value: Vec<u8>,
    /// The lease it hangs on, if any.
    pub lease: Option<Uuid>,
}

impl Item {
    /// As lists and watches show it.
    #[must_use]
    pub fn to_json(&self, with_value: bool) -> Map<String, Value> {
        let mut m = Map::new();
        put_key(&mut m, &self.key);
        if with_value {
            m.insert("value".into(), base64(&self.value).into());
        }
        m.insert("content_type".into(), self.content_type.clone().into());
        m.insert("index".into(), self.index.into());
        m.insert("created_index".into(), self.created_index.into());
        m.insert("version".into(), self.version.into());
        if let Some(lease) = self.lease {
            m.insert("lease".into(), lease.to_string().into());
        }
        m
    }
}

/// A key that is a name shows as `key`, any other as `key_base64`.
pub fn put_key(m: &mut Map<String, Value>, key: &[u8]) {
    match std::str::from_utf8(key).ok().filter(|k| ids::name_fault(k).is_none()) {
        Some(name) => m.insert("key".into(), name.into()),
        None => m.insert("key_base64".into(), base64(key).into()),
    };
}

/// Why this is no key.
#[must_use]
pub fn key_fault(key: &str) -> Option<&'static str> {
    ids::name_fault(key)
}

/// Why this is no prefix: the beginning of a name, which may end anywhere.
#[must_use]
pub fn prefix_fault(prefix: &str) -> Option<&'static str> {
    let fault = ids::name_fault(&format!("{prefix}x"))?;
    // One of the greatest length is a name and nothing longer.
    let whole = prefix.is_empty() || ids::name_fault(prefix.trim_end_matches('/')).is_none();
    (!whole).then_some(fault)
}

/// What a put answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Written {
    /// The key.
    pub key: String,
    /// The index of this change, and the key's `ETag`.
    pub index: i64,
    /// The index at which the key was created.
    pub created_index: i64,
    /// 1 when created, one more with each change.
    pub version: i64,
    /// The lease the key hangs on, if any.
    pub lease: Option<String>,
}

/// What a delete answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Deleted {
    /// The key.
    pub key: String,
    /// The index of the deletion.
    pub index: i64,
    /// The index the key had before.
    pub previous_index: i64,
}

/// What must hold of a key before it is changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Condition {
    /// Nothing.
    #[default]
    None,
    /// It exists (`If-Match: *`).
    Exists,
    /// It does not exist (`If-None-Match: *`).
    Absent,
    /// Its index is one of these (`If-Match`).
    IndexIn(Vec<i64>),
    /// Its index is none of these (`If-None-Match`).
    IndexNotIn(Vec<i64>),
}

impl Condition {
    /// Whether it holds of a key at `index`, or of one that is not there.
    #[must_use]
    pub fn holds(&self, index: Option<i64>) -> bool {
        match self {
            Self::None => true,
            Self::Exists => index.is_some(),
            Self::Absent => index.is_none(),
            Self::IndexIn(them) => index.is_some_and(|i| them.contains(&i)),
            Self::IndexNotIn(them) => index.is_none_or(|i| !them.contains(&i)),
        }
    }
}

/// A change of a key as watches tell it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The state after it; for a delete, only key and index mean anything.
    pub item: Item,
    /// Whether the key was deleted.
    pub deleted: bool,
    /// The index the key had before; 0: it was not there.
    pub previous: i64,
}

impl Change {
    /// A key's deletion.
    #[must_use]
    pub fn deletion(key: Vec<u8>, index: i64, created_index: i64, previous: i64) -> Self {
        let (content_type, value) = (String::new(), Vec::new());
        let item = Item { key, index, created_index, version: 0, content_type, value, lease: None };
        Self { item, deleted: true, previous }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions() {
        assert!(Condition::None.holds(None) && Condition::None.holds(Some(3)));
        assert!(Condition::Exists.holds(Some(3)) && !Condition::Exists.holds(None));
        assert!(Condition::Absent.holds(None) && !Condition::Absent.holds(Some(3)));
        assert!(Condition::IndexIn(vec![1, 3]).holds(Some(3)) && !Condition::IndexIn(vec![1]).holds(Some(3)));
        assert!(!Condition::IndexIn(vec![1]).holds(None));
        assert!(Condition::IndexNotIn(vec![1]).holds(None) && !Condition::IndexNotIn(vec![3]).holds(Some(3)));
    }

    #[test]
    fn a_key_that_is_no_name_shows_as_bytes() {
        let item = |key: &[u8]| Item {
            key: key.into(),
            index: 5,
            created_index: 4,
            version: 2,
            content_type: "text/plain".into(),
            value: b"v".into(),
            lease: None,
        };
        assert_eq!(item(b"a/b").to_json(true)["key"], "a/b");
        let odd = item(b"a//\xff").to_json(false);
        assert_eq!(odd["key_base64"], "YS8v/w==");
        assert!(!odd.contains_key("key") && !odd.contains_key("value"));
    }
}
