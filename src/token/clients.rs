//! Registration (RFC 7591) and its management (RFC 7592).

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::config::Agents;
use crate::governance::entities;
use crate::kernel::crypto::{self, sha256};
use crate::kernel::{Refusal, Timestamp, ids, problem};
use crate::ledger::{AUTHZ, Command, Entry, Failure, Touch, Tx};

use super::Token;
use super::form::OAuthError;
use super::jwks;
use super::keys::Alg;
use super::model::{AgentType, AuthMethod, Client, Limited, of_type};
use super::oauth::{CREDENTIALS, EXCHANGE};
use super::store::{self, Registered};

/// What a client asks to be registered as. Metadata we do not know is ignored, as RFC 7591 says.
#[derive(Clone, Debug, Default, Deserialize, utoipa::ToSchema)]
pub struct Metadata {
    /// What people call it
    #[serde(default)]
    client_name: Option<String>,
    /// `system`, `user`, `external` (the default) or `cognitive`
    #[serde(default)]
    agent_type: Option<AgentType>,
    /// Scopes, separated by spaces
    #[serde(default)]
    scope: Option<String>,
    /// `client_credentials` (the default), `urn:ietf:params:oauth:grant-type:token-exchange`
    #[serde(default)]
    grant_types: Option<Vec<String>>,
    /// `client_secret_basic` (the default), `client_secret_post` or `private_key_jwt`
    #[serde(default)]
    token_endpoint_auth_method: Option<String>,
    /// Public keys, for `private_key_jwt`
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    jwks: Option<Value>,
    /// Where the public keys are, instead of `jwks`: https, at a public address
    #[serde(default)]
    jwks_uri: Option<String>,
    /// How its access tokens are signed: `EdDSA` (the default) or `ES256`
    #[serde(default)]
    access_token_signed_response_alg: Option<String>,
    /// Audiences its tokens may be for
    #[serde(default)]
    allowed_resources: Option<Vec<String>>,
    /// How long its tokens are good, seconds, 1-86,400; as long as its type's without it
    #[serde(default)]
    access_token_ttl: Option<i64>,
    /// What it may have, if not what its type may
    #[serde(default)]
    limits: Option<Limited>,
}

fn invalid(what: impl Into<String>) -> OAuthError {
    OAuthError::new("invalid_client_metadata", what)
}

impl Metadata {
    /// The client it describes.
    ///
    /// # Errors
    /// `invalid_client_metadata`.
    pub fn client(self, client_id: String, room: &Token) -> Result<Client, OAuthError> {
        let now = room.clock.now();
        self.settled(client_id, &room.agents, room.private, now)
    }

    fn settled(self, client_id: String, agents: &Agents, private: bool, now: Timestamp) -> Result<Client, OAuthError> {
        let client_name = self.client_name.clone().unwrap_or_else(|| client_id.clone());
        if let Some(fault) = ids::id_fault(&client_name) {
            return Err(invalid(format!("client_name: {fault}")));
        }
        let auth_method = match self.token_endpoint_auth_method.as_deref() {
            None | Some("client_secret_basic") => AuthMethod::ClientSecretBasic,
            Some("client_secret_post") => AuthMethod::ClientSecretPost,
            Some("private_key_jwt") => AuthMethod::PrivateKeyJwt,
            Some(other) => return Err(invalid(format!("token_endpoint_auth_method {other} is not supported"))),
        };
        self.check_keys(auth_method, private)?;
        let grant_types = self.grant_types.unwrap_or_else(|| vec![CREDENTIALS.to_owned()]);
        if let Some(other) = grant_types.iter().find(|g| ![CREDENTIALS, EXCHANGE].contains(&g.as_str())) {
            return Err(invalid(format!("grant type {other} is not supported")));
        }
        let agent_type = self.agent_type.unwrap_or_default();
        let scopes = scopes(self.scope.as_deref().unwrap_or(&of_type(agents, agent_type).scope))
            .ok_or_else(|| invalid("scope has a character that a scope cannot have"))?;
        if self.access_token_ttl.is_some_and(|ttl| !(1..=86_400).contains(&ttl)) {
            return Err(invalid("access_token_ttl is from 1 to 86400 seconds"));
        }
        let alg = self.access_token_signed_response_alg.as_deref();
        let access_token_alg = alg
            .map_or(Some(Alg::default()), Alg::parse)
            .ok_or_else(|| invalid("access_token_signed_response_alg is EdDSA or ES256"))?;
        Ok(Client {
            access_token_alg,
            client_id,
            client_name,
            agent_type,
            scopes,
            grant_types,
            auth_method,
            jwks: self.jwks,
            jwks_uri: self.jwks_uri,
            allowed_resources: self.allowed_resources,
            access_token_ttl: self.access_token_ttl,
            limits: self.limits,
            issued: now,
        })
    }
}

impl Metadata {
    /// Whether its keys are such that it can prove itself by them.
    fn check_keys(&self, method: AuthMethod, private: bool) -> Result<(), OAuthError> {
        let keys = self.jwks.as_ref().and_then(|j| j["keys"].as_array()).filter(|k| !k.is_empty());
        if self.jwks.is_some() && self.jwks_uri.is_some() {
            return Err(invalid("jwks and jwks_uri exclude each other"));
        }
        if let Some(fault) = self.jwks_uri.as_deref().and_then(|uri| jwks::fault(uri, private)) {
            return Err(invalid(format!("jwks_uri: {fault}")));
        }
        if method == AuthMethod::PrivateKeyJwt && keys.is_none() && self.jwks_uri.is_none() {
            return Err(invalid("private_key_jwt needs jwks with at least one key, or jwks_uri"));
        }
        let secret = |k: &Value| ["d", "p", "q", "k"].iter().any(|m| k.get(m).is_some());
        if keys.is_some_and(|k| k.iter().any(secret)) {
            return Err(invalid("jwks holds a private key; send public keys only"));
        }
        Ok(())
    }
}

/// The scopes of a list (RFC 6749, 3.3), each once.
#[must_use]
pub fn scopes(text: &str) -> Option<Vec<String>> {
    let mut out: Vec<String> = Vec::new();
    for scope in text.split(' ').filter(|s| !s.is_empty()) {
        let fits = scope.bytes().all(|b| b == 0x21 || (0x23..=0x5b).contains(&b) || (0x5d..=0x7e).contains(&b));
        if !fits || scope.len() > 256 {
            return None;
        }
        if !out.iter().any(|s| s == scope) {
            out.push(scope.to_owned());
        }
    }
    Some(out)
}

/// A secret: 256 random bits.
///
/// # Errors
/// When the operating system has none.
pub fn secret() -> Result<String, Refusal> {
    Ok(crypto::base64url(crypto::random::<32>()?))
}

/// What is answered about a registration.
#[must_use]
pub fn shown(client: &Client, url: &str) -> Value {
    let method = serde_json::to_value(client.auth_method).unwrap_or_default();
    let mut shown = json!({
        "client_id": client.client_id, "client_name": client.client_name, "agent_type": client.agent_type,
        "access_token_signed_response_alg": client.access_token_alg,
        "scope": client.scope(), "grant_types": client.grant_types, "token_endpoint_auth_method": method,
        "client_id_issued_at": client.issued.seconds(),
        "registration_client_uri": format!("{url}/oauth2/register/{}", client.client_id),
    });
    if let Some(jwks) = &client.jwks {
        shown["jwks"] = jwks.clone();
    }
    if let Some(uri) = &client.jwks_uri {
        shown["jwks_uri"] = json!(uri);
    }
    if let Some(ttl) = client.access_token_ttl {
        shown["access_token_ttl"] = json!(ttl);
    }
    if let Some(limits) = &client.limits {
        shown["limits"] = json!(limits);
    }
    if let Some(allowed) = &client.allowed_resources {
        shown["allowed_resources"] = json!(allowed);
    }
    shown
}

/// What an entry about a client touches.
pub(super) fn facts(entry: Entry, client: &Client) -> Entry {
    entry.touch(Touch::key(AUTHZ, format!("client/{}", client.client_id))).touch(entities::touch(&client.entity()))
}

/// A client as it is.
pub(super) async fn registered(tx: &mut Tx<'_>, client_id: &String) -> Result<Registered, Failure> {
    let found = store::some_clients(tx.read(), std::slice::from_ref(client_id)).await?.pop();
    Ok(found.ok_or_else(|| Refusal::not_found("such client"))?)
}

/// Keeps a client, and its entity.
pub(super) async fn keep(tx: &mut Tx<'_>, registered: &Registered) -> Result<(), Failure> {
    let client = &registered.client;
    let index = tx.index();
    store::put_client(tx.write(), registered, index).await?;
    let attrs = json!({"name": client.client_name, "scopes": client.scopes, "agent_type": client.agent_type.as_str()});
    let role = |s: &String| crate::kernel::web::EntityName { kind: "Sop::Role".to_owned(), id: s.clone() };
    let roles: Vec<_> = client.scopes.iter().map(role).collect();
    entities::upsert(tx, &client.entity(), &attrs, &roles).await?;
    Ok(())
}

/// What a registration commits to: the client, with its new secrets for the one answer that shows them.
#[derive(Clone, Serialize, Deserialize)]
pub struct Issued {
    /// The client.
    pub client: Client,
    /// Its secret, if it has one.
    pub secret: Option<String>,
    /// The registration access token.
    pub registration: String,
}

/// Why a client is registered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// Somebody who may has asked.
    Asked,
    /// There is no client at all: the first administrator.
    First,
    /// An operator at the machine has lost every other way in.
    Recovery,
}

/// Registers a client.
pub(super) struct Register {
    pub issued: Issued,
    pub why: Why,
}

impl Command for Register {
    type Out = Issued;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Issued, Entry), Failure> {
        let client = &self.issued.client;
        if store::client_exists(tx.read(), &client.client_id).await?
            || (self.why == Why::First && !store::clients(tx.read()).await?.is_empty())
        {
            return Err(Refusal::new(&problem::CONFLICT, "the client exists").into());
        }
        let registered = Registered {
            client: client.clone(),
            secret: self.issued.secret.as_ref().map(|s| sha256(s.as_bytes()).to_vec()),
            previous: None,
            registration: sha256(self.issued.registration.as_bytes()).to_vec(),
            disabled: false,
            void_index: -1,
            index: tx.index(),
            used: Arc::default(),
        };
        keep(tx, &registered).await?;
        let resource = format!("client/{}", client.client_id);
        let entry = match self.why {
            Why::Recovery => Entry::ok("token:recover", resource)
                .reason("an operator at the machine made an administrator although there is one")
                .signal("critical", "token/recover"),
            Why::Asked | Why::First => Entry::ok("token:register", resource),
        };
        let entry = entry
            .change("name", client.client_name.clone())
            .change("scope", client.scope())
            .change("agent_type", client.agent_type.as_str());
        Ok((self.issued.clone(), facts(entry, client)))
    }
}

/// Replaces a registration; id, secret and registration token stay.
pub(super) struct Update {
    pub client: Client,
}

impl Command for Update {
    type Out = Client;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Client, Entry), Failure> {
        let was = registered(tx, &self.client.client_id).await?;
        self.client.issued = was.client.issued;
        let registered = Registered { client: self.client.clone(), ..was };
        keep(tx, &registered).await?;
        let entry = Entry::ok("token:client-update", format!("client/{}", self.client.client_id))
            .change("scope", self.client.scope());
        Ok((self.client.clone(), facts(entry, &self.client)))
    }
}

/// Replaces a client's secret; the one before counts for a while.
pub(super) struct Replace {
    pub client_id: String,
    pub secret: String,
    pub overlap: Duration,
}

/// A new secret, for the one answer that shows it.
#[derive(Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = ClientSecret)]
pub struct Replaced {
    /// The client
    pub client_id: String,
    /// Its new secret, shown once
    pub client_secret: String,
    /// Until when the one before counts
    #[schema(value_type = String)]
    pub previous_expires_at: Timestamp,
}

impl Command for Replace {
    type Out = Replaced;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Replaced, Entry), Failure> {
        let was = registered(tx, &self.client_id).await?;
        let Some(before) = was.secret.clone() else {
            return Err(
                Refusal::new(&problem::CONFLICT, "this client has no secret: it proves itself by its keys").into()
            );
        };
        let until = tx.now().plus(self.overlap);
        let secret = Some(sha256(self.secret.as_bytes()).to_vec());
        let registered = Registered { secret, previous: Some((before, until)), ..was };
        keep(tx, &registered).await?;
        let entry = Entry::ok("token:secret-rotate", format!("client/{}", self.client_id))
            .change("previous_expires_at", until.to_string());
        let replaced = Replaced {
            client_id: self.client_id.clone(),
            client_secret: self.secret.clone(),
            previous_expires_at: until,
        };
        Ok((replaced, facts(entry, &registered.client)))
    }
}

/// Deletes a client; its tokens end with it.
pub(super) struct Delete {
    pub client_id: String,
}

impl Command for Delete {
    type Out = ();

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<((), Entry), Failure> {
        let was = registered(tx, &self.client_id).await?;
        store::delete_client(tx.write(), &self.client_id).await?;
        entities::remove(tx, &was.client.entity()).await?;
        Ok(((), facts(Entry::ok("token:client-delete", format!("client/{}", self.client_id)), &was.client)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_are_rfc_6749_s() {
        assert_eq!(scopes("a b  a").unwrap(), ["a", "b"]);
        assert_eq!(scopes("").unwrap(), Vec::<String>::new());
        assert!(scopes("a\"b").is_none() && scopes("a\\").is_none() && scopes("ä").is_none());
    }

    #[test]
    fn metadata_that_cannot_be_is_refused() {
        let agents = crate::config::load(None, &[]).unwrap().config.token.agents;
        let client = |v: Value| {
            serde_json::from_value::<Metadata>(v).unwrap().settled(
                "c".into(),
                &agents,
                false,
                Timestamp::from_millis(0),
            )
        };
        let by_type = |kind: &str| client(json!({"agent_type": kind})).unwrap().scope();
        assert_eq!((by_type("system").as_str(), by_type("external").as_str()), ("state nexus health", ""));
        assert!(client(json!({"client_name": "x", "redirect_uris": ["http://unknown"]})).is_ok());
        for bad in [
            json!({"token_endpoint_auth_method": "private_key_jwt"}),
            json!({"token_endpoint_auth_method": "none"}),
            json!({"grant_types": ["password"]}),
            json!({"scope": "a\tb"}),
            json!({"access_token_signed_response_alg": "none"}),
            json!({"client_name": "a\nb"}),
            json!({"access_token_ttl": 0}),
            json!({"jwks_uri": "https://127.0.0.1/jwks"}),
            json!({"jwks_uri": "https://keys.example/", "jwks": {"keys": [{"kty": "OKP"}]}}),
            json!({"jwks": {"keys": [{"kty": "OKP", "d": "secret"}]}}),
        ] {
            assert_eq!(client(bad.clone()).err().map(|e| e.code), Some("invalid_client_metadata"), "{bad}");
        }
    }
}
