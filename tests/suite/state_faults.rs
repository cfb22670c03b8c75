//! Keys where something gives: daemons that freeze and die under watchers, a disk that is full, names and values at their
//! limits, and a great many keys that go at once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, Row as _};
use tokio::sync::watch;

use crate::state::problem;
use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::dice::Dice;
use crate::support::postgres::{Database, database, database_alone};
use crate::support::{record, soon, until};

/// A change as a watcher hears of it and as history has it: its index, the key, and whether it was put.
type Told = (i64, String, bool);

/// Where two daemons are now.
type Urls = [watch::Receiver<String>; 2];

/// Whoever watches goes on, on the other daemon, when a stream ends or says nothing for a moment, from the last id it had.
async fn follow(client: Client, urls: Urls, first: usize, end: watch::Receiver<i64>) -> Vec<Told> {
    let (mut heard, mut last, mut at) = (Vec::new(), 0, first);
    loop {
        at += 1;
        let client = client.clone_at(&urls[at % 2].borrow().clone());
        let request = client.request(Method::GET, "/v1/state/watch?prefix=w/").await.header("last-event-id", last);
        match request.send().await {
            Ok(answer) if answer.status() == 200 => {
                let mut stream = answer.bytes_stream();
                let (mut text, mut group) = (String::new(), Vec::new());
                while let Ok(Some(Ok(chunk))) = tokio::time::timeout(Duration::from_millis(700), stream.next()).await {
                    text.push_str(&String::from_utf8_lossy(&chunk));
                    while let Some((event, rest)) = text.split_once("\n\n") {
                        let field = |name: &str| event.lines().find_map(|l| l.strip_prefix(name));
                        let data: Value = serde_json::from_str(field("data: ").unwrap()).unwrap();
                        if let Some(name @ ("put" | "delete")) = field("event: ") {
                            let key = data["key"].as_str().unwrap().to_owned();
                            group.push((data["index"].as_i64().unwrap(), key, name == "put"));
                        }
                        // Only what an id closes is whole: what came without is sent again.
                        if let Some(id) = field("id: ") {
                            heard.append(&mut group);
                            last = id.parse().unwrap();
                        }
                        text = rest.to_owned();
                    }
                    let end = *end.borrow();
                    if end > 0 && last >= end {
                        return heard;
                    }
                }
            }
            Ok(_) | Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Changes keys on either daemon until told to stop, whatever is answered.
async fn change(client: Client, urls: Urls, mut dice: Dice, done: Arc<AtomicU64>, stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::Acquire) {
        let client = client.clone_at(&urls[dice.up_to(2)].borrow().clone());
        let (one, two) = (format!("w/{}", dice.up_to(6)), format!("w/x{}", dice.up_to(3)));
        let request = match dice.up_to(6) {
            0 => client.request(Method::DELETE, &format!("/v1/state/kv/{one}")).await,
            1 => {
                let then = json!([{"put": {"key": one, "json": 1}}, {"delete": {"key": two}}]);
                client.request(Method::POST, "/v1/state/txn").await.json(&json!({"then": then}))
            }
            2 => {
                let then = json!([{"delete": {"prefix": "w/x"}}, {"put": {"key": "v/no", "json": 1}}]);
                client.request(Method::POST, "/v1/state/txn").await.json(&json!({"then": then}))
            }
            3 => client.request(Method::PUT, &format!("/v1/state/kv/{two}")).await.body("v"),
            _ => client.request(Method::PUT, &format!("/v1/state/kv/{one}")).await.body("v"),
        };
        match request.timeout(Duration::from_millis(500)).send().await {
            Ok(answer) if answer.status().is_success() => drop(done.fetch_add(1, Ordering::AcqRel)),
            _ => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_daemon_frozen_and_one_killed_lose_no_event_and_agree() {
    let db = database_alone().await;
    let mut one = Launch::on(db.url()).start().await;
    let mut two = Launch::beside(&one, db.url()).start().await;
    let client = Client::of(&one);
    client.token().await;
    let (tell, urls): (Vec<_>, Vec<_>) = [&one, &two].map(|d| watch::channel(d.url.clone())).into_iter().unzip();
    let urls: Urls = [urls[0].clone(), urls[1].clone()];
    let (end, ended) = watch::channel(0);
    let watchers: Vec<_> =
        (0..4).map(|w| tokio::spawn(follow(client.clone_at_self(), urls.clone(), w, ended.clone()))).collect();
    let (done, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let writers: Vec<_> = (1..=8)
        .map(|w| tokio::spawn(change(client.clone_at_self(), urls.clone(), Dice::new(w), done.clone(), stop.clone())))
        .collect();
    let more = async || {
        let before = done.load(Ordering::Acquire);
        until("writers to go on", async || done.load(Ordering::Acquire) > before + 30).await;
    };
    for round in 0..2 {
        more().await;
        // The one freezes; the other goes on, is killed while the one still sleeps, and comes back when that has woken up.
        let (sleeper, mut victim, at) = if round % 2 == 0 { (one, two, 1) } else { (two, one, 0) };
        sleeper.freeze();
        more().await;
        victim.kill().await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        sleeper.thaw();
        more().await;
        victim = victim.launch.clone().start().await;
        tell[at].send_replace(victim.url.clone());
        (one, two) = if round % 2 == 0 { (sleeper, victim) } else { (victim, sleeper) };
    }
    more().await;
    stop.store(true, Ordering::Release);
    for writer in writers {
        writer.await.unwrap();
    }
    // What still was on its way when its writer gave up comes before this, or not at all to the daemons' knowledge.
    let here = client.clone_at(&one.url);
    let last = here.put("w/end", "v").await.unwrap();
    end.send_replace(last);
    let sql = "SELECT index, convert_from(key, 'UTF8') AS key, version > 0 AS put FROM state.history
               WHERE key >= 'w/' AND key < 'w0' AND index <= $1 ORDER BY index, key";
    let rows = sqlx::query(sql).bind(last).fetch_all(&mut db.connect().await).await.unwrap();
    let history: Vec<Told> = rows.iter().map(|r| (r.get("index"), r.get("key"), r.get("put"))).collect();
    for watcher in watchers {
        let heard = soon("it hears the end", watcher).await.unwrap();
        let heard: Vec<Told> = heard.into_iter().filter(|t| t.0 <= last).collect();
        let astray = heard.iter().zip(&history).find(|(a, b)| a != b);
        assert_eq!((astray, heard.len()), (None, history.len()), "a watcher and history part");
    }
    let there = client.clone_at(&two.url);
    for at in history.iter().map(|t| t.0).step_by(history.len() / 20 + 1).chain([last]) {
        let path = format!("/v1/state/kv?prefix=w/&at={at}&min_index={last}");
        assert_eq!(here.get(&path).await, there.get(&path).await, "as of {at} two daemons tell two states");
    }
    let deleted = history.iter().filter(|t| !t.2).count();
    println!("{} changes, {deleted} of them deletions", history.len());
    assert!(history.len() > 150 && deleted > 15);
    record::check(&db).await;
}

/// The folder of a daemon that has its own file system, as others see it.
fn seen(daemon: &Daemon) -> std::path::PathBuf {
    let dir = daemon.launch.dir.strip_prefix("/").unwrap().to_owned();
    std::path::PathBuf::from(format!("/proc/{}/root", daemon.pid())).join(dir)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_changes_whole_and_they_go_on_with_room() {
    if !rustix::process::geteuid().is_root() {
        println!("only root can make a file system of a set size: not tested");
        return;
    }
    // The guard that stops writing before the disk is full is off as far as it can be: it is the disk itself that refuses.
    let launch = Launch::alone().env("SOP__DISK__GUARD_PERCENT", "100").env("SOP__DISK__RESERVE_MB", "0").small(192);
    let daemon = launch.start().await;
    let client = Client::of(&daemon);
    let token = client.token().await;
    client.put("full/first", "v").await.unwrap();
    let filler = seen(&daemon).join("filler");
    let left = rustix::fs::statvfs(seen(&daemon).as_path()).unwrap();
    let filled = std::fs::File::create(&filler).unwrap();
    let size = (left.f_bavail * left.f_frsize).saturating_sub(6 * 1024 * 1024);
    rustix::fs::fallocate(&filled, rustix::fs::FallocateFlags::empty(), 0, size).unwrap();
    // What would not be stored smaller than it is.
    let mut dice = Dice::new(1);
    let value: Vec<u8> = (0..32 * 1024).flat_map(|_| dice.throw().to_le_bytes()).collect();
    let (mut there, mut refused) = (Vec::new(), BTreeSet::new());
    let (mut unsure, mut why) = (BTreeSet::new(), BTreeMap::<String, i32>::new());
    for n in 0..120 {
        let key = format!("full/{n}");
        let request = client.request(Method::PUT, &format!("/v1/state/kv/{key}")).await.body(value.clone());
        // PostgreSQL starts again and again meanwhile: whoever gives up waiting knows as little as who is told so.
        let Ok(answer) = request.send().await else {
            unsure.insert(key);
            continue;
        };
        match answer.status().as_u16() {
            200 => there.push(key),
            503 | 507 => {
                assert!(answer.headers().contains_key("retry-after"));
                let (status, kind, body) = problem(answer).await;
                let detail = body["detail"].as_str().unwrap().to_owned();
                *why.entry(format!("{status} {kind}: {detail}")).or_default() += 1;
                if detail.contains("not known") {
                    unsure.insert(key)
                } else {
                    refused.insert(key)
                };
            }
            other => panic!("{other}: {}", answer.text().await.unwrap()),
        }
    }
    println!("{} were done, {} refused, {} unsure: {why:?}", there.len(), refused.len(), unsure.len());
    assert!(!there.is_empty() && refused.len() > 10, "the disk was not full");
    // A transaction that has no room is not half done.
    let puts: Vec<Value> = (0..3).map(|n| json!({"put": {"key": format!("full/t{n}"), "value": "dg=="}})).collect();
    let txn = client.bare(Method::POST, "/v1/state/txn").bearer_auth(&token).json(&json!({"then": puts}));
    let txn = txn.send().await.unwrap().status().as_u16();
    drop(filled);
    std::fs::remove_file(&filler).unwrap();
    until("changes to go on", async || client.put("full/last", "v").await.is_ok()).await;
    let (mut keys, mut after) = (BTreeSet::new(), String::new());
    loop {
        let (status, page) = client.get(&format!("/v1/state/kv?prefix=full/&keys_only=true{after}")).await;
        assert_eq!(status, 200, "{page}");
        keys.extend(page["items"].as_array().unwrap().iter().map(|i| i["key"].as_str().unwrap().to_owned()));
        match page["next"].as_str() {
            Some(next) => after = format!("&after={next}"),
            None => break,
        }
    }
    assert!(there.iter().all(|key| keys.contains(key)), "what was acknowledged is there");
    assert!(refused.iter().all(|key| !keys.contains(key)), "what was refused is not");
    let whole = (0..3).filter(|n| keys.contains(&format!("full/t{n}"))).count();
    assert!(whole == if txn == 200 { 3 } else { 0 }, "{whole} keys of a transaction answered {txn}");
    for key in there.iter().take(3) {
        let read = client.request(Method::GET, &format!("/v1/state/kv/{key}")).await.send().await.unwrap();
        assert_eq!(read.bytes().await.unwrap(), value);
    }
    let options =
        PgConnectOptions::new_without_pgpass().socket(seen(&daemon).join("run")).username("sop").database("sop");
    record::check_on(&mut PgConnection::connect_with(&options).await.unwrap()).await;
}

async fn start() -> (Database, Daemon, Client) {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    (db, daemon, client)
}

#[tokio::test(flavor = "multi_thread")]
async fn names_and_values_at_every_limit() {
    let (db, _daemon, client) = start().await;
    let send = async |method: Method, path: &str, body: Vec<u8>| {
        let answer = client.request(method, path).await.body(body).send().await.unwrap();
        let status = answer.status().as_u16();
        if status < 400 { (status, String::new()) } else { (status, problem(answer).await.1) }
    };
    let longest = format!("l/{}", "k".repeat(254));
    let deep = ["a"; 128].join("/") + "b";
    for name in ["k", "A-Za.z0_9:-", "...", "a/..b", &longest, &deep] {
        let path = format!("/v1/state/kv/{name}");
        assert_eq!(send(Method::PUT, &path, b"v".to_vec()).await.0, 200, "{name}");
        let (_, list) = client.get(&format!("/v1/state/kv?prefix={name}")).await;
        assert_eq!(list["items"][0]["key"], *name);
        let (_, told) = client.get(&format!("/v1/state/watch?key={name}&after=0&wait=5")).await;
        assert_eq!(told["items"][0]["key"], *name);
        let get = json!({"then": [{"get": {"key": name}}]});
        let (_, got) = client.json(Method::POST, "/v1/state/txn", &get).await;
        assert_eq!(got["results"][0]["get"]["items"][0]["key"], *name);
        assert_eq!(send(Method::DELETE, &path, Vec::new()).await.0, 200, "{name}");
    }
    let long = format!("{longest}k");
    for name in [&long, "a%20b", "a//b", "a/", "%C3%A9", "a%2F%2Fb", "a%5Cb", "a~b"] {
        for method in [Method::PUT, Method::GET, Method::DELETE] {
            let (status, kind) = send(method, &format!("/v1/state/kv/{name}"), Vec::new()).await;
            assert_eq!((status, kind.as_str()), (400, "malformed"), "{name}");
        }
    }
    // Dots that a client would take out of a path itself are in these.
    for key in [long.as_str(), "a b", "", "a//b", "/a", "a/../b", "..", "./a", "a/."] {
        let put = json!({"then": [{"put": {"key": key, "value": "dg=="}}]});
        assert_eq!(client.json(Method::POST, "/v1/state/txn", &put).await.0, 400, "{key}");
    }
    // A value of 1 MiB comes back as it was, alone and in a list; one byte more changes nothing.
    let most: Vec<u8> = (0..1024 * 1024).map(|i| (i % 251) as u8).collect();
    assert_eq!(send(Method::PUT, "/v1/state/kv/v/most", most.clone()).await.0, 200);
    let more = [&most[..], &[0]].concat();
    assert_eq!(send(Method::PUT, "/v1/state/kv/v/most", more).await, (413, "too-large".to_owned()));
    let read = client.request(Method::GET, "/v1/state/kv/v/most").await.send().await.unwrap();
    assert_eq!(read.headers()["sop-version"], "1", "what was too large changed nothing");
    assert_eq!(read.bytes().await.unwrap(), most);
    let (_, list) = client.get("/v1/state/kv?prefix=v/").await;
    assert_eq!(list["items"][0]["value"], sop::kernel::crypto::base64(&most));
    let typed = async |length: usize| {
        let put = client.request(Method::PUT, "/v1/state/kv/v/typed").await.body("v");
        put.header("content-type", "t".repeat(length)).send().await.unwrap().status().as_u16()
    };
    assert_eq!((typed(256).await, typed(257).await), (200, 400));
    let many = |n: usize| -> Value {
        (0..n).map(|i| json!({"put": {"key": format!("v/{i}"), "json": i}})).collect::<Vec<_>>().into()
    };
    assert_eq!(client.json(Method::POST, "/v1/state/txn", &json!({"then": many(128)})).await.0, 200);
    assert_eq!(client.json(Method::POST, "/v1/state/txn", &json!({"then": many(129)})).await.0, 400);
    record::check(&db).await;
}

const MANY: i64 = 100_000;

/// Puts that many keys beside one that was put, as if they had been put with it.
async fn fill(db: &Database, index: i64) {
    let mut conn = db.connect().await;
    for (table, previous, zero) in [("kv", "", ""), ("history", "previous, ", "0, ")] {
        let sql = format!(
            "INSERT INTO state.{table} (key, index, created_index, version, {previous}content_type, value)
             SELECT convert_to('many/' || lpad(i::text, 6, '0'), 'UTF8'), {index}, {index}, 1, {zero}'text/plain', 'value'
             FROM generate_series(1, {MANY}) AS i"
        );
        sqlx::query(AssertSqlSafe(sql)).execute(&mut conn).await.unwrap();
    }
    sqlx::query("ANALYZE state.kv, state.history").execute(&mut conn).await.unwrap();
}

/// The keys that a watch tells the deletion of, until there are so many, and the ids of these events.
async fn deletions(answer: reqwest::Response, most: usize) -> (BTreeSet<String>, Vec<i64>) {
    let (mut stream, mut text, mut told) = (answer.bytes_stream(), Vec::new(), 0);
    let (mut keys, mut ids) = (BTreeSet::new(), Vec::new());
    while told < most {
        text.extend_from_slice(&stream.next().await.expect("the stream goes on").unwrap());
        let whole = text.windows(2).rposition(|w| w == b"\n\n").map_or(0, |at| at + 2);
        let events = String::from_utf8(text.drain(..whole).collect()).unwrap();
        for event in events.split("\n\n").filter(|e| e.lines().any(|l| l == "event: delete")) {
            let field = |name: &str| event.lines().find_map(|l| l.strip_prefix(name));
            let data: Value = serde_json::from_str(field("data: ").unwrap()).unwrap();
            keys.insert(data["key"].as_str().unwrap().to_owned());
            ids.extend(field("id: ").map(|id| id.parse::<i64>().unwrap()));
            told += 1;
        }
    }
    (keys, ids)
}

#[tokio::test(flavor = "multi_thread")]
async fn very_many_keys_go_by_one_prefix_at_one_index() {
    let (db, daemon, client) = start().await;
    let two = Launch::beside(&daemon, db.url()).start().await;
    let there = client.also_of(&two);
    there.token().await;
    let first = client.put("many/000000", "v").await.unwrap();
    client.put("many0", "stays").await.unwrap();
    fill(&db, first).await;
    let before = client.put("busy", "0").await.unwrap();
    // Who watches, here and there, and a writer of something else meanwhile.
    let all = usize::try_from(MANY + 1).unwrap();
    let watch = async |client: &Client| {
        let request = client.request(Method::GET, "/v1/state/watch?prefix=many/").await;
        request.send().await.unwrap()
    };
    let watcher = tokio::spawn(deletions(watch(&there).await, all));
    let (stop, slowest) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(0)));
    let busy = tokio::spawn({
        let (client, stop, slowest) = (there.clone_at_self(), stop.clone(), slowest.clone());
        async move {
            let mut done = 0;
            while !stop.load(Ordering::Acquire) {
                let began = Instant::now();
                client.put("busy", "v").await.expect("others go on");
                slowest.fetch_max(i64::try_from(began.elapsed().as_millis()).unwrap(), Ordering::AcqRel);
                done += 1;
            }
            done
        }
    });
    let began = Instant::now();
    let ops = json!({"then": [{"delete": {"prefix": "many/"}}, {"put": {"key": "many.done", "json": true}}]});
    let (status, done) = client.json(Method::POST, "/v1/state/txn", &ops).await;
    let took = began.elapsed();
    assert_eq!((status, done["results"][0]["delete"]["deleted"].as_i64()), (200, Some(MANY + 1)), "{done}");
    let index = done["index"].as_i64().unwrap();
    let (keys, ids) = watcher.await.unwrap();
    assert_eq!(keys.len(), all, "each is told once");
    assert_eq!(ids, [index], "all of one index, which its last says");
    stop.store(true, Ordering::Release);
    let others = busy.await.unwrap();
    println!(
        "{MANY} keys went in {took:?}; {others} puts meanwhile, the slowest {} ms",
        slowest.load(Ordering::Acquire)
    );
    assert!(took < Duration::from_secs(10), "{took:?}");
    for client in [&client, &there] {
        let path = "/v1/state/kv?prefix=many&limit=1000";
        let (_, now) = client.get(path).await;
        let keys: Vec<&str> = now["items"].as_array().unwrap().iter().map(|i| i["key"].as_str().unwrap()).collect();
        assert_eq!(keys, ["many.done", "many0"]);
        let read = client.request(Method::GET, "/v1/state/kv/many/000777").await.send().await.unwrap();
        assert_eq!(read.status(), 404);
        let (_, then) = client.get(&format!("{path}&at={}", index - 1)).await;
        assert_eq!((then["items"].as_array().unwrap().len(), then["next"].is_string()), (1000, true));
    }
    let (_, polled) = client.get(&format!("/v1/state/watch?prefix=many/&after={before}&wait=5")).await;
    assert_eq!(polled["items"].as_array().unwrap().len(), all, "whoever comes later hears the same");
    // The keys can be made anew, from version 1.
    let (_, again) = client
        .json(Method::POST, "/v1/state/txn", &json!({"then": [{"put": {"key": "many/000001", "json": 1}}]}))
        .await;
    assert_eq!(again["results"][0]["put"]["version"], 1);
    record::check(&db).await;
}
