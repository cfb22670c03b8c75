//! The room's routes.

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::extract::State as Room;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::kernel::web::{
    Answer, Body, Caller, Json, Listing, Path, Query, RequestInfo, SOP_INDEX, cursor, page_limit,
};
use crate::kernel::{Refusal, crypto, ids, problem};

use super::clients::{self, Issued, Metadata, Replace, Replaced, Why};
use super::form::{Form, OAuthError};
use super::keys::{Rotated, Shown};
use super::lockout::Locked;
use super::model::{AuthMethod, Client, Operation, entity};
use super::oauth::{CREDENTIALS, EXCHANGE};
use super::operations::{Used, Wanted};
use super::{Token, clients::Delete, clients::Register, clients::Update};

/// The routes of the room.
pub fn routes(token: Token) -> OpenApiRouter {
    OpenApiRouter::new()
        .routes(routes!(grant))
        .routes(routes!(introspect))
        .routes(routes!(revoke))
        .routes(routes!(metadata))
        .routes(routes!(jwks))
        .routes(routes!(register))
        .routes(routes!(read_client, update_client, delete_client))
        .routes(routes!(issue_operation, list_operations))
        .routes(routes!(use_operation))
        .routes(routes!(read_operation, revoke_operation))
        .routes(routes!(complete_operation))
        .routes(routes!(rotate_secret))
        .routes(routes!(list_lockouts))
        .routes(routes!(release))
        .routes(routes!(rotate_keys))
        .routes(routes!(list_keys))
        .with_state(token)
}

/// JSON that nobody keeps (RFC 6749, 5.1).
fn private(status: StatusCode, body: &Value) -> Response {
    let headers =
        [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store"), (header::PRAGMA, "no-cache")];
    (status, headers, body.to_string()).into_response()
}

/// Get an access token (client_credentials, or token exchange by RFC 8693)
#[utoipa::path(post, path = "/oauth2/token", tag = "oauth", request_body(content = String, content_type = "application/x-www-form-urlencoded"),
    responses((status = 200, body = Object), (status = 400, description = "RFC 6749 error"), (status = 401, description = "invalid_client")))]
async fn grant(
    Room(room): Room<Token>,
    Extension(info): Extension<Arc<RequestInfo>>,
    headers: HeaderMap,
    Body(body): Body,
) -> Result<Response, OAuthError> {
    let form = Form::parse(&headers, &body)?;
    Ok(private(StatusCode::OK, &room.grant(&headers, &form, info).await?))
}

/// Ask about a token (RFC 7662)
#[utoipa::path(post, path = "/oauth2/introspect", tag = "oauth", request_body(content = String, content_type = "application/x-www-form-urlencoded"),
    responses((status = 200, body = Object), (status = 401, description = "invalid_client")))]
async fn introspect(
    Room(room): Room<Token>,
    Extension(info): Extension<Arc<RequestInfo>>,
    headers: HeaderMap,
    Body(body): Body,
) -> Result<Response, OAuthError> {
    let form = Form::parse(&headers, &body)?;
    let proven = room.prove(&headers, &form, &info).await?;
    Ok(private(StatusCode::OK, &room.introspect(&form, &proven)?))
}

/// End a token (RFC 7009)
#[utoipa::path(post, path = "/oauth2/revoke", tag = "oauth", request_body(content = String, content_type = "application/x-www-form-urlencoded"),
    responses((status = 200), (status = 400, description = "unauthorized_client"), (status = 401, description = "invalid_client")))]
async fn revoke(
    Room(room): Room<Token>,
    Extension(info): Extension<Arc<RequestInfo>>,
    headers: HeaderMap,
    Body(body): Body,
) -> Result<Response, OAuthError> {
    let form = Form::parse(&headers, &body)?;
    let proven = room.prove(&headers, &form, &info).await?;
    room.revoke(&form, &proven, info).await?;
    Ok((StatusCode::OK, [(header::CACHE_CONTROL, "no-store")]).into_response())
}

fn base(headers: &HeaderMap) -> String {
    let host = headers.get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or("localhost");
    format!("http://{host}")
}

/// What the authorization server can do (RFC 8414)
#[utoipa::path(get, path = "/.well-known/oauth-authorization-server", tag = "oauth", responses((status = 200, body = Object)))]
async fn metadata(Room(room): Room<Token>, headers: HeaderMap) -> Response {
    let base = base(&headers);
    let methods = json!(["client_secret_basic", "client_secret_post", "private_key_jwt"]);
    let algorithms = json!(["EdDSA", "ES256", "RS256", "PS256"]);
    let body = json!({
        "issuer": room.issuer(),
        "token_endpoint": format!("{base}/oauth2/token"),
        "introspection_endpoint": format!("{base}/oauth2/introspect"),
        "revocation_endpoint": format!("{base}/oauth2/revoke"),
        "registration_endpoint": format!("{base}/oauth2/register"),
        "jwks_uri": format!("{base}/.well-known/jwks.json"),
        "response_types_supported": [],
        "grant_types_supported": [CREDENTIALS, EXCHANGE],
        "token_endpoint_auth_methods_supported": methods,
        "token_endpoint_auth_signing_alg_values_supported": algorithms,
        "introspection_endpoint_auth_methods_supported": methods,
        "introspection_endpoint_auth_signing_alg_values_supported": algorithms,
        "revocation_endpoint_auth_methods_supported": methods,
        "revocation_endpoint_auth_signing_alg_values_supported": algorithms,
        "scopes_supported": ["admin", "state", "state:read", "state:write", "audit", "audit:read", "governance", "governance:read", "token", "token:read", "nexus", "nexus:read", "nexus:write", "health", "health:read", "health:write"],
    });
    ([(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

/// The keys that check access tokens (RFC 7517)
#[utoipa::path(get, path = "/.well-known/jwks.json", tag = "oauth", responses((status = 200, body = Object)))]
async fn jwks(Room(room): Room<Token>) -> Response {
    let keys: Vec<Value> = room.snapshot.listed(room.clock.now()).iter().map(|k| k.key.jwk()).collect();
    let headers = [(header::CONTENT_TYPE, "application/jwk-set+json"), (header::CACHE_CONTROL, "public, max-age=30")];
    (headers, json!({"keys": keys}).to_string()).into_response()
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

/// Register a client (RFC 7591); needs a bearer whose policy allows it
#[utoipa::path(post, path = "/oauth2/register", tag = "oauth", request_body = Metadata,
    responses((status = 201, body = Object), (status = 400, description = "invalid_client_metadata"), (status = 401), (status = 403)))]
async fn register(
    Room(room): Room<Token>,
    caller: Caller,
    headers: HeaderMap,
    Json(wanted): Json<Metadata>,
) -> Result<Response, OAuthError> {
    let client = wanted.client(ids::new_id(room.clock.now()).to_string(), &room.clock)?;
    let secret = (client.auth_method != AuthMethod::PrivateKeyJwt).then(clients::secret).transpose()?;
    let issued = Issued { client, secret, registration: clients::secret()? };
    let ask = Token::about("token:register", "new");
    let done = room.ledger.write(&caller, &[ask], Register { issued, why: Why::Asked }).await?;
    let issued = done.value;
    let mut shown = clients::shown(&issued.client, &base(&headers));
    shown["registration_access_token"] = issued.registration.into();
    if let Some(secret) = issued.secret {
        shown["client_secret"] = secret.into();
        shown["client_secret_expires_at"] = json!(0);
    }
    Ok(at(private(StatusCode::CREATED, &shown), done.index))
}

fn at(mut response: Response, index: i64) -> Response {
    response.headers_mut().insert(SOP_INDEX, HeaderValue::from(index));
    response
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
        let client = found.ok_or_else(|| Refusal::not_found("such client"))?.client;
        return Ok((caller, client));
    }
    let shown =
        headers.get(header::AUTHORIZATION).and_then(|a| a.to_str().ok()?.strip_prefix("Bearer ")).unwrap_or_default();
    let kept = found.as_ref().map_or_else(|| vec![0; 32], |r| r.registration.clone());
    let good = crypto::same(&kept, &crypto::sha256(shown.as_bytes()));
    match found.filter(|_| good) {
        Some(r) => Ok((Caller::vouched(entity(id), info), r.client)),
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
    Ok(private(StatusCode::OK, &clients::shown(&client, &base(&headers))))
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
    let client = wanted.client(id.clone(), &room.clock)?;
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
    Ok(at(private(StatusCode::OK, &clients::shown(&done.value, &base(&headers))), done.index))
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

/// Issue an operation token
#[utoipa::path(post, path = "/v1/token/operations", tag = "token", request_body = Wanted, responses((status = 201, body = Operation), (status = 400), (status = 403)))]
async fn issue_operation(
    Room(room): Room<Token>,
    caller: Caller,
    Json(wanted): Json<Wanted>,
) -> Result<Answer<Operation>, Refusal> {
    let done = room.issue_operation(&caller, wanted).await?;
    Ok(Answer::created(done.value).at(done.index))
}

#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct UseBody {
    /// The token
    token: String,
    /// What it is used for
    operation: String,
    /// On what
    #[serde(default)]
    resource: Option<String>,
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
    let mut items = room.operations(&caller, after, limit).await?;
    let more = items.len() > limit;
    items.truncate(limit);
    let next = items.last().filter(|_| more).map(|o| cursor::encode(&o.id));
    Ok(Answer::ok(Listing { items, next }))
}
