//! Keys: the commands that change one.

use crate::kernel::{Refusal, problem};
use crate::ledger::{Command, Entry, Failure, Touch, Tx};

use super::model::{Condition, Deleted, Item, Written};
use super::store::{self, Standing};

/// The kind of touch of a key.
pub const KEY: &str = "kv";

/// Puts a value under a key.
pub struct Put {
    /// The key, a name.
    pub key: String,
    /// Any bytes.
    pub value: Vec<u8>,
    /// Kept and given back.
    pub content_type: String,
    /// What must hold.
    pub condition: Condition,
}

impl Command for Put {
    type Out = Written;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Written, Entry), Failure> {
        let was = store::standing(tx.read(), self.key.as_bytes()).await?;
        check(&self.condition, was.as_ref(), &self.key)?;
        let index = tx.index();
        let (created_index, version) = was.as_ref().map_or((index, 1), |w| (w.created_index, w.version + 1));
        let previous = was.map_or(0, |w| w.index);
        let item = Item {
            key: self.key.clone().into_bytes(),
            index,
            created_index,
            version,
            content_type: self.content_type.clone(),
            value: self.value.clone(),
        };
        store::put(tx.write(), &item, previous).await?;
        let entry = Entry::ok("state:put", format!("key/{}", self.key))
            .change("size", self.value.len())
            .change("version", version)
            .change("sha256", crate::kernel::crypto::base64(crate::kernel::crypto::sha256(&self.value)))
            .touch(Touch::key(KEY, self.key.as_bytes()));
        Ok((Written { key: self.key.clone(), index, created_index, version, lease: None }, entry))
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
        let was = store::standing(tx.read(), self.key.as_bytes()).await?;
        check(&self.condition, was.as_ref(), &self.key)?;
        let Some(was) = was else { return Err(Refusal::not_found(format!("key {}", self.key)).into()) };
        let index = tx.index();
        store::delete(tx.write(), self.key.as_bytes(), index, &was).await?;
        let entry = Entry::ok("state:delete", format!("key/{}", self.key)).touch(Touch::key(KEY, self.key.as_bytes()));
        Ok((Deleted { key: self.key.clone(), index, previous_index: was.index }, entry))
    }
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
