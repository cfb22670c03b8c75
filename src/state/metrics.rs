//! What the room counts.

use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts, Registry};

const VERBS: &[&str] = &[
    "get",
    "put",
    "delete",
    "list",
    "watch",
    "txn",
    "compact",
    "lease-grant",
    "lease-renew",
    "lease-revoke",
    "lease-expire",
    "lock-acquire",
    "lock-release",
];

/// The room's metrics, `sop_state_*`.
#[derive(Clone)]
pub struct Metrics {
    /// Reads and changes, by verb.
    pub operations: IntCounterVec,
    /// Transactions that were read ahead in vain.
    pub again: IntCounter,
    /// Open watches.
    pub watchers: IntGauge,
    /// Watches that were cut off because they did not keep up.
    pub cut: IntCounter,
    /// Leases there are.
    pub leases: IntGauge,
    /// Requests that wait for a lock.
    pub waiting: IntGauge,
    /// History can be read from here on.
    pub mark: IntGauge,
    /// Rows of history that were dropped.
    pub compacted: IntCounter,
}

impl Metrics {
    /// Registers them.
    ///
    /// # Errors
    /// When they are registered twice.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let operations = IntCounterVec::new(
            Opts::new("sop_state_operations_total", "Operations on keys that were done"),
            &["verb"],
        )?;
        let watchers = IntGauge::new("sop_state_watchers_count", "Open watches")?;
        registry.register(Box::new(operations.clone()))?;
        let mark = IntGauge::new("sop_state_history_first_index", "History of keys can be read from this index on")?;
        let compacted = IntCounter::new("sop_state_compacted_rows_total", "Rows of history that were dropped")?;
        let cut = IntCounter::new("sop_state_watchers_cut_total", "Watches cut off because they did not keep up")?;
        let leases = IntGauge::new("sop_state_leases_count", "Leases there are")?;
        let waiting = IntGauge::new("sop_state_lock_waits_count", "Requests on this daemon that wait for a lock")?;
        let again = "Transactions run again under the lock, because what was read ahead of their turn had changed";
        let again = IntCounter::new("sop_state_txn_again_total", again)?;
        registry.register(Box::new(again.clone()))?;
        registry.register(Box::new(leases.clone()))?;
        registry.register(Box::new(waiting.clone()))?;
        registry.register(Box::new(cut.clone()))?;
        registry.register(Box::new(watchers.clone()))?;
        registry.register(Box::new(mark.clone()))?;
        registry.register(Box::new(compacted.clone()))?;
        // A metric exists from the first start, before anything was counted.
        for verb in VERBS {
            operations.with_label_values(&[verb]).inc_by(0);
        }
        Ok(Self { operations, again, watchers, cut, leases, waiting, mark, compacted })
    }

    pub(super) fn count(&self, verb: &str) {
        self.counted(verb, 1);
    }

    pub(super) fn counted(&self, verb: &str, n: usize) {
        self.operations.with_label_values(&[verb]).inc_by(n as u64);
    }
}
