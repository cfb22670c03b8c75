//! The room's SQL.

pub(super) mod services;
pub(super) mod topics;
