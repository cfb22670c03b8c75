//! Hot commands: decided in memory on facts that are read for a whole run at once, and written as one statement.
//!
//! A *run* is the hot commands of one kind that follow each other in a turn. Its facts are read under the lock in one statement,
//! each command decides on them in order of arrival and changes them for those behind it, and what is left of each fact is written
//! in one statement. So a batch of any size costs two round trips, and SQL sees what a run did before anything else runs.

use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;

use sqlx::PgConnection;

use crate::kernel::{BoxFuture, Refusal, Timestamp};

use super::command::Failure;
use super::entry::Sealed;
use super::{Command, Entry, Tx};

/// What a command decides on: whatever its kind says.
pub type Fact = Arc<dyn Any + Send + Sync>;
/// Facts by their keys.
pub type Loaded = Result<Vec<(Vec<u8>, Fact)>, sqlx::Error>;
/// What a command leaves to be written.
pub type Row = Box<dyn Any + Send>;

/// A kind of hot command: how its facts are read and its rows written. All of a run's in one statement each.
pub trait Hot: Send + Sync {
    /// Tells it from other kinds.
    fn name(&self) -> &'static str;
    /// Reads the facts of these keys; a key that is not there has none.
    fn load<'a>(&'a self, conn: &'a mut PgConnection, keys: &'a [Vec<u8>]) -> BoxFuture<'a, Loaded>;
    /// Writes the rows, in the order they were decided.
    fn flush<'a>(&'a self, conn: &'a mut PgConnection, rows: Vec<Row>) -> BoxFuture<'a, Result<(), sqlx::Error>>;
}

/// The kind of a command, and the fact it decides on.
pub struct HotKey {
    /// The same value for all commands of the kind.
    pub kind: &'static dyn Hot,
    /// Which fact.
    pub key: Vec<u8>,
}

/// What a hot command came to.
pub struct Decided<T> {
    /// What the caller is told.
    pub value: T,
    /// The entry of it.
    pub entry: Entry,
    /// The fact for whoever comes next; `None`: it is gone.
    pub after: Option<Fact>,
    /// What is to be written.
    pub row: Row,
}

/// The same of a job, with its entry made.
pub(super) struct Made {
    pub sealed: Sealed,
    pub after: Option<Fact>,
    pub row: Row,
}

/// The facts of a run while it is decided.
pub(super) struct Facts(HashMap<Vec<u8>, Fact>);

impl Facts {
    pub async fn load(
        conn: &mut PgConnection,
        kind: &'static dyn Hot,
        mut keys: Vec<Vec<u8>>,
    ) -> Result<Self, sqlx::Error> {
        keys.sort_unstable();
        keys.dedup();
        Ok(Self(kind.load(conn, &keys).await?.into_iter().collect()))
    }

    pub fn get(&self, key: &[u8]) -> Option<&Fact> {
        self.0.get(key)
    }

    pub fn set(&mut self, key: Vec<u8>, fact: Option<Fact>) {
        match fact {
            Some(fact) => self.0.insert(key, fact),
            None => self.0.remove(&key),
        };
    }
}

/// Runs a hot command alone, inside somebody's transaction: what its `apply` does.
///
/// # Errors
/// What the command refuses, and what the database fails at.
pub async fn alone<C: Command>(command: &mut C, tx: &mut Tx<'_>) -> Result<(C::Out, Entry), Failure> {
    let HotKey { kind, key } = command.hot().ok_or_else(|| Refusal::internal("a command that is not hot"))?;
    let found = kind.load(tx.read(), std::slice::from_ref(&key)).await?.pop();
    let at = At { index: tx.index(), now: tx.now() };
    let decided = command.decide(found.as_ref().map(|(_, fact)| fact), at)?;
    kind.flush(tx.write(), vec![decided.row]).await?;
    Ok((decided.value, decided.entry))
}

/// Where a hot command's entry will stand.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// Its index.
    pub index: i64,
    /// Its time.
    pub now: Timestamp,
}
