//! `sop status`: how the running daemon is.

use anyhow::bail;
use reqwest::Method;

use super::client::Client;
use super::{Global, say};

pub(crate) async fn run(global: &Global) -> anyhow::Result<()> {
    let client = Client::find(global).await?;
    let request = client.request(Method::GET, "/readyz?verbose").header("accept", "application/json");
    // Not ready is an answer here, not a failure to ask.
    let answer = request.send().await?;
    let ready = answer.status().is_success();
    let text = answer.text().await?;
    if global.json {
        say(text.trim());
    } else {
        say(format!("{} at {}", if ready { "ready" } else { "NOT ready" }, client.url()));
        let verbose: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        for (name, check) in verbose["checks"].as_object().into_iter().flatten() {
            let ok = check["ok"].as_bool().unwrap_or(false);
            say(format!(
                "  {} {name}{}",
                if ok { "ok  " } else { "FAIL" },
                check["detail"].as_str().map(|d| format!(": {d}")).unwrap_or_default()
            ));
        }
    }
    if ready { Ok(()) } else { bail!("the daemon is not ready") }
}
