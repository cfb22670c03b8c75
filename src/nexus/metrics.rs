//! What the room counts.

use prometheus::{IntCounterVec, IntGauge, Opts, Registry};

/// The room's metrics, `sop_nexus_*`.
#[derive(Clone)]
pub struct Metrics {
    /// What was done, by verb.
    pub operations: IntCounterVec,
    /// Messages by what became of them.
    pub messages: IntCounterVec,
    /// Open watches of services.
    pub watchers: IntGauge,
}

impl Metrics {
    /// Registers them.
    ///
    /// # Errors
    /// When they are registered twice.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counters = |name: &str, help: &str, label: &str, values: &[&str]| {
            let all = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(all.clone()))?;
            values.iter().for_each(|v| all.with_label_values(&[v]).inc_by(0));
            Ok::<_, prometheus::Error>(all)
        };
        let verbs = ["register", "heartbeat", "deregister", "expire", "status", "topic", "group"];
        let fates = ["published", "duplicate", "delivered", "redelivered", "acked", "nacked", "dead", "retired"];
        let watchers = IntGauge::new("sop_nexus_watchers_count", "Open watches of services")?;
        registry.register(Box::new(watchers.clone()))?;
        Ok(Self {
            operations: counters(
                "sop_nexus_operations_total",
                "Changes of services, topics and groups",
                "verb",
                &verbs,
            )?,
            messages: counters("sop_nexus_messages_total", "Messages by what became of them", "fate", &fates)?,
            watchers,
        })
    }

    pub(super) fn did(&self, verb: &str, n: usize) {
        self.operations.with_label_values(&[verb]).inc_by(n as u64);
    }

    pub(super) fn messages(&self, fate: &str, n: usize) {
        self.messages.with_label_values(&[fate]).inc_by(n as u64);
    }
}
