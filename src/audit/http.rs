//! The room's routes: the record under `/v1/audit`, the transparency log under `/log`.

mod keys;
mod records;
mod saved;
mod search;
mod witness;

use std::io::Write as _;
use std::time::Duration;

use axum::extract::State as Room;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::kernel::Refusal;
use crate::kernel::crypto::base64;
use crate::kernel::web::{Answer, Caller, Path as UrlPath, Query};

use super::Audit;
use super::tiles::Path;

/// The routes of the room.
pub fn routes(audit: Audit) -> OpenApiRouter {
    OpenApiRouter::new()
        .routes(routes!(search::list))
        .routes(routes!(search::facets))
        .routes(routes!(search::stream))
        .routes(routes!(saved::list))
        .routes(routes!(saved::put, saved::read, saved::forget))
        .routes(routes!(keys::list))
        .routes(routes!(keys::rotate))
        .routes(routes!(entry))
        .routes(routes!(receipt))
        .routes(routes!(consistency))
        .routes(routes!(records::keep))
        .routes(routes!(records::list))
        .routes(routes!(records::receipt))
        .routes(routes!(checkpoint))
        .routes(routes!(key))
        .routes(routes!(tile))
        .routes(routes!(witness::add))
        .routes(routes!(witness::key))
        .with_state(audit)
}

/// One entry
#[utoipa::path(get, path = "/v1/audit/entries/{index}", tag = "audit", params(("index" = i64, Path, description = "Its index")),
    responses((status = 200, body = Object), (status = 404, description = "Beyond the head")))]
async fn entry(
    Room(audit): Room<Audit>,
    caller: Caller,
    UrlPath(index): UrlPath<String>,
) -> Result<Answer<Map<String, Value>>, Refusal> {
    let index = whole(&index)?;
    let found = audit.entry(&caller, index).await?;
    Ok(Answer::ok(found.shown(audit.indexed_to())))
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ReceiptQuery {
    /// In the checkpoint of this many entries; without it, the newest
    #[serde(default)]
    size: Option<u64>,
}

/// The receipt of an entry (C2SP tlog-proof); its extra line carries the leaf
#[utoipa::path(get, path = "/v1/audit/entries/{index}/receipt", tag = "audit",
    params(("index" = i64, Path, description = "Its index"), ReceiptQuery),
    responses((status = 200, content_type = "text/plain", body = String), (status = 404, description = "Beyond the head"),
              (status = 503, description = "No checkpoint covers it yet")))]
async fn receipt(
    Room(audit): Room<Audit>,
    caller: Caller,
    UrlPath(index): UrlPath<String>,
    Query(q): Query<ReceiptQuery>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let proof = audit.receipt(&caller, whole(&index)?, q.size, receipt_wait(&headers)).await?;
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], proof.text()).into_response())
}

/// How long a receipt waits for its checkpoint.
fn receipt_wait(headers: &HeaderMap) -> Duration {
    let wait = headers.get("sop-timeout").and_then(|v| v.to_str().ok()?.parse::<f64>().ok()).unwrap_or(5.0);
    Duration::try_from_secs_f64(wait.clamp(0.0, 60.0)).unwrap_or(Duration::from_secs(5))
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ConsistencyQuery {
    /// Size of the older checkpoint
    from: u64,
    /// Size of the newer one; without it, the newest
    #[serde(default)]
    to: Option<u64>,
}

/// What shows that one checkpoint extends another (RFC 9162, 2.1.4), hashes and roots in base64
#[derive(Serialize, utoipa::ToSchema)]
struct Consistent {
    from: u64,
    to: u64,
    from_root: String,
    to_root: String,
    proof: Vec<String>,
}

/// The consistency proof between two sizes of the log
#[utoipa::path(get, path = "/v1/audit/consistency", tag = "audit", params(ConsistencyQuery),
    responses((status = 200, body = Consistent), (status = 400, description = "`from` is above `to`"), (status = 404, description = "Beyond the newest checkpoint")))]
async fn consistency(
    Room(audit): Room<Audit>,
    caller: Caller,
    Query(q): Query<ConsistencyQuery>,
) -> Result<Answer<Consistent>, Refusal> {
    let found = audit.consistency(&caller, q.from, q.to).await?;
    Ok(Answer::ok(Consistent {
        from: found.from.0,
        to: found.to.0,
        from_root: base64(found.from.1),
        to_root: base64(found.to.1),
        proof: found.proof.iter().map(base64).collect(),
    }))
}

/// The newest signed checkpoint (C2SP tlog-checkpoint)
#[utoipa::path(get, path = "/log/checkpoint", tag = "log", responses((status = 200, content_type = "text/plain", body = String)))]
async fn checkpoint(Room(audit): Room<Audit>) -> Result<Response, Refusal> {
    let headers = [(header::CONTENT_TYPE, "text/plain; charset=utf-8"), (header::CACHE_CONTROL, "no-cache")];
    Ok((headers, audit.checkpoint().await?).into_response())
}

/// The log's verifier key
#[utoipa::path(get, path = "/log/key", tag = "log", responses((status = 200, content_type = "text/plain", body = String)))]
async fn key(Room(audit): Room<Audit>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], format!("{}\n", audit.key())).into_response()
}

/// A tile of hashes, or with `entries` for a level an entry bundle (C2SP tlog-tiles)
#[utoipa::path(get, path = "/log/tile/{*path}", tag = "log", params(("path" = String, Path, description = "`<L>/<N>[.p/<W>]` or `entries/<N>[.p/<W>]`")),
    responses((status = 200, content_type = "application/octet-stream", body = Vec<u8>), (status = 404)))]
async fn tile(
    Room(audit): Room<Audit>,
    caller: Option<axum::Extension<Caller>>,
    UrlPath(path): UrlPath<String>,
    asked: HeaderMap,
) -> Result<Response, Refusal> {
    let (bytes, public) = match Path::parse(&path).ok_or_else(|| Refusal::not_found("such tile"))? {
        Path::Hashes(tile) => (audit.tile(tile).await?, true),
        Path::Entries(tile) => (audit.bundle(caller.as_ref().map(|c| &c.0), tile).await?, audit.public_entries()),
    };
    // `public` would let a shared cache give to anybody what one caller was allowed to read (RFC 9111, 3.5).
    let kept = if public { "public, max-age=31536000, immutable" } else { "private, max-age=31536000, immutable" };
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream"),
        (header::CACHE_CONTROL, kept),
        (header::VARY, "accept-encoding"),
    ];
    // Hashes do not get shorter; leaves do.
    let accepted = asked.get(header::ACCEPT_ENCODING).and_then(|v| v.to_str().ok()).unwrap_or_default();
    if path.starts_with("entries/") && accepted.split(',').any(|c| c.trim() == "gzip") {
        let coded = [(header::CONTENT_ENCODING, "gzip")];
        return Ok((headers, coded, deflate(&bytes).map_err(Refusal::internal)?).into_response());
    }
    Ok((headers, bytes).into_response())
}

fn deflate(bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(bytes)?;
    out.finish()
}

fn whole(text: &str) -> Result<i64, Refusal> {
    text.parse().map_err(|_| Refusal::malformed("", "an index is a whole number"))
}
