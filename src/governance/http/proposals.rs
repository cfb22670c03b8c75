//! Proposals over HTTP.

use axum::extract::State as Room;
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::governance::Governance;
use crate::governance::bundles::id_of;
use crate::governance::proposals::{Shown, Wanted, entity_body};
use crate::governance::voices::Voicing;
use crate::kernel::web::{Answer, Ask, Caller, EntityName, Json, JsonOr, Listing, Path, Query, cursor, page_limit};
use crate::kernel::{Refusal, ids};

pub(super) fn routes() -> OpenApiRouter<Governance> {
    OpenApiRouter::new()
        .routes(routes!(propose, list))
        .routes(routes!(read))
        .routes(routes!(approve))
        .routes(routes!(reject))
        .routes(routes!(withdraw))
        .routes(routes!(overrule))
        .routes(routes!(review))
}

#[derive(Clone, Copy, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = ProposedChange)]
enum Change {
    /// Put the entity
    EntityPut,
    /// Delete it
    EntityDelete,
}

#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ProposalRequest)]
struct Propose {
    /// What is to be done
    change: Change,
    /// To which entity
    #[schema(value_type = Object)]
    entity: EntityName,
    /// With `entity_put`: its attributes
    #[serde(default)]
    attrs: Map<String, Value>,
    /// With `entity_put`: its parents
    #[serde(default)]
    #[schema(value_type = Vec<Object>)]
    parents: Vec<EntityName>,
    /// Why
    #[serde(default)]
    reason: String,
}

/// Propose a change of an entity that waits for others
#[utoipa::path(post, path = "/v1/governance/proposals", tag = "governance", request_body = Propose,
    responses((status = 201, body = Shown), (status = 400), (status = 422)))]
async fn propose(
    Room(room): Room<Governance>,
    caller: Caller,
    Json(body): Json<Propose>,
) -> Result<Answer<Shown>, Refusal> {
    if let Some(fault) = ids::id_fault(&body.entity.id).or(ids::id_fault(&body.entity.kind)) {
        return Err(Refusal::malformed("/entity", fault));
    }
    let put = room.entity_ask(&body.entity, &body.attrs, &body.parents)?;
    let (ask, body_) = match body.change {
        Change::EntityPut => (put, Some(entity_body(&body.attrs, &body.parents))),
        Change::EntityDelete => (Ask::new("governance:entity-delete", "Entity", put.name), None),
    };
    let wanted = Wanted { kind: "entity", ask, body: body_, reason: body.reason, also: None };
    let done = room.propose(&caller, wanted).await?;
    Ok(Answer::created(done.value).at(done.index))
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// Only those of this status
    #[serde(default)]
    status: Option<String>,
    /// `pending`: only those that were overridden and that nobody has looked at since
    #[serde(default)]
    review: Option<String>,
    /// How many
    #[serde(default)]
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<i64>,
    /// The cursor of the page before
    #[serde(default)]
    after: Option<String>,
}

/// Proposals, newest first
#[utoipa::path(get, path = "/v1/governance/proposals", tag = "governance", params(ListQuery),
    responses((status = 200, body = Listing<Shown>)))]
async fn list(
    Room(room): Room<Governance>,
    caller: Caller,
    Query(q): Query<ListQuery>,
) -> Result<Answer<Listing<Shown>>, Refusal> {
    let before = q.after.as_deref().map(cursor::decode::<i64>).transpose()?.unwrap_or(i64::MAX);
    let limit = page_limit(q.limit)?;
    if let Some(fault) = q.status.as_deref().and_then(ids::id_fault) {
        return Err(Refusal::malformed("?status", fault));
    }
    let unreviewed = match q.review.as_deref() {
        None => false,
        Some("pending") => true,
        Some(_) => return Err(Refusal::malformed("?review", "review is `pending`")),
    };
    let mut found = room.proposals(&caller, q.status.as_deref(), unreviewed, before, limit + 1).await?;
    let more = found.len() > limit;
    found.truncate(limit);
    let next = found.last().filter(|_| more).map(|(created, _)| cursor::encode(created));
    Ok(Answer::ok(Listing { items: found.into_iter().map(|(_, p)| p).collect(), next }))
}

/// A proposal, with who approved it
#[utoipa::path(get, path = "/v1/governance/proposals/{id}", tag = "governance",
    params(("id" = String, Path, description = "The proposal")), responses((status = 200, body = Shown), (status = 404)))]
async fn read(Room(room): Room<Governance>, caller: Caller, Path(id): Path<String>) -> Result<Answer<Shown>, Refusal> {
    Ok(Answer::ok(room.proposal(&caller, id_of(&id)?).await?))
}

#[derive(Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Voice)]
struct Why {
    /// Why; kept in the record
    #[serde(default)]
    reason: String,
}

async fn speak(
    room: &Governance,
    caller: &Caller,
    id: &str,
    what: Voicing,
    why: Why,
) -> Result<Answer<Shown>, Refusal> {
    let wanted = matches!(what, Voicing::Override | Voicing::Review);
    if wanted && why.reason.trim().is_empty() {
        return Err(Refusal::malformed("/reason", "this wants a reason: it is looked at afterwards"));
    }
    let done = room.speak(caller, id_of(id)?, what, why.reason).await?;
    Ok(Answer::ok(done.value).at(done.index))
}

/// Approve a proposal of somebody else
#[utoipa::path(post, path = "/v1/governance/proposals/{id}/approve", tag = "governance", request_body = Why,
    params(("id" = String, Path, description = "The proposal")),
    responses((status = 200, body = Shown), (status = 403, description = "It is the caller's own"), (status = 404), (status = 409)))]
async fn approve(
    Room(room): Room<Governance>,
    caller: Caller,
    Path(id): Path<String>,
    JsonOr(why): JsonOr<Why>,
) -> Result<Answer<Shown>, Refusal> {
    speak(&room, &caller, &id, Voicing::Approve, why).await
}

/// Reject a proposal
#[utoipa::path(post, path = "/v1/governance/proposals/{id}/reject", tag = "governance", request_body = Why,
    params(("id" = String, Path, description = "The proposal")), responses((status = 200, body = Shown), (status = 404), (status = 409)))]
async fn reject(
    Room(room): Room<Governance>,
    caller: Caller,
    Path(id): Path<String>,
    JsonOr(why): JsonOr<Why>,
) -> Result<Answer<Shown>, Refusal> {
    speak(&room, &caller, &id, Voicing::Reject, why).await
}

/// Withdraw one's own proposal
#[utoipa::path(post, path = "/v1/governance/proposals/{id}/withdraw", tag = "governance", request_body = Why,
    params(("id" = String, Path, description = "The proposal")), responses((status = 200, body = Shown), (status = 404), (status = 409)))]
async fn withdraw(
    Room(room): Room<Governance>,
    caller: Caller,
    Path(id): Path<String>,
    JsonOr(why): JsonOr<Why>,
) -> Result<Answer<Shown>, Refusal> {
    speak(&room, &caller, &id, Voicing::Withdraw, why).await
}

/// Do without the approvals, in an emergency: loudly, and to be reviewed
#[utoipa::path(post, path = "/v1/governance/proposals/{id}/override", tag = "governance", request_body = Why,
    params(("id" = String, Path, description = "The proposal")), responses((status = 200, body = Shown), (status = 404), (status = 409)))]
async fn overrule(
    Room(room): Room<Governance>,
    caller: Caller,
    Path(id): Path<String>,
    JsonOr(why): JsonOr<Why>,
) -> Result<Answer<Shown>, Refusal> {
    speak(&room, &caller, &id, Voicing::Override, why).await
}

/// Say what was made of an override
#[utoipa::path(post, path = "/v1/governance/proposals/{id}/review", tag = "governance", request_body = Why,
    params(("id" = String, Path, description = "The proposal")), responses((status = 200, body = Shown), (status = 404), (status = 409)))]
async fn review(
    Room(room): Room<Governance>,
    caller: Caller,
    Path(id): Path<String>,
    JsonOr(why): JsonOr<Why>,
) -> Result<Answer<Shown>, Refusal> {
    speak(&room, &caller, &id, Voicing::Review, why).await
}
