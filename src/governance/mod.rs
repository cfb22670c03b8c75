//! Who may do what: policies in Cedar, entities they know, decisions they give, and the record of each.
//!
//! **Invariants.** Nothing is permitted that no policy permits. A decision names the index it was taken at and what it rests
//! on; the ledger takes it again when one of those changed before the commit. An AuthZEN evaluation is in the record before it
//! is answered.
//!
//! **Not here.** Who the caller is (`token`), how a denial is recorded (`ledger`).
//!
//! **Why this way.** The daemon's own API is ruled by the same engine and the same entities as anyone else's: what an operator
//! learns about one holds for the other.

mod answers;
mod authzen;
mod bearer;
mod bundles;
mod canary;
pub mod cases;
mod compiled;
mod decisions;
mod enforce;
pub mod engine;
pub mod entities;
mod explain;
pub mod http;
mod library;
mod metrics;
mod needs;
mod past;
mod proposals;
mod remembered;
mod replay;
mod requests;
mod rollout;
mod rules;
mod scope;
mod search;
mod series;
mod shadow;
mod sieve;
mod snapshot;
mod spool;
mod spread;
mod store;
mod tasks;
mod text;
mod trial;
mod validate;
mod voices;
pub mod workbench;

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};
use sqlx::Postgres;
use sqlx::pool::PoolConnection;
use tokio::sync::Semaphore;

use crate::kernel::supervisor::Supervisor;
use crate::kernel::web::{Ask, Caller, EntityName};
use crate::kernel::{Fault, Refusal, problem};
use crate::ledger::{Committed, Ledger};
use crate::store::Store;

pub use bearer::Bearers;
use decisions::Recorder;
use entities::Shown;
pub use library::Library;
pub use rules::Rules;
pub use snapshot::Snapshot;
use spool::Spool;

/// What an entry touches that changes which bundles are in force.
const IN_FORCE: &str = "bundle";
/// The kind of touch of an entry that made a bundle.
const MADE: &str = "bundle";

/// The records of decisions, for who gives receipts of them.
#[must_use]
pub fn records(store: &Store) -> Arc<dyn crate::audit::Records> {
    Arc::new(decisions::Decisions(store.clone()))
}

/// What the room is made from.
pub struct Parts<'a> {
    /// What rules.
    pub rules: Arc<Rules>,
    /// The ledger.
    pub ledger: Ledger,
    /// The database.
    pub store: Store,
    /// Where this daemon is.
    pub url: &'a str,
    /// Its data folder: what is decided while the store is away is kept there.
    pub data: &'a Path,
}

/// The room. Cheap to clone.
#[derive(Clone)]
pub struct Governance(Arc<Room>);

impl std::ops::Deref for Governance {
    type Target = Room;

    fn deref(&self) -> &Room {
        &self.0
    }
}

/// What the room holds.
pub struct Room {
    rules: Arc<Rules>,
    ledger: Ledger,
    store: Store,
    recorder: Recorder,
    spool: Arc<Spool>,
    /// Turns of replays.
    replays: Arc<Semaphore>,
    /// `http` or `https`, as this daemon is spoken to.
    scheme: &'static str,
}

impl Governance {
    /// Opens the room: sees to it that a system bundle is in force, and starts the recorder, the compiler of bundles that
    /// were made on other daemons, and the end of proposals that are past their time.
    pub async fn start(parts: Parts<'_>, tasks: &Supervisor) -> Self {
        let Parts { rules, ledger, store, url, data } = parts;
        let recorder = Recorder::start(ledger.clone(), tasks);
        let scheme = if url.starts_with("https:") { "https" } else { "http" };
        let limit = rules.settings.spool_mb * 1024 * 1024;
        let waiting = rules.metrics.spooled.clone();
        // What an earlier run left is counted: that reads it.
        let spool = Arc::new(tokio::task::block_in_place(|| Spool::start(data, limit, waiting)));
        let replays = Arc::new(Semaphore::new(replay::AT_ONCE));
        let room = Self(Arc::new(Room { rules, ledger, store, recorder, spool, replays, scheme }));
        room.ledger.approved_by(Arc::new(requests::Spend));
        room.ship().await;
        room.start_tasks(tasks);
        room
    }

    /// Brings the shipped bundle into force where no other is. Until it is written, what is shipped rules all the same.
    async fn ship(&self) {
        let ship = enforce::Ship(self.rules.snapshot.library().shipped().clone());
        match self.ledger.write(&Caller::daemon("governance"), &[], ship).await {
            Err(r) if r.problem() != &problem::CONFLICT => {
                tracing::warn!(error = %r, "the shipped bundle is not in the record yet: {r}");
            }
            _ => {}
        }
    }

    async fn connection(&self) -> Result<PoolConnection<Postgres>, Refusal> {
        self.store.reader().acquire().await.map_err(|e| self.store.refusal(e))
    }

    /// Puts an entity.
    async fn put_entity(
        &self,
        caller: &Caller,
        name: EntityName,
        attrs: Map<String, Value>,
        parents: Vec<EntityName>,
    ) -> Result<Committed<Shown>, Refusal> {
        let ask = self.entity_ask(&name, &attrs, &parents)?;
        let change = proposals::change_of(ask.action, &ask.name, &proposals::entity_body(&attrs, &parents));
        let (ask, approved) = self.approved(caller, ask, &change).await?;
        let put = entities::Put { name, attrs: Value::Object(attrs), parents, approved };
        self.ledger.write(caller, &[ask], put).await
    }

    /// The question whether an entity may be put, if it can be at all.
    fn entity_ask(
        &self,
        name: &EntityName,
        attrs: &Map<String, Value>,
        parents: &[EntityName],
    ) -> Result<Ask, Refusal> {
        own(name)?;
        let force = self.rules.snapshot.force();
        let schema = name.kind.starts_with("Sop::").then(|| &force.active.schema().schema);
        engine::entity(name, &Value::Object(attrs.clone()), parents, schema)?;
        Ok(Ask::new("governance:entity-put", "Entity", format!("{}/{}", name.kind, name.id)))
    }

    /// Deletes an entity.
    async fn delete_entity(&self, caller: &Caller, name: EntityName) -> Result<Committed<()>, Refusal> {
        own(&name)?;
        let ask = Ask::new("governance:entity-delete", "Entity", format!("{}/{}", name.kind, name.id));
        let change = proposals::change_of(ask.action, &ask.name, b"");
        let (ask, approved) = self.approved(caller, ask, &change).await?;
        self.ledger.write(caller, &[ask], entities::Delete { name, approved }).await
    }

    /// Reads an entity.
    async fn entity(&self, caller: &Caller, name: EntityName) -> Result<Shown, Refusal> {
        let ask = Ask::new("governance:entity-read", "Entity", format!("{}/{}", name.kind, name.id));
        self.ledger.permit(caller, &[ask]).await?;
        let mut conn = self.store.reader().acquire().await.map_err(|e| self.store.refusal(e))?;
        let found = store::some(&mut conn, std::slice::from_ref(&name)).await.map_err(|e| self.store.refusal(e))?.pop();
        let row = found.ok_or_else(|| Refusal::not_found(format!("entity {}::{:?}", name.kind, name.id)))?;
        Ok(Shown { kind: row.name.kind, id: row.name.id, attrs: row.attrs, parents: row.parents, index: row.index })
    }
}

/// A client's entity is kept by the token room, with the client.
fn own(name: &EntityName) -> Result<(), Refusal> {
    if name.kind == "Sop::Client" {
        let detail = "a client's entity is kept with its registration; change it under /oauth2/register";
        return Err(Refusal::new(&problem::UNPROCESSABLE, detail).with_faults([Fault::new("", detail)]));
    }
    Ok(())
}
