//! The nouns of the room: an entry as it is stored, as it is found, as it is shown.

use serde_json::{Map, Value};

use crate::kernel::Timestamp;
use crate::kernel::crypto::base64;

use super::search::{self, tokens::words_of};

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

    /// Its index, leaf and details.
    pub(super) fn parts(&self) -> (i64, &[u8], Option<&[u8]>) {
        (self.index, &self.leaf, self.details.as_deref())
    }

    /// What the search keeps of it.
    #[must_use]
    pub fn found(&self) -> Found {
        let search::Read { leaf, said } = search::entry(&self.leaf, self.details.as_deref(), &mut |_| {});
        Found {
            time: Timestamp::parse(&leaf.time).unwrap_or_default(),
            room: leaf.room.into_owned(),
            action: leaf.action.into_owned(),
            outcome: leaf.outcome.into_owned(),
            actor: said.actor.into_owned(),
            resource: said.resource.into_owned(),
            request_id: said.request_id.into_owned(),
            trace_id: said.trace_id.into_owned(),
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
    pub(super) time: Timestamp,
    pub(super) room: String,
    pub(super) action: String,
    pub(super) outcome: String,
    pub(super) actor: String,
    pub(super) resource: String,
    pub(super) request_id: String,
    pub(super) trace_id: String,
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
    /// The trace it belongs to.
    pub trace_id: Option<String>,
    /// Words that its details have, all of them, in lower case.
    pub words: Vec<String>,
    /// Not before.
    pub since: Option<Timestamp>,
    /// Before.
    pub until: Option<Timestamp>,
    /// Oldest first.
    pub ascending: bool,
}

impl Filter {
    /// Whether every entry of its time fits.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let given =
            [&self.actor, &self.room, &self.action, &self.resource, &self.outcome, &self.request_id, &self.trace_id];
        given.iter().all(|value| value.is_none()) && self.words.is_empty()
    }

    /// Whether an entry fits, but for its words.
    #[must_use]
    pub fn fits(&self, found: &Found) -> bool {
        let is = |wanted: &Option<String>, value: &str| wanted.as_ref().is_none_or(|w| w == value);
        is(&self.actor, &found.actor)
            && is(&self.room, &found.room)
            && is(&self.action, &found.action)
            && is(&self.outcome, &found.outcome)
            && is(&self.request_id, &found.request_id)
            && is(&self.trace_id, &found.trace_id)
            && self.resource.as_ref().is_none_or(|r| found.resource.starts_with(r.as_str()))
            && self.since.is_none_or(|t| found.time >= t)
            && self.until.is_none_or(|t| found.time < t)
    }

    /// This one on top of another: where both say something, this one decides.
    #[must_use]
    pub fn narrowing(mut self, other: Self) -> Self {
        self.actor = self.actor.or(other.actor);
        self.room = self.room.or(other.room);
        self.action = self.action.or(other.action);
        self.resource = self.resource.or(other.resource);
        self.outcome = self.outcome.or(other.outcome);
        self.words.extend(other.words);
        self
    }

    /// Whether its details have all the words.
    #[must_use]
    pub fn says(&self, details: Option<&[u8]>) -> bool {
        if self.words.is_empty() {
            return true;
        }
        let words = details.map(words_of).unwrap_or_default();
        self.words.iter().all(|w| words.contains(w))
    }
}
