//! Chance that can be had again: the same seed, the same throws.

/// Marsaglia's xorshift.
#[derive(Clone)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        // Small seeds that follow each other would begin alike; and nothing follows from 0.
        let mut dice = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..4 {
            dice.throw();
        }
        dice
    }

    pub fn throw(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// One of `0..sides`.
    pub fn up_to(&mut self, sides: usize) -> usize {
        usize::try_from(self.throw() % sides as u64).unwrap()
    }
}
