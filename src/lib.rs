//! `sop`: the System Operations Protocol of LOGOS as one daemon on one PostgreSQL.
//!
//! The house, floor by floor (a module imports only from what is below it): `config`, `telemetry` < `kernel` < `store` <
//! `ledger` < `audit` < `governance` < `token`, `state` < `nexus` < `health` < `api` < `boot`, `cli`.

pub mod kernel;
pub mod ledger;
