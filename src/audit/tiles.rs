//! Tiles: their paths (C2SP tlog-tiles), and how hashes of the tree are found in them.

use crate::kernel::crypto::Hash;
use crate::ledger::merkle;

/// Hashes in a full tile.
pub const WIDTH: u64 = 256;

/// A tile, or the beginning of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// 0: leaf hashes; each level above holds the roots of full tiles below.
    pub level: u8,
    /// Its place in its level.
    pub n: u64,
    /// How many hashes, 1-256.
    pub width: u64,
}

/// What stands under `/log/tile/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// Hashes.
    Hashes(Tile),
    /// The leaves of a level 0 tile.
    Entries(Tile),
}

impl Path {
    /// Reads `<L>/<N>[.p/<W>]` or `entries/<N>[.p/<W>]`.
    #[must_use]
    pub fn parse(path: &str) -> Option<Self> {
        let (level, rest) = path.split_once('/')?;
        let (rest, width) = match rest.rsplit_once(".p/") {
            Some((rest, w)) => (rest, decimal(w).filter(|w| (1..WIDTH).contains(w))?),
            None => (rest, WIDTH),
        };
        let n = number(rest)?;
        if level == "entries" {
            return Some(Self::Entries(Tile { level: 0, n, width }));
        }
        let level = decimal(level).filter(|l| *l < 64)?;
        Some(Self::Hashes(Tile { level: u8::try_from(level).ok()?, n, width }))
    }
}

/// The place of a tile in a path: `x001/x234/067`.
#[must_use]
pub fn place(n: u64) -> String {
    let mut text = format!("{:03}", n % 1000);
    let mut rest = n / 1000;
    while rest > 0 {
        text = format!("x{:03}/{text}", rest % 1000);
        rest /= 1000;
    }
    text
}

fn number(text: &str) -> Option<u64> {
    let parts: Vec<&str> = text.split('/').collect();
    let (last, above) = parts.split_last()?;
    let three =
        |p: &str| (p.len() == 3 && p.bytes().all(|b| b.is_ascii_digit())).then(|| p.parse::<u64>().ok()).flatten();
    let mut n: u64 = 0;
    for part in above {
        n = n.checked_mul(1000)?.checked_add(three(part.strip_prefix('x')?)?)?;
    }
    n = n.checked_mul(1000)?.checked_add(three(last)?)?;
    (place(n) == text).then_some(n)
}

fn decimal(text: &str) -> Option<u64> {
    text.parse().ok().filter(|n: &u64| n.to_string() == text)
}

/// The tile that holds a perfect subtree, and which of its hashes make it up.
#[must_use]
pub fn holder(subtree: merkle::Subtree) -> (Tile, std::ops::Range<usize>) {
    let (level, inside) = (subtree.level / 8, subtree.level % 8);
    let first = subtree.index << inside;
    let start = usize::try_from(first % WIDTH).unwrap_or(0);
    let end = start + (1 << inside);
    (Tile { level: u8::try_from(level).unwrap_or(u8::MAX), n: first / WIDTH, width: end as u64 }, start..end)
}

/// Splits a tile's bytes into hashes.
#[must_use]
pub fn hashes(bytes: &[u8]) -> Vec<Hash> {
    bytes.as_chunks::<32>().0.to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        assert_eq!(place(1_234_067), "x001/x234/067");
        assert_eq!(place(5), "005");
        let tile = |level, n, width| Tile { level, n, width };
        assert_eq!(Path::parse("0/x001/x234/067"), Some(Path::Hashes(tile(0, 1_234_067, 256))));
        assert_eq!(Path::parse("1/000.p/17"), Some(Path::Hashes(tile(1, 0, 17))));
        assert_eq!(Path::parse("entries/273.p/112"), Some(Path::Entries(tile(0, 273, 112))));
        for bad in [
            "",
            "0",
            "0/1",
            "64/000",
            "00/000",
            "0/000.p/0",
            "0/000.p/256",
            "0/000.p/017",
            "0/x000/001",
            "0/001/002",
            "entries/",
            "0/x1234/001",
            "-1/000",
        ] {
            assert_eq!(Path::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn subtrees_are_found_in_tiles() {
        let (tile, range) = holder(merkle::Subtree { level: 0, index: 300 });
        assert_eq!((tile.level, tile.n, range), (0, 1, 44..45));
        let (tile, range) = holder(merkle::Subtree { level: 8, index: 3 });
        assert_eq!((tile.level, tile.n, range), (1, 0, 3..4));
        let (tile, range) = holder(merkle::Subtree { level: 10, index: 1 });
        assert_eq!((tile.level, tile.n, range), (1, 0, 4..8));
    }
}
