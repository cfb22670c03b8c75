//! The token endpoint, introspection and revocation.

use std::sync::Arc;

use axum::http::HeaderMap;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::kernel::crypto;
use crate::kernel::web::{Ask, Caller, RequestInfo};
use crate::kernel::{Refusal, Timestamp, ids, problem};
use crate::ledger::{AUTHZ, Command, Entry, Failure, Touch, Tx};

use super::form::{Claimed, Form, OAuthError};
use super::jwt::{self, Audience, Claims, LEEWAY};
use super::model::{AuthMethod, Client, entity};
use super::{Token, clients, store};

/// The longest an assertion may be good for, seconds: that long its id is remembered.
const ASSERTION_MOST: i64 = 3600;

/// The grants there are.
pub(super) const CREDENTIALS: &str = "client_credentials";
pub(super) const EXCHANGE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";

/// A client that has proven who it is.
pub(super) struct Proven {
    pub client: Client,
    /// The assertion it used: the digest of its id, and when it ends.
    assertion: Option<([u8; 32], Timestamp)>,
}

impl Proven {
    /// As the record and policies see it.
    pub fn caller(&self, info: Arc<RequestInfo>) -> Caller {
        Caller::vouched(entity(&self.client.client_id), info)
    }
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
                let kept = found.as_ref().and_then(|r| r.secret.clone()).unwrap_or_else(|| vec![0; 32]);
                let now = self.clock.now();
                let before = found.as_ref().and_then(|r| r.previous.clone()).filter(|(_, until)| *until > now);
                let before = before.map_or_else(|| vec![0; 32], |(digest, _)| digest);
                let shown = crypto::sha256(secret.as_bytes());
                let good = crypto::same(&kept, &shown) | crypto::same(&before, &shown);
                let client = found.filter(|_| good).map(|r| r.client);
                let fits = |c: &Client| {
                    if *basic {
                        c.auth_method == AuthMethod::ClientSecretBasic || c.auth_method == AuthMethod::ClientSecretPost
                    } else {
                        c.auth_method != AuthMethod::PrivateKeyJwt
                    }
                };
                client.filter(fits).map(|client| Proven { client, assertion: None }).ok_or(*basic)
            }
            Claimed::Assertion { assertion, id } => self.assertion(assertion, id.as_deref()).ok_or(false),
        };
        // Looked at last, so that a lock-out takes the same time and is answered as a wrong secret is.
        let id = claimed.client();
        let locked = id.as_deref().is_some_and(|id| self.locked(id, info));
        match proven {
            Ok(proven) if !locked => Ok(proven),
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
    fn assertion(&self, text: &str, id: Option<&str>) -> Option<Proven> {
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
        let client = self.snapshot.client(&claimed.iss)?.client;
        let same = claimed.iss == claimed.sub && id.is_none_or(|id| id == claimed.iss);
        if !same || client.auth_method != AuthMethod::PrivateKeyJwt {
            return None;
        }
        let kid = header.get("kid").and_then(Value::as_str);
        let keys = client.jwks.as_ref()?["keys"].as_array()?;
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
        Some(Proven { client, assertion: Some((digest, Timestamp::from_millis(claimed.exp * 1000))) })
    }

    /// `POST /oauth2/token`.
    pub(super) async fn grant(
        &self,
        headers: &HeaderMap,
        form: &Form,
        info: Arc<RequestInfo>,
    ) -> Result<Value, OAuthError> {
        let grant =
            form.get("grant_type").ok_or_else(|| OAuthError::new("invalid_request", "grant_type is missing"))?;
        if grant != CREDENTIALS && grant != EXCHANGE {
            return Err(OAuthError::new("unsupported_grant_type", format!("grant type {grant:?} is not supported")));
        }
        let proven = self.prove(headers, form, &info).await?;
        if !proven.client.grant_types.iter().any(|g| g == grant) {
            return Err(OAuthError::new("unauthorized_client", "the client is not registered for this grant"));
        }
        if grant == EXCHANGE { self.exchange(form, proven, info).await } else { self.own(form, proven, info).await }
    }

    /// A token for the client itself.
    async fn own(&self, form: &Form, proven: Proven, info: Arc<RequestInfo>) -> Result<Value, OAuthError> {
        let client = &proven.client;
        let scopes = match form.get("scope") {
            None => client.scopes.clone(),
            Some(text) => {
                clients::scopes(text).filter(|wanted| wanted.iter().all(|s| client.scopes.contains(s))).ok_or_else(
                    || OAuthError::new("invalid_scope", "the client is not registered for every scope it asks for"),
                )?
            }
        };
        let now = self.clock.now();
        let claims = Claims {
            iss: self.issuer.to_string(),
            sub: client.client_id.clone(),
            aud: Audience::of(self.audience(form, client)?),
            exp: now.seconds() + i64::try_from(self.ttl.as_secs()).unwrap_or(900),
            iat: now.seconds(),
            jti: ids::new_id(now).to_string(),
            client_id: client.client_id.clone(),
            scope: scopes.join(" "),
            act: None,
            family: Vec::new(),
        };
        let caller = proven.caller(info);
        self.give(&caller, &[], claims, proven, CREDENTIALS).await
    }

    /// The audiences asked for (RFC 8707, and `audience` of RFC 8693); the daemon itself if none is.
    pub(super) fn audience(&self, form: &Form, client: &Client) -> Result<Vec<String>, OAuthError> {
        let mut audience: Vec<String> = form.all("resource").map(str::to_owned).collect();
        let named = form.get("audience").filter(|_| form.get("grant_type") == Some(EXCHANGE));
        for target in audience.iter().map(String::as_str).chain(named) {
            let allowed = client.allowed_resources.as_ref().is_none_or(|all| all.iter().any(|a| a == target));
            let known = absolute(target) || (named == Some(target) && self.snapshot.has_client(target));
            if !allowed || !known {
                return Err(OAuthError::new(
                    "invalid_target",
                    format!(
                        "{target:?} is no audience this client may ask for: an absolute URI without fragment, or, in an exchange, a client"
                    ),
                ));
            }
        }
        audience.extend(named.map(str::to_owned));
        if audience.is_empty() {
            audience.push(self.issuer.to_string());
        }
        Ok(audience)
    }

    /// Records a token, then signs it.
    pub(super) async fn give(
        &self,
        caller: &Caller,
        asks: &[Ask],
        claims: Claims,
        proven: Proven,
        grant: &'static str,
    ) -> Result<Value, OAuthError> {
        let now = self.clock.now();
        let key = self.snapshot.signer(proven.client.access_token_alg, now);
        let key = key.ok_or_else(|| Refusal::unavailable("there is no signing key yet"))?;
        let issue = Issue { claims, assertion: proven.assertion };
        let claims = issue.claims.clone();
        match self.ledger.write(caller, asks, issue).await {
            Ok(_) => {}
            Err(r) if r.problem() == &problem::CONFLICT => {
                self.counted.refused.with_label_values(&["replay"]).inc();
                return Err(OAuthError::invalid_client(false));
            }
            Err(r) => return Err(r.into()),
        }
        self.counted.issued.with_label_values(&[grant.rsplit(':').next().unwrap_or(grant)]).inc();
        Ok(
            json!({"access_token": key.sign(&claims)?, "token_type": "Bearer", "expires_in": claims.exp - claims.iat, "scope": claims.scope}),
        )
    }

    /// `POST /oauth2/introspect` (RFC 7662). Right on the very next request after a revocation on any daemon: proving who asks
    /// looks up what is newest.
    pub(super) fn introspect(&self, form: &Form, proven: &Proven) -> Result<Value, OAuthError> {
        let token = form.get("token").ok_or_else(|| OAuthError::new("invalid_request", "token is missing"))?;
        let Ok(verified) = self.verify(token) else { return Ok(json!({"active": false})) };
        let claims = &verified.claims;
        let who = &proven.client.client_id;
        let concerned = claims.client_id == *who || claims.aud.names(who) || may_introspect(proven);
        if !concerned {
            return Ok(json!({"active": false}));
        }
        let mut shown = serde_json::to_value(claims).map_err(Refusal::internal)?;
        shown["active"] = json!(true);
        shown["token_type"] = json!("Bearer");
        Ok(shown)
    }

    /// `POST /oauth2/revoke` (RFC 7009): a token that is not known is as good as revoked.
    pub(super) async fn revoke(&self, form: &Form, proven: &Proven, info: Arc<RequestInfo>) -> Result<(), OAuthError> {
        let token = form.get("token").ok_or_else(|| OAuthError::new("invalid_request", "token is missing"))?;
        let Ok(verified) = self.verify(token) else { return Ok(()) };
        let claims = &verified.claims;
        if claims.client_id != proven.client.client_id {
            return Err(OAuthError::new("unauthorized_client", "the token was issued to another client"));
        }
        let revoke = Revoke {
            jti: claims.jti.clone(),
            client_id: claims.client_id.clone(),
            expires: Timestamp::from_millis(claims.exp * 1000),
        };
        match self.ledger.write(&proven.caller(info), &[], revoke).await {
            Err(r) if r.problem() != &problem::CONFLICT => Err(r.into()),
            _ => Ok(()),
        }
    }

    /// Asks the policy about a client's registration.
    pub(super) fn about(action: &'static str, client_id: &str) -> Ask {
        Ask::new(action, "Client", client_id)
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

/// An absolute URI without fragment (RFC 8707, 2).
fn absolute(uri: &str) -> bool {
    let Some((scheme, rest)) = uri.split_once(':') else { return false };
    let scheme_fits = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
    scheme_fits && !rest.is_empty() && !uri.contains('#') && uri.bytes().all(|b| (0x21..0x7f).contains(&b))
}

/// The issue of a token: in the record before the token is given out.
struct Issue {
    claims: Claims,
    assertion: Option<([u8; 32], Timestamp)>,
}

impl Command for Issue {
    type Out = ();

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<((), Entry), Failure> {
        let claims = &self.claims;
        if !store::client_exists(tx.read(), &claims.client_id).await? {
            return Err(Refusal::new(&problem::CONFLICT, "the client was deleted").into());
        }
        if let Some((digest, expires)) = &self.assertion {
            if store::assertion_used(tx.read(), digest).await? {
                return Err(Refusal::new(&problem::CONFLICT, "the assertion was used before").into());
            }
            store::use_assertion(tx.write(), digest, *expires).await?;
        }
        let action = if claims.act.is_some() { "token:exchange" } else { "token:issue" };
        let mut entry = Entry::ok(action, format!("client/{}", claims.sub))
            .change("jti", claims.jti.clone())
            .change("scope", claims.scope.clone());
        if let Some(act) = &claims.act {
            entry = entry
                .change("act", act.chain().map(str::to_owned).collect::<Vec<_>>())
                .change("family", claims.family.clone());
        }
        Ok(((), entry))
    }
}

struct Revoke {
    jti: String,
    client_id: String,
    expires: Timestamp,
}

impl Command for Revoke {
    type Out = ();

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<((), Entry), Failure> {
        if store::revoked(tx.read(), &self.jti).await? {
            return Err(Refusal::new(&problem::CONFLICT, "it was revoked before").into());
        }
        let index = tx.index();
        store::revoke(tx.write(), &self.jti, &self.client_id, self.expires, index).await?;
        let entry = Entry::ok("token:revoke", format!("client/{}", self.client_id))
            .change("jti", self.jti.clone())
            .touch(Touch::key(AUTHZ, format!("token/{}", self.jti)));
        Ok(((), entry))
    }
}

/// A client whose registered scopes would let it ask about anyone's token.
fn may_introspect(proven: &Proven) -> bool {
    proven.client.scopes.iter().any(|s| matches!(s.as_str(), "admin" | "token" | "token:read"))
}

#[cfg(test)]
mod tests {
    use super::absolute;

    #[test]
    fn audiences_are_absolute_uris() {
        assert!(absolute("https://api.example/x") && absolute("urn:x:y"));
        for bad in ["", "x", "/x", "https://a#b", ":x", "1a:b", "a:", "https://a b"] {
            assert!(!absolute(bad), "{bad}");
        }
    }
}
