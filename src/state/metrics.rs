//! What the room counts.

use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts, Registry};

/// The room's metrics, `sop_state_*`.
#[derive(Clone)]
pub struct Metrics {
    /// Reads and changes, by verb.
    pub operations: IntCounterVec,
    /// Open watches.
    pub watchers: IntGauge,
    /// Watches that were cut off because they did not keep up.
    pub cut: IntCounter,
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
        registry.register(Box::new(cut.clone()))?;
        registry.register(Box::new(watchers.clone()))?;
        registry.register(Box::new(mark.clone()))?;
        registry.register(Box::new(compacted.clone()))?;
        // A metric exists from the first start, before anything was counted.
        for verb in ["get", "put", "delete", "list", "watch", "txn", "compact"] {
            operations.with_label_values(&[verb]).inc_by(0);
        }
        Ok(Self { operations, watchers, cut, mark, compacted })
    }

    pub(super) fn count(&self, verb: &str) {
        self.operations.with_label_values(&[verb]).inc();
    }
}
