//! What of the room can be made together with changes of others.

use std::future::ready;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::kernel::web::{Ask, Caller, faulty};
use crate::kernel::{BoxFuture, Refusal};
use crate::ledger::hot::{At, Decided, Fact, HotKey};
use crate::ledger::verbs::{Decides, Operation, Step, Verb, shown};
use crate::ledger::{Failure, Tx};

use super::kv::{Delete, Put};
use super::model::{Change, Condition, key_fault};
use super::txn::{PutOperation, written};
use super::{State, store};

/// `"*"`, or indexes
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(untagged, expecting = "\"*\", an index or a list of indexes is wanted")]
#[schema(as = TxIndexes)]
enum Indexes {
    /// Any
    Any(Star),
    /// This
    One(i64),
    /// One of these
    Several(Vec<i64>),
}

#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[schema(as = TxAny)]
enum Star {
    #[serde(rename = "*")]
    Any,
}

/// Puts a key: `value` (base64) or `json`
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = TxPutKey)]
struct PutBody {
    key: String,
    /// Base64
    #[serde(default)]
    value: Option<String>,
    /// Any JSON, kept as it is written, as `application/json`
    #[serde(default, deserialize_with = "written")]
    #[schema(value_type = Value)]
    json: Option<Box<RawValue>>,
    #[serde(default)]
    content_type: Option<String>,
    /// The key goes when this lease of yours ends
    #[serde(default)]
    lease: Option<Uuid>,
    /// Only if its index is one of these; `"*"`: if it is there
    #[serde(default)]
    if_match: Option<Indexes>,
    /// Only if its index is none of these; `"*"`: if it is not there
    #[serde(default)]
    if_none_match: Option<Indexes>,
}

/// Deletes a key
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = TxDeleteKey)]
struct DeleteBody {
    key: String,
    /// Only if its index is one of these
    #[serde(default)]
    if_match: Option<Indexes>,
    /// Only if its index is none of these
    #[serde(default)]
    if_none_match: Option<Indexes>,
}

impl Indexes {
    fn condition(self, any: Condition, these: fn(Vec<i64>) -> Condition) -> Condition {
        match self {
            Self::Any(Star::Any) => any,
            Self::One(index) => these(vec![index]),
            Self::Several(indexes) => these(indexes),
        }
    }
}

fn condition(is: Option<Indexes>, is_not: Option<Indexes>) -> Result<Condition, Refusal> {
    match (is, is_not) {
        (None, None) => Ok(Condition::None),
        (Some(is), None) => Ok(is.condition(Condition::Exists, Condition::IndexIn)),
        (None, Some(is_not)) => Ok(is_not.condition(Condition::Absent, Condition::IndexNotIn)),
        (Some(_), Some(_)) => Err(Refusal::malformed("", "send if_match or if_none_match, not both")),
    }
}

/// A put, on a lease or on none.
struct PutStep {
    put: Put,
    /// What hangs on a lease is written apart.
    leased: Option<Change>,
}

impl Step for PutStep {
    fn fact(&self) -> Option<HotKey> {
        Some(self.put.standing())
    }

    fn decide<'a>(
        &'a mut self,
        conn: &'a mut PgConnection,
        fact: Option<&'a Fact>,
        at: At,
    ) -> BoxFuture<'a, Result<Decided<Value>, Failure>> {
        Box::pin(async move {
            let (decided, leased) = self.put.laid(conn, fact, at).await?;
            self.leased = leased;
            Ok(shown(decided)?)
        })
    }

    fn write<'a>(&'a mut self, tx: &'a mut Tx<'_>) -> BoxFuture<'a, Result<(), sqlx::Error>> {
        Box::pin(async move {
            match self.leased.take() {
                Some(change) => store::txn::write(tx.write(), &[change]).await,
                None => Ok(()),
            }
        })
    }
}

impl State {
    /// Its verbs.
    #[must_use]
    pub fn verbs(&self) -> Vec<Verb> {
        let (putting, deleting) = (self.clone(), self.clone());
        vec![
            Verb::new("state:put", move |caller, body| ready(putting.put_step(&caller, body))),
            Verb::new("state:delete", move |_, body| ready(deleting.delete_step(body))),
        ]
    }

    fn put_step(&self, caller: &Caller, body: PutBody) -> Result<Operation, Refusal> {
        let PutBody { key, value, json, content_type, lease, if_match, if_none_match } = body;
        let condition = condition(if_match, if_none_match)?;
        let mut faults = Vec::new();
        let put = PutOperation { key: key.clone(), value, json, content_type, lease }.check(&"", &mut faults);
        if let Some(refusal) = faulty(faults) {
            return Err(refusal);
        }
        let given = put.and_then(|put| put.value);
        let given = given.ok_or_else(|| Refusal::internal("a put without a fault and without a value"))?;
        let (value, content_type) = given;
        let ask = Ask::new("state:put", "Key", key.clone());
        let once = format!("key {key}");
        let put = Put::new(key, value, content_type, condition).leased(lease, caller.actor());
        Ok(self.counted("put", Operation::new(vec![ask], PutStep { put, leased: None }).once(once)))
    }

    fn delete_step(&self, body: DeleteBody) -> Result<Operation, Refusal> {
        let DeleteBody { key, if_match, if_none_match } = body;
        let condition = condition(if_match, if_none_match)?;
        if let Some(fault) = key_fault(&key) {
            return Err(Refusal::malformed("/key", fault));
        }
        let ask = Ask::new("state:delete", "Key", key.clone());
        let once = format!("key {key}");
        Ok(self.counted("delete", Operation::new(vec![ask], Decides(Delete { key, condition })).once(once)))
    }

    fn counted(&self, verb: &'static str, operation: Operation) -> Operation {
        let metrics = self.metrics.clone();
        operation.done(move |_| metrics.count(verb))
    }
}
