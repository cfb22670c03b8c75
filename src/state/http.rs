//! The room's routes.

mod leases;
mod locks;
mod txn;
mod watch;

use axum::extract::{FromRequestParts, State as Room};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::kernel::web::{
    Answer, Body, Caller, Listing, Name, Preconditions, Query, SOP_INDEX, Tags, known, page_limit,
};
use crate::kernel::{Refusal, problem};

use super::model::{Condition, Deleted, Item, Written, prefix_fault};
use super::{List, Moment, State, kv};

/// The routes of the room.
pub fn routes(state: State) -> OpenApiRouter {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(get, head, put, delete))
        .merge(super::etcd::routes())
        .merge(leases::routes())
        .merge(locks::routes())
        .merge(txn::routes())
        .merge(watch::routes())
        .with_state(state)
}

/// What it hangs on.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct OnLease {
    /// The key goes when this lease of yours ends; without it, it hangs on none
    #[serde(default)]
    lease: Option<Uuid>,
}

/// As of which index.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct At {
    /// Read the state as of this index
    #[serde(default)]
    at: Option<i64>,
}

/// Put a value: the body, any bytes, under a key
#[utoipa::path(put, path = "/v1/state/kv/{*key}", tag = "state", params(("key" = String, Path, description = "The key, a name"), OnLease,
        ("If-Match" = Option<String>, Header, description = "Only if its index is one of these tags; `*`: if it is there"),
        ("If-None-Match" = Option<String>, Header, description = "Only if its index is none of these tags; `*`: if it is not there")),
    request_body(content = Vec<u8>, content_type = "*/*"),
    responses((status = 200, body = Written), (status = 412, description = "The condition does not hold")))]
async fn put(
    Room(state): Room<State>,
    caller: Caller,
    Name(key): Name,
    Query(on): Query<OnLease>,
    conditions: Preconditions,
    ContentType(content_type): ContentType,
    Body(value): Body,
) -> Result<Answer<Written>, Refusal> {
    let condition = condition(conditions)?;
    let put = kv::Put::new(key, value.to_vec(), content_type, condition).leased(on.lease, caller.actor());
    let done = state.put(&caller, put).await?;
    let tag = done.value.index;
    Ok(Answer::ok(done.value).at(done.index).tagged(tag))
}

/// Read a key's value
#[utoipa::path(get, path = "/v1/state/kv/{*key}", tag = "state", params(("key" = String, Path, description = "The key, a name"), At),
    responses((status = 200, description = "The value, with the Content-Type it was put with", content_type = "*/*", body = Vec<u8>),
              (status = 404, description = "There is no such key"), (status = 410, description = "That part of history was compacted")))]
async fn get(
    Room(state): Room<State>,
    caller: Caller,
    Name(key): Name,
    Query(q): Query<At>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let (index, item) = state.get(&caller, &key, Moment { at: q.at }).await?;
    Ok(value_response(index, &item, &headers))
}

/// Ask about a key without its value
#[utoipa::path(head, path = "/v1/state/kv/{*key}", tag = "state", params(("key" = String, Path, description = "The key, a name"), At),
    responses((status = 200), (status = 404, description = "There is no such key")))]
async fn head(
    Room(state): Room<State>,
    caller: Caller,
    Name(key): Name,
    Query(q): Query<At>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let (index, item) = state.get(&caller, &key, Moment { at: q.at }).await?;
    // The server leaves the body out of the answer to a HEAD and keeps its length.
    Ok(value_response(index, &item, &headers))
}

fn value_response(index: i64, item: &Item, headers: &HeaderMap) -> Response {
    let tag = format!("\"{}\"", item.index);
    let known = match known(headers) {
        None => false,
        Some(Tags::Any) => true,
        Some(Tags::These(tags)) => tags.contains(&item.index.to_string()),
    };
    let mut response = if known {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        let mut response = item.value.clone().into_response();
        let kept =
            HeaderValue::try_from(&item.content_type).unwrap_or(HeaderValue::from_static("application/octet-stream"));
        response.headers_mut().insert(header::CONTENT_TYPE, kept);
        response
    };
    let out = response.headers_mut();
    out.insert(SOP_INDEX, index.into());
    if let Ok(tag) = HeaderValue::try_from(tag) {
        out.insert(header::ETAG, tag);
    }
    // It is whatever somebody put: a browser takes it for what it says it is and nothing else.
    out.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    out.insert("sop-created-index", item.created_index.into());
    out.insert("sop-version", item.version.into());
    if let Some(lease) = item.lease.and_then(|l| HeaderValue::try_from(l.to_string()).ok()) {
        out.insert("sop-lease", lease);
    }
    response
}

/// Delete a key
#[utoipa::path(delete, path = "/v1/state/kv/{*key}", tag = "state",
    params(("key" = String, Path, description = "The key, a name"),
        ("If-Match" = Option<String>, Header, description = "Only if its index is one of these tags"),
        ("If-None-Match" = Option<String>, Header, description = "Only if its index is none of these tags")),
    responses((status = 200, body = Deleted), (status = 404, description = "There is no such key"), (status = 412, description = "The condition does not hold")))]
async fn delete(
    Room(state): Room<State>,
    caller: Caller,
    Name(key): Name,
    conditions: Preconditions,
) -> Result<Answer<Deleted>, Refusal> {
    let done = state.delete(&caller, key, condition(conditions)?).await?;
    Ok(Answer::ok(done.value).at(done.index))
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// Keys that begin so; all without it
    #[serde(default)]
    prefix: String,
    /// Leave the values out
    #[serde(default)]
    keys_only: bool,
    /// As of this index
    #[serde(default)]
    at: Option<i64>,
    /// 1-1000, default 100
    #[serde(default)]
    limit: Option<i64>,
    /// `next` of the page before
    #[serde(default)]
    after: Option<String>,
}

/// List keys; all pages are of the first one's moment
#[utoipa::path(get, path = "/v1/state/kv", tag = "state", params(ListQuery), responses((status = 200, body = Listing<Object>)))]
async fn list(
    Room(state): Room<State>,
    caller: Caller,
    Query(q): Query<ListQuery>,
) -> Result<Answer<Listing<Map<String, Value>>>, Refusal> {
    let prefix = valid_prefix(q.prefix)?;
    let (limit, after) = (page_limit(q.limit)?, q.after.as_deref());
    let asked = List { prefix: &prefix, at: q.at, limit, after, values: !q.keys_only };
    let page = state.list(&caller, asked).await?;
    let items = page.items.iter().map(|i| i.to_json(!q.keys_only)).collect();
    Ok(Answer::ok(Listing { items, next: page.next }).at(page.index))
}

/// What a body says it is, to be kept with it.
struct ContentType(String);

impl<S: Send + Sync> FromRequestParts<S> for ContentType {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        match parts.headers.get(header::CONTENT_TYPE) {
            None => Ok(Self("application/octet-stream".to_owned())),
            Some(value) => match value.to_str() {
                Ok(text) if text.len() <= 256 => Ok(Self(text.to_owned())),
                _ => Err(Refusal::new(&problem::MALFORMED, "Content-Type is at most 256 visible ASCII characters")),
            },
        }
    }
}

fn valid_prefix(prefix: String) -> Result<String, Refusal> {
    match prefix_fault(&prefix) {
        None => Ok(prefix),
        Some(fault) => Err(Refusal::malformed("?prefix", fault)),
    }
}

/// Holds a change of something that is there or not, and has no tag, to its preconditions (RFC 9110, 13.1.1 and 13.1.2): no
/// tag matches it, and what is to be deleted is there.
fn untagged(p: &Preconditions) -> Result<(), Refusal> {
    let fails = matches!(p.if_match, Some(Tags::These(_))) || p.if_none_match == Some(Tags::Any);
    if fails {
        let detail = "it has no entity tag, and is deleted only if it is there";
        return Err(Refusal::new(&problem::PRECONDITION_FAILED, detail));
    }
    Ok(())
}

fn condition(p: Preconditions) -> Result<Condition, Refusal> {
    let indexes = |tags: Vec<String>| -> Vec<i64> {
        // A tag that is no index was never given out, so it matches nothing.
        tags.iter().filter_map(|t| t.parse().ok()).collect()
    };
    match (p.if_match, p.if_none_match) {
        (None, None) => Ok(Condition::None),
        (Some(Tags::Any), None) => Ok(Condition::Exists),
        (Some(Tags::These(tags)), None) => Ok(Condition::IndexIn(indexes(tags))),
        (None, Some(Tags::Any)) => Ok(Condition::Absent),
        (None, Some(Tags::These(tags))) => Ok(Condition::IndexNotIn(indexes(tags))),
        (Some(_), Some(_)) => Err(Refusal::malformed("", "send If-Match or If-None-Match, not both")),
    }
}
