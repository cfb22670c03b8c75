//! What ends by silence: leases, instances. It ends by an entry, and only of a daemon that watched its whole time pass, on its
//! own clock, since the last sign of life it saw (rule 18). Who takes the watch over grants a full time again.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::Duration;

use crate::kernel::{Clock, Refusal};

use super::{Claim, Ledger};

/// How long the claim on a watch lasts without renewal.
const CLAIM: Duration = Duration::from_secs(3);
/// Who has not looked for so long has not watched the time pass: it was frozen, and signs of life could not reach it either.
const GAP: Duration = Duration::from_secs(2);

/// A sign of life: of what, which (any number that changes with each), and how long it is good.
pub struct Sign<K> {
    /// What lives.
    pub of: K,
    /// Changes with each sign.
    pub beat: i64,
    /// How long it lives without another.
    pub ttl: Duration,
}

/// One daemon's watch over things that end by silence, or its wait for it.
pub struct Vigil<K> {
    clock: Clock,
    claim: Claim,
    seen: Seen<K>,
}

impl<K: Eq + Hash + Clone> Vigil<K> {
    /// A watch of that name; nothing is watched yet.
    #[must_use]
    pub fn new(ledger: &Ledger, clock: Clock, name: &'static str) -> Self {
        let looked = clock.elapsed();
        Self { clock, claim: ledger.claim(name, CLAIM), seen: Seen { since: HashMap::new(), looked } }
    }

    /// Whether this daemon watches now. Ask before each look, twice a second.
    ///
    /// # Errors
    /// 503 when the database is away.
    pub async fn watches(&mut self) -> Result<bool, Refusal> {
        self.seen.begin(self.clock.elapsed());
        let held = self.claim.held().await?;
        if !held {
            // What was seen while another held it does not count.
            self.seen.since.clear();
        }
        Ok(held)
    }

    /// Takes in all signs as they stand; answers those whose time has passed, with their last sign.
    pub fn silent(&mut self, signs: impl IntoIterator<Item = Sign<K>>) -> Vec<(K, i64)> {
        self.seen.silent(self.clock.elapsed(), signs)
    }

    /// Gives the watch back, so that another daemon need not wait it out.
    pub async fn release(&mut self) {
        self.claim.release().await;
    }
}

/// Since when each stands at its last sign.
struct Seen<K> {
    since: HashMap<K, (i64, Duration)>,
    looked: Duration,
}

impl<K: Eq + Hash + Clone> Seen<K> {
    fn begin(&mut self, now: Duration) {
        if now.saturating_sub(std::mem::replace(&mut self.looked, now)) > GAP {
            self.since.clear();
        }
    }

    fn silent(&mut self, now: Duration, signs: impl IntoIterator<Item = Sign<K>>) -> Vec<(K, i64)> {
        // It may have been frozen since it began to look.
        self.begin(now);
        let (mut kept, mut silent) = (HashMap::new(), Vec::new());
        for Sign { of, beat, ttl } in signs {
            let since = match self.since.get(&of) {
                Some((seen, since)) if *seen == beat => *since,
                _ => now,
            };
            if now.saturating_sub(since) > ttl {
                silent.push((of.clone(), beat));
            }
            kept.insert(of, (beat, since));
        }
        self.since = kept;
        silent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sign(beat: i64) -> [Sign<&'static str>; 1] {
        [Sign { of: "a", beat, ttl: Duration::from_secs(3) }]
    }

    #[test]
    fn silence_counts_from_the_last_sign_that_was_seen() {
        let s = Duration::from_secs;
        let mut seen = Seen { since: HashMap::new(), looked: s(100) };
        for now in 100..=103 {
            assert!(seen.silent(s(now), sign(7)).is_empty(), "at {now}");
        }
        assert_eq!(seen.silent(s(104), sign(7)), [("a", 7)]);
        assert!(seen.silent(s(104), sign(8)).is_empty(), "it gave a sign");
        assert!(seen.silent(s(106), sign(8)).is_empty());
        assert_eq!(seen.silent(s(108), sign(8)), [("a", 8)]);
        assert!(seen.silent(s(108), []).is_empty() && seen.since.is_empty(), "what is gone is forgotten");
    }

    #[test]
    fn who_was_frozen_has_not_watched() {
        let s = Duration::from_secs;
        let mut seen = Seen { since: HashMap::new(), looked: s(0) };
        assert!(seen.silent(s(1), sign(7)).is_empty());
        assert!(seen.silent(s(60), sign(7)).is_empty(), "a full time again");
        assert!(seen.silent(s(62), sign(7)).is_empty());
        assert_eq!(seen.silent(s(64), sign(7)), [("a", 7)]);
    }

    /// A wall clock that jumps by `jump` after 30 seconds, beside one that only passes; and a lease that falls silent at 20.
    struct Jumps {
        jump: i64,
        boot: std::sync::atomic::AtomicI64,
    }

    impl crate::kernel::clock::Source for Jumps {
        fn wall(&self) -> i64 {
            let boot = self.boot();
            1_800_000_000 * SECOND + boot + if boot >= 30 * SECOND { self.jump } else { 0 }
        }
        fn boot(&self) -> i64 {
            self.boot.load(std::sync::atomic::Ordering::SeqCst)
        }
    }

    const SECOND: i64 = 1_000_000_000;

    #[test]
    fn a_clock_that_jumps_ends_nothing_early_and_keeps_nothing_alive() {
        use crate::kernel::Timestamp;
        use crate::kernel::clock::Source as _;
        for jump in [0, 3600 * SECOND, -3600 * SECOND, 86_400 * SECOND, -86_400 * SECOND] {
            let source = std::sync::Arc::new(Jumps { jump, boot: 0.into() });
            let clock = Clock::from_source(source.clone());
            let mut seen = Seen { since: HashMap::new(), looked: clock.elapsed() };
            let mut ended = None;
            for half in 1..600 {
                source.boot.store(half * SECOND / 2, std::sync::atomic::Ordering::SeqCst);
                // The database jumps along, so that the step is believed in the end.
                clock.discipline(Some(Timestamp::from_millis(source.wall() / 1_000_000)));
                let lease = Sign { of: "a", beat: half.min(40), ttl: Duration::from_secs(120) };
                if !seen.silent(clock.elapsed(), [lease]).is_empty() {
                    ended = ended.or(Some(half));
                }
            }
            let after = (clock.now().millis() - 1_800_000_000_000 - 299_500) * 1_000_000;
            assert_eq!(after, jump, "the step was taken while the lease ran");
            assert_eq!(ended, Some(40 + 2 * 120 + 1), "it ends its time after its last sign, by {jump}");
        }
    }
}
