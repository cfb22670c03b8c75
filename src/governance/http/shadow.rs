//! Bundles in shadow, over HTTP.

use axum::extract::State as Room;
use serde::{Deserialize, Serialize};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::bundles::id_of;
use crate::governance::Governance;
use crate::governance::replay::Flip;
use crate::governance::shadow::Trial;
use crate::kernel::Refusal;
use crate::kernel::web::{Answer, Caller, JsonOr, Path, Query, cursor, page_limit};

pub(super) fn routes() -> OpenApiRouter<Governance> {
    OpenApiRouter::new().routes(routes!(set, read))
}

const fn yes() -> bool {
    true
}

#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ShadowRequest)]
struct Wanted {
    /// `false` ends it
    #[serde(default = "yes")]
    on: bool,
}

impl Default for Wanted {
    fn default() -> Self {
        Self { on: true }
    }
}

/// Try a bundle beside what is in force: what is recorded from here on is decided again by it, and no answer changes
#[utoipa::path(post, path = "/v1/governance/bundles/{id}/shadow", tag = "governance", request_body = Wanted,
    params(("id" = String, Path, description = "The bundle")),
    responses((status = 200, body = Trial), (status = 404), (status = 409, description = "It is in shadow, a canary or in force; or too many are in shadow")))]
async fn set(
    Room(room): Room<Governance>,
    caller: Caller,
    Path(id): Path<String>,
    JsonOr(wanted): JsonOr<Wanted>,
) -> Result<Answer<Trial>, Refusal> {
    let done = room.set_shadow(&caller, &id_of(id)?, wanted.on).await?;
    Ok(Answer::ok(done.value).at(done.index))
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Page {
    /// Differences listed
    #[serde(default)]
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<i64>,
    /// `next` of the page before
    #[serde(default)]
    after: Option<String>,
}

/// A trial, and what would have been decided otherwise
#[derive(Serialize, utoipa::ToSchema)]
#[schema(as = ShadowFound)]
struct Found {
    #[serde(flatten)]
    trial: Trial,
    /// The differences, oldest first; at most the first 10,000 are listed, all are counted
    flips: Vec<Flip>,
    /// Where to go on; `null` at the end of what there is
    next: Option<String>,
}

/// What a bundle in shadow would have decided otherwise
#[utoipa::path(get, path = "/v1/governance/bundles/{id}/shadow", tag = "governance",
    params(("id" = String, Path, description = "The bundle"), Page), responses((status = 200, body = Found), (status = 404)))]
async fn read(
    Room(room): Room<Governance>,
    caller: Caller,
    Path(id): Path<String>,
    Query(page): Query<Page>,
) -> Result<Answer<Found>, Refusal> {
    let after = page.after.as_deref().map(cursor::decode::<(i64, i64)>).transpose()?.unwrap_or((-1, -1));
    let limit = page_limit(page.limit)?;
    let (trial, mut flips) = room.shadow(&caller, &id_of(id)?, after, limit + 1).await?;
    let more = flips.len() > limit;
    flips.truncate(limit);
    let next = flips.last().filter(|_| more).map(|f| cursor::encode(&(f.index, f.position)));
    Ok(Answer::ok(Found { trial, flips, next }))
}
