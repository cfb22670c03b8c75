//! What handlers take apart: bodies, names, preconditions. Each says where the fault is and what would be right.

use std::io::Read as _;

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use serde::de::DeserializeOwned;

use super::caller::Caller;
use super::objects::Objects;
use crate::kernel::{Fault, Refusal, ids, problem};

/// The largest body, set by the api on every request.
#[derive(Clone, Copy, Debug)]
pub struct BodyLimit(pub usize);

/// The whole body as bytes, within the limit.
pub struct Body(pub Bytes);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = Refusal;

    async fn from_request(request: Request, _: &S) -> Result<Self, Refusal> {
        let limit = request.extensions().get::<BodyLimit>().map_or(1024 * 1024, |l| l.0);
        read_body(request, limit).await.map(Self)
    }
}

/// Reads a whole body within `limit`.
///
/// # Errors
/// 413 past the limit, 400 when it does not arrive whole.
pub async fn read_body(request: Request, limit: usize) -> Result<Bytes, Refusal> {
    let too_large = || Refusal::new(&problem::TOO_LARGE, format!("the body has more than {limit} bytes"));
    let declared = request.headers().get(header::CONTENT_LENGTH).and_then(|l| l.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|l| l > limit as u64) {
        return Err(too_large());
    }
    let limited = http_body_util::Limited::new(request.into_body(), limit);
    match http_body_util::BodyExt::collect(limited).await {
        Ok(body) => Ok(body.to_bytes()),
        Err(e) if e.is::<http_body_util::LengthLimitError>() => Err(too_large()),
        Err(e) if e.to_string().contains("timeout") || e.to_string().contains("timed out") => {
            Err(Refusal::new(&problem::TIMEOUT, "the body did not arrive in time"))
        }
        Err(_) => Err(Refusal::new(&problem::MALFORMED, "the body did not arrive whole")),
    }
}

/// A body without its content coding (RFC 9110, 8.4): none or gzip. What it grows to has the same limit, and nothing beyond the
/// limit is made.
///
/// # Errors
/// 413 past the limit, 415 for another coding, 400 for what is not gzip.
pub fn inflate(headers: &HeaderMap, body: Bytes, limit: usize) -> Result<Bytes, Refusal> {
    let coding = headers.get(header::CONTENT_ENCODING).map(|v| v.to_str().unwrap_or("?").trim().to_ascii_lowercase());
    match coding.as_deref() {
        None | Some("" | "identity") => Ok(body),
        Some("gzip" | "x-gzip") => {
            let mut out = Vec::new();
            let most = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
            let mut reader = flate2::read::MultiGzDecoder::new(&body[..]).take(most);
            reader.read_to_end(&mut out).map_err(|_| Refusal::malformed("", "the body is not gzip, or ends early"))?;
            if out.len() > limit {
                return Err(Refusal::new(&problem::TOO_LARGE, format!("the body inflates to more than {limit} bytes")));
            }
            Ok(out.into())
        }
        Some(_) => Err(Refusal::new(&problem::UNSUPPORTED_MEDIA_TYPE, "send the body as it is, or with gzip")
            .with_header("Accept-Encoding", "gzip")),
    }
}

/// A JSON body.
pub struct Json<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        if !is_json(request.headers()) {
            return Err(Refusal::new(
                &problem::UNSUPPORTED_MEDIA_TYPE,
                "send the body as Content-Type: application/json",
            ));
        }
        let Body(bytes) = Body::from_request(request, state).await?;
        parse_json(&bytes).map(Self)
    }
}

/// A JSON body that may be [`LARGE`] times as large as others: a document that cannot be sent in parts.
pub struct LargeJson<T>(pub T);

/// How much larger a [`LargeJson`] may be.
pub const LARGE: usize = 16;

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for LargeJson<T> {
    type Rejection = Refusal;

    async fn from_request(mut request: Request, state: &S) -> Result<Self, Refusal> {
        if let Some(limit) = request.extensions_mut().get_mut::<BodyLimit>() {
            limit.0 = limit.0.saturating_mul(LARGE);
        }
        Json::from_request(request, state).await.map(|Json(body)| Self(body))
    }
}

/// Whether the body is declared as JSON.
#[must_use]
pub fn is_json(headers: &HeaderMap) -> bool {
    let declared = headers.get(header::CONTENT_TYPE).and_then(|t| t.to_str().ok()).unwrap_or_default();
    let essence = declared.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}

/// Reads JSON into `T`; a fault carries its JSON Pointer.
///
/// # Errors
/// 400.
pub fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Refusal> {
    if let Err(e) = std::str::from_utf8(bytes) {
        return Err(Refusal::malformed("", format!("the body is not UTF-8 (first bad byte at {})", e.valid_up_to())));
    }
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    if let Ok(value) = T::deserialize(Objects(&mut reader))
        && reader.end().is_ok()
    {
        return Ok(value);
    }
    // Once more, to say where: a good body need not pay for keeping track of that.
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    match serde_path_to_error::deserialize(Objects(&mut reader)) {
        Ok(value) => {
            reader.end().map(|()| value).map_err(|e| Refusal::malformed("", format!("after the JSON document: {e}")))
        }
        Err(e) => {
            let mut at = pointer(e.path());
            let cause = e.inner();
            let text = cause.to_string();
            if let Some(field) = text.strip_prefix("unknown field `").and_then(|t| t.split('`').next()) {
                let member = format!("/{}", field.replace('~', "~0").replace('/', "~1"));
                if !at.ends_with(&member) {
                    at.push_str(&member);
                }
            }
            let what = if cause.is_data() { text } else { format!("the body is not JSON: {text}") };
            Err(Refusal::malformed(at, what))
        }
    }
}

fn pointer(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    let mut out = String::new();
    for segment in path {
        match segment {
            Segment::Seq { index } => out.push_str(&format!("/{index}")),
            Segment::Map { key } => out.push_str(&format!("/{}", key.replace('~', "~0").replace('/', "~1"))),
            // The member that says which of several it is.
            Segment::Enum { variant } => out.push_str(&format!("/{variant}")),
            Segment::Unknown => {}
        }
    }
    out
}

/// The parts of a path.
pub struct Path<T>(pub T);

impl<T, S> FromRequestParts<S> for Path<T>
where
    T: serde::de::DeserializeOwned + Send,
    S: Send + Sync,
{
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        match axum::extract::Path::<T>::from_request_parts(parts, state).await {
            Ok(axum::extract::Path(parts)) => Ok(Self(parts)),
            Err(fault) => Err(Refusal::malformed("", format!("the path cannot be read: {}", fault.body_text()))),
        }
    }
}

/// The rest of a path as a name: a key, a topic, a file.
pub struct Name(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let Path(name) = Path::<String>::from_request_parts(parts, state).await?;
        match ids::name_fault(&name) {
            None => Ok(Self(name)),
            Some(fault) => Err(Refusal::malformed("", fault)),
        }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        let missing = || {
            Refusal::new(&problem::UNAUTHENTICATED, "this needs a bearer token")
                .with_header("www-authenticate", "Bearer")
        };
        parts.extensions.get::<Self>().cloned().ok_or_else(missing)
    }
}

/// `If-Match` and `If-None-Match` (RFC 9110, 13.1): tags without quotes, or `*`. Weak ones are as good as others where whether
/// something is new is asked, and match nothing in `If-Match`, which wants the very same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Preconditions {
    /// `If-Match`.
    pub if_match: Option<Tags>,
    /// `If-None-Match`.
    pub if_none_match: Option<Tags>,
}

/// Entity tags of a precondition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tags {
    /// `*`.
    Any,
    /// These.
    These(Vec<String>),
}

impl<S: Send + Sync> FromRequestParts<S> for Preconditions {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        Ok(Self { if_match: tags(&parts.headers, "If-Match")?, if_none_match: tags(&parts.headers, "If-None-Match")? })
    }
}

/// What a reader has already, by `If-None-Match`; what cannot be read is nothing.
#[must_use]
pub fn known(headers: &HeaderMap) -> Option<Tags> {
    tags(headers, "If-None-Match").ok().flatten()
}

fn tags(headers: &HeaderMap, name: &str) -> Result<Option<Tags>, Refusal> {
    let malformed = || Refusal::malformed("", format!("{name} is `*` or a list of entity tags in double quotes"));
    let mut all = Vec::new();
    for value in headers.get_all(name) {
        let value = value.to_str().map_err(|_| malformed())?.trim();
        if value == "*" {
            return Ok(Some(Tags::Any));
        }
        for tag in value.split(',').map(str::trim).filter(|t| !t.is_empty()) {
            let bare = |tag: &str| tag.strip_prefix('"').and_then(|t| t.strip_suffix('"')).map(str::to_owned);
            let weak = tag.strip_prefix("W/");
            let of = bare(weak.unwrap_or(tag)).ok_or_else(malformed)?;
            all.push(if weak.is_some() && name == "If-Match" { tag.to_owned() } else { of });
        }
    }
    if all.is_empty() && headers.contains_key(name) {
        return Err(malformed());
    }
    Ok((!all.is_empty()).then_some(Tags::These(all)))
}

/// `Last-Event-ID`: the index after which a client that was cut off goes on. Empty, it is none (HTML, 9.2.4).
///
/// # Errors
/// 400 for what is no index: who meant to go on would begin at the head instead, and miss what lies between.
pub fn last_event_id(headers: &HeaderMap) -> Result<Option<i64>, Refusal> {
    let Some(value) = headers.get("last-event-id").filter(|v| !v.is_empty()) else { return Ok(None) };
    let index = value.to_str().ok().and_then(|v| v.parse().ok()).filter(|index| *index >= 0);
    index.map(Some).ok_or_else(|| Refusal::malformed("", "Last-Event-ID is an index"))
}

/// `limit` of a list, 1-1000.
///
/// # Errors
/// 400 out of range.
pub fn page_limit(limit: Option<i64>) -> Result<usize, Refusal> {
    match limit {
        None => Ok(100),
        Some(n @ 1..=1000) => Ok(usize::try_from(n).unwrap_or(1000)),
        Some(_) => Err(Refusal::malformed("?limit", "limit is from 1 to 1000")),
    }
}

/// Faults of a list of fields, as one refusal.
#[must_use]
pub fn faulty(faults: Vec<Fault>) -> Option<Refusal> {
    let first = faults.first()?.detail.clone();
    Some(Refusal::new(&problem::MALFORMED, first).with_faults(faults))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        n: u32,
    }
    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        items: Vec<Inner>,
        #[serde(default)]
        flag: Option<bool>,
    }

    fn fault(body: &str) -> (u16, String) {
        let r = parse_json::<Outer>(body.as_bytes()).unwrap_err();
        (r.problem().status, r.errors()[0].pointer.clone())
    }

    #[test]
    fn faults_of_a_body_are_pointed_at() {
        assert_eq!(fault(r#"{"items":[{"n":1},{"n":"x"}]}"#), (400, "/items/1/n".into()));
        assert_eq!(fault(r#"{"items":[{"n":1,"m":2}]}"#), (400, "/items/0/m".into()));
        assert_eq!(fault(r#"{"items":[],"fl/ag":1}"#), (400, "/fl~1ag".into()));
        assert_eq!(fault("{").1, "");
        assert_eq!(fault("").1, "");
        assert_eq!(fault(r#"{"items":[]} x"#).1, "");
        assert_eq!(fault(&"[".repeat(200)).0, 400);
        assert_eq!(parse_json::<Outer>(b"\xff").unwrap_err().problem().status, 400);
        assert!(parse_json::<Outer>(br#"{"items":[{"n":1}],"flag":true}"#).is_ok());
    }

    #[test]
    fn where_a_client_goes_on() {
        let after =
            |v: &str| last_event_id(&HeaderMap::from_iter([("last-event-id".parse().unwrap(), v.parse().unwrap())]));
        assert_eq!((after("7").unwrap(), after("").unwrap()), (Some(7), None));
        assert!(["abc", "-1", "99999999999999999999", "7 "].iter().all(|v| after(v).is_err()));
    }

    #[test]
    fn entity_tags() {
        let tags_of = |v: &str| tags(&HeaderMap::from_iter([(header::IF_MATCH, v.parse().unwrap())]), "If-Match");
        assert_eq!(tags_of("*").unwrap(), Some(Tags::Any));
        assert_eq!(tags_of(r#""1", W/"2""#).unwrap(), Some(Tags::These(vec!["1".into(), r#"W/"2""#.into()])));
        let new = HeaderMap::from_iter([(header::IF_NONE_MATCH, r#""1", W/"2""#.parse().unwrap())]);
        assert_eq!(tags(&new, "If-None-Match").unwrap(), Some(Tags::These(vec!["1".into(), "2".into()])));
        assert_eq!(tags_of("1").unwrap_err().problem().status, 400);
        assert_eq!(tags_of("").unwrap_err().problem().status, 400);
        assert_eq!(tags(&HeaderMap::new(), "If-Match").unwrap(), None);
    }
}
