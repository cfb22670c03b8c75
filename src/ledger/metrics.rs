//! What the ledger counts.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

/// The ledger's metrics, `sop_ledger_*`.
pub(super) struct Metrics {
    pub entries: IntCounter,
    pub batch: Histogram,
    pub lock: Histogram,
    pub locked: IntCounter,
    pub optimistic: IntCounter,
    pub missed: IntCounter,
    pub spot: IntCounter,
    pub spared: IntCounter,
    pub fences: IntCounter,
    pub caught_up: IntCounter,
    pub unknown: IntCounter,
    pub broken: IntCounter,
    pub away: IntCounter,
    pub singled: IntCounter,
    pub ended: IntCounter,
    pub refused_full: IntCounter,
    pub given_up: IntCounter,
    pub fenced: IntCounter,
    pub stale: IntCounter,
    pub operations: IntCounterVec,
    pub followed: IntGauge,
    pub behind: IntGauge,
}

impl Metrics {
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counter = |name: &str, help: &str| -> Result<IntCounter, prometheus::Error> {
            let c = IntCounter::new(name, help)?;
            registry.register(Box::new(c.clone()))?;
            Ok(c)
        };
        let histogram = |name: &str, help: &str, buckets: Vec<f64>| -> Result<Histogram, prometheus::Error> {
            let h = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))?;
            registry.register(Box::new(h.clone()))?;
            Ok(h)
        };
        let followed = IntGauge::new("sop_ledger_followed_index", "Newest index this daemon's projections reflect")?;
        registry.register(Box::new(followed.clone()))?;
        let behind =
            IntGauge::new("sop_ledger_record_behind", "1 when the record went backwards and nothing is written")?;
        registry.register(Box::new(behind.clone()))?;
        let operations =
            Opts::new("sop_ledger_tx_operations_total", "Operations of transactions that committed, by their verb");
        let operations = IntCounterVec::new(operations, &["verb"])?;
        registry.register(Box::new(operations.clone()))?;
        Ok(Self {
            operations,
            entries: counter("sop_ledger_entries_total", "Entries this daemon committed")?,
            batch: histogram(
                "sop_ledger_batch_commands",
                "Commands in a turn of the writer",
                prometheus::exponential_buckets(1.0, 2.0, 11)?,
            )?,
            lock: histogram(
                "sop_ledger_lock_seconds",
                "Wait for the lock of the head",
                prometheus::exponential_buckets(0.000_1, 3.0, 10)?,
            )?,
            locked: counter("sop_ledger_locked_turns_total", "Turns of the writer under the lock of the head")?,
            optimistic: counter("sop_ledger_optimistic_turns_total", "Turns of the writer that were one statement")?,
            missed: counter("sop_ledger_missed_turns_total", "One-statement turns that found the head moved")?,
            spot: counter("sop_ledger_spot_turns_total", "Turns taken beside the request of who writes alone")?,
            spared: counter("sop_ledger_spared_reads_total", "Keys not looked up because they are certainly new")?,
            fences: counter("sop_ledger_head_checks_total", "Head checks for linearizable reads")?,
            caught_up: counter("sop_ledger_foreign_entries_total", "Entries of other daemons read by the writer")?,
            unknown: counter("sop_ledger_unknown_commits_total", "Commits whose fate had to be found out")?,
            broken: counter("sop_ledger_broken_turns_total", "Turns broken off by a lost connection")?,
            away: counter("sop_ledger_away_total", "Times the database could not be reached for writing")?,
            singled: counter("sop_ledger_singled_batches_total", "Batches run again one command at a time")?,
            ended: counter("sop_ledger_ended_sessions_total", "Sessions ended because they kept the head too long")?,
            given_up: counter(
                "sop_ledger_given_up_total",
                "Changes that were not begun, for their callers were gone before their turn came",
            )?,
            refused_full: counter("sop_ledger_overloaded_total", "Commands refused because the queue was full")?,
            fenced: counter(
                "sop_ledger_fenced_total",
                "Changes refused because their fencing token was of no use any more",
            )?,
            stale: counter("sop_ledger_stale_permits_total", "Commands decided again because permission had changed")?,
            followed,
            behind,
        })
    }
}
