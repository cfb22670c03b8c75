//! The search: a follower that fills an index of its own behind the commits, so that the write path carries none of it.

use std::time::Duration;

use sqlx::Connection as _;
use tokio::sync::watch;

use crate::kernel::supervisor::{Supervisor, Task, TaskError};
use crate::ledger::Ledger;
use crate::store::Store;

use super::model::{Found, Stored};
use super::{Metrics, store};

/// Entries taken at a time.
const PAGE: i64 = 500;
/// How long nothing may be heard before it looks all the same.
const POLL: Duration = Duration::from_millis(500);
/// Pause between two rounds: many small ones would cost the writer more than a few large ones.
const PAUSE: Duration = Duration::from_millis(100);

/// Starts it; what it answers tells how far it has come.
pub(super) fn start(store: &Store, ledger: &Ledger, metrics: Metrics, tasks: &Supervisor) -> watch::Receiver<i64> {
    let (tell, told) = watch::channel(-1);
    let (store, index) = (store.clone(), ledger.watch_index());
    tasks.start(Task::restarting("audit/search", move |stop| {
        let (store, mut index, tell, metrics) = (store.clone(), index.clone(), tell.clone(), metrics.clone());
        async move {
            loop {
                index.mark_unchanged();
                let at = round(&store).await?;
                metrics.indexed.set(at);
                tell.send_if_modified(|known| std::mem::replace(known, at) != at);
                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    _ = index.changed() => tokio::time::sleep(PAUSE).await,
                    () = tokio::time::sleep(POLL) => {}
                }
            }
        }
    }));
    told
}

/// Takes in what is new; answers how far the search has come, by whichever daemon.
async fn round(store: &Store) -> Result<i64, TaskError> {
    let mut conn = store.reader().acquire().await?;
    loop {
        let mut tx = conn.begin().await?;
        // What is derived can be derived again: it need not make the writer's commits wait for the disk.
        store::not_synchronous(&mut tx).await?;
        let Some(at) = store::take_indexed(&mut tx).await? else {
            // Another daemon is at it.
            drop(tx);
            return Ok(store::indexed(&mut conn).await?);
        };
        let new = store::unindexed(&mut tx, at, PAGE).await?;
        let Some(last) = new.last() else { return Ok(at) };
        let to = last.index;
        let found: Vec<Found> = new.iter().map(Stored::found).collect();
        store::index(&mut tx, &found, to).await?;
        tx.commit().await?;
        if (new.len() as i64) < PAGE {
            return Ok(to);
        }
    }
}
