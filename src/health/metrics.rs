//! What the room counts.

use prometheus::{IntCounterVec, IntGaugeVec, Opts, Registry};

use super::model::Status;

/// The room's metrics, `sop_health_*`.
#[derive(Clone)]
pub struct Metrics {
    probes: IntCounterVec,
    changes: IntCounterVec,
    reports: IntCounterVec,
    incidents: IntCounterVec,
    checks: IntGaugeVec,
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
        let checks = IntGaugeVec::new(Opts::new("sop_health_checks_count", "Checks by how they are"), &["status"])?;
        registry.register(Box::new(checks.clone()))?;
        ["unknown", "passing", "critical"].iter().for_each(|s| checks.with_label_values(&[s]).set(0));
        let results = ["good", "bad"];
        let events = ["signalled", "acknowledged", "resolved", "comment"];
        Ok(Self {
            probes: counters("sop_health_probes_total", "Looks this daemon took", "result", &results)?,
            changes: counters("sop_health_changes_total", "Changes of a check", "to", &["passing", "critical"])?,
            reports: counters("sop_health_reports_total", "Reports of ttl checks", "status", &["passing", "critical"])?,
            incidents: counters("sop_health_incident_events_total", "What was done about incidents", "event", &events)?,
            checks,
        })
    }

    pub(super) fn probed(&self, good: bool) {
        self.probes.with_label_values(&[if good { "good" } else { "bad" }]).inc();
    }

    pub(super) fn changed(&self, to: Status) {
        self.changes.with_label_values(&[to.as_str()]).inc();
    }

    pub(super) fn reported(&self, status: Status) {
        self.reports.with_label_values(&[status.as_str()]).inc();
    }

    pub(super) fn incident(&self, event: &str) {
        self.incidents.with_label_values(&[event]).inc();
    }

    pub(super) fn counted(&self, counts: &[(String, i64)]) {
        for status in ["unknown", "passing", "critical"] {
            let n = counts.iter().find(|(s, _)| s == status).map_or(0, |(_, n)| *n);
            self.checks.with_label_values(&[status]).set(n);
        }
    }
}
