//! Changes that wait for others, and bundles that are tried, from the command line: `sop policy propose-change`, `apply`, `shadow`.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::Subcommand;
use reqwest::Method;
use serde_json::{Value, json};

use super::client::Client;
use super::{Global, say};

#[derive(Subcommand)]
pub(crate) enum ChangeCommand {
    /// Propose any change of the API to others: it is made by `apply`, once they approved
    ProposeChange {
        /// `PUT`, `POST` or `DELETE`
        method: Method,
        /// With its query: `/v1/state/kv/config/limit`
        path: String,
        /// File with the body; `-` reads it from stdin
        #[arg(long)]
        body: Option<PathBuf>,
        /// Of the body
        #[arg(long, default_value = "application/json")]
        content_type: String,
        /// Why
        #[arg(long)]
        reason: String,
    },
    /// Make the change that a proposal is of, exactly as it was approved
    Apply { proposal: String },
    /// Try a bundle beside what is in force, and say what would have been decided otherwise
    Shadow {
        id: String,
        /// Begin
        #[arg(long, conflicts_with = "off")]
        on: bool,
        /// End
        #[arg(long)]
        off: bool,
        /// Differences listed
        #[arg(long, default_value_t = 20)]
        limit: u16,
    },
}

fn body_of(path: &Path) -> anyhow::Result<Vec<u8>> {
    if path.as_os_str() == "-" {
        let mut bytes = Vec::new();
        std::io::stdin().read_to_end(&mut bytes).context("stdin cannot be read")?;
        return Ok(bytes);
    }
    std::fs::read(path).with_context(|| format!("{} cannot be read", path.display()))
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or("-")
}

pub(crate) async fn run(global: &Global, client: &Client, command: ChangeCommand) -> anyhow::Result<()> {
    match command {
        ChangeCommand::ProposeChange { method, path, body, content_type, reason } => {
            let mut request = client.request(method, &path).header("sop-propose", reason);
            if let Some(file) = body {
                request = request.header("content-type", content_type).body(body_of(&file)?);
            }
            let answer = client.send(request).await?;
            let proposed = answer.status().as_u16() == 202;
            let whole: Value = answer.json().await.unwrap_or_default();
            if global.json {
                say(&whole);
            } else if proposed {
                let (id, status) = (text(&whole, "id"), text(&whole, "status"));
                say(format!("{id} {status}: needs {} to approve it", whole["required"]));
            } else {
                say("it needs nobody, and is made");
            }
            Ok(())
        }
        ChangeCommand::Apply { proposal } => apply(global, client, &proposal).await,
        ChangeCommand::Shadow { id, on, off, limit } => {
            shadow(global, client, &id, on.then_some(true).or(off.then_some(false)), limit).await
        }
    }
}

async fn apply(global: &Global, client: &Client, id: &str) -> anyhow::Result<()> {
    let p = client.json(client.request(Method::GET, &format!("/v1/governance/proposals/{id}"))).await?;
    ensure!(p["kind"] == "request", "proposal {id} is of a {}: make that by its own command", text(&p, "kind"));
    let change = &p["body"];
    let method: Method = text(change, "method").parse().context("the proposal names no method")?;
    let path = match change["query"].as_str() {
        Some(query) => format!("{}?{query}", text(change, "path")),
        None => text(change, "path").to_owned(),
    };
    let mut request = client.request(method, &path).header("sop-proposal", id);
    if let Some(kind) = change["content_type"].as_str() {
        request = request.header("content-type", kind);
    }
    let body = match (change["body"].as_str(), change["body_base64"].as_str()) {
        (Some(text), _) => text.as_bytes().to_vec(),
        (None, Some(bytes)) => STANDARD.decode(bytes).context("the proposal's body is not base64")?,
        (None, None) => Vec::new(),
    };
    let answer = client.send(request.body(body)).await?;
    let index = answer.headers().get("sop-index").and_then(|i| i.to_str().ok()).unwrap_or("-").to_owned();
    let what = format!("{} on {}", text(&p, "action"), text(&p, "target"));
    say(if global.json { answer.text().await? } else { format!("{what} is made, at index {index}") });
    Ok(())
}

async fn shadow(global: &Global, client: &Client, id: &str, on: Option<bool>, limit: u16) -> anyhow::Result<()> {
    let path = format!("/v1/governance/bundles/{id}/shadow");
    if let Some(on) = on {
        let trial = client.json(client.request(Method::POST, &path).json(&json!({"on": on}))).await?;
        let line = if on { "is tried on every decision after" } else { "was tried up to" };
        let at = if on { &trial["since"] } else { &trial["until"] };
        say(if global.json { trial.to_string() } else { format!("{id} {line} {at}") });
        return Ok(());
    }
    let found = client.json(client.request(Method::GET, &format!("{path}?limit={limit}"))).await?;
    if global.json {
        say(&found);
        return Ok(());
    }
    found["flips"].as_array().into_iter().flatten().for_each(|f| say(super::bundle::flip(f)));
    let groups = |name: &str| {
        let all = found["groups"][name].as_object().into_iter().flatten();
        let mut all: Vec<(&String, u64)> = all.map(|(name, n)| (name, n.as_u64().unwrap_or(0))).collect();
        all.sort_by_key(|(name, n)| (std::cmp::Reverse(*n), *name));
        all.into_iter().take(5).map(|(name, n)| format!("{name} {n}")).collect::<Vec<_>>().join(", ")
    };
    for name in ["policy", "subject", "action"] {
        if !groups(name).is_empty() {
            say(format!("by {name}: {}", groups(name)));
        }
    }
    say(format!(
        "{} decisions tried up to index {}, {} would be other ones",
        found["read"], found["reached"], found["changed"]
    ));
    Ok(())
}
