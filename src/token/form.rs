//! The OAuth side of a request: its form, who the client says it is, and errors as RFC 6749 writes them.

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use percent_encoding::percent_decode_str;
use serde_json::json;

use crate::kernel::crypto::{from_base64, from_base64url};
use crate::kernel::web::{Reason, pairs};
use crate::kernel::{Kind, Refusal};

/// An OAuth error (RFC 6749, 5.2).
#[derive(Debug)]
pub struct OAuthError {
    /// `invalid_client`, ...
    pub code: &'static str,
    description: String,
    status: StatusCode,
    /// The client tried HTTP Basic, so the answer names it.
    basic: bool,
    retry_after: Option<u32>,
    headers: Vec<(String, String)>,
    /// What the answer rests on changed while it was made.
    changed: bool,
}

impl OAuthError {
    /// 400.
    pub fn new(code: &'static str, description: impl Into<String>) -> Self {
        Self {
            code,
            description: description.into(),
            status: StatusCode::BAD_REQUEST,
            basic: false,
            retry_after: None,
            headers: Vec::new(),
            changed: false,
        }
    }

    /// 401. One text for every reason: an unknown client and a wrong secret look the same.
    #[must_use]
    pub fn invalid_client(basic: bool) -> Self {
        Self {
            status: StatusCode::UNAUTHORIZED,
            basic,
            ..Self::new("invalid_client", "the client is not known or did not prove who it is")
        }
    }
}

impl OAuthError {
    /// What the answer rests on changed while it was made; asked again, it may come out.
    #[must_use]
    pub fn changed() -> Self {
        let detail = "the client's registration, or a key, has just changed; ask again";
        Self {
            status: StatusCode::SERVICE_UNAVAILABLE,
            retry_after: Some(1),
            changed: true,
            ..Self::new("temporarily_unavailable", detail)
        }
    }

    /// The status it is answered with.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// Whether it is [`changed`](Self::changed).
    #[must_use]
    pub fn is_changed(&self) -> bool {
        self.changed
    }
}

impl From<Refusal> for OAuthError {
    fn from(r: Refusal) -> Self {
        let status = StatusCode::from_u16(r.problem().status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let code = match r.kind() {
            Kind::Unavailable | Kind::Exhausted => "temporarily_unavailable",
            Kind::Internal => "server_error",
            Kind::Unauthenticated => "invalid_token",
            Kind::Denied => "access_denied",
            _ => "invalid_request",
        };
        let headers = r.headers().iter().filter(|(name, _)| name.starts_with("ratelimit")).cloned().collect();
        Self { status, retry_after: r.retry_after_seconds(), headers, ..Self::new(code, r.detail()) }
    }
}

impl IntoResponse for OAuthError {
    fn into_response(self) -> Response {
        let body = json!({"error": self.code, "error_description": self.description}).to_string();
        let mut response = (self.status, [(header::CONTENT_TYPE, "application/json")], body).into_response();
        response.extensions_mut().insert(Reason(self.code));
        let headers = response.headers_mut();
        for (name, value) in self.headers {
            if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
                headers.insert(name, value);
            }
        }
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if self.basic {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"sop\""));
        } else if self.status == StatusCode::UNAUTHORIZED && self.code == "invalid_token" {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer error=\"invalid_token\""));
        }
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}

/// A form: `application/x-www-form-urlencoded`, no parameter twice but `resource` (RFC 8707).
pub struct Form(Vec<(String, String)>);

impl Form {
    /// Reads a body.
    ///
    /// # Errors
    /// `invalid_request`.
    pub fn parse(headers: &HeaderMap, body: &[u8]) -> Result<Self, OAuthError> {
        let declared = headers.get(header::CONTENT_TYPE).and_then(|t| t.to_str().ok()).unwrap_or_default();
        if declared
            .split(';')
            .next()
            .map(str::trim)
            .is_none_or(|t| !t.eq_ignore_ascii_case("application/x-www-form-urlencoded"))
        {
            return Err(OAuthError::new(
                "invalid_request",
                "send a form: Content-Type: application/x-www-form-urlencoded",
            ));
        }
        let text =
            std::str::from_utf8(body).map_err(|_| OAuthError::new("invalid_request", "the form is not UTF-8"))?;
        let all = pairs(text).map_err(|r| OAuthError::new("invalid_request", r.detail()))?;
        for (i, (name, _)) in all.iter().enumerate() {
            if name != "resource" && all[..i].iter().any(|(n, _)| n == name) {
                return Err(OAuthError::new("invalid_request", format!("the parameter {name} is given twice")));
            }
        }
        Ok(Self(all))
    }

    /// Of these parameters.
    pub(super) fn of<const N: usize>(parameters: [(&str, String); N]) -> Self {
        Self(parameters.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    }

    /// A parameter; one without a value counts as absent (RFC 6749, 3.2).
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, v)| n == name && !v.is_empty()).map(|(_, v)| v.as_str())
    }

    /// All values of a parameter.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(n, v)| n == name && !v.is_empty()).map(|(_, v)| v.as_str())
    }
}

/// How a client says who it is.
pub enum Claimed {
    /// Id and secret, in the header or in the form.
    Secret { id: String, secret: String, basic: bool },
    /// A signed assertion (RFC 7523).
    Assertion { assertion: String, id: Option<String> },
}

impl Claimed {
    /// Whom the client says it is: in an assertion, its issuer.
    pub fn client(&self) -> Option<String> {
        match self {
            Self::Secret { id, .. } => Some(id.clone()),
            Self::Assertion { assertion, .. } => {
                let body = assertion.split('.').nth(1).and_then(from_base64url)?;
                let body: serde_json::Value = serde_json::from_slice(&body).ok()?;
                body["iss"].as_str().map(str::to_owned)
            }
        }
    }

    /// From the header and the form; exactly one way must be used.
    ///
    /// # Errors
    /// `invalid_request` for two ways, `invalid_client` for none.
    pub fn find(headers: &HeaderMap, form: &Form) -> Result<Self, OAuthError> {
        let basic = headers.get(header::AUTHORIZATION).and_then(|a| a.to_str().ok()).and_then(|a| {
            let (scheme, rest) = a.split_once(' ')?;
            scheme.eq_ignore_ascii_case("basic").then(|| rest.trim().to_owned())
        });
        let ways = [basic.is_some(), form.get("client_secret").is_some(), form.get("client_assertion").is_some()];
        if ways.iter().filter(|w| **w).count() > 1 {
            return Err(OAuthError::new("invalid_request", "the client authenticates in more than one way"));
        }
        if let Some(basic) = basic {
            let both = from_base64(&basic).and_then(|b| String::from_utf8(b).ok());
            let (id, secret) =
                both.as_deref().and_then(|b| b.split_once(':')).ok_or_else(|| OAuthError::invalid_client(true))?;
            // RFC 6749, 2.3.1: both are form-encoded inside the header.
            let decode = |t: &str| percent_decode_str(&t.replace('+', " ")).decode_utf8().map(|d| d.into_owned());
            let (id, secret) = (decode(id), decode(secret));
            let (Ok(id), Ok(secret)) = (id, secret) else { return Err(OAuthError::invalid_client(true)) };
            return Ok(Self::Secret { id, secret, basic: true });
        }
        if let Some(assertion) = form.get("client_assertion") {
            if form.get("client_assertion_type") != Some("urn:ietf:params:oauth:client-assertion-type:jwt-bearer") {
                return Err(OAuthError::new(
                    "invalid_request",
                    "client_assertion_type must be urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
                ));
            }
            return Ok(Self::Assertion {
                assertion: assertion.to_owned(),
                id: form.get("client_id").map(str::to_owned),
            });
        }
        match (form.get("client_id"), form.get("client_secret")) {
            (Some(id), Some(secret)) => Ok(Self::Secret { id: id.to_owned(), secret: secret.to_owned(), basic: false }),
            _ => Err(OAuthError::invalid_client(false)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::crypto::base64;

    fn form(body: &str) -> Result<Form, OAuthError> {
        let headers =
            HeaderMap::from_iter([(header::CONTENT_TYPE, "application/x-www-form-urlencoded".parse().unwrap())]);
        Form::parse(&headers, body.as_bytes())
    }

    #[test]
    fn parameters_twice_are_refused_but_resource() {
        assert_eq!(form("a=1&a=2").err().unwrap().code, "invalid_request");
        assert_eq!(form("resource=x&resource=y").unwrap().all("resource").count(), 2);
        assert_eq!(form("a=&b=x+y%2B").unwrap().get("a"), None);
        assert_eq!(form("b=x+y%2B").unwrap().get("b"), Some("x y+"));
        assert!(Form::parse(&HeaderMap::new(), b"a=1").is_err());
    }

    #[test]
    fn one_way_to_authenticate() {
        let header = |v: String| HeaderMap::from_iter([(header::AUTHORIZATION, v.parse().unwrap())]);
        let basic = header(format!("Basic {}", base64("a%3Ab:s%2Bt")));
        match Claimed::find(&basic, &form("x=1").unwrap()).unwrap() {
            Claimed::Secret { id, secret, basic } => {
                assert_eq!((id.as_str(), secret.as_str(), basic), ("a:b", "s+t", true))
            }
            Claimed::Assertion { .. } => panic!("not an assertion"),
        }
        assert_eq!(Claimed::find(&basic, &form("client_secret=x").unwrap()).err().unwrap().code, "invalid_request");
        assert_eq!(
            Claimed::find(&HeaderMap::new(), &form("client_id=x").unwrap()).err().unwrap().code,
            "invalid_client"
        );
        assert_eq!(
            Claimed::find(&header("Basic !!!".into()), &form("").unwrap()).err().unwrap().code,
            "invalid_client"
        );
    }
}
