//! The routes of transactions and of compaction.

use axum::extract::State as Room;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::kernel::Refusal;
use crate::kernel::web::{Answer, Caller, Json};

use crate::state::State;
use crate::state::compaction::Compacted;
use crate::state::txn::{Answered, Request};

pub(super) fn routes() -> OpenApiRouter<State> {
    OpenApiRouter::new().routes(routes!(txn)).routes(routes!(compact))
}

/// Compare keys, then do one of two lists of operations: all at one index, or nothing
#[utoipa::path(post, path = "/v1/state/txn", tag = "state", request_body = Request,
    responses((status = 200, body = Answered), (status = 422, description = "The gets would give more than 4 MiB")))]
async fn txn(
    Room(state): Room<State>,
    caller: Caller,
    Json(request): Json<Request>,
) -> Result<Answer<Answered>, Refusal> {
    let (index, answered) = Box::pin(state.txn(&caller, request.check()?)).await?;
    Ok(Answer::ok(answered).at(index))
}

/// Up to where history is given up
#[derive(serde::Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Compact)]
struct CompactRequest {
    /// The first index that can be read as of
    before: i64,
}

/// Give up history before an index: reads and watches from before it are answered 410
#[utoipa::path(post, path = "/v1/state/compact", tag = "state", request_body = CompactRequest,
    responses((status = 200, body = Compacted), (status = 409, description = "It was compacted as far, or further")))]
async fn compact(
    Room(state): Room<State>,
    caller: Caller,
    Json(request): Json<CompactRequest>,
) -> Result<Answer<Compacted>, Refusal> {
    if request.before < 0 {
        return Err(Refusal::malformed("/before", "before is an index, from 0"));
    }
    let done = state.compact(&caller, request.before).await?;
    Ok(Answer::ok(done.value).at(done.index))
}
