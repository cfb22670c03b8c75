//! What this daemon holds in memory to decide: every entity, and the bundles in force, as of the index the follower is at.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ops::Bound;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use cedar_policy::Entity;
use serde_json::Value;
use sqlx::PgConnection;

use crate::kernel::web::EntityName;
use crate::kernel::{BoxFuture, Refusal, problem, supervisor};
use crate::ledger::{AUTHZ, Projection, Touch, What};

use super::canary::Canary;
use super::engine::Force;
use super::library::{Found, Library};
use super::{engine, store};

/// How many entities one question may reach; more is a web of references nobody can have meant.
pub(super) const REACH: usize = 1000;

/// How long what was in force is kept, for questions that are on their way.
const LEFT: Duration = Duration::from_secs(2);

/// How many names are looked through one by one; a set of more pays.
const FEW: usize = 16;

/// An entity as it is held.
pub(super) struct Held {
    pub entity: Arc<Entity>,
    pub parents: Vec<EntityName>,
    /// Entities its attributes name.
    pub refers: Vec<EntityName>,
}

impl Held {
    pub fn new(name: &EntityName, attrs: &Value, parents: Vec<EntityName>) -> Option<Arc<Self>> {
        let entity = Arc::new(engine::entity(name, attrs, &parents, None).ok()?);
        let mut refers = Vec::new();
        references(attrs, &mut refers);
        Some(Arc::new(Self { entity, parents, refers }))
    }

    /// One that is in nothing and refers to nothing.
    pub fn alone(entity: Entity) -> Arc<Self> {
        Arc::new(Self { entity: Arc::new(entity), parents: Vec::new(), refers: Vec::new() })
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

/// All entities, and the index of the newest change among them.
#[derive(Default)]
struct World {
    entities: HashMap<EntityName, Arc<Held>>,
    /// The ids of each type, in order.
    ids: HashMap<String, BTreeSet<String>>,
    index: i64,
}

impl World {
    fn put(&mut self, name: EntityName, held: Arc<Held>) {
        self.ids.entry(name.kind.clone()).or_default().insert(name.id.clone());
        self.entities.insert(name, held);
    }

    fn remove(&mut self, name: &EntityName) {
        self.entities.remove(name);
        if let Some(ids) = self.ids.get_mut(&name.kind) {
            ids.remove(&name.id);
        }
    }
}

/// All entities, and the bundles in force.
pub struct Snapshot {
    world: RwLock<World>,
    /// Grows with each change.
    version: AtomicU64,
    library: Library,
    force: ArcSwap<InForce>,
    /// Read, and not taken in yet.
    waiting: Mutex<Option<Read>>,
}

/// What was read of the database, and makes work.
struct Read {
    rows: Vec<store::Row>,
    at: i64,
    ruling: Option<Ruling>,
}

/// What is in force, as it was read.
struct Ruling {
    row: store::bundles::InForce,
    system: Found,
    application: Option<Found>,
    canary: Option<Found>,
}

/// What is put to whom: the active bundles, and beside them a canary for some.
pub(super) struct InForce {
    pub active: Arc<Force>,
    pub canary: Option<Canary>,
    /// Since which index.
    pub index: i64,
}

impl InForce {
    /// The bundles that decide for this subject: the same for it each time, on each daemon.
    pub fn of(&self, subject: &EntityName) -> &Arc<Force> {
        self.canary_of(subject).map_or(&self.active, |canary| &canary.force)
    }

    /// The canary, if it decides for this subject.
    pub fn canary_of(&self, subject: &EntityName) -> Option<&Canary> {
        self.canary.as_ref().filter(|canary| canary.takes(subject))
    }
}

/// Entities that stand in for what is stored: one or two.
pub(super) type Given<'a> = [(&'a EntityName, Arc<Held>)];

/// What stands in for an entity.
pub(super) fn given<'g>(given: &'g Given<'_>, name: &EntityName) -> Option<&'g Arc<Held>> {
    given.iter().find(|(n, _)| *n == name).map(|(_, held)| held)
}

/// The entities a question can reach, and every name that was looked for: a change of any of them may change the answer.
pub(super) struct Slice {
    pub entities: Vec<Arc<Entity>>,
    pub names: Vec<EntityName>,
    /// The newest change among all entities when they were looked for.
    pub index: i64,
}

impl Snapshot {
    /// Nothing yet, under the shipped bundle.
    #[must_use]
    pub fn new(library: Library) -> Self {
        let active = Arc::new(Force::new(library.shipped().clone(), None));
        let force = ArcSwap::from_pointee(InForce { active, canary: None, index: -1 });
        Self { world: RwLock::default(), version: AtomicU64::new(0), library, force, waiting: Mutex::default() }
    }

    /// The bundles in force.
    pub(super) fn force(&self) -> Arc<InForce> {
        self.force.load_full()
    }

    /// Bundles that are compiled.
    pub(super) fn library(&self) -> &Library {
        &self.library
    }

    /// What is in force at an index, if it is not what is held.
    async fn ruling(&self, conn: &mut PgConnection, at: i64) -> Result<Option<Ruling>, sqlx::Error> {
        let row = store::bundles::in_force_at(conn, at).await?;
        let Some(row) = row.filter(|row| row.index != self.force.load().index) else { return Ok(None) };
        let system = self.library.find(conn, &row.system).await?;
        let application = match &row.application {
            Some(id) => Some(self.library.find(conn, id).await?),
            None => None,
        };
        let canary = match &row.canary {
            Some(id) => Some(self.library.find(conn, id).await?),
            None => None,
        };
        Ok(Some(Ruling { row, system, application, canary }))
    }

    /// Takes over what is in force.
    fn enforce(&self, ruling: Ruling) -> Result<(), sqlx::Error> {
        let Ruling { row, system, application, canary } = ruling;
        let system = self.library.compiled(system)?;
        let application = application.map(|found| self.library.compiled(found)).transpose()?;
        let canary = canary.map(|found| self.library.compiled(found)).transpose()?;
        let canary = canary.zip(row.canary).map(|(compiled, id)| {
            let force = Arc::new(Force::new(system.clone(), Some(compiled)));
            Canary::new(force, id, row.percent, row.stop_at)
        });
        let active = Arc::new(Force::new(system, application));
        let old = self.force.swap(Arc::new(InForce { active, canary, index: row.index }));
        self.changed();
        // What was in force has thousands of sets of policies made: to let go of them takes milliseconds. Neither the follower pays
        // for that, nor the last request that was decided by them.
        supervisor::detach(async move {
            tokio::time::sleep(LEFT).await;
            tokio::task::block_in_place(|| drop(old));
        });
        Ok(())
    }

    /// Which state this is. Read before anything else is: what is read after it is of this version or a newer one.
    pub(super) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    fn changed(&self) {
        self.version.fetch_add(1, Ordering::AcqRel);
    }

    /// What can be reached from `roots` by parents and references; `given` stand in for what is stored.
    ///
    /// # Errors
    /// 422 when it is more than anybody can have meant: to decide on a part of it would be to guess.
    pub(super) fn slice(&self, roots: &[&EntityName], given: &Given<'_>) -> Result<Slice, Refusal> {
        let world = self.world.read().unwrap_or_else(PoisonError::into_inner);
        slice(|name| self::given(given, name).or_else(|| world.entities.get(name)).cloned(), world.index, roots)
    }

    /// What is held of an entity.
    pub(super) fn held(&self, name: &EntityName) -> Option<Arc<Held>> {
        self.world.read().unwrap_or_else(PoisonError::into_inner).entities.get(name).cloned()
    }

    /// Ids of entities of a type after `after`, in order.
    pub(super) fn ids(&self, kind: &str, after: Option<&str>, limit: usize) -> Vec<String> {
        let world = self.world.read().unwrap_or_else(PoisonError::into_inner);
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let ids = world.ids.get(kind).into_iter().flat_map(|ids| ids.range::<str, _>((from, Bound::Unbounded)));
        ids.take(limit).cloned().collect()
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.world.read().unwrap_or_else(PoisonError::into_inner).entities.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes in rows of an index, in the place of `names` or of everything.
    fn put(&self, names: Option<&[EntityName]>, rows: Vec<store::Row>, index: i64) {
        let mut world = self.world.write().unwrap_or_else(PoisonError::into_inner);
        match names {
            Some(names) => names.iter().for_each(|n| world.remove(n)),
            None => *world = World::default(),
        }
        rows.into_iter().filter_map(read).for_each(|(name, held)| world.put(name, held));
        world.index = index;
        self.changed();
    }
}

/// An entity as it is held.
pub(super) fn read(row: store::Row) -> Option<(EntityName, Arc<Held>)> {
    let held = Held::new(&row.name, &row.attrs, row.parents);
    if held.is_none() {
        tracing::error!(kind = row.name.kind, id = row.name.id, "a stored entity cannot be read and counts as absent");
    }
    held.map(|held| (row.name, held))
}

/// Names, each once, in the order they were come to.
struct Names {
    all: Vec<EntityName>,
    /// The same, once they are many.
    set: HashSet<EntityName>,
}

impl Names {
    fn add(&mut self, name: &EntityName) {
        if self.all.len() < FEW {
            if self.all.contains(name) {
                return;
            }
        } else {
            if self.set.is_empty() {
                self.set.extend(self.all.iter().cloned());
            }
            if !self.set.insert(name.clone()) {
                return;
            }
        }
        self.all.push(name.clone());
    }
}

/// What can be reached from `roots`, as `held` knows it.
pub(super) fn slice(
    held: impl Fn(&EntityName) -> Option<Arc<Held>>,
    index: i64,
    roots: &[&EntityName],
) -> Result<Slice, Refusal> {
    let mut names = Names { all: Vec::with_capacity(FEW), set: HashSet::new() };
    roots.iter().for_each(|root| names.add(root));
    let (mut entities, mut at) = (Vec::with_capacity(4), 0);
    while let Some(name) = names.all.get(at) {
        if at >= REACH {
            let detail = format!("the question reaches more than {REACH} entities by parents and references");
            return Err(Refusal::new(&problem::UNPROCESSABLE, detail));
        }
        if let Some(held) = held(name) {
            entities.push(held.entity.clone());
            held.parents.iter().chain(&held.refers).for_each(|name| names.add(name));
        }
        at += 1;
    }
    Ok(Slice { entities, names: names.all, index })
}

impl Projection for Snapshot {
    fn name(&self) -> &'static str {
        "governance/snapshot"
    }

    fn kinds(&self) -> &'static [&'static str] {
        &[AUTHZ, super::MADE]
    }

    fn load<'a>(&'a self, conn: &'a mut PgConnection, at: i64) -> BoxFuture<'a, Result<(), sqlx::Error>> {
        Box::pin(async move {
            let ruling = self.ruling(conn, at).await?;
            let read = Read { rows: store::all(conn).await?, at, ruling };
            *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some(read);
            Ok(())
        })
    }

    fn loaded(&self) -> Result<(), sqlx::Error> {
        // A hundred thousand entities take a second to be made, ten thousand policies too: not while a snapshot of the database
        // is held.
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Read { rows, at, ruling }) = waiting else { return Ok(()) };
        let newest = rows.iter().map(|r| r.index).max().unwrap_or(-1);
        self.put(None, rows, newest.max(at));
        ruling.map_or(Ok(()), |ruling| self.enforce(ruling))
    }

    fn advance<'a>(
        &'a self,
        conn: &'a mut PgConnection,
        _: i64,
        to: i64,
        touched: &'a [(i64, Touch)],
    ) -> BoxFuture<'a, Result<(), sqlx::Error>> {
        Box::pin(async move {
            for id in touched.iter().filter_map(|(_, t)| made(t)) {
                self.library.expect(&id);
            }
            if touched.iter().any(|(_, t)| t.covers(AUTHZ, super::IN_FORCE.as_bytes())) {
                // It is held, but for one that nobody had in force for long: the compiler keeps those that may come.
                if let Some(ruling) = self.ruling(conn, to).await? {
                    self.enforce(ruling)?;
                }
            }
            let names: Vec<EntityName> = touched.iter().filter_map(|(_, t)| named(t)).collect();
            if !names.is_empty() {
                // As of this very index: what is newer comes with its own entry, and a decision says of which moment it is.
                let rows = store::some_at(conn, &names, to).await?;
                self.put(Some(&names), rows, to);
            }
            Ok(())
        })
    }
}

/// The bundle that was made.
fn made(t: &Touch) -> Option<String> {
    let What::Key(key) = &t.what else { return None };
    (t.kind == super::MADE).then(|| String::from_utf8(key.clone()).ok()).flatten()
}

/// The entity of a touch `entity/<type>/<id>`.
fn named(t: &Touch) -> Option<EntityName> {
    let What::Key(key) = &t.what else { return None };
    let (kind, id) = std::str::from_utf8(key).ok()?.strip_prefix("entity/")?.split_once('/')?;
    (t.kind == AUTHZ).then(|| EntityName { kind: kind.to_owned(), id: id.to_owned() })
}

#[cfg(test)]
impl Snapshot {
    /// Of these entities, under this bundle of an application.
    pub(super) fn of(application: super::compiled::Compiled, entities: Vec<(EntityName, Arc<Held>)>) -> Self {
        let made = Self::new(Library::new().unwrap());
        let active = Arc::new(Force::new(made.library.shipped().clone(), Some(Arc::new(application))));
        made.force.store(Arc::new(InForce { active, canary: None, index: 1 }));
        let mut world = made.world.write().unwrap();
        entities.into_iter().for_each(|(name, held)| world.put(name, held));
        drop(world);
        made
    }
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
