//! Transactions: conditions about keys, then one of two lists of operations, all at one index.

mod request;

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::kernel::web::Ask;
use crate::kernel::{Refusal, problem};
use crate::ledger::{Command, Entry, Failure, Touch, Tx};

use super::kv::KEY;
use super::leases;
use super::model::{Change, Item, Written, put_key};
use super::store::txn::{self as rows, Compared};
use super::store::{self, Standing, Wanted, leases as lease_rows};

pub(super) use request::{PutOperation, Request};

/// Values that the gets of a transaction give at most, bytes.
const READ_MOST: i64 = 4 * 1024 * 1024;

/// What of a key is compared
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Target {
    /// Of its last change; 0 if it is not there
    Index,
    /// Of its creation; 0 if it is not there
    CreatedIndex,
    /// How often it was changed; 0 if it is not there
    Version,
    /// Its bytes, in order of the bytes; of a key that is not there nothing holds
    Value,
    /// Whether it is there
    Exists,
}

/// How it is compared
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Relation {
    Eq,
    Ne,
    Lt,
    Gt,
}

/// What it is compared with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Operand {
    Number(i64),
    Bytes(Vec<u8>),
}

/// A condition.
#[derive(Clone, Debug)]
pub(super) struct Compare {
    pub key: Vec<u8>,
    pub target: Target,
    pub relation: Relation,
    pub operand: Operand,
}

impl Compare {
    fn holds(&self, found: &Compared) -> bool {
        let number = match self.target {
            Target::Index => found.index,
            Target::CreatedIndex => found.created_index,
            Target::Version => found.version,
            Target::Exists => i64::from(found.index > 0),
            Target::Value => {
                return found.value.is_some_and(|order| self.relation.of(order.cmp(&0)));
            }
        };
        matches!(self.operand, Operand::Number(n) if self.relation.of(number.cmp(&n)))
    }
}

impl Relation {
    fn of(self, order: std::cmp::Ordering) -> bool {
        match self {
            Self::Eq => order.is_eq(),
            Self::Ne => order.is_ne(),
            Self::Lt => order.is_lt(),
            Self::Gt => order.is_gt(),
        }
    }
}

/// Puts a value.
#[derive(Clone, Debug)]
pub(super) struct Put {
    pub key: Vec<u8>,
    pub value: Vec<u8>,
    pub content_type: String,
    pub lease: Option<Uuid>,
}

/// Gets a key, or keys under a prefix.
#[derive(Clone, Debug)]
pub(super) struct Get {
    pub name: Vec<u8>,
    pub prefix: bool,
    pub values: bool,
    pub limit: i64,
}

/// An operation.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Put(Put),
    Delete(Vec<u8>),
    DeletePrefix(Vec<u8>),
    Get(Get),
}

/// A transaction.
#[derive(Clone, Debug)]
pub(super) struct Txn {
    pub compares: Vec<Compare>,
    pub then: Vec<Op>,
    pub otherwise: Vec<Op>,
    /// Whose leases its keys may hang on.
    pub owner: String,
}

/// What a transaction came to
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = TxnAnswer)]
pub(super) struct Answered {
    /// Whether all conditions held: `then` was done, otherwise `else`
    pub succeeded: bool,
    /// The index it got; of one that changed nothing, the index it is of
    pub index: i64,
    /// Of each operation, in order: `{"put": ...}`, `{"delete": ...}`, `{"get": ...}`
    #[schema(value_type = Vec<Object>)]
    pub results: Vec<Value>,
}

fn text(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

impl Txn {
    /// Each resource it names, in either branch, is decided on.
    pub fn asks(&self) -> Vec<Ask> {
        let mut asks = HashMap::new();
        let compared = self.compares.iter().map(|c| ("state:get", &c.key));
        let done = self.then.iter().chain(&self.otherwise).map(|op| match op {
            Op::Put(put) => ("state:put", &put.key),
            Op::Delete(name) | Op::DeletePrefix(name) => ("state:delete", name),
            Op::Get(get) => (if get.prefix { "state:list" } else { "state:get" }, &get.name),
        });
        let mut order = Vec::new();
        for (action, name) in compared.chain(done) {
            if asks.insert((action, name), ()).is_none() {
                order.push(Ask::new(action, "Key", text(name)));
            }
        }
        order
    }

    /// Whether neither branch changes anything.
    pub fn reads(&self) -> bool {
        self.then.iter().chain(&self.otherwise).all(|op| matches!(op, Op::Get(_)))
    }

    async fn succeeds(&self, conn: &mut PgConnection) -> Result<bool, sqlx::Error> {
        if self.compares.is_empty() {
            return Ok(true);
        }
        let keys: Vec<&[u8]> = self.compares.iter().map(|c| c.key.as_slice()).collect();
        let operands = self.compares.iter().map(|c| match &c.operand {
            Operand::Bytes(b) => Some(b.clone()),
            Operand::Number(_) => None,
        });
        let found = rows::compared(conn, &keys, &operands.collect::<Vec<_>>()).await?;
        Ok(self.compares.iter().zip(&found).all(|(c, f)| c.holds(f)))
    }

    fn branch(&self, succeeded: bool) -> &[Op] {
        if succeeded { &self.then } else { &self.otherwise }
    }

    /// Reads, in a snapshot of `conn`, what changes nothing.
    pub async fn read(&self, conn: &mut PgConnection, index: i64) -> Result<Answered, Failure> {
        let succeeded = self.succeeds(conn).await?;
        let branch = self.branch(succeeded);
        light(conn, branch).await?;
        let mut results = Vec::new();
        for op in branch {
            if let Op::Get(get) = op {
                results.push(get.read(conn).await?);
            }
        }
        Ok(Answered { succeeded, index, results })
    }
}

/// Refuses a branch whose gets would give too much at once.
async fn light(conn: &mut PgConnection, branch: &[Op]) -> Result<(), Failure> {
    let mut bytes = 0;
    for op in branch {
        if let Op::Get(get) = op
            && get.values
        {
            bytes += rows::weight(conn, &get.name, get.limit).await?;
        }
    }
    if bytes > READ_MOST {
        let detail =
            format!("the gets of this transaction would give {bytes} bytes of values; {READ_MOST} are the most");
        return Err(Refusal::new(&problem::UNPROCESSABLE, detail).into());
    }
    Ok(())
}

impl Get {
    async fn read(&self, conn: &mut PgConnection) -> Result<Value, sqlx::Error> {
        let (items, more) = if self.prefix {
            let (limit, values) = (self.limit, self.values);
            let wanted = Wanted { prefix: &self.name, after: None, limit, values, bytes: store::PAGE_BYTES };
            let found = store::list(conn, &wanted).await?;
            (found.items, found.more)
        } else {
            (store::current(conn, &self.name).await?.into_iter().collect(), false)
        };
        let items: Vec<_> = items.iter().map(|i| i.to_json(self.values)).collect();
        Ok(json!({"get": {"items": items, "more": more}}))
    }
}

/// What a transaction has done so far.
#[derive(Default)]
struct Done {
    results: Vec<Value>,
    /// Decided and not yet written.
    pending: Vec<Change>,
    touched: Vec<Touch>,
    put: Vec<Value>,
    deleted: Vec<Value>,
    prefixes: Map<String, Value>,
}

impl Done {
    fn put(&mut self, put: &Put, index: i64, was: Option<&Standing>) {
        let (created_index, version) = was.map_or((index, 1), |w| (w.created_index, w.version + 1));
        let item = Item {
            key: put.key.clone(),
            index,
            created_index,
            version,
            content_type: put.content_type.clone(),
            value: put.value.clone(),
            lease: put.lease,
        };
        let lease = put.lease.map(|l| l.to_string());
        let written = Written { key: text(&put.key), index, created_index, version, lease };
        self.results.push(json!({"put": written}));
        self.touched.push(Touch::key(KEY, put.key.clone()));
        self.put.push(text(&put.key).into());
        self.pending.push(Change { item, deleted: false, previous: was.map_or(0, |w| w.index) });
    }

    fn delete(&mut self, key: &[u8], index: i64, was: Option<&Standing>) {
        let mut answer = Map::new();
        put_key(&mut answer, key);
        answer.insert("deleted".into(), i64::from(was.is_some()).into());
        if let Some(was) = was {
            answer.insert("previous_index".into(), was.index.into());
            self.touched.push(Touch::key(KEY, key));
            self.deleted.push(text(key).into());
            self.pending.push(Change::deletion(key.to_vec(), index, was.created_index, was.index));
        }
        self.results.push(json!({"delete": answer}));
    }

    async fn flush(&mut self, tx: &mut Tx<'_>) -> Result<(), sqlx::Error> {
        if !self.pending.is_empty() {
            rows::write(tx.write(), &std::mem::take(&mut self.pending)).await?;
        }
        Ok(())
    }

    fn entry(self, succeeded: bool) -> (Vec<Value>, Entry) {
        if self.touched.is_empty() {
            return (self.results, Entry::nothing());
        }
        let one = match (&self.put[..], &self.deleted[..], self.prefixes.is_empty()) {
            ([key], [], true) | ([], [key], true) => format!("key/{}", key.as_str().unwrap_or_default()),
            _ => "keys".to_owned(),
        };
        let mut entry = Entry::ok("state:txn", one).change("succeeded", succeeded);
        for (name, keys) in [("put", self.put), ("deleted", self.deleted)] {
            if !keys.is_empty() {
                entry = entry.change(name, keys);
            }
        }
        if !self.prefixes.is_empty() {
            entry = entry.change("deleted_prefixes", self.prefixes);
        }
        (self.results, self.touched.into_iter().fold(entry, Entry::touch))
    }
}

impl Command for Txn {
    type Out = Answered;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Answered, Entry), Failure> {
        let index = tx.index();
        let succeeded = self.succeeds(tx.read()).await?;
        let branch = self.branch(succeeded);
        light(tx.read(), branch).await?;
        let wanted: Vec<Uuid> =
            branch.iter().filter_map(|op| if let Op::Put(put) = op { put.lease } else { None }).collect();
        if !wanted.is_empty() {
            let there = lease_rows::owned(tx.read(), &wanted, &self.owner).await?;
            if let Some(missing) = wanted.iter().find(|id| !there.contains(id)) {
                return Err(leases::absent(*missing).into());
            }
        }
        let keys: Vec<Vec<u8>> = branch
            .iter()
            .filter_map(|op| match op {
                Op::Put(put) => Some(put.key.clone()),
                Op::Delete(key) => Some(key.clone()),
                Op::DeletePrefix(_) | Op::Get(_) => None,
            })
            .collect();
        let standings: HashMap<Vec<u8>, Standing> = store::standings(tx.read(), &keys).await?.into_iter().collect();
        let mut done = Done::default();
        for op in branch {
            match op {
                Op::Put(put) => done.put(put, index, standings.get(&put.key)),
                Op::Delete(key) => done.delete(key, index, standings.get(key)),
                Op::DeletePrefix(prefix) => {
                    let mut deleted = 0;
                    if rows::any(tx.read(), prefix).await? {
                        deleted = rows::delete_prefix(tx.write(), prefix, index).await?;
                        done.touched.push(Touch::prefix(KEY, prefix.clone()));
                        done.prefixes.insert(text(prefix), deleted.into());
                    }
                    done.results.push(json!({"delete": {"prefix": text(prefix), "deleted": deleted}}));
                }
                Op::Get(get) => {
                    // It sees what those before it did.
                    done.flush(tx).await?;
                    done.results.push(get.read(tx.read()).await?);
                }
            }
        }
        done.flush(tx).await?;
        let (results, entry) = done.entry(succeeded);
        let index = if entry.is_nothing() { index - 1 } else { index };
        Ok((Answered { succeeded, index, results }, entry))
    }
}
