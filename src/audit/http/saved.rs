//! Saved searches.

use axum::extract::State as Room;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use crate::audit::Audit;
use crate::audit::model::Filter;
use crate::audit::saved::Saved;
use crate::kernel::web::{Answer, Caller, Json, Listing, Path, Query, page_limit};
use crate::kernel::{Refusal, ids};

use super::search::Known;

impl Saved {
    /// What it looks for.
    ///
    /// # Errors
    /// 400 with a pointer at what cannot be looked for.
    pub(in crate::audit) fn filter(&self) -> Result<Filter, Refusal> {
        let none = &None;
        Known {
            actor: &self.actor,
            room: &self.room,
            action: &self.action,
            resource: &self.resource,
            outcome: &self.outcome,
            text: &self.text,
            request_id: none,
            trace_id: none,
            since: none,
            until: none,
            at: "/",
        }
        .filter()
    }
}

/// A saved search with its name
#[derive(Serialize, utoipa::ToSchema)]
pub(super) struct Named {
    name: String,
    /// The index that put it
    index: i64,
    #[serde(flatten)]
    search: Saved,
}

fn named(name: &str) -> Result<(), Refusal> {
    let fault = if name.contains('/') { Some("a saved search has a name without `/`") } else { None };
    let fault = fault.map(str::to_owned).or_else(|| ids::name_fault(name).map(Into::into));
    fault.map_or(Ok(()), |fault| Err(Refusal::malformed("", fault)))
}

/// Save a search, with an alert on it if wanted
#[utoipa::path(put, path = "/v1/audit/searches/{name}", tag = "audit", request_body = Saved, params(("name" = String, Path, description = "Its name")),
    responses((status = 200, body = Named), (status = 201, body = Named, description = "It is new"), (status = 409, description = "There are too many")))]
pub(super) async fn put(
    Room(audit): Room<Audit>,
    caller: Caller,
    Path(name): Path<String>,
    Json(saved): Json<Saved>,
) -> Result<Answer<Named>, Refusal> {
    named(&name)?;
    saved.filter()?;
    if let Some(alert) = &saved.alert {
        if !(1.0..=86_400.0).contains(&alert.within) {
            return Err(Refusal::malformed("/alert/within", "within is from 1 to 86400 seconds"));
        }
        if alert.more_than > 100_000 {
            return Err(Refusal::malformed("/alert/more_than", "more_than is at most 100000"));
        }
    }
    let done = audit.save(&caller, name.clone(), &saved).await?;
    let shown = Named { name, index: done.index, search: saved };
    Ok(if done.value { Answer::created(shown) } else { Answer::ok(shown) }.at(done.index))
}

/// One saved search
#[utoipa::path(get, path = "/v1/audit/searches/{name}", tag = "audit", params(("name" = String, Path, description = "Its name")),
    responses((status = 200, body = Named), (status = 404)))]
pub(super) async fn read(
    Room(audit): Room<Audit>,
    caller: Caller,
    Path(name): Path<String>,
) -> Result<Answer<Named>, Refusal> {
    named(&name)?;
    let (search, index) = audit.saved(&caller, &name).await?;
    Ok(Answer::ok(Named { name, index, search }))
}

/// Forget a saved search
#[utoipa::path(delete, path = "/v1/audit/searches/{name}", tag = "audit", params(("name" = String, Path, description = "Its name")),
    responses((status = 204), (status = 404)))]
pub(super) async fn forget(
    Room(audit): Room<Audit>,
    caller: Caller,
    Path(name): Path<String>,
) -> Result<Response, Refusal> {
    named(&name)?;
    let done = audit.forget(&caller, name).await?;
    let index = [("sop-index", done.index.to_string())];
    Ok((StatusCode::NO_CONTENT, index).into_response())
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct PageQuery {
    /// 1-1000, default 100
    #[serde(default)]
    limit: Option<i64>,
    /// `next` of the page before
    #[serde(default)]
    after: Option<String>,
}

/// List saved searches
#[utoipa::path(get, path = "/v1/audit/searches", tag = "audit", params(PageQuery), responses((status = 200, body = Listing<Named>)))]
pub(super) async fn list(
    Room(audit): Room<Audit>,
    caller: Caller,
    Query(q): Query<PageQuery>,
) -> Result<Answer<Listing<Named>>, Refusal> {
    let after = q.after.unwrap_or_default();
    if after.contains('\0') {
        return Err(Refusal::malformed("?after", "after is `next` of the page before"));
    }
    let (found, next) = audit.all_saved(&caller, &after, page_limit(q.limit)?).await?;
    let items = found.into_iter().map(|(name, search, index)| Named { name, index, search }).collect();
    Ok(Answer::ok(Listing { items, next }))
}
