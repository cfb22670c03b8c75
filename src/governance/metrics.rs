//! What the room counts. Bundles are labels, for they are few and those that left are taken away; subjects never are.

use prometheus::{Gauge, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use super::trial::Report;

/// The room's metrics, `sop_governance_*`.
#[derive(Clone)]
pub struct Metrics {
    /// Decisions by where they were asked for and what came out.
    pub decisions: IntCounterVec,
    /// The same by the bundle that decided: the application's, else the system's.
    pub by_bundle: IntCounterVec,
    /// 1 for each bundle and the stage it is at.
    pub rollout: IntGaugeVec,
    /// Subjects of a hundred that the canary decides for.
    pub canary_percent: Gauge,
    /// What the canary denied and the active bundle would have permitted.
    pub new_denials: IntCounter,
    /// Canaries that stopped themselves.
    pub canary_stops: IntCounter,
    /// Recorded decisions that a shadow decided again.
    pub shadowed: IntCounterVec,
    /// Entries that a shadow has still to look at.
    pub shadow_lag: IntGauge,
    /// Decisions that were answered while the store was away.
    pub stale: IntCounter,
    /// Those of them that wait to be put into the record.
    pub spooled: IntGauge,
    /// Cases of bundles that were run.
    cases: IntCounterVec,
}

const OUTCOMES: [&str; 2] = ["allowed", "denied"];

/// How a decision is counted.
pub(super) const fn outcome(allowed: bool) -> &'static str {
    if allowed { OUTCOMES[0] } else { OUTCOMES[1] }
}

impl Metrics {
    /// Registers them.
    ///
    /// # Errors
    /// When they are registered twice.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let all = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(all.clone())).map(|()| all)
        };
        let counter = |name: &str, help: &str| {
            let one = IntCounter::new(name, help)?;
            registry.register(Box::new(one.clone())).map(|()| one)
        };
        let decisions = counters("sop_governance_decisions_total", "Decisions", &["origin", "outcome"])?;
        for origin in ["api", "authzen"] {
            OUTCOMES.iter().for_each(|o| decisions.with_label_values(&[origin, o]).inc_by(0));
        }
        let of_bundle = "Decisions by the bundle that gave them";
        let rollout = Opts::new("sop_governance_rollout_info", "1 for each bundle at each stage of its rollout");
        let rollout = IntGaugeVec::new(rollout, &["bundle", "stage"])?;
        registry.register(Box::new(rollout.clone()))?;
        let percent = Gauge::new("sop_governance_canary_percent", "Subjects of a hundred that a canary decides for")?;
        registry.register(Box::new(percent.clone()))?;
        let lag = IntGauge::new("sop_governance_shadow_lag_entries", "Entries that a shadow has still to look at")?;
        registry.register(Box::new(lag.clone()))?;
        let spooled = "Decisions answered while the store was away that are not in the record yet";
        let spooled = IntGauge::new("sop_governance_spooled_records", spooled)?;
        registry.register(Box::new(spooled.clone()))?;
        let stale = "Decisions answered while the store was away";
        let new_denials = "Denials of a canary that the active bundle would have permitted";
        let cases = counters("sop_governance_cases_total", "Cases of bundles that were run", &["outcome"])?;
        ["passed", "failed"].iter().for_each(|o| cases.with_label_values(&[o]).inc_by(0));
        // With nothing in shadow there is no label to show, and a metric that is not there cannot be watched.
        let tried = "Recorded decisions that a bundle in shadow decided again: same, other, skipped";
        let shadowed = counters("sop_governance_shadow_decisions_total", tried, &["bundle", "outcome"])?;
        shadowed.with_label_values(&["none", "other"]).inc_by(0);
        Ok(Self {
            decisions,
            by_bundle: counters("sop_governance_bundle_decisions_total", of_bundle, &["bundle", "outcome"])?,
            rollout,
            canary_percent: percent,
            new_denials: counter("sop_governance_canary_new_denials_total", new_denials)?,
            canary_stops: counter("sop_governance_canary_stops_total", "Canaries that stopped themselves")?,
            shadowed,
            shadow_lag: lag,
            stale: counter("sop_governance_stale_decisions_total", stale)?,
            spooled,
            cases,
        })
    }

    pub(super) fn decided(&self, origin: &str, bundle: &str, allowed: bool) {
        self.decisions.with_label_values(&[origin, outcome(allowed)]).inc();
        self.by_bundle.with_label_values(&[bundle, outcome(allowed)]).inc();
    }

    /// A bundle was put to its cases.
    pub(super) fn ran(&self, report: &Report) {
        self.cases.with_label_values(&["passed"]).inc_by(report.passed as u64);
        self.cases.with_label_values(&["failed"]).inc_by(report.failed.len() as u64);
    }

    /// A bundle is at no stage any more: what was counted of it is not told for ever.
    pub(super) fn forget(&self, bundle: &str) {
        for o in OUTCOMES {
            let _ = self.by_bundle.remove_label_values(&[bundle, o]);
        }
        for o in ["same", "other", "skipped"] {
            let _ = self.shadowed.remove_label_values(&[bundle, o]);
        }
    }
}
