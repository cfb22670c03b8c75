//! Decisions over HTTP.

use axum::extract::State as Room;
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::governance::Governance;
use crate::governance::past::{self, Filter, Shown};
use crate::governance::replay::{Range, Replay};
use crate::kernel::web::{Answer, Caller, Json, JsonOr, Listing, Path, Query, cursor, page_limit};
use crate::kernel::{Refusal, ids};

pub(super) fn routes() -> OpenApiRouter<Governance> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(read))
        .routes(routes!(explain))
        .routes(routes!(replay_one))
        .routes(routes!(replay))
}

/// Recorded decisions, newest first; a page may be short and still have a `next`
#[utoipa::path(get, path = "/v1/governance/decisions", tag = "governance", params(Filter),
    responses((status = 200, body = Listing<Shown>)))]
async fn list(
    Room(room): Room<Governance>,
    caller: Caller,
    Query(filter): Query<Filter>,
) -> Result<Answer<Listing<Shown>>, Refusal> {
    let after = filter.after.as_deref().map(cursor::decode::<(i64, usize)>).transpose()?;
    let limit = page_limit(filter.limit)?;
    for (name, value) in [("?from", filter.from), ("?to", filter.to)] {
        if value.is_some_and(|v| v < 0) {
            return Err(Refusal::malformed(name, "an index is from 0"));
        }
    }
    let (items, next) = room.decisions(&caller, &filter, after, limit).await?;
    Ok(Answer::ok(Listing { items, next: next.map(|place| cursor::encode(&place)) }))
}

fn id_of(id: &str) -> Result<&str, Refusal> {
    ids::id_fault(id).map_or(Ok(id), |fault| Err(Refusal::malformed("", fault)))
}

/// A recorded decision
#[utoipa::path(get, path = "/v1/governance/decisions/{id}", tag = "governance",
    params(("id" = String, Path, description = "The decision")), responses((status = 200, body = Shown), (status = 404)))]
async fn read(Room(room): Room<Governance>, caller: Caller, Path(id): Path<String>) -> Result<Answer<Shown>, Refusal> {
    Ok(Answer::ok(room.decision(&caller, id_of(&id)?).await?.into()))
}

/// Why it was decided so, with the bundles and entities of its time
#[utoipa::path(post, path = "/v1/governance/decisions/{id}/explain", tag = "governance",
    params(("id" = String, Path, description = "The decision")), responses((status = 200, body = Object), (status = 404)))]
async fn explain(
    Room(room): Room<Governance>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Answer<Value>, Refusal> {
    let past = room.decision(&caller, id_of(&id)?).await?;
    let explanation = room.explain(&past).await?;
    Ok(Answer::ok(past::shown(&past, explanation)))
}

#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = DecisionReplay)]
struct Against {
    /// The bundle to try
    bundle: String,
}

/// What another bundle would have decided
#[utoipa::path(post, path = "/v1/governance/decisions/{id}/replay", tag = "governance", request_body = Against,
    params(("id" = String, Path, description = "The decision")), responses((status = 200, body = Object), (status = 404)))]
async fn replay_one(
    Room(room): Room<Governance>,
    caller: Caller,
    Path(id): Path<String>,
    Json(body): Json<Against>,
) -> Result<Answer<Value>, Refusal> {
    let past = room.decision(&caller, id_of(&id)?).await?;
    let explanation = room.explain_with(&past, Some(id_of(&body.bundle)?)).await?;
    Ok(Answer::ok(json!({
        "decision_id": past.id, "bundle": body.bundle, "before": past.allowed, "after": explanation.allowed,
        "policies_before": past.policies, "policies_after": explanation.policies, "missed": explanation.missed,
        "reason": explanation.reason,
    })))
}

#[derive(Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ReplayRequest)]
struct Wanted {
    /// From this index; 0 without it
    #[serde(default)]
    #[schema(minimum = 0)]
    from: Option<i64>,
    /// To this index; the head without it
    #[serde(default)]
    #[schema(minimum = 0)]
    to: Option<i64>,
    /// Decisions read at most
    #[serde(default)]
    #[schema(minimum = 1, maximum = 1_000_000)]
    limit: Option<i64>,
    /// `next` of the answer before
    #[serde(default)]
    after: Option<String>,
}

/// What a bundle would have decided, over the decisions that were made
#[utoipa::path(post, path = "/v1/governance/bundles/{id}/replay", tag = "governance", request_body = Wanted,
    params(("id" = String, Path, description = "The bundle")), responses((status = 200, body = Replay), (status = 400), (status = 404)))]
async fn replay(
    Room(room): Room<Governance>,
    caller: Caller,
    Path(id): Path<String>,
    JsonOr(body): JsonOr<Wanted>,
) -> Result<Answer<Replay>, Refusal> {
    for (at, value) in [("/from", body.from), ("/to", body.to)] {
        if value.is_some_and(|v| v < 0) {
            return Err(Refusal::malformed(at, "an index is from 0"));
        }
    }
    let limit = match body.limit {
        None => None,
        Some(n @ 1..=1_000_000) => usize::try_from(n).ok(),
        Some(_) => return Err(Refusal::malformed("/limit", "limit is from 1 to 1000000")),
    };
    let after = body.after.as_deref().map(cursor::decode::<(i64, usize)>).transpose()?;
    let range = Range { from: body.from.unwrap_or(0), to: body.to, limit, after };
    Ok(Answer::ok(room.replay(&caller, id_of(&id)?, range).await?))
}
