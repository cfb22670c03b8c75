//! The daemon's own pages: is it alive, is it ready, what does it count, what can it do.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use prometheus::{Encoder as _, Registry, TextEncoder};
use serde::Serialize;
use serde_json::{Map, Value, json};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::kernel::supervisor::Supervisor;
use crate::kernel::web::Path;
use crate::kernel::web::gateway::ETCD;
use crate::kernel::{BoxFuture, Refusal, problem};

/// One thing that must be so: its name, and a look at it. `Err` says what is wrong.
pub struct Check {
    /// `database`, `ledger`, ...
    pub name: &'static str,
    /// Looks.
    pub look: Box<dyn Fn() -> BoxFuture<'static, Result<String, String>> + Send + Sync>,
}

/// Everything that must be so for the daemon to be ready.
#[derive(Clone, Default)]
pub struct Readiness(Arc<Vec<Check>>);

impl Readiness {
    /// Of these checks.
    #[must_use]
    pub fn new(checks: Vec<Check>) -> Self {
        Self(Arc::new(checks))
    }
}

#[derive(Clone)]
struct Own {
    readiness: Readiness,
    tasks: Supervisor,
    registry: Registry,
}

pub(super) fn routes(readiness: Readiness, tasks: Supervisor, registry: Registry) -> OpenApiRouter {
    OpenApiRouter::new()
        .routes(routes!(livez))
        .routes(routes!(readyz))
        .routes(routes!(startupz))
        .routes(routes!(metrics))
        .routes(routes!(version))
        .routes(routes!(problem_page))
        .with_state(Own { readiness, tasks, registry })
}

/// The document itself, and the page at the root.
pub(super) fn document(document: &utoipa::openapi::OpenApi) -> Router {
    let json: Arc<str> = document.to_json().unwrap_or_default().into();
    let answer = move || {
        let json = json.clone();
        async move { ([(header::CONTENT_TYPE, "application/json")], json.to_string()) }
    };
    Router::new().route("/openapi.json", get(answer)).route("/", get(root))
}

async fn root() -> Html<&'static str> {
    Html(
        "<!doctype html><title>sop</title><h1>sop</h1><p>The System Operations Protocol of LOGOS. \
        <a href=\"/readyz?verbose\">readiness</a> &middot; <a href=\"/metrics\">metrics</a> &middot; \
        <a href=\"/openapi.json\">API</a> &middot; <a href=\"/log/checkpoint\">checkpoint</a>",
    )
}

/// The process answers
#[utoipa::path(get, path = "/livez", tag = "daemon", responses((status = 200, body = String)))]
async fn livez() -> &'static str {
    "ok\n"
}

/// The daemon can serve; `?verbose` lists each check
#[utoipa::path(get, path = "/readyz", tag = "daemon", params(("verbose" = Option<String>, Query, description = "List each check")),
    responses((status = 200, body = String), (status = 503, body = String)))]
async fn readyz(State(own): State<Own>, uri: Uri, headers: HeaderMap) -> Response {
    ready(&own, &uri, &headers).await
}

/// The daemon has started; the same checks as readiness
#[utoipa::path(get, path = "/startupz", tag = "daemon", params(("verbose" = Option<String>, Query, description = "List each check")),
    responses((status = 200, body = String), (status = 503, body = String)))]
async fn startupz(State(own): State<Own>, uri: Uri, headers: HeaderMap) -> Response {
    ready(&own, &uri, &headers).await
}

#[derive(Serialize)]
struct Seen {
    ok: bool,
    detail: String,
}

async fn ready(own: &Own, uri: &Uri, headers: &HeaderMap) -> Response {
    let mut checks: Vec<(String, Seen)> = Vec::new();
    for check in own.readiness.0.iter() {
        let seen = match (check.look)().await {
            Ok(detail) => Seen { ok: true, detail },
            Err(detail) => Seen { ok: false, detail },
        };
        checks.push((check.name.to_owned(), seen));
    }
    for (name, status) in own.tasks.status() {
        let detail = match &status.last_error {
            Some(e) => {
                format!("{} restarts; last ended at {}: {e}", status.restarts, status.last_error_at.unwrap_or_default())
            }
            None => "running".to_owned(),
        };
        checks.push((format!("task {name}"), Seen { ok: status.running, detail }));
    }
    let ok = checks.iter().all(|(_, s)| s.ok);
    let status = if ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let verbose = uri.query().is_some_and(|q| q.split('&').any(|p| p.split('=').next() == Some("verbose")));
    let wants_json =
        headers.get(header::ACCEPT).and_then(|a| a.to_str().ok()).is_some_and(|a| a.contains("application/json"));
    if wants_json {
        let all: Map<String, Value> = checks.into_iter().map(|(n, s)| (n, json!(s))).collect();
        return (status, Json(json!({"ready": ok, "checks": all}))).into_response();
    }
    let mut text = String::new();
    for (name, seen) in checks.iter().filter(|(_, s)| verbose || !s.ok) {
        text.push_str(&format!("[{}] {name}: {}\n", if seen.ok { "+" } else { "-" }, seen.detail));
    }
    text.push_str(if ok { "ok\n" } else { "not ready\n" });
    (status, text).into_response()
}

/// Metrics in Prometheus' text format
#[utoipa::path(get, path = "/metrics", tag = "daemon", responses((status = 200, body = String, content_type = "text/plain")))]
async fn metrics(State(own): State<Own>) -> Result<Response, Refusal> {
    let mut text = Vec::new();
    TextEncoder::new().encode(&own.registry.gather(), &mut text).map_err(Refusal::internal)?;
    Ok(([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response())
}

#[derive(Serialize, utoipa::ToSchema)]
struct Version {
    name: &'static str,
    version: &'static str,
    /// The release of etcd whose gateway `/v3` speaks as: its clients look for it here
    etcdserver: &'static str,
    /// The same, of the cluster
    etcdcluster: &'static str,
}

/// Which build this is
#[utoipa::path(get, path = "/version", tag = "daemon", responses((status = 200, body = Version)))]
async fn version() -> Json<Version> {
    Json(Version { name: "sop", version: env!("CARGO_PKG_VERSION"), etcdserver: ETCD, etcdcluster: ETCD })
}

/// What a problem type means and what to do about it
#[utoipa::path(get, path = "/problems/{slug}", tag = "daemon", params(("slug" = String, Path, description = "The last segment of the type")),
    responses((status = 200, body = String, content_type = "text/html"), (status = 404)))]
async fn problem_page(Path(slug): Path<String>) -> Result<Html<String>, Refusal> {
    let p = problem::by_slug(&slug).ok_or_else(|| Refusal::not_found("such problem type"))?;
    Ok(Html(format!(
        "<!doctype html><title>{0}</title><h1>{0}</h1><p><code>{1}</code>, status {2}</p><p>{3}</p>",
        p.title, p.slug, p.status, p.explain
    )))
}
