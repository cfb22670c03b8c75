//! What the record costs to follow and to check: entry to signed checkpoint, and a whole log offline.

use std::time::Duration;

use anyhow::Context as _;
use reqwest::Method;
use serde_json::json;

use crate::audit::note::{Checkpoint, VerifierKey};
use crate::cli::client::Client;
use crate::cli::process::{Sop, folder};
use crate::cli::verify::{self, Source};
use crate::cli::{Global, audit, say};
use crate::kernel::Clock;
use crate::kernel::supervisor::{Stop, detach};

use super::load::{self, Request};
use super::store;

/// Entries a second while checkpoints are timed.
const PACE: u64 = 1000;

/// How long from the answer to a put until a signed checkpoint covers it.
pub(super) async fn checkpoint(global: &Global, client: &Client, seconds: u64) -> anyhow::Result<()> {
    let clock = Clock::system();
    let key = client.send(client.request(Method::GET, "/log/key")).await?.text().await?;
    let key = VerifierKey::parse(&key).context("the log's key cannot be read")?;
    let stop = Stop::new();
    let (url, done, c) = (client.url().to_owned(), stop.clone(), clock.clone());
    let watching = detach(async move {
        let http = reqwest::Client::new();
        let mut seen: Vec<(u64, Duration)> = Vec::new();
        while !done.is_cancelled() {
            let text = http.get(format!("{url}/log/checkpoint")).send().await?.text().await?;
            let size = Checkpoint::open(&text, &key).map_err(anyhow::Error::msg)?.size;
            if seen.last().is_none_or(|(last, _)| *last < size) {
                seen.push((size, c.elapsed()));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        anyhow::Ok(seen)
    });
    let mut puts = Vec::new();
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    for n in 0..seconds * 100 {
        tick.tick().await;
        for i in 0..PACE / 100 {
            let request = client.request(Method::PUT, &format!("/v1/state/kv/paced/{i}")).body(n.to_string());
            let clock = clock.clone();
            puts.push(detach(async move {
                let index = request.send().await?.json::<serde_json::Value>().await?["index"].as_u64();
                anyhow::Ok((index.context("a put has no index")?, clock.elapsed()))
            }));
        }
    }
    let mut lags = Vec::new();
    let mut all = Vec::new();
    for put in puts {
        all.push(put.await??);
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    stop.cancel();
    let seen = watching.await??;
    for (index, answered) in all {
        if let Some((_, at)) = seen.iter().find(|(size, _)| *size > index) {
            lags.push(at.saturating_sub(answered).as_secs_f64() * 1e3);
        }
    }
    lags.sort_by(f64::total_cmp);
    let at = |q: f64| lags.get(((lags.len().saturating_sub(1)) as f64 * q) as usize).copied().unwrap_or(f64::NAN);
    if global.json {
        say(json!({"entries": lags.len(), "a_second": PACE, "p50_ms": at(0.5), "p99_ms": at(0.99)}));
    } else {
        say(format!(
            "{} entries at {PACE} a second: signed {:.0} ms (p50), {:.0} ms (p99) after their answers.",
            lags.len(),
            at(0.5),
            at(0.99)
        ));
    }
    Ok(())
}

/// Writes for some seconds, saves the log, and times its verification.
pub(super) async fn whole(
    global: &Global,
    ours: &Sop,
    client: Client,
    puts: &Request,
    seconds: u64,
) -> anyhow::Result<()> {
    load::round(ours.address(), puts, 128, Duration::from_secs(seconds * 3)).await?;
    let key = client.send(client.request(Method::GET, "/log/key")).await?.text().await?;
    let key = VerifierKey::parse(&key).context("the log's key cannot be read")?;
    let dir = folder("bench-log")?;
    // The last checkpoint is on its way.
    tokio::time::sleep(Duration::from_secs(1)).await;
    audit::save(client, &dir, false).await?;
    let clock = Clock::system();
    let mut best = f64::INFINITY;
    let mut entries = 0;
    for _ in 0..3 {
        let began = clock.elapsed();
        entries = verify::log(&Source::Folder(dir.clone()), &key, None).await?.entries;
        best = best.min(clock.elapsed().saturating_sub(began).as_secs_f64());
    }
    let _ = std::fs::remove_dir_all(&dir);
    let rate = entries as f64 / best;
    if global.json {
        say(json!({"entries": entries, "seconds": best, "a_second": rate}));
    } else {
        say(format!("{entries} entries of a saved folder verified in {best:.2} s: {rate:.0} a second."));
    }
    Ok(())
}

/// Entries of the large log, about; and requests that are timed.
const LARGE: f64 = 1_000_000.0;
const TIMED: usize = 200;

/// Fills a log, and times searches with two filters, receipts, and verification through the daemon.
pub(super) async fn large(
    global: &Global,
    ours: &Sop,
    client: Client,
    puts: &Request,
    seconds: u64,
) -> anyhow::Result<()> {
    let first = load::round(ours.address(), puts, 128, Duration::from_secs(seconds)).await?;
    let rest = (LARGE / first.rate.max(1.0)) as u64;
    load::round(ours.address(), puts, 128, Duration::from_secs(rest.clamp(seconds, 180))).await?;
    // The search follows; nothing is timed before it has come to the end.
    loop {
        let answer = client.request(Method::GET, "/v1/audit/entries?limit=1").send().await?;
        if answer.status().is_success() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let page = client.json(client.request(Method::GET, "/v1/audit/entries?limit=1")).await?;
    let entries = page["items"][0]["index"].as_u64().context("the record is empty")? + 1;
    if !global.json {
        say(format!(
            "Over {entries} entries, one request at a time:\n\n| what | p50 ms | p95 ms | p99 ms |\n|---|---|---|---|"
        ));
    }
    let actor = page["items"][0]["actor"].as_str().unwrap_or_default().to_owned();
    for (what, query) in [
        ("search: actor and action, frequent", format!("actor={actor}&action=state:put")),
        ("search: actor and outcome, none", format!("actor={actor}&outcome=failed")),
        ("search: action and action's room, rare", "action=ledger:begin&room=ledger".to_owned()),
        ("search: resource and action", "resource=key/bench/4711&action=state:put".to_owned()),
        ("search: a word and an action", "text=4711&action=state:put".to_owned()),
    ] {
        timed(global, what, &client, |_| format!("/v1/audit/entries?{query}")).await?;
    }
    let place = |n: usize| (n as u64 * 7_919_993) % entries;
    timed(global, "receipt of an entry", &client, |n| format!("/v1/audit/entries/{}/receipt", place(n))).await?;
    timed(global, "full tile of hashes", &client, |n| {
        format!("/log/tile/0/{}", crate::audit::tiles::place(place(n) % (entries / 256)))
    })
    .await?;
    let key = client.send(client.request(Method::GET, "/log/key")).await?.text().await?;
    let key = VerifierKey::parse(&key).context("the log's key cannot be read")?;
    let clock = Clock::system();
    let began = clock.elapsed();
    let verified = verify::log(&Source::Daemon(client), &key, None).await?.entries;
    let took = clock.elapsed().saturating_sub(began).as_secs_f64();
    let rate = verified as f64 / took;
    if global.json {
        say(json!({"entries": verified, "seconds": took, "a_second": rate}));
    } else {
        say(format!("\n{verified} entries verified through the daemon in {took:.1} s: {rate:.0} a second."));
    }
    Ok(())
}

/// Leaves of the tree whose proofs are timed.
const LEAVES: u64 = 10_000_000;

/// Receipts and tiles of a log of ten million leaves, most of them made in the database and none by requests.
pub(super) async fn proofs(global: &Global, ours: &Sop, client: Client) -> anyhow::Result<()> {
    store::grow(ours.dir(), LEAVES.cast_signed()).await?;
    let key = client.send(client.request(Method::GET, "/log/key")).await?.text().await?;
    let key = VerifierKey::parse(&key).context("the log's key cannot be read")?;
    loop {
        let note = client.send(client.request(Method::GET, "/log/checkpoint")).await?.text().await?;
        if Checkpoint::open(&note, &key).map_err(anyhow::Error::msg)?.size >= LEAVES {
            break;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    if !global.json {
        say(format!(
            "Over {LEAVES} leaves, each place asked for once:\n\n| what | p50 ms | p95 ms | p99 ms |\n|---|---|---|---|"
        ));
    }
    let place = |n: usize| (n as u64 * 7_919_993) % LEAVES;
    timed(global, "receipt of an entry", &client, |n| format!("/v1/audit/entries/{}/receipt", place(n))).await?;
    timed(global, "inclusion at an earlier size", &client, |n| {
        format!("/v1/audit/entries/{}/receipt?size={}", place(n) / 2, LEAVES - 1 - place(n) / 2)
    })
    .await?;
    timed(global, "cold tile of hashes", &client, |n| {
        format!("/log/tile/0/{}", crate::audit::tiles::place(place(n + TIMED) % (LEAVES / 256)))
    })
    .await
}

async fn timed(global: &Global, what: &str, client: &Client, path: impl Fn(usize) -> String) -> anyhow::Result<()> {
    let clock = Clock::system();
    let mut all = Vec::with_capacity(TIMED);
    for n in 0..TIMED {
        let began = clock.elapsed();
        client.send(client.request(Method::GET, &path(n))).await?.bytes().await?;
        all.push(clock.elapsed().saturating_sub(began).as_secs_f64() * 1e3);
    }
    all.sort_by(f64::total_cmp);
    let at = |q: f64| all.get(((TIMED - 1) as f64 * q) as usize).copied().unwrap_or(f64::NAN);
    if global.json {
        say(json!({"what": what, "p50_ms": at(0.5), "p95_ms": at(0.95), "p99_ms": at(0.99)}));
    } else {
        say(format!("| {what} | {:.2} | {:.2} | {:.2} |", at(0.5), at(0.95), at(0.99)));
    }
    Ok(())
}
