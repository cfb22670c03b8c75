//! Quotas: how much of something somebody may have in an hour, and what a limit tells whoever is held to it.
//!
//! Counted by each daemon for itself and forgotten when it stops: a quota keeps order, it is no account of what was used (the
//! record is that).

use std::fmt::{self, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::{Clock, Refusal, problem};

/// How long a quota lasts.
const HOUR: Duration = Duration::from_secs(3600);
/// Clients whose use is remembered at most.
const REMEMBER: u64 = 100_000;

/// A limit, and how much of it is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Its name in the header fields.
    pub name: &'static str,
    /// How much there is in a window.
    pub quota: u32,
    /// The window, seconds.
    pub window: u64,
    /// How much is left.
    pub left: u32,
    /// When there is more, seconds from now.
    pub reset: u64,
}

/// The fields `RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers, structured fields of RFC 9651).
#[must_use]
pub fn fields(limits: &[Limit]) -> [(&'static str, String); 2] {
    let list = |one: fn(&mut String, &Limit) -> fmt::Result| {
        let mut text = String::with_capacity(limits.len() * 40);
        for (i, limit) in limits.iter().enumerate() {
            text.push_str(if i > 0 { ", " } else { "" });
            // Writing to memory cannot fail.
            let _ = one(&mut text, limit);
        }
        text
    };
    [
        ("ratelimit-policy", list(|text, l| write!(text, "\"{}\";q={};w={}", l.name, l.quota, l.window))),
        ("ratelimit", list(|text, l| write!(text, "\"{}\";r={};t={}", l.name, l.left, l.reset))),
    ]
}

/// 429, with the fields.
#[must_use]
pub fn exceeded(detail: impl Into<String>, limits: &[Limit]) -> Refusal {
    let spent = limits.last().map_or(1, |l| l.reset.max(1));
    let refusal = Refusal::new(&problem::RATE_LIMITED, detail).retry_after(u32::try_from(spent).unwrap_or(3600));
    fields(limits).into_iter().fold(refusal, |r, (name, value)| r.with_header(name, value))
}

struct Window {
    began: Duration,
    used: AtomicU32,
}

/// What was used in the hour that runs, by whom and of what.
#[derive(Clone)]
pub struct Quotas {
    clock: Clock,
    windows: moka::sync::Cache<(Arc<str>, &'static str), Arc<Window>>,
}

impl Quotas {
    /// Nothing was used yet.
    #[must_use]
    pub fn new(clock: Clock) -> Self {
        Self { clock, windows: moka::sync::Cache::builder().max_capacity(REMEMBER).time_to_idle(HOUR).build() }
    }

    /// Uses `amount` of `who`'s quota of `what`; a quota of 0 is none. `None`: there is no quota.
    ///
    /// # Errors
    /// The limit, if there is not so much left; nothing is used then.
    pub fn spend(&self, who: &Arc<str>, what: &'static str, quota: u32, amount: u32) -> Result<Option<Limit>, Limit> {
        if quota == 0 {
            return Ok(None);
        }
        let now = self.clock.elapsed();
        let key = (who.clone(), what);
        let fresh = || Arc::new(Window { began: now, used: AtomicU32::new(0) });
        let mut window = self.windows.get_with(key.clone(), fresh);
        if now.saturating_sub(window.began) >= HOUR {
            self.windows.invalidate(&key);
            window = self.windows.get_with(key, fresh);
        }
        let reset = HOUR.saturating_sub(now.saturating_sub(window.began)).as_secs().max(1);
        let limit = |left| Limit { name: what, quota, window: HOUR.as_secs(), left, reset };
        let fits = |used: u32| used.checked_add(amount).filter(|after| *after <= quota);
        match window.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(before) => Ok(Some(limit(quota - before - amount))),
            Err(used) => Err(limit(quota.saturating_sub(used))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::clock::Source;
    use std::sync::atomic::AtomicI64;

    /// A clock that is moved by hand: nanoseconds.
    #[derive(Default)]
    struct Hand(AtomicI64);

    impl Source for Hand {
        fn wall(&self) -> i64 {
            1_000_000_000_000 + self.0.load(Ordering::SeqCst)
        }
        fn boot(&self) -> i64 {
            self.0.load(Ordering::SeqCst)
        }
    }

    #[test]
    fn an_hour_s_worth_and_no_more() {
        let hand = Arc::new(Hand::default());
        let quotas = Quotas::new(Clock::from_source(hand.clone()));
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        assert_eq!(quotas.spend(&a, "x", 0, 7), Ok(None), "no quota");
        assert_eq!(quotas.spend(&a, "x", 3, 2).unwrap().unwrap().left, 1);
        let refused = quotas.spend(&a, "x", 3, 2).unwrap_err();
        assert_eq!((refused.left, refused.reset), (1, 3600), "nothing was used");
        assert!(quotas.spend(&a, "x", 3, 1).is_ok() && quotas.spend(&a, "x", 3, 1).is_err());
        assert!(quotas.spend(&a, "y", 3, 1).is_ok() && quotas.spend(&b, "x", 3, 1).is_ok(), "of each and for each");
        hand.0.store(3_600_000_000_000, Ordering::SeqCst);
        assert_eq!(quotas.spend(&a, "x", 3, 1).unwrap().unwrap().left, 2, "the next hour");
    }

    #[test]
    fn the_fields_are_the_draft_s() {
        let limits = [
            Limit { name: "second", quota: 20, window: 1, left: 19, reset: 1 },
            Limit { name: "hour", quota: 100, window: 3600, left: 0, reset: 60 },
        ];
        let [policy, state] = fields(&limits);
        assert_eq!(policy, ("ratelimit-policy", "\"second\";q=20;w=1, \"hour\";q=100;w=3600".to_owned()));
        assert_eq!(state, ("ratelimit", "\"second\";r=19;t=1, \"hour\";r=0;t=60".to_owned()));
        assert_eq!(exceeded("x", &limits).retry_after_seconds(), Some(60));
    }
}
