//! `sop verify`: checks a whole log, from a running daemon or a saved folder, with nothing but its public key.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::Args;
use futures_util::{StreamExt as _, stream};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::audit::note::{Checkpoint, VerifierKey};
use crate::audit::proof::{Proof, RecordExtra};
use crate::audit::tiles::{self, WIDTH, place};
use crate::audit::verify::{Verified, Verifier, Wrong};
use crate::kernel::Clock;
use crate::kernel::crypto::from_base64;
use crate::ledger::merkle;

use super::client::Client;
use super::{Global, say};

#[derive(Args)]
pub(crate) struct VerifyArgs {
    /// Nothing, or `log`, for the running daemon; `[log] URL|DIR`; `receipt FILE`; `consistency OLD NEW [URL|DIR]`
    #[arg(value_name = "WHAT", num_args = 0..=4)]
    what: Vec<String>,
    /// The log's verifier key, or a file that holds one or more; without it, the one that lies beside the log is believed
    #[arg(long = "key", value_name = "VKEY|FILE")]
    keys: Vec<String>,
    /// A checkpoint that was verified before: only what came since is read, and the file is moved on (not if it lies in a saved log). Made if it is not there
    #[arg(long, value_name = "FILE")]
    since: Option<PathBuf>,
    /// The same as `receipt FILE`
    #[arg(long, value_name = "FILE", conflicts_with_all = ["what", "since"])]
    receipt: Option<PathBuf>,
    /// How many of the witnesses must have signed the checkpoint
    #[arg(long, value_name = "N", default_value_t = 0)]
    require_witnesses: usize,
    /// A witness's verifier key, or a file that holds some
    #[arg(long = "witness", value_name = "VKEY|FILE")]
    witnesses: Vec<String>,
}

/// What is to be verified.
enum Target {
    Log(Option<String>),
    Receipt(PathBuf),
    Consistency(PathBuf, PathBuf, Option<String>),
}

impl Target {
    fn read(args: &VerifyArgs) -> anyhow::Result<Self> {
        if let Some(file) = &args.receipt {
            return Ok(Self::Receipt(file.clone()));
        }
        let words: Vec<&str> = args.what.iter().map(String::as_str).collect();
        Ok(match words[..] {
            [] | ["log"] => Self::Log(None),
            ["log", place] | [place] => Self::Log(Some(place.to_owned())),
            ["receipt", file] => Self::Receipt(file.into()),
            ["consistency", old, new] => Self::Consistency(old.into(), new.into(), None),
            ["consistency", old, new, place] => Self::Consistency(old.into(), new.into(), Some(place.to_owned())),
            _ => bail!("what is to be verified: [log] [URL|DIR], receipt FILE, or consistency OLD NEW [URL|DIR]"),
        })
    }
}

/// Witnesses, and how many of them must have signed.
struct Required {
    witnesses: Vec<VerifierKey>,
    least: usize,
}

impl Required {
    fn check(&self, note: &str) -> anyhow::Result<()> {
        let signed = self.witnesses.iter().filter(|w| w.witness && w.cosigned(note).is_some()).count();
        if signed < self.least {
            bail!("the checkpoint is signed by {signed} of the given witnesses, {} are required", self.least);
        }
        Ok(())
    }
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
    let target = Target::read(&args)?;
    let keys = read_keys(&args.keys)?;
    let required = Required { witnesses: read_keys(&args.witnesses)?, least: args.require_witnesses };
    match target {
        Target::Receipt(file) => receipt(global, &file, &keys, &required),
        Target::Log(place) => whole(global, place, keys, args.since.as_deref(), &required).await,
        Target::Consistency(old, new, place) => consistency(global, &old, &new, place, keys).await,
    }
}

async fn source(global: &Global, place: Option<String>) -> anyhow::Result<Source> {
    Ok(match place {
        Some(url) if url.starts_with("http://") || url.starts_with("https://") => {
            Source::Daemon(Client::at_url(&url).await?)
        }
        Some(dir) => Source::Folder(dir.into()),
        None => Source::Daemon(Client::find(global).await?),
    })
}

async fn or_its_own(keys: Vec<VerifierKey>, source: &Source) -> anyhow::Result<Vec<VerifierKey>> {
    if !keys.is_empty() {
        return Ok(keys);
    }
    Ok(vec![VerifierKey::parse(&source.text("key").await?).context("the log's key cannot be read")?])
}

async fn whole(
    global: &Global,
    place: Option<String>,
    keys: Vec<VerifierKey>,
    since: Option<&Path>,
    required: &Required,
) -> anyhow::Result<()> {
    let clock = Clock::system();
    let began = clock.elapsed();
    let source = source(global, place).await?;
    let keys = or_its_own(keys, &source).await?;
    let seen = match since {
        Some(file) if file.exists() => Some(kept(file, &keys)?),
        _ => None,
    };
    let note = source.text("checkpoint").await?;
    required.check(&note)?;
    let checkpoint = Checkpoint::open_any(&note, &keys).map_err(Wrong::Signature)?;
    let verified = leaves(&source, checkpoint, seen).await?;
    // A checkpoint in a saved log belongs to it: it is used, and left as it is.
    let ours = |file: &&Path| !file.parent().is_some_and(|dir| dir.join("tile").is_dir());
    if let Some(file) = since.filter(ours) {
        let beside = file.with_extension("new");
        std::fs::write(&beside, &note)
            .and_then(|()| std::fs::rename(&beside, file))
            .with_context(|| format!("{} cannot be written", file.display()))?;
    }
    let took = clock.elapsed().saturating_sub(began).as_secs_f64();
    if global.json {
        say(json!({"verified": verified, "seconds": took, "key": keys.first().map(ToString::to_string)}));
    } else {
        let known = match verified.known {
            0 => String::new(),
            n => format!("; {n} of them known from before and bound by their root"),
        };
        say(format!(
            "verified {} entries of {} in {took:.2} s: every leaf, tile and the root; {} details checked; {} denials recorded{known}",
            verified.entries, verified.origin, verified.details, verified.denied
        ));
    }
    Ok(())
}

/// A checkpoint that somebody kept.
fn kept(file: &Path, keys: &[VerifierKey]) -> anyhow::Result<Checkpoint> {
    let note = std::fs::read_to_string(file).with_context(|| format!("{} cannot be read", file.display()))?;
    Ok(Checkpoint::open_any(&note, keys).map_err(Wrong::Signature)?)
}

/// Checks a whole log.
pub(super) async fn log(source: &Source, key: &VerifierKey, seen: Option<Checkpoint>) -> anyhow::Result<Verified> {
    let checkpoint = Checkpoint::open(&source.text("checkpoint").await?, key).map_err(Wrong::Signature)?;
    leaves(source, checkpoint, seen).await
}

/// Pieces that are asked for before they are needed.
const AHEAD: usize = 8;

/// Checks the leaves of a log: all, or those since a checkpoint.
async fn leaves(source: &Source, checkpoint: Checkpoint, seen: Option<Checkpoint>) -> anyhow::Result<Verified> {
    let size = checkpoint.size;
    let mut verifier = match seen.filter(|s| s.size > 0) {
        Some(seen) if seen.size <= size => {
            let nodes = nodes(source, seen.size, size).await?;
            Verifier::resume(checkpoint, seen, nodes)?
        }
        seen => Verifier::new(checkpoint, seen)?,
    };
    let first = verifier.next() / WIDTH;
    let ahead = if matches!(source, Source::Folder(_)) { 1 } else { AHEAD };
    // Nothing may be new: then there is nothing to read.
    let end = if verifier.next() < size { size.div_ceil(WIDTH) } else { first };
    let starts = (first..end).map(|n| n * WIDTH);
    let mut pieces = std::pin::pin!(stream::iter(starts.map(|from| piece(source, from, size))).buffered(ahead));
    let mut above = Above::default();
    while let Some(read) = pieces.next().await {
        let (from, (bundle, hashes, name)) = (verifier.next(), read?);
        verifier.bundle(&bundle, &hashes, &name)?;
        if verifier.next() == from {
            bail!(Wrong::Index(from));
        }
        if let Source::Folder(_) = source {
            details(source, &mut verifier, from / WIDTH * WIDTH, &bundle).await?;
        }
        // A run that goes on in the middle does not have what a tile above began with.
        if first == 0 && hashes.len() as u64 == WIDTH {
            above.grow(0, merkle::root(&hashes));
            above.check(source).await?;
        }
    }
    let verified = verifier.finish()?;
    above.rest(source).await?;
    Ok(verified)
}

/// The tiles above the leaves' own, as the leaves give them.
#[derive(Default)]
struct Above {
    /// Of each level from 1: how many are whole, and the hashes of the next.
    levels: Vec<(u64, Vec<[u8; 32]>)>,
    done: Vec<(usize, u64, Vec<[u8; 32]>)>,
}

impl Above {
    fn grow(&mut self, level: usize, hash: [u8; 32]) {
        if self.levels.len() <= level {
            self.levels.push((0, Vec::new()));
        }
        let (whole, hashes) = &mut self.levels[level];
        hashes.push(hash);
        if hashes.len() as u64 == WIDTH {
            let full = std::mem::take(hashes);
            *whole += 1;
            let n = *whole - 1;
            let root = merkle::root(&full);
            self.done.push((level + 1, n, full));
            self.grow(level + 1, root);
        }
    }

    async fn check(&mut self, source: &Source) -> anyhow::Result<()> {
        for (level, n, hashes) in std::mem::take(&mut self.done) {
            let suffix = if hashes.len() as u64 == WIDTH { String::new() } else { format!(".p/{}", hashes.len()) };
            let name = format!("{level}/{}{suffix}", place(n));
            match source.read(&format!("tile/{name}")).await? {
                Some(bytes) if bytes == hashes.concat() => {}
                // A folder that was saved before these were kept.
                None if matches!(source, Source::Folder(_)) => {}
                _ => bail!(Wrong::Tile(name)),
            }
        }
        Ok(())
    }

    /// The unfinished ones.
    async fn rest(&mut self, source: &Source) -> anyhow::Result<()> {
        let levels = std::mem::take(&mut self.levels).into_iter().enumerate();
        let open = levels.filter(|(_, (_, hashes))| !hashes.is_empty());
        self.done.extend(open.map(|(level, (whole, hashes))| (level + 1, whole, hashes)));
        self.check(source).await
    }
}

/// The roots of the perfect subtrees of the first `of` leaves, as a log of `size` has them in its tiles.
async fn nodes(source: &Source, of: u64, size: u64) -> anyhow::Result<Vec<[u8; 32]>> {
    let mut out = Vec::new();
    for subtree in merkle::subtrees(0, of) {
        out.push(node(source, subtree, size).await?);
    }
    Ok(out)
}

async fn node(source: &Source, subtree: merkle::Subtree, size: u64) -> anyhow::Result<[u8; 32]> {
    let (tile, range) = tiles::holder(subtree);
    let all = size >> (8 * u32::from(tile.level));
    let width = (all - tile.n * WIDTH).min(WIDTH);
    let suffix = if width == WIDTH { String::new() } else { format!(".p/{width}") };
    let name = format!("{}/{}{suffix}", tile.level, place(tile.n));
    let bytes = source.read(&format!("tile/{name}")).await?.ok_or_else(|| Wrong::Tile(name.clone()))?;
    let hashes = tiles::hashes(&bytes);
    Ok(merkle::root(hashes.get(range).ok_or(Wrong::Tile(name))?))
}

/// Whether one checkpoint extends another, by the tiles of the log.
async fn consistency(
    global: &Global,
    old: &Path,
    new: &Path,
    place: Option<String>,
    keys: Vec<VerifierKey>,
) -> anyhow::Result<()> {
    let source = source(global, place).await?;
    let keys = or_its_own(keys, &source).await?;
    let (old, new) = (kept(old, &keys)?, kept(new, &keys)?);
    let now = Checkpoint::open_any(&source.text("checkpoint").await?, &keys).map_err(Wrong::Signature)?;
    if old.size > new.size || new.size > now.size {
        bail!(Wrong::Shrunk(format!("sizes {}, {} and {} (the log's) do not grow", old.size, new.size, now.size)));
    }
    let mut proof = Vec::new();
    if old.size > 0 && old.size < new.size {
        for (start, end) in merkle::consistency(old.size, new.size) {
            let mut nodes = Vec::new();
            for subtree in merkle::subtrees(start, end) {
                nodes.push(node(&source, subtree, now.size).await?);
            }
            proof.extend(merkle::fold(&nodes));
        }
    }
    if !merkle::verify_consistency(old.size, new.size, &old.root, &new.root, &proof) {
        bail!(Wrong::Shrunk(format!("the log of {} entries does not extend that of {}: a fork", new.size, old.size)));
    }
    if global.json {
        say(json!({"origin": new.origin, "from": old.size, "to": new.size, "consistent": true}));
    } else {
        say(format!("{}: the log of {} entries extends that of {}", new.origin, new.size, old.size));
    }
    Ok(())
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

fn receipt(global: &Global, file: &Path, keys: &[VerifierKey], required: &Required) -> anyhow::Result<()> {
    if keys.is_empty() {
        bail!("a receipt is checked with the log's key: --key");
    }
    let text = std::fs::read_to_string(file).with_context(|| format!("{} cannot be read", file.display()))?;
    let proof = Proof::parse(&text).map_err(anyhow::Error::msg)?;
    required.check(&proof.checkpoint)?;
    let (leaf, record, checkpoint) = if RecordExtra::parse(&proof.extra).is_some() {
        let (leaf, record, checkpoint) = proof.verify_record(keys).map_err(anyhow::Error::msg)?;
        (leaf, Some(String::from_utf8_lossy(&record).into_owned()), checkpoint)
    } else {
        let (leaf, checkpoint) = proof.verify_any(keys).map_err(anyhow::Error::msg)?;
        (leaf.to_vec(), None, checkpoint)
    };
    let leaf: Value = serde_json::from_slice(&leaf).context("the receipt's entry is not JSON")?;
    let (index, origin, size) = (proof.index, checkpoint.origin, checkpoint.size);
    if global.json {
        say(json!({"index": index, "entry": leaf, "record": record, "origin": origin, "size": size}));
    } else {
        say(format!("entry {index} is in {origin} (size {size}): {leaf}"));
        if let Some(record) = record {
            say(format!("and this is a record of it: {record}"));
        }
    }
    Ok(())
}

/// Keys, given as such or in files, one a line.
fn read_keys(given: &[String]) -> anyhow::Result<Vec<VerifierKey>> {
    let mut all = Vec::new();
    for one in given {
        let text = std::fs::read_to_string(one).unwrap_or_else(|_| one.clone());
        for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
            let key = VerifierKey::parse(line);
            all.push(key.with_context(|| format!("{one} is no verifier key, and no file that holds one"))?);
        }
    }
    Ok(all)
}
