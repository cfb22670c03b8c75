//! The routes of registrations (RFC 7591, RFC 7592).

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::extract::State as Room;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::json;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::kernel::web::{Caller, Json, Path, RequestInfo};
use crate::kernel::{Refusal, crypto, ids, problem};
use crate::token::Token;
use crate::token::clients::{self, Delete, Issued, Metadata, Register, Replace, Replaced, Update, Why};
use crate::token::form::OAuthError;
use crate::token::model::{AuthMethod, Client, entity};

use super::{at, base, private};

pub(super) fn routes() -> OpenApiRouter<Token> {
    OpenApiRouter::new()
        .routes(routes!(register))
        .routes(routes!(read_client, update_client, delete_client))
        .routes(routes!(rotate_secret))
}

/// Register a client (RFC 7591); needs a bearer whose policy allows it
#[utoipa::path(post, path = "/oauth2/register", tag = "oauth", request_body = Metadata,
    responses((status = 201, body = Object), (status = 400, description = "invalid_client_metadata"), (status = 401), (status = 403)))]
async fn register(
    Room(room): Room<Token>,
    caller: Caller,
    headers: HeaderMap,
    Json(wanted): Json<Metadata>,
) -> Result<Response, OAuthError> {
    let client = wanted.client(ids::new_id(room.clock.now()).to_string(), &room)?;
    let secret = (client.auth_method != AuthMethod::PrivateKeyJwt).then(clients::secret).transpose()?;
    let issued = Issued { client, secret, registration: clients::secret()? };
    let ask = Token::about("token:register", "new");
    let done = room.ledger.write(&caller, &[ask], Register { issued, why: Why::Asked }).await?;
    let issued = done.value;
    let mut shown = clients::shown(&issued.client, &base(&headers, &room));
    shown["registration_access_token"] = issued.registration.into();
    if let Some(secret) = issued.secret {
        shown["client_secret"] = secret.into();
        shown["client_secret_expires_at"] = json!(0);
    }
    Ok(at(private(StatusCode::CREATED, &shown), done.index))
}

/// Who manages a registration: the holder of its registration access token, or a bearer whose policy allows it.
async fn manager(
    room: &Token,
    caller: Option<Extension<Caller>>,
    headers: &HeaderMap,
    info: Arc<RequestInfo>,
    id: &str,
    action: &'static str,
) -> Result<(Caller, Client), OAuthError> {
    room.ledger.fence().await?;
    let found = room.snapshot.client(id);
    if let Some(Extension(caller)) = caller {
        room.ledger.permit(&caller, &[Token::about(action, id)]).await?;
        let client = found.ok_or_else(|| Refusal::not_found("such client"))?.client.clone();
        return Ok((caller, client));
    }
    let shown =
        headers.get(header::AUTHORIZATION).and_then(|a| a.to_str().ok()?.strip_prefix("Bearer ")).unwrap_or_default();
    let kept = found.as_ref().map_or_else(|| vec![0; 32], |r| r.registration.clone());
    let good = crypto::same(&kept, &crypto::sha256(shown.as_bytes()));
    match found.filter(|r| good && !r.disabled) {
        Some(r) => Ok((Caller::vouched(entity(id), info), r.client.clone())),
        None => Err(Refusal::new(
            &problem::UNAUTHENTICATED,
            "this needs the registration access token of the client, or a bearer that may",
        )
        .into()),
    }
}

/// Read a registration (RFC 7592)
#[utoipa::path(get, path = "/oauth2/register/{client_id}", tag = "oauth", params(("client_id" = String, Path, description = "The client")),
    responses((status = 200, body = Object), (status = 401), (status = 403), (status = 404)))]
async fn read_client(
    Room(room): Room<Token>,
    caller: Option<Extension<Caller>>,
    Extension(info): Extension<Arc<RequestInfo>>,
    headers: HeaderMap,
    Path(id): Path<String>,
) -> Result<Response, OAuthError> {
    let (_, client) = manager(&room, caller, &headers, info, &id, "token:client-read").await?;
    Ok(private(StatusCode::OK, &clients::shown(&client, &base(&headers, &room))))
}

/// Replace a registration (RFC 7592)
#[utoipa::path(put, path = "/oauth2/register/{client_id}", tag = "oauth", params(("client_id" = String, Path, description = "The client")), request_body = Metadata,
    responses((status = 200, body = Object), (status = 400), (status = 401), (status = 403), (status = 404)))]
async fn update_client(
    Room(room): Room<Token>,
    caller: Option<Extension<Caller>>,
    Extension(info): Extension<Arc<RequestInfo>>,
    headers: HeaderMap,
    Path(id): Path<String>,
    Json(wanted): Json<Metadata>,
) -> Result<Response, OAuthError> {
    let own = caller.is_none();
    let (caller, was) = manager(&room, caller, &headers, info, &id, "token:client-update").await?;
    let client = wanted.client(id.clone(), &room)?;
    if own && client.gains(&was) {
        return Err(OAuthError::new(
            "invalid_client_metadata",
            "a client cannot give itself scopes, grants, audiences or another type; whoever may register clients can",
        ));
    }
    if (client.auth_method == AuthMethod::PrivateKeyJwt) != (was.auth_method == AuthMethod::PrivateKeyJwt) {
        return Err(OAuthError::new(
            "invalid_client_metadata",
            "a client with a secret stays one, and one with keys too; register anew",
        ));
    }
    let ask = Token::about("token:client-update", &id);
    let done = room.ledger.write(&caller, &[ask], Update { client }).await?;
    Ok(at(private(StatusCode::OK, &clients::shown(&done.value, &base(&headers, &room))), done.index))
}

/// Delete a client; its tokens end at once (RFC 7592)
#[utoipa::path(delete, path = "/oauth2/register/{client_id}", tag = "oauth", params(("client_id" = String, Path, description = "The client")),
    responses((status = 204), (status = 401), (status = 403), (status = 404)))]
async fn delete_client(
    Room(room): Room<Token>,
    caller: Option<Extension<Caller>>,
    Extension(info): Extension<Arc<RequestInfo>>,
    headers: HeaderMap,
    Path(id): Path<String>,
) -> Result<Response, OAuthError> {
    let (caller, _) = manager(&room, caller, &headers, info, &id, "token:client-delete").await?;
    let ask = Token::about("token:client-delete", &id);
    let done = room.ledger.write(&caller, &[ask], Delete { client_id: id }).await?;
    Ok(at(StatusCode::NO_CONTENT.into_response(), done.index))
}

#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ClientSecretRotation)]
struct SecretRotation {
    /// Seconds for which the secret before still counts, at most 30 days; a day if not given
    #[serde(default)]
    overlap: Option<f64>,
}

/// Replace a client's secret; the one before counts until `previous_expires_at`
#[utoipa::path(post, path = "/oauth2/register/{client_id}/secret", tag = "oauth", params(("client_id" = String, Path, description = "The client")), request_body = SecretRotation,
    responses((status = 201, body = Replaced), (status = 400), (status = 401), (status = 403), (status = 404), (status = 409, description = "It has no secret")))]
async fn rotate_secret(
    Room(room): Room<Token>,
    caller: Option<Extension<Caller>>,
    Extension(info): Extension<Arc<RequestInfo>>,
    headers: HeaderMap,
    Path(id): Path<String>,
    Json(body): Json<SecretRotation>,
) -> Result<Response, OAuthError> {
    let action = "token:secret-rotate";
    let (caller, _) = manager(&room, caller, &headers, info, &id, action).await?;
    let overlap = body.overlap.unwrap_or(86_400.0);
    if !(0.0..=2_592_000.0).contains(&overlap) {
        return Err(OAuthError::new("invalid_request", "overlap is from 0 to 2592000 seconds"));
    }
    let ask = Token::about(action, &id);
    let replace = Replace { client_id: id, secret: clients::secret()?, overlap: Duration::from_secs_f64(overlap) };
    let done = room.ledger.write(&caller, &[ask], replace).await?;
    let shown = serde_json::to_value(&done.value).map_err(Refusal::internal)?;
    Ok(at(private(StatusCode::CREATED, &shown), done.index))
}
