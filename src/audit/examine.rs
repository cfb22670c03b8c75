//! Examines the record as it is stored, from rows to root, and says of each thing what was changed.
//!
//! The leaves are hashed again. What they give is held against the hashes beside them, the tiles, the published checkpoint and
//! the head; details and records against what their leaf commits to. Where two disagree, the one that a third agrees with is
//! believed, the tile above before the row.

use sqlx::PgConnection;

use crate::kernel::crypto::{self, Domain, Hash};
use crate::ledger::merkle::{self, Frontier};
use crate::ledger::{entry, segment};

use super::model::Stored;
use super::note::{Checkpoint, VerifierKey};
use super::store::damage::{self as store, Row};
use super::tiles::{self, WIDTH};
use super::tree;

/// Entries looked at together: those of a tile.
const BLOCK: i64 = WIDTH as i64;

/// Something that is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The entry, if it is about one.
    pub index: Option<i64>,
    /// What is wrong, in a sentence.
    pub what: String,
}

impl Finding {
    fn entry(index: i64, what: &str) -> Self {
        Self { index: Some(index), what: format!("entry {index}: {what}") }
    }

    fn other(what: String) -> Self {
        Self { index: None, what }
    }
}

/// An examination of the whole record, a block at a time.
pub(super) struct Examiner {
    keys: Vec<VerifierKey>,
    frontier: Frontier,
    /// What the leaves give at the size of the published checkpoint.
    published: Option<(u64, Hash)>,
    size: i64,
    found: Vec<Finding>,
    entries_wrong: bool,
}

impl Examiner {
    pub async fn new(conn: &mut PgConnection, keys: Vec<VerifierKey>) -> Result<Self, sqlx::Error> {
        // In this order: a daemon that is at work publishes what it has written.
        let published = super::store::checkpoint(conn).await?.map(|p| (p.size, merkle::root(&[])));
        let size = store::head(conn).await?.map_or(0, |h| h.0 + 1);
        Ok(Self { keys, frontier: Frontier::default(), published, size, found: Vec::new(), entries_wrong: false })
    }

    /// How many entries it looks at.
    pub fn size(&self) -> i64 {
        self.size
    }

    /// Takes the next block; its rows, for who holds the records of segments against them. `None`: that was the last.
    pub async fn next(&mut self, conn: &mut PgConnection) -> Result<Option<Vec<Stored>>, sqlx::Error> {
        let from = i64::try_from(self.frontier.size()).unwrap_or(i64::MAX);
        if from >= self.size {
            return Ok(None);
        }
        let to = self.size.min(from + BLOCK);
        let rows = store::rows(conn, from, to).await?;
        let (leaves, found) = block(conn, from, to, &rows).await?;
        self.entries_wrong |= !found.is_empty();
        self.found.extend(found);
        for hash in leaves {
            self.frontier.push(hash);
            if let Some((size, root)) = &mut self.published
                && *size == self.frontier.size()
            {
                *root = self.frontier.root();
            }
        }
        Ok(Some(rows.into_iter().map(stored).collect()))
    }

    /// Holds the records of an entry against the root it commits to.
    pub fn records(&mut self, index: i64, root: &[u8], records: &[Vec<u8>]) {
        if segment::over(records.iter().map(Vec::as_slice)).root != root {
            self.found.push(Finding::entry(index, "its records were changed: they are not those it commits to"));
        }
    }

    /// After the last block: tiles, checkpoint and head.
    pub async fn finish(mut self, conn: &mut PgConnection) -> Result<Vec<Finding>, sqlx::Error> {
        self.tiles(conn).await?;
        if let Some(p) = super::store::checkpoint(conn).await? {
            // Of now, not of when the examination began: more was written and published meanwhile.
            let there = store::head(conn).await?.map_or(0, |h| u64::try_from(h.0 + 1).unwrap_or(0));
            match Checkpoint::open_any(&p.note, &self.keys) {
                Err(e) => self.found.push(Finding::other(format!("the published checkpoint was changed: {e}"))),
                Ok(c) if c.size != p.size || c.root != p.root => {
                    self.found.push(Finding::other(
                        "the published checkpoint was changed: its note says something else".into(),
                    ));
                }
                Ok(c) if c.size > there => self.found.push(Finding::other(format!(
                    "the tail was cut off: {} entries were published, there are {there}",
                    c.size
                ))),
                Ok(c) => {
                    let same = self.published.as_ref().is_none_or(|(size, root)| *size != c.size || *root == c.root);
                    if !same && !self.entries_wrong {
                        self.found.push(Finding::other(format!(
                            "the first {} entries do not give the root that was published",
                            c.size
                        )));
                    }
                }
            }
        }
        if let Some((index, root, frontier)) = store::head(conn).await?
            && index + 1 == self.size
            && !self.entries_wrong
        {
            if root != self.frontier.root() {
                self.found.push(Finding::other(format!(
                    "the head was changed: the entries 0 to {index} do not give its root"
                )));
            }
            if frontier != self.frontier.encode() {
                self.found.push(Finding::other("the head was changed: its frontier is not that of the entries".into()));
            }
        }
        self.found.sort_by_key(|f| f.index.unwrap_or(i64::MAX));
        Ok(self.found)
    }

    /// Tiles above the first level: each hash is the root of a whole tile below.
    async fn tiles(&mut self, conn: &mut PgConnection) -> Result<(), sqlx::Error> {
        let published = super::store::checkpoint(conn).await?.map_or(0, |p| p.size);
        for level in 1i16..8 {
            let all = published >> (8 * u32::try_from(level).unwrap_or(0));
            for n in 0..all.div_ceil(WIDTH) {
                let n = i64::try_from(n).unwrap_or(i64::MAX);
                let Some(bytes) = store::tile(conn, level, n).await? else {
                    self.found.push(Finding::other(format!("tile {level}/{n} is missing")));
                    continue;
                };
                for (k, hash) in tiles::hashes(&bytes).iter().enumerate() {
                    let below = n * BLOCK + i64::try_from(k).unwrap_or(0);
                    let child = store::tile(conn, level - 1, below).await?.map(|b| tiles::hashes(&b));
                    let fits = child.is_some_and(|c| c.len() as u64 == WIDTH && merkle::root(&c) == *hash);
                    // A tile below that was changed has been named already, where the leaves say which of the two it is.
                    let known = self.found.iter().any(|f| f.what.starts_with(&format!("tile {}/{below} ", level - 1)));
                    if !fits && !known {
                        self.found.push(Finding::other(format!(
                            "tile {level}/{n} was changed: hash {k} is not the root of the tile below"
                        )));
                    }
                }
            }
        }
        Ok(())
    }
}

fn stored(row: Row) -> Stored {
    Stored { index: row.index, leaf: row.leaf, salt: row.salt, details: row.details, segment: row.segment }
}

/// Examines the entries of one block against their hashes and their tile; answers the hashes that its leaves give.
async fn block(
    conn: &mut PgConnection,
    from: i64,
    to: i64,
    rows: &[Row],
) -> Result<(Vec<Hash>, Vec<Finding>), sqlx::Error> {
    let n = from / BLOCK;
    let tile = store::tile(conn, 0, n).await?.map(|b| tiles::hashes(&b)).filter(|t| t.len() as u64 == WIDTH);
    let above = store::tile(conn, 1, n / BLOCK).await?.map(|b| tiles::hashes(&b));
    let above = above.and_then(|a| a.get(usize::try_from(n % BLOCK).unwrap_or(0)).copied());
    if let (true, Some(tile)) = (rows.is_empty(), &tile)
        && tree::detached(conn, to.unsigned_abs()).await?
    {
        // Their tiles are held against each other, up to the head's root.
        return Ok((tile.clone(), Vec::new()));
    }
    let mut found = Vec::new();
    let mut leaves = Vec::new();
    for index in from..to {
        let Some(row) = rows.iter().find(|r| r.index == index) else {
            found.push(Finding::entry(index, "it is missing: the row was deleted"));
            leaves.push([0; 32]);
            continue;
        };
        leaves.push(crypto::hash(Domain::Leaf, &[&row.leaf]));
    }
    // Whom to believe: the tile, if the tile above agrees with it; else the leaves.
    let believed = tile.as_ref().filter(|t| above.is_none_or(|a| merkle::root(t) == a));
    if let (Some(t), None) = (&tile, believed) {
        if above == Some(merkle::root(&leaves)) {
            found.push(Finding::other(format!("tile 0/{n} was changed: its hashes are not those of the entries")));
        } else if merkle::root(t) == merkle::root(&leaves) {
            found.push(Finding::other(format!(
                "tile 0/{n} and its entries {from} to {} were changed alike, or the tile above was",
                to - 1
            )));
        } else {
            found.push(Finding::other(format!("tile 0/{n} and entries of it, {from} to {}, were changed", to - 1)));
        }
    }
    for row in rows {
        let at = usize::try_from(row.index - from).unwrap_or(usize::MAX);
        let Some(leaf) = leaves.get(at) else { continue };
        let trusted = believed.and_then(|t| t.get(at));
        found.extend(one(row, leaf, trusted, believed, &leaves, from));
    }
    Ok((leaves, found))
}

/// Examines one entry. `trusted` is what the tile has of it.
fn one(
    row: &Row,
    leaf: &Hash,
    trusted: Option<&Hash>,
    tile: Option<&Vec<Hash>>,
    leaves: &[Hash],
    from: i64,
) -> Option<Finding> {
    let index = row.index;
    let beside = row.hash.as_slice() == leaf;
    match trusted {
        Some(t) if t == leaf && !beside => return Some(Finding::entry(index, "the hash beside its leaf was changed")),
        Some(t) if t != leaf => {
            let at = usize::try_from(index - from).unwrap_or(0);
            let swapped = tile
                .and_then(|t| t.iter().position(|h| h == leaf))
                .filter(|other| tile.and_then(|t| t.get(at)).is_some_and(|mine| leaves.get(*other) == Some(mine)));
            let what = match swapped {
                Some(other) => format!("it was swapped with entry {}", from + i64::try_from(other).unwrap_or(0)),
                None if beside => "it was replaced: leaf and hash are not those that were published".to_owned(),
                None => "its leaf was changed: it does not hash to what was published".to_owned(),
            };
            return Some(Finding::entry(index, &what));
        }
        None if !beside => return Some(Finding::entry(index, "its leaf, or the hash beside it, was changed")),
        _ => {}
    }
    let (Some(salt), Some(details)) = (&row.salt, &row.details) else {
        let gone = row.salt.is_some() || row.details.is_some();
        return gone.then(|| Finding::entry(index, "its salt or its details are missing, and not both"));
    };
    let segment = row.segment.as_deref().map(|s| Hash::try_from(s).unwrap_or_default());
    let body = entry::body(&entry::commitment(salt, details), segment.as_ref());
    let leaf: serde_json::Value = serde_json::from_slice(&row.leaf).unwrap_or_default();
    (leaf["body"] != crypto::base64(body))
        .then(|| Finding::entry(index, "its details, their salt or the root of its records were changed"))
}

/// Examines the block that holds `index` alone: the self-audit's sample.
pub(super) async fn sample(conn: &mut PgConnection, index: i64, size: i64) -> Result<Vec<Finding>, sqlx::Error> {
    let from = index / BLOCK * BLOCK;
    let to = size.min(from + BLOCK);
    let rows = store::rows(conn, from, to).await?;
    block(conn, from, to, &rows).await.map(|(_, found)| found)
}
