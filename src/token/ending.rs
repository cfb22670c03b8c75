//! Knowing and ending: introspection (RFC 7662), revocation (RFC 7009, and of families and all tokens of a client), clients that
//! are disabled.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::kernel::web::{Ask, Caller, RequestInfo};
use crate::kernel::{Refusal, Timestamp, ids, problem};
use crate::ledger::{AUTHZ, Command, Committed, Entry, Failure, Touch, Tx};

use super::form::{Form, OAuthError};
use super::jwt::Claims;
use super::prove::Proven;
use super::{Token, VERIFICATIONS, clients, store};

/// The longest a token may be good for: for so long it is remembered that one was revoked of which only the id is known.
pub(super) const LONGEST: Duration = Duration::from_secs(86_400);

/// What is to be ended.
#[derive(Clone, Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = RevocationRequest)]
pub(super) struct Wanted {
    /// A token; it and what it was exchanged for end
    #[serde(default)]
    pub token: Option<String>,
    /// With `token`: all that was exchanged for the token it comes from ends, and that one too
    #[serde(default)]
    pub family: bool,
    /// A client: all of its tokens end, and those others have in its name
    #[serde(default)]
    pub client_id: Option<String>,
    /// With `client_id`: only the token with this id (it is in the record of its issue), and what it was exchanged for
    #[serde(default)]
    pub jti: Option<String>,
    /// Why; kept in the record
    #[serde(default)]
    pub reason: Option<String>,
}

/// What was ended.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = Revocation)]
pub(super) struct Ended {
    /// The client whose token, or tokens, ended
    pub client_id: String,
    /// The token; all of them without it
    pub jti: Option<String>,
}

impl Token {
    /// `POST /oauth2/introspect` (RFC 7662). Right on the very next request after a revocation on any daemon: proving who asks
    /// looks up what is newest.
    pub(super) fn introspect(&self, form: &Form, proven: &Proven) -> Result<Value, OAuthError> {
        let token = form.get("token").ok_or_else(|| OAuthError::new("invalid_request", "token is missing"))?;
        let client = proven.client();
        self.spend(&client.client_id, VERIFICATIONS, client.allowance(&self.agents).verifications, 1)?;
        let Ok(verified) = self.verify(token) else { return Ok(json!({"active": false})) };
        let claims = &verified.claims;
        let who = &proven.client().client_id;
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
        if claims.client_id != proven.client().client_id {
            return Err(OAuthError::new("unauthorized_client", "the token was issued to another client"));
        }
        let revoke = Revoke::token(claims, &claims.jti, None);
        match self.ledger.write(&self.vouched(proven, info), &[], revoke).await {
            Err(r) if r.problem() != &problem::CONFLICT => Err(r.into()),
            _ => {
                self.counted.revoked.with_label_values(&["token"]).inc();
                Ok(())
            }
        }
    }

    /// Ends tokens that are others': one, a family, or all of a client, in one commit.
    pub(super) async fn end(&self, caller: &Caller, wanted: Wanted) -> Result<Committed<Ended>, Refusal> {
        for (at, value) in [("/client_id", &wanted.client_id), ("/jti", &wanted.jti)] {
            if let Some(fault) = value.as_deref().and_then(ids::id_fault) {
                return Err(Refusal::malformed(at, fault));
            }
        }
        let reason = wanted.reason.clone();
        let (client_id, revoke) = match (wanted.token, wanted.client_id) {
            (Some(token), None) if wanted.jti.is_none() => {
                let verified = self.verify(&token);
                let gone = |_| Refusal::not_found("such token, or it counts no more");
                let claims = &verified.map_err(gone)?.claims;
                let first = claims.family.first().filter(|_| wanted.family).unwrap_or(&claims.jti);
                (claims.sub.clone(), Some(Revoke::token(claims, first, reason.clone())))
            }
            (None, Some(client_id)) if !wanted.family => {
                let expires = self.clock.now().plus(LONGEST);
                let revoke =
                    wanted.jti.map(|jti| Revoke { jti, client_id: client_id.clone(), expires, reason: reason.clone() });
                (client_id, revoke)
            }
            _ => return Err(Refusal::malformed("", "name either a token (and family), or a client_id (and jti)")),
        };
        let ask = Self::about("token:revoke", &client_id);
        let (done, what) = match revoke {
            Some(revoke) => (self.ledger.write(caller, &[ask], revoke).await?, "token"),
            None => (self.ledger.write(caller, &[ask], RevokeAll { client_id, reason }).await?, "client"),
        };
        self.counted.revoked.with_label_values(&[what]).inc();
        Ok(done)
    }

    /// Disables a client, which ends its tokens, or enables it again.
    pub(super) async fn set_disabled(
        &self,
        caller: &Caller,
        client_id: String,
        disabled: bool,
        reason: Option<String>,
    ) -> Result<Committed<()>, Refusal> {
        let action = if disabled { "token:client-disable" } else { "token:client-enable" };
        let ask = Ask::new(action, "Client", client_id.clone());
        self.ledger.write(caller, &[ask], Disable { client_id, disabled, reason, action }).await
    }
}

fn because(entry: Entry, reason: Option<&String>) -> Entry {
    match reason {
        Some(reason) => entry.reason(reason.clone()),
        None => entry,
    }
}

/// Ends one token, and with it all that were exchanged for it.
struct Revoke {
    jti: String,
    client_id: String,
    expires: Timestamp,
    reason: Option<String>,
}

impl Revoke {
    /// `jti` is the token's, or that of one it comes from.
    fn token(claims: &Claims, jti: &str, reason: Option<String>) -> Self {
        let ends = Timestamp::from_millis(claims.exp * 1000);
        // The one it comes from may be good for longer.
        let expires = if jti == claims.jti { ends } else { ends.plus(LONGEST) };
        Self { jti: jti.to_owned(), client_id: claims.client_id.clone(), expires, reason }
    }
}

impl Command for Revoke {
    type Out = Ended;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Ended, Entry), Failure> {
        if store::revoked(tx.read(), &self.jti).await? {
            return Err(Refusal::new(&problem::CONFLICT, "it was revoked before").into());
        }
        let index = tx.index();
        store::revoke(tx.write(), &self.jti, &self.client_id, self.expires, index).await?;
        let entry = Entry::ok("token:revoke", format!("client/{}", self.client_id))
            .change("jti", self.jti.clone())
            .touch(Touch::key(AUTHZ, format!("token/{}", self.jti)));
        let ended = Ended { client_id: self.client_id.clone(), jti: Some(self.jti.clone()) };
        Ok((ended, because(entry, self.reason.as_ref())))
    }
}

/// Ends all tokens of a client that were issued before.
struct RevokeAll {
    client_id: String,
    reason: Option<String>,
}

impl Command for RevokeAll {
    type Out = Ended;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Ended, Entry), Failure> {
        let mut registered = clients::registered(tx, &self.client_id).await?;
        registered.void_index = tx.index();
        clients::keep(tx, &registered).await?;
        let entry = Entry::ok("token:revoke", format!("client/{}", self.client_id)).change("all", true);
        let entry = clients::facts(because(entry, self.reason.as_ref()), &registered.client);
        Ok((Ended { client_id: self.client_id.clone(), jti: None }, entry))
    }
}

/// Disables or enables a client.
struct Disable {
    client_id: String,
    disabled: bool,
    reason: Option<String>,
    action: &'static str,
}

impl Command for Disable {
    type Out = ();

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<((), Entry), Failure> {
        let mut registered = clients::registered(tx, &self.client_id).await?;
        if registered.disabled == self.disabled {
            let is = if self.disabled { "disabled" } else { "enabled" };
            return Err(Refusal::new(&problem::CONFLICT, format!("the client is {is} already")).into());
        }
        registered.disabled = self.disabled;
        if self.disabled {
            // Enabled again, it gets tokens anew; what was issued before stays ended.
            registered.void_index = tx.index();
        }
        clients::keep(tx, &registered).await?;
        let entry = Entry::ok(self.action, format!("client/{}", self.client_id));
        Ok(((), clients::facts(because(entry, self.reason.as_ref()), &registered.client)))
    }
}

/// A client whose registered scopes would let it ask about anyone's token.
fn may_introspect(proven: &Proven) -> bool {
    proven.client().scopes.iter().any(|s| matches!(s.as_str(), "admin" | "token" | "token:read"))
}
