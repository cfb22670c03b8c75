//! What the daemon says of itself while it runs: log lines on stderr, and the registry of its metrics.

use std::cell::Cell;
use std::io::IsTerminal as _;
use std::sync::OnceLock;

use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, reload};

use crate::config::{LogFormat, Telemetry};

/// Starts logging to stderr. A second call changes nothing.
///
/// # Errors
/// When the filter cannot be read.
pub fn start(settings: &Telemetry) -> Result<(), String> {
    let filter = filter(&settings.filter)?;
    let json = match settings.format {
        LogFormat::Json => true,
        LogFormat::Text => false,
        LogFormat::Auto => !std::io::stderr().is_terminal(),
    };
    let (filter, handle) = reload::Layer::new(filter);
    let registry = tracing_subscriber::registry().with(filter).with(Warnings);
    let started = if json {
        let layer =
            tracing_subscriber::fmt::layer().json().flatten_event(true).with_current_span(true).with_span_list(false);
        registry.with(layer.with_writer(std::io::stderr)).try_init()
    } else {
        registry.with(tracing_subscriber::fmt::layer().with_target(false).with_writer(std::io::stderr)).try_init()
    };
    match started {
        Ok(()) => drop(FILTER.set(handle)),
        Err(_) => tracing::debug!("logging was started before"),
    }
    Ok(())
}

static FILTER: OnceLock<reload::Handle<EnvFilter, tracing_subscriber::Registry>> = OnceLock::new();

/// Logs by another filter from now on.
///
/// # Errors
/// When it cannot be read.
pub fn refilter(filter: &str) -> Result<(), String> {
    let filter = self::filter(filter)?;
    FILTER.get().map_or(Ok(()), |handle| handle.reload(filter).map_err(|e| e.to_string()))
}

/// What is configured, and always the warnings of PostgreSQL.
fn filter(text: &str) -> Result<EnvFilter, String> {
    let filter = EnvFilter::try_new(text).map_err(|e| format!("telemetry.filter: {e}"))?;
    let always = format!("{NOTICE}=warn").parse().map_err(|e| format!("telemetry: {e}"))?;
    Ok(filter.add_directive(always))
}

/// Where sqlx tells what PostgreSQL said beside an answer; it has no other way to hear of it.
const NOTICE: &str = "sqlx::postgres::notice";

tokio::task_local! {
    static WARNED: Cell<bool>;
}

/// Does `work`; and whether PostgreSQL warned meanwhile, on a connection that `work` reads from, whichever thread it is on.
pub async fn warned<T>(work: impl Future<Output = T>) -> (T, bool) {
    WARNED.scope(Cell::new(false), async { (work.await, WARNED.with(Cell::get)) }).await
}

/// Sees the warnings of PostgreSQL.
struct Warnings;

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Warnings {
    fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        let about = event.metadata();
        if about.target() == NOTICE && *about.level() == tracing::Level::WARN {
            // Of whom nobody asks it is in the log.
            let _ = WARNED.try_with(|warned| warned.set(true));
        }
    }
}

/// The registry of one daemon, with what the operating system says of the process.
///
/// # Errors
/// When a metric cannot be registered.
pub fn registry() -> Result<prometheus::Registry, prometheus::Error> {
    let registry = prometheus::Registry::new();
    registry.register(Box::new(ProcessMetrics::new()?))?;
    Ok(registry)
}

/// Resident memory and open files, read when asked.
struct ProcessMetrics {
    memory: prometheus::IntGauge,
    files: prometheus::IntGauge,
}

impl ProcessMetrics {
    fn new() -> Result<Self, prometheus::Error> {
        Ok(Self {
            memory: prometheus::IntGauge::new("process_resident_memory_bytes", "Resident memory size in bytes")?,
            files: prometheus::IntGauge::new("process_open_fds", "Number of open file descriptors")?,
        })
    }
}

impl prometheus::core::Collector for ProcessMetrics {
    fn desc(&self) -> Vec<&prometheus::core::Desc> {
        [self.memory.desc(), self.files.desc()].concat()
    }

    fn collect(&self) -> Vec<prometheus::proto::MetricFamily> {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
        let pages: i64 = statm.split(' ').nth(1).and_then(|p| p.parse().ok()).unwrap_or(0);
        let page = i64::try_from(rustix::param::page_size()).unwrap_or(4096);
        self.memory.set(pages * page);
        let files = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        self.files.set(i64::try_from(files).unwrap_or(i64::MAX));
        [self.memory.collect(), self.files.collect()].concat()
    }
}

#[cfg(test)]
mod tests {
    use tracing::instrument::WithSubscriber as _;

    use super::*;
    use crate::kernel::supervisor::detach;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn a_warning_is_heard_by_whom_it_is_meant_for_on_any_thread() {
        let heard = tracing::Dispatch::new(tracing_subscriber::registry().with(Warnings));
        let warn = |yes: bool| async move {
            for turn in 0..200 {
                tokio::task::yield_now().await;
                if yes && turn == 100 {
                    tracing::warn!(target: NOTICE, "canceling wait for synchronous replication");
                }
            }
        };
        let one = |n| warned(warn(n % 2 == 0)).with_subscriber(heard.clone());
        let all: Vec<_> = (0..64).map(|n| detach(one(n))).collect();
        for (n, one) in all.into_iter().enumerate() {
            assert_eq!(one.await.unwrap().1, n % 2 == 0, "{n}");
        }
    }
}
