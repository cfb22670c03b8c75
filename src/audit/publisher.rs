//! The publisher: derives tiles from the leaves and signs a checkpoint over them, shortly after every change.
//!
//! It only ever derives what the head's root already commits to, so it may be repeated, and run on several daemons at once:
//! whoever is later writes the same bytes. Before it signs, the root it computed must be the head's.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use sqlx::{Connection as _, PgConnection};
use tokio::sync::Mutex;

use crate::kernel::crypto::Hash;
use crate::kernel::supervisor::{Supervisor, Task, TaskError};
use crate::kernel::{Clock, Timestamp};
use crate::ledger::Ledger;
use crate::ledger::merkle::{self, Frontier};
use crate::store::Store;

use super::keys::Keys;
use super::tiles::{Tile, WIDTH};
use super::{Metrics, start, store, tree};

/// Leaves read at a time.
const PAGE: u64 = 8192;
/// How long nothing may be heard before it looks all the same.
const POLL: Duration = Duration::from_secs(1);

pub(super) struct Publisher {
    pub store: Store,
    pub clock: Clock,
    pub keys: Keys,
    /// `DATA/checkpoint`: what this daemon published last, kept outside the database.
    pub file: PathBuf,
    /// Nothing is signed when it has stopped.
    pub ledger: Ledger,
    pub metrics: Metrics,
    /// Where it is, between two rounds.
    pub place: Option<Place>,
}

/// What was published: the frontier, and the hashes of the unfinished tile at each level.
pub(super) struct Place {
    frontier: Frontier,
    unfinished: Vec<Vec<Hash>>,
}

/// Starts it.
pub(super) fn start(publisher: Publisher, ledger: &Ledger, interval: Duration, tasks: &Supervisor) {
    let publisher = Arc::new(Mutex::new(publisher));
    let index = ledger.watch_index();
    tasks.start(Task::restarting("audit/publisher", move |stop| {
        let (publisher, mut index) = (publisher.clone(), index.clone());
        async move {
            let mut publisher = publisher.lock().await;
            loop {
                index.mark_unchanged();
                if let Err(e) = publisher.publish().await {
                    publisher.place = None;
                    return Err(e);
                }
                tokio::select! {
                    () = stop.cancelled() => { publisher.publish().await?; return Ok(()); }
                    _ = index.changed() => {}
                    () = tokio::time::sleep(POLL) => {}
                }
                tokio::time::sleep(interval).await;
            }
        }
    }));
}

impl Publisher {
    async fn publish(&mut self) -> Result<(), TaskError> {
        if self.ledger.stopped().is_some() {
            return Ok(());
        }
        let mut conn = self.store.reader().acquire().await?;
        let Some((index, root)) = store::head(&mut conn).await? else { return Ok(()) };
        let size = u64::try_from(index + 1)?;
        let mut place = match self.place.take() {
            Some(place) => place,
            None => {
                // The connection was lost, and a failover may have lost entries: the file is the proof of them.
                let dir = self.file.parent().unwrap_or(Path::new("."));
                if let Some(lost) = start::against_kept(&mut conn, dir, (index, root)).await? {
                    return Err(format!("{}; nothing is signed", lost.why).into());
                }
                resume(&mut conn).await?
            }
        };
        if place.frontier.size() >= size {
            self.place = Some(place);
            return Ok(());
        }
        let mut tiles = Vec::new();
        while place.frontier.size() < size {
            let from = place.frontier.size();
            let hashes = store::hashes(&mut conn, from, size.min(from + PAGE)).await?;
            if hashes.is_empty() {
                return Err(format!("entry {from} is missing although the head is at {index}").into());
            }
            for hash in hashes {
                place.frontier.push(hash);
                grow(&mut place.unfinished, 0, place.frontier.size(), hash, &mut tiles);
            }
        }
        if place.frontier.root() != root {
            self.metrics.mismatches.inc();
            return Err(format!(
                "the root over entries 0 to {index} is not the head's: an entry was changed; nothing is signed"
            )
            .into());
        }
        unfinished_tiles(&place, &mut tiles);
        let now = self.clock.now();
        self.keys.refresh(&mut conn, now).await?.map_err(|e| e.detail().to_owned())?;
        let note = self.keys.sign(size, root);
        keep(&mut conn, &tiles, size, &root, &note, now).await?;
        put(&self.file, note.as_bytes())?;
        self.metrics.published.set(i64::try_from(size).unwrap_or(i64::MAX));
        self.place = Some(place);
        Ok(())
    }
}

/// Replaces a small file whole, many times a second. The two files trade names, and the one that was set aside is written over
/// the next time: a rename onto a file would free its block each time, and where the filesystem tells the disk so at once
/// (mount option `discard`) everything else that writes waits for it, 20 ms here and at worst 140. Less than a sector of the same
/// length is old or new after a power cut; where the length changes, once in ten times as many entries, the content goes first.
fn put(file: &Path, content: &[u8]) -> std::io::Result<()> {
    let beside = file.with_extension("new");
    let mut aside = OpenOptions::new().create(true).truncate(false).write(true).open(&beside)?;
    let length = content.len() as u64;
    let same = aside.metadata()?.len() == length;
    aside.write_all(content)?;
    if !same {
        aside.set_len(length)?;
        aside.sync_data()?;
    }
    match renameat_with(CWD, &beside, CWD, file, RenameFlags::EXCHANGE) {
        // There is none yet, or the filesystem cannot exchange names.
        Err(Errno::NOENT | Errno::INVAL | Errno::NOSYS) => std::fs::rename(&beside, file),
        done => Ok(done?),
    }
}

async fn keep(
    conn: &mut PgConnection,
    tiles: &[(Tile, Vec<u8>)],
    size: u64,
    root: &Hash,
    note: &str,
    now: Timestamp,
) -> Result<(), sqlx::Error> {
    let mut tx = conn.begin().await?;
    store::keep_tiles(&mut tx, tiles).await?;
    store::keep_checkpoint(&mut tx, size, root, note, now).await?;
    tx.commit().await
}

/// Adds a hash to a level's unfinished tile; a tile that is full is finished and its root grows the level above.
fn grow(unfinished: &mut Vec<Vec<Hash>>, level: usize, size: u64, hash: Hash, tiles: &mut Vec<(Tile, Vec<u8>)>) {
    if unfinished.len() <= level {
        unfinished.push(Vec::new());
    }
    unfinished[level].push(hash);
    if unfinished[level].len() as u64 == WIDTH {
        let full = std::mem::take(&mut unfinished[level]);
        let n = (size >> (8 * (level as u32 + 1))).saturating_sub(1);
        tiles.push((Tile { level: level as u8, n, width: WIDTH }, full.concat()));
        grow(unfinished, level + 1, size, merkle::root(&full), tiles);
    }
}

/// The unfinished tiles above level 0: a proof needs them, and they change once in 256 leaves.
fn unfinished_tiles(place: &Place, tiles: &mut Vec<(Tile, Vec<u8>)>) {
    for (level, hashes) in place.unfinished.iter().enumerate().skip(1).filter(|(_, h)| !h.is_empty()) {
        let n = place.frontier.size() >> (8 * (level as u32 + 1));
        tiles.push((Tile { level: level as u8, n, width: hashes.len() as u64 }, hashes.concat()));
    }
}

/// Finds the place from what was published.
async fn resume(conn: &mut PgConnection) -> Result<Place, TaskError> {
    let size = store::checkpoint(conn).await?.map_or(0, |c| c.size);
    let mut nodes = Vec::new();
    for subtree in merkle::subtrees(0, size) {
        nodes.push(tree::node(conn, subtree).await?);
    }
    let frontier = Frontier::from_nodes(nodes, size).ok_or("the tiles do not give a frontier")?;
    let mut unfinished = Vec::new();
    let mut level = 0u8;
    while size >> (8 * u32::from(level)) > 0 {
        let all = size >> (8 * u32::from(level));
        let width = all % WIDTH;
        let tile = Tile { level, n: all / WIDTH, width };
        unfinished.push(if width == 0 {
            Vec::new()
        } else {
            tree::tile(conn, tile).await?.ok_or("a tile is missing")?
        });
        level += 1;
    }
    Ok(Place { frontier, unfinished })
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_file_is_replaced_whole_also_by_a_shorter_one() {
        let dir = std::env::temp_dir().join(format!("sop-put-{}", uuid::Uuid::new_v4()));
        std::fs::create_dir(&dir).unwrap();
        let file = dir.join("checkpoint");
        for content in ["first", "the second, which is longer", "third", "4"] {
            super::put(&file, content.as_bytes()).unwrap();
            assert_eq!(std::fs::read_to_string(&file).unwrap(), content);
        }
        std::fs::remove_dir_all(dir).unwrap();
    }
}
