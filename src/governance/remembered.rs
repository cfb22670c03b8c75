//! Decisions that were made before and still hold.
//!
//! A decision on the API is a function of the question and of the entities it can reach. It is remembered with the version of
//! the snapshot that was read *before* it was made: one that changed since, or while it was made, makes it worthless.

use std::sync::Arc;

use quick_cache::sync::Cache;

use crate::kernel::crypto::{self, Hash};
use crate::kernel::web::{Ask, Caller};

/// Decisions held at most.
const HELD: usize = 65_536;

/// What was decided.
pub(super) struct Answer {
    pub version: u64,
    pub allowed: bool,
    /// In order.
    pub policies: Arc<[String]>,
    /// The bundles it was put to.
    pub bundles: Arc<[String]>,
    /// Facts it rests on.
    pub depends: Vec<u64>,
}

/// The decisions.
pub(super) struct Remembered(Cache<Hash, Arc<Answer>>);

impl Remembered {
    pub fn new() -> Self {
        Self(Cache::new(HELD))
    }

    /// What was decided, if the snapshot is still at that version.
    pub fn get(&self, question: &Hash, version: u64) -> Option<Arc<Answer>> {
        self.0.get(question).filter(|a| a.version == version)
    }

    pub fn keep(&self, question: Hash, answer: Arc<Answer>) {
        self.0.insert(question, answer);
    }
}

/// Everything a decision on the API can depend on, entities aside. `None`: it has a context of its own and is not remembered.
pub(super) fn question(caller: &Caller, ask: &Ask) -> Option<Hash> {
    if !ask.context.is_empty() {
        return None;
    }
    let (who, request) = (caller.principal(), caller.request());
    let parts = [&who.kind, &who.id, ask.action, ask.kind, &ask.name, &request.method, &request.path];
    Some(crypto::hash_tuple(parts.into_iter().chain(caller.scopes().iter().map(String::as_str))))
}
