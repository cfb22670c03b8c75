//! What need not be there: a body; the store.

use std::convert::Infallible;

use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use serde::de::DeserializeOwned;

use super::extract::{Body, is_json, parse_json};
use crate::kernel::{Refusal, problem};

/// A JSON body, or none at all: then its default.
pub struct JsonOr<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Default> FromRequest<S> for JsonOr<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        let json = is_json(request.headers());
        let Body(bytes) = Body::from_request(request, state).await?;
        if bytes.is_empty() {
            return Ok(Self(T::default()));
        }
        if !json {
            let detail = "send the body as Content-Type: application/json, or none";
            return Err(Refusal::new(&problem::UNSUPPORTED_MEDIA_TYPE, detail));
        }
        parse_json(&bytes).map(Self)
    }
}

/// A body without members: what says all it has to say by its path.
#[derive(Default, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// Left in a request that was let through although the store could not say what is newest.
#[derive(Clone, Debug)]
pub struct Away(pub Refusal);

/// Why the store is away, if it is: what an answer without it has to be instead.
pub struct WhileAway(pub Option<Refusal>);

impl<S: Send + Sync> FromRequestParts<S> for WhileAway {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self(parts.extensions.get::<Away>().map(|away| away.0.clone())))
    }
}
