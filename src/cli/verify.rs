//! `sop verify`: checks a whole log, from a running daemon or a saved folder, with nothing but its public key.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Args;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::audit::note::{Checkpoint, VerifierKey};
use crate::audit::proof::Proof;
use crate::audit::tiles::{self, WIDTH, place};
use crate::audit::verify::{Verified, Verifier, Wrong};
use crate::kernel::Clock;
use crate::kernel::crypto::from_base64;

use super::client::Client;
use super::{Global, say};

#[derive(Args)]
pub(crate) struct VerifyArgs {
    /// Folder saved with `sop audit save`; without it, the running daemon
    dir: Option<PathBuf>,
    /// The log's verifier key, or a file that holds it; without it, the one that lies beside the log is believed
    #[arg(long)]
    key: Option<String>,
    /// A checkpoint that was seen before: the log must contain it
    #[arg(long, value_name = "FILE")]
    since: Option<PathBuf>,
    /// Verify this receipt instead of a log
    #[arg(long, value_name = "FILE", conflicts_with_all = ["dir", "since"])]
    receipt: Option<PathBuf>,
}

/// Where a log is read from.
pub(super) enum Source {
    Folder(PathBuf),
    Daemon(Client),
}

impl Source {
    /// The bytes under a path of the log: `checkpoint`, `key`, `tile/...`.
    pub async fn read(&self, path: &str) -> anyhow::Result<Option<Vec<u8>>> {
        match self {
            Self::Folder(dir) => match std::fs::read(dir.join(path)) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(e).with_context(|| format!("{} cannot be read", dir.join(path).display())),
            },
            Self::Daemon(client) => {
                let request = client.request(Method::GET, &format!("/log/{path}"));
                let answer =
                    request.send().await.with_context(|| format!("the daemon at {} does not answer", client.url()))?;
                if answer.status() == StatusCode::NOT_FOUND {
                    return Ok(None);
                }
                Ok(Some(client.checked(answer).await?.bytes().await?.to_vec()))
            }
        }
    }

    pub async fn text(&self, path: &str) -> anyhow::Result<String> {
        let bytes = self.read(path).await?.with_context(|| format!("the log has no {path}"))?;
        String::from_utf8(bytes).with_context(|| format!("{path} is not text"))
    }
}

pub(crate) async fn run(global: &Global, args: VerifyArgs) -> anyhow::Result<()> {
    let given = args.key.as_deref().map(read_key).transpose()?;
    if let Some(file) = &args.receipt {
        return receipt(global, file, given);
    }
    let clock = Clock::system();
    let began = clock.elapsed();
    let source = match args.dir {
        Some(dir) => Source::Folder(dir),
        None => Source::Daemon(Client::find(global).await?),
    };
    let key = match given {
        Some(key) => key,
        None => VerifierKey::parse(&source.text("key").await?).context("the log's key cannot be read")?,
    };
    let seen = match &args.since {
        Some(file) => {
            let note = std::fs::read_to_string(file).with_context(|| format!("{} cannot be read", file.display()))?;
            Some(Checkpoint::open(&note, &key).map_err(Wrong::Signature)?)
        }
        None => None,
    };
    let verified = log(&source, &key, seen).await?;
    let took = clock.elapsed().saturating_sub(began).as_secs_f64();
    if global.json {
        say(json!({"verified": verified, "seconds": took, "key": key.to_string()}));
    } else {
        say(format!(
            "verified {} entries of {} in {took:.2} s: every leaf, tile and the root; {} details checked; {} denials recorded",
            verified.entries, verified.origin, verified.details, verified.denied
        ));
    }
    Ok(())
}

/// Checks a whole log.
pub(super) async fn log(source: &Source, key: &VerifierKey, seen: Option<Checkpoint>) -> anyhow::Result<Verified> {
    let checkpoint = Checkpoint::open(&source.text("checkpoint").await?, key).map_err(Wrong::Signature)?;
    let size = checkpoint.size;
    let mut verifier = Verifier::new(checkpoint, seen)?;
    while verifier.next() < size {
        let from = verifier.next();
        let (bundle, hashes, name) = piece(source, from, size).await?;
        verifier.bundle(&bundle, &hashes, &name)?;
        if verifier.next() == from {
            bail!(Wrong::Index(from));
        }
        if let Source::Folder(_) = source {
            details(source, &mut verifier, from, &bundle).await?;
        }
    }
    Ok(verifier.finish()?)
}

/// The entry bundle from `from` on, the hashes of the tile beside it, and the tile's name.
async fn piece(source: &Source, from: u64, size: u64) -> anyhow::Result<(Vec<u8>, Vec<[u8; 32]>, String)> {
    let (n, width) = (from / WIDTH, (size - from).min(WIDTH));
    let suffix = if width == WIDTH { String::new() } else { format!(".p/{width}") };
    let name = format!("0/{}{suffix}", place(n));
    let bundle = source.read(&format!("tile/entries/{}{suffix}", place(n))).await?.ok_or(Wrong::Index(from))?;
    let tile = source.read(&format!("tile/{name}")).await?.ok_or_else(|| Wrong::Tile(name.clone()))?;
    Ok((bundle, tiles::hashes(&tile), name))
}

/// Details that were saved beside a bundle, one a line: index, salt, details, segment.
async fn details(source: &Source, verifier: &mut Verifier, from: u64, bundle: &[u8]) -> anyhow::Result<()> {
    let Some(lines) = source.read(&format!("details/{}.ndjson", place(from / WIDTH))).await? else { return Ok(()) };
    let leaves = split(bundle);
    for line in String::from_utf8_lossy(&lines).lines() {
        let saved: Value = serde_json::from_str(line).context("a line of saved details is not JSON")?;
        let index = saved["index"].as_u64().context("saved details have no index")?;
        let bytes = |name: &str| saved[name].as_str().and_then(from_base64);
        let leaf = index.checked_sub(from).and_then(|i| leaves.get(usize::try_from(i).ok()?));
        let (Some(leaf), Some(salt), Some(text)) = (leaf, bytes("salt"), bytes("details")) else {
            bail!(Wrong::Details(index))
        };
        let segment = bytes("segment").and_then(|s| s.try_into().ok());
        verifier.details(index, leaf, &salt, &text, segment.as_ref())?;
    }
    Ok(())
}

/// The leaves of a bundle.
pub(super) fn split(mut bundle: &[u8]) -> Vec<&[u8]> {
    let mut out = Vec::new();
    while let Some((length, rest)) = bundle.split_at_checked(2) {
        let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
        let Some((leaf, rest)) = rest.split_at_checked(length) else { break };
        out.push(leaf);
        bundle = rest;
    }
    out
}

fn receipt(global: &Global, file: &std::path::Path, key: Option<VerifierKey>) -> anyhow::Result<()> {
    let key = key.context("a receipt is checked with the log's key: --key")?;
    let text = std::fs::read_to_string(file).with_context(|| format!("{} cannot be read", file.display()))?;
    let proof = Proof::parse(&text).map_err(anyhow::Error::msg)?;
    let (leaf, checkpoint) = proof.verify(&key).map_err(anyhow::Error::msg)?;
    let leaf: Value = serde_json::from_slice(leaf).context("the receipt's entry is not JSON")?;
    if global.json {
        say(json!({"index": proof.index, "entry": leaf, "origin": checkpoint.origin, "size": checkpoint.size}));
    } else {
        say(format!("entry {} is in {} (size {}): {leaf}", proof.index, checkpoint.origin, checkpoint.size));
    }
    Ok(())
}

fn read_key(given: &str) -> anyhow::Result<VerifierKey> {
    let text = std::fs::read_to_string(given).unwrap_or_else(|_| given.to_owned());
    VerifierKey::parse(&text).with_context(|| format!("{given} is no verifier key, and no file that holds one"))
}
