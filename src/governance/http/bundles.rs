//! Bundles over HTTP.

use axum::extract::State as Room;
use serde::Deserialize;
use serde_json::Value;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::governance::Governance;
use crate::governance::bundles::{Ruling, Scope, Shown, text_of};
use crate::governance::cases::Case;
use crate::governance::compiled::Source;
use crate::governance::proposals::{Shown as Proposal, Wanted};
use crate::governance::validate::Validation;
use crate::kernel::web::{Answer, Ask, Caller, Json, JsonOr, LargeJson, Listing, Path, Query, cursor, page_limit};
use crate::kernel::{Refusal, ids};

pub(super) fn routes() -> OpenApiRouter<Governance> {
    OpenApiRouter::new()
        .routes(routes!(create, list))
        .routes(routes!(read))
        .routes(routes!(in_force))
        .routes(routes!(validate))
        .routes(routes!(propose))
        .routes(routes!(activate))
        .routes(routes!(canary))
        .routes(routes!(rollback))
}

#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = BundleRequest)]
struct Create {
    /// Cedar text, or Cedar's JSON of a policy set
    #[schema(value_type = String)]
    policies: Value,
    /// A schema, as text or JSON; the shipped one is always merged in
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    schema: Option<Value>,
    /// What it is for
    #[serde(default)]
    note: String,
    /// Which it replaces
    #[serde(default)]
    scope: Scope,
    /// Cases it must pass to be validated
    #[serde(default)]
    tests: Vec<Case>,
}

pub(super) fn id_of(id: String) -> Result<String, Refusal> {
    ids::id_fault(&id).map_or(Ok(id), |fault| Err(Refusal::malformed("", fault)))
}

/// Make a draft of a bundle
#[utoipa::path(post, path = "/v1/governance/bundles", tag = "governance", request_body = Create,
    responses((status = 201, body = Shown), (status = 400), (status = 422, description = "It does not parse or type-check; `errors` have line and column")))]
async fn create(
    Room(room): Room<Governance>,
    caller: Caller,
    LargeJson(body): LargeJson<Create>,
) -> Result<Answer<Shown>, Refusal> {
    let readable = |v: &Value| matches!(v, Value::String(_) | Value::Object(_));
    for (at, value) in [("/policies", Some(&body.policies)), ("/schema", body.schema.as_ref())] {
        if value.is_some_and(|v| !readable(v)) {
            return Err(Refusal::malformed(at, "Cedar text, or Cedar's JSON as an object"));
        }
    }
    let source = Source { policies: text_of(body.policies), schema: body.schema.map(text_of) };
    let done = room.create_bundle(&caller, source, body.scope, body.note, body.tests).await?;
    Ok(Answer::created(done.value).at(done.index))
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// Only those of this status
    #[serde(default)]
    status: Option<String>,
    /// How many
    #[serde(default)]
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<i64>,
    /// The cursor of the page before
    #[serde(default)]
    after: Option<String>,
}

/// Bundles, newest first
#[utoipa::path(get, path = "/v1/governance/bundles", tag = "governance", params(ListQuery),
    responses((status = 200, body = Listing<Shown>)))]
async fn list(
    Room(room): Room<Governance>,
    caller: Caller,
    Query(q): Query<ListQuery>,
) -> Result<Answer<Listing<Shown>>, Refusal> {
    let before = q.after.as_deref().map(cursor::decode::<i64>).transpose()?.unwrap_or(i64::MAX);
    let limit = page_limit(q.limit)?;
    let status = q.status.map(id_of).transpose()?;
    let mut items = room.bundles(&caller, status.as_deref(), before, limit + 1).await?;
    let more = items.len() > limit;
    items.truncate(limit);
    let next = items.last().filter(|_| more).map(|b| cursor::encode(&b.created_index));
    Ok(Answer::ok(Listing { items, next }))
}

/// A bundle, with its text
#[utoipa::path(get, path = "/v1/governance/bundles/{id}", tag = "governance",
    params(("id" = String, Path, description = "The bundle")), responses((status = 200, body = Shown), (status = 404)))]
async fn read(Room(room): Room<Governance>, caller: Caller, Path(id): Path<String>) -> Result<Answer<Shown>, Refusal> {
    let found = room.bundle(&caller, &id_of(id)?).await?;
    let tag = found.index;
    Ok(Answer::ok(found).tagged(tag))
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct AtQuery {
    /// As of this index
    #[serde(default)]
    #[param(minimum = 0)]
    at: Option<i64>,
}

/// Which bundles are in force, or were at an index
#[utoipa::path(get, path = "/v1/governance/active", tag = "governance", params(AtQuery),
    responses((status = 200, body = Ruling), (status = 400), (status = 404)))]
async fn in_force(
    Room(room): Room<Governance>,
    caller: Caller,
    Query(q): Query<AtQuery>,
) -> Result<Answer<Ruling>, Refusal> {
    if q.at.is_some_and(|at| at < 0) {
        return Err(Refusal::malformed("?at", "at is an index, from 0"));
    }
    Ok(Answer::ok(room.in_force(&caller, q.at).await?))
}

/// Hold a draft to its schema and its cases
#[utoipa::path(post, path = "/v1/governance/bundles/{id}/validate", tag = "governance",
    params(("id" = String, Path, description = "The bundle")),
    responses((status = 200, body = Validation), (status = 404), (status = 409, description = "It is in use, or was"),
        (status = 422, description = "It does not type-check, or a case does not come out as it must; `errors` say which")))]
async fn validate(
    Room(room): Room<Governance>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Answer<Validation>, Refusal> {
    let done = room.validate(&caller, &id_of(id)?).await?;
    Ok(Answer::ok(done.value).at(done.index))
}

#[derive(Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = BundleProposal)]
struct Propose {
    /// Why
    #[serde(default)]
    reason: String,
}

/// Propose a bundle for activation
#[utoipa::path(post, path = "/v1/governance/bundles/{id}/propose", tag = "governance", request_body = Propose,
    params(("id" = String, Path, description = "The bundle")), responses((status = 201, body = Proposal), (status = 404)))]
async fn propose(
    Room(room): Room<Governance>,
    caller: Caller,
    Path(id): Path<String>,
    JsonOr(body): JsonOr<Propose>,
) -> Result<Answer<Proposal>, Refusal> {
    let (bundle, _) = room.open(&id_of(id)?).await?;
    let ask = Ask::new("governance:activate", "Bundle", bundle.id);
    let wanted = Wanted { kind: "bundle", ask, body: None, reason: body.reason, also: Some(bundle.author) };
    let done = room.propose(&caller, wanted).await?;
    Ok(Answer::created(done.value).at(done.index))
}

#[derive(Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Activation)]
struct Activate {
    /// Even if the caller could not roll back under it
    #[serde(default)]
    force: bool,
}

/// Bring a bundle into force, once others approved
#[utoipa::path(post, path = "/v1/governance/bundles/{id}/activate", tag = "governance", request_body = Activate,
    params(("id" = String, Path, description = "The bundle")),
    responses((status = 200, body = Ruling), (status = 404), (status = 409, description = "Not approved, or in force"), (status = 422, description = "It would lock out")))]
async fn activate(
    Room(room): Room<Governance>,
    caller: Caller,
    Path(id): Path<String>,
    JsonOr(body): JsonOr<Activate>,
) -> Result<Answer<Ruling>, Refusal> {
    let done = room.activate(&caller, &id_of(id)?, body.force).await?;
    Ok(Answer::ok(done.value).at(done.index))
}

#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = CanaryRequest)]
struct Canary {
    /// Subjects of a hundred; 0 ends it
    percent: f64,
    /// It stops by itself when more than so many of a hundred of its decisions deny what the active bundle permits; without it,
    /// as `governance.canary_new_denials` says; 100: never
    #[serde(default)]
    stop_at: Option<f64>,
}

/// Let a bundle decide for a part of the subjects
#[utoipa::path(post, path = "/v1/governance/bundles/{id}/canary", tag = "governance", request_body = Canary,
    params(("id" = String, Path, description = "The bundle")),
    responses((status = 200, body = Ruling), (status = 404), (status = 409), (status = 422)))]
async fn canary(
    Room(room): Room<Governance>,
    caller: Caller,
    Path(id): Path<String>,
    Json(body): Json<Canary>,
) -> Result<Answer<Ruling>, Refusal> {
    let done = room.canary(&caller, &id_of(id)?, body.percent, body.stop_at).await?;
    Ok(Answer::ok(done.value).at(done.index))
}

#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RollbackRequest)]
struct Rollback {
    /// The bundle to go back to; without it, the application's that was in force before
    #[serde(default)]
    to: Option<String>,
    /// Why; kept in the record
    reason: String,
}

/// Go back to a bundle that was in force before, at once
#[utoipa::path(post, path = "/v1/governance/rollback", tag = "governance", request_body = Rollback,
    responses((status = 200, body = Ruling), (status = 404), (status = 409)))]
async fn rollback(
    Room(room): Room<Governance>,
    caller: Caller,
    Json(body): Json<Rollback>,
) -> Result<Answer<Ruling>, Refusal> {
    let to = body.to.map(id_of).transpose()?;
    let done = room.rollback(&caller, to, body.reason).await?;
    Ok(Answer::ok(done.value).at(done.index))
}
