//! How often somebody may ask: in a second, of one operation, in an hour.

use std::collections::HashMap;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use governor::clock::DefaultClock;
use governor::middleware::StateInformationMiddleware;
use governor::state::keyed::DashMapStateStore;
use governor::{Quota, RateLimiter};
use smallvec::SmallVec;

use crate::config::Server;
use crate::kernel::quota::Limit;
use crate::kernel::supervisor::{Supervisor, Task};

/// How often those who have not asked for a while are forgotten: otherwise every address that ever asked is remembered.
const TIDY: Duration = Duration::from_secs(60);

/// Whom a rate is counted for: a client, or an address before the client is known.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) enum Who {
    Client(Arc<str>),
    Address(Option<IpAddr>),
}

/// What a request is held to: a rate, that of its operation, a quota.
pub(super) type Limits = SmallVec<[Limit; 3]>;

/// Whom, and the operation if it has a rate of its own.
type Key = (Who, Option<Arc<str>>);
type Limiter = RateLimiter<Key, DashMapStateStore<Key>, DefaultClock, StateInformationMiddleware>;

struct Counts {
    per_second: u32,
    /// Operations that have a rate of their own: `POST /oauth2/token`.
    operations: HashMap<Arc<str>, u32>,
    /// One for each rate that somebody has.
    limiters: RwLock<HashMap<u32, Arc<Limiter>>>,
}

impl Counts {
    fn new(server: &Server) -> Result<Self, String> {
        let operations = operations(&server.operation_rates)?;
        Ok(Self { per_second: server.rate, operations, limiters: RwLock::default() })
    }

    fn limiter(&self, rate: u32) -> Arc<Limiter> {
        if let Some(limiter) = self.limiters.read().unwrap_or_else(PoisonError::into_inner).get(&rate) {
            return limiter.clone();
        }
        let fresh = || {
            let quota = Quota::per_second(NonZeroU32::new(rate).unwrap_or(NonZeroU32::MIN));
            Arc::new(RateLimiter::dashmap(quota).with_middleware())
        };
        self.limiters.write().unwrap_or_else(PoisonError::into_inner).entry(rate).or_insert_with(fresh).clone()
    }

    fn check(&self, key: &Key, name: &'static str, rate: u32) -> Result<Limit, Limit> {
        let limit = |left| Limit { name, quota: rate, window: 1, left, reset: 1 };
        match self.limiter(rate).check_key(key) {
            Ok(state) => Ok(limit(state.remaining_burst_capacity())),
            Err(_) => Err(limit(0)),
        }
    }
}

/// `POST /oauth2/token 50, ...`
fn operations(text: &str) -> Result<HashMap<Arc<str>, u32>, String> {
    let one = |part: &str| {
        let words: Vec<&str> = part.split_whitespace().collect();
        let [method, path, rate] = words.as_slice() else { return None };
        let rate = rate.parse().ok().filter(|rate: &u32| *rate > 0 && path.starts_with('/'))?;
        Some((format!("{} {path}", method.to_ascii_uppercase()).into(), rate))
    };
    let parts = text.split(',').map(str::trim).filter(|p| !p.is_empty());
    let wrong = |p: &str| format!("server.operation_rates: {p:?} is not `METHOD /path COUNT`");
    parts.map(|p| one(p).ok_or_else(|| wrong(p))).collect()
}

/// The rate everybody is held to. It can be changed while the daemon runs; everybody then begins anew.
pub struct Rate(ArcSwap<Counts>);

impl Rate {
    /// As the configuration says.
    ///
    /// # Errors
    /// With the key that does not fit.
    pub fn new(server: &Server) -> Result<Self, String> {
        Ok(Self(ArcSwap::from_pointee(Counts::new(server)?)))
    }

    /// From now on.
    ///
    /// # Errors
    /// As [`new`](Self::new); nothing changes then.
    pub fn set(&self, server: &Server) -> Result<(), String> {
        self.0.store(Arc::new(Counts::new(server)?));
        Ok(())
    }

    /// Counts a request; `own` is the rate of this client, 0 if it has none. The limits it is held to, or the one that was exceeded.
    pub(super) fn check(&self, who: Who, own: u32, operation: impl FnOnce() -> String) -> Result<Limits, Limit> {
        let counts = self.0.load();
        let rate = if own == 0 { counts.per_second } else { own };
        let mut limits = Limits::new();
        if !counts.operations.is_empty()
            && let Some((name, rate)) = counts.operations.get_key_value(operation().as_str())
        {
            limits.push(counts.check(&(who.clone(), Some(name.clone())), "operation", *rate)?);
        }
        limits.insert(0, counts.check(&(who, None), "second", rate)?);
        Ok(limits)
    }

    /// Starts to forget those who have not asked for a while.
    pub(super) fn start(self: &Arc<Self>, tasks: &Supervisor) {
        let rate = self.clone();
        tasks.start(Task::periodic("api/rates", TIDY, move || {
            let counts = rate.0.load_full();
            async move {
                for limiter in counts.limiters.read().unwrap_or_else(PoisonError::into_inner).values() {
                    limiter.retain_recent();
                    limiter.shrink_to_fit();
                }
                Ok(())
            }
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(rate: u32, operation_rates: &str) -> Server {
        let mut server = crate::config::load(None, &[]).unwrap().config.server;
        server.rate = rate;
        server.operation_rates = operation_rates.to_owned();
        server
    }

    fn left(rate: &Rate, who: &Who, own: u32, operation: &str) -> Result<Vec<u32>, &'static str> {
        let checked = rate.check(who.clone(), own, || operation.to_owned());
        checked.map(|all| all.iter().map(|l| l.left).collect()).map_err(|l| l.name)
    }

    #[test]
    fn a_new_rate_holds_at_once() {
        let rate = Rate::new(&server(1, "")).unwrap();
        let who = Who::Client("a".into());
        assert_eq!(left(&rate, &who, 0, "x"), Ok(vec![0]));
        assert_eq!(left(&rate, &who, 0, "x"), Err("second"));
        assert_eq!(left(&rate, &Who::Address(None), 0, "x"), Ok(vec![0]), "everyone is counted alone");
        assert_eq!(left(&rate, &Who::Client("b".into()), 7, "x"), Ok(vec![6]), "a rate of its own");
        rate.set(&server(2, "")).unwrap();
        assert_eq!((left(&rate, &who, 0, "x"), left(&rate, &who, 0, "x")), (Ok(vec![1]), Ok(vec![0])));
        assert!(left(&rate, &who, 0, "x").is_err());
    }

    #[test]
    fn an_operation_may_have_a_rate_of_its_own() {
        let rate = Rate::new(&server(100, "post /oauth2/token 1 , PUT /x/{y} 5")).unwrap();
        let who = Who::Client("a".into());
        assert_eq!(left(&rate, &who, 0, "POST /oauth2/token").map(|l| l[1]), Ok(0));
        assert_eq!(left(&rate, &who, 0, "POST /oauth2/token"), Err("operation"));
        assert_eq!(left(&rate, &who, 0, "GET /oauth2/token").map(|l| l.len()), Ok(1), "others are not touched");
        for bad in ["POST /x", "/x 5", "POST x 5", "POST /x 0", "POST /x many"] {
            assert!(Rate::new(&server(1, bad)).is_err(), "{bad}");
        }
    }
}
