//! Entities: what policies know about the world. Written by callers under their own names, and by rooms for what is theirs.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::kernel::web::EntityName;
use crate::kernel::{Refusal, problem};
use crate::ledger::entry::canonical;
use crate::ledger::{AUTHZ, Command, Entry, Failure, Touch, Tx};

use super::proposals::Approved;
use super::store;

/// How far up a hierarchy may go.
const DEPTH: usize = super::snapshot::REACH;

/// The fact that permission rests on when it rests on this entity.
#[must_use]
pub fn fact(name: &EntityName) -> String {
    format!("entity/{}/{}", name.kind, name.id)
}

/// Writes an entity within another room's command. The command's entry must carry [`touch`].
///
/// # Errors
/// When the database fails.
pub async fn upsert(
    tx: &mut Tx<'_>,
    name: &EntityName,
    attrs: &Value,
    parents: &[EntityName],
) -> Result<(), sqlx::Error> {
    let index = tx.index();
    let parents = canonical(&serde_json::to_value(parents).unwrap_or_default());
    store::put(tx.write(), name, &canonical(attrs), &parents, index).await
}

/// Removes an entity within another room's command. The command's entry must carry [`touch`].
///
/// # Errors
/// When the database fails.
pub async fn remove(tx: &mut Tx<'_>, name: &EntityName) -> Result<(), sqlx::Error> {
    let index = tx.index();
    store::remove(tx.write(), name, index).await
}

/// What an entry that changed this entity touches.
#[must_use]
pub fn touch(name: &EntityName) -> Touch {
    Touch::key(AUTHZ, fact(name))
}

/// An entity as the API shows it.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Shown {
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its id.
    pub id: String,
    /// Attributes, as Cedar's JSON has them.
    #[schema(value_type = Object)]
    pub attrs: Value,
    /// Parents.
    #[schema(value_type = Vec<Object>)]
    pub parents: Vec<EntityName>,
    /// Index of its last change.
    pub index: i64,
}

/// Puts an entity.
pub(super) struct Put {
    pub name: EntityName,
    pub attrs: Value,
    pub parents: Vec<EntityName>,
    pub approved: Approved,
}

impl Command for Put {
    type Out = Shown;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Shown, Entry), Failure> {
        no_cycle(tx, &self.name, &self.parents).await?;
        let proposal = self.approved.check(tx).await?;
        upsert(tx, &self.name, &self.attrs, &self.parents).await?;
        let parents: Vec<Value> = self.parents.iter().map(|p| format!("{}/{}", p.kind, p.id).into()).collect();
        let entry = Entry::ok("governance:entity-put", format!("entity/{}/{}", self.name.kind, self.name.id))
            .change("parents", parents)
            .touch(touch(&self.name));
        let shown = Shown {
            kind: self.name.kind.clone(),
            id: self.name.id.clone(),
            attrs: self.attrs.clone(),
            parents: self.parents.clone(),
            index: tx.index(),
        };
        Ok((shown, self.approved.spend(tx, proposal, entry).await?))
    }
}

/// Walks up from the parents: an entity must not be its own ancestor.
async fn no_cycle(tx: &mut Tx<'_>, name: &EntityName, parents: &[EntityName]) -> Result<(), Failure> {
    let mut seen: HashSet<EntityName> = HashSet::new();
    let mut level: Vec<EntityName> = parents.to_vec();
    while !level.is_empty() {
        if level.contains(name) {
            let detail = format!("{}::{:?} would be its own ancestor", name.kind, name.id);
            return Err(Refusal::new(&problem::UNPROCESSABLE, detail.clone()).at("/parents", detail).into());
        }
        if seen.len() > DEPTH {
            let detail = format!("the hierarchy above it has more than {DEPTH} entities");
            return Err(Refusal::new(&problem::UNPROCESSABLE, detail.clone()).at("/parents", detail).into());
        }
        level.retain(|n| seen.insert(n.clone()));
        if level.is_empty() {
            break;
        }
        level = store::some(tx.read(), &level).await?.into_iter().flat_map(|r| r.parents).collect();
    }
    Ok(())
}

/// Deletes an entity.
pub(super) struct Delete {
    pub name: EntityName,
    pub approved: Approved,
}

impl Command for Delete {
    type Out = ();

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<((), Entry), Failure> {
        if store::some(tx.read(), std::slice::from_ref(&self.name)).await?.is_empty() {
            return Err(Refusal::not_found(format!("entity {}::{:?}", self.name.kind, self.name.id)).into());
        }
        let proposal = self.approved.check(tx).await?;
        remove(tx, &self.name).await?;
        let resource = format!("entity/{}/{}", self.name.kind, self.name.id);
        let entry = Entry::ok("governance:entity-delete", resource).touch(touch(&self.name));
        Ok(((), self.approved.spend(tx, proposal, entry).await?))
    }
}
