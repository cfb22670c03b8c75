//! `sop audit`: looks into the record, and saves it for others to check.

mod look;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use clap::Subcommand;
use reqwest::Method;
use serde_json::{Value, json};

use crate::audit::note::{Checkpoint, VerifierKey};
use crate::audit::tiles::{WIDTH, place};
use crate::boot;
use crate::kernel::crypto::base64;
use crate::ledger::entry::canonical;

use super::client::Client;
use super::verify::Source;
use super::{Global, say, serve};

#[derive(Subcommand)]
pub(crate) enum AuditCommand {
    /// List entries, newest first
    #[command(visible_alias = "search")]
    List {
        #[command(flatten)]
        known: look::Known,
        /// A saved search
        #[arg(long, value_name = "NAME")]
        saved: Option<String>,
        /// At most so many
        #[arg(long, default_value_t = 20)]
        limit: u32,
    },
    /// Count entries by actor, room, action and outcome
    Facets {
        #[command(flatten)]
        known: look::Known,
    },
    /// Show entries as they come
    Tail {
        #[command(flatten)]
        known: look::Known,
        /// Those after this index too
        #[arg(long)]
        after: Option<i64>,
    },
    /// Record a CloudEvent, or a batch of them (a JSON array)
    Event {
        /// The file, or `-`
        file: String,
        /// Refuse a batch whole if one of it is bad
        #[arg(long)]
        atomic: bool,
    },
    /// List saved searches
    Searches,
    /// Save a search, with an alert on it if wanted: JSON, as docs/audit.md has it
    SaveSearch {
        /// Its name
        name: String,
        /// The file, or `-`
        file: String,
    },
    /// Forget a saved search
    ForgetSearch {
        /// Its name
        name: String,
    },
    /// Print the receipt of an entry
    Receipt {
        /// The entry's index
        index: i64,
    },
    /// Replace the log's key; the old one signs beside the new one for a while
    RotateKey {
        /// For so many seconds
        #[arg(long, default_value_t = 604_800)]
        overlap: u64,
    },
    /// Go on with a record that lost entries for good (a failover, a restored backup); the daemon must not run
    Resume {
        /// What happened, for the record
        #[arg(long)]
        reason: String,
    },
    /// Examine the whole record as it is stored and say what was changed; the daemon must not run
    Diagnose,
    /// Save the log into a folder that `sop verify DIR` checks offline
    Save {
        /// The folder; one that holds an earlier save is carried on
        dir: PathBuf,
        /// Save the details too (needs the right to read them)
        #[arg(long)]
        details: bool,
    },
}

pub(crate) async fn run(global: &Global, command: AuditCommand) -> anyhow::Result<()> {
    let client = match &command {
        AuditCommand::Resume { reason } => return resume(global, reason).await,
        AuditCommand::Diagnose => return diagnose(global).await,
        _ => Client::find(global).await?,
    };
    match command {
        AuditCommand::Resume { .. } | AuditCommand::Diagnose => Ok(()),
        AuditCommand::List { known, saved, limit } => look::search(global, &client, known, saved, limit).await,
        AuditCommand::Facets { known } => look::facets(global, &client, known).await,
        AuditCommand::Tail { known, after } => look::tail(global, &client, known, after).await,
        AuditCommand::Event { file, atomic } => look::event(&client, &file, atomic).await,
        AuditCommand::Searches => {
            let page = client.json(client.request(Method::GET, "/v1/audit/searches?limit=1000")).await?;
            page["items"].as_array().into_iter().flatten().for_each(say);
            Ok(())
        }
        AuditCommand::SaveSearch { name, file } => look::save(&client, &name, &file).await,
        AuditCommand::ForgetSearch { name } => {
            client.send(client.request(Method::DELETE, &format!("/v1/audit/searches/{name}"))).await?;
            Ok(())
        }
        AuditCommand::RotateKey { overlap } => {
            let request = client.request(Method::POST, "/v1/audit/log-keys/rotate").json(&json!({"overlap": overlap}));
            say(client.json(request).await?);
            Ok(())
        }
        AuditCommand::Receipt { index } => {
            let path = format!("/v1/audit/entries/{index}/receipt");
            let text = client.send(client.request(Method::GET, &path)).await?.text().await?;
            say(text.trim_end());
            Ok(())
        }
        AuditCommand::Save { dir, details } => {
            let (checkpoint, fetched) = save(client, &dir, details).await?;
            if global.json {
                say(json!({"entries": checkpoint.size, "fetched": fetched, "dir": dir}));
            } else {
                let (entries, origin, dir) = (checkpoint.size, checkpoint.origin, dir.display());
                say(format!(
                    "saved {entries} entries of {origin} in {dir} ({fetched} files new); check them with: sop verify {dir}"
                ));
            }
            Ok(())
        }
    }
}

/// Mirrors checkpoint, key, tiles and entry bundles under the paths they are served at. Full tiles that are there are kept.
pub(super) async fn save(client: Client, dir: &Path, details: bool) -> anyhow::Result<(Checkpoint, u64)> {
    let source = Source::Daemon(client);
    let key_text = source.text("key").await?;
    let key = VerifierKey::parse(&key_text).context("the log's key cannot be read")?;
    let note = source.text("checkpoint").await?;
    let checkpoint = Checkpoint::open(&note, &key).map_err(anyhow::Error::msg)?;
    let mut fetched = 0u64;
    for n in 0..checkpoint.size.div_ceil(WIDTH) {
        let width = (checkpoint.size - n * WIDTH).min(WIDTH);
        let suffix = if width == WIDTH { String::new() } else { format!(".p/{width}") };
        for path in [format!("tile/0/{}{suffix}", place(n)), format!("tile/entries/{}{suffix}", place(n))] {
            let file = dir.join(&path);
            if !file.exists() {
                let bytes = source.read(&path).await?.with_context(|| format!("the log has no {path}"))?;
                write(&file, &bytes)?;
                fetched += 1;
            }
        }
    }
    for level in 1u32..8 {
        let all = checkpoint.size >> (8 * level);
        for n in 0..all.div_ceil(WIDTH) {
            let width = (all - n * WIDTH).min(WIDTH);
            let suffix = if width == WIDTH { String::new() } else { format!(".p/{width}") };
            let path = format!("tile/{level}/{}{suffix}", place(n));
            if !dir.join(&path).exists() {
                let bytes = source.read(&path).await?.with_context(|| format!("the log has no {path}"))?;
                write(&dir.join(&path), &bytes)?;
                fetched += 1;
            }
        }
    }
    if details && let Source::Daemon(client) = &source {
        save_details(client, dir, checkpoint.size).await?;
    }
    write(&dir.join("key"), key_text.as_bytes())?;
    write(&dir.join("checkpoint"), note.as_bytes())?;
    Ok((checkpoint, fetched))
}

async fn save_details(client: &Client, dir: &Path, size: u64) -> anyhow::Result<()> {
    let mut after: Option<String> = None;
    let (mut n, mut lines) = (0, String::new());
    loop {
        let mut query = vec![("order", "asc".to_owned()), ("limit", "1000".to_owned())];
        query.extend(after.take().map(|a| ("after", a)));
        let page = client.json(client.request(Method::GET, "/v1/audit/entries").query(&query)).await?;
        for e in page["items"].as_array().into_iter().flatten() {
            let index = e["index"].as_u64().context("an entry has no index")?;
            if index >= size {
                break;
            }
            if index / WIDTH != n {
                write(&dir.join(format!("details/{}.ndjson", place(n))), lines.as_bytes())?;
                (n, lines) = (index / WIDTH, String::new());
            }
            if let (Some(salt), Value::Object(_)) = (e["salt"].as_str(), &e["details"]) {
                let line = json!({"index": index, "salt": salt, "details": base64(canonical(&e["details"])), "segment": e["segment"]});
                lines.push_str(&format!("{line}\n"));
            }
        }
        match page["next"].as_str() {
            Some(next) => after = Some(next.to_owned()),
            None => break,
        }
    }
    write(&dir.join(format!("details/{}.ndjson", place(n))), lines.as_bytes())
}

fn write(file: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let Some(parent) = file.parent() else { bail!("{} has no folder", file.display()) };
    let beside = file.with_extension("new");
    std::fs::create_dir_all(parent)
        .and_then(|()| std::fs::write(&beside, bytes))
        .and_then(|()| std::fs::rename(&beside, file))
        .with_context(|| format!("{} cannot be written", file.display()))
}

async fn resume(global: &Global, reason: &str) -> anyhow::Result<()> {
    let done = boot::resume(&serve::load(global, None)?, reason).await.map_err(|e| anyhow!(e))?;
    let Some(done) = done else {
        bail!("nothing is lost or known to be changed: the database extends the checkpoint in the data folder")
    };
    let lost = done.lost.as_ref();
    if global.json {
        say(json!({
            "published_size": lost.map(|l| l.0.size), "database_size": lost.map(|l| l.0.head), "index": done.index,
            "checkpoint": lost.map(|l| l.1.display().to_string()), "accepted": done.accepted,
        }));
        return Ok(());
    }
    for what in &done.accepted {
        say(format!("accepted: {what}"));
    }
    if let Some((lost, aside)) = lost {
        say(format!(
            "entry {} says that the log goes on at {} of {} published entries; the checkpoint that had them is now {}",
            done.index,
            lost.head,
            lost.size,
            aside.display()
        ));
    } else {
        say(format!("entry {} says that the log goes on although this was changed", done.index));
    }
    Ok(())
}

async fn diagnose(global: &Global) -> anyhow::Result<()> {
    let (entries, found) = boot::diagnose(&serve::load(global, None)?).await.map_err(|e| anyhow!(e))?;
    if global.json {
        let found: Vec<Value> = found.iter().map(|f| json!({"index": f.index, "what": f.what})).collect();
        say(json!({"entries": entries, "found": found}));
    } else {
        found.iter().for_each(|f| say(&f.what));
    }
    if found.is_empty() {
        if !global.json {
            say(format!(
                "{entries} entries, their details, records and tiles, the checkpoint and the head: all as they were written"
            ));
        }
        return Ok(());
    }
    bail!(
        "{} things are not as they were written; mend them from a backup, or go on with: sop audit resume",
        found.len()
    )
}
