//! A body that need not be there.

use axum::extract::{FromRequest, Request};
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
