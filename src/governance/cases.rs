//! Policy tests: cases beside a bundle. A case is a request, the whole world it is decided in, and what must come out; so it
//! comes out the same on every daemon, and without one.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::kernel::web::{EntityName, parse_json};
use crate::kernel::{Fault, Refusal, ids, problem};

use super::authzen::{self, Evaluation};
use super::engine;
use super::past::World;
use super::snapshot::{Held, REACH};

/// Faults told in one answer.
const TOLD: usize = 100;

/// A case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = PolicyCase)]
pub struct Case {
    /// What it shows
    pub name: String,
    /// What is asked
    pub request: Request,
    /// All entities there are
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub entities: Vec<Known>,
    /// Whether it must be permitted
    pub expect: bool,
    /// Policies that must be among those that determine it
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<String>,
}

/// An evaluation, as AuthZEN has it; what it does not know is an error here, or a slip of the pen would make a case say nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = PolicyCaseRequest)]
pub struct Request {
    /// Who
    pub subject: Party,
    /// Does what
    pub action: Act,
    /// To what
    pub resource: Party,
    /// What else
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    #[schema(value_type = Object)]
    pub context: Map<String, Value>,
}

/// A subject or a resource of a case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = PolicyCaseParty)]
pub struct Party {
    /// Its type
    #[serde(rename = "type")]
    pub kind: String,
    /// Its id
    pub id: String,
    /// Attributes; they win over those of the entity
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    #[schema(value_type = Object)]
    pub properties: Map<String, Value>,
}

/// An action of a case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = PolicyCaseAction)]
pub struct Act {
    /// Its name
    pub name: String,
    /// They are in the context as the record `action`
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    #[schema(value_type = Object)]
    pub properties: Map<String, Value>,
}

/// An entity of a case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = PolicyCaseEntity)]
pub struct Known {
    /// Its type
    #[serde(rename = "type")]
    pub kind: String,
    /// Its id
    pub id: String,
    /// Attributes, as Cedar's JSON has them
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    #[schema(value_type = Object)]
    pub attrs: Map<String, Value>,
    /// Entities it is in
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parents: Vec<Parent>,
}

/// An entity that another is in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = PolicyCaseParent)]
pub struct Parent {
    /// Its type
    #[serde(rename = "type")]
    pub kind: String,
    /// Its id
    pub id: String,
}

impl Known {
    fn name(&self) -> EntityName {
        EntityName { kind: self.kind.clone(), id: self.id.clone() }
    }

    fn parents(&self) -> Vec<EntityName> {
        self.parents.iter().map(|p| EntityName { kind: p.kind.clone(), id: p.id.clone() }).collect()
    }

    /// What cannot be read of it.
    fn faults(&self, at: &str) -> Vec<Fault> {
        let mut faults = Vec::new();
        let ids = std::iter::once((String::from("/id"), &self.id))
            .chain(self.parents.iter().enumerate().map(|(i, p)| (format!("/parents/{i}/id"), &p.id)));
        faults.extend(ids.filter_map(|(below, id)| Some(Fault::new(format!("{at}{below}"), ids::id_fault(id)?))));
        if let Err(e) = engine::uid(&self.name()) {
            faults.push(Fault::new(format!("{at}/type"), e.detail()));
        } else if let Err(e) = engine::entity(&self.name(), &Value::Object(self.attrs.clone()), &self.parents(), None) {
            faults.extend(beneath(at, &e));
        }
        faults
    }
}

/// What a refusal found, below this place.
fn beneath(at: &str, refusal: &Refusal) -> Vec<Fault> {
    let moved = |f: &Fault| Fault::new(format!("{at}{}", f.pointer), f.detail.clone());
    refusal.errors().iter().map(moved).collect()
}

impl Case {
    /// The question.
    ///
    /// # Errors
    /// 400 with a pointer into the request.
    pub(super) fn evaluation(&self) -> Result<Evaluation, Refusal> {
        authzen::evaluation(&json!(self.request))
    }

    /// The world it is asked in.
    pub(super) fn world(&self) -> World {
        let held = |e: &Known| {
            let held = Held::new(&e.name(), &Value::Object(e.attrs.clone()), e.parents());
            held.map(|held| (e.name(), held))
        };
        World { entities: self.entities.iter().filter_map(held).collect(), index: 0 }
    }

    /// What cannot be read.
    fn unreadable(&self, at: &str) -> Vec<Fault> {
        let mut faults = Vec::new();
        faults.extend(
            ids::id_fault(&self.name).map(|f| Fault::new(format!("{at}/name"), f.replacen("an id", "a name", 1))),
        );
        if let Err(e) = self.evaluation() {
            faults.extend(beneath(&format!("{at}/request"), &e));
        }
        let entities = self.entities.iter().enumerate();
        faults.extend(entities.flat_map(|(i, e)| e.faults(&format!("{at}/entities/{i}"))));
        faults
    }

    /// What can be read and cannot be.
    fn impossible(&self, at: &str) -> Option<Fault> {
        if self.entities.len() > REACH {
            let detail = format!("a case has at most {REACH} entities: a question can reach no more");
            return Some(Fault::new(format!("{at}/entities"), detail));
        }
        let mut seen = HashSet::new();
        if let Some((i, twice)) = self.entities.iter().enumerate().find(|(_, e)| !seen.insert(e.name())) {
            let detail = format!("{}::{:?} is there twice", twice.kind, twice.id);
            return Some(Fault::new(format!("{at}/entities/{i}"), detail));
        }
        let (i, own) = self.own_ancestor()?;
        let detail = format!("{}::{:?} would be its own ancestor", own.kind, own.id);
        Some(Fault::new(format!("{at}/entities/{i}/parents"), detail))
    }

    /// An entity that is in itself. Again and again, all are taken away that are in none of those left; of what cannot be, each
    /// is in another that is left, so that going up leads into a ring.
    fn own_ancestor(&self) -> Option<(usize, &Known)> {
        let places: HashMap<EntityName, usize> = self.entities.iter().map(Known::name).zip(0..).collect();
        let above = |e: &Known| e.parents().iter().filter_map(|p| places.get(p).copied()).collect();
        let above: Vec<Vec<usize>> = self.entities.iter().map(above).collect();
        let mut below = vec![Vec::new(); above.len()];
        for (i, parents) in above.iter().enumerate() {
            parents.iter().for_each(|parent| below[*parent].push(i));
        }
        let mut open: Vec<usize> = above.iter().map(Vec::len).collect();
        let mut free: Vec<usize> = (0..above.len()).filter(|i| open[*i] == 0).collect();
        while let Some(i) = free.pop() {
            for child in &below[i] {
                open[*child] -= 1;
                if open[*child] == 0 {
                    free.push(*child);
                }
            }
        }
        let mut at = open.iter().position(|n| *n > 0)?;
        for _ in 0..above.len() {
            at = above[at].iter().copied().find(|parent| open[*parent] > 0)?;
        }
        Some((at, self.entities.get(at)?))
    }
}

/// Reads the cases of a file: one, or a list.
///
/// # Errors
/// 400 with a pointer.
pub fn read(bytes: &[u8]) -> Result<Vec<Case>, Refusal> {
    let first = bytes.iter().find(|b| !b.is_ascii_whitespace());
    if first == Some(&b'[') { parse_json(bytes) } else { parse_json(bytes).map(|one| vec![one]) }
}

/// Looks whether cases can be put at all; `at` is where they stand.
///
/// # Errors
/// 400 with what cannot be read; 422 with what cannot be, or when they are more than `most`.
pub fn check(cases: &[Case], at: &str, most: usize) -> Result<(), Refusal> {
    let refused = |problem, mut faults: Vec<Fault>| {
        faults.truncate(TOLD);
        match faults.first() {
            None => Ok(()),
            Some(first) => {
                Err(Refusal::new(problem, format!("{}: {}", first.pointer, first.detail)).with_faults(faults))
            }
        }
    };
    if cases.len() > most {
        let detail = format!("{} cases; a bundle has at most {most} (governance.cases)", cases.len());
        return refused(&problem::UNPROCESSABLE, vec![Fault::new(at, detail)]);
    }
    let places = || cases.iter().enumerate().map(|(i, case)| (format!("{at}/{i}"), case));
    refused(&problem::MALFORMED, places().flat_map(|(at, case)| case.unreadable(&at)).take(TOLD).collect())?;
    refused(&problem::UNPROCESSABLE, places().filter_map(|(at, case)| case.impossible(&at)).take(TOLD).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(entities: &Value) -> Value {
        json!({"name": "n", "expect": true, "entities": entities, "request": {"subject": {"type": "user", "id": "a"},
            "action": {"name": "view"}, "resource": {"type": "doc", "id": "d"}}})
    }

    fn fault(case: &Value) -> (u16, String) {
        let text = case.to_string();
        let done = read(text.as_bytes()).and_then(|cases| check(&cases, "/tests", 2));
        done.map_or_else(|e| (e.problem().status, e.errors()[0].pointer.clone()), |()| (0, String::new()))
    }

    #[test]
    fn what_is_wrong_with_a_case_is_pointed_at() {
        let with = |change: fn(&mut Value)| {
            let mut v = case(&json!([{"type": "user", "id": "a", "parents": [{"type": "group", "id": "g"}]}]));
            change(&mut v);
            fault(&json!([v]))
        };
        assert_eq!(with(|_| {}).0, 0);
        for (change, status, pointer) in [
            ((|v| v["expect"] = json!("yes")) as fn(&mut Value), 400, "/0/expect"),
            (|v| v["expects"] = json!(true), 400, "/0/expects"),
            (|v| v["request"]["contxt"] = json!({}), 400, "/0/request/contxt"),
            (|v| v["entities"][0]["parents"][0]["x"] = json!(1), 400, "/0/entities/0/parents/0/x"),
            (|v| v["name"] = json!("a\nb"), 400, "/tests/0/name"),
            (|v| v["request"]["subject"]["id"] = json!(""), 400, "/tests/0/request/subject/id"),
            (|v| v["entities"][0]["type"] = json!("no type"), 400, "/tests/0/entities/0/type"),
            (|v| v["entities"][0]["attrs"] = json!({"a": null}), 400, "/tests/0/entities/0/attrs"),
            (
                |v| v["entities"][0]["parents"][0] = json!({"type": "user", "id": "a"}),
                422,
                "/tests/0/entities/0/parents",
            ),
        ] {
            assert_eq!(with(change), (status, pointer.to_owned()));
        }
        let ring = json!([{"type": "g", "id": "top"}, {"type": "g", "id": "a", "parents": [{"type": "g", "id": "b"}, {"type": "g", "id": "top"}]},
            {"type": "g", "id": "b", "parents": [{"type": "g", "id": "a"}]}, {"type": "g", "id": "c", "parents": [{"type": "g", "id": "a"}]}]);
        assert_eq!(fault(&case(&ring)), (422, "/tests/0/entities/1/parents".to_owned()));
        let twice = json!([{"type": "g", "id": "a"}, {"type": "g", "id": "a"}]);
        assert_eq!(fault(&case(&twice)), (422, "/tests/0/entities/1".to_owned()));
        let many: Vec<Value> = (0..=REACH).map(|i| json!({"type": "g", "id": i.to_string()})).collect();
        assert_eq!(fault(&case(&json!(many))), (422, "/tests/0/entities".to_owned()));
        let one = case(&json!([]));
        assert_eq!(fault(&json!([one, one, one])), (422, "/tests".to_owned()));
    }
}
