//! The one way to write.
//!
//! **Invariants.** A change and its entry commit together or not at all. Indexes have no gap and commit in order. The head
//! row holds the RFC 6962 root over every leaf up to its index. Nothing is answered that a fence newer than the request does
//! not cover.
//!
//! **Not here.** What is recorded and how it is shown (`audit`), what is allowed (`governance`), the rows of the rooms (each
//! room's `store.rs`).
//!
//! **Why this way.** One writer a daemon takes whatever queued while the last commit was on its way and commits it as one
//! batch under the head row's lock: a transaction for each request was 27 times slower, and a leader to elect is a leader to lose.

pub mod entry;
pub mod touch;

pub use entry::{Entry, Outcome, Sealed, Segment, Signal};
pub use touch::{Touch, Touched, What};
