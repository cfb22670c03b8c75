//! The route of transactions.

use axum::extract::State as Room;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::kernel::Refusal;
use crate::kernel::web::{Answer, Caller, Json};

use crate::state::State;
use crate::state::txn::{Answered, Request};

pub(super) fn routes() -> OpenApiRouter<State> {
    OpenApiRouter::new().routes(routes!(txn))
}

/// Compare keys, then do one of two lists of operations: all at one index, or nothing
#[utoipa::path(post, path = "/v1/state/txn", tag = "state", request_body = Request,
    responses((status = 200, body = Answered), (status = 422, description = "The gets would give more than 4 MiB")))]
async fn txn(
    Room(state): Room<State>,
    caller: Caller,
    Json(request): Json<Request>,
) -> Result<Answer<Answered>, Refusal> {
    let (index, answered) = state.txn(&caller, request.check()?).await?;
    Ok(Answer::ok(answered).at(index))
}
