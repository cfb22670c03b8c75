//! What the room counts.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use super::{GENERATIONS, VERIFICATIONS};

/// The room's metrics.
#[derive(Clone)]
pub(super) struct Counted {
    pub issued: IntCounterVec,
    pub refused: IntCounterVec,
    pub revoked: IntCounterVec,
    pub limited: IntCounterVec,
    pub fetched: IntCounterVec,
    pub operations: IntCounterVec,
    pub uses: IntCounterVec,
    pub lockouts: IntCounter,
    pub verify: Histogram,
    pub key_age: IntGaugeVec,
    pub held: IntGauge,
}

impl Counted {
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counter = |name: &str, help: &str, label: &str| -> Result<IntCounterVec, prometheus::Error> {
            let c = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(c.clone()))?;
            Ok(c)
        };
        let issued = counter("sop_token_issued_total", "Access tokens issued", "grant")?;
        let refused = counter("sop_token_refused_total", "Authentications refused", "reason")?;
        let revoked = counter("sop_token_revoked_total", "Tokens ended before their time", "what")?;
        let limited = counter("sop_token_limited_total", "Refused because an hourly quota was spent", "quota")?;
        for quota in [VERIFICATIONS, GENERATIONS] {
            limited.with_label_values(&[quota]).inc_by(0);
        }
        let fetched =
            counter("sop_token_jwks_fetches_total", "Key sets of clients fetched from their jwks_uri", "outcome")?;
        for outcome in ["ok", "failed"] {
            fetched.with_label_values(&[outcome]).inc_by(0);
        }
        let operations = counter("sop_token_operations_issued_total", "Operation tokens issued", "kind")?;
        let uses = counter("sop_token_operation_uses_total", "Uses of operation tokens", "outcome")?;
        let lockouts = IntCounter::new("sop_token_lockouts_total", "Clients locked out after too many failures")?;
        registry.register(Box::new(lockouts.clone()))?;
        let opts = HistogramOpts::new("sop_token_verify_seconds", "Time to verify the access token of a request");
        let verify = Histogram::with_opts(opts.buckets(prometheus::exponential_buckets(0.000_001, 2.0, 12)?))?;
        registry.register(Box::new(verify.clone()))?;
        let opts = Opts::new("sop_token_key_age_seconds", "For how long the key that signs access tokens has signed");
        let key_age = IntGaugeVec::new(opts, &["alg"])?;
        registry.register(Box::new(key_age.clone()))?;
        let held = IntGauge::new("sop_token_revocations_count", "Revoked tokens that have not expired")?;
        registry.register(Box::new(held.clone()))?;
        for grant in ["client_credentials", "token-exchange"] {
            issued.with_label_values(&[grant]).inc_by(0);
        }
        refused.with_label_values(&["client"]).inc_by(0);
        uses.with_label_values(&["ok"]).inc_by(0);
        for kind in ["operation", "todo", "integration", "test"] {
            operations.with_label_values(&[kind]).inc_by(0);
        }
        for what in ["token", "client"] {
            revoked.with_label_values(&[what]).inc_by(0);
        }
        Ok(Self { issued, refused, revoked, limited, fetched, operations, uses, lockouts, verify, key_age, held })
    }
}
