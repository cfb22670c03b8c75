//! The web's vocabulary for handlers: who asks ([`Caller`]), what a body, a query, a page or a precondition looks like, and
//! how a [`Refusal`](super::Refusal) is answered.
//!
//! **Invariants.** Whatever cannot be read is a 400 that points at the fault; nothing here knows a room.
//!
//! **Not here.** Routers and layers: those are in `api`.
//!
//! **Why this way.** Handlers are ten lines because what they take apart is taken apart here, once and the same for all.

mod caller;
pub mod cursor;
mod extract;
pub mod gateway;
mod objects;
mod optional;
mod query;
mod respond;

pub use caller::{
    Ask, Authority, Caller, Credential, Decision, Depends, EntityName, Idempotency, Identity, Permit, Proposing,
    RequestInfo, Voiced, block,
};
pub use extract::{
    Body, BodyLimit, Json, LARGE, LargeJson, Name, Path, Preconditions, Tags, faulty, inflate, is_json, known,
    last_event_id, page_limit, parse_json, read_body,
};
pub use objects::Strict;
pub use optional::{Away, JsonOr, Nothing, WhileAway};
pub use query::{Query, pairs, parse_query};
pub use respond::{Answer, Listing, Reason, SOP_INDEX, problem_document, problem_response};
