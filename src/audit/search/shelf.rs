//! A shelf: which of 64 blocks may hold a token, in a few bytes for each token.
//!
//! For each block there is a Bloom filter, and the filters lie across each other: a *word* is one bit of all 64, so that one
//! look says it of all. All bits of a token lie in one *line* of 64 words, so that a search reads one line a token and shelf,
//! however much a shelf holds (bit-sliced signatures: Faloutsos and Christodoulakis 1984; BitFunnel 2017). A filter never says
//! no where there is one. It says yes in vain about one time in two hundred, more where a block holds far more than its
//! neighbours: such a block is then looked at in vain.

use super::tokens::{ANYTHING, Token};

/// Blocks of a shelf: the bits of a word.
pub(in crate::audit) const BLOCKS: i64 = 64;
/// Words of a line.
const WORDS: usize = 64;
/// Bytes of a line.
pub(in crate::audit) const LINE: usize = WORDS * 8;
/// Bits set for a token, of those there are for each.
const SET: u32 = 5;
const BITS: usize = 16;
/// Lines at most: 2 MiB.
const MOST: usize = 4096;

/// Where a token's bits are: what of all lines the first 32 bits say, the words of the line the others.
#[derive(Clone, Copy, Debug)]
pub(in crate::audit) struct Spot {
    /// To be scaled to the number of lines: `at * lines >> 32`.
    pub at: u32,
    words: u32,
}

impl Spot {
    /// Where a token is. splitmix64, for ever the same.
    pub fn of(token: Token) -> Self {
        let mut h = u64::from(token).wrapping_add(0x9e37_79b9_7f4a_7c15);
        h = (h ^ h >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        h = (h ^ h >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        h ^= h >> 31;
        Self {
            at: u32::try_from(h >> 32).unwrap_or_default(),
            words: u32::try_from(h & 0xffff_ffff).unwrap_or_default(),
        }
    }

    fn line(self, lines: usize) -> usize {
        usize::try_from((u64::from(self.at) * lines as u64) >> 32).unwrap_or_default()
    }

    fn words(self) -> impl Iterator<Item = usize> {
        (0..SET).map(move |i| ((self.words >> (6 * i)) & 63) as usize)
    }

    /// Which blocks may hold it, by its line; all, if that is no line.
    pub fn blocks(self, line: &[u8]) -> u64 {
        let word =
            |n: usize| line.get(n * 8..n * 8 + 8).and_then(|w| w.try_into().ok()).map_or(u64::MAX, u64::from_le_bytes);
        self.words().fold(u64::MAX, |all, n| all & word(n))
    }
}

/// The shelf of these blocks, by their place in it: line after line.
pub(in crate::audit) fn make<'a>(blocks: impl Iterator<Item = (u8, &'a [Token])> + Clone) -> Vec<u8> {
    let all: usize = blocks.clone().map(|(_, tokens)| tokens.len()).sum();
    let lines = (all / BLOCKS as usize * BITS).div_ceil(WORDS).clamp(1, MOST);
    let mut words = vec![0u64; lines * WORDS];
    for (place, tokens) in blocks {
        for spot in tokens.iter().map(|t| Spot::of(*t)) {
            let start = spot.line(lines) * WORDS;
            spot.words().for_each(|n| words[start + n] |= 1 << (place & 63));
        }
        if tokens == [ANYTHING] {
            words.iter_mut().for_each(|w| *w |= 1 << (place & 63));
        }
    }
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(from: u32, n: u32) -> Vec<Token> {
        (from..from + n).map(|i| i.wrapping_mul(2_654_435_761)).collect()
    }

    fn blocks(shelf: &[u8], token: Token) -> u64 {
        let (spot, lines) = (Spot::of(token), shelf.len() / LINE);
        spot.blocks(&shelf[spot.line(lines) * LINE..][..LINE])
    }

    #[test]
    fn a_shelf_never_says_no_in_vain_and_seldom_yes() {
        let all: Vec<(u8, Vec<Token>)> = (0..64).map(|b| (b, tokens(u32::from(b) * 10_000, 2_000))).collect();
        let shelf = make(all.iter().map(|(b, t)| (*b, t.as_slice())));
        for (b, tokens) in &all {
            assert!(tokens.iter().all(|t| blocks(&shelf, *t) >> b & 1 == 1));
        }
        let absent = tokens(50_000_000, 10_000);
        let vain: u32 = absent.iter().map(|t| blocks(&shelf, *t).count_ones()).sum();
        assert!(f64::from(vain) < 0.008 * 64.0 * 10_000.0, "{vain}");
        assert_eq!(shelf.len(), 500 * LINE);
    }

    #[test]
    fn a_crowded_block_is_crowded_alone() {
        let few: Vec<Token> = tokens(0, 500);
        let many: Vec<Token> = tokens(1_000_000, 60_000);
        let all = (0..64u8).map(|b| (b, if b == 7 { many.as_slice() } else { few.as_slice() }));
        let shelf = make(all);
        let vain = tokens(90_000_000, 1_000).iter().map(|t| (blocks(&shelf, *t) & !(1 << 7)).count_ones()).sum::<u32>();
        assert!(f64::from(vain) < 0.01 * 63.0 * 1_000.0, "{vain}");
    }

    #[test]
    fn spots_are_the_same_for_ever() {
        let spot = Spot::of(0xdead_beef);
        assert_eq!((spot.at, spot.words), (1_256_175_887, 1_758_063_515));
    }

    #[test]
    fn what_may_hold_anything_is_always_looked_at() {
        let few: Vec<Token> = tokens(0, 500);
        let shelf = make([(3, few.as_slice()), (9, &[ANYTHING][..])].into_iter());
        assert!(tokens(1_000_000, 100).iter().all(|t| blocks(&shelf, *t) >> 9 & 1 == 1));
    }

    #[test]
    fn no_line_passes_everything() {
        assert_eq!(Spot::of(1).blocks(&[]), u64::MAX);
    }
}
