//! Requests that a layer refused: a metric, and one entry an address block, reason and interval with their number, so that nobody
//! fills the record from outside (rule 21 of the ledger).

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::http::StatusCode;
use prometheus::{IntCounterVec, Opts, Registry};

use crate::kernel::supervisor::{Supervisor, Task, TaskError};
use crate::kernel::web::{Caller, Permit, block};
use crate::kernel::{Refusal, problem};
use crate::ledger::{Entry, Ledger, Outcome};

/// Blocks and reasons told apart in one interval; what comes from yet others is counted together.
const BLOCKS: usize = 256;

/// The layers a request passes (docs/threat-model.md), as the metric and the entries name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Layer {
    Transport,
    Limits,
    Authentication,
    Decision,
    Schema,
    Audit,
}

impl Layer {
    const ALL: [Self; 6] =
        [Self::Transport, Self::Limits, Self::Authentication, Self::Decision, Self::Schema, Self::Audit];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Transport => "transport",
            Self::Limits => "limits",
            Self::Authentication => "authentication",
            Self::Decision => "decision",
            Self::Schema => "schema",
            Self::Audit => "audit",
        }
    }

    /// The layer that refuses with this status, if one of them does. Why is the problem's slug, or the OAuth error.
    pub fn of(status: StatusCode, reason: &str) -> Option<Self> {
        match status.as_u16() {
            401 => Some(Self::Authentication),
            403 => Some(Self::Decision),
            429 => Some(Self::Limits),
            503 if reason == problem::OVERLOADED.slug => Some(Self::Limits),
            503 => Some(Self::Audit),
            // As etcd answers those who bring no token.
            400 if reason == problem::UNAUTHENTICATED.slug => Some(Self::Authentication),
            400 | 413 | 414 | 415 | 422 => Some(Self::Schema),
            _ => None,
        }
    }

    /// A denial has an entry of its own, and what the record cannot take it cannot tell of either.
    const fn in_common(self) -> bool {
        !matches!(self, Self::Decision | Self::Audit)
    }
}

type Counts = HashMap<(String, Layer, &'static str), u64>;

/// What was refused, by layer: the metric, and the counts of the interval that runs.
#[derive(Clone)]
pub struct Refused {
    counts: Arc<Mutex<Counts>>,
    metric: IntCounterVec,
}

impl Refused {
    /// Nothing yet.
    ///
    /// # Errors
    /// When the metric is registered twice.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let opts = Opts::new("sop_api_refused_total", "Requests refused, by the layer that did and its reason");
        let metric = IntCounterVec::new(opts, &["layer", "reason"])?;
        registry.register(Box::new(metric.clone()))?;
        for layer in Layer::ALL {
            metric.with_label_values(&[layer.as_str(), "any"]).inc_by(0);
        }
        Ok(Self { counts: Arc::default(), metric })
    }

    /// Counts one.
    pub(super) fn note(&self, peer: Option<IpAddr>, layer: Layer, reason: &'static str) {
        self.metric.with_label_values(&[layer.as_str(), reason]).inc();
        if !layer.in_common() {
            return;
        }
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut key = (block(peer), layer, reason);
        if counts.len() >= BLOCKS && !counts.contains_key(&key) {
            key.0 = "others".to_owned();
        }
        *counts.entry(key).or_default() += 1;
    }

    /// Writes what was counted, each interval.
    pub(super) fn start(&self, ledger: &Ledger, interval: Duration, tasks: &Supervisor) {
        let (own, ledger) = (self.clone(), ledger.clone());
        tasks.start(Task::periodic("api/refused", interval, move || {
            let (own, ledger) = (own.clone(), ledger.clone());
            async move { own.flush(&ledger).await }
        }));
    }

    async fn flush(&self, ledger: &Ledger) -> Result<(), TaskError> {
        let counts = std::mem::take(&mut *self.counts.lock().unwrap_or_else(PoisonError::into_inner));
        for ((block, layer, reason), count) in counts {
            let entry = Entry::ok("api:refuse", format!("address/{block}"))
                .outcome(Outcome::Denied)
                .reason(reason)
                .change("layer", layer.as_str())
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
        let refused = Refused::new(&Registry::new()).unwrap();
        for n in 0..100_000u32 {
            refused.note(Some(IpAddr::V4((0x0a00_0000 + (n << 8)).into())), Layer::Authentication, "x");
        }
        let counts = refused.counts.lock().unwrap();
        assert!(counts.len() <= BLOCKS + Layer::ALL.len());
        assert_eq!(counts.values().sum::<u64>(), 100_000, "none is lost");
    }
}
