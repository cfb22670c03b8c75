//! `sop health`: checks, services and incidents from the command line.

use clap::{Subcommand, ValueEnum};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::Method;
use serde_json::{Value, json};

use super::client::Client;
use super::{Global, say};

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Reported {
    Passing,
    Critical,
}

#[derive(Subcommand)]
pub(crate) enum HealthCommand {
    /// List checks
    Checks {
        /// Only those of this service
        #[arg(long)]
        service: Option<String>,
    },
    /// Say how a service is, and why; exit 1 unless it is passing
    Service { name: String },
    /// Report how a ttl check is
    Report {
        check: String,
        status: Reported,
        /// A line about it
        #[arg(long)]
        output: Option<String>,
    },
    /// List incidents, newest first
    Incidents {
        /// Those that are over too
        #[arg(long)]
        all: bool,
    },
    /// Say that somebody is at an incident
    Acknowledge {
        id: String,
        /// In words
        #[arg(long, default_value = "")]
        note: String,
    },
}

pub(crate) async fn run(global: &Global, command: HealthCommand) -> anyhow::Result<()> {
    let client = Client::find(global).await?;
    let tell = |value: &Value, text: String| if global.json { say(value) } else { say(text) };
    let word = |v: &Value, name: &str| v[name].as_str().unwrap_or("-").to_owned();
    let encode = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
    match command {
        HealthCommand::Checks { service } => {
            let query: Vec<_> = service.map(|s| ("service", s)).into_iter().collect();
            for c in all(&client, "/v1/health/checks", query).await? {
                let line = format!(
                    "{}\t{}\tsince {}\t{}",
                    word(&c, "name"),
                    word(&c, "status"),
                    word(&c, "since"),
                    word(&c, "output")
                );
                tell(&c, line);
            }
            Ok(())
        }
        HealthCommand::Service { name } => {
            let found =
                client.json(client.request(Method::GET, &format!("/v1/health/services/{}", encode(&name)))).await?;
            let why: Vec<&str> = found["why"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            tell(
                &found,
                [format!("{name} is {}", word(&found, "status"))]
                    .into_iter()
                    .chain(why.iter().map(|w| format!("  {w}")))
                    .collect::<Vec<_>>()
                    .join("\n"),
            );
            anyhow::ensure!(found["status"] == "passing", "{name} is {}", word(&found, "status"));
            Ok(())
        }
        HealthCommand::Report { check, status, output } => {
            let status = match status {
                Reported::Passing => "passing",
                Reported::Critical => "critical",
            };
            let path = format!("/v1/health/checks/{}/report", encode(&check));
            let request = client.request(Method::POST, &path).json(&json!({"status": status, "output": output}));
            let now = client.json(request).await?;
            tell(&now, format!("{check} is {}", word(&now, "status")));
            Ok(())
        }
        HealthCommand::Incidents { all: every } => {
            for i in all(&client, "/v1/health/incidents", Vec::new()).await? {
                if every || i["status"] != "resolved" {
                    let line = format!(
                        "{}\t{}\t{}\t{}\t{}",
                        word(&i, "id"),
                        word(&i, "status"),
                        word(&i, "severity"),
                        word(&i, "opened_at"),
                        word(&i, "summary")
                    );
                    tell(&i, line);
                }
            }
            Ok(())
        }
        HealthCommand::Acknowledge { id, note } => {
            let path = format!("/v1/health/incidents/{}/acknowledge", encode(&id));
            let now = client.json(client.request(Method::POST, &path).json(&json!({"note": note}))).await?;
            tell(&now, format!("{id} is {}", word(&now, "status")));
            Ok(())
        }
    }
}

/// Every page of a list.
async fn all(client: &Client, path: &str, query: Vec<(&str, String)>) -> anyhow::Result<Vec<Value>> {
    let (mut items, mut after) = (Vec::new(), None::<String>);
    loop {
        let mut query = query.clone();
        query.push(("limit", "1000".to_owned()));
        query.extend(after.take().map(|a| ("after", a)));
        let mut page = client.json(client.request(Method::GET, path).query(&query)).await?;
        if let Some(found) = page["items"].as_array_mut() {
            items.append(found);
        }
        match page["next"].as_str() {
            Some(next) => after = Some(next.to_owned()),
            None => return Ok(items),
        }
    }
}
