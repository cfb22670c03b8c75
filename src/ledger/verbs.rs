//! Verbs: changes that have a name and come as data, so that several of them, of any rooms, can be made as one.
//!
//! Each room registers its own at boot. A verb reads what is sent of it into an [`Operation`]: what it asks, and a [`Step`] of
//! the command that makes all of them ([`super::together`]).

use std::collections::HashSet;
use std::future::ready;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::value::RawValue;
use sqlx::PgConnection;
use utoipa::ToSchema;
use utoipa::openapi::{RefOr, Schema};

use crate::kernel::web::{Ask, Caller, faulty, parse_json};
use crate::kernel::{BoxFuture, Fault, Refusal, problem};

use super::hot::{At, Decided, Fact, HotKey};
use super::{Command, Failure, Tx};

/// Operations of a transaction at most.
pub const MOST: usize = 128;

/// One operation of several, under the lock of the head. All are decided, in order, before the first is written; so it can be
/// run again from the start, and one that refuses leaves nothing of the others.
pub trait Step: Send + 'static {
    /// The fact it decides on, if there is one that operations before it may have changed.
    fn fact(&self) -> Option<HotKey>;

    /// Decides, on the fact as the operations before it left it, and on rows that none of them changes. What it yields besides
    /// a row, [`write`](Self::write) writes.
    fn decide<'a>(
        &'a mut self,
        conn: &'a mut PgConnection,
        fact: Option<&'a Fact>,
        at: At,
    ) -> BoxFuture<'a, Result<Decided<Value>, Failure>>;

    /// Writes what was decided and is no row of its kind. It may not refuse.
    fn write<'a>(&'a mut self, _: &'a mut Tx<'_>) -> BoxFuture<'a, Result<(), sqlx::Error>> {
        Box::pin(ready(Ok(())))
    }
}

/// An operation that was read and not yet decided.
pub struct Operation {
    /// What it asks; decided as on its own route.
    pub asks: Vec<Ask>,
    /// What at most one operation of a transaction may change: what history says of an index must be one thing.
    pub once: Option<String>,
    /// How it is made.
    pub step: Box<dyn Step>,
    /// Called with its result once it was made, for whoever counts.
    pub done: Box<dyn FnOnce(&Value) + Send>,
}

impl Operation {
    /// One that may be there more than once, and is counted by nobody.
    pub fn new(asks: Vec<Ask>, step: impl Step) -> Self {
        Self { asks, once: None, step: Box::new(step), done: Box::new(|_| {}) }
    }

    /// Changes what no other operation of the transaction may.
    #[must_use]
    pub fn once(mut self, what: String) -> Self {
        self.once = Some(what);
        self
    }

    /// Calls `done` with its result once it was made.
    #[must_use]
    pub fn done(mut self, done: impl FnOnce(&Value) + Send + 'static) -> Self {
        self.done = Box::new(done);
        self
    }
}

/// A hot command as a step: the same decision, on the same fact.
pub struct Decides<C>(pub C);

impl<C: Command> Step for Decides<C> {
    fn fact(&self) -> Option<HotKey> {
        self.0.hot()
    }

    fn decide<'a>(
        &'a mut self,
        _: &'a mut PgConnection,
        fact: Option<&'a Fact>,
        at: At,
    ) -> BoxFuture<'a, Result<Decided<Value>, Failure>> {
        let decided = self.0.decide(fact, at).and_then(shown).map_err(Failure::from);
        Box::pin(ready(decided))
    }
}

/// What was decided, with its value as it is shown.
///
/// # Errors
/// When it has none: our fault.
pub fn shown<T: Serialize>(decided: Decided<T>) -> Result<Decided<Value>, Refusal> {
    let Decided { value, entry, after, row } = decided;
    let value = serde_json::to_value(value).map_err(Refusal::internal)?;
    Ok(Decided { value, entry, after, row })
}

type Read = Box<dyn Fn(Caller, &RawValue) -> BoxFuture<'static, Result<Operation, Refusal>> + Send + Sync>;

/// A change that has a name: the action it is decided as.
pub struct Verb {
    name: &'static str,
    read: Read,
    schema: RefOr<Schema>,
    schemas: Vec<(String, RefOr<Schema>)>,
}

impl Verb {
    /// One whose fields are `B`'s, made into an operation by `read`.
    pub fn new<B, F, R>(name: &'static str, read: F) -> Self
    where
        B: DeserializeOwned + ToSchema + Send + 'static,
        F: Fn(Caller, B) -> R + Send + Sync + 'static,
        R: Future<Output = Result<Operation, Refusal>> + Send + 'static,
    {
        let mut schemas = Vec::new();
        B::schemas(&mut schemas);
        let read: Read = Box::new(move |caller, body| match parse_json::<B>(body.get().as_bytes()) {
            Ok(body) => Box::pin(read(caller, body)),
            Err(refusal) => Box::pin(ready(Err(refusal))),
        });
        Self { name, read, schema: B::schema(), schemas }
    }

    /// As which action it is decided.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The schema of its fields, and those that it refers to.
    #[must_use]
    pub fn schema(&self) -> (&RefOr<Schema>, &[(String, RefOr<Schema>)]) {
        (&self.schema, &self.schemas)
    }
}

/// The verbs of all rooms.
pub struct Verbs(Vec<Verb>);

impl Verbs {
    /// These, in order of their names.
    #[must_use]
    pub fn of(rooms: impl IntoIterator<Item = Vec<Verb>>) -> Self {
        let mut all: Vec<Verb> = rooms.into_iter().flatten().collect();
        all.sort_by_key(|v| v.name);
        Self(all)
    }

    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = &Verb> {
        self.0.iter()
    }

    /// Reads the operations of a transaction: of each its verb and its fields.
    ///
    /// # Errors
    /// 400 with all that is wrong with them; what a room refuses before it may be asked.
    pub async fn read(&self, caller: &Caller, sent: &[(String, Box<RawValue>)]) -> Result<Vec<Operation>, Refusal> {
        if !(1..=MOST).contains(&sent.len()) {
            let detail = format!("a transaction has 1 to {MOST} operations, this one {}", sent.len());
            return Err(Refusal::malformed("/operations", detail));
        }
        let (mut operations, mut faults, mut changed) = (Vec::new(), Vec::new(), HashSet::new());
        for (i, (name, fields)) in sent.iter().enumerate() {
            let at = format!("/operations/{i}/{}", name.replace('~', "~0").replace('/', "~1"));
            let Some(verb) = self.iter().find(|v| v.name == name) else {
                let known: Vec<&str> = self.iter().map(|v| v.name).collect();
                faults.push(Fault::new(at, format!("no operation is called so; there are {}", known.join(", "))));
                continue;
            };
            match (verb.read)(caller.clone(), fields).await {
                Ok(operation) => {
                    if let Some(what) = operation.once.clone().filter(|what| !changed.insert(what.clone())) {
                        faults.push(Fault::new(at, format!("{what} is changed at most once in a transaction")));
                    }
                    operations.push(operation);
                }
                Err(refusal) if refusal.problem() == &problem::MALFORMED => {
                    faults.extend(refusal.under(&at).errors().iter().cloned());
                }
                Err(refusal) => return Err(refusal.under(&at)),
            }
        }
        faulty(faults).map_or(Ok(operations), Err)
    }
}
