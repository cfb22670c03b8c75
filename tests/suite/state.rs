//! Keys over HTTP: values, conditions, history, lists, watches, and everything that is not a proper request.

use std::time::Duration;

use futures_util::StreamExt;
use reqwest::{Method, Response};
use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::postgres::{Database, database};
use crate::support::{record, soon, until};

async fn start() -> (Database, Daemon, Client) {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    (db, daemon, client)
}

pub fn header<'a>(answer: &'a Response, name: &str) -> &'a str {
    answer.headers().get(name).unwrap_or_else(|| panic!("no {name}")).to_str().unwrap()
}

pub async fn problem(answer: Response) -> (u16, String, Value) {
    let status = answer.status().as_u16();
    assert_eq!(header(&answer, "content-type"), "application/problem+json");
    assert!(answer.headers().contains_key("x-request-id") && answer.headers().contains_key("sop-index"));
    let body: Value = answer.json().await.unwrap();
    assert_eq!(body["status"].as_u64(), Some(u64::from(status)));
    assert!(body["instance"].is_string() && body["detail"].is_string());
    (status, body["type"].as_str().unwrap().trim_start_matches("/problems/").to_owned(), body)
}

#[tokio::test(flavor = "multi_thread")]
async fn any_bytes_go_in_and_come_out() {
    let (db, _daemon, client) = start().await;
    let every: Vec<u8> = (0..=255).collect();
    for (key, value, kind) in [
        ("a", every, "image/png"),
        ("b/empty", Vec::new(), "text/plain; charset=utf-8"),
        ("big", vec![7; 1024 * 1024], "x/y"),
    ] {
        let path = format!("/v1/state/kv/{key}");
        let put = client
            .request(Method::PUT, &path)
            .await
            .header("content-type", kind)
            .body(value.clone())
            .send()
            .await
            .unwrap();
        assert_eq!(put.status(), 200);
        let tag = header(&put, "etag").to_owned();
        let index = header(&put, "sop-index").to_owned();
        let written: Value = put.json().await.unwrap();
        assert_eq!(
            (written["key"].as_str(), written["version"].as_i64(), &written["lease"]),
            (Some(key), Some(1), &Value::Null)
        );
        assert_eq!((written["index"].to_string(), format!("\"{}\"", written["index"])), (index, tag.clone()));
        let got = client.request(Method::GET, &path).await.send().await.unwrap();
        assert_eq!((header(&got, "content-type"), header(&got, "etag")), (kind, tag.as_str()));
        assert_eq!(got.bytes().await.unwrap(), value);
        let head = client.request(Method::HEAD, &path).await.send().await.unwrap();
        assert_eq!((head.status().as_u16(), header(&head, "content-length")), (200, value.len().to_string().as_str()));
    }
    // However much is on its way, the answer arrives.
    for length in [1 << 20 | 1, 3 << 20, 3 << 20, 12 << 20] {
        let long = client.request(Method::PUT, "/v1/state/kv/big").await.body(vec![0; length]).send().await.unwrap();
        let (status, kind, _) = problem(long).await;
        assert_eq!((status, kind.as_str()), (413, "too-large"));
    }
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn conditions_hold_or_refuse() {
    let (db, _daemon, client) = start().await;
    let send = |method: Method, name: &'static str, value: String| {
        let client = &client;
        async move { client.request(method, "/v1/state/kv/c").await.header(name, value).body("v").send().await.unwrap() }
    };
    assert_eq!(send(Method::PUT, "if-match", "*".into()).await.status(), 412, "it does not exist");
    let made = send(Method::PUT, "if-none-match", "*".into()).await;
    assert_eq!(made.status(), 200);
    let tag = header(&made, "etag").to_owned();
    let (status, kind, body) = problem(send(Method::PUT, "if-none-match", "*".into()).await).await;
    assert_eq!((status, kind.as_str()), (412, "precondition-failed"));
    assert_eq!(format!("\"{}\"", body["index"]), tag, "it says where the key is");
    assert_eq!(send(Method::PUT, "if-match", "\"999\"".into()).await.status(), 412);
    let next = send(Method::PUT, "if-match", tag.clone()).await;
    assert_eq!(next.status(), 200);
    assert_eq!(send(Method::DELETE, "if-match", tag).await.status(), 412, "the old tag");
    assert_eq!(problem(send(Method::PUT, "if-match", "5".into()).await).await.0, 400, "a tag has quotes");
    assert_eq!(send(Method::DELETE, "if-match", header(&next, "etag").into()).await.status(), 200);
    let before = client.last_entry().await;
    let gone = client.request(Method::DELETE, "/v1/state/kv/c").await.send().await.unwrap();
    assert_eq!(problem(gone).await.0, 404);
    assert_eq!(client.last_entry().await, before, "what is not there takes no index");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_past_can_be_read() {
    let (db, _daemon, client) = start().await;
    let one = client.put("t", "one").await.unwrap();
    let two = client.put("t", "two").await.unwrap();
    client.request(Method::DELETE, "/v1/state/kv/t").await.send().await.unwrap();
    let at = |index: i64| {
        let client = &client;
        async move { client.request(Method::GET, &format!("/v1/state/kv/t?at={index}")).await.send().await.unwrap() }
    };
    assert_eq!(at(one - 1).await.status(), 404);
    assert_eq!(at(one).await.text().await.unwrap(), "one");
    assert_eq!(at(two).await.text().await.unwrap(), "two");
    assert_eq!(at(two + 1).await.status(), 404);
    let (status, kind, _) = problem(at(two + 1000).await).await;
    assert_eq!((status, kind.as_str()), (400, "beyond-head"));
    let (_, listed) = client.get(&format!("/v1/state/kv?at={two}")).await;
    assert_eq!(listed["items"][0]["value"], "dHdv");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_is_of_one_moment_over_all_its_pages() {
    let (_db, _daemon, client) = start().await;
    for i in 0..25 {
        client.put(&format!("l/{i:02}"), "v").await.unwrap();
    }
    client.put("m", "v").await.unwrap();
    let (mut seen, mut after, mut moment) = (Vec::new(), String::new(), None);
    loop {
        let path = format!("/v1/state/kv?prefix=l/&limit=10&keys_only=true{after}");
        let answer = client.request(Method::GET, &path).await.send().await.unwrap();
        let index = header(&answer, "sop-index").to_owned();
        assert_eq!(*moment.get_or_insert(index.clone()), index);
        let page: Value = answer.json().await.unwrap();
        for item in page["items"].as_array().unwrap() {
            assert!(item.get("value").is_none());
            seen.push(item["key"].as_str().unwrap().to_owned());
        }
        // Changes in between do not show.
        client.put("l/00a", "new").await.unwrap();
        client.request(Method::DELETE, "/v1/state/kv/l/24").await.send().await.unwrap();
        match page["next"].as_str() {
            Some(next) => after = format!("&after={next}"),
            None => break,
        }
    }
    let expected: Vec<String> = (0..25).map(|i| format!("l/{i:02}")).collect();
    assert_eq!(seen, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_proper_request_is_told_why() {
    let (db, _daemon, client) = start().await;
    for (path, status) in [
        ("/v1/state/kv/a//b", 400),
        ("/v1/state/kv/a%00b", 400),
        ("/v1/state/kv/%ff", 400),
        ("/v1/state/kv?limit=0", 400),
        ("/v1/state/kv?limit=1001", 400),
        ("/v1/state/kv?limit=x", 400),
        ("/v1/state/kv?nope=1", 400),
        ("/v1/state/kv?prefix=a&prefix=b", 400),
        ("/v1/state/kv?after=garbage", 400),
        ("/v1/state/kv/a?at=x", 400),
        ("/v1/state/kv?consistency=maybe", 400),
        ("/v1/nothing", 404),
        ("/v1/state/kv/absent", 404),
        ("/problems/nothing", 404),
    ] {
        let answer = client.request(Method::GET, path).await.send().await.unwrap();
        assert_eq!(problem(answer).await.0, status, "{path}");
    }
    let wrong = client.request(Method::POST, "/v1/state/kv/a").await.send().await.unwrap();
    assert!(header(&wrong, "allow").contains("PUT"));
    assert_eq!(problem(wrong).await.0, 405);
    let bare = client.bare(Method::GET, "/v1/state/kv/a").send().await.unwrap();
    assert!(header(&bare, "www-authenticate").starts_with("Bearer"));
    assert_eq!(problem(bare).await.0, 401);
    let long =
        client.request(Method::GET, &format!("/v1/state/kv?prefix={}", "a".repeat(9000))).await.send().await.unwrap();
    assert_eq!(problem(long).await.0, 414);
    for slug in ["malformed", "record-behind"] {
        assert!(
            client
                .bare(Method::GET, &format!("/problems/{slug}"))
                .send()
                .await
                .unwrap()
                .text()
                .await
                .unwrap()
                .contains(slug)
        );
    }
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_named_and_indexes_waited_for() {
    let (_db, _daemon, client) = start().await;
    let ask = |id: &'static str| {
        let client = &client;
        async move {
            let answer =
                client.request(Method::GET, "/v1/state/kv").await.header("x-request-id", id).send().await.unwrap();
            header(&answer, "x-request-id").to_owned()
        }
    };
    assert_eq!(ask("mine-42").await, "mine-42");
    assert_ne!(ask("tab\there").await, "tab\there");
    let index = client.put("w", "v").await.unwrap();
    assert_eq!(client.get(&format!("/v1/state/kv?min_index={index}")).await.0, 200);
    let path = format!("/v1/state/kv?min_index={}", index + 100);
    let late = client.request(Method::GET, &path).await.header("sop-timeout", "0.2").send().await.unwrap();
    let (status, kind, _) = problem(late).await;
    assert_eq!((status, kind.as_str()), (504, "behind"));
    // Entries of the daemon's own may come in between, but not so many.
    let path = format!("/v1/state/kv/w?min_index={}", index + 8);
    let waiting = tokio::spawn(client.request(Method::GET, &path).await.send());
    for _ in 0..8 {
        client.put("w", "later").await.unwrap();
    }
    assert_eq!(waiting.await.unwrap().unwrap().text().await.unwrap(), "later");
}

pub type Heard = (String, Option<i64>, Value);

/// Events of a watch (name, id, data), until there are enough.
pub async fn events(answer: Response, enough: impl Fn(&[Heard]) -> bool) -> Vec<Heard> {
    let (mut stream, mut text, mut out) = (answer.bytes_stream(), String::new(), Vec::new());
    loop {
        let chunk = soon("events come", stream.next()).await.expect("the stream goes on");
        text.push_str(std::str::from_utf8(&chunk.unwrap()).unwrap());
        while let Some((event, rest)) = text.split_once("\n\n") {
            let field =
                |name: &str| event.lines().find_map(|l| l.strip_prefix(&format!("{name}: "))).map(str::to_owned);
            if let Some(name) = field("event") {
                let data = serde_json::from_str(&field("data").unwrap()).unwrap();
                out.push((name, field("id").map(|i| i.parse().unwrap()), data));
            }
            // Not one more: a test resumes after the last.
            if enough(&out) {
                return out;
            }
            text = rest.to_owned();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_resumes_without_loss_or_repeats_on_any_daemon() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let two = Launch::beside(&one, db.url()).start().await;
    let a = Client::of(&one);
    let b = a.also_of(&two);
    let mut wanted = Vec::new();
    for i in 0..5 {
        wanted.push(a.put("w/x", &i.to_string()).await.unwrap());
        a.put("other", "v").await.unwrap();
    }
    let first = a.request(Method::GET, "/v1/state/watch?prefix=w/&after=0").await.send().await.unwrap();
    assert_eq!(header(&first, "content-type"), "text/event-stream");
    let seen = events(first, |e| e.len() == 3).await;
    let last = seen[2].1.unwrap();
    let rest =
        b.request(Method::GET, "/v1/state/watch?prefix=w/").await.header("last-event-id", last).send().await.unwrap();
    let live = tokio::spawn(async move { events(rest, |e| e.iter().any(|e| e.0 == "delete")).await });
    for i in 5..7 {
        wanted.push(b.put("w/x", &i.to_string()).await.unwrap());
    }
    let gone = a.request(Method::DELETE, "/v1/state/kv/w/x").await.send().await.unwrap().json::<Value>().await.unwrap();
    let rest = live.await.unwrap();
    let changes: Vec<_> = seen.iter().chain(&rest).filter(|e| e.0 != "bookmark").collect();
    let put: Vec<i64> = changes.iter().filter(|e| e.0 == "put").map(|e| e.2["index"].as_i64().unwrap()).collect();
    assert_eq!(put, wanted);
    let (_, id, data) = changes.iter().find(|e| e.0 == "delete").expect("the deletion is told");
    assert_eq!(
        (*id, &data["index"], data["previous_index"].as_i64()),
        (gone["index"].as_i64(), &gone["index"], wanted.last().copied())
    );
    assert!(rest.iter().any(|e| e.0 == "bookmark" && e.1 == e.2["index"].as_i64()), "where it stands is told");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn puts_and_deletes_of_one_key_in_one_batch_leave_what_came_last() {
    let (db, _daemon, client) = start().await;
    client.put("r/0", "v").await.unwrap();
    let work = (0..32).map(|w| {
        let client = client.clone_at_self();
        async move {
            for n in 0..20 {
                let path = format!("/v1/state/kv/r/{}", (w + n) % 3);
                let method = if (w * 7 + n) % 3 == 0 { Method::DELETE } else { Method::PUT };
                let answer = client.request(method, &path).await.body(format!("{w}/{n}")).send().await.unwrap();
                assert!(matches!(answer.status().as_u16(), 200 | 404), "{}", answer.status());
            }
        }
    });
    futures_util::future::join_all(work).await;
    // Keys are their newest history row, or absent where that is a tombstone; the check compares them all.
    record::check(&db).await;
    let astray: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM (SELECT DISTINCT ON (key) key, version FROM state.history ORDER BY key, index DESC) AS newest
         FULL JOIN state.kv AS kv ON kv.key = newest.key WHERE (newest.version > 0) IS DISTINCT FROM (kv.key IS NOT NULL)",
    )
    .fetch_one(&mut db.connect().await)
    .await
    .unwrap();
    assert_eq!(astray, 0);
}

/// Keys that were made before a restart, and by another daemon, are never taken for new; keys that are new are not looked up.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_new_is_known_to_be_new_and_what_is_there_never_passes_for_it() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let client = Client::of(&one);
    // More than the keys are read at a time when a daemon starts.
    let (all, each) = (10_500, 125);
    for first in (0..all).step_by(each) {
        let puts: Vec<Value> =
            (first..first + each).map(|n| json!({"put": {"key": format!("there/{n}"), "json": n}})).collect();
        assert_eq!(client.json(Method::POST, "/v1/state/txn", &json!({"then": puts})).await.0, 200);
    }
    let one = one.restart().await;
    let client = Client::of(&one);
    let version = async |client: &Client, key: String| {
        let (status, said) = client.json(Method::PUT, &format!("/v1/state/kv/{key}"), &json!(1)).await;
        assert_eq!(status, 200, "{said}");
        said["version"].as_i64().unwrap()
    };
    let spared = async || crate::ledger::metric(&client, "sop_ledger_spared_reads_total").await;
    let fresh = std::sync::atomic::AtomicUsize::new(0);
    until("what is new to be known", || async {
        let n = fresh.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(version(&client, format!("fresh/{n}")).await, 1);
        spared().await > 0.0
    })
    .await;
    let before = spared().await;
    for n in (0..all).step_by(83).chain([all - 1]) {
        assert_eq!(version(&client, format!("there/{n}")).await, 2, "{n}");
    }
    // Two or three in a thousand may be looked up in vain; of those that are there, none is spared.
    assert_eq!(spared().await, before);
    for n in 0..50 {
        assert_eq!(version(&client, format!("new/{n}")).await, 1);
    }
    assert!(spared().await >= before + 45.0);
    let two = Launch::beside(&one, db.url()).start().await;
    let other = client.also_of(&two);
    for n in 0..20 {
        assert_eq!(version(&other, format!("theirs/{n}")).await, 1);
        assert_eq!(version(&client, format!("theirs/{n}")).await, 2);
    }
    let gone = json!({"then": [{"delete": {"prefix": "theirs/"}}]});
    assert_eq!(other.json(Method::POST, "/v1/state/txn", &gone).await.0, 200);
    assert_eq!(version(&client, "theirs/7".to_owned()).await, 1, "a key that is made again begins anew");
    record::check(&db).await;
}

/// In one turn under the lock: what SQL made a moment before does not pass for new, and what was put before a range is deleted
/// around it is not forgotten.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_turn_made_does_not_pass_for_new_in_it_or_after_it() {
    let (db, _daemon, client) = start().await;
    let spared = async || crate::ledger::metric(&client, "sop_ledger_spared_reads_total").await;
    let fresh = std::sync::atomic::AtomicUsize::new(0);
    until("what is new to be known", || async {
        let n = fresh.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        client.put(&format!("fresh/{n}"), "v").await.unwrap();
        spared().await > 0.0
    })
    .await;
    // Sent one after another while somebody holds the head, so that all but the first are of one turn.
    let together = async |sent: Vec<(Method, &'static str, (&'static str, &'static str), String)>| {
        let mut holder = db.connect().await;
        sqlx::raw_sql("BEGIN; SELECT FROM ledger.head FOR UPDATE").execute(&mut holder).await.unwrap();
        let mut answers = Vec::new();
        for (method, path, (name, value), body) in sent {
            let request = client.request(method, path).await.header(name, value).body(body);
            answers.push(tokio::spawn(async move { request.send().await.unwrap() }));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        sqlx::raw_sql("ROLLBACK").execute(&mut holder).await.unwrap();
        let mut all = Vec::new();
        for answer in answers {
            let answer = answer.await.unwrap();
            all.push((answer.status().as_u16(), answer.json::<Value>().await.unwrap()));
        }
        all
    };
    let put = |path: &'static str, field| (Method::PUT, path, field, "1".to_owned());
    let json_type = ("content-type", "application/json");
    let made = json!({"then": [{"put": {"key": "made", "json": 1}}, {"delete": {"prefix": "nothing/"}}]}).to_string();
    let said = together(vec![
        put("/v1/state/kv/first", json_type),
        (Method::POST, "/v1/state/txn", json_type, made),
        put("/v1/state/kv/made", ("if-none-match", "*")),
    ])
    .await;
    assert_eq!((said[1].0, said[2].0), (200, 412), "{said:?}");
    let range = |from: &str, to: &str| {
        let base64 = |text: &str| sop::kernel::crypto::base64(text);
        json!({"key": base64(from), "range_end": base64(to)}).to_string()
    };
    let said = together(vec![
        put("/v1/state/kv/first", json_type),
        put("/v1/state/kv/a/1", json_type),
        put("/v1/state/kv/a/9", json_type),
        (Method::POST, "/v3/kv/deleterange", json_type, range("a/1", "a/5")),
    ])
    .await;
    assert!(said.iter().all(|(status, _)| *status == 200) && said[3].1["deleted"] == "1", "{said:?}");
    let (_, again) = client.json(Method::PUT, "/v1/state/kv/a/9", &json!(2)).await;
    assert_eq!(again["version"], 2, "{again}");
    record::check(&db).await;
}
