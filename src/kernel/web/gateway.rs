//! Answers as grpc-gateway writes them, for the routes under `/v3` that speak as etcd does: a fault has a code of gRPC, the text
//! that etcd has for it, which clients compare, and ours beside it.

use std::fmt;

use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Visitor};
use serde_json::{Map, Value, json};

use super::extract::{Body, BodyLimit};
use super::objects::Strict;
use super::respond::{Reason, told_beside};
use crate::kernel::crypto::from_base64;
use crate::kernel::{Problem, Refusal, problem};

/// The release of etcd whose gateway is spoken.
pub const ETCD: &str = "3.4.0";

/// Codes of gRPC.
pub const INVALID: u8 = 3;
pub const NOT_FOUND: u8 = 5;
pub const DENIED: u8 = 7;
pub const EXHAUSTED: u8 = 8;
pub const FAILED_PRECONDITION: u8 = 9;
pub const OUT_OF_RANGE: u8 = 11;
pub const UNIMPLEMENTED: u8 = 12;
pub const INTERNAL: u8 = 13;
pub const UNAVAILABLE: u8 = 14;
pub const UNAUTHENTICATED: u8 = 16;

/// Left in the answer to what is a stream: each piece is to arrive at once.
#[derive(Clone, Copy, Debug)]
pub struct Live;

/// Whether a path is spoken to so.
#[must_use]
pub fn speaks(path: &str) -> bool {
    path.starts_with("/v3/")
}

/// A fault.
#[derive(Clone, Debug)]
pub struct Grpc {
    code: u8,
    message: String,
    refusal: Option<Refusal>,
}

impl Grpc {
    /// Of this code.
    pub fn new(code: u8, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), refusal: None }
    }

    /// The code.
    #[must_use]
    pub fn code(&self) -> u8 {
        self.code
    }

    /// The text.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The same, for this reason.
    #[must_use]
    pub fn because(self, refusal: Refusal) -> Self {
        Self { refusal: Some(refusal), ..self }
    }

    /// A request without a token, as etcd refuses it.
    #[must_use]
    pub fn nobody(refusal: Refusal) -> Self {
        Self::new(INVALID, "etcdserver: user name is empty").because(refusal)
    }

    /// As grpc-gateway maps codes to HTTP.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        if self.refusal.as_ref().is_some_and(|r| r.problem() == &problem::METHOD_NOT_ALLOWED) {
            return StatusCode::METHOD_NOT_ALLOWED;
        }
        match self.code {
            INVALID | OUT_OF_RANGE => StatusCode::BAD_REQUEST,
            NOT_FOUND => StatusCode::NOT_FOUND,
            DENIED => StatusCode::FORBIDDEN,
            EXHAUSTED => StatusCode::TOO_MANY_REQUESTS,
            FAILED_PRECONDITION => StatusCode::PRECONDITION_FAILED,
            UNIMPLEMENTED => StatusCode::NOT_IMPLEMENTED,
            UNAVAILABLE => StatusCode::SERVICE_UNAVAILABLE,
            UNAUTHENTICATED => StatusCode::UNAUTHORIZED,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The fault inside a stream that had begun.
    #[must_use]
    pub fn in_stream(&self) -> Value {
        let status = self.status();
        json!({"error": {"grpc_code": self.code, "http_code": status.as_u16(), "message": self.message,
                         "http_status": status.canonical_reason().unwrap_or_default()}})
    }

    fn slug(&self) -> &'static str {
        match (&self.refusal, self.code) {
            (Some(refusal), _) => refusal.problem().slug,
            (None, UNAVAILABLE) => problem::UNAVAILABLE.slug,
            (None, UNAUTHENTICATED) => problem::UNAUTHENTICATED.slug,
            (None, _) => problem::MALFORMED.slug,
        }
    }
}

/// What etcd says where we have a problem of this type.
fn known(problem: &'static Problem) -> (u8, &'static str) {
    match problem.slug {
        "compacted" => (OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted"),
        "beyond-head" => (OUT_OF_RANGE, "etcdserver: mvcc: required revision is a future revision"),
        "unauthenticated" => (UNAUTHENTICATED, "etcdserver: invalid auth token"),
        "denied" => (DENIED, "etcdserver: permission denied"),
        "too-large" => (INVALID, "etcdserver: request is too large"),
        "rate-limited" | "overloaded" => (EXHAUSTED, "etcdserver: too many requests"),
        "storage-full" => (EXHAUSTED, "etcdserver: mvcc: database space exceeded"),
        "behind" => (UNAVAILABLE, "etcdserver: request timed out"),
        _ => match problem.status {
            404 | 410 => (NOT_FOUND, ""),
            405 => (UNIMPLEMENTED, ""),
            409 | 412 => (FAILED_PRECONDITION, ""),
            400..500 => (INVALID, ""),
            503 | 504 | 507 => (UNAVAILABLE, ""),
            _ => (INTERNAL, ""),
        },
    }
}

impl From<Refusal> for Grpc {
    fn from(refusal: Refusal) -> Self {
        let (code, text) = known(refusal.problem());
        let ours = text.is_empty() || refusal.detail().starts_with("etcdserver: ");
        let message = if ours { refusal.detail().to_owned() } else { text.to_owned() };
        Self { code, message, refusal: Some(refusal) }
    }
}

impl IntoResponse for Grpc {
    fn into_response(self) -> Response {
        let mut m = Map::new();
        m.insert("error".into(), self.message.clone().into());
        m.insert("message".into(), self.message.clone().into());
        m.insert("code".into(), self.code.into());
        if let Some(refusal) = &self.refusal {
            m.insert("detail".into(), refusal.detail().into());
            m.extend(refusal.extra().clone());
        }
        let json = [(header::CONTENT_TYPE, "application/json")];
        let mut response = (self.status(), json, Value::Object(m).to_string()).into_response();
        response.extensions_mut().insert(Reason(self.slug()));
        if let Some(refusal) = &self.refusal {
            told_beside(refusal, response.headers_mut());
        }
        response
    }
}

/// The messages of a body, whatever it is declared as: of most there is one, and none is one without fields.
pub struct Messages<T>(pub Vec<T>);

/// The message of a body.
pub struct Message<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Default> FromRequest<S> for Messages<T> {
    type Rejection = Grpc;

    async fn from_request(mut request: Request, state: &S) -> Result<Self, Grpc> {
        // In base64 it is a third larger.
        if let Some(limit) = request.extensions_mut().get_mut::<BodyLimit>() {
            limit.0 = limit.0.saturating_mul(2);
        }
        let Body(bytes) = Body::from_request(request, state).await?;
        read_all(&bytes).map(Self)
    }
}

fn read_all<T: DeserializeOwned + Default>(bytes: &[u8]) -> Result<Vec<T>, Grpc> {
    let mut reader = serde_json::Deserializer::from_slice(bytes).into_iter::<Option<Strict<T>>>();
    let mut all = Vec::new();
    loop {
        match reader.next() {
            None => return Ok(all),
            Some(Ok(one)) => all.push(one.map(|Strict(one)| one).unwrap_or_default()),
            Some(Err(e)) => return Err(Grpc::new(INVALID, format!("json: {e}"))),
        }
    }
}

impl<S: Send + Sync, T: DeserializeOwned + Default + Send> FromRequest<S> for Message<T> {
    type Rejection = Grpc;

    async fn from_request(request: Request, state: &S) -> Result<Self, Grpc> {
        let Messages(all) = Messages::from_request(request, state).await?;
        Ok(Self(all.into_iter().next().unwrap_or_default()))
    }
}

/// An int64: a number, or a string of one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Int(pub i64);

/// Bytes: base64.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

/// One of an enumeration: its name, or its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Word {
    Name(String),
    Number(i64),
}

impl Default for Word {
    fn default() -> Self {
        Self::Number(0)
    }
}

impl Word {
    /// Its place among the names; a number that none has counts as the first.
    ///
    /// # Errors
    /// For a name that is none of them.
    pub fn of(&self, names: &[&str]) -> Result<usize, Grpc> {
        match self {
            Self::Number(n) => Ok(usize::try_from(*n).ok().filter(|n| *n < names.len()).unwrap_or(0)),
            Self::Name(name) => names
                .iter()
                .position(|n| n == name)
                .ok_or_else(|| Grpc::new(INVALID, format!("unknown value {name:?}, not one of {names:?}"))),
        }
    }
}

struct Reads<T>(fn(Value) -> Option<T>, &'static str);

impl<'de, T> Visitor<'de> for Reads<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.1)
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<T, E> {
        self.read(Value::Null)
    }

    fn visit_i64<E: serde::de::Error>(self, n: i64) -> Result<T, E> {
        self.read(n.into())
    }

    fn visit_u64<E: serde::de::Error>(self, n: u64) -> Result<T, E> {
        self.read(n.into())
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
        self.read(text.into())
    }
}

impl<T> Reads<T> {
    fn read<E: serde::de::Error>(self, value: Value) -> Result<T, E> {
        (self.0)(value).ok_or_else(|| E::custom(format!("{} is wanted", self.1)))
    }
}

impl<'de> Deserialize<'de> for Int {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let read = |value: Value| match value {
            Value::Null => Some(Self(0)),
            Value::String(text) => text.parse().ok().map(Self),
            value => value.as_i64().map(Self),
        };
        d.deserialize_any(Reads(read, "an int64, or a string of one"))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let read = |value: Value| match value {
            Value::Null => Some(Self::default()),
            Value::String(text) => from_base64(&text).map(Self),
            _ => None,
        };
        d.deserialize_any(Reads(read, "base64"))
    }
}

impl<'de> Deserialize<'de> for Word {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let read = |value: Value| match value {
            Value::Null => Some(Self::default()),
            Value::String(text) => Some(Self::Name(text)),
            value => value.as_i64().map(Self::Number),
        };
        d.deserialize_any(Reads(read, "a name or its number"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_bytes_and_names_are_read_as_the_gateway_reads_them() {
        let int = |v: Value| serde_json::from_value::<Int>(v).ok().map(|i| i.0);
        assert_eq!((int(json!(5)), int(json!("-5")), int(Value::Null)), (Some(5), Some(-5), Some(0)));
        assert!([json!(1.5), json!("x"), json!(""), json!([]), json!(u64::MAX)].into_iter().all(|v| int(v).is_none()));
        let bytes = |v: Value| serde_json::from_value::<Bytes>(v).ok().map(|b| b.0);
        assert_eq!((bytes(json!("AP8=")), bytes(Value::Null)), (Some(vec![0, 255]), Some(vec![])));
        assert!([json!("AP8"), json!("%"), json!(1)].into_iter().all(|v| bytes(v).is_none()));
        let word = |v: Value| serde_json::from_value::<Word>(v).unwrap().of(&["A", "B"]).ok();
        assert_eq!(
            (word(json!("B")), word(json!(1)), word(json!(7)), word(json!("C"))),
            (Some(1), Some(1), Some(0), None)
        );
    }

    #[test]
    fn a_body_has_messages_one_after_the_other() {
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Said {
            n: Int,
        }
        let read = |text: &str| read_all::<Said>(text.as_bytes()).map(|all| all.iter().map(|s| s.n.0).collect()).ok();
        assert_eq!(read("{\"n\": 1}\n{\"x\": {}, \"n\": \"2\"} null"), Some(vec![1, 2, 0]));
        assert_eq!((read(""), read(" \n")), (Some(vec![]), Some(vec![])));
        for bad in ["[1]", " [{}]", "{} []", "{", "7", "{} x", "\"\""] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_refusal_has_the_text_of_etcd_and_ours() {
        let compacted = Grpc::from(Refusal::new(&problem::COMPACTED, "history before index 7 was compacted"));
        assert_eq!((compacted.code(), compacted.status().as_u16()), (11, 400));
        assert!(compacted.message().starts_with("etcdserver: mvcc"));
        let lease = Grpc::from(Refusal::new(&problem::CONFLICT, "etcdserver: lease already exists"));
        assert_eq!((lease.status().as_u16(), lease.message()), (412, "etcdserver: lease already exists"));
        for p in problem::ALL {
            assert!(Grpc::from(Refusal::new(p, "d")).status().as_u16() >= 400, "{}", p.slug);
        }
    }
}
