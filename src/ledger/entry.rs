//! What a command says of itself: the entry that commits with its change.
//!
//! The **leaf** is `{action, body, outcome, room, time, v}` in canonical JSON (RFC 8785) and is what the tree hashes. The
//! **details** (actor, resource, reason, request and trace id, decision, what changed) lie beside it; `body` commits to
//! them with a salt, so that they can be erased with the tree intact.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::kernel::Timestamp;
use crate::kernel::crypto::{self, Domain, Hash};
use crate::kernel::web::{Caller, Decision, EntityName};

use super::touch::Touch;

/// The largest leaf: a tlog entry bundle gives its length 16 bits.
pub const LEAF_MAX: usize = 65_535;

/// How what was asked for ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It was done.
    Ok,
    /// It was refused by policy.
    Denied,
    /// It was tried and failed.
    Failed,
}

impl Outcome {
    /// As the leaf has it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Denied => "denied",
            Self::Failed => "failed",
        }
    }
}

/// The kind of touch of an entry that carries a signal.
pub const SIGNAL: &str = "signal";

/// Something that should open an incident: health follows entries that carry one.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Signal {
    /// `info`, `warning` or `critical`.
    pub severity: String,
    /// What makes two of them the same incident.
    pub fingerprint: String,
}

/// The audit entry of one command, before it has an index.
#[derive(Clone, Debug)]
pub struct Entry {
    pub(super) action: &'static str,
    pub(super) outcome: Outcome,
    pub(super) resource: String,
    pub(super) reason: Option<String>,
    pub(super) change: Changes,
    pub(super) signal: Option<Signal>,
    pub(super) segment: Option<Segment>,
    pub(super) touched: Vec<Touch>,
    /// The decision it rests on, canonical JSON.
    pub(super) decision: Option<Vec<u8>>,
    /// There is none: the command changed nothing.
    pub(super) nothing: bool,
}

/// The records that an entry stands for: their root (of [`super::segment`]) and number.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Merkle root over the records.
    pub root: Hash,
    /// How many.
    pub count: usize,
    /// The hash of each.
    pub(super) hashes: Vec<Hash>,
}

impl Entry {
    /// An entry of `action` (`state:put`: room and verb) on `resource` (`key/arp/plan/1`), outcome ok.
    pub fn ok(action: &'static str, resource: impl Into<String>) -> Self {
        Self {
            action,
            outcome: Outcome::Ok,
            resource: resource.into(),
            reason: None,
            change: Changes::default(),
            signal: None,
            segment: None,
            touched: Vec::new(),
            decision: None,
            nothing: false,
        }
    }

    /// No entry, and no index: the command came to an answer and changed nothing. Such an answer rests on what was read under
    /// the lock of the head, and leaves after its turn as every other.
    #[must_use]
    pub fn nothing() -> Self {
        Self { nothing: true, ..Self::ok("", "") }
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        self.nothing
    }

    /// Another outcome.
    #[must_use]
    pub fn outcome(mut self, outcome: Outcome) -> Self {
        self.outcome = outcome;
        self
    }

    /// Why it was done or refused, in words.
    #[must_use]
    pub fn reason(mut self, reason: impl Into<String>) -> Self {
        self.reason = Some(reason.into());
        self
    }

    /// Adds to what changed. Strings, booleans, and integers below 2^53; no floats.
    #[must_use]
    pub fn change(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.change.set(name, value.into());
        self
    }

    /// Says which fact it changed, so that every daemon drops what it held of it.
    #[must_use]
    pub fn touch(mut self, touch: Touch) -> Self {
        self.touched.push(touch);
        self
    }

    /// Should open an incident.
    #[must_use]
    pub fn signal(mut self, severity: &str, fingerprint: impl Into<String>) -> Self {
        let fingerprint = fingerprint.into();
        self.touched.push(Touch::key(SIGNAL, fingerprint.as_bytes()));
        self.signal = Some(Signal { severity: severity.to_owned(), fingerprint });
        self
    }

    /// Stands for a segment of records.
    #[must_use]
    pub fn segment(mut self, segment: Segment) -> Self {
        self.segment = Some(segment);
        self
    }

    /// Keeps the decision it rests on, as [`decided`] wrote it; the ledger sets it for commands of callers.
    #[must_use]
    pub(super) fn with_decision(mut self, decision: Option<Vec<u8>>) -> Self {
        self.decision = decision;
        self
    }
}

/// What a command changed, by name, in the order of names. A few, so they are kept in a row.
#[derive(Clone, Debug, Default)]
pub(super) struct Changes(Vec<(&'static str, Value)>);

impl Changes {
    fn set(&mut self, name: &'static str, value: Value) {
        match self.0.binary_search_by_key(&name, |(name, _)| name) {
            Ok(at) => self.0[at].1 = value,
            Err(at) => self.0.insert(at, (name, value)),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<Changes> for Value {
    fn from(changes: Changes) -> Self {
        Self::Object(changes.0.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    }
}

/// A decision as the record keeps it. Made before the command queues, so that the writer need not.
pub(super) fn decided(d: &Decision) -> Vec<u8> {
    let mut o = Object::new();
    o.member("action", &d.action);
    o.member("at", &d.at);
    o.member("bundle", &d.bundle[..]);
    context(&mut o, d);
    o.member("id", &d.id);
    o.member("policies", &d.policies[..]);
    o.object("principal", |o| named(o, d.caller.principal()));
    o.object("resource", |o| named(o, &d.resource));
    o.end()
}

fn named(o: &mut Object, entity: &EntityName) {
    o.member("id", &entity.id);
    o.member("type", &entity.kind);
}

/// What it was decided in, so that it can be decided again: scopes, method and path, and what else was asked about.
fn context(o: &mut Object, d: &Decision) {
    let request = d.caller.request();
    if d.context.is_empty() {
        return o.object("context", |o| {
            o.member("method", &request.method);
            o.member("path", &request.path);
            o.member("scopes", d.caller.scopes());
        });
    }
    let mut all = d.context.clone();
    all.insert("method".to_owned(), request.method.as_ref().into());
    all.insert("path".to_owned(), request.path.as_str().into());
    all.insert("scopes".to_owned(), d.caller.scopes().into());
    o.value("context", &Value::Object(all));
}

/// An object of canonical JSON whose members are given in the order of their names.
pub struct Object(Vec<u8>);

impl Default for Object {
    fn default() -> Self {
        Self::new()
    }
}

impl Object {
    /// Without members.
    #[must_use]
    pub fn new() -> Self {
        let mut out = Vec::with_capacity(512);
        out.push(b'{');
        Self(out)
    }

    /// A member that is canonical JSON already. Names are ours, of letters and digits, so nothing in them is escaped.
    pub fn raw(&mut self, name: &'static str, value: &[u8]) {
        debug_assert!(name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-')));
        // No value ends so.
        let first = self.0.last() == Some(&b'{');
        self.0.extend_from_slice(if first { b"\"" } else { b",\"" });
        self.0.extend_from_slice(name.as_bytes());
        self.0.extend_from_slice(b"\":");
        self.0.extend_from_slice(value);
    }

    /// A member that is an object, whose members follow in the order of their names.
    pub fn object(&mut self, name: &'static str, members: impl FnOnce(&mut Self)) {
        self.raw(name, b"{");
        members(self);
        self.0.push(b'}');
    }

    /// Any value.
    pub fn value(&mut self, name: &'static str, value: &Value) {
        self.raw(name, b"");
        write_canonical(value, &mut self.0);
    }

    /// A scalar, or a list of scalars.
    pub fn member(&mut self, name: &'static str, value: &(impl Serialize + ?Sized)) {
        self.raw(name, b"");
        write_scalar(value, &mut self.0);
    }

    /// Its bytes.
    #[must_use]
    pub fn end(mut self) -> Vec<u8> {
        self.0.push(b'}');
        self.0
    }
}

/// An entry with everything that is stored of it.
#[derive(Clone, Debug)]
pub struct Sealed {
    /// The exact bytes of the leaf.
    pub leaf: Vec<u8>,
    /// Its hash.
    pub hash: Hash,
    /// 32 random bytes.
    pub salt: [u8; 32],
    /// The details, canonical JSON.
    pub details: Vec<u8>,
    /// Root of the segment, if it stands for one.
    pub segment: Option<Hash>,
    /// What it touched, encoded.
    pub touched: Vec<u8>,
    /// The same, for whoever follows in this daemon: taken out as the entry joins its batch.
    pub(super) touches: Vec<Touch>,
}

/// The commitment to an entry's details.
#[must_use]
pub fn commitment(salt: &[u8], details: &[u8]) -> Hash {
    crypto::hash(Domain::Commitment, &[salt, details])
}

/// The `body` of a leaf: the commitment to its details; of a segment, a digest of its root and that commitment.
#[must_use]
pub fn body(commitment: &Hash, segment: Option<&Hash>) -> Hash {
    match segment {
        None => *commitment,
        Some(root) => crypto::hash(Domain::Segment, &[root, commitment]),
    }
}

impl Entry {
    /// Makes the bytes: details, commitment (with a random `salt` of its own), leaf, hash.
    #[must_use]
    pub fn seal(self, caller: &Caller, time: Timestamp, salt: [u8; 32]) -> Sealed {
        let request = caller.request();
        let mut details = Object::new();
        details.member("actor", &caller.actor());
        if !self.change.is_empty() {
            details.object("change", |o| self.change.0.iter().for_each(|(name, value)| o.value(name, value)));
        }
        if let Some(decision) = &self.decision {
            details.raw("decision", decision);
        }
        if let Some(reason) = &self.reason {
            details.member("reason", reason);
        }
        if let Some(segment) = &self.segment {
            details.member("records", &segment.count);
        }
        if !request.id.is_empty() {
            details.member("request_id", &request.id);
        }
        details.member("resource", &self.resource);
        if let Some(signal) = self.signal.and_then(|s| serde_json::to_value(s).ok()) {
            details.value("signal", &signal);
        }
        if let Some(trace) = &request.trace_id {
            details.member("trace_id", trace);
        }
        if !caller.via().is_empty() {
            details.member("via", &caller.via());
        }
        let details = details.end();
        let segment = self.segment.map(|s| s.root);
        let body = body(&commitment(&salt, &details), segment.as_ref());
        let room = self.action.split(':').next().unwrap_or(self.action);
        let mut leaf = Object::new();
        leaf.member("action", &self.action);
        leaf.member("body", &crypto::base64(body));
        leaf.member("outcome", &self.outcome.as_str());
        leaf.member("room", &room);
        leaf.member("time", &time);
        leaf.member("v", &1);
        let leaf = leaf.end();
        debug_assert!(leaf.len() <= LEAF_MAX);
        let hash = crypto::hash(Domain::Leaf, &[&leaf]);
        Sealed { leaf, hash, salt, details, segment, touched: Touch::encode(&self.touched), touches: self.touched }
    }
}

/// RFC 8785 for the values we make: strings, booleans, null, integers below 2^53, ASCII keys. Strings and integers are written
/// by `serde_json`, which escapes as the RFC wants; keys are sorted here, because a dependency may switch on the feature that
/// keeps `serde_json`'s maps in the order of insertion.
#[must_use]
pub fn canonical(value: &Value) -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    write_canonical(value, &mut out);
    out
}

fn write_canonical(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Object(map) => {
            let mut members: Vec<_> = map.iter().collect();
            members.sort_unstable_by_key(|(k, _)| *k);
            out.push(b'{');
            for (i, (k, v)) in members.into_iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                write_scalar(&k, out);
                out.push(b':');
                write_canonical(v, out);
            }
            out.push(b'}');
        }
        Value::Array(items) => {
            out.push(b'[');
            for (i, v) in items.iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                write_canonical(v, out);
            }
            out.push(b']');
        }
        scalar => write_scalar(&scalar, out),
    }
}

fn write_scalar(value: &(impl Serialize + ?Sized), out: &mut Vec<u8>) {
    // Writing to memory cannot fail, and a scalar has no keys that could be wrong.
    let _ = serde_json::to_writer(out, value);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;

    #[test]
    fn a_decision_and_details_are_canonical() {
        let name = |kind: &str, id: &str| EntityName { kind: kind.into(), id: id.into() };
        let decision = Decision {
            id: uuid::Uuid::nil(),
            at: 7,
            bundle: Arc::new(["system".into()]),
            policies: Arc::new(["a\"b".into(), "c".into()]),
            action: "state:put",
            resource: name("Sop::Key", "é\n"),
            caller: Caller::daemon("test"),
            context: serde_json::Map::new(),
        };
        let written = decided(&decision);
        let expected = json!({
            "id": decision.id, "at": 7, "bundle": ["system"], "policies": ["a\"b", "c"], "action": "state:put",
            "principal": decision.caller.principal(), "resource": {"type": "Sop::Key", "id": "é\n"},
            "context": {"method": "", "path": "", "scopes": []},
        });
        assert_eq!(written, canonical(&expected));
        let entry = Entry::ok("a:b", "c/d").reason("r").signal("info", "f").change("z", 1).change("a", "x");
        let segment = Segment { root: [7; 32], count: 3, hashes: Vec::new() };
        let sealed = entry.segment(segment).with_decision(Some(written)).seal(
            &Caller::daemon("test"),
            Timestamp::from_millis(0),
            [7; 32],
        );
        let details: Value = serde_json::from_slice(&sealed.details).unwrap();
        assert_eq!(canonical(&details), sealed.details);
        assert_eq!((details["records"].as_i64(), &details["decision"]["at"]), (Some(3), &json!(7)));
    }

    #[test]
    fn the_leaf_commits_to_the_details() {
        let now = Timestamp::from_millis(1_700_000_000_123);
        let entry = Entry::ok("state:put", "key/a").change("size", 3).reason("a\u{0}\u{1f}\"\\/é");
        let sealed = entry.seal(&Caller::daemon("test"), now, [7; 32]);
        let leaf: Value = serde_json::from_slice(&sealed.leaf).unwrap();
        assert_eq!(leaf["room"], "state");
        assert_eq!(leaf["time"], "2023-11-14T22:13:20.123Z");
        assert_eq!(leaf["body"], crypto::base64(commitment(&sealed.salt, &sealed.details)));
        assert_eq!(canonical(&leaf), sealed.leaf, "sorted and compact");
        assert!(sealed.leaf.starts_with(br#"{"action":"state:put","body":""#));
    }

    #[test]
    fn maps_are_sorted() {
        assert_eq!(canonical(&json!({"b": 1, "a": {"d": null, "c": true}})), br#"{"a":{"c":true,"d":null},"b":1}"#);
    }
}
