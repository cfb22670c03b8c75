//! What a room hands to the ledger: a command that changes rows and says what it changed, in one transaction.

use std::future::Future;

use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::kernel::{BoxFuture, Refusal, Timestamp};

use super::Entry;
use super::hot::{At, Decided, DecidedMany, ENTRIES, Fact, HotKey, HotKeys};

/// A change of one room. It decides on rows it reads under the head's lock, writes them, and yields the entry of it.
///
/// It refuses **before its first write**, and it can be run again from the start: when a neighbour in its batch fails, or a
/// connection breaks, the transaction is rolled back and the command runs anew.
pub trait Command: Send + 'static {
    /// What the caller is told. It is stored, sealed, if the request has an `Idempotency-Key`.
    type Out: Serialize + DeserializeOwned + Send + 'static;

    /// Makes the change; one that comes to an answer and has changed nothing yields [`Entry::nothing`].
    fn apply<'a>(
        &'a mut self,
        tx: &'a mut Tx<'_>,
    ) -> impl Future<Output = Result<(Self::Out, Entry), Failure>> + Send + 'a;

    /// The fact it decides on, if it is hot: then [`decide`](Self::decide) is called instead of `apply`, and `apply` is
    /// [`alone`](super::hot::alone).
    fn hot(&self) -> Option<HotKey> {
        None
    }

    /// Decides in memory: a pure function of the fact and of where its entry will stand.
    ///
    /// # Errors
    /// What it refuses.
    fn decide(&mut self, _: Option<&Fact>, _: At) -> Result<Decided<Self::Out>, Refusal> {
        Err(Refusal::internal("a command that is not hot was asked to decide"))
    }

    /// The facts it decides on, if it is hot: one, unless it says otherwise.
    fn hot_keys(&self) -> Option<HotKeys> {
        self.hot().map(HotKeys::from)
    }

    /// Decides on these facts, in the order of `hot_keys`: by [`decide`](Self::decide), where it is one.
    ///
    /// # Errors
    /// What it refuses.
    fn decide_many(&mut self, facts: &[Option<&Fact>], at: At) -> Result<DecidedMany<Self::Out>, Refusal> {
        match facts {
            [fact] => self.decide(*fact, at).map(DecidedMany::from),
            _ => Err(Refusal::internal("a command of one fact was asked to decide on several")),
        }
    }

    /// Whether it is made although whoever asked for it is gone before its turn comes. What is asked for is not; what has
    /// happened is recorded.
    fn has_happened(&self) -> bool {
        false
    }
}

/// Why a command did not happen.
#[derive(Debug)]
pub enum Failure {
    /// It was refused; its neighbours in the batch go on.
    Refused(Refusal),
    /// The database failed; the batch is rolled back and tried again.
    Database(sqlx::Error),
}

impl From<Refusal> for Failure {
    fn from(r: Refusal) -> Self {
        Self::Refused(r)
    }
}

impl From<sqlx::Error> for Failure {
    fn from(e: sqlx::Error) -> Self {
        Self::Database(e)
    }
}

/// The transaction of a turn, as one command sees it.
pub struct Tx<'c> {
    conn: &'c mut PgConnection,
    index: i64,
    now: Timestamp,
    wrote: bool,
}

impl<'c> Tx<'c> {
    pub(super) fn new(conn: &'c mut PgConnection, index: i64, now: Timestamp) -> Self {
        Self { conn, index, now, wrote: false }
    }

    /// The index this command's entry gets if it is not refused.
    #[must_use]
    pub fn index(&self) -> i64 {
        self.index
    }

    /// The time of its entry: the daemon's clock, never earlier than the entry before.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.now
    }

    /// Where its entry will stand.
    #[must_use]
    pub fn at(&self) -> At {
        At { index: self.index, now: self.now, position: 0 }
    }

    /// For reading.
    pub fn read(&mut self) -> &mut PgConnection {
        self.conn
    }

    /// For writing. From here on the command may not refuse.
    pub fn write(&mut self) -> &mut PgConnection {
        self.wrote = true;
        self.conn
    }

    pub(super) fn wrote(&self) -> bool {
        self.wrote
    }
}

/// Who uses up the proposals that changes rest on, in the commit of the change.
pub trait Approvals: Send + Sync {
    /// Refuses if the proposal does not stand any more; writes nothing.
    fn check<'a>(&'a self, tx: &'a mut Tx<'_>, proposal: Uuid) -> BoxFuture<'a, Result<(), Failure>>;
    /// Uses it up.
    fn spend<'a>(&'a self, tx: &'a mut Tx<'_>, proposal: Uuid) -> BoxFuture<'a, Result<(), Failure>>;
}

/// A command that committed.
#[derive(Clone, Debug)]
pub struct Committed<T> {
    /// Its entry's index.
    pub index: i64,
    /// Its entry's time.
    pub time: Timestamp,
    /// What the caller is told.
    pub value: T,
    /// Whether this is the stored outcome of an earlier request with the same `Idempotency-Key`.
    pub replayed: bool,
}

/// A command that changes no rows: the entry is the change (a denial, a use, a read of the record).
pub struct Record(pub Entry);

impl Command for Record {
    type Out = ();

    async fn apply(&mut self, _: &mut Tx<'_>) -> Result<((), Entry), Failure> {
        Ok(((), self.0.clone()))
    }

    fn hot(&self) -> Option<HotKey> {
        Some(HotKey { kind: &ENTRIES, key: Vec::new() })
    }

    fn decide(&mut self, _: Option<&Fact>, _: At) -> Result<Decided<()>, Refusal> {
        Ok(Decided { value: (), entry: self.0.clone(), after: None, row: None })
    }

    fn has_happened(&self) -> bool {
        true
    }
}
