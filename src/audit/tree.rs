//! The tree as it is stored: tiles, and the hashes of subtrees and proofs that are found in them.

use sqlx::PgConnection;

use crate::kernel::crypto::Hash;
use crate::ledger::attached;
use crate::ledger::merkle::{self, Subtree};

use super::store;
use super::tiles::{self, Tile, WIDTH};

/// A tile's hashes; `None` if the tree has not grown so far.
pub(super) async fn tile(conn: &mut PgConnection, tile: Tile) -> Result<Option<Vec<Hash>>, sqlx::Error> {
    let width = usize::try_from(tile.width).unwrap_or(0);
    let mut hashes = if tile.level == 0 {
        let from = tile.n.saturating_mul(WIDTH);
        let hashes = store::hashes(conn, from, from.saturating_add(tile.width)).await?;
        if hashes.is_empty() && detached(conn, from.saturating_add(WIDTH)).await? {
            store::tile(conn, 0, tile.n).await?.map(|b| tiles::hashes(&b)).unwrap_or_default()
        } else {
            hashes
        }
    } else {
        store::tile(conn, tile.level, tile.n).await?.map(|b| tiles::hashes(&b)).unwrap_or_default()
    };
    hashes.truncate(width);
    Ok((hashes.len() == width).then_some(hashes))
}

/// Whether the entries before `end` are in partitions that were detached.
pub(super) async fn detached(conn: &mut PgConnection, end: u64) -> Result<bool, sqlx::Error> {
    Ok(attached(conn).await?.start >= i64::try_from(end).unwrap_or(i64::MAX))
}

/// The root of a perfect subtree.
pub(super) async fn node(conn: &mut PgConnection, subtree: Subtree) -> Result<Hash, sqlx::Error> {
    let (holder, range) = tiles::holder(subtree);
    let hashes = tile(conn, holder).await?;
    let missing = || sqlx::Error::Decode(format!("tile {}/{} is missing or too short", holder.level, holder.n).into());
    let hashes = hashes.and_then(|h| h.get(range).map(<[Hash]>::to_vec)).ok_or_else(missing)?;
    Ok(merkle::root(&hashes))
}

/// The roots of ranges of leaves, as a proof names them.
pub(super) async fn path(conn: &mut PgConnection, ranges: Vec<(u64, u64)>) -> Result<Vec<Hash>, sqlx::Error> {
    let mut out = Vec::with_capacity(ranges.len());
    for (start, end) in ranges {
        let mut nodes = Vec::new();
        for subtree in merkle::subtrees(start, end) {
            nodes.push(node(conn, subtree).await?);
        }
        out.extend(merkle::fold(&nodes));
    }
    Ok(out)
}

/// The root of the first `size` leaves.
pub(super) async fn root(conn: &mut PgConnection, size: u64) -> Result<Hash, sqlx::Error> {
    let root = path(conn, vec![(0, size)]).await?;
    Ok(root.first().copied().unwrap_or_else(|| merkle::root(&[])))
}
