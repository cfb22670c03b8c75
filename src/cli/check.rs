//! `sop check` and `sop migrate`: what the daemon would start with, before it starts.

use anyhow::{anyhow, bail};
use clap::Args;
use serde_json::json;

use crate::store::{Store, take_folder};

use super::serve::load;
use super::{Global, say};

#[derive(Args)]
pub(crate) struct MigrateArgs {
    /// Only say what is pending
    #[arg(long)]
    dry_run: bool,
}

/// Prints the effective configuration, then tries the database. Ends with 1 if anything is amiss.
pub(crate) async fn run(global: &Global) -> anyhow::Result<()> {
    let loaded = load(global, None)?;
    let seen = database(&loaded.config).await;
    if global.json {
        let (ok, detail) = match &seen {
            Ok(detail) => (true, detail),
            Err(detail) => (false, detail),
        };
        say(json!({"config": loaded.effective(), "database": {"ok": ok, "detail": detail}}));
    } else {
        let width = loaded.effective().iter().map(|e| e.key.len()).max().unwrap_or(0);
        for e in loaded.effective() {
            say(format!("{:width$}  {:12} {}", e.key, e.origin, if e.value.is_empty() { "\"\"" } else { &e.value }));
        }
        say("");
        match &seen {
            Ok(detail) => say(format!("database: {detail}")),
            Err(detail) => say(format!("database: FAILED, {detail}")),
        }
    }
    if seen.is_err() { bail!("the check found something amiss") } else { Ok(()) }
}

async fn database(config: &crate::config::Config) -> Result<String, String> {
    if config.database.url.is_none() && !config.data.dir.join("pg").exists() {
        return Ok("the private cluster will be made at first start".to_owned());
    }
    let _folder = match (&config.database.url, take_folder(&config.data.dir)) {
        (_, Ok(lock)) => Some(lock),
        (Some(_), Err(_)) => None,
        (None, Err(running)) => return Ok(format!("not tried, {running}")),
    };
    let store = Store::open(config).await?;
    let pending = store.pending().await;
    store.stop().await;
    let pending = pending?;
    Ok(if pending.is_empty() {
        "the schema is current".to_owned()
    } else {
        format!("{} migrations are pending; serve applies them", pending.len())
    })
}

/// Brings the schema up to this binary.
pub(crate) async fn migrate(global: &Global, args: MigrateArgs) -> anyhow::Result<()> {
    let loaded = load(global, None)?;
    let _folder = match (&loaded.config.database.url, take_folder(&loaded.config.data.dir)) {
        (_, Ok(lock)) => Some(lock),
        (Some(_), Err(_)) => None,
        (None, Err(running)) => bail!(running),
    };
    let store = Store::open(&loaded.config).await.map_err(|e| anyhow!(e))?;
    let done = async {
        let pending = store.pending().await?;
        if !args.dry_run {
            store.migrate().await?;
        }
        Ok::<_, String>(pending)
    };
    let done = done.await;
    store.stop().await;
    let pending = done.map_err(|e| anyhow!(e))?;
    if global.json {
        say(json!({"applied": !args.dry_run, "migrations": pending}));
        return Ok(());
    }
    let verb = if args.dry_run { "pending" } else { "applied" };
    pending.iter().for_each(|m| say(format!("{verb} {:04} {}", m.version, m.name)));
    if pending.is_empty() {
        say("the schema is current");
    }
    Ok(())
}
