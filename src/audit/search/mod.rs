//! The search: a follower that fills an index of its own behind the commits, so that the write path carries none of it; and
//! what is found there.

mod find;
mod tail;
pub(super) mod tokens;

use std::sync::Arc;
use std::time::Duration;

use sqlx::{Connection as _, PgConnection};
use tokio::sync::{Notify, watch};

use crate::kernel::supervisor::{Supervisor, Task, TaskError};
use crate::ledger::Ledger;
use crate::store::Store;

use super::model::{Found, Stored};
use super::store::search as store;
use super::{Metrics, store as entries};

pub use find::{Counted, Page};
pub use tail::{Tail, Told};

/// Entries in a block: those of a tile.
pub(super) const BLOCK: i64 = 256;
/// Entries taken at a time.
const PAGE: i64 = 2 * BLOCK;
/// How long nothing may be heard before it looks all the same.
const POLL: Duration = Duration::from_millis(500);
/// Pause between two rounds: many small ones would cost the writer more than a few large ones.
const PAUSE: Duration = Duration::from_millis(100);

/// Starts it; what it answers tells how far it has come. Who waits for it says so by `hurry`, and it does not pause.
pub(super) fn start(
    db: &Store,
    ledger: &Ledger,
    metrics: Metrics,
    hurry: Arc<Notify>,
    tasks: &Supervisor,
) -> watch::Receiver<i64> {
    let (tell, told) = watch::channel(-1);
    let (db, index) = (db.clone(), ledger.watch_index());
    let task = Task::restarting("audit/search", move |stop| {
        let (db, mut index, tell, metrics) = (db.clone(), index.clone(), tell.clone(), metrics.clone());
        let hurry = hurry.clone();
        async move {
            let mut conn = db.background("search").await?;
            loop {
                index.mark_unchanged();
                let at = round(&mut conn).await?;
                metrics.indexed.set(at);
                tell.send_if_modified(|known| std::mem::replace(known, at) != at);
                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    _ = index.changed() => tokio::select! {
                        () = tokio::time::sleep(PAUSE) => {}
                        () = hurry.notified() => {}
                    },
                    () = hurry.notified() => {}
                    () = tokio::time::sleep(POLL) => {}
                }
            }
        }
    });
    // Taking entries apart is milliseconds of work at a time: no request is to wait behind it.
    tasks.start(task.behind());
    told
}

/// Takes in what is new; answers how far the search has come, by whichever daemon.
async fn round(conn: &mut PgConnection) -> Result<i64, TaskError> {
    loop {
        let mut tx = conn.begin().await?;
        // What is derived can be derived again: it need not make the writer's commits wait for the disk.
        store::not_synchronous(&mut tx).await?;
        let Some(at) = store::take_indexed(&mut tx).await? else {
            // Another daemon is at it.
            drop(tx);
            return Ok(store::indexed(conn).await?);
        };
        // Up to the end of a block, so that whole blocks are mostly made from what is at hand.
        let most = PAGE - (at + 1).rem_euclid(BLOCK);
        let new = entries::unindexed(&mut tx, at, most).await?;
        let Some(last) = new.last() else { return Ok(at) };
        let to = last.index;
        let found: Vec<Found> = new.iter().map(Stored::found).collect();
        store::index(&mut tx, &found, to).await?;
        for block in (at + 1) / BLOCK..(to + 1) / BLOCK {
            let tokens = block_tokens(&mut tx, block, &new, &found).await?;
            store::keep_block(&mut tx, block, &tokens).await?;
        }
        tx.commit().await?;
        if (new.len() as i64) < most {
            return Ok(to);
        }
    }
}

/// The tokens of a block that has just become whole; `new` holds its last entries at least.
async fn block_tokens(
    conn: &mut PgConnection,
    block: i64,
    new: &[Stored],
    found: &[Found],
) -> Result<Vec<String>, sqlx::Error> {
    let (first, end) = (block * BLOCK, (block + 1) * BLOCK);
    let before = match new.first() {
        Some(n) if n.index > first => entries::unindexed(conn, first - 1, n.index - first).await?,
        _ => Vec::new(),
    };
    let before: Vec<(Stored, Found)> = before.into_iter().map(|s| (s.found(), s)).map(|(f, s)| (s, f)).collect();
    let now = new.iter().zip(found).filter(|(s, _)| (first..end).contains(&s.index));
    Ok(tokens::of_block(before.iter().map(|(s, f)| (s, f)).chain(now)))
}
