//! The search: a follower that fills an index of its own behind the commits, so that the write path carries none of it; and
//! what is found there.
//!
//! Entries are taken in by blocks, once a block is whole. What is in no whole block yet is read from the ledger, so the search
//! reflects every entry as soon as there is less than [`TAIL`] of that.

pub(super) mod block;
mod find;
mod read;
pub(super) mod shelf;
mod tail;
pub(super) mod tokens;

use std::sync::Arc;
use std::time::Duration;

use sqlx::{Connection as _, PgConnection};
use tokio::sync::{Notify, watch};

use crate::kernel::supervisor::{Stop, Supervisor, Task, TaskError};
use crate::ledger::{Ledger, Whole};
use crate::store::Store;

use super::model::Stored;
use super::store::search as store;
use super::{Metrics, store as entries};
use block::Block;
use shelf::BLOCKS;

pub use find::{Counted, Page};
pub(super) use read::{Read, entry};
pub use tail::{Tail, Told};

/// Entries in a block: those of a tile.
pub(super) const BLOCK: i64 = 256;
/// Entries that a search may read from the ledger because they are in no block yet.
pub(super) const TAIL: i64 = 4 * BLOCK;
/// Blocks made at a time.
const AT_ONCE: i64 = 8;
/// How long nothing may be heard before it looks all the same.
const POLL: Duration = Duration::from_millis(500);
/// Pause between two rounds: many small ones would cost the writer more than a few large ones.
const PAUSE: Duration = Duration::from_millis(100);

/// Starts it; what it answers is the last entry of the last whole block. Who waits for it says so by `hurry`, and it does not
/// pause.
pub(super) fn start(
    db: &Store,
    ledger: &Ledger,
    metrics: Metrics,
    hurry: Arc<Notify>,
    tasks: &Supervisor,
) -> watch::Receiver<i64> {
    let (tell, told) = watch::channel(-1);
    let (db, ledger, index) = (db.clone(), ledger.clone(), ledger.watch_index());
    let task = Task::restarting("audit/search", move |stop| {
        let (db, mut index, tell, metrics) = (db.clone(), index.clone(), tell.clone(), metrics.clone());
        let (hurry, ledger) = (hurry.clone(), ledger.clone());
        async move {
            let mut conn = db.background("search").await?;
            let mut at = store::indexed(&mut conn).await?;
            loop {
                let head = *index.borrow_and_update();
                at = round(&ledger, &mut conn, at, head, &stop, &|at| {
                    metrics.indexed.set(head.min(at + TAIL));
                    tell.send_if_modified(|known| std::mem::replace(known, at) != at);
                })
                .await?;
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

/// Makes the blocks that became whole; tells and answers the last entry of the last of them, by whichever daemon.
async fn round(
    ledger: &Ledger,
    conn: &mut PgConnection,
    mut at: i64,
    head: i64,
    stop: &Stop,
    tell: &(dyn Fn(i64) + Sync),
) -> Result<i64, TaskError> {
    tell(at);
    while (at + 1) / BLOCK < (head + 1) / BLOCK && !stop.is_cancelled() {
        let to = match blocks(ledger, conn, head).await? {
            Some(to) => to,
            // Another daemon is at it.
            None => return store::indexed(conn).await.inspect(|at| tell(*at)).map_err(Into::into),
        };
        tell(to);
        // The database may have fewer entries than this daemon has seen: then there is nothing to go on with.
        if to <= at {
            return Ok(to);
        }
        at = to;
    }
    Ok(at)
}

/// Makes the next blocks, and the shelf that is full with the last of them.
async fn blocks(ledger: &Ledger, conn: &mut PgConnection, head: i64) -> Result<Option<i64>, TaskError> {
    let mut tx = conn.begin().await?;
    // What is derived can be derived again: it need not make the writer's commits wait for the disk.
    store::not_synchronous(&mut tx).await?;
    let Some(at) = store::take_indexed(&mut tx).await? else { return Ok(None) };
    // After a failover that lost entries the database has fewer than this daemon has seen.
    let head = entries::head(&mut tx).await?.map_or(-1, |(index, _)| index).min(head);
    let first = (at + 1) / BLOCK;
    let shelf = first / BLOCKS;
    // A shelf is full with the last block that is made at a time.
    let end = ((head + 1) / BLOCK).min(first + AT_ONCE).min((shelf + 1) * BLOCKS);
    if end <= first {
        return Ok(Some(at));
    }
    let lately = ledger.lately(first * BLOCK..end * BLOCK);
    let made: Vec<Block> = match lately {
        Some(all) if same(&mut tx, all.last()).await? => {
            let blocks = all.chunks(BLOCK as usize).zip(first..);
            blocks.map(|(whole, number)| Block::of(number, whole.iter().map(Whole::parts))).collect()
        }
        _ => {
            let all = entries::unindexed(&mut tx, first * BLOCK - 1, (end - first) * BLOCK).await?;
            let blocks = all.chunk_by(|a, b| a.index / BLOCK == b.index / BLOCK);
            blocks.map(|some| Block::of(some[0].index / BLOCK, some.iter().map(Stored::parts))).collect()
        }
    };
    let to = end * BLOCK - 1;
    store::keep_blocks(&mut tx, &made, to).await?;
    if end == (shelf + 1) * BLOCKS {
        let loose = store::loose(&mut tx, shelf * BLOCKS, end - 1).await?;
        let place = |block: &i64| u8::try_from(block - shelf * BLOCKS).unwrap_or_default();
        let lines = shelf::make(loose.iter().map(|(block, tokens)| (place(block), tokens.as_slice())));
        store::keep_shelf(&mut tx, shelf, &lines).await?;
    }
    tx.commit().await?;
    Ok(Some(to))
}

/// Whether the record has the last of these entries; then it has all, for histories that parted once do not meet again.
async fn same(conn: &mut PgConnection, last: Option<&Whole>) -> Result<bool, sqlx::Error> {
    let Some(last) = last else { return Ok(false) };
    let index = last.index.unsigned_abs();
    Ok(entries::leaves(conn, index, index + 1).await?.first() == Some(&last.leaf))
}
