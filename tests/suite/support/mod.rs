//! What the tests stand on.
//!
//! **Invariants.** One cluster a run, one database a test; nothing that a run started outlives it, however it ends. A fault
//! that a test armed says whether it happened.
//!
//! **Not here.** What any room promises: that is in the room's own module.
//!
//! **Why this way.** A mock of PostgreSQL would agree with us. The faults that matter are between two of its answers.

pub mod client;
pub mod daemon;
pub mod dice;
pub mod history;
pub mod postgres;
pub mod proxy;
pub mod reaper;
pub mod record;
pub mod wire;

use std::future::Future;
use std::time::{Duration, Instant};

/// How long is waited for what must come: no promise of the daemon's but the end of a test that hangs, on a machine however
/// slow. A test of a promised time measures it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What comes of `future`; says what it waited for when it gives up.
pub async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("waited {PATIENCE:?} in vain for: {what}"))
}

/// Waits until `what` holds, looking every 10 ms; says what it waited for when it gives up.
pub async fn until<F, Fut>(what: &str, mut holds: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    let start = Instant::now();
    while !holds().await {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain for: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
