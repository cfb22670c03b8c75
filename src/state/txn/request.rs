//! A transaction as it is sent, and what is wrong with it.

use std::fmt::Display;

use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::kernel::crypto::from_base64;
use crate::kernel::web::faulty;
use crate::kernel::{Fault, Refusal};

use super::super::model::{Written, key_fault, prefix_fault, put_key};
use super::super::range::Range;
use super::super::span::{Span, shown};
use super::{Branches, Compare, Delete, Lease, Op, Operand, Outcome, Put, Relation, Target, Told, Txn};

/// Conditions, and operations of a branch, at most.
pub(super) const MOST: usize = 128;
/// Keys that one get gives at most.
const GET_MOST: i64 = 1000;

/// If all conditions hold, the operations of `then` are done, else those of `else`: all at one index, or none
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Txn)]
pub(in crate::state) struct Request {
    /// What must hold, all of it; at most 128
    #[serde(default, rename = "if")]
    conditions: Vec<Condition>,
    /// Done if it holds, in order; at most 128
    #[serde(default)]
    then: Vec<Operation>,
    /// Done if it does not
    #[serde(default, rename = "else")]
    otherwise: Vec<Operation>,
}

/// What must hold of a key
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = TxnCondition)]
struct Condition {
    key: String,
    target: Target,
    op: Relation,
    /// Base64 for `value`, `true` or `false` for `exists`, a number for the others
    #[serde(default)]
    operand: Value,
}

/// One of `put`, `delete`, `get`
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = TxnOperation)]
enum Operation {
    Put(PutOperation),
    Delete(DeleteOperation),
    Get(GetOperation),
}

/// `value` (base64) or `json`
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = TxnPut)]
pub(in crate::state) struct PutOperation {
    pub key: String,
    /// Base64
    #[serde(default)]
    pub value: Option<String>,
    /// Any JSON, kept as it is written, as `application/json`
    #[serde(default, deserialize_with = "written")]
    #[schema(value_type = Value)]
    pub json: Option<Box<RawValue>>,
    #[serde(default)]
    pub content_type: Option<String>,
    /// The key goes when this lease ends
    #[serde(default)]
    pub lease: Option<Uuid>,
}

/// What is written, `null` too: only what is missing is none.
pub(in crate::state) fn written<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Box<RawValue>>, D::Error> {
    Deserialize::deserialize(deserializer).map(Some)
}

/// A key, or all under a prefix
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = TxnDelete)]
struct DeleteOperation {
    #[serde(default)]
    key: Option<String>,
    #[serde(default)]
    prefix: Option<String>,
}

/// A key, or those under a prefix
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = TxnGet)]
struct GetOperation {
    #[serde(default)]
    key: Option<String>,
    #[serde(default)]
    prefix: Option<String>,
    #[serde(default)]
    keys_only: bool,
    /// Keys under the prefix at most, 1-1000
    #[serde(default)]
    limit: Option<i64>,
}

impl Request {
    /// The transaction, or all that is wrong with it.
    pub fn check(self) -> Result<Txn, Refusal> {
        let mut faults = Vec::new();
        for (name, n) in [("if", self.conditions.len()), ("then", self.then.len()), ("else", self.otherwise.len())] {
            if n > MOST {
                faults.push(Fault::new(format!("/{name}"), format!("at most {MOST}, these are {n}")));
            }
        }
        let compares = self.conditions.into_iter().enumerate().filter_map(|(i, c)| c.check(i, &mut faults)).collect();
        let (then, otherwise) = (branch("then", self.then, &mut faults), branch("else", self.otherwise, &mut faults));
        let txn = Txn::new(Branches { compares, then, otherwise }, tell);
        faulty(faults).map_or(Ok(txn), Err)
    }
}

impl Condition {
    fn check(self, i: usize, faults: &mut Vec<Fault>) -> Option<Compare> {
        if let Some(fault) = key_fault(&self.key) {
            faults.push(Fault::new(format!("/if/{i}/key"), fault));
        }
        let ordered = matches!(self.op, Relation::Lt | Relation::Gt);
        let operand = match self.target {
            Target::Exists if ordered => {
                faults.push(Fault::new(format!("/if/{i}/op"), "whether a key exists is eq or ne"));
                return None;
            }
            Target::Exists => self.operand.as_bool().map(|b| Operand::Number(i64::from(b))),
            Target::Value => self.operand.as_str().and_then(from_base64).map(Operand::Bytes),
            Target::Index | Target::CreatedIndex | Target::Version | Target::Lease => {
                self.operand.as_i64().map(Operand::Number)
            }
        };
        if operand.is_none() {
            let wanted = match self.target {
                Target::Exists => "true or false is wanted",
                Target::Value => "base64 is wanted",
                _ => "a whole number is wanted",
            };
            faults.push(Fault::new(format!("/if/{i}/operand"), wanted));
        }
        Some(Compare { keys: Span::one(self.key), target: self.target, relation: self.op, operand: operand? })
    }
}

/// The operations of a branch. No key is changed twice: what would stand at its end, and what history would say of the index,
/// would not be one thing.
fn branch(name: &str, operations: Vec<Operation>, faults: &mut Vec<Fault>) -> Vec<Op> {
    let mut ops: Vec<Op> = Vec::with_capacity(operations.len());
    for (i, operation) in operations.into_iter().enumerate() {
        let Some(op) = operation.check(&format_args!("/{name}/{i}"), faults) else { continue };
        if ops.iter().any(|before| clash(before, &op)) {
            let detail = "a key is changed at most once in a transaction";
            faults.push(Fault::new(format!("/{name}/{i}"), detail));
        }
        ops.push(op);
    }
    ops
}

fn clash(a: &Op, b: &Op) -> bool {
    match (a, b) {
        (Op::Get(_) | Op::Txn(_), _) | (_, Op::Get(_) | Op::Txn(_)) => false,
        (Op::Put(a), Op::Put(b)) => a.key == b.key,
        (Op::Put(put), Op::Delete(delete)) | (Op::Delete(delete), Op::Put(put)) => delete.keys.contains(&put.key),
        (Op::Delete(a), Op::Delete(b)) => a.keys.overlaps(&b.keys),
    }
}

/// A key or a prefix: exactly one of them.
fn which(key: Option<String>, prefix: Option<String>, at: &dyn Display, faults: &mut Vec<Fault>) -> Option<Span> {
    let fault = match (&key, &prefix) {
        (Some(key), None) => key_fault(key).map(|f| (format!("{at}/key"), f)),
        (None, Some(prefix)) => prefix_fault(prefix).map(|f| (format!("{at}/prefix"), f)),
        _ => Some((at.to_string(), "`key` or `prefix` is wanted, one of them")),
    };
    if let Some((pointer, fault)) = fault {
        faults.push(Fault::new(pointer, fault));
        return None;
    }
    key.map(Span::one).or(prefix.map(Span::prefix))
}

impl Operation {
    fn check(self, at: &dyn Display, faults: &mut Vec<Fault>) -> Option<Op> {
        match self {
            Self::Put(put) => put.check(&format_args!("{at}/put"), faults).map(Op::Put),
            Self::Delete(delete) => {
                let keys = which(delete.key, delete.prefix, &format_args!("{at}/delete"), faults)?;
                Some(Op::Delete(Delete { keys, before: false }))
            }
            Self::Get(get) => {
                let limit = get.limit.unwrap_or(GET_MOST);
                if !(1..=GET_MOST).contains(&limit) {
                    faults.push(Fault::new(format!("{at}/get/limit"), "limit is from 1 to 1000"));
                }
                let keys = which(get.key, get.prefix, &format_args!("{at}/get"), faults)?;
                Some(Op::Get(Range { limit, values: !get.keys_only, ..Range::of(keys) }))
            }
        }
    }
}

impl PutOperation {
    pub fn check(self, at: &dyn Display, faults: &mut Vec<Fault>) -> Option<Put> {
        if let Some(fault) = key_fault(&self.key) {
            faults.push(Fault::new(format!("{at}/key"), fault));
        }
        let fits = |t: &String| t.len() <= 256 && t.bytes().all(|b| (0x20..0x7f).contains(&b));
        if self.content_type.as_ref().is_some_and(|t| !fits(t)) {
            faults.push(Fault::new(format!("{at}/content_type"), "at most 256 visible ASCII characters"));
        }
        let (value, default) = match (self.value, self.json) {
            (Some(text), None) => {
                let value = from_base64(&text);
                if value.is_none() {
                    faults.push(Fault::new(format!("{at}/value"), "base64 is wanted"));
                }
                (value?, "application/octet-stream")
            }
            (None, Some(json)) => (json.get().as_bytes().to_vec(), "application/json"),
            _ => {
                faults.push(Fault::new(at.to_string(), "`value` or `json` is wanted, one of them"));
                return None;
            }
        };
        let content_type = self.content_type.unwrap_or_else(|| default.to_owned());
        let (value, lease) = (Some((value, content_type)), Lease::On(self.lease));
        Some(Put { key: self.key.into_bytes(), value, lease, before: false })
    }
}

/// What an operation came to, as the answer has it.
fn tell(outcome: Outcome<'_>, _: i64) -> Told {
    match outcome {
        Outcome::Put { item, .. } => {
            let (key, lease) = (shown(&item.key), item.lease.map(|l| l.to_string()));
            let (index, created_index, version) = (item.index, item.created_index, item.version);
            Told::Put { put: Written { key, index, created_index, version, lease } }
        }
        Outcome::Delete { keys, deleted, previous, .. } => {
            let mut answer = Map::new();
            match keys.single() {
                Some(key) => put_key(&mut answer, key),
                None => drop(answer.insert("prefix".into(), shown(&keys.from).into())),
            }
            answer.insert("deleted".into(), deleted.into());
            if let Some(previous) = previous {
                answer.insert("previous_index".into(), previous.into());
            }
            Told::Other(json!({"delete": answer}))
        }
        Outcome::Get { range, found } => {
            let items: Vec<_> = found.items.iter().map(|i| i.to_json(range.values)).collect();
            Told::Other(json!({"get": {"items": items, "more": found.more}}))
        }
        Outcome::Txn { succeeded, results } => {
            Told::Other(json!({"txn": {"succeeded": succeeded, "results": results}}))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(body: Value) -> Result<Txn, Vec<String>> {
        let request: Request = crate::kernel::web::parse_json(&serde_json::to_vec(&body).unwrap())
            .map_err(|r| r.errors().iter().map(|e| e.pointer.clone()).collect::<Vec<_>>())?;
        request.check().map_err(|r| r.errors().iter().map(|e| e.pointer.clone()).collect())
    }

    #[test]
    fn what_is_wrong_is_pointed_at() {
        for (body, at) in [
            (json!({"if": [{"key": "a//b", "target": "index", "op": "eq", "operand": 1}]}), "/if/0/key"),
            (json!({"if": [{"key": "a", "target": "index", "op": "eq", "operand": "1"}]}), "/if/0/operand"),
            (json!({"if": [{"key": "a", "target": "value", "op": "eq", "operand": "%"}]}), "/if/0/operand"),
            (json!({"if": [{"key": "a", "target": "value", "op": "eq"}]}), "/if/0/operand"),
            (json!({"if": [{"key": "a", "target": "exists", "op": "lt", "operand": true}]}), "/if/0/op"),
            (json!({"if": [{"key": "a", "target": "size", "op": "lt", "operand": 1}]}), "/if/0/target"),
            (json!({"then": [{"put": {"key": "a"}}]}), "/then/0/put"),
            (json!({"then": [{"put": {"key": "a", "value": "", "json": 1}}]}), "/then/0/put"),
            (json!({"then": [{"put": {"key": "a", "json": 1, "content_type": "\n"}}]}), "/then/0/put/content_type"),
            (json!({"else": [{"delete": {}}]}), "/else/0/delete"),
            (json!({"else": [{"delete": {"key": "a", "prefix": "a"}}]}), "/else/0/delete"),
            (json!({"else": [{"get": {"prefix": "a b", "limit": 1}}]}), "/else/0/get/prefix"),
            (json!({"else": [{"get": {"prefix": "a", "limit": 0}}]}), "/else/0/get/limit"),
            (json!({"then": vec![json!({"get": {"key": "a"}}); 129]}), "/then"),
            (json!({"then": [{"put": {"key": "a", "json": 1}}, {"delete": {"key": "a"}}]}), "/then/1"),
            (json!({"then": [{"delete": {"prefix": "a"}}, {"put": {"key": "a/b", "json": 1}}]}), "/then/1"),
            (json!({"then": [{"delete": {"prefix": "a/b"}}, {"delete": {"prefix": "a"}}]}), "/then/1"),
        ] {
            assert_eq!(check(body.clone()).err().unwrap_or_default().first().map(String::as_str), Some(at), "{body}");
        }
        assert!(check(json!({"then": [{"nope": {}}]})).is_err());
        assert!(check(json!({"then": [{"put": {"key": "a", "json": 1}, "delete": {"key": "b"}}]})).is_err());
    }

    #[test]
    fn json_is_kept_as_it_was_written() {
        let body = br#"{"then": [{"put": {"key": "a", "json": {"b": 1.50, "a":  null}}}, {"put": {"key": "b", "json": null}}]}"#;
        let txn = crate::kernel::web::parse_json::<Request>(body).unwrap().check().unwrap();
        let Op::Put(put) = &txn.what.then[0] else { panic!("a put") };
        let (value, content_type) = put.value.clone().unwrap();
        assert_eq!(value, br#"{"b": 1.50, "a":  null}"#);
        assert_eq!(content_type, "application/json");
        let Op::Put(put) = &txn.what.then[1] else { panic!("a put") };
        assert_eq!(put.value.as_ref().unwrap().0, b"null");
    }
}
