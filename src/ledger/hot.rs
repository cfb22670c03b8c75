//! Hot commands: decided in memory on facts, and written with their entries in one statement.
//!
//! A kind of hot command says how its facts are read, and which parts it adds to the ledger's statement. What a batch changes
//! is written by that one statement, every part of which reads `FROM head`, the advance of the head row: where the head has
//! moved nothing at all is written. So the statement needs no lock to be sound, and alone it is the whole commit.

use std::any::Any;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};

use smallvec::SmallVec;
use sqlx::PgConnection;

use crate::kernel::{BoxFuture, Refusal, Timestamp};

use super::command::Failure;
use super::entry::Sealed;
use super::{Command, Entry, Tx, store};

/// What a command decides on: whatever its kind says.
pub type Fact = Arc<dyn Any + Send + Sync>;
/// Facts by their keys.
pub type Loaded = Result<Vec<(Vec<u8>, Fact)>, sqlx::Error>;
/// What a command leaves to be written.
pub type Row = Box<dyn Any + Send + Sync>;

/// A kind of hot command: how its facts are read and its rows written.
pub trait Hot: Send + Sync {
    /// Tells it from other kinds; also the kind of touch that says which of its facts changed.
    fn name(&self) -> &'static str;

    /// Its parts of the ledger's statement for rows with these columns: CTEs, each begun with a comma and reading from `head`.
    /// `{0}`, `{1}`, ... stand for its columns, arrays that are read by `unnest` and in no other way. Parts never read a table that
    /// another part writes, and no two write the same row (both measured).
    fn parts(&self, columns: &[Column]) -> &'static str;

    /// The rows as columns, in the order they were decided.
    fn columns(&self, rows: Vec<Row>) -> Vec<Column>;

    /// Reads the facts of these keys; a key that is not there has none.
    fn load<'a>(&'a self, conn: &'a mut PgConnection, keys: &'a [Vec<u8>]) -> BoxFuture<'a, Loaded>;

    /// Keys after this one of the facts there are, some thousand in order; none at the end. For a kind whose keys are to be known
    /// to be new without being read: each of its facts that comes into being is touched by its key, and never with others as a
    /// prefix.
    fn every<'a>(
        &'a self,
        _: &'a mut PgConnection,
        _: Option<&'a [u8]>,
    ) -> BoxFuture<'a, Result<Vec<Vec<u8>>, sqlx::Error>> {
        Box::pin(async { Ok(Vec::new()) })
    }
}

/// One column of a kind's rows.
pub enum Column {
    /// `bytea[]`
    Bytes(Vec<Vec<u8>>),
    /// `int8[]`
    Ints(Vec<i64>),
    /// `text[]`
    Texts(Vec<String>),
    /// `bool[]`
    Flags(Vec<bool>),
    /// `uuid[]`
    Ids(Vec<uuid::Uuid>),
}

impl Column {
    /// How many rows it is of.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Bytes(v) => v.len(),
            Self::Ints(v) => v.len(),
            Self::Texts(v) => v.len(),
            Self::Flags(v) => v.len(),
            Self::Ids(v) => v.len(),
        }
    }
}

/// The kind of a command, and the fact it decides on.
pub struct HotKey {
    /// The same value for all commands of the kind.
    pub kind: &'static dyn Hot,
    /// Which fact.
    pub key: Vec<u8>,
}

/// The kind of a command, and the facts it decides on, each once.
pub struct HotKeys {
    /// The same value for all commands of the kind.
    pub kind: &'static dyn Hot,
    /// Which facts.
    pub keys: SmallVec<[Vec<u8>; 1]>,
}

impl From<HotKey> for HotKeys {
    fn from(HotKey { kind, key }: HotKey) -> Self {
        Self { kind, keys: SmallVec::from_buf([key]) }
    }
}

/// What a hot command came to that decides on several facts.
pub struct DecidedMany<T> {
    /// What the caller is told.
    pub value: T,
    /// The entry of it; [`Entry::nothing`] where it changed nothing.
    pub entry: Entry,
    /// The facts for whoever comes next, in the order of the keys; `None`: it is gone.
    pub after: SmallVec<[Option<Fact>; 1]>,
    /// What is to be written.
    pub rows: SmallVec<[Row; 1]>,
}

impl<T> From<Decided<T>> for DecidedMany<T> {
    fn from(Decided { value, entry, after, row }: Decided<T>) -> Self {
        Self { value, entry, after: SmallVec::from_buf([after]), rows: row.into_iter().collect() }
    }
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
    pub row: Option<Row>,
}

/// The same of a job, with its entry made.
pub(super) struct Made {
    pub sealed: Sealed,
    pub after: SmallVec<[Option<Fact>; 1]>,
    pub rows: SmallVec<[Row; 1]>,
}

/// Commands that decide on nothing and leave nothing but their entry.
pub(super) struct Entries;

pub(super) static ENTRIES: Entries = Entries;

impl Hot for Entries {
    fn name(&self) -> &'static str {
        "entry"
    }

    fn parts(&self, _: &[Column]) -> &'static str {
        ""
    }

    fn columns(&self, _: Vec<Row>) -> Vec<Column> {
        Vec::new()
    }

    fn load<'a>(&'a self, _: &'a mut PgConnection, _: &'a [Vec<u8>]) -> BoxFuture<'a, Loaded> {
        Box::pin(async { Ok(Vec::new()) })
    }
}

/// Rows of several kinds, in the order they were decided.
#[derive(Default)]
pub(super) struct Rows(Vec<(&'static dyn Hot, Vec<Row>)>);

impl Rows {
    pub fn push(&mut self, kind: &'static dyn Hot, row: Row) {
        match self.0.iter_mut().find(|(k, _)| k.name() == kind.name()) {
            Some((_, rows)) => rows.push(row),
            None => self.0.push((kind, vec![row])),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many there are of a kind.
    pub fn of(&self, kind: &dyn Hot) -> usize {
        self.0.iter().find(|(k, _)| k.name() == kind.name()).map_or(0, |(_, rows)| rows.len())
    }

    /// Writes them inside a transaction that holds the head.
    pub async fn write(self, tx: &mut Tx<'_>) -> Result<(), sqlx::Error> {
        for (kind, rows) in self.0 {
            store::write_rows(tx.write(), kind, rows).await?;
        }
        Ok(())
    }

    /// The rows as columns, by kind, so that the same kinds always give the same statement.
    pub fn columns(mut self) -> Vec<(&'static dyn Hot, Vec<Column>)> {
        self.0.sort_by_key(|(kind, _)| kind.name());
        self.0.into_iter().map(|(kind, rows)| (kind, kind.columns(rows))).collect()
    }
}

/// An end, the parts by where they are, and whether it is of one row.
type Variant = (&'static str, Vec<usize>, bool);

/// The text of the ledger's statement with the parts of some kinds, made once for each end and set of parts.
#[derive(Default)]
pub(super) struct Texts(Mutex<HashMap<Variant, Arc<str>>>);

impl Texts {
    /// `head` ends where parts may follow; `first` is the number of the first free parameter; `tail` ends the statement. Of `one`
    /// row, each column is a value and no array.
    pub fn joined(
        &self,
        head: &str,
        first: usize,
        tail: &'static str,
        columns: &[(&'static dyn Hot, Vec<Column>)],
        one: bool,
    ) -> Arc<str> {
        let parts: SmallVec<[&'static str; 2]> = columns.iter().map(|(kind, columns)| kind.parts(columns)).collect();
        let mut made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = || {
            let mut text = head.to_owned();
            let mut next = first;
            for (part, (_, columns)) in parts.iter().zip(columns) {
                text.push_str(&numbered(part, next));
                next += columns.len();
            }
            text.push_str(tail);
            Arc::from(if one { of_one(&text) } else { text })
        };
        let variant = (tail, parts.iter().map(|part| part.as_ptr().addr()).collect(), one);
        made.entry(variant).or_insert_with(text).clone()
    }
}

/// A statement for one row: values in the place of arrays. PostgreSQL takes an array apart by a function with a store of its own
/// for each column, which is a sixth of such a statement (34 of 196 us, measured).
fn of_one(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("unnest(") {
        let (list, tail) = after.split_once(')').unwrap_or((after, ""));
        out.push_str(before);
        let _ = write!(out, "(VALUES ({}))", list.replace("[]", ""));
        rest = tail;
    }
    out + rest
}

/// The parts with their parameters numbered from `first`.
pub(super) fn numbered(parts: &str, first: usize) -> String {
    let mut out = String::with_capacity(parts.len());
    let mut rest = parts;
    while let Some((before, after)) = rest.split_once('{') {
        out.push_str(before);
        let (number, tail) = after.split_once('}').unwrap_or(("0", after));
        let _ = write!(out, "${}", first + number.parse::<usize>().unwrap_or(0));
        rest = tail;
    }
    out.push_str(rest);
    out
}

/// Runs a hot command alone, inside somebody's transaction: what its `apply` does. The head is locked, so it need not be asked.
///
/// # Errors
/// What the command refuses, and what the database fails at.
pub async fn alone<C: Command>(command: &mut C, tx: &mut Tx<'_>) -> Result<(C::Out, Entry), Failure> {
    let HotKey { kind, key } = command.hot().ok_or_else(|| Refusal::internal("a command that is not hot"))?;
    let found = kind.load(tx.read(), std::slice::from_ref(&key)).await?.pop();
    let at = tx.at();
    let decided = command.decide(found.as_ref().map(|(_, fact)| fact), at)?;
    if let Some(row) = decided.row {
        store::write_rows(tx.write(), kind, vec![row]).await?;
    }
    Ok((decided.value, decided.entry))
}

/// Where a hot command's entry will stand.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// Its index.
    pub index: i64,
    /// Its time.
    pub now: Timestamp,
    /// How many rows of its kind stand before it in the same entry: 0, but for operations of a transaction.
    pub position: i64,
}

#[cfg(test)]
mod tests {
    use super::{numbered, of_one};

    #[test]
    fn one_row_is_written_without_arrays() {
        let text = "INSERT INTO t SELECT c.* FROM head, unnest($1::text[],\n $2::bytea[]) AS c (a, b), unnest($3::int8[]) AS d";
        let one = "INSERT INTO t SELECT c.* FROM head, (VALUES ($1::text,\n $2::bytea)) AS c (a, b), (VALUES ($3::int8)) AS d";
        assert_eq!(of_one(text), one);
        assert_eq!(of_one(" SELECT true FROM head"), " SELECT true FROM head");
    }

    #[test]
    fn parameters_are_numbered_on() {
        assert_eq!(numbered(", a AS (SELECT {0}, {2} WHERE {0})", 14), ", a AS (SELECT $14, $16 WHERE $14)");
        assert_eq!(numbered("", 3), "");
    }
}
