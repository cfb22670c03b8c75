//! Linearizable reads: a check of the head that began after the read arrived. One is on its way at a time, and serves all
//! that came while the one before it was.

use std::sync::Arc;

use sqlx::PgConnection;
use tokio::sync::{mpsc, oneshot};

use crate::kernel::Refusal;
use crate::kernel::supervisor::{Stop, TaskError};

use super::{Shared, store};

pub(super) type Asked = oneshot::Sender<Result<i64, Refusal>>;

/// Answers head checks until stopped.
pub(super) async fn run(shared: Arc<Shared>, asked: &mut mpsc::Receiver<Asked>, stop: Stop) -> Result<(), TaskError> {
    let mut conn: Option<PgConnection> = None;
    let mut waiting: Vec<Asked> = Vec::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            n = asked.recv_many(&mut waiting, 4096) => if n == 0 {
                // Nobody is left who could ask.
                stop.cancelled().await;
                return Ok(());
            },
        }
        let answer = check(&shared, &mut conn).await;
        for w in waiting.drain(..) {
            let _ = w.send(answer.clone());
        }
    }
}

async fn check(shared: &Shared, conn: &mut Option<PgConnection>) -> Result<i64, Refusal> {
    // A connection that was fine last time may have died since; a second try is on a new one.
    for _ in 0..2 {
        let mut c = match conn.take() {
            Some(c) => c,
            None => shared.store.dedicated("fence").await.map_err(|e| shared.store.refusal(e))?,
        };
        match store::head_index(&mut c).await {
            Ok(index) => {
                *conn = Some(c);
                shared.metrics.fences.inc();
                return Ok(index);
            }
            Err(e) => tracing::debug!(error = %e, "a head check failed"),
        }
    }
    Err(Refusal::unavailable(
        "the database cannot be reached, so it cannot be said what is newest; `consistency=stale` reads what this daemon knows",
    ))
}
