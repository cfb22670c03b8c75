//! AuthZEN Authorization API 1.0: what a request says, what each item of a batch means, what is answered.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::kernel::web::EntityName;
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
    /// As it was asked, for the record.
    pub asked: Value,
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
        asked: body.clone(),
    })
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
        for name in ["subject", "action", "resource", "context", "options"] {
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
