//! The sections, one a room and a few for the house. What each key means stands in `config/sop.toml`.
#![allow(missing_docs)]

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer};

/// A duration such as `250ms`, `2s`, `15m`, `24h`, `30d`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(Duration);

impl Span {
    /// The duration.
    #[must_use]
    pub const fn get(self) -> Duration {
        self.0
    }

    fn parse(text: &str) -> Option<Self> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().ok()?;
        let ms = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return None,
        };
        Some(Self(Duration::from_millis(number.checked_mul(ms)?)))
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        Self::parse(&text).ok_or_else(|| {
            serde::de::Error::custom(format!("{text:?} is no duration; write 250ms, 2s, 15m, 24h or 30d"))
        })
    }
}

/// An empty string stands for "not set": TOML has no null, and the documented file names every key.
fn optional<'de, D: Deserializer<'de>, T: From<String>>(d: D) -> Result<Option<T>, D::Error> {
    let text = String::deserialize(d)?;
    Ok((!text.is_empty()).then(|| text.into()))
}

/// Everything.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub server: Server,
    pub data: Data,
    pub database: Database,
    pub secrets: Secrets,
    pub ledger: Ledger,
    pub audit: Audit,
    pub token: Token,
    pub governance: Governance,
    pub state: State,
    pub nexus: Nexus,
    pub health: Health,
    pub disk: Disk,
    pub telemetry: Telemetry,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Server {
    pub listen: String,
    #[serde(deserialize_with = "optional")]
    pub tls_cert: Option<PathBuf>,
    #[serde(deserialize_with = "optional")]
    pub tls_key: Option<PathBuf>,
    #[serde(deserialize_with = "optional")]
    pub tls_client_ca: Option<PathBuf>,
    #[serde(deserialize_with = "optional")]
    pub metrics_listen: Option<String>,
    pub drain: Span,
    pub request_timeout: Span,
    pub body_limit: usize,
    pub rate: u32,
    pub operation_rates: String,
    pub concurrency: usize,
    pub refusals_interval: Span,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    pub dir: PathBuf,
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Database {
    #[serde(deserialize_with = "optional")]
    pub url: Option<String>,
    #[serde(deserialize_with = "optional")]
    pub bin_dir: Option<PathBuf>,
    pub service_user: String,
    pub readers: u32,
    pub acquire_timeout: Span,
    pub statement_timeout: Span,
    pub sync: bool,
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Database({})", if self.url.is_some() { "***" } else { "private" })
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Secrets {
    #[serde(deserialize_with = "optional")]
    pub master_key_file: Option<PathBuf>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ledger {
    pub queue: usize,
    pub batch: usize,
    pub lock_wait: Span,
    pub write_timeout: Span,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Audit {
    #[serde(deserialize_with = "optional")]
    pub origin: Option<String>,
    pub public_entries: bool,
    pub publish_interval: Span,
    pub self_audit_interval: Span,
    pub witnesses: String,
    pub witness_logs: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    #[serde(deserialize_with = "optional")]
    pub issuer: Option<String>,
    pub ttl: Span,
    pub key_lead: Span,
    pub key_rotation: Span,
    pub lockout_failures: u32,
    pub lockout_window: Span,
    pub lockout_period: Span,
    pub jwks_private: bool,
    pub agents: Agents,
}

/// What a client gets by its agent type, unless its registration says otherwise.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Agents {
    pub system: Agent,
    pub user: Agent,
    pub external: Agent,
    pub cognitive: Agent,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Agent {
    pub scope: String,
    pub ttl: Span,
    pub rate: u32,
    pub hourly_requests: u32,
    pub hourly_verifications: u32,
    pub hourly_generations: u32,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Governance {
    pub canary_window: Span,
    pub canary_decisions: u32,
    pub canary_new_denials: f64,
    pub shadow_share: u32,
    pub spool_mb: u64,
    pub cases: usize,
    pub cases_timeout: Span,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    pub history: History,
}

/// How much of the past of keys is kept.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct History {
    pub keep: Span,
    pub keep_versions: i64,
    pub grace: Span,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nexus {
    pub retention_interval: Span,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Health {
    pub probes: usize,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    pub guard_percent: u8,
    pub reserve_mb: u64,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Telemetry {
    pub filter: String,
    pub format: LogFormat,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text on a terminal, else JSON.
    Auto,
    /// Text.
    Text,
    /// JSON, one object a line.
    Json,
}

impl Config {
    /// What no single key can say.
    pub(super) fn check(&self) -> Result<(), String> {
        let positive = |key: &str, n: usize| if n == 0 { Err(format!("{key} must be at least 1")) } else { Ok(()) };
        positive("ledger.queue", self.ledger.queue)?;
        positive("ledger.batch", self.ledger.batch)?;
        positive("server.concurrency", self.server.concurrency)?;
        positive("server.rate", self.server.rate as usize)?;
        positive("database.readers", self.database.readers as usize)?;
        positive("health.probes", self.health.probes)?;
        if !(1..=100).contains(&self.governance.shadow_share) {
            return Err("governance.shadow_share is a percentage, from 1 to 100".to_owned());
        }
        if !(0.0..=100.0).contains(&self.governance.canary_new_denials) {
            return Err("governance.canary_new_denials is a percentage, from 0 to 100".to_owned());
        }
        positive("governance.cases", self.governance.cases)?;
        let ttls = [
            &self.token.agents.system,
            &self.token.agents.user,
            &self.token.agents.external,
            &self.token.agents.cognitive,
        ];
        if ttls.iter().map(|a| a.ttl).chain([self.token.ttl]).any(|ttl| ttl.get() > Duration::from_secs(86_400)) {
            return Err("token.ttl, and ttl of an agent type, are a day at most".to_owned());
        }
        if self.token.ttl.get() < Duration::from_secs(1) {
            return Err("token.ttl is a second at least".to_owned());
        }
        if self.state.history.keep_versions < 0 {
            return Err("state.history.keep_versions is a number of changes; 0 keeps them all".to_owned());
        }
        if self.state.history.grace.get() < self.database.statement_timeout.get() {
            return Err("state.history.grace may not be shorter than database.statement_timeout: a read that began before the mark was set would miss rows".to_owned());
        }
        if self.disk.guard_percent > 100 {
            return Err("disk.guard_percent is a percentage, at most 100".to_owned());
        }
        Ok(())
    }
}
