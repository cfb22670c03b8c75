//! The measurements of tokens, and npm's oidc-provider beside us.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use super::load::{self, Request};
use super::{Global, What, say, store};
use crate::cli::client::Client;
use crate::cli::process::Sop;

const FORM: &str = "Content-Type: application/x-www-form-urlencoded\r\n";
/// Operation tokens that are used in turn.
const TOKENS: usize = 10_000;
/// Tokens that are revoked while others are verified.
const REVOKED: i64 = 1_000_000;
/// Access tokens that are verified in turn.
const SHOWN: usize = 2_000;

/// Id and secret of the daemon's administrator.
fn admin(dir: &Path) -> anyhow::Result<String> {
    let admin: Value = serde_json::from_slice(&std::fs::read(dir.join("admin.json"))?)?;
    let text = |name: &str| admin[name].as_str().unwrap_or_default().to_owned();
    Ok(format!("client_id={}&client_secret={}", text("client_id"), text("client_secret")))
}

pub(super) async fn requests(what: What, client: &Client, dir: &Path) -> anyhow::Result<Request> {
    let admin = admin(dir)?;
    let token = client.token().context("the bench has no token")?.to_owned();
    match what {
        What::Introspect => {
            let form = format!("{admin}&token={token}");
            Ok(Request::new(move |_| load::http("POST", "/oauth2/introspect", FORM, &form)))
        }
        What::OperationUse | What::OperationHot => {
            let count = if what == What::OperationHot { 1 } else { TOKENS };
            let tokens = Arc::new(operations(client, count).await?);
            let headers = format!("Authorization: Bearer {token}\r\nContent-Type: application/json\r\n");
            Ok(Request::new(move |n| {
                let body = format!(r#"{{"token":"{}","operation":"bench"}}"#, tokens[n % tokens.len()]);
                load::http("POST", "/v1/token/operations/use", &headers, &body)
            }))
        }
        _ => {
            let form = format!("grant_type=client_credentials&{admin}");
            Ok(Request::new(move |_| load::http("POST", "/oauth2/token", FORM, &form)))
        }
    }
}

/// Operation tokens that are good for a million uses each.
async fn operations(client: &Client, count: usize) -> anyhow::Result<Vec<String>> {
    let mut tokens = Vec::new();
    while tokens.len() < count {
        let wanted = json!({"kind": "operation", "operation": "bench", "max_uses": 1_000_000});
        let items = vec![wanted; (count - tokens.len()).min(1000)];
        let path = "/v1/token/operations/batch";
        let issued = client.json(client.request(Method::POST, path).json(&json!({"items": items}))).await?;
        let token = |o: &Value| o["token"].as_str().map(str::to_owned);
        tokens.extend(issued["items"].as_array().into_iter().flatten().filter_map(token));
    }
    Ok(tokens)
}

/// A daemon that begins with a million revoked tokens answers reads with many tokens, each of which is new to it once; how long
/// it takes to verify them is what its own histogram says.
pub(super) async fn verification(global: &Global, ours: &Sop, client: Client, seconds: u64) -> anyhow::Result<()> {
    store::revoke(ours.dir(), REVOKED).await?;
    let loaded = ours.beside("bench").await?;
    let form = format!("grant_type=client_credentials&{}", admin(ours.dir())?);
    let mut tokens = Vec::new();
    while tokens.len() < SHOWN {
        let request = client.request(Method::POST, "/oauth2/token");
        let request = request.header("content-type", "application/x-www-form-urlencoded").body(form.clone());
        let got = client.json(request).await?;
        tokens.push(got["access_token"].as_str().context("no token")?.to_owned());
    }
    let request = Request::new(move |n| {
        let bearer = format!("Authorization: Bearer {}\r\n", tokens[n % tokens.len()]);
        load::http("GET", "/v1/state/kv?consistency=stale&limit=1", &bearer, "")
    });
    let figures = load::round(loaded.address(), &request, 8, Duration::from_secs(seconds)).await?;
    let text = reqwest::get(format!("http://{}/metrics", loaded.address())).await?.text().await?;
    let (count, p50, p99) = quantiles(&text, "sop_token_verify_seconds").context("the histogram is missing")?;
    if global.json {
        say(json!({"revoked": REVOKED, "verified": count, "p50_us_at_most": p50, "p99_us_at_most": p99}));
    } else {
        say(
            "| revoked tokens | tokens shown | verifications | p50 | p99 | requests a second |\n|---|---|---|---|---|---|",
        );
        say(format!("| {REVOKED} | {SHOWN} | {count} | <= {p50:.0} us | <= {p99:.0} us | {:.0} |", figures.rate));
    }
    loaded.stop().await;
    Ok(())
}

/// Observations of a histogram, and the upper bounds, in microseconds, of the buckets their median and 99th percentile are in.
fn quantiles(text: &str, name: &str) -> Option<(f64, f64, f64)> {
    let buckets: Vec<(f64, f64)> = text
        .lines()
        .filter_map(|l| {
            let (bound, count) = l.strip_prefix(&format!("{name}_bucket{{le=\""))?.split_once("\"} ")?;
            Some((bound.parse().unwrap_or(f64::INFINITY), count.parse().ok()?))
        })
        .collect();
    let count = buckets.last()?.1;
    let at = |q: f64| buckets.iter().find(|(_, n)| *n >= count * q).map(|(bound, _)| bound * 1e6);
    Some((count, at(0.5)?, at(0.99)?))
}

/// npm's oidc-provider: `tests/peers/oidc-provider`, with its packages, in `target/peers/oidc-provider`.
pub(super) struct Oidc {
    #[allow(dead_code)]
    child: Child,
    address: String,
    opaque: String,
}

const CLIENT: &str = "client_id=bench&client_secret=bench-secret-bench-secret-bench-secret";

impl Oidc {
    pub async fn start() -> anyhow::Result<Self> {
        let dir = PathBuf::from("target/peers/oidc-provider");
        let spawned = Command::new("node")
            .arg("server.mjs")
            .current_dir(&dir)
            .env("NODE_ENV", "production")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn();
        super::fits("oidc-provider (node, and npm packages in target/peers/oidc-provider)", spawned.is_ok())?;
        let mut child = spawned?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("it has an output")?).read_line(&mut line).await?;
        let url = line.trim().strip_prefix("listening ").context("oidc-provider did not start")?.to_owned();
        let form = format!("grant_type=client_credentials&{CLIENT}&scope=state&resource=urn:opaque");
        let http = reqwest::Client::builder().no_proxy().build()?;
        let request = http.post(format!("{url}/token")).header("content-type", "application/x-www-form-urlencoded");
        let got: Value = request.body(form).send().await?.json().await?;
        let opaque = got["access_token"].as_str().context("it gave no token")?.to_owned();
        let address = url.trim_start_matches("http://").to_owned();
        Ok(Self { child, address, opaque })
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn requests(&self, what: What) -> Option<Request> {
        let (path, form) = match what {
            What::Token => ("/token", format!("grant_type=client_credentials&{CLIENT}&scope=state&resource=urn:jwt")),
            What::Introspect => ("/token/introspection", format!("{CLIENT}&token={}", self.opaque)),
            _ => return None,
        };
        Some(Request::new(move |_| load::http("POST", path, FORM, &form)))
    }
}
