//! What the front counts, by route template and never by path.

use prometheus::{Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

pub(super) struct Metrics {
    pub requests: IntCounterVec,
    pub seconds: HistogramVec,
    pub in_flight: IntGauge,
    pub panics: IntCounter,
    pub limited: IntCounterVec,
}

impl Metrics {
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let requests = IntCounterVec::new(
            Opts::new("sop_api_requests_total", "Requests answered"),
            &["method", "route", "status"],
        )?;
        let seconds = HistogramVec::new(
            HistogramOpts::new("sop_api_request_seconds", "Time from the head of a request to its answer")
                .buckets(prometheus::exponential_buckets(0.000_25, 2.0, 14)?),
            &["route"],
        )?;
        let in_flight = IntGauge::new("sop_api_requests_in_flight", "Requests being answered")?;
        let panics = IntCounter::new("sop_api_panics_total", "Handlers that panicked")?;
        let limited =
            IntCounterVec::new(Opts::new("sop_api_limited_total", "Requests refused by a limit"), &["limit"])?;
        registry.register(Box::new(requests.clone()))?;
        registry.register(Box::new(seconds.clone()))?;
        registry.register(Box::new(in_flight.clone()))?;
        registry.register(Box::new(panics.clone()))?;
        registry.register(Box::new(limited.clone()))?;
        Ok(Self { requests, seconds, in_flight, panics, limited })
    }

    pub fn timer(&self, route: &str) -> Histogram {
        self.seconds.with_label_values(&[route])
    }
}
