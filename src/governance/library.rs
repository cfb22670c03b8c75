//! Bundles that are compiled: those in force, and those that may be soon, so that to change over is to change a pointer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use sqlx::PgConnection;
use tokio::sync::mpsc;

use crate::kernel::crypto;

use super::compiled::{Compiled, SCHEMA, SYSTEM, Source};
use super::store::bundles as rows;

/// Bundles held at most.
const HELD: usize = 24;
/// Bundles that may wait to be compiled.
const WAITING: usize = 64;

/// Bundles by their ids.
pub struct Library {
    shipped: Arc<Compiled>,
    held: Mutex<HashMap<String, (u64, Arc<Compiled>)>>,
    wanted: mpsc::Sender<String>,
    waiting: Mutex<Option<mpsc::Receiver<String>>>,
}

/// The id of the bundle that this binary ships: of what it says.
#[must_use]
pub fn shipped_id() -> String {
    let hash = crypto::sha256([SCHEMA, SYSTEM].concat().as_bytes());
    format!("system-{:02x}{:02x}{:02x}{:02x}", hash[0], hash[1], hash[2], hash[3])
}

impl Library {
    /// With the shipped bundle.
    ///
    /// # Errors
    /// Never, unless it was built wrong; a test holds it.
    pub fn new() -> Result<Self, String> {
        let source = Source { policies: SYSTEM.to_owned(), schema: None };
        let shipped = Compiled::new(&shipped_id(), &source, true);
        let said =
            |faults: Vec<crate::kernel::Fault>| faults.iter().map(|f| f.detail.as_str()).collect::<Vec<_>>().join("; ");
        let shipped = Arc::new(shipped.map_err(said)?);
        let (wanted, waiting) = mpsc::channel(WAITING);
        Ok(Self { shipped, held: Mutex::default(), wanted, waiting: Mutex::new(Some(waiting)) })
    }

    /// What this binary ships.
    pub(super) fn shipped(&self) -> &Arc<Compiled> {
        &self.shipped
    }

    /// Those that were made elsewhere and wait to be compiled here; once.
    pub(super) fn waiting(&self) -> Option<mpsc::Receiver<String>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// A bundle was made that may come into force.
    pub(super) fn expect(&self, id: &str) {
        if self.get(id).is_none() {
            // If too many wait it is compiled when it comes into force.
            let _ = self.wanted.try_send(id.to_owned());
        }
    }

    pub(super) fn get(&self, id: &str) -> Option<Arc<Compiled>> {
        if id == self.shipped.id {
            return Some(self.shipped.clone());
        }
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = held.values().map(|(n, _)| *n).max().unwrap_or(0) + 1;
        let found = held.get_mut(id)?;
        found.0 = newest;
        Some(found.1.clone())
    }

    pub(super) fn keep(&self, bundle: Arc<Compiled>) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.len() >= HELD
            && let Some(oldest) = held.iter().min_by_key(|(_, (n, _))| *n).map(|(id, _)| id.clone())
        {
            held.remove(&oldest);
        }
        let newest = held.values().map(|(n, _)| *n).max().unwrap_or(0) + 1;
        held.insert(bundle.id.clone(), (newest, bundle));
    }

    /// The bundle as far as it can be had without compiling it: what takes a second is not done while rows are held still.
    pub(super) async fn find(&self, conn: &mut PgConnection, id: &str) -> Result<Found, sqlx::Error> {
        if let Some(held) = self.get(id) {
            return Ok(Found::Held(held));
        }
        let row = rows::one(conn, id).await?.ok_or(sqlx::Error::RowNotFound)?;
        let text = rows::text(conn, id).await?.ok_or(sqlx::Error::RowNotFound)?;
        Ok(Found::Text { id: row.id, system: row.scope == "system", source: source(&text) })
    }

    /// What was found, compiled now if it is not held.
    pub(super) fn compiled(&self, found: Found) -> Result<Arc<Compiled>, sqlx::Error> {
        let (id, system, source) = match found {
            Found::Held(held) => return Ok(held),
            Found::Text { id, system, source } => (id, system, source),
        };
        if let Some(held) = self.get(&id) {
            return Ok(held);
        }
        let made = tokio::task::block_in_place(|| Compiled::new(&id, &source, system));
        let unreadable = |_| sqlx::Error::Decode(format!("bundle {id} does not compile any more").into());
        let bundle = Arc::new(made.map_err(unreadable)?);
        self.keep(bundle.clone());
        Ok(bundle)
    }
}

/// A bundle, compiled or as it was read.
pub(super) enum Found {
    Held(Arc<Compiled>),
    Text { id: String, system: bool, source: Source },
}

/// A bundle's text as it is compiled.
pub(super) fn source(text: &rows::Text) -> Source {
    let read = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Source { policies: read(&text.policies), schema: text.schema.as_deref().map(read) }
}
