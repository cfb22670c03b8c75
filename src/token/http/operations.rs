//! The routes of operation tokens.

use axum::extract::State as Room;
use serde::{Deserialize, Serialize};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::kernel::Refusal;
use crate::kernel::web::{Answer, Caller, Json, Listing, Path, Query, cursor, page_limit};
use crate::token::Token;
use crate::token::model::Operation;
use crate::token::operations::Used;
use crate::token::wanted::{Batch, Wanted};

pub(super) fn routes() -> OpenApiRouter<Token> {
    OpenApiRouter::new()
        .routes(routes!(issue_operation, list_operations))
        .routes(routes!(issue_operations))
        .routes(routes!(use_operation))
        .routes(routes!(read_operation, revoke_operation))
        .routes(routes!(complete_operation))
}

/// Issue an operation token
#[utoipa::path(post, path = "/v1/token/operations", tag = "token", request_body = Wanted, responses((status = 201, body = Operation), (status = 400), (status = 403)))]
async fn issue_operation(
    Room(room): Room<Token>,
    caller: Caller,
    Json(wanted): Json<Wanted>,
) -> Result<Answer<Operation>, Refusal> {
    let todo = wanted.todo.clone();
    let token = wanted.token(caller.actor(), room.clock.now())?;
    let mut done = room.issue_operations(&caller, vec![token], todo).await?;
    let issued = done.value.pop().ok_or_else(|| Refusal::internal("nothing was issued"))?;
    Ok(Answer::created(issued).at(done.index))
}

/// Operation tokens that were issued together
#[derive(Serialize, utoipa::ToSchema)]
#[schema(as = IssuedBatch)]
struct IssuedBatch {
    /// In the order they were asked for
    items: Vec<Operation>,
}

/// Issue several operation tokens, all or none; one entry names them
#[utoipa::path(post, path = "/v1/token/operations/batch", tag = "token", request_body = Batch, responses((status = 201, body = IssuedBatch), (status = 400), (status = 403)))]
async fn issue_operations(
    Room(room): Room<Token>,
    caller: Caller,
    Json(batch): Json<Batch>,
) -> Result<Answer<IssuedBatch>, Refusal> {
    let todo = batch.todo.clone();
    let tokens = batch.tokens(caller.actor(), room.clock.now())?;
    let done = room.issue_operations(&caller, tokens, todo).await?;
    Ok(Answer::created(IssuedBatch { items: done.value }).at(done.index))
}

#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::token) struct UseBody {
    /// The token
    pub token: String,
    /// What it is used for
    pub operation: String,
    /// On what
    #[serde(default)]
    pub resource: Option<String>,
}

/// Use an operation token
#[utoipa::path(post, path = "/v1/token/operations/use", tag = "token", request_body = UseBody,
    responses((status = 200, body = Used), (status = 403, description = "Another operation, resource or audience"), (status = 404), (status = 409, description = "All uses are spent"), (status = 410, description = "Expired, completed or revoked")))]
async fn use_operation(
    Room(room): Room<Token>,
    caller: Caller,
    Json(body): Json<UseBody>,
) -> Result<Answer<Used>, Refusal> {
    let done = room.use_operation(&caller, &body.token, body.operation, body.resource).await?;
    Ok(Answer::ok(done.value).at(done.index))
}

fn whole(id: &str) -> Result<Uuid, Refusal> {
    id.parse().map_err(|_| Refusal::not_found("such operation token"))
}

/// Read an operation token, without its secret
#[utoipa::path(get, path = "/v1/token/operations/{id}", tag = "token", params(("id" = String, Path, description = "Its id")), responses((status = 200, body = Operation), (status = 404)))]
async fn read_operation(
    Room(room): Room<Token>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Answer<Operation>, Refusal> {
    Ok(Answer::ok(room.operation(&caller, whole(&id)?).await?))
}

/// Revoke an operation token
#[utoipa::path(delete, path = "/v1/token/operations/{id}", tag = "token", params(("id" = String, Path, description = "Its id")), responses((status = 200, body = Operation), (status = 404), (status = 410)))]
async fn revoke_operation(
    Room(room): Room<Token>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Answer<Operation>, Refusal> {
    let done = room.end_operation(&caller, whole(&id)?, false).await?;
    Ok(Answer::ok(done.value).at(done.index))
}

/// Complete an operation token
#[utoipa::path(post, path = "/v1/token/operations/{id}/complete", tag = "token", params(("id" = String, Path, description = "Its id")), responses((status = 200, body = Operation), (status = 404), (status = 410)))]
async fn complete_operation(
    Room(room): Room<Token>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Answer<Operation>, Refusal> {
    let done = room.end_operation(&caller, whole(&id)?, true).await?;
    Ok(Answer::ok(done.value).at(done.index))
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
    /// The id of a todo's token: only those of its steps
    #[serde(default)]
    todo: Option<String>,
}

/// List operation tokens, oldest first
#[utoipa::path(get, path = "/v1/token/operations", tag = "token", params(ListQuery), responses((status = 200, body = Listing<Operation>)))]
async fn list_operations(
    Room(room): Room<Token>,
    caller: Caller,
    Query(q): Query<ListQuery>,
) -> Result<Answer<Listing<Operation>>, Refusal> {
    let limit = page_limit(q.limit)?;
    let after = q.after.as_deref().map(cursor::decode::<Uuid>).transpose()?;
    let todo = q.todo.as_deref().map(|id| id.parse().map_err(|_| Refusal::malformed("?todo", "todo is an id")));
    let mut items = room.operations(&caller, todo.transpose()?, after, limit).await?;
    let more = items.len() > limit;
    items.truncate(limit);
    let next = items.last().filter(|_| more).map(|o| cursor::encode(&o.id));
    Ok(Answer::ok(Listing { items, next }))
}
