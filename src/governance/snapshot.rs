//! What this daemon holds in memory to decide: every entity, as of the index the follower is at.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use cedar_policy::Entity;
use serde_json::Value;
use sqlx::PgConnection;

use crate::kernel::BoxFuture;
use crate::kernel::web::EntityName;
use crate::ledger::{AUTHZ, Projection, Touched, What};

use super::{engine, store};

/// How many entities one question may reach; more is a web of references nobody can have meant.
const REACH: usize = 1000;

/// An entity as it is held.
#[derive(Clone)]
pub(super) struct Held {
    pub entity: Arc<Entity>,
    pub parents: Vec<EntityName>,
    /// Entities its attributes name.
    pub refers: Vec<EntityName>,
}

impl Held {
    pub fn new(name: &EntityName, attrs: &Value, parents: Vec<EntityName>) -> Option<Self> {
        let entity = Arc::new(engine::entity(name, attrs, &parents, None).ok()?);
        let mut refers = Vec::new();
        references(attrs, &mut refers);
        Some(Self { entity, parents, refers })
    }
}

/// Entities named in attributes, as Cedar's JSON writes them: `{"__entity": {"type", "id"}}` or `{"type", "id"}`.
fn references(value: &Value, out: &mut Vec<EntityName>) {
    match value {
        Value::Object(m) => {
            let named = m.get("__entity").and_then(Value::as_object).unwrap_or(m);
            if let (Some(Value::String(kind)), Some(Value::String(id))) = (named.get("type"), named.get("id")) {
                out.push(EntityName { kind: kind.clone(), id: id.clone() });
            }
            m.values().for_each(|v| references(v, out));
        }
        Value::Array(items) => items.iter().for_each(|v| references(v, out)),
        _ => {}
    }
}

/// All entities.
#[derive(Default)]
pub struct Snapshot {
    entities: RwLock<HashMap<EntityName, Held>>,
    /// Grows with each change.
    version: AtomicU64,
}

/// The entities a question can reach, and every name that was looked for: a change of any of them may change the answer.
pub(super) struct Slice {
    pub entities: Vec<Arc<Entity>>,
    pub names: Vec<EntityName>,
}

impl Snapshot {
    /// Which state this is. Read before anything else is: what is read after it is of this version or a newer one.
    pub(super) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    fn changed(&self) {
        self.version.fetch_add(1, Ordering::AcqRel);
    }

    /// What can be reached from `roots` by parents and references; `given` stand in for what is stored.
    pub(super) fn slice(&self, roots: &[&EntityName], given: &HashMap<EntityName, Held>) -> Slice {
        let all = self.entities.read().unwrap_or_else(PoisonError::into_inner);
        let (mut entities, mut names) = (Vec::new(), Vec::new());
        let mut seen: HashSet<EntityName> = HashSet::new();
        let mut waiting: Vec<EntityName> = roots.iter().map(|r| (*r).clone()).collect();
        while let Some(name) = waiting.pop() {
            if names.len() >= REACH || !seen.insert(name.clone()) {
                continue;
            }
            if let Some(held) = given.get(&name).or_else(|| all.get(&name)) {
                entities.push(held.entity.clone());
                waiting.extend(held.parents.iter().chain(&held.refers).cloned());
            }
            names.push(name);
        }
        Slice { entities, names }
    }

    /// Attributes of a stored client that the context takes over: its scopes.
    pub(super) fn held(&self, name: &EntityName) -> Option<Held> {
        self.entities.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entities.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn put(&self, rows: Vec<store::Row>) {
        let mut all = self.entities.write().unwrap_or_else(PoisonError::into_inner);
        for row in rows {
            match Held::new(&row.name, &row.attrs, row.parents) {
                Some(held) => all.insert(row.name, held),
                None => {
                    tracing::error!(
                        kind = row.name.kind,
                        id = row.name.id,
                        "a stored entity cannot be read and counts as absent"
                    );
                    all.remove(&row.name)
                }
            };
        }
        self.changed();
    }
}

impl Projection for Snapshot {
    fn name(&self) -> &'static str {
        "governance/snapshot"
    }

    fn kinds(&self) -> &'static [&'static str] {
        &[AUTHZ]
    }

    fn load<'a>(&'a self, conn: &'a mut PgConnection, _: i64) -> BoxFuture<'a, Result<(), sqlx::Error>> {
        Box::pin(async move {
            let rows = store::all(conn).await?;
            self.entities.write().unwrap_or_else(PoisonError::into_inner).clear();
            self.put(rows);
            Ok(())
        })
    }

    fn advance<'a>(
        &'a self,
        conn: &'a mut PgConnection,
        _: i64,
        _: i64,
        touched: &'a [(i64, Touched)],
    ) -> BoxFuture<'a, Result<(), sqlx::Error>> {
        Box::pin(async move {
            let names: Vec<EntityName> = touched.iter().filter_map(|(_, t)| named(t)).collect();
            if names.is_empty() {
                return Ok(());
            }
            let rows = store::some(conn, &names).await?;
            {
                let mut all = self.entities.write().unwrap_or_else(PoisonError::into_inner);
                names.iter().for_each(|n| drop(all.remove(n)));
                self.changed();
            }
            self.put(rows);
            Ok(())
        })
    }
}

/// The entity of a touch `entity/<type>/<id>`.
fn named(t: &Touched) -> Option<EntityName> {
    let What::Key(key) = &t.what else { return None };
    let (kind, id) = std::str::from_utf8(key).ok()?.strip_prefix("entity/")?.split_once('/')?;
    (t.kind == AUTHZ).then(|| EntityName { kind: kind.to_owned(), id: id.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn references_are_found_wherever_they_stand() {
        let mut out = Vec::new();
        references(
            &json!({"a": {"__entity": {"type": "user", "id": "x"}}, "b": [{"c": {"type": "T", "id": "y"}}]}),
            &mut out,
        );
        let names: Vec<_> = out.iter().map(|n| n.id.as_str()).collect();
        assert!(names.contains(&"x") && names.contains(&"y"));
    }
}
