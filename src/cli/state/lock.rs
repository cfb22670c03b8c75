//! Running a command while a lock is held.

use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::Method;
use serde_json::{Value, json};

use crate::cli::client::Client;
use crate::cli::{Global, OtherFailed, say};

#[derive(Args)]
pub(crate) struct Lock {
    /// The lock
    name: String,
    /// Seconds after which the lock passes on if this process is gone
    #[arg(long, default_value_t = 15.0)]
    ttl: f64,
    /// Seconds to wait for it, 0-60
    #[arg(long, default_value_t = 60.0)]
    wait: f64,
    /// With all others who read
    #[arg(long, conflicts_with = "limit")]
    read: bool,
    /// So many may hold it at once
    #[arg(long)]
    limit: Option<i64>,
    /// What to run; it finds the fencing token in SOP_FENCING_TOKEN, as NAME=TOKEN. The exit code is
    /// that of this command. Without a command the lock is shown
    #[arg(last = true)]
    command: Vec<String>,
}

/// Holds a lock and renews its lease while the command runs. One that lost its lock is ended.
pub(crate) async fn run(global: &Global, client: &Client, lock: Lock) -> anyhow::Result<()> {
    let path = format!("/v1/state/locks/{}", utf8_percent_encode(&lock.name, NON_ALPHANUMERIC));
    let Some((program, args)) = lock.command.split_first() else {
        let stands = client.json(client.request(Method::GET, &path)).await?;
        return show(global, &stands);
    };
    let mut body = json!({"ttl": lock.ttl, "wait": lock.wait});
    if lock.read {
        body["mode"] = "read".into();
    }
    if let Some(limit) = lock.limit {
        body["limit"] = limit.into();
    }
    let held = client.json(client.request(Method::POST, &path).json(&body)).await?;
    let lease = held["lease"].as_str().context("the daemon named no lease")?.to_owned();
    let mut command = tokio::process::Command::new(program);
    command.args(args).env("SOP_FENCING_TOKEN", format!("{}={}", lock.name, held["fencing_token"]));
    let done = attend(client, command, &lease, lock.ttl).await;
    let release = client.request(Method::DELETE, &path).query(&[("lease", &lease)]);
    // Whoever lost it has nothing to give back.
    let released = client.send(release).await;
    let status = done.with_context(|| program.clone())?;
    released.context("the command has ended, and the lock could not be given back; it passes on by itself")?;
    if !status.success() {
        return Err(OtherFailed { program: program.clone(), status }.into());
    }
    Ok(())
}

async fn attend(
    client: &Client,
    mut command: tokio::process::Command,
    lease: &str,
    ttl: f64,
) -> anyhow::Result<ExitStatus> {
    let mut child = command.kill_on_drop(true).spawn()?;
    let third = Duration::from_secs_f64((ttl / 3.0).max(0.2));
    let mut failed = Duration::ZERO;
    loop {
        tokio::select! {
            done = child.wait() => return Ok(done?),
            () = tokio::time::sleep(third) => {}
        }
        let path = format!("/v1/state/leases/{lease}/renew");
        let renewal = tokio::time::timeout(third, client.request(Method::POST, &path).send()).await;
        match renewal {
            Ok(Ok(answer)) if answer.status().is_success() => failed = Duration::ZERO,
            Ok(Ok(answer)) if answer.status() == 404 => {
                child.kill().await?;
                bail!("the lock was lost, and the command ended");
            }
            // A daemon that restarts is asked again; a lease that may have run out is none.
            _ => {
                failed += 2 * third;
                if failed.as_secs_f64() >= ttl {
                    child.kill().await?;
                    bail!("the lock could not be renewed in time, and the command was ended");
                }
            }
        }
    }
}

fn show(global: &Global, stands: &Value) -> anyhow::Result<()> {
    if global.json {
        say(stands);
        return Ok(());
    }
    let parties = |list: &str| stands[list].as_array().cloned().unwrap_or_default();
    for holder in parties("holders") {
        let who = holder["holder"].as_str().unwrap_or_default();
        say(format!("held\t{who}\t{}\ttoken {}", holder["mode"].as_str().unwrap_or_default(), holder["fencing_token"]));
    }
    for waiter in parties("queue") {
        let who = waiter["holder"].as_str().unwrap_or_default();
        say(format!("waits\t{who}\t{}\tsince {}", waiter["mode"].as_str().unwrap_or_default(), waiter["since_index"]));
    }
    Ok(())
}
