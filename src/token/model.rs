//! The nouns of the room.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::config::{Agent, Agents};
use crate::kernel::Timestamp;
use crate::kernel::web::EntityName;

use super::keys::Alg;

/// The four kinds of agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum AgentType {
    /// Part of LOGOS.
    System,
    /// A person's.
    User,
    /// Somebody else's.
    #[default]
    External,
    /// A reasoning one.
    Cognitive,
}

impl AgentType {
    /// As it is written.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::External => "external",
            Self::Cognitive => "cognitive",
        }
    }
}

/// How a client proves who it is (RFC 7591, `token_endpoint_auth_method`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuthMethod {
    /// HTTP Basic.
    ClientSecretBasic,
    /// In the form.
    ClientSecretPost,
    /// A signed assertion (RFC 7523).
    PrivateKeyJwt,
}

/// A registered client.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Client {
    /// Its id.
    pub client_id: String,
    /// What people call it.
    pub client_name: String,
    /// Which kind of agent it is.
    pub agent_type: AgentType,
    /// What it may ask for.
    pub scopes: Vec<String>,
    /// `client_credentials`.
    pub grant_types: Vec<String>,
    /// How it proves who it is.
    pub auth_method: AuthMethod,
    /// Its public keys, for assertions.
    pub jwks: Option<Value>,
    /// Where its public keys are.
    #[serde(default)]
    pub jwks_uri: Option<String>,
    /// How its access tokens are signed.
    #[serde(default)]
    pub access_token_alg: Alg,
    /// Audiences its tokens may be for; any if not narrowed.
    pub allowed_resources: Option<Vec<String>>,
    /// How long its tokens are good, seconds, if not as long as those of its type.
    #[serde(default)]
    pub access_token_ttl: Option<i64>,
    /// What it may have, if not what its type may.
    #[serde(default)]
    pub limits: Option<Limited>,
    /// When it was registered.
    pub issued: Timestamp,
}

/// Limits of a client that are others than those of its type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ClientLimits)]
pub struct Limited {
    /// Requests a second
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<u32>,
    /// Requests an hour; 0: as many as it likes
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hourly_requests: Option<u32>,
    /// Introspections and uses of operation tokens an hour; 0: as many as it likes
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hourly_verifications: Option<u32>,
    /// Tokens an hour; 0: as many as it likes
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hourly_generations: Option<u32>,
}

/// What a client may have; 0: no limit of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowance {
    /// Requests a second.
    pub rate: u32,
    /// Requests an hour.
    pub requests: u32,
    /// Introspections and uses of operation tokens an hour.
    pub verifications: u32,
    /// Tokens an hour.
    pub generations: u32,
}

/// What the configuration says of a type.
#[must_use]
pub fn of_type(agents: &Agents, kind: AgentType) -> &Agent {
    match kind {
        AgentType::System => &agents.system,
        AgentType::User => &agents.user,
        AgentType::External => &agents.external,
        AgentType::Cognitive => &agents.cognitive,
    }
}

impl Client {
    /// As policies see it.
    #[must_use]
    pub fn entity(&self) -> EntityName {
        entity(&self.client_id)
    }

    /// Whether it may more than it was registered for.
    #[must_use]
    pub fn gains(&self, was: &Self) -> bool {
        let more = |now: &[String], then: &[String]| !now.iter().all(|x| then.contains(x));
        let wider = match (&self.allowed_resources, &was.allowed_resources) {
            (_, None) => false,
            (None, Some(_)) => true,
            (Some(now), Some(then)) => more(now, then),
        };
        wider
            || self.limits != was.limits
            || self.access_token_ttl != was.access_token_ttl
            || self.agent_type != was.agent_type
            || more(&self.scopes, &was.scopes)
            || more(&self.grant_types, &was.grant_types)
    }

    /// What it may have.
    #[must_use]
    pub fn allowance(&self, agents: &Agents) -> Allowance {
        let (kind, own) = (of_type(agents, self.agent_type), self.limits.unwrap_or_default());
        Allowance {
            rate: own.rate.unwrap_or(kind.rate),
            requests: own.hourly_requests.unwrap_or(kind.hourly_requests),
            verifications: own.hourly_verifications.unwrap_or(kind.hourly_verifications),
            generations: own.hourly_generations.unwrap_or(kind.hourly_generations),
        }
    }

    /// How long its tokens are good, seconds.
    #[must_use]
    pub fn ttl(&self, agents: &Agents, default: Duration) -> i64 {
        let kind = Some(of_type(agents, self.agent_type).ttl.get()).filter(|ttl| !ttl.is_zero()).unwrap_or(default);
        self.access_token_ttl.unwrap_or_else(|| i64::try_from(kind.as_secs()).unwrap_or(900))
    }

    /// Its scopes as the wire has them.
    #[must_use]
    pub fn scope(&self) -> String {
        self.scopes.join(" ")
    }
}

/// A client's name as policies see it.
#[must_use]
pub fn entity(client_id: &str) -> EntityName {
    EntityName { kind: "Sop::Client".to_owned(), id: client_id.to_owned() }
}

/// The four kinds of operation token, with the defaults of LOGOS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum OperationKind {
    /// One use, a day.
    Operation,
    /// A hundred uses, two days.
    Todo,
    /// One use, a day.
    Integration,
    /// One use, a day.
    Test,
}

impl OperationKind {
    /// Default uses and lifetime in seconds.
    #[must_use]
    pub const fn defaults(self) -> (i64, i64) {
        match self {
            Self::Todo => (100, 48 * 3600),
            Self::Operation | Self::Integration | Self::Test => (1, 24 * 3600),
        }
    }

    /// As it is written.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Operation => "operation",
            Self::Todo => "todo",
            Self::Integration => "integration",
            Self::Test => "test",
        }
    }
}

/// An operation token, without its secret.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Operation {
    /// Its id.
    pub id: Uuid,
    /// The token itself; only in the answer that issues it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// Which kind.
    pub kind: String,
    /// `active`, `completed`, `expired` or `revoked`.
    pub status: String,
    /// What it is for.
    pub operation: String,
    /// Who may use it.
    pub audience: String,
    /// On what; anything if absent.
    pub resource: Option<String>,
    /// On whose behalf.
    pub subject: Option<String>,
    /// Why.
    pub purpose: Option<String>,
    /// Who issued it.
    pub issuer: String,
    /// The todo's token it was issued with, and with which it ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Uuid>,
    /// How often it may be used.
    pub max_uses: i64,
    /// How often it was.
    pub uses: i64,
    /// When it was issued.
    #[schema(value_type = String)]
    pub issued_at: Timestamp,
    /// When it ends.
    #[schema(value_type = String)]
    pub expires_at: Timestamp,
}

impl Operation {
    /// Its status at `now`: expiry is an instant, not an event.
    #[must_use]
    pub fn status_at(&self, now: Timestamp) -> &str {
        if self.status == "active" && now >= self.expires_at { "expired" } else { &self.status }
    }

    /// As it is shown at `now`.
    #[must_use]
    pub fn at(mut self, now: Timestamp) -> Self {
        self.status = self.status_at(now).to_owned();
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_those_of_logos() {
        assert_eq!(OperationKind::Todo.defaults(), (100, 172_800));
        assert_eq!(OperationKind::Test.defaults(), (1, 86_400));
    }
}
