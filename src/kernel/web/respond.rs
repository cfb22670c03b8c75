//! Answers: a refusal as a problem document (RFC 9457), a value with its index and its tag.

use std::fmt::Write as _;

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::kernel::Refusal;

/// Goes with an answer that refuses and is no problem document (OAuth's): why, in one word.
#[derive(Clone, Copy, Debug)]
pub struct Reason(pub &'static str);

/// The index an answer reflects, for the layer that writes the header.
pub const SOP_INDEX: HeaderName = HeaderName::from_static("sop-index");

/// The problem document of a refusal; `instance` is the path it happened on.
#[must_use]
pub fn problem_document(refusal: &Refusal, instance: Option<&str>) -> Value {
    let problem = refusal.problem();
    let mut m = Map::new();
    m.insert("type".into(), format!("/problems/{}", problem.slug).into());
    m.insert("title".into(), problem.title.into());
    m.insert("status".into(), problem.status.into());
    m.insert("detail".into(), refusal.detail().into());
    if let Some(instance) = instance {
        m.insert("instance".into(), instance.into());
    }
    if !refusal.errors().is_empty() {
        m.insert("errors".into(), serde_json::to_value(refusal.errors()).unwrap_or_default());
    }
    m.extend(refusal.extra().clone());
    Value::Object(m)
}

/// A refusal as it goes out.
#[must_use]
pub fn problem_response(refusal: &Refusal, instance: Option<&str>) -> Response {
    let status = StatusCode::from_u16(refusal.problem().status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let body = serde_json::to_vec(&problem_document(refusal, instance)).unwrap_or_default();
    let mut response = (status, [(header::CONTENT_TYPE, "application/problem+json")], body).into_response();
    told_beside(refusal, response.headers_mut());
    response
}

/// What a refusal says in header fields, whatever its body speaks.
pub(super) fn told_beside(refusal: &Refusal, headers: &mut HeaderMap) {
    if let Some(seconds) = refusal.retry_after_seconds() {
        headers.insert(header::RETRY_AFTER, seconds.into());
    }
    if let Some(index) = refusal.index() {
        headers.insert(SOP_INDEX, index.into());
    }
    for (name, value) in refusal.headers() {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            headers.insert(name, value);
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = problem_response(&self, None);
        // The outer layer knows the path, and writes the document again with `instance`.
        response.extensions_mut().insert(self);
        response
    }
}

/// A JSON answer that says which index it reflects.
pub struct Answer<T> {
    status: StatusCode,
    index: Option<i64>,
    tag: Option<String>,
    body: T,
}

impl<T: Serialize> Answer<T> {
    /// 200.
    pub const fn ok(body: T) -> Self {
        Self { status: StatusCode::OK, index: None, tag: None, body }
    }

    /// 201.
    pub const fn created(body: T) -> Self {
        Self { status: StatusCode::CREATED, index: None, tag: None, body }
    }

    /// The index it reflects, or got.
    #[must_use]
    pub fn at(mut self, index: i64) -> Self {
        self.index = Some(index);
        self
    }

    /// Its entity tag, without quotes.
    #[must_use]
    pub fn tagged(mut self, tag: impl std::fmt::Display) -> Self {
        let mut quoted = String::with_capacity(24);
        // Writing to memory cannot fail.
        let _ = write!(quoted, "\"{tag}\"");
        self.tag = Some(quoted);
        self
    }
}

impl<T: Serialize> IntoResponse for Answer<T> {
    fn into_response(self) -> Response {
        let body = match serde_json::to_vec(&self.body) {
            Ok(body) => body,
            Err(e) => return Refusal::internal(e).into_response(),
        };
        let mut response = Response::new(axum::body::Body::from(body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(index) = self.index {
            headers.insert(SOP_INDEX, index.into());
        }
        if let Some(tag) = self.tag.and_then(|t| HeaderValue::from_str(&t).ok()) {
            headers.insert(header::ETAG, tag);
        }
        response
    }
}

/// A page of a list.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct Listing<T> {
    /// What is on the page.
    pub items: Vec<T>,
    /// The cursor of the next page, `null` on the last.
    pub next: Option<String>,
}
