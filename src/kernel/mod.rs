//! What every room may lean on and nothing else may own: ids, time, refusals, cryptography, tasks, the web's vocabulary.
//!
//! **Invariants.** Only `clock` reads the wall clock; only `supervisor` spawns; only `crypto` touches `ring`. A [`Refusal`]
//! never carries a secret or an internal cause: those go to the log where they happen.
//!
//! **Not here.** Anything that knows a table (`store`, the rooms), an index (`ledger`) or a route (`api` and each room's `http.rs`).
//!
//! **Why this way.** The rooms must agree on a handful of words (caller, refusal, time, id). If two rooms had their own, the
//! record could not be read as one.

pub mod clock;
pub mod cloudevents;
pub mod crypto;
pub mod ids;
pub mod jose;
pub mod probe;
pub mod problem;
pub mod quota;
pub mod refusal;
pub mod secret;
pub mod supervisor;
pub mod web;

pub use clock::{Clock, Timestamp};
pub use problem::Problem;
pub use refusal::{Fault, Kind, Refusal};
pub use secret::Secret;

/// A future that may be stored and moved between threads; what object-safe async traits here return.
pub type BoxFuture<'a, T> = std::pin::Pin<Box<dyn std::future::Future<Output = T> + Send + 'a>>;
