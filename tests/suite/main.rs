//! One binary for everything that needs a real PostgreSQL or a real daemon: a module a room, so that linking stays cheap.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::disallowed_methods,
    clippy::large_futures,
    clippy::zombie_processes,
    dead_code,
    unreachable_pub
)]

mod support;

mod attacks;
mod audit;
mod cases;
mod cli;
mod clients;
mod clock;
mod crash;
mod damage;
mod decisions;
mod events;
mod exchange;
mod failover;
mod foureyes;
mod front;
mod governance;
mod hangups;
mod health;
mod history;
mod hostile;
mod jwks;
mod keys;
mod layers;
mod ledger;
mod nexus;
mod operations;
mod policy;
mod policy_files;
mod proxy;
mod rollout;
mod search;
mod secrets;
mod spool;
mod state;
mod state_contract;
mod state_etcd;
mod state_etcd_live;
mod state_faults;
mod state_history;
mod state_leases;
mod state_linear;
mod state_locks;
mod state_places;
mod state_txn;
mod state_watch;
mod token;
mod turns;
mod tx;
mod tx_refused;
mod verify;
mod witness;
