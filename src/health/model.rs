//! The nouns of the room: checks, incidents, services as they are.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::kernel::probe::{self, How, Probe};
use crate::kernel::web::faulty;
use crate::kernel::{Fault, Refusal, Timestamp, ids};
use crate::nexus::model::Instance;

/// What a check is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A GET that must answer 2xx or 3xx.
    Http,
    /// A connection that must open.
    Tcp,
    /// A report that must arrive within each interval.
    Ttl,
}

/// How bad it is when a check fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know.
    Info,
    /// Somebody should look.
    Warning,
    /// Somebody must look.
    Critical,
}

impl Severity {
    /// Its word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}

/// How a check is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Not enough was seen.
    Unknown,
    /// As it should be.
    Passing,
    /// Not as it should be.
    Critical,
}

impl Status {
    /// Its word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Passing => "passing",
            Self::Critical => "critical",
        }
    }

    /// Read back.
    #[must_use]
    pub fn of(word: &str) -> Self {
        match word {
            "passing" => Self::Passing,
            "critical" => Self::Critical,
            _ => Self::Unknown,
        }
    }
}

/// What makes or changes a check.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// What it is
    pub kind: Kind,
    /// `http://host:port/path`, or `host:port`; none for ttl
    #[serde(default)]
    pub target: Option<String>,
    /// Seconds between two looks, or between two reports, 0.5-86,400; 10 without it
    #[serde(default = "interval")]
    pub interval: f64,
    /// Seconds one look may take, 0.05-60; 2 without it
    #[serde(default = "timeout")]
    pub timeout: f64,
    /// Good looks in a row that make it passing, 1-100; 2 without it
    #[serde(default = "rise")]
    pub rise: i64,
    /// Bad looks in a row that make it critical, 1-100; 3 without it
    #[serde(default = "fall")]
    pub fall: i64,
    /// How bad it is when it fails; warning without it
    #[serde(default = "severity")]
    pub severity: Severity,
    /// The service it says something about
    #[serde(default)]
    pub service: Option<String>,
}

fn interval() -> f64 {
    10.0
}
fn timeout() -> f64 {
    2.0
}
fn rise() -> i64 {
    2
}
fn fall() -> i64 {
    3
}
fn severity() -> Severity {
    Severity::Warning
}

impl Spec {
    /// As a probe; `None` for one that is reported.
    #[must_use]
    pub fn probe(&self) -> Option<Probe> {
        let kind = match self.kind {
            Kind::Http => How::Http,
            Kind::Tcp => How::Tcp,
            Kind::Ttl => return None,
        };
        let target = self.target.clone().unwrap_or_default();
        let (interval, timeout, rise, fall) = (self.interval, self.timeout, self.rise, self.fall);
        Some(Probe { kind, target, interval, timeout, rise, fall })
    }

    /// Its faults, all of them.
    ///
    /// # Errors
    /// 400.
    pub fn check(&self) -> Result<(), Refusal> {
        let mut faults = Vec::new();
        match self.probe() {
            Some(probe) => probe.faults("", &mut faults),
            None => {
                probe::timing_faults("", self.interval, self.timeout, self.rise, self.fall, &mut faults);
                if self.target.is_some() {
                    faults.push(Fault::new("/target", "a ttl check is reported, it has no target"));
                }
            }
        }
        if let Some(fault) = self.service.as_ref().and_then(|s| ids::name_fault(s)) {
            faults.push(Fault::new("/service", fault));
        }
        faulty(faults).map_or(Ok(()), Err)
    }
}

/// A check.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Check {
    /// Its name.
    pub name: String,
    /// As it was put.
    #[serde(flatten)]
    pub spec: Spec,
    /// How it is.
    pub status: Status,
    /// The result that made it so.
    pub output: String,
    /// Since when.
    #[schema(value_type = String)]
    pub since: Timestamp,
    /// Index of its last change.
    pub index: i64,
    /// Index at which it was made.
    pub created_index: i64,
    /// Index at which it was last put.
    #[serde(skip)]
    pub spec_index: i64,
    /// Index of its last report.
    #[serde(skip)]
    pub beat: i64,
}

/// What is reported of a ttl check.
#[derive(Clone, Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// `passing` or `critical`
    pub status: Status,
    /// A line about it
    #[serde(default)]
    pub output: Option<String>,
}

/// How an incident is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Nobody has said anything.
    Open,
    /// Somebody is at it.
    Acknowledged,
    /// It is over.
    Resolved,
}

/// An incident.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Incident {
    /// Its id.
    pub id: Uuid,
    /// What makes two the same: there is one open incident of each.
    pub fingerprint: String,
    /// How bad it is: info, warning, critical.
    pub severity: String,
    /// How it is.
    pub status: Stage,
    /// In a line.
    pub summary: String,
    /// The service it is about.
    pub service: Option<String>,
    /// When it opened.
    #[schema(value_type = String)]
    pub opened_at: Timestamp,
    /// Its entry.
    pub opened_index: i64,
    /// When it was over.
    #[schema(value_type = Option<String>)]
    pub resolved_at: Option<Timestamp>,
    /// The entry of that.
    pub resolved_index: Option<i64>,
    /// What happened to it, oldest first; in the list there is none of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub events: Option<Vec<Happened>>,
}

/// Something that happened to an incident.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Happened {
    /// Its entry.
    pub index: i64,
    /// When.
    #[schema(value_type = String)]
    pub time: Timestamp,
    /// By whom.
    pub actor: String,
    /// opened, again, acknowledged, comment, resolved.
    pub kind: String,
    /// In words.
    pub note: String,
}

/// A service as checks and instances show it.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct Overall {
    /// Its name.
    pub service: String,
    /// passing, warning, critical, unknown.
    pub status: &'static str,
    /// Why, a sentence for each thing that is not as it should be.
    pub why: Vec<String>,
    /// Its checks.
    pub checks: Vec<Check>,
    /// Its instances.
    pub instances: Vec<Instance>,
}
