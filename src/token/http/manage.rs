//! The routes by which operators look after clients: see them, disable them, end their tokens.

use std::sync::atomic::Ordering;

use axum::extract::State as Room;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::kernel::web::{Answer, Ask, Caller, Json, Listing, Path, Query, cursor, page_limit};
use crate::kernel::{Refusal, Timestamp, ids};
use crate::token::Token;
use crate::token::ending::{Ended, Wanted};
use crate::token::lockout::Locked;
use crate::token::model::{AgentType, AuthMethod};
use crate::token::store::{self, Registered};

use super::at;

pub(super) fn routes() -> OpenApiRouter<Token> {
    OpenApiRouter::new()
        .routes(routes!(list_clients))
        .routes(routes!(show_client))
        .routes(routes!(disable))
        .routes(routes!(enable))
        .routes(routes!(end_tokens))
        .routes(routes!(list_lockouts))
        .routes(routes!(release))
}

/// A client as operators see it
#[derive(Serialize, utoipa::ToSchema)]
#[schema(as = RegisteredClient)]
struct Shown {
    client_id: String,
    client_name: String,
    /// `system`, `user`, `external` or `cognitive`
    agent_type: AgentType,
    /// What it may ask for, separated by spaces
    scope: String,
    grant_types: Vec<String>,
    #[schema(value_type = String)]
    token_endpoint_auth_method: AuthMethod,
    /// It gets no tokens, and has none
    disabled: bool,
    #[schema(value_type = String)]
    registered_at: Timestamp,
    /// When it last proved itself or showed a token, on any daemon, to a few seconds
    #[schema(value_type = Option<String>)]
    last_used_at: Option<Timestamp>,
    /// Index of the last change of its registration
    index: i64,
}

impl Shown {
    fn of(r: Registered, kept: Option<Timestamp>, room: &Token) -> Self {
        let here = room.snapshot.client(&r.client.client_id).map(|r| r.used.load(Ordering::Relaxed));
        let here = here.filter(|ms| *ms > 0).map(Timestamp::from_millis);
        Self {
            scope: r.client.scope(),
            client_id: r.client.client_id,
            client_name: r.client.client_name,
            agent_type: r.client.agent_type,
            grant_types: r.client.grant_types,
            token_endpoint_auth_method: r.client.auth_method,
            disabled: r.disabled,
            registered_at: r.client.issued,
            last_used_at: here.max(kept),
            index: r.index,
        }
    }
}

/// What cannot be an id names no client.
fn named(id: &str) -> Result<(), Refusal> {
    ids::id_fault(id).map_or(Ok(()), |_| Err(Refusal::not_found("such client")))
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Page {
    /// 1-1000, default 100
    #[serde(default)]
    limit: Option<i64>,
    /// `next` of the page before
    #[serde(default)]
    after: Option<String>,
}

/// List clients, in order of their id
#[utoipa::path(get, path = "/v1/token/clients", tag = "token", params(Page), responses((status = 200, body = Listing<Shown>)))]
async fn list_clients(
    Room(room): Room<Token>,
    caller: Caller,
    Query(q): Query<Page>,
) -> Result<Answer<Listing<Shown>>, Refusal> {
    room.ledger.permit(&caller, &[Ask::new("token:client-read", "Client", "")]).await?;
    let limit = page_limit(q.limit)?;
    let after = q.after.as_deref().map(cursor::decode::<String>).transpose()?.unwrap_or_default();
    let take = i64::try_from(limit).unwrap_or(1000) + 1;
    let found = store::list_clients(&mut *room.reader().await?, &after, take).await;
    let mut items: Vec<Shown> =
        found.map_err(|e| room.store.refusal(e))?.into_iter().map(|(r, seen)| Shown::of(r, seen, &room)).collect();
    let more = items.len() > limit;
    items.truncate(limit);
    let next = items.last().filter(|_| more).map(|c| cursor::encode(&c.client_id));
    Ok(Answer::ok(Listing { items, next }))
}

/// Read a client
#[utoipa::path(get, path = "/v1/token/clients/{client_id}", tag = "token", params(("client_id" = String, Path, description = "The client")),
    responses((status = 200, body = Shown), (status = 404)))]
async fn show_client(
    Room(room): Room<Token>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Answer<Shown>, Refusal> {
    room.ledger.permit(&caller, &[Token::about("token:client-read", &id)]).await?;
    named(&id)?;
    let found = store::one_client(&mut *room.reader().await?, &id).await.map_err(|e| room.store.refusal(e))?;
    let (registered, seen) = found.ok_or_else(|| Refusal::not_found("such client"))?;
    Ok(Answer::ok(Shown::of(registered, seen, &room)))
}

#[derive(Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ClientChange)]
struct Why {
    /// Why; kept in the record
    #[serde(default)]
    reason: Option<String>,
}

async fn set(room: &Token, caller: &Caller, id: String, disabled: bool, why: Why) -> Result<Response, Refusal> {
    named(&id)?;
    let done = room.set_disabled(caller, id, disabled, why.reason).await?;
    Ok(at(StatusCode::NO_CONTENT.into_response(), done.index))
}

/// Disable a client: it gets no tokens, and those it has end now
#[utoipa::path(post, path = "/v1/token/clients/{client_id}/disable", tag = "token", params(("client_id" = String, Path, description = "The client")), request_body = Why,
    responses((status = 204), (status = 403), (status = 404), (status = 409, description = "It is disabled already")))]
async fn disable(
    Room(room): Room<Token>,
    caller: Caller,
    Path(id): Path<String>,
    Json(why): Json<Why>,
) -> Result<Response, Refusal> {
    set(&room, &caller, id, true, why).await
}

/// Enable a client again; the tokens it had stay ended
#[utoipa::path(post, path = "/v1/token/clients/{client_id}/enable", tag = "token", params(("client_id" = String, Path, description = "The client")), request_body = Why,
    responses((status = 204), (status = 403), (status = 404), (status = 409, description = "It is enabled already")))]
async fn enable(
    Room(room): Room<Token>,
    caller: Caller,
    Path(id): Path<String>,
    Json(why): Json<Why>,
) -> Result<Response, Refusal> {
    set(&room, &caller, id, false, why).await
}

/// End tokens before their time: one, a family, or all of a client
#[utoipa::path(post, path = "/v1/token/revocations", tag = "token", request_body = Wanted,
    responses((status = 201, body = Ended), (status = 400), (status = 403), (status = 404), (status = 409, description = "It was ended before")))]
async fn end_tokens(
    Room(room): Room<Token>,
    caller: Caller,
    Json(wanted): Json<Wanted>,
) -> Result<Answer<Ended>, Refusal> {
    let done = room.end(&caller, wanted).await?;
    Ok(Answer::created(done.value).at(done.index))
}

/// List clients that are locked out after too many failures to prove who they are
#[utoipa::path(get, path = "/v1/token/lockouts", tag = "token", responses((status = 200, body = Listing<Locked>)))]
async fn list_lockouts(Room(room): Room<Token>, caller: Caller) -> Result<Answer<Listing<Locked>>, Refusal> {
    Ok(Answer::ok(Listing { items: room.lockouts(&caller).await?, next: None }))
}

/// Let a client in again before its time
#[utoipa::path(delete, path = "/v1/token/lockouts/{client_id}", tag = "token", params(("client_id" = String, Path, description = "The client")),
    responses((status = 204), (status = 403), (status = 404)))]
async fn release(Room(room): Room<Token>, caller: Caller, Path(id): Path<String>) -> Result<Response, Refusal> {
    let done = room.release(&caller, id).await?;
    Ok(at(StatusCode::NO_CONTENT.into_response(), done.index))
}
