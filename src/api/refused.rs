//! Requests that could not be authenticated: one entry an address block, reason and interval, with their number, so that nobody
//! fills the record from outside (rule 21 of the ledger).

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::kernel::Refusal;
use crate::kernel::supervisor::{Supervisor, Task, TaskError};
use crate::kernel::web::{Caller, Permit, block};
use crate::ledger::{Entry, Ledger, Outcome};

/// Blocks and reasons told apart in one interval; what comes from yet others is counted together.
const BLOCKS: usize = 256;

/// The counts of the interval that runs.
#[derive(Clone, Default)]
pub(super) struct Refused(Arc<Mutex<HashMap<(String, &'static str), u64>>>);

impl Refused {
    /// Counts one.
    pub fn note(&self, peer: Option<IpAddr>, path: &str) {
        let reason = if path.starts_with("/oauth2/") { "client authentication failed" } else { "no valid token" };
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut key = (block(peer), reason);
        if counts.len() >= BLOCKS && !counts.contains_key(&key) {
            key.0 = "others".to_owned();
        }
        *counts.entry(key).or_default() += 1;
    }

    /// Writes what was counted, each interval.
    pub fn start(&self, ledger: &Ledger, interval: Duration, tasks: &Supervisor) {
        let (own, ledger) = (self.clone(), ledger.clone());
        tasks.start(Task::periodic("api/refused", interval, move || {
            let (own, ledger) = (own.clone(), ledger.clone());
            async move { own.flush(&ledger).await }
        }));
    }

    async fn flush(&self, ledger: &Ledger) -> Result<(), TaskError> {
        let counts = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        for ((block, reason), count) in counts {
            let entry = Entry::ok("api:refuse", format!("address/{block}"))
                .outcome(Outcome::Denied)
                .reason(reason)
                .change("requests", count);
            let done = ledger.record(&Caller::daemon("api"), Permit::granted(), entry).await;
            done.map_err(|r: Refusal| TaskError::from(r.detail().to_owned()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_fall_into_blocks_and_memory_is_bounded() {
        let of = |text: &str| block(Some(text.parse().unwrap()));
        assert_eq!(of("192.0.2.77"), "192.0.2.0/24");
        assert_eq!(of("::ffff:192.0.2.77"), "192.0.2.0/24");
        assert_eq!(of("2001:db8:1:2::3"), "2001:db8:1::/48");
        assert_eq!(block(None), "unix");
        let refused = Refused::default();
        for n in 0..100_000u32 {
            refused.note(Some(IpAddr::V4((0x0a00_0000 + (n << 8)).into())), "/v1/x");
        }
        let counts = refused.0.lock().unwrap();
        assert!(counts.len() <= BLOCKS + 1);
        assert_eq!(counts.values().sum::<u64>(), 100_000, "none is lost");
    }
}
