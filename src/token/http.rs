//! The room's routes: here those of OAuth; registrations, keys and operation tokens have files of their own.

mod clients;
mod etcd;
mod keys;
mod manage;
mod operations;

use std::sync::Arc;

use axum::Extension;
use axum::extract::State as Room;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::kernel::web::{Body, RequestInfo, SOP_INDEX};

pub(super) use operations::UseBody;

use super::Token;
use super::form::{Form, OAuthError};
use super::oauth::{CREDENTIALS, EXCHANGE};

/// The routes of the room.
pub fn routes(token: Token) -> OpenApiRouter {
    let own = OpenApiRouter::new()
        .routes(routes!(grant))
        .routes(routes!(introspect))
        .routes(routes!(revoke))
        .routes(routes!(metadata))
        .routes(routes!(jwks));
    own.merge(clients::routes())
        .merge(etcd::routes())
        .merge(keys::routes())
        .merge(manage::routes())
        .merge(operations::routes())
        .with_state(token)
}

fn at(mut response: Response, index: i64) -> Response {
    response.headers_mut().insert(SOP_INDEX, HeaderValue::from(index));
    response
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
    let proven = room.prove_once(&headers, &form, &info).await?;
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
    let proven = room.prove_once(&headers, &form, &info).await?;
    room.revoke(&form, &proven, info).await?;
    Ok((StatusCode::OK, [(header::CACHE_CONTROL, "no-store")]).into_response())
}

/// Where the daemon is, as the request has it.
fn base(headers: &HeaderMap, room: &Token) -> String {
    let host = headers.get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or("localhost");
    format!("{}://{host}", room.scheme)
}

/// What the authorization server can do (RFC 8414)
#[utoipa::path(get, path = "/.well-known/oauth-authorization-server", tag = "oauth", responses((status = 200, body = Object)))]
async fn metadata(Room(room): Room<Token>, headers: HeaderMap) -> Response {
    let base = base(&headers, &room);
    let methods = json!(["client_secret_basic", "client_secret_post", "private_key_jwt"]);
    let algorithms = json!(["EdDSA", "Ed25519", "ES256", "RS256", "PS256"]);
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
