//! What the daemon says of itself while it runs: log lines on stderr, and the registry of its metrics.

use std::cell::Cell;
use std::fmt;
use std::io::IsTerminal as _;
use std::sync::{Arc, OnceLock};

use serde::Serialize;
use tracing::Subscriber;
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::format::{DefaultFields, FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, MakeWriter};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
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
        registry.with(json_lines(std::io::stderr)).try_init()
    } else {
        registry.with(text_lines(std::io::stderr)).try_init()
    };
    match started {
        Ok(()) => drop(FILTER.set(handle)),
        Err(_) => tracing::debug!("logging was started before"),
    }
    Ok(())
}

fn json_lines<S, W>(writer: W) -> impl tracing_subscriber::Layer<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + 'static,
{
    let layer = tracing_subscriber::fmt::layer().json().flatten_event(true).with_current_span(false);
    layer.with_span_list(false).map_event_format(OfRequest).with_writer(writer)
}

fn text_lines<S, W>(writer: W) -> impl tracing_subscriber::Layer<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + 'static,
{
    tracing_subscriber::fmt::layer().with_target(false).fmt_fields(OfRequest(DefaultFields::new())).with_writer(writer)
}

/// What lines say that are logged while a request is answered.
///
/// No span: a layer that writes lines makes the text of a span's fields when it begins, which was a sixteenth of the time of a
/// request (perf), and next to no request logs anything.
pub trait Request: Send + Sync {
    /// Which request it is.
    fn about(&self) -> About<'_>;
}

/// Which request a line is about.
#[derive(Serialize)]
pub struct About<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its method.
    pub method: &'a str,
    /// The template of its route.
    pub route: &'a str,
    /// The trace it is part of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<&'a str>,
}

tokio::task_local! {
    static REQUEST: Arc<dyn Request>;
}

/// Does `work` as part of a request.
pub async fn during<T>(request: Arc<dyn Request>, work: impl Future<Output = T>) -> T {
    REQUEST.scope(request, work).await
}

/// The same of something that does not wait.
pub fn of<T>(request: Arc<dyn Request>, work: impl FnOnce() -> T) -> T {
    REQUEST.sync_scope(request, work)
}

/// Lines and their fields, with the request they are about.
struct OfRequest<F>(F);

impl<S, N, F> FormatEvent<S, N> for OfRequest<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    /// A line that is a JSON object.
    fn format_event(&self, on: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &tracing::Event<'_>) -> fmt::Result {
        let mut line = String::new();
        self.0.format_event(on, Writer::new(&mut line), event)?;
        let about = REQUEST.try_with(|request| serde_json::to_string(&request.about()));
        match (line.strip_suffix("}\n"), about) {
            (Some(object), Ok(Ok(about))) => writeln!(out, "{object},\"request\":{about}}}"),
            _ => out.write_str(&line),
        }
    }
}

impl<'w> FormatFields<'w> for OfRequest<DefaultFields> {
    /// The fields of a line in words, and after them whose they are.
    fn format_fields<R: RecordFields>(&self, mut out: Writer<'w>, fields: R) -> fmt::Result {
        self.0.format_fields(out.by_ref(), fields)?;
        let said = REQUEST.try_with(|request| {
            let About { id, method, route, trace } = request.about();
            // In quotes: it may be whatever the caller wants.
            write!(out, " request={id:?} method={method} route={route}")?;
            trace.map_or(Ok(()), |trace| write!(out, " trace={trace}"))
        });
        said.unwrap_or(Ok(()))
    }
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
    use std::sync::Mutex;

    use serde_json::{Value, json};
    use tracing::instrument::WithSubscriber as _;

    use super::*;
    use crate::kernel::supervisor::detach;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    struct One;

    impl Request for One {
        fn about(&self) -> About<'_> {
            About { id: "a\"b", method: "PUT", route: "/x/{y}", trace: None }
        }
    }

    /// What is logged as part of a request, after a pause, and then apart from it.
    async fn logged<L>(lines: impl FnOnce(Lines) -> L) -> Vec<String>
    where
        L: tracing_subscriber::Layer<tracing_subscriber::Registry> + Send + Sync,
    {
        let written = Lines::default();
        let to = tracing::Dispatch::new(tracing_subscriber::registry().with(lines(written.clone())));
        let work = async {
            let inside = async {
                tokio::task::yield_now().await;
                tracing::warn!(n = 7, "inside");
            };
            during(Arc::new(One), inside).await;
            tracing::warn!("outside");
        };
        work.with_subscriber(to).await;
        let written = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
        written.lines().map(str::to_owned).collect()
    }

    #[tokio::test]
    async fn a_line_says_of_which_request_it_is() {
        let json = logged(|to| json_lines(move || to.clone())).await;
        let json: Vec<Value> = json.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(
            (&json[0]["message"], &json[0]["n"], &json[0]["level"]),
            (&json!("inside"), &json!(7), &json!("WARN"))
        );
        let whose = json!({"id": "a\"b", "method": "PUT", "route": "/x/{y}"});
        assert_eq!((&json[0]["request"], &json[1]["message"]), (&whose, &json!("outside")));
        assert_eq!((json[1].get("request"), json.len()), (None, 2));
        let text = logged(|to| text_lines(move || to.clone())).await;
        let whose = r#"request="a\"b" method=PUT route=/x/{y}"#;
        assert!(text[0].ends_with(whose) && text[0].contains("inside"), "{text:?}");
        assert!(text[1].ends_with("outside"), "{text:?}");
    }

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
