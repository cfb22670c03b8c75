//! The token endpoint.

use std::sync::Arc;

use axum::http::HeaderMap;
use serde_json::{Value, json};

use crate::kernel::web::{Ask, Caller, RequestInfo};
use crate::kernel::{Refusal, ids, problem};
use crate::ledger::{Command, Entry, Failure, Record, Tx};

use super::form::{Form, OAuthError};
use super::jwt::{Audience, Claims};
use super::model::Client;
use super::prove::{self, Once, Proven};
use super::{GENERATIONS, Token, clients};

/// The grants there are.
pub(super) const CREDENTIALS: &str = "client_credentials";
pub(super) const EXCHANGE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";

/// Refusals that rest on what a client is registered for.
const REGISTERED: [&str; 3] = ["unauthorized_client", "invalid_scope", "invalid_target"];

impl Token {
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
        // What a token of one's own rests on is looked at again when its issue is recorded. If it has changed, or what this daemon
        // knows does not suffice, once more with what is newest; a token of another's is looked at with what is newest at once.
        let first = self.granted(grant, headers, form, &info, grant == EXCHANGE).await;
        match first {
            Err(e) if e.is_changed() || (grant != EXCHANGE && REGISTERED.contains(&e.code)) => {
                self.granted(grant, headers, form, &info, true).await
            }
            done => done,
        }
    }

    async fn granted(
        &self,
        grant: &str,
        headers: &HeaderMap,
        form: &Form,
        info: &Arc<RequestInfo>,
        newest: bool,
    ) -> Result<Value, OAuthError> {
        let proven = self.prove(headers, form, info, newest).await?;
        let info = info.clone();
        if !proven.client().grant_types.iter().any(|g| g == grant) {
            return Err(OAuthError::new("unauthorized_client", "the client is not registered for this grant"));
        }
        if grant == EXCHANGE { self.exchange(form, proven, info).await } else { self.own(form, proven, info).await }
    }

    /// A token for the client itself.
    async fn own(&self, form: &Form, proven: Proven, info: Arc<RequestInfo>) -> Result<Value, OAuthError> {
        let client = proven.client();
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
            aud: Audience::of(self.audience(form, client).await?),
            exp: now.seconds() + client.ttl(&self.agents, self.ttl),
            iat: now.seconds(),
            jti: ids::new_id(now).to_string(),
            client_id: client.client_id.clone(),
            scope: scopes.join(" "),
            act: None,
            sop_index: proven.at,
            family: Vec::new(),
        };
        let caller = self.vouched(&proven, info);
        self.give(&caller, &[], claims, proven, CREDENTIALS).await
    }

    /// The audiences asked for (RFC 8707, and `audience` of RFC 8693); the daemon itself if none is.
    pub(super) async fn audience(&self, form: &Form, client: &Client) -> Result<Vec<String>, OAuthError> {
        let mut audience: Vec<String> = form.all("resource").map(str::to_owned).collect();
        let named = form.get("audience").filter(|_| form.get("grant_type") == Some(EXCHANGE));
        for target in audience.iter().map(String::as_str).chain(named) {
            let allowed = client.allowed_resources.as_ref().is_none_or(|all| all.iter().any(|a| a == target));
            let known = absolute(target)
                || (named == Some(target) && self.snapshot.has_client(target))
                || self.is_service(target).await?;
            if !allowed || !known {
                return Err(OAuthError::new(
                    "invalid_target",
                    format!(
                        "{target:?} is no audience this client may ask for: an absolute URI without fragment, a registered service, or, in an exchange, a client"
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

    /// Whether there is an instance of a service of this name.
    async fn is_service(&self, name: &str) -> Result<bool, Refusal> {
        match self.services.get() {
            Some(services) if ids::name_fault(name).is_none() => services.registered(name).await,
            _ => Ok(false),
        }
    }

    /// Records a token, and signs it meanwhile.
    pub(super) async fn give(
        &self,
        caller: &Caller,
        asks: &[Ask],
        claims: Claims,
        proven: Proven,
        grant: &'static str,
    ) -> Result<Value, OAuthError> {
        let client = proven.client();
        let allowed = client.allowance(&self.agents).generations;
        self.spend(&client.client_id, GENERATIONS, allowed, 1)?;
        let alg = client.access_token_alg;
        let signer = || {
            let key = self.snapshot.signer(alg, self.clock.now());
            key.ok_or_else(|| Refusal::unavailable("there is no signing key yet"))
        };
        let key = signer()?;
        let entry = issued(&claims);
        let recorded = async {
            match proven.assertion {
                None => self.ledger.write(caller, asks, Record(entry)).await,
                Some(assertion) => self.ledger.write(caller, asks, Issue { entry, assertion }).await,
            }
        };
        // It is signed while its issue is committed, and given out when it is.
        let (done, signed) = tokio::join!(recorded, async { key.sign(&claims) });
        match done {
            Ok(_) => {}
            Err(r) if r.problem() == &problem::CONFLICT => {
                self.counted.refused.with_label_values(&["replay"]).inc();
                return Err(OAuthError::invalid_client(false));
            }
            Err(r) if r.problem() == &problem::UNAUTHENTICATED => return Err(OAuthError::changed()),
            Err(r) => return Err(r.into()),
        }
        // The keys are among what it rests on: at the commit they were those that this daemon knows now.
        let now = signer()?;
        let token = if now.kid() == key.kid() { signed? } else { now.sign(&claims)? };
        self.counted.issued.with_label_values(&[grant.rsplit(':').next().unwrap_or(grant)]).inc();
        Ok(
            json!({"access_token": token, "token_type": "Bearer", "expires_in": claims.exp - claims.iat, "scope": claims.scope}),
        )
    }

    /// Asks the policy about a client's registration.
    pub(super) fn about(action: &'static str, client_id: &str) -> Ask {
        Ask::new(action, "Client", client_id)
    }
}

/// An absolute URI without fragment (RFC 8707, 2).
fn absolute(uri: &str) -> bool {
    let Some((scheme, rest)) = uri.split_once(':') else { return false };
    let scheme_fits = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
    scheme_fits && !rest.is_empty() && !uri.contains('#') && uri.bytes().all(|b| (0x21..0x7f).contains(&b))
}

/// The entry of an issue: it is in the record before the token is given out.
fn issued(claims: &Claims) -> Entry {
    let action = if claims.act.is_some() { "token:exchange" } else { "token:issue" };
    let entry = Entry::ok(action, format!("client/{}", claims.sub))
        .change("jti", claims.jti.clone())
        .change("scope", claims.scope.clone());
    match &claims.act {
        Some(act) => entry
            .change("act", act.chain().map(str::to_owned).collect::<Vec<_>>())
            .change("family", claims.family.clone()),
        None => entry,
    }
}

/// The issue of a token to who proved itself by an assertion, which is used up by it.
struct Issue {
    entry: Entry,
    assertion: Once,
}

impl Command for Issue {
    type Out = ();

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<((), Entry), Failure> {
        prove::use_up(tx, &self.assertion).await?;
        Ok(((), self.entry.clone()))
    }
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
