//! The web's vocabulary for handlers: who asks ([`Caller`]), what a body, a query, a page or a precondition looks like, and
//! how a [`Refusal`](super::Refusal) is answered. Routers and layers are in `api`.

mod caller;

pub use caller::{Ask, Authority, Caller, Credential, Decision, Depends, EntityName, Idempotency, Permit, RequestInfo};
