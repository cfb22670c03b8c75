//! Keys: the commands that change one.

use std::sync::Arc;

use sqlx::PgConnection;
use uuid::Uuid;

use crate::kernel::{BoxFuture, Refusal, crypto, problem};
use crate::ledger::hot::{self, At, Column, Decided, Fact, Hot, HotKey, Loaded, Row};
use crate::ledger::{Command, Entry, Failure, Touch, Tx};

use super::leases;
use super::model::{Change, Condition, Deleted, Item, Written};
use super::span::shown;
use super::store::{self, Standing, leases as lease_rows};

/// The kind of touch of a key.
pub const KEY: &str = "kv";

/// Puts a value under a key.
pub struct Put {
    /// The key, as policies and the record name it.
    pub key: String,
    /// Its bytes.
    bytes: Vec<u8>,
    /// Any bytes.
    pub value: Vec<u8>,
    /// Kept and given back.
    pub content_type: String,
    /// What must hold.
    pub condition: Condition,
    /// The lease it is to hang on: its id, and whose it must be.
    pub lease: Option<(Uuid, String)>,
    /// Digest of the value, made before the command queues.
    digest: String,
}

impl Put {
    /// A put of `value` under a name.
    #[must_use]
    pub fn new(key: String, value: Vec<u8>, content_type: String, condition: Condition) -> Self {
        let (digest, bytes) = (crypto::base64(crypto::sha256(&value)), key.clone().into_bytes());
        Self { key, bytes, value, content_type, condition, lease: None, digest }
    }

    /// A put of `value` under any key.
    pub(super) fn of_bytes(bytes: Vec<u8>, value: Vec<u8>, content_type: String) -> Self {
        let key = shown(&bytes);
        Self { bytes, ..Self::new(key, value, content_type, Condition::None) }
    }

    /// The same on a lease of `owner`'s.
    #[must_use]
    pub fn leased(mut self, lease: Option<Uuid>, owner: &str) -> Self {
        self.lease = lease.map(|id| (id, owner.to_owned()));
        self
    }

    /// The fact it decides on.
    pub(super) fn standing(&self) -> HotKey {
        HotKey { kind: &KEYS, key: self.bytes.clone() }
    }

    /// Decides under the lock, where a lease can be looked up. What hangs on one is no row of its kind.
    pub(super) async fn laid(
        &mut self,
        conn: &mut PgConnection,
        fact: Option<&Fact>,
        at: At,
    ) -> Result<(Decided<Written>, Option<Change>), Failure> {
        let Some((id, owner)) = self.lease.clone() else { return Ok((self.decide(fact, at)?, None)) };
        if lease_rows::owned(conn, &[id], &owner).await?.is_empty() {
            return Err(leases::absent(id).into());
        }
        let Decided { value, entry, after, row } = self.decide(fact, at)?;
        let row = row.and_then(|row| row.downcast::<Change>().ok());
        let row = row.ok_or_else(|| Refusal::internal("a put without a row"))?;
        Ok((Decided { value, entry: entry.change("lease", id.to_string()), after, row: None }, Some(*row)))
    }
}

impl Command for Put {
    type Out = Written;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Written, Entry), Failure> {
        if self.lease.is_none() {
            return hot::alone(self, tx).await;
        }
        let found = KEYS.load(tx.read(), &[self.standing().key]).await?.pop();
        let at = tx.at();
        let (decided, leased) = self.laid(tx.read(), found.as_ref().map(|(_, fact)| fact), at).await?;
        store::txn::write(tx.write(), leased.as_slice()).await?;
        Ok((decided.value, decided.entry))
    }

    fn hot(&self) -> Option<HotKey> {
        // Whether there is that lease is looked up in the database.
        self.lease.is_none().then(|| self.standing())
    }

    fn decide(&mut self, fact: Option<&Fact>, at: At) -> Result<Decided<Written>, Refusal> {
        let lease = self.lease.as_ref().map(|(id, _)| *id);
        let was = standing(fact);
        check(&self.condition, was, &self.key)?;
        let (created_index, version) = was.map_or((at.index, 1), |w| (w.created_index, w.version + 1));
        let item = Item {
            key: self.bytes.clone(),
            index: at.index,
            created_index,
            version,
            content_type: self.content_type.clone(),
            value: self.value.clone(),
            lease,
        };
        let entry = Entry::ok("state:put", format!("key/{}", self.key))
            .change("size", self.value.len())
            .change("version", version)
            .change("sha256", self.digest.clone())
            .touch(Touch::key(KEY, self.bytes.as_slice()));
        let value = Written {
            key: self.key.clone(),
            index: at.index,
            created_index,
            version,
            lease: lease.map(|l| l.to_string()),
        };
        let after: Fact = Arc::new(Standing { index: at.index, created_index, version });
        let row = Change { item, deleted: false, previous: was.map_or(0, |w| w.index) };
        Ok(Decided { value, entry, after: Some(after), row: Some(Box::new(row)) })
    }
}

/// Deletes a key.
pub struct Delete {
    /// The key, a name.
    pub key: String,
    /// What must hold.
    pub condition: Condition,
}

impl Command for Delete {
    type Out = Deleted;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Deleted, Entry), Failure> {
        hot::alone(self, tx).await
    }

    fn hot(&self) -> Option<HotKey> {
        Some(HotKey { kind: &KEYS, key: self.key.as_bytes().to_vec() })
    }

    fn decide(&mut self, fact: Option<&Fact>, at: At) -> Result<Decided<Deleted>, Refusal> {
        let was = standing(fact);
        check(&self.condition, was, &self.key)?;
        let Some(was) = was else { return Err(Refusal::not_found(format!("key {}", self.key))) };
        let key = self.key.clone().into_bytes();
        let entry = Entry::ok("state:delete", format!("key/{}", self.key)).touch(Touch::key(KEY, key.clone()));
        let value = Deleted { key: self.key.clone(), index: at.index, previous_index: was.index };
        let row = Change::deletion(key, at.index, was.created_index, was.index);
        Ok(Decided { value, entry, after: None, row: Some(Box::new(row)) })
    }
}

/// The kind of hot command that all changes of keys are.
pub(super) struct Keys;

pub(super) static KEYS: Keys = Keys;

impl Hot for Keys {
    fn name(&self) -> &'static str {
        KEY
    }

    fn parts(&self, columns: &[Column]) -> &'static str {
        store::parts(columns)
    }

    fn columns(&self, rows: Vec<Row>) -> Vec<Column> {
        store::columns(rows.into_iter().filter_map(|r| r.downcast().ok()).map(|c| *c).collect())
    }

    fn load<'a>(&'a self, conn: &'a mut PgConnection, keys: &'a [Vec<u8>]) -> BoxFuture<'a, Loaded> {
        Box::pin(async move {
            let found = store::standings(conn, keys).await?;
            Ok(found.into_iter().map(|(key, standing)| (key, Arc::new(standing) as Fact)).collect())
        })
    }

    fn every<'a>(
        &'a self,
        conn: &'a mut PgConnection,
        after: Option<&'a [u8]>,
    ) -> BoxFuture<'a, Result<Vec<Vec<u8>>, sqlx::Error>> {
        Box::pin(store::every_key(conn, after))
    }
}

/// The kind of hot command that changes keys.
#[must_use]
pub fn kind_of_keys() -> &'static dyn Hot {
    &KEYS
}

fn standing(fact: Option<&Fact>) -> Option<&Standing> {
    fact.and_then(|f| f.downcast_ref())
}

fn check(condition: &Condition, was: Option<&Standing>, key: &str) -> Result<(), Refusal> {
    if condition.holds(was.map(|w| w.index)) {
        return Ok(());
    }
    let now = was.map_or(0, |w| w.index);
    let detail = match was {
        Some(w) => format!("key {key} is at index {}", w.index),
        None => format!("there is no key {key}"),
    };
    Err(Refusal::new(&problem::PRECONDITION_FAILED, detail).with("index", now))
}
