//! CloudEvents 1.0 as they come over HTTP: structured, batched, binary. Kept as the bytes that came.

use axum::http::{HeaderMap, header};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::crypto::{self, Hash};
use super::web::{faulty, parse_json};
use super::{Fault, Refusal, Timestamp, problem};

/// An event that is what the specification asks for.
#[derive(Clone, Debug)]
pub struct Event {
    /// Its JSON form.
    pub bytes: Vec<u8>,
    /// Digest of source and id, by which a repetition is known.
    pub dedupe: Hash,
    /// Where it comes from.
    pub source: String,
    /// What it is.
    pub kind: String,
    /// Its id, unique for its source.
    pub id: String,
}

impl Event {
    /// One that was read before and kept, under another digest.
    #[must_use]
    pub fn kept(bytes: Vec<u8>, dedupe: Hash) -> Self {
        let event = serde_json::from_slice(&bytes).unwrap_or_default();
        Self { dedupe, ..Self::new(bytes, &event) }
    }

    fn new(bytes: Vec<u8>, event: &Map<String, Value>) -> Self {
        let text = |name: &str| event.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (source, id) = (text("source"), text("id"));
        Self { bytes, dedupe: crypto::hash_tuple([source.as_str(), id.as_str()]), source, kind: text("type"), id }
    }
}

/// Events in one batch at most.
const BATCH: usize = 1000;

/// What a request brings: one event, or a batch.
pub enum Brought {
    /// Structured or binary.
    One(Event),
    /// A batch, each element read by itself.
    Many(Vec<Result<Event, Refusal>>),
}

/// Reads a request's body by its content type.
///
/// # Errors
/// 400 with a pointer to what does not fit, 415 on another content type.
pub fn read(headers: &HeaderMap, body: &[u8]) -> Result<Brought, Refusal> {
    let declared = headers.get(header::CONTENT_TYPE).and_then(|t| t.to_str().ok()).unwrap_or_default();
    let essence = declared.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if essence == "application/cloudevents-batch+json" {
        let items: Vec<Box<RawValue>> = parse_json(body)?;
        if items.is_empty() || items.len() > BATCH {
            return Err(Refusal::malformed("", format!("a batch has 1 to {BATCH} events")));
        }
        let each = items.iter().enumerate().map(|(i, raw)| structured(raw.get().as_bytes(), &format!("/{i}")));
        return Ok(Brought::Many(each.collect()));
    }
    if essence == "application/cloudevents+json" {
        return structured(body, "").map(Brought::One);
    }
    if headers.contains_key("ce-specversion") {
        return binary(headers, declared, &essence, body).map(Brought::One);
    }
    Err(Refusal::new(
        &problem::UNSUPPORTED_MEDIA_TYPE,
        "send a CloudEvent: application/cloudevents+json, application/cloudevents-batch+json, or any body with ce-* headers",
    ))
}

/// Reads the JSON form of one event, which lies at `at` in the body.
///
/// # Errors
/// 400 with a pointer to what does not fit.
pub fn structured(bytes: &[u8], at: &str) -> Result<Event, Refusal> {
    let event: Map<String, Value> = parse_json(bytes).map_err(|r| r.under(at))?;
    check(&event, at)?;
    Ok(Event::new(bytes.to_vec(), &event))
}

/// Holds an event against the specification.
fn check(event: &Map<String, Value>, at: &str) -> Result<(), Refusal> {
    let mut faults = Vec::new();
    let mut fault = |name: &str, detail: &str| faults.push(Fault::new(format!("{at}/{name}"), detail));
    for name in ["id", "source", "type"] {
        match event.get(name).map(Value::as_str) {
            Some(Some(text)) if (1..=1024).contains(&text.len()) => {}
            _ => fault(name, "text of 1 to 1024 bytes is required"),
        }
    }
    if event.get("specversion").and_then(Value::as_str) != Some("1.0") {
        fault("specversion", "\"1.0\" is required");
    }
    if event.get("time").is_some_and(|t| t.as_str().and_then(Timestamp::parse).is_none()) {
        fault("time", "an RFC 3339 time is wanted");
    }
    if event.contains_key("data") && event.contains_key("data_base64") {
        fault("data_base64", "data and data_base64 exclude each other");
    }
    if event.get("data_base64").is_some_and(|d| d.as_str().and_then(crypto::from_base64).is_none()) {
        fault("data_base64", "base64 is wanted");
    }
    for (name, value) in event.iter().filter(|(name, _)| !matches!(name.as_str(), "data" | "data_base64")) {
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()) {
            fault(name, "a context attribute is named with a-z and 0-9");
        }
        if value.is_object() || value.is_array() || value.is_f64() {
            fault(name, "a context attribute is text, a whole number or a boolean");
        }
    }
    faulty(faults).map_or(Ok(()), Err)
}

/// Binary mode: attributes are headers, the body is the data.
fn binary(headers: &HeaderMap, declared: &str, essence: &str, body: &[u8]) -> Result<Event, Refusal> {
    let mut event = Map::new();
    for (name, value) in headers {
        if let Some(attribute) = name.as_str().strip_prefix("ce-") {
            let text = value.to_str().map_err(|_| Refusal::malformed("", format!("the header {name} is not ASCII")))?;
            let decoded = percent_encoding::percent_decode_str(text).decode_utf8();
            let text = decoded.map_err(|_| Refusal::malformed("", format!("the header {name} is not UTF-8")))?;
            event.insert(attribute.to_owned(), text.into_owned().into());
        }
    }
    if !declared.is_empty() {
        event.insert("datacontenttype".into(), declared.into());
    }
    let json = essence == "application/json" || essence.ends_with("+json");
    if json && !body.is_empty() {
        event.insert("data".into(), parse_json(body)?);
    } else if !body.is_empty() {
        event.insert("data_base64".into(), crypto::base64(body).into());
    }
    check(&event, "")?;
    let bytes = serde_json::to_vec(&event).map_err(Refusal::internal)?;
    Ok(Event::new(bytes, &event))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(pairs: &[(&str, &str)]) -> HeaderMap {
        let pair =
            |(n, v): &(&str, &str)| (axum::http::HeaderName::from_bytes(n.as_bytes()).unwrap(), v.parse().unwrap());
        pairs.iter().map(pair).collect()
    }

    fn one(headers: &[(&str, &str)], body: &str) -> Result<Event, Refusal> {
        match read(&with(headers), body.as_bytes())? {
            Brought::One(event) => Ok(event),
            Brought::Many(_) => panic!("a batch"),
        }
    }

    #[test]
    fn the_three_ways_bring_the_same() {
        let body = r#"{"specversion":"1.0","id":"1","source":"/s","type":"t","data":{"n":1}}"#;
        let structured = one(&[("content-type", "application/cloudevents+json; charset=utf-8")], body).unwrap();
        assert_eq!(structured.bytes, body.as_bytes(), "the very bytes");
        let headers = [
            ("content-type", "application/json"),
            ("ce-specversion", "1.0"),
            ("ce-id", "1"),
            ("ce-source", "/s"),
            ("ce-type", "t%20t"),
        ];
        let binary = one(&headers, r#"{"n":1}"#).unwrap();
        let value: Value = serde_json::from_slice(&binary.bytes).unwrap();
        assert_eq!((&value["data"]["n"], &value["type"]), (&1.into(), &"t t".into()));
        assert_eq!(binary.dedupe, structured.dedupe);
        let batch = with(&[("content-type", "application/cloudevents-batch+json")]);
        let Brought::Many(events) = read(&batch, format!("[{body}]").as_bytes()).unwrap() else { panic!("one") };
        assert_eq!((events.len(), events[0].as_ref().unwrap().dedupe), (1, structured.dedupe));
    }

    #[test]
    fn what_is_no_event_is_pointed_at() {
        let kind = [("content-type", "application/cloudevents+json")];
        for (body, at) in [
            (r#"{"specversion":"1.0","id":"1","source":"/s"}"#, "/type"),
            (r#"{"specversion":"0.3","id":"1","source":"/s","type":"t"}"#, "/specversion"),
            (r#"{"specversion":"1.0","id":"","source":"/s","type":"t"}"#, "/id"),
            (r#"{"specversion":"1.0","id":"1","source":"/s","type":"t","Bad":"x"}"#, "/Bad"),
            (r#"{"specversion":"1.0","id":"1","source":"/s","type":"t","ext":{}}"#, "/ext"),
            (r#"{"specversion":"1.0","id":"1","source":"/s","type":"t","time":"now"}"#, "/time"),
            (
                r#"{"specversion":"1.0","id":"1","source":"/s","type":"t","data":1,"data_base64":"AA=="}"#,
                "/data_base64",
            ),
        ] {
            let refusal = one(&kind, body).unwrap_err();
            assert_eq!((refusal.problem().status, refusal.errors()[0].pointer.as_str()), (400, at), "{body}");
        }
        assert_eq!(one(&[("content-type", "text/plain")], "x").unwrap_err().problem().status, 415);
        let batch = with(&[("content-type", "application/cloudevents-batch+json")]);
        let mixed = r#"[{"id":"1"},{"specversion":"1.0","id":"1","source":"/s","type":"t"}]"#;
        let Ok(Brought::Many(each)) = read(&batch, mixed.as_bytes()) else { panic!("no batch") };
        assert_eq!(each[0].as_ref().unwrap_err().errors()[0].pointer, "/0/source");
        assert!(each[1].is_ok(), "a good one is not blocked by a bad one");
    }
}
