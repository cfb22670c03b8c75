//! The routes of leases.

use axum::extract::State as Room;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::kernel::Refusal;
use crate::kernel::web::{
    Answer, Ask, Caller, Json, JsonOr, Listing, Nothing, Path, Preconditions, Query, cursor, page_limit,
};

use crate::state::State;
use crate::state::leases::{Ended, Lease, TTL, absent, seconds};
use crate::state::store::leases::{self as rows, Row};
use crate::state::waiting::named;

use super::untagged;

/// Leases renewed at once at most.
const RENEWED: usize = 1000;
/// Keys shown with a lease at most.
const SHOWN: i64 = 1000;

pub(super) fn routes() -> OpenApiRouter<State> {
    OpenApiRouter::new()
        .routes(routes!(grant, list))
        .routes(routes!(renew_all))
        .routes(routes!(renew))
        .routes(routes!(read, revoke))
}

/// How long it is to live
#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = LeaseRequest)]
struct Wanted {
    /// Seconds without a renewal after which it ends, 1-86,400
    ttl: f64,
}

/// Which leases
#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = LeaseIds)]
struct Ids {
    /// At most 1,000
    ids: Vec<Uuid>,
}

/// A lease that was renewed
#[derive(Serialize, utoipa::ToSchema)]
#[schema(as = RenewedLease)]
struct Renewed {
    id: Uuid,
    /// Seconds it lives from now
    ttl: f64,
}

/// What became of leases that were to be renewed
#[derive(Serialize, utoipa::ToSchema)]
#[schema(as = RenewedLeases)]
struct RenewedAll {
    /// Those that were
    renewed: Vec<Renewed>,
    /// Those that ended before, or are not the caller's
    gone: Vec<Uuid>,
}

/// A lease, and what hangs on it
#[derive(Serialize, utoipa::ToSchema)]
#[schema(as = LeaseDetails)]
struct Shown {
    id: Uuid,
    /// The client it was granted to
    owner: String,
    ttl: f64,
    /// About how many seconds are left if it is not renewed
    remaining: f64,
    granted_index: i64,
    /// The index of its last renewal
    renewed_index: i64,
    /// The lock it was made for, and ends with
    lock: Option<String>,
    /// Keys that go with it; at most 1,000 are named
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Vec<Value>)]
    keys: Option<Vec<Value>>,
}

/// A time to live in milliseconds.
pub(super) fn ttl_ms(ttl: f64) -> Result<i64, Refusal> {
    if !TTL.contains(&ttl) {
        return Err(Refusal::malformed("/ttl", "ttl is from 1 to 86400 seconds"));
    }
    Ok((ttl * 1000.0) as i64)
}

/// Grant a lease: keys and locks hang on it, and go when it is not renewed
#[utoipa::path(post, path = "/v1/state/leases", tag = "state", request_body = Wanted, responses((status = 201, body = Lease)))]
async fn grant(Room(state): Room<State>, caller: Caller, Json(wanted): Json<Wanted>) -> Result<Answer<Lease>, Refusal> {
    let done = state.grant(&caller, ttl_ms(wanted.ttl)?, None).await?;
    Ok(Answer::created(done.value).at(done.index))
}

/// Renew a lease: it lives its whole time from here
#[utoipa::path(post, path = "/v1/state/leases/{id}/renew", tag = "state", params(("id" = Uuid, Path, description = "The lease")),
    responses((status = 200, body = Renewed), (status = 404, description = "It has ended, or is another's")))]
async fn renew(
    Room(state): Room<State>,
    caller: Caller,
    Path(id): Path<Uuid>,
    _: JsonOr<Nothing>,
) -> Result<Answer<Renewed>, Refusal> {
    let (index, renewed) = state.renew(&caller, vec![id]).await?;
    let (id, ttl) = renewed.first().copied().ok_or_else(|| absent(id))?;
    Ok(Answer::ok(Renewed { id, ttl: seconds(ttl) }).at(index))
}

/// Renew many leases at once
#[utoipa::path(post, path = "/v1/state/leases/renew", tag = "state", request_body = Ids, responses((status = 200, body = RenewedAll)))]
async fn renew_all(
    Room(state): Room<State>,
    caller: Caller,
    Json(wanted): Json<Ids>,
) -> Result<Answer<RenewedAll>, Refusal> {
    let ids = wanted.ids;
    if ids.is_empty() || ids.len() > RENEWED {
        return Err(Refusal::malformed("/ids", format!("from 1 to {RENEWED} leases")));
    }
    let (index, renewed) = state.renew(&caller, ids.clone()).await?;
    let gone = ids.into_iter().filter(|id| !renewed.iter().any(|(r, _)| r == id)).collect();
    let renewed = renewed.into_iter().map(|(id, ttl)| Renewed { id, ttl: seconds(ttl) }).collect();
    Ok(Answer::ok(RenewedAll { renewed, gone }).at(index))
}

impl Shown {
    fn of(state: &State, row: Row, keys: Option<&[Vec<u8>]>) -> Self {
        let (ttl, remaining) = (seconds(row.ttl_ms), state.remaining(&row));
        Self {
            id: row.id,
            owner: row.owner,
            ttl,
            remaining: (remaining * 1000.0).round() / 1000.0,
            granted_index: row.granted_index,
            renewed_index: row.beat,
            lock: row.lock,
            keys: keys.map(named),
        }
    }
}

/// Read a lease
#[utoipa::path(get, path = "/v1/state/leases/{id}", tag = "state", params(("id" = Uuid, Path, description = "The lease")),
    responses((status = 200, body = Shown), (status = 404)))]
async fn read(Room(state): Room<State>, caller: Caller, Path(id): Path<Uuid>) -> Result<Answer<Shown>, Refusal> {
    state.ledger.permit(&caller, &[Ask::new("state:lease-read", "Lease", id.to_string())]).await?;
    let row = state.lease(id).await?.ok_or_else(|| Refusal::not_found(format!("lease {id}")))?;
    let mut conn = state.connection().await?;
    let keys = rows::keys(&mut conn, id, SHOWN).await.map_err(|e| state.store.refusal(e))?;
    Ok(Answer::ok(Shown::of(&state, row, Some(&keys))))
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// 1-1000, default 100
    #[serde(default)]
    limit: Option<i64>,
    /// `next` of the page before
    #[serde(default)]
    after: Option<String>,
}

/// List leases, the oldest first
#[utoipa::path(get, path = "/v1/state/leases", tag = "state", params(ListQuery), responses((status = 200, body = Listing<Shown>)))]
async fn list(
    Room(state): Room<State>,
    caller: Caller,
    Query(q): Query<ListQuery>,
) -> Result<Answer<Listing<Shown>>, Refusal> {
    state.ledger.permit(&caller, &[Ask::new("state:lease-read", "Lease", "")]).await?;
    let (limit, after) = (page_limit(q.limit)?, q.after.as_deref().map(cursor::decode::<Uuid>).transpose()?);
    let mut conn = state.connection().await?;
    let mut found = rows::list(&mut conn, after, limit as i64 + 1).await.map_err(|e| state.store.refusal(e))?;
    let more = found.len() > limit;
    found.truncate(limit);
    let next = found.last().filter(|_| more).map(|last| cursor::encode(&last.id));
    let items = found.into_iter().map(|row| Shown::of(&state, row, None)).collect();
    Ok(Answer::ok(Listing { items, next }))
}

/// End a lease, and all that hangs on it
#[utoipa::path(delete, path = "/v1/state/leases/{id}", tag = "state", params(("id" = Uuid, Path, description = "The lease")),
    responses((status = 200, body = Ended), (status = 404)))]
async fn revoke(
    Room(state): Room<State>,
    caller: Caller,
    Path(id): Path<Uuid>,
    conditions: Preconditions,
) -> Result<Answer<Ended>, Refusal> {
    untagged(&conditions)?;
    let done = state.revoke(&caller, id).await?;
    Ok(Answer::ok(done.value).at(done.index))
}
