//! Watches: several keys and prefixes at once, polled, by many, and by one that never reads.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::ledger::metric;
use crate::state::{Heard, events, problem};
use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::postgres::{Database, database};
use crate::support::{PATIENCE, record, soon, until};

async fn start() -> (Database, Daemon, Client) {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    (db, daemon, client)
}

fn told(seen: &[Heard]) -> Vec<String> {
    let changes = seen.iter().filter(|e| e.0 != "bookmark");
    changes.map(|(name, _, data)| format!("{name} {}", data["key"].as_str().unwrap())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn several_keys_and_prefixes_are_one_watch_and_an_index_is_one_piece() {
    let (db, _daemon, client) = start().await;
    let path = "/v1/state/watch?prefix=a/&prefix=b.&key=c/one&key=a/x&after=0";
    let live = client.request(Method::GET, "/v1/state/watch?prefix=a/&prefix=b.&key=c/one").await.send().await.unwrap();
    let live = tokio::spawn(events(live, |e| e.iter().any(|e| e.0 == "delete")));
    for key in ["a/x", "b", "b.c", "c/one", "c/one/more", "z"] {
        client.put(key, "v").await.unwrap();
    }
    let ops = json!({"then": [{"delete": {"key": "b.c"}}, {"put": {"key": "q", "json": 1}}, {"put": {"key": "a/y", "json": 1}}]});
    let (_, done) = client.json(Method::POST, "/v1/state/txn", &ops).await;
    let expected = ["put a/x", "put b.c", "put c/one", "put a/y", "delete b.c"];
    let live = live.await.unwrap();
    assert_eq!(told(&live), expected);
    let last = &live[live.len() - 2..];
    assert_eq!((last[0].1, last[1].1), (None, done["index"].as_i64()), "only the last of an index carries the id");
    let past = client.request(Method::GET, path).await.send().await.unwrap();
    assert_eq!(told(&events(past, |e| e.iter().any(|e| e.0 == "delete")).await), expected, "from history the same");
    for bad in
        ["prefix=a%20b", "key=a//b", "key=", "after=x", "after=-1", "after=1&after=2", "wait=61", "wait=x", "nope=1"]
    {
        let answer = client.request(Method::GET, &format!("/v1/state/watch?{bad}")).await.send().await.unwrap();
        assert_eq!(problem(answer).await.0, 400, "{bad}");
    }
    let many = vec!["key=a"; 65].join("&");
    let answer = client.request(Method::GET, &format!("/v1/state/watch?{many}")).await.send().await.unwrap();
    assert_eq!(problem(answer).await.0, 400);
    // Each of them is decided on.
    let wanted = json!({"client_name": "w", "scope": "state:write"});
    let (_, made) = client.json(Method::POST, "/oauth2/register", &wanted).await;
    let other = client.with(made["client_id"].as_str().unwrap(), made["client_secret"].as_str().unwrap());
    assert_eq!(other.get("/v1/state/watch?prefix=a&key=b&wait=0").await.0, 403);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_has_no_event_streams_polls() {
    let (db, daemon, client) = start().await;
    let poll = |query: String| {
        let client = client.clone_at(&daemon.url);
        async move { client.get(&format!("/v1/state/watch?prefix=p/{query}")).await.1 }
    };
    client.token().await;
    let nothing = poll("&wait=0.2".into()).await;
    assert_eq!(nothing["items"], json!([]));
    let mut after = nothing["index"].as_i64().unwrap();
    let waiting = tokio::spawn(poll(format!("&after={after}&wait=10")));
    tokio::time::sleep(Duration::from_millis(200)).await;
    client.put("other", "v").await.unwrap();
    let first = client.put("p/1", "v").await.unwrap();
    let heard = waiting.await.unwrap();
    assert_eq!((heard["index"].as_i64(), &heard["items"][0]["event"]), (Some(first), &json!("put")));
    // Every change once, whoever asks when.
    let writer = client.clone_at(&daemon.url);
    let writing = tokio::spawn(async move {
        for i in 0..200 {
            writer.put("p/n", &i.to_string()).await.unwrap();
        }
        writer.request(Method::DELETE, "/v1/state/kv/p/n").await.send().await.unwrap();
    });
    let (mut seen, mut gone) = (Vec::new(), false);
    while !gone {
        let heard = poll(format!("&after={after}&wait=10")).await;
        after = heard["index"].as_i64().unwrap();
        for item in heard["items"].as_array().unwrap() {
            seen.push(item["index"].as_i64().unwrap());
            gone |= item["event"] == "delete";
        }
    }
    writing.await.unwrap();
    assert_eq!(seen.len(), 202);
    assert!(seen.is_sorted_by(|a, b| a < b));
    let answer = client.request(Method::GET, &format!("/v1/state/watch?wait=0&after={}", after + 999)).await;
    let late = answer.header("sop-timeout", "0.1").send().await.unwrap();
    assert_eq!(problem(late).await.0, 504);
    record::check(&db).await;
}

/// A connection on which a watch was asked for and of which nothing is read.
async fn open(daemon: &Daemon, token: &str, query: &str) -> TcpStream {
    let address = daemon.url.trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request =
        format!("GET /v1/state/watch?{query} HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {token}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_that_never_reads_is_cut_off_and_costs_nobody_anything() {
    let (db, daemon, client) = start().await;
    let token = client.token().await;
    let mut silent = open(&daemon, &token, "prefix=big").await;
    until("it to watch", || async { metric(&client, "sop_state_watchers_count").await > 0.0 }).await;
    let keen = client.request(Method::GET, "/v1/state/watch?prefix=big").await.send().await.unwrap();
    let keen = tokio::spawn(events(keen, |e| e.iter().filter(|e| e.0 == "put").count() == 240));
    // Together more than the buffers of the kernel and of the daemon.
    let value = "x".repeat(128 * 1024);
    let mut indexes = Vec::new();
    for i in 0..240 {
        indexes.push(client.put(&format!("big/{i}"), &value).await.unwrap());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let heard = keen.await.unwrap();
    let seen: Vec<i64> = heard.iter().filter(|e| e.0 == "put").map(|e| e.1.unwrap()).collect();
    assert_eq!(seen, indexes, "who reads hears everything");
    // Now it reads after all: what had been sent, then why there is no more.
    let mut text = Vec::new();
    let read = tokio::time::timeout(PATIENCE, async {
        let mut chunk = vec![0; 65_536];
        while !String::from_utf8_lossy(&text[text.len().saturating_sub(1000)..]).contains("event: error") {
            let n = silent.read(&mut chunk).await.unwrap();
            assert!(n > 0, "it ended without a word");
            text.extend_from_slice(&chunk[..n]);
        }
    });
    let done = read.await;
    assert!(
        done.is_ok(),
        "it is told, after {} bytes: {:?}",
        text.len(),
        String::from_utf8_lossy(&text[text.len().saturating_sub(300)..])
    );
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(text.contains("did not keep up"), "it is told why");
    assert!(metric(&client, "sop_state_watchers_cut_total").await >= 1.0);
    let last: i64 = text.lines().filter_map(|l| l.strip_prefix("id: ")).next_back().unwrap().parse().unwrap();
    assert!(
        last < indexes[239],
        "nothing was lost, so it was not cut: the buffers between are larger than this test thinks"
    );
    let rest = client.request(Method::GET, "/v1/state/watch?prefix=big").await.header("last-event-id", last);
    let rest = events(rest.send().await.unwrap(), |e| e.iter().any(|e| e.1 == Some(indexes[239]))).await;
    let resumed: Vec<i64> = rest.iter().filter(|e| e.0 == "put").map(|e| e.1.unwrap()).collect();
    assert_eq!(resumed, indexes.iter().copied().filter(|i| *i > last).collect::<Vec<_>>(), "it goes on where it was");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_idle_watchers_cost_a_put_nothing() {
    let (db, daemon, client) = start().await;
    let token = client.token().await;
    let many: usize = std::env::var("SOP_TEST_WATCHERS").ok().and_then(|n| n.parse().ok()).unwrap_or(2000);
    let mut idle = Vec::new();
    for i in 0..many {
        idle.push(open(&daemon, &token, &format!("prefix=idle/{i}/&key=one/{i}")).await);
    }
    until("all to watch", || async { metric(&client, "sop_state_watchers_count").await >= many as f64 }).await;
    let began = std::time::Instant::now();
    for i in 0..200 {
        client.put("busy", &i.to_string()).await.unwrap();
    }
    let took = began.elapsed();
    println!("{many} idle watchers: a put in {:?}", took / 200);
    assert!(took < Duration::from_secs(10), "200 puts took {took:?}");
    // The last of them hears what it watches.
    client.put(&format!("idle/{}/x", many - 1), "v").await.unwrap();
    let mut text = String::new();
    let last = idle.last_mut().unwrap();
    let heard = tokio::time::timeout(Duration::from_secs(10), async {
        let mut chunk = vec![0; 4096];
        while !text.contains("event: put") {
            let n = last.read(&mut chunk).await.unwrap();
            text.push_str(&String::from_utf8_lossy(&chunk[..n]));
        }
    });
    heard.await.expect("it hears");
    drop(idle);
    until("all to be gone", || async { metric(&client, "sop_state_watchers_count").await == 0.0 }).await;
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_from_the_command_line() {
    let (db, daemon, client) = start().await;
    let index = client.put("cli/a", "v").await.unwrap();
    client.put("other", "v").await.unwrap();
    client.request(Method::DELETE, "/v1/state/kv/cli/a").await.send().await.unwrap();
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_sop"));
    command
        .args(["state", "watch", "cli/", "--key", "x", "--after", "0", "--json", "--data-dir"])
        .arg(&daemon.launch.dir);
    let mut child = command.stdout(std::process::Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let out = child.stdout.take().unwrap();
    let mut lines = tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(out));
    let mut next = async || -> Value {
        let line = soon("a line", lines.next_line()).await;
        serde_json::from_str(&line.unwrap().unwrap()).unwrap()
    };
    let (put, gone) = (next().await, next().await);
    assert_eq!((put["event"].as_str(), put["index"].as_i64()), (Some("put"), Some(index)));
    assert_eq!((gone["event"].as_str(), gone["previous_index"].as_i64()), (Some("delete"), Some(index)));
    client.put("x", "live").await.unwrap();
    assert_eq!(next().await["key"], "x");
    record::check(&db).await;
}
