//! The log's keys.

use axum::extract::State as Room;
use serde::Deserialize;

use crate::audit::Audit;
use crate::audit::keys::Shown;
use crate::kernel::Refusal;
use crate::kernel::web::{Answer, Caller, Json, Listing};

#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = LogKeyRotation)]
pub(super) struct Rotation {
    /// Seconds for which the old key signs beside the new one, at most a year; a week if not given
    #[serde(default)]
    overlap: Option<f64>,
}

/// Replace the log's key. Notes carry the signatures of both until `until` of the old one; what it signed holds for good
#[utoipa::path(post, path = "/v1/audit/log-keys/rotate", tag = "audit", request_body = Rotation,
    responses((status = 201, body = Listing<Shown>), (status = 403)))]
pub(super) async fn rotate(
    Room(audit): Room<Audit>,
    caller: Caller,
    Json(body): Json<Rotation>,
) -> Result<Answer<Listing<Shown>>, Refusal> {
    let overlap = body.overlap.unwrap_or(604_800.0);
    if !(0.0..=31_536_000.0).contains(&overlap) {
        return Err(Refusal::malformed("/overlap", "overlap is from 0 to 31536000 seconds"));
    }
    let done = audit.rotate_key(&caller, (overlap * 1000.0) as i64).await?;
    Ok(Answer::created(Listing { items: done.value, next: None }).at(done.index))
}

/// List the log's keys, the newest first
#[utoipa::path(get, path = "/v1/audit/log-keys", tag = "audit", responses((status = 200, body = Listing<Shown>)))]
pub(super) async fn list(Room(audit): Room<Audit>, caller: Caller) -> Result<Answer<Listing<Shown>>, Refusal> {
    Ok(Answer::ok(Listing { items: audit.log_keys(&caller).await?, next: None }))
}
