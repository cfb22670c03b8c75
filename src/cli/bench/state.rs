//! What state costs: watchers, many keys, leases, and locks that everybody wants.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use futures_util::future::try_join_all;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::disk;
use super::load::{self, Figures, Request, quantile};
use super::{BenchArgs, Client, Global, Sop, head, row, value};
use crate::kernel::Clock;
use crate::kernel::supervisor::detach;

/// Watchers, and how many of them each event is for.
const WATCHERS: usize = 1_000;
const MATCHING: usize = 100;
/// Events a second.
const EVENTS: f64 = 100.0;
/// Watchers of keys that nobody changes.
const IDLE: usize = 10_000;
/// Watchers that join at once.
const JOINING: usize = 200;
/// Keys: few, and many.
const SIZES: [usize; 2] = [1_000, 1_000_000];
/// Keys put by one transaction while the store is filled.
const FILLED: usize = 128;
/// Clients of a comparison.
const CLIENTS: usize = 32;
/// Reads of a kind, one after another.
const READS: usize = 200;
/// Leases, and how often each is renewed.
const LEASES: usize = 10_000;
const RENEWED: Duration = Duration::from_secs(3);
/// Leases renewed by one request.
const TOGETHER: usize = 1_000;
/// Clients that renew one lease at a time.
const HOLDERS: usize = 1_000;
/// Who wants a lock.
const CONTENDERS: usize = 16;

fn bearer(client: &Client) -> anyhow::Result<String> {
    Ok(format!("Authorization: Bearer {}\r\n", client.token().context("the bench has no token")?))
}

/// Operations of a transaction.
const OPERATIONS: usize = 8;

/// One comparison and eight operations, of which so many get; the others put.
pub(super) fn transactions(client: &Client, gets: usize) -> anyhow::Result<Request> {
    use crate::kernel::crypto::base64;
    let headers = format!("{}Content-Type: application/json\r\n", bearer(client)?);
    Ok(Request::new(move |n| {
        let key = |i: usize| format!("bench/{}", (n * OPERATIONS + i) % super::KEYS);
        let put = |i: usize| json!({"put": {"key": key(i), "value": base64(value(n))}});
        let get = |i: usize| json!({"get": {"key": key(i)}});
        let puts = OPERATIONS - gets;
        let then: Vec<Value> = (0..puts).map(put).chain((puts..OPERATIONS).map(get)).collect();
        let condition = json!({"key": key(0), "target": "index", "op": "gt", "operand": -1});
        load::http("POST", "/v1/state/txn", &headers, &json!({"if": [condition], "then": then, "else": []}).to_string())
    }))
}

/// The same for etcd.
pub(super) fn etcd_transactions(gets: usize) -> Request {
    use crate::kernel::crypto::base64;
    Request::new(move |n| {
        let key = |i: usize| base64(format!("bench/{}", (n * OPERATIONS + i) % super::KEYS));
        let put = |i: usize| json!({"requestPut": {"key": key(i), "value": base64(value(n))}});
        let get = |i: usize| json!({"requestRange": {"key": key(i)}});
        let puts = OPERATIONS - gets;
        let success: Vec<Value> = (0..puts).map(put).chain((puts..OPERATIONS).map(get)).collect();
        let compare = json!({"key": key(0), "target": "MOD", "result": "GREATER", "mod_revision": "-1"});
        let body = json!({"compare": [compare], "success": success});
        load::http("POST", "/v3/kv/txn", "Content-Type: application/json\r\n", &body.to_string())
    })
}

/// A watcher's connection: what it hears, line by line.
struct Watcher {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Watcher {
    /// Joins, and has heard where it stands.
    async fn join(address: &str, prefix: &str, bearer: &str) -> anyhow::Result<Self> {
        let mut stream = TcpStream::connect(address).await?;
        let path = format!("/v1/state/watch?prefix={prefix}");
        stream.write_all(&load::http("GET", &path, bearer, "")).await?;
        let mut joined = Self { stream, buffer: Vec::new() };
        joined.heard("event: bookmark").await?;
        Ok(joined)
    }

    /// Hears every `step`th of so many events, from `first` on: its number, and when it was heard.
    async fn listen(
        mut self,
        first: usize,
        step: usize,
        events: usize,
        clock: Clock,
    ) -> anyhow::Result<Vec<(usize, Duration)>> {
        let (mut took, mut seen) = (Vec::new(), HashSet::new());
        for _ in (first..events).step_by(step) {
            let line = self.heard("\"key\":\"watched/").await?;
            let now = clock.elapsed();
            let n = line.split("watched/").nth(1).and_then(|key| key.split('"').next()?.split('/').nth(1));
            let n: usize = n.and_then(|n| n.parse().ok()).context("an event has no number")?;
            ensure!(n % step == first && seen.insert(n), "event {n} came twice, or astray");
            took.push((n, now));
        }
        Ok(took)
    }

    /// The next line that has this in it.
    async fn heard(&mut self, wanted: &str) -> anyhow::Result<String> {
        loop {
            while let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line);
                if line.contains(wanted) {
                    return Ok(line.into_owned());
                }
                ensure!(!line.contains("event: error"), "a watcher was cut");
            }
            ensure!(self.stream.read_buf(&mut self.buffer).await? > 0, "a watch has ended");
        }
    }
}

/// So many watchers, and a hundred events a second of which each is for a tenth of them: until a watcher has its event, from when
/// the put was sent, and from when it was answered. The commit lies between the two, and waits for the disk, which is measured by
/// itself meanwhile.
pub(super) async fn watchers(global: &Global, ours: &Sop, client: &Client, seconds: u64) -> anyhow::Result<()> {
    let (clock, bearer, groups) = (Clock::system(), bearer(client)?, WATCHERS / MATCHING);
    let events = (EVENTS * seconds as f64) as usize;
    let sent: Arc<Vec<AtomicU64>> = Arc::new((0..events).map(|_| AtomicU64::new(0)).collect());
    let mut listening = Vec::new();
    for first in (0..WATCHERS).step_by(JOINING) {
        let joining = (first..first + JOINING).map(|w| {
            let prefix = format!("watched/{}/", w % groups);
            let (address, bearer) = (ours.address().to_owned(), bearer.clone());
            async move { Watcher::join(&address, &prefix, &bearer).await }
        });
        for (w, watcher) in (first..).zip(try_join_all(joining).await?) {
            listening.push(detach(watcher.listen(w % groups, groups, events, clock.clone())));
        }
    }
    let (sent_, clock_) = (sent.clone(), clock.clone());
    let put = Request::new(move |n| {
        let now = u64::try_from(clock_.elapsed().as_micros()).unwrap_or(u64::MAX);
        if let Some(at) = sent_.get(n) {
            at.store(now, Ordering::Release);
        }
        load::http("PUT", &format!("/v1/state/kv/watched/{}/{n}", n % groups), &bearer, &value(n))
    });
    // Each event is due at its own time; what is made early is sent when it is due.
    let length = Duration::from_secs(seconds);
    let made = load::paced(ours.address(), &put, 8, EVENTS, length);
    let (made, synced) = tokio::try_join!(made, disk::syncs(ours.dir(), length))?;
    let sent = |n: usize| Duration::from_micros(sent[n].load(Ordering::Acquire));
    let answered: HashMap<usize, Duration> = made.iter().map(|m| (m.number, sent(m.number) + m.took)).collect();
    let mut all = Vec::new();
    for listener in listening {
        let took = tokio::time::timeout(Duration::from_secs(10), listener).await;
        all.extend(took.context("an event was lost")???);
    }
    ensure!(all.len() == events * MATCHING, "{} of {} events were heard", all.len(), events * MATCHING);
    let put = quantile(made.iter().map(|m| m.late), 0.99);
    let at = |q| quantile(all.iter().map(|(n, heard)| heard.saturating_sub(sent(*n))), q);
    let (p50, p99, most) = (at(0.5), at(0.99), at(1.0));
    let after = |q| quantile(all.iter().map(|(n, heard)| heard.saturating_sub(answered[n])), q);
    let (after_p99, after_most) = (after(0.99), after(1.0));
    let (disk_p99, disk_most) = (quantile(synced.iter().copied(), 0.99), quantile(synced, 1.0));
    row(
        global,
        &json!({"watchers": WATCHERS, "events": events, "heard": all.len(), "put_p99_ms": put, "p50_ms": p50, "p99_ms": p99, "max_ms": most,
            "after_answer_p99_ms": after_p99, "after_answer_max_ms": after_most, "disk_p99_ms": disk_p99, "disk_max_ms": disk_most}),
        format!(
            "{WATCHERS} watchers, {events} puts at {EVENTS:.0} a second, each heard by {MATCHING}: {} events, none lost. From sending the put to its event: {p50:.1} ms (p50), {p99:.1} ms (p99), {most:.1} ms at most; from its answer, {after_p99:.1} ms (p99), {after_most:.1} ms at most. The commit lies between the two: the put is answered within {put:.1} ms (p99). Meanwhile a page made durable by itself, 200 a second, took the disk {disk_p99:.1} ms (p99), {disk_most:.1} ms at most.",
            all.len()
        ),
    );
    Ok(())
}

/// What watchers cost of whom nothing is heard.
pub(super) async fn idle(global: &Global, ours: &Sop, client: &Client) -> anyhow::Result<()> {
    let bearer = bearer(client)?;
    let resident = || ours.resident().context("the daemon's memory cannot be read");
    let before = resident()?;
    let mut watchers = Vec::new();
    for first in (0..IDLE).step_by(JOINING) {
        let (address, bearer) = (ours.address(), &bearer);
        let joining = (first..first + JOINING).map(|w| async move {
            Watcher::join(address, &format!("idle/{w}/"), bearer).await.context("more files must be allowed: ulimit -n")
        });
        watchers.extend(try_join_all(joining).await?);
    }
    // All have had their bookmarks, twice.
    let began = ours.worked();
    tokio::time::sleep(Duration::from_secs(10)).await;
    let (after, worked) = (resident()?, ours.worked().saturating_sub(began));
    let cores = worked.as_secs_f64() / 10.0;
    let held = after.saturating_sub(before) / 1024;
    row(
        global,
        &json!({"watchers": watchers.len(), "before_kib": before, "after_kib": after, "cores": cores}),
        format!(
            "{} idle watchers: {held} MiB more ({} -> {} MiB resident), and {cores:.2} of a core for their bookmarks.",
            watchers.len(),
            before / 1024,
            after / 1024
        ),
    );
    Ok(())
}

/// Puts, pages and reads as of an index with few keys, and with a million.
pub(super) async fn keys(global: &Global, args: &BenchArgs, ours: &Sop, client: &Client) -> anyhow::Result<()> {
    use crate::kernel::crypto::base64;
    let bearer = bearer(client)?;
    let typed = format!("{bearer}Content-Type: application/json\r\n");
    let clock = Clock::system();
    head(
        global,
        &[
            "keys",
            "put, a second",
            "put p99 ms",
            "list page p99 ms",
            "get p99 ms",
            "get p50 ms",
            "as of an index, p99 ms",
            "as of an index, p50 ms",
        ],
    );
    let mut filled = 0;
    for size in SIZES {
        let headers = typed.clone();
        let fill = Request::new(move |n| {
            let keys = (filled + n * FILLED..size).take(FILLED);
            let put = |k: usize| json!({"put": {"key": format!("many/{k:07}"), "value": base64(value(k))}});
            let then: Vec<Value> = keys.map(put).collect();
            load::http("POST", "/v1/state/txn", &headers, &json!({"if": [], "then": then, "else": []}).to_string())
        });
        load::fill(ours.address(), &fill, 8, (size - filled).div_ceil(FILLED)).await?;
        filled = size;
        let headers = bearer.clone();
        let put = Request::new(move |n| {
            let key = n.wrapping_mul(2_654_435_761) % size;
            load::http("PUT", &format!("/v1/state/kv/many/{key:07}"), &headers, &value(n))
        });
        let at = index(client).await?;
        let mut rounds = Vec::new();
        for _ in 0..args.rounds {
            rounds.push(load::round(ours.address(), &put, CLIENTS, Duration::from_secs(args.seconds)).await?);
        }
        let puts = Figures::median(rounds);
        let timed = async |path: &dyn Fn(usize) -> String| {
            let mut took = Vec::new();
            for n in 0..READS {
                let request = client.request(Method::GET, &path(n * 7919 % size));
                let began = clock.elapsed();
                client.send(request).await?.bytes().await?;
                took.push(clock.elapsed().saturating_sub(began));
            }
            anyhow::Ok((quantile(took.iter().copied(), 0.99), quantile(took.iter().copied(), 0.5)))
        };
        let (page, _) = timed(&|n| format!("/v1/state/kv?prefix=many/{:03}&limit=100", n / 1000)).await?;
        let (get, get_half) = timed(&|n| format!("/v1/state/kv/many/{n:07}")).await?;
        let (past, past_half) = timed(&|n| format!("/v1/state/kv/many/{n:07}?at={at}")).await?;
        row(
            global,
            &json!({"keys": size, "rate": puts.rate, "put_p99_ms": puts.p99, "page_p99_ms": page, "get_p99_ms": get, "get_p50_ms": get_half, "past_p99_ms": past, "past_p50_ms": past_half}),
            format!(
                "| {size} | {:.0} | {:.2} | {page:.2} | {get:.2} | {get_half:.2} | {past:.2} | {past_half:.2} |",
                puts.rate, puts.p99
            ),
        );
    }
    Ok(())
}

/// The newest index.
async fn index(client: &Client) -> anyhow::Result<i64> {
    let answer = client.send(client.request(Method::GET, "/v1/state/kv?limit=1")).await?;
    let index = answer.headers().get("sop-index").and_then(|i| i.to_str().ok()?.parse().ok());
    index.context("an answer has no Sop-Index")
}

/// Leases that are renewed by many requests, and by few.
pub(super) async fn leases(global: &Global, ours: &Sop, client: &Client) -> anyhow::Result<()> {
    let bearer = bearer(client)?;
    let typed = format!("{bearer}Content-Type: application/json\r\n");
    let headers = typed.clone();
    let grant = Request::new(move |_| load::http("POST", "/v1/state/leases", &headers, r#"{"ttl": 600}"#));
    load::fill(ours.address(), &grant, CONTENDERS, LEASES).await?;
    let (mut ids, mut after) = (Vec::new(), String::new());
    while ids.len() < LEASES {
        let path = format!("/v1/state/leases?limit=1000{after}");
        let page = client.json(client.request(Method::GET, &path)).await?;
        let items = page["items"].as_array().context("a page has no items")?;
        ids.extend(items.iter().filter_map(|lease| lease["id"].as_str()).map(str::to_owned));
        after = format!("&after={}", page["next"].as_str().unwrap_or_default());
        ensure!(ids.len() >= LEASES || page["next"].is_string(), "{} of {LEASES} leases are there", ids.len());
    }
    let ids = Arc::new(ids);
    let (one, many) = (ids.clone(), ids.clone());
    let each = Request::new(move |n| {
        load::http("POST", &format!("/v1/state/leases/{}/renew", one[n % one.len()]), &bearer, "")
    });
    let together = Request::new(move |n| {
        let first = n * TOGETHER % many.len();
        load::http("POST", "/v1/state/leases/renew", &typed, &json!({"ids": many[first..first + TOGETHER]}).to_string())
    });
    head(global, &["leases", "renewed every", "requests a second", "p99 ms", "cores of the daemon and its PostgreSQL"]);
    let whole = LEASES as f64 / RENEWED.as_secs_f64();
    // A renewal waits a tenth of a second for others to share its entry with: one by one takes many holders.
    for (request, rate, holders) in [(together, whole / TOGETHER as f64, 1), (each, whole, HOLDERS)] {
        let began = ours.worked();
        let length = RENEWED * 4;
        let made = load::paced(ours.address(), &request, holders, rate, length).await?;
        let cores = ours.worked().saturating_sub(began).as_secs_f64() / length.as_secs_f64();
        let p99 = quantile(made.iter().map(|m| m.late), 0.99);
        row(
            global,
            &json!({"leases": LEASES, "every_s": RENEWED.as_secs(), "rate": rate, "p99_ms": p99, "cores": cores}),
            format!("| {LEASES} | {} s | {rate:.0} | {p99:.2} | {cores:.2} |", RENEWED.as_secs()),
        );
    }
    let listed = client.json(client.request(Method::GET, "/v1/state/leases?limit=1000")).await?;
    ensure!(listed["items"].as_array().is_some_and(|all| all.len() == 1000), "leases died while they were renewed");
    Ok(())
}

/// A lock that many want: how often it changes hands.
pub(super) async fn locks(global: &Global, ours: &Sop, client: &Client, seconds: u64) -> anyhow::Result<()> {
    let (clock, newest, count) = (Clock::system(), AtomicUsize::new(0), AtomicUsize::new(0));
    let (began, length) = (clock.elapsed(), Duration::from_secs(seconds));
    let bearer = bearer(client)?;
    let typed = format!("{bearer}Content-Type: application/json\r\n");
    let wanted = load::http("POST", "/v1/state/locks/wanted", &typed, r#"{"ttl": 30, "wait": 30}"#);
    let contend = async || {
        let (mut waits, mut wire) = (Vec::new(), load::Wire::to(ours.address()).await?);
        while clock.elapsed().saturating_sub(began) < length {
            let from = clock.elapsed();
            let held = wire.json(&wanted).await?;
            waits.push(clock.elapsed().saturating_sub(from));
            let token = held["fencing_token"].as_u64().context("a lock has no token")? as usize;
            if newest.fetch_max(token, Ordering::AcqRel) >= token {
                bail!("the fencing token {token} is not newer than all before it");
            }
            count.fetch_add(1, Ordering::Relaxed);
            let lease = held["lease"].as_str().context("a lock has no lease")?;
            let path = format!("/v1/state/locks/wanted?lease={lease}");
            wire.json(&load::http("DELETE", &path, &bearer, "")).await?;
        }
        anyhow::Ok(waits)
    };
    let waits: Vec<Duration> = try_join_all((0..CONTENDERS).map(|_| contend())).await?.concat();
    let rate = count.load(Ordering::Relaxed) as f64 / clock.elapsed().saturating_sub(began).as_secs_f64();
    let (p50, p99) = (quantile(waits.iter().copied(), 0.5), quantile(waits.iter().copied(), 0.99));
    row(
        global,
        &json!({"contenders": CONTENDERS, "hand_overs": rate, "wait_p50_ms": p50, "wait_p99_ms": p99}),
        format!(
            "{CONTENDERS} clients want one lock: it changes hands {rate:.0} times a second, in order, each waits {p50:.1} ms (p50), {p99:.1} ms (p99)."
        ),
    );
    Ok(())
}
