//! The room's routes.

mod bundles;
mod decisions;
mod proposals;
mod shadow;

use axum::body::Bytes;
use axum::extract::{FromRequest, Request, State as Room};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::kernel::web::{Answer, Body, Caller, EntityName, Json, Path, SOP_INDEX, WhileAway, is_json};
use crate::kernel::{Refusal, ids, problem};

use super::Governance;
use super::answers::Recorded;
use super::authzen;
use super::entities::Shown;
use super::search::{For, Search};

/// The routes of the room.
pub fn routes(governance: Governance) -> OpenApiRouter {
    OpenApiRouter::new()
        .routes(routes!(evaluation))
        .routes(routes!(evaluations))
        .routes(routes!(search_subject))
        .routes(routes!(search_resource))
        .routes(routes!(search_action))
        .routes(routes!(configuration))
        .routes(routes!(put_entity, get_entity, delete_entity))
        .merge(bundles::routes())
        .merge(decisions::routes())
        .merge(proposals::routes())
        .merge(shadow::routes())
        .with_state(governance)
}

fn answer(body: &impl Serialize, index: Option<i64>) -> Response {
    // What is answered here has only strings for keys, so it can be written.
    let body = serde_json::to_vec(body).unwrap_or_default();
    let mut response = ([(header::CONTENT_TYPE, "application/json")], body).into_response();
    if let Some(index) = index {
        response.headers_mut().insert(SOP_INDEX, index.into());
    }
    response
}

/// The text of a body that is JSON.
struct Text(Bytes);

impl<S: Send + Sync> FromRequest<S> for Text {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        if !is_json(request.headers()) {
            return Err(Refusal::malformed("", "send the body as Content-Type: application/json"));
        }
        Body::from_request(request, state).await.map(|Body(bytes)| Self(bytes))
    }
}

/// A media type that is not JSON is 400 on this surface.
fn as_authzen(refused: Refusal) -> Refusal {
    if refused.problem() == &problem::UNSUPPORTED_MEDIA_TYPE {
        Refusal::malformed("", refused.detail())
    } else {
        refused
    }
}

/// May this subject do that to the resource? (AuthZEN 1.0)
#[utoipa::path(post, path = "/access/v1/evaluation", tag = "governance", request_body = Object,
    responses((status = 200, description = "`decision` and its `context`", body = Object), (status = 400)))]
async fn evaluation(
    Room(room): Room<Governance>,
    caller: Caller,
    WhileAway(away): WhileAway,
    Text(body): Text,
) -> Result<Response, Refusal> {
    let at = room.may_evaluate(&caller).await?;
    let one = room.evaluate_one(&caller, at, authzen::read(&body)?, away).await?;
    Ok(answer(&one, one.context.index))
}

/// Many questions at once (AuthZEN 1.0)
#[utoipa::path(post, path = "/access/v1/evaluations", tag = "governance", request_body = Object,
    responses((status = 200, description = "`evaluations`, in order", body = Object), (status = 400)))]
async fn evaluations(
    Room(room): Room<Governance>,
    caller: Caller,
    WhileAway(away): WhileAway,
    Text(body): Text,
) -> Result<Response, Refusal> {
    #[derive(Serialize)]
    struct All {
        evaluations: Vec<Recorded>,
    }
    let at = room.may_evaluate(&caller).await?;
    let batch = authzen::read_batch(&body)?;
    let mut evaluations = room.evaluate(&caller, at, batch.items, batch.semantic, away).await?;
    let index = evaluations.iter().filter_map(|a| a.context.index).max();
    if batch.list {
        return Ok(answer(&All { evaluations }, index));
    }
    let one = evaluations.pop().ok_or_else(|| Refusal::internal("an evaluation without an answer"))?;
    Ok(answer(&one, index))
}

async fn search(
    room: &Governance,
    caller: &Caller,
    wanted: For,
    body: Result<Json<Value>, Refusal>,
) -> Result<Response, Refusal> {
    let Json(body) = body.map_err(as_authzen)?;
    let (found, index) = room.search(caller, Search::read(wanted, &body)?).await?;
    Ok(answer(&found, Some(index)))
}

/// Which subjects may do that to the resource? (AuthZEN 1.0)
#[utoipa::path(post, path = "/access/v1/search/subject", tag = "governance", request_body = Object,
    responses((status = 200, description = "`results`, and `page.next_token`, empty at the end", body = Object), (status = 400)))]
async fn search_subject(
    Room(room): Room<Governance>,
    caller: Caller,
    body: Result<Json<Value>, Refusal>,
) -> Result<Response, Refusal> {
    search(&room, &caller, For::Subject, body).await
}

/// To which resources may the subject do that? (AuthZEN 1.0)
#[utoipa::path(post, path = "/access/v1/search/resource", tag = "governance", request_body = Object,
    responses((status = 200, description = "`results`, and `page.next_token`, empty at the end", body = Object), (status = 400)))]
async fn search_resource(
    Room(room): Room<Governance>,
    caller: Caller,
    body: Result<Json<Value>, Refusal>,
) -> Result<Response, Refusal> {
    search(&room, &caller, For::Resource, body).await
}

/// What may the subject do to the resource? (AuthZEN 1.0)
#[utoipa::path(post, path = "/access/v1/search/action", tag = "governance", request_body = Object,
    responses((status = 200, description = "`results`, and `page.next_token`, empty at the end", body = Object), (status = 400)))]
async fn search_action(
    Room(room): Room<Governance>,
    caller: Caller,
    body: Result<Json<Value>, Refusal>,
) -> Result<Response, Refusal> {
    search(&room, &caller, For::Action, body).await
}

/// Where the decision point's endpoints are (AuthZEN 1.0)
#[utoipa::path(get, path = "/.well-known/authzen-configuration", tag = "governance", responses((status = 200, body = Object)))]
async fn configuration(Room(room): Room<Governance>, headers: HeaderMap) -> Response {
    let host = headers.get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or("localhost");
    let base = format!("{}://{host}", room.scheme);
    answer(
        &json!({
            "policy_decision_point": base,
            "access_evaluation_endpoint": format!("{base}/access/v1/evaluation"),
            "access_evaluations_endpoint": format!("{base}/access/v1/evaluations"),
            "search_subject_endpoint": format!("{base}/access/v1/search/subject"),
            "search_resource_endpoint": format!("{base}/access/v1/search/resource"),
            "search_action_endpoint": format!("{base}/access/v1/search/action"),
        }),
        None,
    )
}

#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct EntityBody {
    /// Attributes, as Cedar's JSON has them
    #[serde(default)]
    attrs: Map<String, Value>,
    /// Entities it is in
    #[serde(default)]
    #[schema(value_type = Vec<Object>)]
    parents: Vec<EntityName>,
}

fn named((kind, id): (String, String)) -> Result<EntityName, Refusal> {
    match ids::id_fault(&id) {
        None => Ok(EntityName { kind, id }),
        Some(fault) => Err(Refusal::malformed("", fault)),
    }
}

/// Put an entity
#[utoipa::path(put, path = "/v1/governance/entities/{type}/{id}", tag = "governance", request_body = EntityBody,
    params(("type" = String, Path, description = "Cedar entity type"), ("id" = String, Path, description = "Its id")),
    responses((status = 200, body = Shown), (status = 400), (status = 422, description = "It would be its own ancestor")))]
async fn put_entity(
    Room(room): Room<Governance>,
    caller: Caller,
    Path(path): Path<(String, String)>,
    Json(body): Json<EntityBody>,
) -> Result<Answer<Shown>, Refusal> {
    let done = room.put_entity(&caller, named(path)?, body.attrs, body.parents).await?;
    Ok(Answer::ok(done.value).at(done.index).tagged(done.index))
}

/// Read an entity
#[utoipa::path(get, path = "/v1/governance/entities/{type}/{id}", tag = "governance",
    params(("type" = String, Path, description = "Cedar entity type"), ("id" = String, Path, description = "Its id")),
    responses((status = 200, body = Shown), (status = 404)))]
async fn get_entity(
    Room(room): Room<Governance>,
    caller: Caller,
    Path(path): Path<(String, String)>,
) -> Result<Answer<Shown>, Refusal> {
    let found = room.entity(&caller, named(path)?).await?;
    let tag = found.index;
    Ok(Answer::ok(found).tagged(tag))
}

/// Delete an entity
#[utoipa::path(delete, path = "/v1/governance/entities/{type}/{id}", tag = "governance",
    params(("type" = String, Path, description = "Cedar entity type"), ("id" = String, Path, description = "Its id")),
    responses((status = 200, body = Object), (status = 404)))]
async fn delete_entity(
    Room(room): Room<Governance>,
    caller: Caller,
    Path(path): Path<(String, String)>,
) -> Result<Answer<Value>, Refusal> {
    let done = room.delete_entity(&caller, named(path)?).await?;
    Ok(Answer::ok(json!({"index": done.index})).at(done.index))
}
