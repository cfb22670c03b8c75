//! The nouns of the room: an entry as it is stored, as it is found, as it is shown.

use serde_json::{Map, Value};

use crate::kernel::Timestamp;
use crate::kernel::crypto::base64;

/// An entry as it is stored.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Its index.
    pub index: i64,
    /// The exact bytes of the leaf.
    pub leaf: Vec<u8>,
    /// `None` once erased.
    pub salt: Option<Vec<u8>>,
    /// Canonical JSON; `None` once erased.
    pub details: Option<Vec<u8>>,
    /// Root of the records it stands for; `body` cannot be checked without it.
    pub segment: Option<Vec<u8>>,
}

impl Stored {
    fn objects(&self) -> (Map<String, Value>, Option<Map<String, Value>>) {
        let leaf = serde_json::from_slice(&self.leaf).unwrap_or_default();
        (leaf, self.details.as_ref().and_then(|d| serde_json::from_slice(d).ok()))
    }

    /// What the search keeps of it.
    #[must_use]
    pub fn found(&self) -> Found {
        let (leaf, details) = self.objects();
        let details = details.unwrap_or_default();
        let text =
            |m: &Map<String, Value>, name: &str| m.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        Found {
            index: self.index,
            time: Timestamp::parse(&text(&leaf, "time")).unwrap_or_default(),
            room: text(&leaf, "room"),
            action: text(&leaf, "action"),
            outcome: text(&leaf, "outcome"),
            actor: text(&details, "actor"),
            resource: text(&details, "resource"),
            request_id: text(&details, "request_id"),
        }
    }

    /// As the API shows it.
    #[must_use]
    pub fn shown(&self, indexed_to: i64) -> Map<String, Value> {
        let (leaf, details) = self.objects();
        let mut m = Map::new();
        m.insert("index".into(), self.index.into());
        m.insert("leaf".into(), base64(&self.leaf).into());
        m.extend(leaf);
        if let Some(details) = details {
            for name in ["actor", "resource", "reason", "request_id", "trace_id"] {
                if let Some(value) = details.get(name) {
                    m.insert(name.into(), value.clone());
                }
            }
            m.insert("details".into(), Value::Object(details));
        }
        if let Some(salt) = &self.salt {
            m.insert("salt".into(), base64(salt).into());
        }
        if let Some(segment) = &self.segment {
            m.insert("segment".into(), base64(segment).into());
        }
        m.insert("indexed_to".into(), indexed_to.into());
        m
    }
}

/// What is searched of an entry.
#[derive(Clone, Debug)]
pub struct Found {
    pub(super) index: i64,
    pub(super) time: Timestamp,
    pub(super) room: String,
    pub(super) action: String,
    pub(super) outcome: String,
    pub(super) actor: String,
    pub(super) resource: String,
    pub(super) request_id: String,
}

/// Which entries.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Who did it.
    pub actor: Option<String>,
    /// `state`, `token`, ...
    pub room: Option<String>,
    /// `state:put`.
    pub action: Option<String>,
    /// Beginning of the resource: `key/arp/`.
    pub resource: Option<String>,
    /// `ok`, `denied`, `failed`.
    pub outcome: Option<String>,
    /// The request it came with.
    pub request_id: Option<String>,
    /// Not before.
    pub since: Option<Timestamp>,
    /// Before.
    pub until: Option<Timestamp>,
    /// Oldest first.
    pub ascending: bool,
}
