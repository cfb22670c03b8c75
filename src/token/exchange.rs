//! Token exchange (RFC 8693): a client that was handed a token gets one of its own for the same subject, never for more than
//! that token was good for, and with everyone it passed through named in it.

use std::sync::Arc;

use serde_json::Value;

use crate::kernel::web::{Ask, Caller, Identity, RequestInfo};
use crate::kernel::{Refusal, ids};

use super::form::{Form, OAuthError};
use super::jwt::{Act, Audience, Claims};
use super::model::Client;
use super::oauth::EXCHANGE;
use super::prove::{self, Proven};
use super::{Token, Verified, clients};

/// The types of token that are taken and given (RFC 8693, 3): ours are both.
const ACCESS_TOKEN: &str = "urn:ietf:params:oauth:token-type:access_token";
const JWT: &str = "urn:ietf:params:oauth:token-type:jwt";
/// Clients that may act one for another, at most: each makes the token, and what its validity rests on, longer.
const DEEPEST: usize = 5;

fn invalid(what: impl Into<String>) -> OAuthError {
    OAuthError::new("invalid_request", what)
}

impl Token {
    /// A token for the subject of the one that was handed over.
    pub(super) async fn exchange(
        &self,
        form: &Form,
        proven: Proven,
        info: Arc<RequestInfo>,
    ) -> Result<Value, OAuthError> {
        if form.get("requested_token_type").is_some_and(|t| t != ACCESS_TOKEN && t != JWT) {
            return Err(invalid("requested_token_type: only access tokens are issued"));
        }
        let client = proven.client();
        let subject = self.shown(form, "subject_token", client)?.ok_or_else(|| invalid("subject_token is missing"))?;
        let actor = self.shown(form, "actor_token", client)?;
        let from = &subject.claims;
        let scope = match form.get("scope") {
            None => from.scope.clone(),
            Some(text) => narrowed(text, &from.scope)?,
        };
        let now = self.clock.now();
        let by = actor.as_ref().map_or(client.client_id.as_str(), |a| a.claims.sub.as_str());
        let act = Act { sub: by.to_owned(), act: from.act.clone().map(Box::new) };
        if act.depth() > DEEPEST {
            return Err(invalid(format!("the token has passed through {DEEPEST} clients already")));
        }
        let mut family = from.family.clone();
        family.push(from.jti.clone());
        let mut exp = from.exp.min(now.seconds() + client.ttl(&self.agents, self.ttl));
        if let Some(actor) = &actor {
            family.extend(actor.claims.family.iter().cloned());
            family.push(actor.claims.jti.clone());
            exp = exp.min(actor.claims.exp);
        }
        family.dedup();
        let claims = Claims {
            iss: self.issuer.to_string(),
            sub: from.sub.clone(),
            aud: Audience::of(self.audience(form, client).await?),
            exp,
            iat: now.seconds(),
            jti: ids::new_id(now).to_string(),
            client_id: client.client_id.clone(),
            scope,
            act: Some(act),
            sop_index: proven.at,
            family,
        };
        let caller = self.exchanger(client, &subject, info)?;
        let ask = Ask::new("token:exchange", "Client", claims.sub.clone());
        let mut given = self.give(&caller, &[ask], claims, proven, EXCHANGE).await?;
        given["issued_token_type"] = ACCESS_TOKEN.into();
        Ok(given)
    }

    /// A token of the form: one of ours, for this client or for the daemon itself.
    fn shown(&self, form: &Form, name: &str, client: &Client) -> Result<Option<Arc<Verified>>, OAuthError> {
        let kind = format!("{name}_type");
        let Some(token) = form.get(name) else {
            return match form.get(&kind) {
                Some(_) => Err(invalid(format!("{kind} without {name}"))),
                None => Ok(None),
            };
        };
        match form.get(&kind) {
            Some(ACCESS_TOKEN | JWT) => {}
            Some(_) => return Err(invalid(format!("{kind}: only access tokens of this issuer are taken"))),
            None => return Err(invalid(format!("{kind} is missing"))),
        }
        let verified = self.verify(token).ok();
        let fits = |v: &Arc<Verified>| v.claims.aud.names(&self.issuer) || v.claims.aud.names(&client.client_id);
        verified
            .filter(fits)
            .map(Some)
            .ok_or_else(|| invalid(format!("{name} is not valid (any more), or not for you")))
    }

    /// The exchanging client as policies see it. What it does rests on the token it was handed.
    fn exchanger(&self, client: &Client, subject: &Verified, info: Arc<RequestInfo>) -> Result<Caller, Refusal> {
        let authority = self.authority.get().and_then(std::sync::Weak::upgrade);
        let authority = authority.ok_or_else(|| Refusal::unavailable("the daemon is starting or stopping"))?;
        let mut credential = subject.bearer.credential.clone();
        if let Some(shown) = &mut credential {
            shown.depends.push(prove::fact(&client.client_id));
        }
        let identity = Identity {
            actor: client.client_id.as_str().into(),
            principal: client.entity(),
            scopes: client.scopes.clone(),
            credential,
            via: Vec::new(),
        };
        Ok(Caller::new(Arc::new(identity), info, authority))
    }
}

/// The scopes asked for, if the token has all of them.
fn narrowed(wanted: &str, have: &str) -> Result<String, OAuthError> {
    let have: Vec<&str> = have.split(' ').collect();
    let wanted = clients::scopes(wanted).filter(|w| w.iter().all(|s| have.contains(&s.as_str())));
    let wanted = wanted.ok_or_else(|| OAuthError::new("invalid_scope", "the token has not every scope asked for"))?;
    Ok(wanted.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_only_narrow() {
        assert_eq!(narrowed("b a", "a b c").unwrap(), "b a");
        assert_eq!(narrowed("a d", "a b").err().map(|e| e.code), Some("invalid_scope"));
    }
}
