//! `sop nexus`: services and messages from the command line.

use std::io::Read as _;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::Method;
use serde_json::{Value, json};

use crate::kernel::{Clock, ids};

use super::client::Client;
use super::{Global, say};

#[derive(Subcommand)]
pub(crate) enum NexusCommand {
    /// List services that have instances
    Services,
    /// List the instances of a service
    Service {
        name: String,
        /// Only those that are passing
        #[arg(long)]
        healthy: bool,
    },
    /// Publish an event to a topic
    Publish(PublishArgs),
    /// Pull messages; each comes again until it is acknowledged
    Pull {
        topic: String,
        group: String,
        /// Messages at most, 1-1000
        #[arg(long, default_value_t = 1)]
        max: i64,
        /// Seconds to wait for one, 0-60
        #[arg(long, default_value_t = 0.0)]
        wait: f64,
    },
    /// Acknowledge what was pulled, by the names of the deliveries
    Ack {
        topic: String,
        group: String,
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

#[derive(Args)]
pub(crate) struct PublishArgs {
    topic: String,
    /// The data; `-` or nothing reads it from stdin
    data: Option<String>,
    /// The event's type
    #[arg(long = "type", default_value = "sop.cli")]
    kind: String,
    /// Where it comes from, a URI reference; with the id it names the event
    #[arg(long, default_value = "/sop/cli")]
    source: String,
    /// Its id; a new one without it
    #[arg(long)]
    id: Option<String>,
    /// What the data is
    #[arg(long, default_value = "text/plain")]
    content_type: String,
    /// Seconds until it is delivered
    #[arg(long)]
    delay: Option<f64>,
}

pub(crate) async fn run(global: &Global, command: NexusCommand) -> anyhow::Result<()> {
    let client = Client::find(global).await?;
    match command {
        NexusCommand::Services => services(global, &client).await,
        NexusCommand::Service { name, healthy } => service(global, &client, &name, healthy).await,
        NexusCommand::Publish(args) => publish(global, &client, args).await,
        NexusCommand::Pull { topic, group, max, wait } => {
            let request = client.request(Method::POST, &path(&["topics", &topic, "groups", &group, "pull"]));
            let got = client.json(request.json(&json!({"max": max, "wait": wait}))).await?;
            for message in got["messages"].as_array().into_iter().flatten() {
                tell(global, message, |m| {
                    let id = m["id"].as_str().unwrap_or_default();
                    format!("{id}\tindex {}\tattempt {}\t{}", m["index"], m["attempt"], m["event"])
                });
            }
            Ok(())
        }
        NexusCommand::Ack { topic, group, ids } => {
            let request = client.request(Method::POST, &path(&["topics", &topic, "groups", &group, "ack"]));
            let done = client.json(request.json(&json!({"ids": ids}))).await?;
            let acked: Vec<&str> = done["acked"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            tell(global, &done, |_| acked.iter().map(|id| format!("{id} acknowledged")).collect::<Vec<_>>().join("\n"));
            let late: Vec<&String> = ids.iter().filter(|id| !acked.contains(&id.as_str())).collect();
            anyhow::ensure!(late.is_empty(), "not yours any more, or never were: {late:?}");
            Ok(())
        }
    }
}

async fn services(global: &Global, client: &Client) -> anyhow::Result<()> {
    let mut after: Option<String> = None;
    loop {
        let mut query = vec![("limit", "1000".to_owned())];
        query.extend(after.take().map(|a| ("after", a)));
        let page = client.json(client.request(Method::GET, &path(&["services"])).query(&query)).await?;
        for item in page["items"].as_array().into_iter().flatten() {
            tell(global, item, |i| {
                let name = i["name"].as_str().unwrap_or_default();
                format!("{name}\t{} of {} passing", i["passing"], i["instances"])
            });
        }
        match page["next"].as_str() {
            Some(next) => after = Some(next.to_owned()),
            None => return Ok(()),
        }
    }
}

async fn service(global: &Global, client: &Client, name: &str, healthy: bool) -> anyhow::Result<()> {
    let request = client.request(Method::GET, &path(&["services", name])).query(&[("healthy", healthy)]);
    let found = client.json(request).await?;
    for instance in found["instances"].as_array().into_iter().flatten() {
        tell(global, instance, |i| {
            let text = |field: &str| i[field].as_str().unwrap_or("-").to_owned();
            format!(
                "{}\t{}\t{}\tweight {}\tversion {}",
                text("id"),
                text("address"),
                text("status"),
                i["weight"],
                text("version")
            )
        });
    }
    Ok(())
}

async fn publish(global: &Global, client: &Client, args: PublishArgs) -> anyhow::Result<()> {
    let data = match args.data.as_deref() {
        None | Some("-") => {
            let mut bytes = Vec::new();
            std::io::stdin().read_to_end(&mut bytes).context("stdin cannot be read")?;
            bytes
        }
        Some(text) => text.as_bytes().to_vec(),
    };
    let id = args.id.unwrap_or_else(|| ids::new_id(Clock::system().now()).to_string());
    let encode = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
    let mut request = client
        .request(Method::POST, &path(&["topics", &args.topic, "messages"]))
        .header("ce-specversion", "1.0")
        .header("ce-id", encode(&id))
        .header("ce-source", encode(&args.source))
        .header("ce-type", encode(&args.kind))
        .header("content-type", args.content_type);
    if let Some(delay) = args.delay {
        request = request.header("nexus-delay", delay.to_string());
    }
    let published = client.json(request.body(data)).await?;
    tell(global, &published, |p| format!("{} at index {}", p["id"].as_str().unwrap_or_default(), p["index"]));
    Ok(())
}

/// Each part is a segment of its own, whatever is in it.
fn path(parts: &[&str]) -> String {
    parts
        .iter()
        .fold("/v1/nexus".to_owned(), |path, part| format!("{path}/{}", utf8_percent_encode(part, NON_ALPHANUMERIC)))
}

fn tell(global: &Global, value: &Value, text: impl Fn(&Value) -> String) {
    if global.json { say(value) } else { say(text(value)) }
}
