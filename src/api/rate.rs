//! How often somebody may ask.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use governor::clock::DefaultClock;
use governor::state::keyed::DashMapStateStore;
use governor::{Quota, RateLimiter};

use crate::kernel::supervisor::{Supervisor, Task};

/// How often those who have not asked for a while are forgotten: otherwise every address that ever asked is remembered.
const TIDY: Duration = Duration::from_secs(60);

/// Whom a rate is counted for: a client, or an address before the client is known.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) enum Who {
    Client(Arc<str>),
    Address(Option<IpAddr>),
}

struct Counts {
    per_second: u32,
    limiter: RateLimiter<Who, DashMapStateStore<Who>, DefaultClock>,
}

/// The rate everybody is held to. It can be changed while the daemon runs; everybody then begins anew.
pub struct Rate(ArcSwap<Counts>);

impl Rate {
    /// So many requests a second and client.
    #[must_use]
    pub fn new(per_second: u32) -> Self {
        Self(ArcSwap::from_pointee(counts(per_second)))
    }

    /// From now on.
    pub fn set(&self, per_second: u32) {
        self.0.store(Arc::new(counts(per_second)));
    }

    /// `Err` with the rate if it was asked more often than that.
    pub(super) fn check(&self, who: &Who) -> Result<(), u32> {
        let counts = self.0.load();
        counts.limiter.check_key(who).map_err(|_| counts.per_second)
    }

    /// Starts to forget those who have not asked for a while.
    pub(super) fn start(self: &Arc<Self>, tasks: &Supervisor) {
        let rate = self.clone();
        tasks.start(Task::periodic("api/rates", TIDY, move || {
            let counts = rate.0.load_full();
            async move {
                counts.limiter.retain_recent();
                counts.limiter.shrink_to_fit();
                Ok(())
            }
        }));
    }
}

fn counts(per_second: u32) -> Counts {
    let quota = Quota::per_second(NonZeroU32::new(per_second).unwrap_or(NonZeroU32::MIN));
    Counts { per_second, limiter: RateLimiter::dashmap(quota) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_rate_holds_at_once() {
        let rate = Rate::new(1);
        let who = Who::Client("a".into());
        assert_eq!((rate.check(&who), rate.check(&who)), (Ok(()), Err(1)));
        assert_eq!(rate.check(&Who::Address(None)), Ok(()), "everyone is counted alone");
        rate.set(2);
        assert_eq!((rate.check(&who), rate.check(&who), rate.check(&who)), (Ok(()), Ok(()), Err(2)));
    }
}
