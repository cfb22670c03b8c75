//! `sop policy`, the part about bundles: from a file to what is in force, and back; and `sop decision`.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Subcommand;
use reqwest::Method;
use serde_json::{Value, json};

use super::client::Client;
use super::policy::folder::Folder;
use super::policy::{complain, encoded};
use super::{Global, say};

#[derive(Subcommand)]
pub(crate) enum BundleCommand {
    /// Make a draft of a bundle; a fault is told with line and column
    Draft {
        /// A file of Cedar text or Cedar's JSON; or a folder with *.cedar, a schema and cases, which all go along
        policies: PathBuf,
        /// A schema to hold it to, strictly
        #[arg(long)]
        schema: Option<PathBuf>,
        /// What it is for
        #[arg(long, default_value = "")]
        note: String,
        /// It replaces the system bundle, which rules the daemon itself
        #[arg(long)]
        system: bool,
    },
    /// Hold a draft to its schema and its cases
    Validate { id: String },
    /// List bundles, newest first
    Ls,
    /// Print a bundle: its policies and its schema
    Show { id: String },
    /// Print which bundles are in force, or were at an index
    Active {
        #[arg(long)]
        at: Option<i64>,
    },
    /// What a bundle would have decided, over the decisions that were made; exit 1 if any would be another
    Replay {
        id: String,
        #[arg(long)]
        from: Option<i64>,
        #[arg(long)]
        to: Option<i64>,
    },
    /// Propose a bundle for activation
    Propose {
        id: String,
        #[arg(long, default_value = "")]
        reason: String,
    },
    /// Approve a proposal of somebody else
    Approve {
        proposal: String,
        #[arg(long, default_value = "")]
        reason: String,
    },
    /// Reject a proposal
    Reject {
        proposal: String,
        #[arg(long, default_value = "")]
        reason: String,
    },
    /// List proposals, newest first
    Proposals,
    /// Let a bundle decide for a part of the subjects; 0 ends that
    Canary {
        id: String,
        percent: f64,
        /// It stops by itself when so many of a hundred of its decisions deny what the active bundle permits; 100: never
        #[arg(long)]
        stop_at: Option<f64>,
    },
    /// Bring a bundle into force, once others approved
    Activate {
        id: String,
        /// Even if you could not roll back under it
        #[arg(long)]
        force: bool,
    },
    /// Go back to the bundle that was in force before, at once
    Rollback {
        #[arg(long)]
        to: Option<String>,
        #[arg(long)]
        reason: String,
    },
}

#[derive(Subcommand)]
pub(crate) enum DecisionCommand {
    /// List decisions, newest first
    Ls {
        /// Id of whom they are about
        #[arg(long)]
        subject: Option<String>,
        #[arg(long)]
        action: Option<String>,
        /// Only denials
        #[arg(long)]
        denied: bool,
    },
    /// Why it was decided so, with the bundles and entities of its time
    Explain { id: String },
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or("-")
}

async fn post(client: &Client, path: &str, body: &Value) -> anyhow::Result<Value> {
    client.json(client.request(Method::POST, path).json(body)).await
}

async fn get(client: &Client, path: &str) -> anyhow::Result<Value> {
    client.json(client.request(Method::GET, path)).await
}

fn shown(global: &Global, whole: &Value, line: impl FnOnce() -> String) {
    say(if global.json { whole.to_string() } else { line() });
}

fn in_force(answer: &Value) -> String {
    let mut line = format!(
        "since {}: system {}, application {}",
        answer["index"],
        text(answer, "system"),
        text(answer, "application")
    );
    if answer["canary"].is_string() {
        line.push_str(&format!(", canary {} for {} %", text(answer, "canary"), answer["percent"]));
    }
    line
}

pub(crate) async fn run(global: &Global, client: &Client, command: BundleCommand) -> anyhow::Result<()> {
    let bundles = "/v1/governance/bundles";
    match command {
        BundleCommand::Draft { policies, schema, note, system } => {
            let rest = json!({"note": note, "scope": if system { "system" } else { "application" }});
            let made = draft(global, client, (&policies, schema.as_deref()), rest).await?;
            shown(global, &made, || {
                format!("{} {}: {} policies", text(&made, "id"), text(&made, "status"), made["count"])
            });
        }
        BundleCommand::Validate { id } => {
            let v = post(client, &format!("{bundles}/{}/validate", encoded(&id)), &json!({})).await?;
            shown(global, &v, || validated(&v));
        }
        BundleCommand::Ls => {
            let page = get(client, &format!("{bundles}?limit=1000")).await?;
            for b in page["items"].as_array().into_iter().flatten() {
                shown(global, b, || {
                    let (id, scope, status) = (text(b, "id"), text(b, "scope"), text(b, "status"));
                    format!("{id:<38}{scope:<13}{status:<9}{:>6} policies  {}", b["count"], text(b, "note"))
                });
            }
        }
        BundleCommand::Show { id } => {
            let b = get(client, &format!("{bundles}/{id}")).await?;
            shown(global, &b, || [text(&b, "policies"), b["schema"].as_str().unwrap_or_default()].join("\n"));
        }
        BundleCommand::Active { at } => {
            let at = at.map(|at| format!("?at={at}")).unwrap_or_default();
            let answer = get(client, &format!("/v1/governance/active{at}")).await?;
            shown(global, &answer, || in_force(&answer));
        }
        BundleCommand::Replay { id, from, to } => return replay(global, client, &id, from, to).await,
        BundleCommand::Propose { id, reason } => {
            let p = post(client, &format!("{bundles}/{id}/propose"), &json!({"reason": reason})).await?;
            shown(global, &p, || {
                format!("{} {}: needs {} to approve it", text(&p, "id"), text(&p, "status"), p["required"])
            });
        }
        BundleCommand::Approve { proposal, reason } => voice(global, client, &proposal, "approve", reason).await?,
        BundleCommand::Reject { proposal, reason } => voice(global, client, &proposal, "reject", reason).await?,
        BundleCommand::Proposals => {
            let page = get(client, "/v1/governance/proposals?limit=1000").await?;
            for p in page["items"].as_array().into_iter().flatten() {
                shown(global, p, || {
                    let (id, status, action) = (text(p, "id"), text(p, "status"), text(p, "action"));
                    format!("{id:<38}{status:<10}{action:<24}{}", text(p, "target"))
                });
            }
        }
        BundleCommand::Canary { id, percent, stop_at } => {
            let body = json!({"percent": percent, "stop_at": stop_at});
            let answer = post(client, &format!("{bundles}/{id}/canary"), &body).await?;
            shown(global, &answer, || in_force(&answer));
        }
        BundleCommand::Activate { id, force } => {
            let answer = post(client, &format!("{bundles}/{id}/activate"), &json!({"force": force})).await?;
            shown(global, &answer, || in_force(&answer));
        }
        BundleCommand::Rollback { to, reason } => {
            let answer = post(client, "/v1/governance/rollback", &json!({"to": to, "reason": reason})).await?;
            shown(global, &answer, || in_force(&answer));
        }
    }
    Ok(())
}

fn validated(v: &Value) -> String {
    let schema = if v["validated"] == true { "its schema" } else { "no schema" };
    let (passed, covered, policies) = (&v["passed"], &v["coverage"]["covered"], &v["coverage"]["policies"]);
    let (id, status) = (text(v, "bundle"), text(v, "status"));
    format!("{id} {status}: held to {schema}; {passed} cases passed, {covered} of {policies} policies covered")
}

/// Makes a draft of a file, or of a folder with its schema and its cases. If a folder is refused, what is wrong is said by file.
async fn draft(
    global: &Global,
    client: &Client,
    (path, schema): (&Path, Option<&Path>),
    mut body: Value,
) -> anyhow::Result<Value> {
    if !path.is_dir() {
        let read = |p: &Path| std::fs::read_to_string(p).with_context(|| format!("{} cannot be read", p.display()));
        body["policies"] = read(path)?.into();
        body["schema"] = schema.map(read).transpose()?.into();
        return post(client, "/v1/governance/bundles", &body).await;
    }
    let folder = match Folder::read(path, schema, body["scope"] == "system")? {
        Ok(folder) => folder,
        Err(complaints) => {
            complain(global, &complaints);
            anyhow::bail!("{} cannot be read", path.display())
        }
    };
    let source = folder.source();
    body["policies"] = source.policies.into();
    body["schema"] = source.schema.into();
    body["tests"] = folder.cases().map(|case| json!(case)).collect();
    let made = post(client, "/v1/governance/bundles", &body).await;
    if made.is_err()
        && let Err(complaints) = folder.bench()
    {
        complain(global, &complaints);
    }
    made
}

async fn voice(global: &Global, client: &Client, id: &str, what: &str, reason: String) -> anyhow::Result<()> {
    let p = post(client, &format!("/v1/governance/proposals/{id}/{what}"), &json!({"reason": reason})).await?;
    shown(global, &p, || format!("{} is {}", text(&p, "id"), text(&p, "status")));
    Ok(())
}

/// A decision that would be another, on one line.
pub(super) fn flip(f: &Value) -> String {
    let verdict = |v: &Value| if v == true { "permit" } else { "deny" };
    let (subject, resource) = (&f["subject"], &f["resource"]);
    format!(
        "{} {}::{} {} {}::{}: {} -> {}",
        text(f, "decision_id"),
        text(subject, "type"),
        text(subject, "id"),
        text(f, "action"),
        text(resource, "type"),
        text(resource, "id"),
        verdict(&f["before"]),
        verdict(&f["after"])
    )
}

/// Says on a terminal how far something has come.
fn progress(line: &str) {
    use std::io::{IsTerminal as _, Write as _};
    let mut stderr = std::io::stderr();
    if stderr.is_terminal() {
        let _ = writeln!(stderr, "{line}");
    }
}

async fn replay(global: &Global, client: &Client, id: &str, from: Option<i64>, to: Option<i64>) -> anyhow::Result<()> {
    let (mut after, mut read, mut changed) = (Value::Null, 0, 0);
    loop {
        let body = json!({"from": from, "to": to, "after": after});
        let piece = post(client, &format!("/v1/governance/bundles/{id}/replay"), &body).await?;
        read += piece["read"].as_u64().unwrap_or(0);
        changed += piece["changed"].as_u64().unwrap_or(0);
        for f in piece["flips"].as_array().into_iter().flatten() {
            shown(global, f, || flip(f));
        }
        if piece["next"].is_null() {
            break;
        }
        progress(&format!(
            "up to index {} of {}: {read} read, {changed} would be other ones",
            piece["reached"], piece["to"]
        ));
        after = piece["next"].clone();
    }
    let whole = json!({"read": read, "changed": changed});
    shown(global, &whole, || format!("{read} decisions read, {changed} would be other ones"));
    anyhow::ensure!(changed == 0, "{changed} decisions would be other ones");
    Ok(())
}

pub(crate) async fn decision(global: &Global, command: DecisionCommand) -> anyhow::Result<()> {
    let client = Client::find(global).await?;
    match command {
        DecisionCommand::Ls { subject, action, denied } => {
            let mut query = vec![("limit", "100".to_owned())];
            query.extend(subject.map(|s| ("subject", s)));
            query.extend(action.map(|a| ("action", a)));
            query.extend(denied.then(|| ("decision", "false".to_owned())));
            let page = client.json(client.request(Method::GET, "/v1/governance/decisions").query(&query)).await?;
            for d in page["items"].as_array().into_iter().flatten() {
                shown(global, d, || {
                    let verdict = if d["decision"] == true { "permit" } else { "deny" };
                    let (id, action) = (text(d, "decision_id"), text(d, "action"));
                    let (subject, resource) = (text(&d["subject"], "id"), text(&d["resource"], "id"));
                    format!("{id}  {verdict:<7}{subject} {action} {resource}")
                });
            }
        }
        DecisionCommand::Explain { id } => {
            let e = post(&client, &format!("/v1/governance/decisions/{id}/explain"), &json!({})).await?;
            shown(global, &e, || {
                let mut lines = vec![text(&e, "reason").to_owned()];
                let policies = e["policies"].as_array().into_iter().flatten();
                lines.extend(policies.map(|p| text(p, "text").to_owned()));
                let missed = e["missed"].as_array().into_iter().flatten();
                lines.extend(missed.map(|m| format!("not {}: {}", text(m, "id"), text(m, "failed"))));
                lines.join("\n")
            });
        }
    }
    Ok(())
}
