//! How a client of etcd gets its token: by its name and password, which are our client's id and secret.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State as Room;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use axum::routing::post;
use serde::Deserialize;
use serde_json::json;
use utoipa_axum::router::OpenApiRouter;

use crate::kernel::web::RequestInfo;
use crate::kernel::web::gateway::{DENIED, EXHAUSTED, Grpc, INTERNAL, INVALID, Message, UNAVAILABLE};
use crate::kernel::{Refusal, problem};

use super::private;
use crate::token::Token;
use crate::token::form::{Form, OAuthError};
use crate::token::oauth::CREDENTIALS;

pub(super) fn routes() -> OpenApiRouter<Token> {
    OpenApiRouter::new().route("/v3/auth/authenticate", post(authenticate))
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct AuthenticateRequest {
    name: String,
    password: String,
}

/// The token that `/oauth2/token` would give, with all the scopes the client is registered for.
async fn authenticate(
    Room(room): Room<Token>,
    Extension(info): Extension<Arc<RequestInfo>>,
    Message(asked): Message<AuthenticateRequest>,
) -> Result<Response, Grpc> {
    let credentials = [("client_id", asked.name), ("client_secret", asked.password)];
    let [id, secret] = credentials;
    let form = Form::of([("grant_type", CREDENTIALS.to_owned()), id, secret]);
    let given = room.grant(&HeaderMap::new(), &form, info).await.map_err(fault)?;
    let revision = room.ledger.index().to_string();
    Ok(private(StatusCode::OK, &json!({"header": {"revision": revision}, "token": given["access_token"]})))
}

fn fault(error: OAuthError) -> Grpc {
    match (error.code, error.status().as_u16()) {
        ("invalid_client", _) => {
            let why = Refusal::new(&problem::UNAUTHENTICATED, "the client is not known or did not prove who it is");
            Grpc::new(INVALID, "etcdserver: authentication failed, invalid user ID or password").because(why)
        }
        (_, 429) => Grpc::new(EXHAUSTED, "etcdserver: too many requests"),
        (_, 503) => Grpc::new(UNAVAILABLE, "etcdserver: request timed out"),
        ("unauthorized_client" | "access_denied", _) => Grpc::new(DENIED, "etcdserver: permission denied"),
        _ => Grpc::new(INTERNAL, format!("etcdserver: {}", error.code)),
    }
}
