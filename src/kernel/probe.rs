//! Probes: is something there, and does it answer as it should? Each costs at most its timeout, whatever the other side does.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Fault, ids};

/// How something is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum How {
    /// A GET that must answer 2xx or 3xx.
    Http,
    /// A connection that must open.
    Tcp,
}

/// What is looked at, how, and how often.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    /// How
    pub kind: How,
    /// `http://host:port/path`, or `host:port`
    pub target: String,
    /// Seconds between two looks, 0.5-86,400; 10 without it
    #[serde(default = "ten")]
    pub interval: f64,
    /// Seconds one look may take, 0.05-60; 2 without it
    #[serde(default = "two")]
    pub timeout: f64,
    /// Good looks in a row that make it passing, 1-100; 2 without it
    #[serde(default = "rise")]
    pub rise: i64,
    /// Bad looks in a row that make it critical, 1-100; 3 without it
    #[serde(default = "fall")]
    pub fall: i64,
}

fn ten() -> f64 {
    10.0
}
fn two() -> f64 {
    2.0
}
fn rise() -> i64 {
    2
}
fn fall() -> i64 {
    3
}

/// Faults of what every check has; `at` is the pointer of the check.
pub fn timing_faults(at: &str, interval: f64, timeout: f64, rise: i64, fall: i64, faults: &mut Vec<Fault>) {
    let mut fault = |name: &str, detail: &str| faults.push(Fault::new(format!("{at}/{name}"), detail));
    if !(0.5..=86_400.0).contains(&interval) {
        fault("interval", "interval is from 0.5 to 86400 seconds");
    }
    if !(0.05..=60.0).contains(&timeout) {
        fault("timeout", "timeout is from 0.05 to 60 seconds");
    }
    if !(1..=100).contains(&rise) {
        fault("rise", "rise is from 1 to 100");
    }
    if !(1..=100).contains(&fall) {
        fault("fall", "fall is from 1 to 100");
    }
}

impl Probe {
    /// Its faults; `at` is its pointer.
    pub fn faults(&self, at: &str, faults: &mut Vec<Fault>) {
        timing_faults(at, self.interval, self.timeout, self.rise, self.fall, faults);
        let detail = match self.kind {
            How::Http => match reqwest::Url::parse(&self.target) {
                Ok(url) if matches!(url.scheme(), "http" | "https") && url.host_str().is_some() => None,
                _ => Some("an http or https URL is wanted"),
            },
            How::Tcp => match self.target.rsplit_once(':') {
                Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => None,
                _ => Some("host:port is wanted"),
            },
        };
        if let Some(detail) = detail.or(ids::id_fault(&self.target)) {
            faults.push(Fault::new(format!("{at}/target"), detail));
        }
    }

    /// How long between two looks.
    #[must_use]
    pub fn interval(&self) -> Duration {
        Duration::try_from_secs_f64(self.interval).unwrap_or(Duration::from_secs(10))
    }
}

/// Looks. Cheap to clone.
#[derive(Clone)]
pub struct Prober(reqwest::Client);

impl Prober {
    /// Follows no redirect and keeps no connection: each look is one of its own.
    ///
    /// # Errors
    /// When no TLS can be set up.
    pub fn new() -> Result<Self, String> {
        let client = reqwest::Client::builder()
            .user_agent(concat!("sop/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .pool_max_idle_per_host(0)
            .no_proxy()
            .build();
        client.map(Self).map_err(|e| e.to_string())
    }

    /// One look: what was seen, or what was wrong, in a line.
    ///
    /// # Errors
    /// With what was wrong.
    pub async fn look(&self, probe: &Probe) -> Result<String, String> {
        let timeout = Duration::try_from_secs_f64(probe.timeout).unwrap_or(Duration::from_secs(2));
        let look = async {
            match probe.kind {
                How::Tcp => tokio::net::TcpStream::connect(&probe.target)
                    .await
                    .map(|_| "connected".to_owned())
                    .map_err(|e| format!("no connection: {e}")),
                // The body is left unread: one that never ends costs nothing.
                How::Http => match self.0.get(&probe.target).send().await {
                    Ok(answer) if answer.status().is_success() || answer.status().is_redirection() => {
                        Ok(format!("answered {}", answer.status().as_u16()))
                    }
                    Ok(answer) => Err(format!("answered {}", answer.status().as_u16())),
                    Err(e) => Err(format!("no answer: {}", root(&e))),
                },
            }
        };
        match tokio::time::timeout(timeout, look).await {
            Ok(done) => done,
            Err(_) => Err(format!("no answer within {} ms", timeout.as_millis())),
        }
    }
}

/// The innermost cause, which says what happened without repeating the address.
fn root(e: &dyn std::error::Error) -> String {
    let mut inner = e;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_pointed_at() {
        let probe =
            |kind, target: &str| Probe { kind, target: target.into(), interval: 1.0, timeout: 1.0, rise: 1, fall: 1 };
        let faults = |p: Probe| {
            let mut all = Vec::new();
            p.faults("/checks/0", &mut all);
            all.into_iter().map(|f| f.pointer).collect::<Vec<_>>()
        };
        assert!(faults(probe(How::Http, "http://127.0.0.1:1/x")).is_empty());
        assert!(faults(probe(How::Tcp, "localhost:80")).is_empty());
        for (kind, target) in
            [(How::Http, "ftp://x"), (How::Http, "x"), (How::Tcp, "x"), (How::Tcp, ":1"), (How::Tcp, "x:y")]
        {
            assert_eq!(faults(probe(kind, target)), ["/checks/0/target"], "{target}");
        }
        assert_eq!(faults(Probe { rise: 0, ..probe(How::Tcp, "x:1") }), ["/checks/0/rise"]);
    }
}
