//! `sop`: the System Operations Protocol of LOGOS as one daemon on one PostgreSQL.
//!
//! The house, floor by floor (a module imports only from what is below it): `config`, `telemetry` < `kernel` < `store` <
//! `ledger` < `audit` < `governance` < `token`, `state` < `nexus` < `health` < `api` < `boot`, `cli`.

pub mod api;
pub mod audit;
pub mod boot;
pub mod cli;
pub mod config;
pub mod governance;
pub mod health;
pub mod kernel;
pub mod ledger;
pub mod nexus;
pub mod state;
pub mod store;
pub mod telemetry;
pub mod token;
