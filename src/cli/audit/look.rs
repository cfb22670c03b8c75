//! Looking into the record: what fits, how many of each kind, and what comes; and telling it events.

use std::io::Read as _;

use anyhow::{Context as _, bail};
use clap::Args;
use futures_util::StreamExt as _;
use reqwest::Method;
use serde_json::Value;

use crate::cli::client::Client;
use crate::cli::{Global, say};

/// What is known of entries.
#[derive(Args)]
pub(crate) struct Known {
    /// Words that its details have, all of them
    words: Vec<String>,
    /// Only of this actor
    #[arg(long)]
    actor: Option<String>,
    /// Only of this room: state
    #[arg(long)]
    room: Option<String>,
    /// Only this action: state:put
    #[arg(long)]
    action: Option<String>,
    /// Only resources that begin so: key/arp/
    #[arg(long)]
    resource: Option<String>,
    /// Only this outcome: ok, denied or failed
    #[arg(long)]
    outcome: Option<String>,
    /// Only of this request
    #[arg(long)]
    request_id: Option<String>,
    /// Only of this trace
    #[arg(long)]
    trace_id: Option<String>,
    /// Not before (RFC 3339)
    #[arg(long)]
    since: Option<String>,
    /// Before (RFC 3339)
    #[arg(long)]
    until: Option<String>,
}

impl Known {
    fn query(self) -> Vec<(&'static str, String)> {
        let words = (!self.words.is_empty()).then(|| self.words.join(" "));
        let all = [
            ("text", words),
            ("actor", self.actor),
            ("room", self.room),
            ("action", self.action),
            ("resource", self.resource),
            ("outcome", self.outcome),
            ("request_id", self.request_id),
            ("trace_id", self.trace_id),
            ("since", self.since),
            ("until", self.until),
        ];
        all.into_iter().filter_map(|(name, value)| value.map(|v| (name, v))).collect()
    }
}

fn show(global: &Global, e: &Value) {
    if global.json {
        return say(e);
    }
    let text = |name: &str| e[name].as_str().unwrap_or("-").to_owned();
    say(format!(
        "{}  {}  {:<22} {:<6} {}  {}",
        e["index"],
        text("time"),
        text("action"),
        text("outcome"),
        text("actor"),
        text("resource")
    ));
}

/// Entries that fit, newest first, as many as are wanted.
pub(super) async fn search(
    global: &Global,
    client: &Client,
    known: Known,
    saved: Option<String>,
    limit: u32,
) -> anyhow::Result<()> {
    let mut query = known.query();
    query.extend(saved.map(|s| ("search", s)));
    let (mut left, mut after) = (limit, None::<String>);
    while left > 0 {
        let mut query = query.clone();
        query.push(("limit", left.min(1000).to_string()));
        query.extend(after.take().map(|a| ("after", a)));
        let page = client.json(client.request(Method::GET, "/v1/audit/entries").query(&query)).await?;
        let items = page["items"].as_array().context("the daemon did not answer a list")?;
        items.iter().for_each(|e| show(global, e));
        left = left.saturating_sub(u32::try_from(items.len()).unwrap_or(left));
        match page["next"].as_str() {
            Some(next) => after = Some(next.to_owned()),
            None => break,
        }
    }
    Ok(())
}

/// How many entries fit, of each kind.
pub(super) async fn facets(global: &Global, client: &Client, known: Known) -> anyhow::Result<()> {
    let said = client.json(client.request(Method::GET, "/v1/audit/facets").query(&known.query())).await?;
    if global.json {
        say(&said);
        return Ok(());
    }
    let all = if said["complete"] == true { String::new() } else { format!(" from entry {} on", said["from"]) };
    say(format!("{} entries{all}", said["entries"]));
    for (name, values) in said["facets"].as_object().into_iter().flatten() {
        say(format!("{name}:"));
        for v in values.as_array().into_iter().flatten() {
            say(format!("  {:>10}  {}", v["count"].to_string(), v["value"].as_str().unwrap_or("-")));
        }
    }
    Ok(())
}

/// Entries as they come, until it is stopped; goes on where it was when the connection is lost.
pub(super) async fn tail(global: &Global, client: &Client, known: Known, after: Option<i64>) -> anyhow::Result<()> {
    let query = known.query();
    let mut last = after;
    loop {
        let mut request = client.request(Method::GET, "/v1/audit/stream").query(&query);
        if let Some(last) = last {
            request = request.query(&[("after", last)]);
        }
        let mut body = client.send(request).await?.bytes_stream();
        let mut text = Vec::new();
        while let Some(Ok(part)) = body.next().await {
            text.extend_from_slice(&part);
            while let Some(end) = text.windows(2).position(|w| w == b"\n\n") {
                let event: Vec<u8> = text.drain(..end + 2).collect();
                let event = String::from_utf8_lossy(&event).into_owned();
                let field = |name: &str| event.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
                if let Some(id) = field("id:").and_then(|id| id.parse().ok()) {
                    last = Some(id);
                }
                if field("event:") == Some("entry")
                    && let Some(e) = field("data:").and_then(|d| serde_json::from_str(d).ok())
                {
                    show(global, &e);
                }
            }
        }
        if last.is_none() {
            bail!("the daemon ended the stream");
        }
    }
}

fn read(file: &str) -> anyhow::Result<Vec<u8>> {
    if file != "-" {
        return std::fs::read(file).with_context(|| format!("{file} cannot be read"));
    }
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes).context("standard input cannot be read")?;
    Ok(bytes)
}

/// Records a CloudEvent, or a batch of them.
pub(super) async fn event(client: &Client, file: &str, atomic: bool) -> anyhow::Result<()> {
    let body = read(file)?;
    let many = body.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'[');
    let kind = if many { "application/cloudevents-batch+json" } else { "application/cloudevents+json" };
    let request = client.request(Method::POST, "/v1/audit/events").query(&[("atomic", atomic)]);
    say(client.json(request.header("content-type", kind).body(body)).await?);
    Ok(())
}

/// Saves a search.
pub(super) async fn save(client: &Client, name: &str, file: &str) -> anyhow::Result<()> {
    let request = client.request(Method::PUT, &format!("/v1/audit/searches/{name}"));
    say(client.json(request.header("content-type", "application/json").body(read(file)?)).await?);
    Ok(())
}
