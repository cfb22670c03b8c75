//! AuthZEN Authorization API 1.0: what a request says, what each item of a batch means, what is answered.

use std::borrow::Cow;
use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::kernel::web::{EntityName, Strict, parse_json};
use crate::kernel::{Refusal, ids};

/// One evaluation, complete.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// Who.
    pub subject: Thing,
    /// What: the action's name and properties.
    pub action: (String, Map<String, Value>),
    /// To what.
    pub resource: Thing,
    /// What else.
    pub context: Map<String, Value>,
    /// The answer is to say why: `options.explain`.
    pub explain: bool,
    /// As it was asked, for the record: its JSON.
    pub asked: String,
}

/// A subject or a resource.
#[derive(Clone, Debug)]
pub struct Thing {
    /// Type and id.
    pub name: EntityName,
    /// Attributes for this request; they win over stored ones.
    pub properties: Map<String, Value>,
}

/// When a batch stops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Semantic {
    /// Every item is evaluated.
    #[default]
    ExecuteAll,
    /// Up to the first denial.
    DenyOnFirstDeny,
    /// Up to the first permit.
    PermitOnFirstPermit,
}

/// Reads one evaluation. Unknown members are ignored, as the standard says.
///
/// # Errors
/// 400 with a pointer.
pub fn evaluation(body: &Value) -> Result<Evaluation, Refusal> {
    let m = object(body, "")?;
    let thing = |name: &str| -> Result<Thing, Refusal> {
        let at = format!("/{name}");
        let t = object(member(m, name, "")?, &at)?;
        let (kind, id) = (text(t, "type", &at)?, text(t, "id", &at)?);
        if let Some(fault) = ids::id_fault(&id) {
            return Err(Refusal::malformed(format!("{at}/id"), fault));
        }
        Ok(Thing { name: EntityName { kind, id }, properties: optional(t, "properties", &at)? })
    };
    let action = object(member(m, "action", "")?, "/action")?;
    Ok(Evaluation {
        subject: thing("subject")?,
        action: (text(action, "name", "/action")?, optional(action, "properties", "/action")?),
        resource: thing("resource")?,
        context: optional(m, "context", "")?,
        explain: optional(m, "options", "")?.get("explain") == Some(&Value::Bool(true)),
        asked: body.to_string(),
    })
}

/// An evaluation whose members are all as they should be, read straight from its text.
#[derive(Deserialize)]
struct Whole<'a> {
    #[serde(borrow)]
    subject: Part<'a>,
    #[serde(borrow)]
    action: Verb<'a>,
    #[serde(borrow)]
    resource: Part<'a>,
    #[serde(default)]
    context: Map<String, Value>,
    #[serde(default)]
    options: Map<String, Value>,
}

#[derive(Deserialize)]
struct Part<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    id: Cow<'a, str>,
    #[serde(default)]
    properties: Map<String, Value>,
}

#[derive(Deserialize)]
struct Verb<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(default)]
    properties: Map<String, Value>,
}

/// Reads one evaluation from its text: as [`evaluation`] does, which says what is wrong if anything is.
///
/// # Errors
/// 400 with a pointer.
pub fn read(text: &[u8]) -> Result<Evaluation, Refusal> {
    match std::str::from_utf8(text).ok().and_then(whole) {
        Some(evaluation) => Ok(evaluation),
        None => evaluation(&parse_json(text)?),
    }
}

fn whole(text: &str) -> Option<Evaluation> {
    let Strict(w): Strict<Whole<'_>> = serde_json::from_str(text).ok()?;
    let thing = |part: Part<'_>| {
        let named = !part.kind.is_empty() && ids::id_fault(&part.id).is_none();
        let name = EntityName { kind: part.kind.into_owned(), id: part.id.into_owned() };
        named.then_some(Thing { name, properties: part.properties })
    };
    let explain = w.options.get("explain") == Some(&Value::Bool(true));
    let (subject, resource) = (thing(w.subject)?, thing(w.resource)?);
    let action = Some(w.action).filter(|action| !action.name.is_empty())?;
    let action = (action.name.into_owned(), action.properties);
    Some(Evaluation { subject, action, resource, context: w.context, explain, asked: text.to_owned() })
}

/// The members of an object, each as it is written.
struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

/// A name that is borrowed where it can be.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Each;
        impl<'de> Visitor<'de> for Each {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut all = Vec::with_capacity(4);
                while let Some(Name(name)) = map.next_key()? {
                    all.push((name, map.next_value()?));
                }
                Ok(Members(all))
            }
        }
        deserializer.deserialize_map(Each)
    }
}

impl<'a> Members<'a> {
    /// The last of a name counts, as with any JSON.
    fn get(&self, name: &str) -> Option<&'a RawValue> {
        self.0.iter().rev().find(|(n, _)| n == name).map(|(_, value)| *value)
    }

    /// These, and of the others what is not among them.
    fn with(&self, defaults: &Self) -> String {
        let mut text = String::with_capacity(512);
        let missing = DEFAULTS.iter().filter(|name| self.get(name).is_none());
        let missing = missing.filter_map(|name| Some((Cow::Borrowed(*name), defaults.get(name)?)));
        for (name, value) in self.0.iter().cloned().chain(missing) {
            text.push(if text.is_empty() { '{' } else { ',' });
            // A string can always be written.
            text.push_str(&serde_json::to_string(&name).unwrap_or_default());
            text.push(':');
            text.push_str(value.get());
        }
        if text.is_empty() {
            text.push('{');
        }
        text.push('}');
        text
    }
}

/// Items of a batch.
const ITEMS: usize = 10_000;
/// Bytes of a batch, with the defaults in each item.
const EXPANDED: usize = 64 * 1024 * 1024;
/// What a batch says of all its items.
const DEFAULTS: [&str; 5] = ["subject", "action", "resource", "context", "options"];

/// A batch as it was read.
pub struct Batch {
    /// Its items, each as it can be read.
    pub items: Vec<Result<Evaluation, Refusal>>,
    /// When it stops.
    pub semantic: Semantic,
    /// It is a list; without one, the body is a single evaluation.
    pub list: bool,
}

/// Reads a batch from its text: as [`evaluations`] does.
///
/// # Errors
/// 400 when the batch itself cannot be read.
pub fn read_batch(text: &[u8]) -> Result<Batch, Refusal> {
    if let Some(batch) = serde_json::from_slice(text).ok().and_then(|members| batch(&members)) {
        return Ok(batch);
    }
    let body: Value = parse_json(text)?;
    let list = body.get("evaluations").and_then(Value::as_array).is_some_and(|items| !items.is_empty());
    let (items, semantic) = evaluations(&body)?;
    Ok(Batch { items, semantic, list })
}

fn batch(whole: &Members<'_>) -> Option<Batch> {
    #[derive(Deserialize)]
    struct Options {
        #[serde(default)]
        evaluations_semantic: Semantic,
    }
    let items: Vec<Members<'_>> = serde_json::from_str(whole.get("evaluations")?.get()).ok()?;
    let defaults: usize = DEFAULTS.iter().filter_map(|name| whole.get(name)).map(|value| value.get().len()).sum();
    if items.is_empty() || too_much(items.len(), defaults) {
        return None;
    }
    let semantic = match whole.get("options") {
        Some(options) => serde_json::from_str::<Strict<Options>>(options.get()).ok()?.0.evaluations_semantic,
        None => Semantic::ExecuteAll,
    };
    let items = items.iter().map(|item| read(item.with(whole).as_bytes())).collect();
    Some(Batch { items, semantic, list: true })
}

/// Whether a batch is more than one answer is for: each item takes the defaults of the whole.
const fn too_much(items: usize, defaults: usize) -> bool {
    items > ITEMS || items.saturating_mul(defaults) > EXPANDED
}

/// Reads a batch: its items, each with the defaults of the whole merged in, and when it stops.
///
/// # Errors
/// 400 when the batch itself cannot be read; an item that cannot is an error in its place.
pub fn evaluations(body: &Value) -> Result<(Vec<Result<Evaluation, Refusal>>, Semantic), Refusal> {
    let m = object(body, "")?;
    let Some(items) = m.get("evaluations") else { return Ok((vec![evaluation(body)], Semantic::ExecuteAll)) };
    let items = items.as_array().ok_or_else(|| Refusal::malformed("/evaluations", "evaluations is a list"))?;
    if items.is_empty() {
        return Ok((vec![evaluation(body)], Semantic::ExecuteAll));
    }
    let defaults = DEFAULTS.iter().filter_map(|name| m.get(*name)).map(|value| value.to_string().len()).sum();
    if too_much(items.len(), defaults) {
        let detail = format!("a batch has at most {ITEMS} items, and {EXPANDED} bytes with the defaults in each");
        return Err(Refusal::malformed("/evaluations", detail));
    }
    let options = optional(m, "options", "")?;
    let semantic = match options.get("evaluations_semantic") {
        None => Semantic::ExecuteAll,
        Some(s) => serde_json::from_value(s.clone()).map_err(|_| {
            Refusal::malformed(
                "/options/evaluations_semantic",
                "one of execute_all, deny_on_first_deny, permit_on_first_permit",
            )
        })?,
    };
    let merged = |item: &Value| -> Result<Evaluation, Refusal> {
        let mut whole = object(item, "")?.clone();
        for name in DEFAULTS {
            if let (false, Some(default)) = (whole.contains_key(name), m.get(name)) {
                whole.insert(name.to_owned(), default.clone());
            }
        }
        evaluation(&Value::Object(whole))
    };
    Ok((items.iter().map(merged).collect(), semantic))
}

fn object<'a>(value: &'a Value, at: &str) -> Result<&'a Map<String, Value>, Refusal> {
    value.as_object().ok_or_else(|| Refusal::malformed(at, "an object is wanted"))
}

fn member<'a>(m: &'a Map<String, Value>, name: &str, at: &str) -> Result<&'a Value, Refusal> {
    m.get(name).ok_or_else(|| Refusal::malformed(format!("{at}/{name}"), format!("{name} is missing")))
}

fn text(m: &Map<String, Value>, name: &str, at: &str) -> Result<String, Refusal> {
    let value = member(m, name, at)?.as_str().filter(|t| !t.is_empty());
    value
        .map(str::to_owned)
        .ok_or_else(|| Refusal::malformed(format!("{at}/{name}"), format!("{name} is a string that is not empty")))
}

fn optional(m: &Map<String, Value>, name: &str, at: &str) -> Result<Map<String, Value>, Refusal> {
    match m.get(name) {
        None => Ok(Map::new()),
        Some(value) => Ok(object(value, &format!("{at}/{name}"))?.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn whole() -> Value {
        json!({"subject": {"type": "user", "id": "alice", "x": 1}, "action": {"name": "read"}, "resource": {"type": "doc", "id": "1"}, "extra": true})
    }

    #[test]
    fn faults_are_pointed_at() {
        assert!(evaluation(&whole()).is_ok(), "unknown members are ignored");
        let at = |change: fn(&mut Value)| {
            let mut v = whole();
            change(&mut v);
            evaluation(&v).unwrap_err().errors()[0].pointer.clone()
        };
        assert_eq!(at(|v| v["subject"] = json!("alice")), "/subject");
        assert_eq!(at(|v| v["subject"]["id"] = json!(3)), "/subject/id");
        assert_eq!(at(|v| v["resource"] = json!({"type": "doc"})), "/resource/id");
        assert_eq!(at(|v| v["action"] = json!({})), "/action/name");
        assert_eq!(at(|v| v["context"] = json!([])), "/context");
        assert_eq!(evaluation(&json!([])).unwrap_err().problem().status, 400);
    }

    /// What is read from the text is what is read from the value, faults and all.
    fn same(text: &str) {
        let said = |r: Result<Evaluation, Refusal>| {
            r.map(|mut e| {
                e.asked = serde_json::from_str::<Value>(&e.asked).unwrap().to_string();
                format!("{e:?}")
            })
            .map_err(|r| format!("{} {:?}", r.detail(), r.errors().iter().map(|f| &f.pointer).collect::<Vec<_>>()))
        };
        let slow = |text: &str| evaluation(&parse_json(text.as_bytes())?);
        assert_eq!(said(read(text.as_bytes())), said(slow(text)), "{text}");
        let all = |b: Result<Batch, Refusal>| {
            b.map(|b| (b.semantic, b.list, b.items.into_iter().map(said).collect::<Vec<_>>()))
                .map_err(|r| r.detail().to_owned())
        };
        let slow = |text: &str| {
            let body: Value = parse_json(text.as_bytes())?;
            let list = body.get("evaluations").and_then(Value::as_array).is_some_and(|a| !a.is_empty());
            evaluations(&body).map(|(items, semantic)| Batch { items, semantic, list })
        };
        assert_eq!(all(read_batch(text.as_bytes())), all(slow(text)), "{text}");
    }

    #[test]
    fn text_and_value_are_read_alike() {
        let parts = [
            r#""subject": {"type": "user", "id": "al\u0069ce", "properties": {"a": [1, {"b": null}]}}"#,
            r#""subject": {"type": "user", "id": ""}"#,
            r#""subject": {"type": "", "id": "x"}"#,
            r#""subject": {"type": "user", "id": "a\nb"}"#,
            r#""subject": null"#,
            r#""action": {"name": "read", "properties": {"soft": true}, "x": 1}"#,
            r#""action": {"name": "read", "properties": null}"#,
            r#""action": {"name": ""}"#,
            r#""resource": {"type": "doc", "id": "1", "id": "2"}"#,
            r#""resource": {"type": "doc", "id": 1}"#,
            r#""context": {"ip": "::1", "n": 1.5}"#,
            r#""context": []"#,
            r#""options": {"explain": true}"#,
            r#""options": {"evaluations_semantic": "deny_on_first_deny", "explain": 1}"#,
            r#""options": {"evaluations_semantic": 7}"#,
            r#""more": {"of": "it"}"#,
            r#""evaluations": [{"resource": {"type": "doc", "id": "2"}}, {"resource": 3}, {}, {"x": "\u0000", "context": {"c": 1}}]"#,
            r#""evaluations": [{"action": {"name": "w"}}, 7]"#,
            r#""evaluations": []"#,
            r#""evaluations": 1"#,
        ];
        for a in 0..parts.len() {
            same(&format!("{{{}}}", parts[a]));
            for b in 0..parts.len() {
                for c in [5, 8, 16] {
                    let more = [parts[0], parts[5], parts[8].split(", \"id\": \"2").next().unwrap()];
                    same(&format!("{{{}, {}, {}}}", parts[a], parts[b], parts[c]));
                    same(&format!("{{ {}, {}, {}}}, {}, {} }}", more[0], more[1], more[2], parts[a], parts[b]));
                }
            }
        }
        for text in ["", "7", "[]", "{", "{} x", "\"\"", "null"] {
            same(text);
        }
        assert_eq!(read(b"{\"subject\": \"\xff\"}").unwrap_err().problem().status, 400);
    }

    #[test]
    fn defaults_are_merged_and_a_broken_item_stays_in_its_place() {
        let mut v = whole();
        v["evaluations"] = json!([{"resource": {"type": "doc", "id": "2"}}, {"resource": 3}, {}]);
        let (items, semantic) = evaluations(&v).unwrap();
        assert_eq!(semantic, Semantic::ExecuteAll);
        assert_eq!(items[0].as_ref().unwrap().resource.name.id, "2");
        assert_eq!(items[0].as_ref().unwrap().subject.name.id, "alice");
        assert!(items[1].is_err());
        assert_eq!(items[2].as_ref().unwrap().resource.name.id, "1");
        v["options"] = json!({"evaluations_semantic": "whatever"});
        assert_eq!(evaluations(&v).unwrap_err().problem().status, 400);
    }
}
