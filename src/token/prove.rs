//! How a client proves who it is: by its secret, or by an assertion signed with its key (RFC 7523).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::http::HeaderMap;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::Deserialize;
use serde_json::Value;

use crate::kernel::web::{Ask, Authority, Caller, Depends, Identity, Permit, RequestInfo};
use crate::kernel::{BoxFuture, Refusal, Timestamp, crypto, problem};
use crate::ledger::{Ledger, authz_fact};

use super::Token;
use super::form::{Claimed, Form, OAuthError};
use super::jwt::{self, Audience, LEEWAY};
use super::model::{AuthMethod, Client};
use super::snapshot::Snapshot;
use super::store::Registered;

/// The longest an assertion may be good for, seconds: that long its id is remembered.
const ASSERTION_MOST: i64 = 3600;

/// A client that has proven who it is.
pub(super) struct Proven {
    pub registered: Arc<Registered>,
    /// The assertion it used: the digest of its id, and when it ends.
    pub assertion: Option<([u8; 32], Timestamp)>,
}

impl Proven {
    pub fn client(&self) -> &Client {
        &self.registered.client
    }
}

/// Speaks for a client that has proven who it is, as long as its registration is the one it proved itself by.
struct Vouched {
    snapshot: Arc<Snapshot>,
    ledger: Ledger,
    client_id: String,
    index: i64,
}

impl Authority for Vouched {
    fn decide<'a>(&'a self, _: &'a Caller, _: &'a [Ask]) -> BoxFuture<'a, Result<Permit, Refusal>> {
        Box::pin(async move {
            let at = self.ledger.index();
            match self.snapshot.client(&self.client_id) {
                Some(r) if r.index == self.index => {
                    let depends = Depends::from_iter([fact(&self.client_id)]);
                    Ok(Permit { allowed: true, at, depends, decision: None, denied: None })
                }
                Some(_) => Err(Refusal::unavailable("the client's registration has just changed; ask again")),
                None => Err(Refusal::new(&problem::UNAUTHENTICATED, "the client is not registered any more")),
            }
        })
    }
}

/// What the ledger knows a client's registration by.
pub(super) fn fact(client_id: &str) -> u64 {
    authz_fact(format!("client/{client_id}").as_bytes())
}

#[derive(Deserialize)]
struct Assertion {
    iss: String,
    sub: String,
    aud: Audience,
    exp: i64,
    jti: String,
    #[serde(default)]
    nbf: Option<i64>,
    #[serde(default)]
    iat: Option<i64>,
}

impl Token {
    /// A client that has proven who it is, as the record and policies see it.
    pub(super) fn vouched(&self, proven: &Proven, info: Arc<RequestInfo>) -> Caller {
        let client = proven.client();
        let identity = Identity {
            actor: client.client_id.as_str().into(),
            principal: client.entity(),
            scopes: Vec::new(),
            credential: None,
            via: Vec::new(),
        };
        let authority = Vouched {
            snapshot: self.snapshot.clone(),
            ledger: self.ledger.clone(),
            client_id: client.client_id.clone(),
            index: proven.registered.index,
        };
        Caller::new(Arc::new(identity), info, Arc::new(authority))
    }

    /// Who the client is. What is newest is looked up first: it may have been registered, or deleted, on another daemon.
    pub(super) async fn prove(
        &self,
        headers: &HeaderMap,
        form: &Form,
        info: &Arc<RequestInfo>,
    ) -> Result<Proven, OAuthError> {
        let claimed = Claimed::find(headers, form)?;
        self.ledger.fence().await?;
        let proven = match &claimed {
            Claimed::Secret { id, secret, basic } => {
                let found = self.snapshot.client(id);
                // The same work for an unknown client: no oracle in the time it takes.
                let kept = found.as_ref().and_then(|r| r.secret.as_deref()).unwrap_or(&[0; 32]);
                let now = self.clock.now();
                let before = found.as_ref().and_then(|r| r.previous.as_ref()).filter(|(_, until)| *until > now);
                let before = before.map_or(&[0; 32][..], |(digest, _)| digest);
                let shown = crypto::sha256(secret.as_bytes());
                let good = crypto::same(kept, &shown) | crypto::same(before, &shown);
                let fits =
                    |r: &Arc<Registered>| good && !r.disabled && r.client.auth_method != AuthMethod::PrivateKeyJwt;
                found.filter(fits).map(|registered| Proven { registered, assertion: None }).ok_or(*basic)
            }
            Claimed::Assertion { assertion, id } => self.assertion(assertion, id.as_deref()).await.ok_or(false),
        };
        // Looked at last, so that a lock-out takes the same time and is answered as a wrong secret is.
        let id = claimed.client();
        let locked = id.as_deref().is_some_and(|id| self.locked(id, info));
        match proven {
            Ok(proven) if !locked => {
                proven.registered.used.store(self.clock.now().millis(), Ordering::Relaxed);
                Ok(proven)
            }
            refused => {
                let basic = refused.err().unwrap_or(matches!(&claimed, Claimed::Secret { basic: true, .. }));
                if let (Some(id), false) = (id, locked) {
                    self.failed(&id, info).await;
                }
                self.counted.refused.with_label_values(&[if locked { "locked" } else { "client" }]).inc();
                Err(OAuthError::invalid_client(basic))
            }
        }
    }

    /// Checks a client assertion (RFC 7523, 3). Whether it was used before is seen when it is used.
    async fn assertion(&self, text: &str, id: Option<&str>) -> Option<Proven> {
        let header = jwt::header(text)?;
        let algorithm = match header.get("alg")?.as_str()? {
            "EdDSA" => Algorithm::EdDSA,
            "ES256" => Algorithm::ES256,
            "RS256" => Algorithm::RS256,
            "PS256" => Algorithm::PS256,
            _ => return None,
        };
        // Whose keys to use is what it says of itself; that it says the truth is what the signature then shows.
        let body = text.split('.').nth(1).and_then(crypto::from_base64url)?;
        let claimed: Assertion = serde_json::from_slice(&body).ok()?;
        let registered = self.snapshot.client(&claimed.iss).filter(|r| !r.disabled)?;
        let client = &registered.client;
        let same = claimed.iss == claimed.sub && id.is_none_or(|id| id == claimed.iss);
        if !same || client.auth_method != AuthMethod::PrivateKeyJwt {
            return None;
        }
        let kid = header.get("kid").and_then(Value::as_str);
        let fetched;
        let keys = match (&client.jwks_uri, &client.jwks) {
            (Some(uri), _) => {
                fetched = self.fetcher.keys(uri, kid).await;
                &*fetched
            }
            (None, Some(jwks)) => jwks["keys"].as_array()?,
            (None, None) => return None,
        };
        let fits = |k: &&Value| kid.is_none_or(|kid| k["kid"].as_str().is_none_or(|have| have == kid));
        let signed = keys.iter().filter(fits).any(|key| signed(text, key, algorithm));
        let now = self.clock.now().seconds();
        let for_us = claimed.aud.names(&self.issuer) || claimed.aud.names(&format!("{}/oauth2/token", self.issuer));
        let timely = claimed.exp > now
            && claimed.exp <= now + ASSERTION_MOST
            && claimed.nbf.is_none_or(|t| t <= now + LEEWAY)
            && claimed.iat.is_none_or(|t| t <= now + LEEWAY);
        if !signed || !for_us || !timely || claimed.jti.is_empty() {
            return None;
        }
        let digest = crypto::sha256(format!("{}\n{}", client.client_id, claimed.jti).as_bytes());
        let assertion = Some((digest, Timestamp::from_millis(claimed.exp * 1000)));
        Some(Proven { registered, assertion })
    }
}

fn signed(text: &str, key: &Value, algorithm: Algorithm) -> bool {
    let jwk: Result<jsonwebtoken::jwk::Jwk, _> = serde_json::from_value(key.clone());
    let Some(key) = jwk.ok().and_then(|jwk| DecodingKey::from_jwk(&jwk).ok()) else { return false };
    let mut validation = Validation::new(algorithm);
    validation.validate_exp = false;
    validation.validate_aud = false;
    validation.required_spec_claims.clear();
    jsonwebtoken::decode::<Value>(text, &key, &validation).is_ok()
}
