//! The room's routes.

use axum::extract::State as Room;
use serde::Deserialize;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::kernel::Refusal;
use crate::kernel::web::{Answer, Caller, Json, Listing, Name, Path, Query, page_limit};

use super::Health;
use super::incidents::Word;
use super::model::{Check, Incident, Overall, Report, Severity, Spec, Stage, Status};

/// The routes of the room.
pub fn routes(health: Health) -> OpenApiRouter {
    OpenApiRouter::new()
        .routes(routes!(list_checks))
        .routes(routes!(put_check, read_check, delete_check))
        .routes(routes!(report))
        .routes(routes!(read_service))
        .routes(routes!(list_incidents))
        .routes(routes!(read_incident))
        .routes(routes!(acknowledge))
        .routes(routes!(resolve))
        .routes(routes!(comment))
        .with_state(health)
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ChecksQuery {
    /// Only those that are so
    #[serde(default)]
    status: Option<Status>,
    /// Only those of this service
    #[serde(default)]
    service: Option<String>,
    /// 1-1000, default 100
    #[serde(default)]
    limit: Option<i64>,
    /// `next` of the page before
    #[serde(default)]
    after: Option<String>,
}

/// List checks
#[utoipa::path(get, path = "/v1/health/checks", tag = "health", params(ChecksQuery), responses((status = 200, body = Listing<Check>)))]
async fn list_checks(
    Room(health): Room<Health>,
    caller: Caller,
    Query(q): Query<ChecksQuery>,
) -> Result<Answer<Listing<Check>>, Refusal> {
    let limit = page_limit(q.limit)?;
    let (items, next) = health.list(&caller, q.status, q.service.as_deref(), q.after.as_deref(), limit).await?;
    Ok(Answer::ok(Listing { items, next }))
}

/// Make a check, or change it
#[utoipa::path(put, path = "/v1/health/checks/{name}", tag = "health", request_body = Spec, params(("name" = String, Path, description = "The check")),
    responses((status = 200, body = Check), (status = 201, body = Check, description = "It is new")))]
async fn put_check(
    Room(health): Room<Health>,
    caller: Caller,
    Name(name): Name,
    Json(spec): Json<Spec>,
) -> Result<Answer<Check>, Refusal> {
    let done = health.put(&caller, name, spec).await?;
    let check = done.value.check;
    Ok(if done.value.new { Answer::created(check) } else { Answer::ok(check) }.at(done.index))
}

/// Read a check
#[utoipa::path(get, path = "/v1/health/checks/{name}", tag = "health", params(("name" = String, Path, description = "The check")), responses((status = 200, body = Check), (status = 404)))]
async fn read_check(Room(health): Room<Health>, caller: Caller, Name(name): Name) -> Result<Answer<Check>, Refusal> {
    Ok(Answer::ok(health.read(&caller, &name).await?))
}

/// Remove a check; its incident is over with it
#[utoipa::path(delete, path = "/v1/health/checks/{name}", tag = "health", params(("name" = String, Path, description = "The check")), responses((status = 200, body = Check), (status = 404)))]
async fn delete_check(Room(health): Room<Health>, caller: Caller, Name(name): Name) -> Result<Answer<Check>, Refusal> {
    let done = health.remove(&caller, name).await?;
    Ok(Answer::ok(done.value).at(done.index))
}

/// Report how a ttl check is
#[utoipa::path(post, path = "/v1/health/checks/{name}/report", tag = "health", request_body = Report, params(("name" = String, Path, description = "The check")),
    responses((status = 200, body = Check), (status = 404), (status = 409, description = "It is not a ttl check")))]
async fn report(
    Room(health): Room<Health>,
    caller: Caller,
    Name(name): Name,
    Json(body): Json<Report>,
) -> Result<Answer<Check>, Refusal> {
    if body.output.as_ref().is_some_and(|o| o.len() > 4096) {
        return Err(Refusal::malformed("/output", "output is at most 4096 bytes"));
    }
    let (index, check) = health.report(&caller, name, body).await?;
    Ok(Answer::ok(check).at(index))
}

/// Read how a service is: its checks and instances, and why it is so
#[utoipa::path(get, path = "/v1/health/services/{name}", tag = "health", params(("name" = String, Path, description = "The service")), responses((status = 200, body = Overall), (status = 404)))]
async fn read_service(
    Room(health): Room<Health>,
    caller: Caller,
    Name(name): Name,
) -> Result<Answer<Overall>, Refusal> {
    Ok(Answer::ok(health.service(&caller, &name).await?))
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct IncidentsQuery {
    /// Only those that are so
    #[serde(default)]
    status: Option<Stage>,
    /// Only those that are as bad
    #[serde(default)]
    severity: Option<Severity>,
    /// 1-1000, default 100
    #[serde(default)]
    limit: Option<i64>,
    /// `next` of the page before
    #[serde(default)]
    after: Option<String>,
}

/// List incidents, newest first
#[utoipa::path(get, path = "/v1/health/incidents", tag = "health", params(IncidentsQuery), responses((status = 200, body = Listing<Incident>)))]
async fn list_incidents(
    Room(health): Room<Health>,
    caller: Caller,
    Query(q): Query<IncidentsQuery>,
) -> Result<Answer<Listing<Incident>>, Refusal> {
    let limit = page_limit(q.limit)?;
    let status = q.status.map(|s| match s {
        Stage::Open => "open",
        Stage::Acknowledged => "acknowledged",
        Stage::Resolved => "resolved",
    });
    let severity = q.severity.map(Severity::as_str);
    let (items, next) = health.incidents(&caller, status, severity, q.after.as_deref(), limit).await?;
    Ok(Answer::ok(Listing { items, next }))
}

fn whole(id: &str) -> Result<Uuid, Refusal> {
    id.parse().map_err(|_| Refusal::not_found("such incident"))
}

/// Read an incident, with what happened to it
#[utoipa::path(get, path = "/v1/health/incidents/{id}", tag = "health", params(("id" = String, Path, description = "Its id")), responses((status = 200, body = Incident), (status = 404)))]
async fn read_incident(
    Room(health): Room<Health>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Answer<Incident>, Refusal> {
    Ok(Answer::ok(health.incident(&caller, whole(&id)?).await?))
}

#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Note {
    /// In words
    #[serde(default)]
    note: Option<String>,
}

async fn said(health: &Health, caller: &Caller, id: &str, body: Note, word: Word) -> Result<Answer<Incident>, Refusal> {
    let note = body.note.unwrap_or_default();
    if note.len() > 16_384 {
        return Err(Refusal::malformed("/note", "note is at most 16384 bytes"));
    }
    if word == Word::Comment && note.is_empty() {
        return Err(Refusal::malformed("/note", "a comment says something"));
    }
    let done = health.say(caller, whole(id)?, word, note).await?;
    Ok(Answer::ok(done.value).at(done.index))
}

/// Say that somebody is at an incident
#[utoipa::path(post, path = "/v1/health/incidents/{id}/acknowledge", tag = "health", request_body = Note, params(("id" = String, Path, description = "Its id")),
    responses((status = 200, body = Incident), (status = 404), (status = 409, description = "It is resolved")))]
async fn acknowledge(
    Room(health): Room<Health>,
    caller: Caller,
    Path(id): Path<String>,
    Json(body): Json<Note>,
) -> Result<Answer<Incident>, Refusal> {
    said(&health, &caller, &id, body, Word::Acknowledge).await
}

/// Say that an incident is over
#[utoipa::path(post, path = "/v1/health/incidents/{id}/resolve", tag = "health", request_body = Note, params(("id" = String, Path, description = "Its id")),
    responses((status = 200, body = Incident), (status = 404), (status = 409, description = "It is resolved")))]
async fn resolve(
    Room(health): Room<Health>,
    caller: Caller,
    Path(id): Path<String>,
    Json(body): Json<Note>,
) -> Result<Answer<Incident>, Refusal> {
    said(&health, &caller, &id, body, Word::Resolve).await
}

/// Note something about an incident
#[utoipa::path(post, path = "/v1/health/incidents/{id}/comment", tag = "health", request_body = Note, params(("id" = String, Path, description = "Its id")),
    responses((status = 200, body = Incident), (status = 404)))]
async fn comment(
    Room(health): Room<Health>,
    caller: Caller,
    Path(id): Path<String>,
    Json(body): Json<Note>,
) -> Result<Answer<Incident>, Refusal> {
    said(&health, &caller, &id, body, Word::Comment).await
}
