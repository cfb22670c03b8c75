//! What the room counts.

use prometheus::{IntCounterVec, IntGauge, Opts, Registry};

/// The room's metrics, `sop_state_*`.
#[derive(Clone)]
pub struct Metrics {
    /// Reads and changes, by verb.
    pub operations: IntCounterVec,
    /// Open watches.
    pub watchers: IntGauge,
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
        registry.register(Box::new(watchers.clone()))?;
        // A metric exists from the first start, before anything was counted.
        for verb in ["get", "put", "delete", "list", "watch", "txn"] {
            operations.with_label_values(&[verb]).inc_by(0);
        }
        Ok(Self { operations, watchers })
    }

    pub(super) fn count(&self, verb: &str) {
        self.operations.with_label_values(&[verb]).inc();
    }
}
