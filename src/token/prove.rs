//! How a client proves who it is: by its secret, or by an assertion signed with its key (RFC 7523).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::http::HeaderMap;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::Deserialize;
use serde_json::Value;

use crate::kernel::web::{Ask, Authority, Caller, Identity, Permit, RequestInfo, block};
use crate::kernel::{BoxFuture, Clock, Refusal, Timestamp, crypto, problem};
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
    /// The index this daemon reflected before it looked.
    pub at: i64,
}

impl Proven {
    pub fn client(&self) -> &Client {
        &self.registered.client
    }
}

/// Speaks for a client that has proven who it is, as long as its registration is the one it proved itself by, it is not locked out
/// and no key has changed: what is given to it rests on these, and the ledger looks whether they still hold.
struct Vouched {
    snapshot: Arc<Snapshot>,
    ledger: Ledger,
    clock: Clock,
    client_id: String,
    block: String,
    index: i64,
}

impl Authority for Vouched {
    fn decide<'a>(&'a self, _: &'a Caller, _: &'a [Ask]) -> BoxFuture<'a, Result<Permit, Refusal>> {
        Box::pin(async move {
            let at = self.ledger.index();
            let same = self.snapshot.client(&self.client_id).is_some_and(|r| r.index == self.index);
            if !same || self.snapshot.locked(&self.client_id, &self.block, self.clock.now()) {
                return Err(Refusal::new(&problem::UNAUTHENTICATED, "the client's registration has just changed"));
            }
            let depends = [fact(&self.client_id), authz_fact(b"lockout"), authz_fact(b"key")].into_iter().collect();
            Ok(Permit { allowed: true, at, depends, decision: None, denied: None })
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
            clock: self.clock.clone(),
            block: block(info.peer),
            client_id: client.client_id.clone(),
            index: proven.registered.index,
        };
        Caller::new(Arc::new(identity), info, Arc::new(authority))
    }

    /// Who the client is. `newest`: what is newest is looked up first, because the answer rests on nothing else. Without it a client
    /// that this daemon does not know (any more) is looked up anew: it may have been registered, or deleted, on another.
    pub(super) async fn prove(
        &self,
        headers: &HeaderMap,
        form: &Form,
        info: &Arc<RequestInfo>,
        newest: bool,
    ) -> Result<Proven, OAuthError> {
        let claimed = Claimed::find(headers, form)?;
        if newest {
            self.ledger.fence().await?;
        }
        let mut looked = self.look(&claimed, info).await;
        if looked.is_err() && !newest {
            self.ledger.fence().await?;
            looked = self.look(&claimed, info).await;
        }
        match looked {
            Ok(proven) => {
                proven.registered.used.store(self.clock.now().millis(), Ordering::Relaxed);
                Ok(proven)
            }
            Err(locked) => {
                if let (Some(id), false) = (claimed.client(), locked) {
                    self.failed(&id, info).await;
                }
                self.counted.refused.with_label_values(&[if locked { "locked" } else { "client" }]).inc();
                Err(OAuthError::invalid_client(matches!(claimed, Claimed::Secret { basic: true, .. })))
            }
        }
    }

    /// The client, as far as this daemon knows. `Err(true)`: it is locked out.
    async fn look(&self, claimed: &Claimed, info: &RequestInfo) -> Result<Proven, bool> {
        let at = self.ledger.index();
        let proven = match claimed {
            Claimed::Secret { id, secret, .. } => self.secret(id, secret, at),
            Claimed::Assertion { assertion, id } => self.assertion(assertion, id.as_deref(), at).await,
        };
        // Looked at last, so that a lock-out takes the same time and is answered as a wrong secret is.
        let locked = claimed.client().is_some_and(|id| self.locked(&id, info));
        proven.filter(|_| !locked).ok_or(locked)
    }

    fn secret(&self, id: &str, secret: &str, at: i64) -> Option<Proven> {
        let found = self.snapshot.client(id);
        // The same work for an unknown client: no oracle in the time it takes.
        let kept = found.as_ref().and_then(|r| r.secret.as_deref()).unwrap_or(&[0; 32]);
        let now = self.clock.now();
        let before = found.as_ref().and_then(|r| r.previous.as_ref()).filter(|(_, until)| *until > now);
        let before = before.map_or(&[0; 32][..], |(digest, _)| digest);
        let shown = crypto::sha256(secret.as_bytes());
        let good = crypto::same(kept, &shown) | crypto::same(before, &shown);
        let fits = |r: &Arc<Registered>| good && !r.disabled && r.client.auth_method != AuthMethod::PrivateKeyJwt;
        found.filter(fits).map(|registered| Proven { registered, assertion: None, at })
    }

    /// Checks a client assertion (RFC 7523, 3). Whether it was used before is seen when it is used.
    async fn assertion(&self, text: &str, id: Option<&str>, at: i64) -> Option<Proven> {
        let header = jwt::header(text)?;
        // Typed otherwise, it was made for something else (RFC 8725, 3.11).
        if !matches!(header.typ.as_deref(), None | Some("JWT" | "jwt" | "client-authentication+jwt")) {
            return None;
        }
        let algorithm = match header.alg.as_str() {
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
        let kid = header.kid.as_deref();
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
        Some(Proven { registered, assertion, at })
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
