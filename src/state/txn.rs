//! Transactions: conditions about keys, then one of two lists of operations, all at one index.

mod ahead;
mod doing;
mod hot;
mod nested;
mod request;
mod standings;

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::kernel::Refusal;
use crate::kernel::web::Ask;
use crate::ledger::hot::{At, DecidedMany, Fact, HotKeys};
use crate::ledger::{Command, Entry, Failure, Tx};

use super::leases::number;
use super::model::{Item, Written};
use super::range::{Found, Range};
use super::span::{Span, shown};
use super::store::txn::{self as rows, Compared};

use ahead::Ahead;
use doing::{Done, Known};
pub(super) use nested::Branches;
use nested::{Results, Step, resolve};
pub(super) use request::{PutOperation, Request, written};

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
    /// The number of the lease it hangs on; 0 if it hangs on none
    #[serde(skip)]
    Lease,
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
    /// Of several keys it must hold of each; where there is none, of what is not there.
    pub keys: Span,
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
            Target::Lease => found.lease.map_or(0, number),
            Target::Value => {
                return found.value.is_some_and(|order| self.relation.of(order.cmp(&0)));
            }
        };
        matches!(self.operand, Operand::Number(n) if self.relation.of(number.cmp(&n)))
    }
}

impl Compare {
    fn ask(&self) -> Ask {
        self.keys.ask("state:get", "state:list")
    }

    async fn holds_of_all(&self, conn: &mut PgConnection) -> Result<bool, sqlx::Error> {
        let (number, all) = rows::compared_all(conn, self).await?;
        Ok(if number > 0 { all } else { self.holds(&Compared::default()) })
    }
}

/// Whether all of them hold.
async fn hold(compares: &[Compare], conn: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let (ones, rows): (Vec<&Compare>, Vec<&Compare>) = compares.iter().partition(|c| c.keys.single().is_some());
    for compare in rows {
        if !compare.holds_of_all(conn).await? {
            return Ok(false);
        }
    }
    if ones.is_empty() {
        return Ok(true);
    }
    let keys: Vec<&[u8]> = ones.iter().map(|c| c.keys.from.as_slice()).collect();
    let operands = ones.iter().map(|c| match &c.operand {
        Operand::Bytes(b) => Some(b.clone()),
        Operand::Number(_) => None,
    });
    let found = rows::compared(conn, &keys, &operands.collect::<Vec<_>>()).await?;
    Ok(ones.iter().zip(&found).all(|(c, f)| c.holds(f)))
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
    /// `None`: the value and the type it has.
    pub value: Option<(Vec<u8>, String)>,
    pub lease: Lease,
    /// Whether what it was before is told.
    pub before: bool,
}

/// What a key is to hang on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lease {
    /// This one, or none.
    On(Option<Uuid>),
    /// The one it hangs on.
    Same,
}

/// Deletes keys.
#[derive(Clone, Debug)]
pub(super) struct Delete {
    pub keys: Span,
    /// Whether what they were is told.
    pub before: bool,
}

/// An operation.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Put(Put),
    Delete(Delete),
    Get(Range),
    /// A transaction inside this one. Only etcd's gateway can ask for it.
    Txn(Box<Branches>),
}

/// What an operation came to.
pub(super) enum Outcome<'a> {
    Put { item: &'a Item, before: Option<&'a Item> },
    Delete { keys: &'a Span, deleted: i64, previous: Option<i64>, before: &'a [Item] },
    Get { range: &'a Range, found: &'a Found },
    Txn { succeeded: bool, results: Vec<Told> },
}

/// What an operation came to, as the answer has it. Of a put, which there are most of, only what is to be said: it is written by
/// who asked, not on the writer's thread.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum Told {
    Put { put: Written },
    Other(Value),
}

impl Told {
    pub fn into_json(self) -> Value {
        match self {
            Self::Put { put } => json!({"put": put}),
            Self::Other(told) => told,
        }
    }
}

/// How it is told: of the operation, and the index its changes stand at so far.
pub(super) type Tell = fn(Outcome<'_>, i64) -> Told;

/// A transaction.
#[derive(Clone, Debug)]
pub(super) struct Txn {
    pub what: Branches,
    /// Whose leases its keys may hang on.
    pub owner: String,
    pub tell: Tell,
    /// What it looks at, if that was read before its turn.
    ahead: Option<Ahead>,
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
    pub results: Vec<Told>,
    /// Nothing was done: what was read ahead has changed.
    #[serde(skip)]
    again: bool,
}

impl Put {
    /// Whether something of what was there stays.
    fn keeps(&self) -> bool {
        self.value.is_none() || self.lease == Lease::Same
    }
}

impl Op {
    /// Its key, if it is about one.
    fn key(&self) -> Option<&[u8]> {
        match self {
            Self::Put(put) => Some(put.key.as_slice()),
            Self::Delete(delete) => delete.keys.single(),
            Self::Get(range) => range.keys.single(),
            Self::Txn(_) => None,
        }
    }

    fn reads(&self) -> bool {
        match self {
            Self::Get(_) => true,
            Self::Txn(inner) => inner.reads(),
            Self::Put(_) | Self::Delete(_) => false,
        }
    }

    /// What it asks for. To be told what a key was is to get it.
    fn asks(&self) -> Vec<Ask> {
        let read = |keys: &Span| keys.ask("state:get", "state:list");
        match self {
            Self::Put(put) => {
                let mut asks = vec![Ask::new("state:put", "Key", shown(&put.key))];
                if put.before {
                    asks.push(read(&Span::one(put.key.clone())));
                }
                asks
            }
            Self::Delete(delete) => {
                let mut asks = vec![delete.keys.ask("state:delete", "state:delete")];
                if delete.before {
                    asks.push(read(&delete.keys));
                }
                asks
            }
            Self::Get(range) => vec![read(&range.keys)],
            Self::Txn(inner) => inner.asks(),
        }
    }
}

impl Txn {
    pub fn new(what: Branches, tell: Tell) -> Self {
        Self { what, owner: String::new(), tell, ahead: None }
    }

    /// Each resource it names, in either branch, is decided on.
    pub fn asks(&self) -> Vec<Ask> {
        let all = self.what.asks();
        let mut seen = HashSet::with_capacity(all.len());
        let first: Vec<bool> = all.iter().map(|ask| seen.insert((ask.action, ask.name.as_str()))).collect();
        all.into_iter().zip(first).filter_map(|(ask, first)| first.then_some(ask)).collect()
    }

    /// Whether neither branch changes anything.
    pub fn reads(&self) -> bool {
        self.what.reads()
    }

    /// Reads, in a snapshot of `conn`, what changes nothing.
    pub async fn read(&self, conn: &mut PgConnection, index: i64) -> Result<Answered, Failure> {
        let succeeded = hold(&self.what.compares, conn).await?;
        let (steps, ops) = resolve(conn, self.what.branch(succeeded)).await?;
        let known = Known::load(conn, &ops, &self.owner, index).await?;
        let mut results = Results::new(self.tell);
        for step in steps {
            match step {
                Step::Begin(succeeded) => results.begin(succeeded),
                Step::End => results.end(index),
                Step::Op(i) => {
                    if let Op::Get(range) = ops[i] {
                        let found = known.get(conn, i, range).await?;
                        results.push(Outcome::Get { range, found: &found }, index);
                    }
                }
            }
        }
        Ok(Answered { succeeded, index, results: results.told(), again: false })
    }
}

impl Command for Txn {
    type Out = Answered;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Answered, Entry), Failure> {
        let index = tx.index();
        let succeeded = hold(&self.what.compares, tx.read()).await?;
        let (steps, ops) = resolve(tx.read(), self.what.branch(succeeded)).await?;
        let known = Known::load(tx.read(), &ops, &self.owner, index - 1).await?;
        let mut done = Done::new(known, index, self.tell);
        for step in steps {
            match step {
                Step::Begin(succeeded) => done.begin(succeeded),
                Step::End => done.end(),
                Step::Op(i) => done.op(tx, i, ops[i]).await?,
            }
        }
        done.flush(tx).await?;
        let (results, entry) = done.entry(succeeded);
        let index = if entry.is_nothing() { index - 1 } else { index };
        Ok((Answered { succeeded, index, results, again: false }, entry))
    }

    fn hot_keys(&self) -> Option<HotKeys> {
        self.decided_on()
    }

    fn decide_many(&mut self, facts: &[Option<&Fact>], at: At) -> Result<DecidedMany<Answered>, Refusal> {
        self.decided(facts, at)
    }
}
