//! The routes of signing keys.

use axum::extract::State as Room;
use serde::Deserialize;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::kernel::Refusal;
use crate::kernel::web::{Answer, Caller, Listing, Query};
use crate::token::Token;
use crate::token::keys::{Rotated, Shown};

pub(super) fn routes() -> OpenApiRouter<Token> {
    OpenApiRouter::new().routes(routes!(rotate_keys)).routes(routes!(list_keys))
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
struct Rotation {
    /// The old keys may be known to others: the new ones sign at once, and what the old ones signed is refused from the next request on
    #[serde(default)]
    immediately: bool,
}

/// Replace the signing keys: announced in the JWKS now, signing from `active_at` on; the old ones stay there until the last token
/// they signed has ended
#[utoipa::path(post, path = "/v1/token/signing-keys/rotate", tag = "token", params(Rotation),
    responses((status = 201, body = Rotated), (status = 403)))]
async fn rotate_keys(
    Room(room): Room<Token>,
    caller: Caller,
    Query(how): Query<Rotation>,
) -> Result<Answer<Rotated>, Refusal> {
    let done = room.rotate_keys(&caller, how.immediately).await?;
    Ok(Answer::created(done.value).at(done.index))
}

/// List the signing keys, the newest first
#[utoipa::path(get, path = "/v1/token/signing-keys", tag = "token", responses((status = 200, body = Listing<Shown>)))]
async fn list_keys(Room(room): Room<Token>, caller: Caller) -> Result<Answer<Listing<Shown>>, Refusal> {
    Ok(Answer::ok(Listing { items: room.signing_keys(&caller).await?, next: None }))
}
