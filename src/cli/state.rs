//! `sop state`: keys from the command line.

mod lock;

use std::io::{Read as _, Write as _};

use anyhow::{Context as _, bail};
use clap::Subcommand;
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use reqwest::Method;
use serde_json::{Value, json};

use crate::kernel::crypto::base64;

use super::client::{Client, Events};
use super::{Global, say};

use lock::Lock;

#[derive(Subcommand)]
pub(crate) enum StateCommand {
    /// Print a key's value
    Get {
        key: String,
        /// As of this index
        #[arg(long)]
        at: Option<i64>,
    },
    /// Put a value under a key
    Put {
        key: String,
        /// The value; `-` or nothing reads it from stdin
        value: Option<String>,
        /// Kept with the value
        #[arg(long, default_value = "application/octet-stream")]
        content_type: String,
        /// Only if the key is at this index; 0: only if it is not there
        #[arg(long)]
        if_index: Option<i64>,
    },
    /// Delete a key
    Rm {
        key: String,
        /// Only if the key is at this index
        #[arg(long)]
        if_index: Option<i64>,
    },
    /// List the keys under a prefix
    Ls {
        #[arg(default_value = "")]
        prefix: String,
        /// As of this index
        #[arg(long)]
        at: Option<i64>,
    },
    /// Watch keys, until it is stopped
    Watch {
        /// Keys that begin so; none, and no --key: all
        prefixes: Vec<String>,
        /// This key; may be repeated
        #[arg(long)]
        key: Vec<String>,
        /// Changes after this index; without it, from now on
        #[arg(long)]
        after: Option<i64>,
    },
    /// Run a command while a lock is held; without a command, show who holds it
    Lock(Lock),
    /// Compare keys, then do one of two lists of operations, all at one index: `{"if": [...], "then": [...], "else": [...]}`
    Txn {
        /// File with the transaction; `-` reads it from stdin
        file: String,
    },
    /// Make several changes, of any rooms, as one: `{"operations": [{"state:put": {...}}, {"nexus:publish": {...}}, ...]}`
    Tx {
        /// File with the changes; `-` reads it from stdin
        file: String,
    },
}

pub(crate) async fn run(global: &Global, command: StateCommand) -> anyhow::Result<()> {
    let client = Client::find(global).await?;
    match command {
        StateCommand::Get { key, at } => get(global, &client, &key, at).await,
        StateCommand::Put { key, value, content_type, if_index } => {
            let bytes = match value.as_deref() {
                None | Some("-") => stdin()?,
                Some(text) => text.as_bytes().to_vec(),
            };
            let request = conditional(client.request(Method::PUT, &path(&key)), if_index);
            let written = client.json(request.header("content-type", content_type).body(bytes)).await?;
            tell(global, &written, |w| format!("{} at index {}, version {}", key, w["index"], w["version"]));
            Ok(())
        }
        StateCommand::Rm { key, if_index } => {
            let gone = client.json(conditional(client.request(Method::DELETE, &path(&key)), if_index)).await?;
            tell(global, &gone, |w| format!("{} deleted at index {}", key, w["index"]));
            Ok(())
        }
        StateCommand::Ls { prefix, at } => list(global, &client, &prefix, at).await,
        StateCommand::Watch { prefixes, key, after } => watch(global, &client, &prefixes, &key, after).await,
        StateCommand::Lock(lock) => lock::run(global, &client, lock).await,
        StateCommand::Txn { file } => post(&client, "/v1/state/txn", &file).await,
        StateCommand::Tx { file } => post(&client, "/v1/tx", &file).await,
    }
}

/// Sends a file, or stdin, and prints what is answered.
async fn post(client: &Client, path: &str, file: &str) -> anyhow::Result<()> {
    let body = if file == "-" { stdin()? } else { std::fs::read(file).with_context(|| file.to_owned())? };
    let request = client.request(Method::POST, path).header("content-type", "application/json");
    say(client.json(request.body(body)).await?);
    Ok(())
}

fn stdin() -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes).context("stdin cannot be read")?;
    Ok(bytes)
}

async fn get(global: &Global, client: &Client, key: &str, at: Option<i64>) -> anyhow::Result<()> {
    let mut request = client.request(Method::GET, &path(key));
    if let Some(at) = at {
        request = request.query(&[("at", at)]);
    }
    let answer = client.send(request).await?;
    if !global.json {
        std::io::stdout().write_all(&answer.bytes().await?)?;
        return Ok(());
    }
    let header = |name: &str| answer.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let number = |text: Option<String>| text.and_then(|t| t.trim_matches('"').parse::<i64>().ok());
    // As lists show it.
    let mut item = json!({
        "key": key, "content_type": header("content-type"), "index": number(header("etag")),
        "created_index": number(header("sop-created-index")), "version": number(header("sop-version")),
    });
    if let Some(lease) = header("sop-lease") {
        item["lease"] = lease.into();
    }
    item["value"] = base64(answer.bytes().await?).into();
    say(item);
    Ok(())
}

async fn list(global: &Global, client: &Client, prefix: &str, at: Option<i64>) -> anyhow::Result<()> {
    let mut after: Option<String> = None;
    loop {
        let mut query =
            vec![("prefix", prefix.to_owned()), ("keys_only", "true".to_owned()), ("limit", "1000".to_owned())];
        query.extend(at.map(|at| ("at", at.to_string())));
        query.extend(after.take().map(|a| ("after", a)));
        let page = client.json(client.request(Method::GET, "/v1/state/kv").query(&query)).await?;
        for item in page["items"].as_array().into_iter().flatten() {
            tell(global, item, |i| {
                let name = i["key"].as_str().or(i["key_base64"].as_str()).unwrap_or_default();
                format!("{name}\tindex {}\tversion {}", i["index"], i["version"])
            });
        }
        match page["next"].as_str() {
            Some(next) => after = Some(next.to_owned()),
            None => return Ok(()),
        }
    }
}

/// Changes as they come; goes on where it was when the connection is lost.
async fn watch(
    global: &Global,
    client: &Client,
    prefixes: &[String],
    keys: &[String],
    after: Option<i64>,
) -> anyhow::Result<()> {
    let named = prefixes.iter().map(|p| ("prefix", p)).chain(keys.iter().map(|k| ("key", k)));
    let named: Vec<_> = named.collect();
    let mut last = after;
    loop {
        let mut request = client.request(Method::GET, "/v1/state/watch").query(&named);
        if let Some(last) = last {
            request = request.query(&[("after", last)]);
        }
        let mut events = Events::of(client.send(request).await?);
        while let Some((event, id, data)) = events.next().await {
            last = id.or(last);
            let Value::Object(mut change) = data else { continue };
            match event.as_str() {
                "put" | "delete" => {
                    change.insert("event".to_owned(), event.clone().into());
                    tell(global, &Value::Object(change), |c| {
                        let name = c["key"].as_str().or(c["key_base64"].as_str()).unwrap_or_default();
                        format!("{event}\t{name}\tindex {}", c["index"])
                    });
                }
                // It goes on from where it was; a watch that cannot is refused, and says why.
                _ => {}
            }
        }
        if last.is_none() {
            bail!("the daemon ended the watch");
        }
    }
}

fn conditional(request: reqwest::RequestBuilder, index: Option<i64>) -> reqwest::RequestBuilder {
    match index {
        None => request,
        Some(0) => request.header("if-none-match", "*"),
        Some(i) => request.header("if-match", format!("\"{i}\"")),
    }
}

fn path(key: &str) -> String {
    const KEEP: &AsciiSet = &CONTROLS.add(b' ').add(b'?').add(b'#').add(b'%').add(b'"').add(b'<').add(b'>').add(b'\\');
    format!("/v1/state/kv/{}", utf8_percent_encode(key, KEEP))
}

fn tell(global: &Global, value: &Value, text: impl Fn(&Value) -> String) {
    if global.json { say(value) } else { say(text(value)) }
}
