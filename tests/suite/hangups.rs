//! Clients that hang up, anywhere: what they leave behind is nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use crate::ledger::metric;
use crate::state_leases::other;
use crate::support::client::Client;
use crate::support::daemon::Launch;
use crate::support::dice::Dice;
use crate::support::postgres::{Database, database};
use crate::support::proxy::{Fault, Proxy};
use crate::support::{record, until};

const CLIENTS: u64 = 12;
const REQUESTS: usize = 400;
/// A request is given up after so many milliseconds, at most; most are answered in a few.
const MOST: usize = 6;

/// What goes up with a request and comes down with its end, and how far; reading it is a request.
const GAUGES: [(&str, f64); 4] = [
    ("sop_api_requests_in_flight", 1.0),
    ("sop_state_lock_waits_count", 0.0),
    ("sop_state_watchers_count", 0.0),
    ("sop_nexus_watchers_count", 0.0),
];

/// A transaction that reads all of one moment.
const MOMENT: &str = r#"{"then": [{"get": {"prefix": ""}}]}"#;

type Ask = (Method, String, Value);

/// Requests that change or wait for something, and every `GET` of the document.
async fn asks(client: &Client) -> Vec<Ask> {
    let event = json!({"specversion": "1.0", "id": "1", "source": "/hangs-up", "type": "t"});
    let question = json!({"subject": {"type": "Sop::Client", "id": client.credential().0},
        "action": {"name": "state:get"}, "resource": {"type": "Sop::Key", "id": "k"}});
    let moment: Value = serde_json::from_str(MOMENT).unwrap();
    let mut all: Vec<Ask> = [
        ("PUT", "/v1/state/kv/k", json!("v")),
        ("DELETE", "/v1/state/kv/k", Value::Null),
        ("GET", "/v1/state/watch?prefix=", Value::Null),
        ("GET", "/v1/state/watch?prefix=&wait=5", Value::Null),
        ("POST", "/v1/state/txn", moment.clone()),
        ("POST", "/v1/state/txn", moment.clone()),
        ("POST", "/v1/state/txn", moment),
        ("POST", "/v1/state/txn", json!({"then": [{"put": {"key": "k", "json": 1}}, {"get": {"key": "l"}}]})),
        ("POST", "/v1/state/txn", json!({"then": [{"delete": {"prefix": "k"}}, {"put": {"key": "l", "json": 1}}]})),
        (
            "POST",
            "/v1/tx",
            json!({"operations": [{"state:put": {"key": "t", "json": 1}}, {"audit:event": {"event": event}}]}),
        ),
        ("POST", "/v1/state/leases", json!({"ttl": 30})),
        ("POST", "/v1/state/locks/one", json!({"ttl": 30})),
        ("POST", "/v1/state/locks/one", json!({"ttl": 30, "wait": 5})),
        ("POST", "/v1/state/locks/many", json!({"ttl": 30, "wait": 5, "mode": "read"})),
        ("POST", "/v1/state/elections/e/campaign", json!({"ttl": 30, "wait": 5, "value": 1})),
        ("GET", "/v1/state/elections/e/observe", Value::Null),
        ("PUT", "/v1/nexus/topics/t", json!({"retention": 60})),
        ("PUT", "/v1/nexus/topics/t/groups/g", json!({})),
        ("POST", "/v1/nexus/topics/t/groups/g/pull", json!({"max": 3, "wait": 5})),
        ("PUT", "/v1/nexus/services/s/instances/1", json!({"address": "127.0.0.1:9", "ttl": 30})),
        ("GET", "/v1/nexus/services/s/watch", Value::Null),
        ("GET", "/v1/audit/stream", Value::Null),
        ("GET", "/v1/audit/entries?text=put", Value::Null),
        ("POST", "/access/v1/evaluation", question),
        ("POST", "/v3/kv/range", json!({"key": "aw==", "range_end": "bA=="})),
        ("POST", "/v3/watch", json!({"create_request": {"key": "aw=="}})),
    ]
    .into_iter()
    .map(|(method, path, body)| (method.parse().unwrap(), path.to_owned(), body))
    .collect();
    let (_, document) = client.get("/openapi.json").await;
    for (path, item) in document["paths"].as_object().unwrap() {
        if item["get"].is_object() {
            let part = |piece: &str| if piece.starts_with('{') { "1".to_owned() } else { piece.to_owned() };
            let path = path.split('/').map(part).collect::<Vec<_>>().join("/");
            all.push((Method::GET, path, Value::Null));
        }
    }
    all
}

/// Sends requests and gives each up at some moment of it.
async fn hang_up(client: Client, asks: &[Ask], mut dice: Dice) {
    for _ in 0..REQUESTS {
        let (method, path, body) = &asks[dice.up_to(asks.len())];
        let request = client.request(method.clone(), path).await;
        let request = if body.is_null() { request } else { request.json(body) };
        let whole = async { request.send().await.unwrap().bytes().await.unwrap() };
        let _ = tokio::time::timeout(Duration::from_millis(dice.up_to(MOST) as u64), whole).await;
    }
}

/// Reads its own writes, by whichever of the readers' connections, until told to stop; how often.
async fn look(client: Client, n: u64, stop: &AtomicBool) -> u64 {
    let mut looked = 0;
    while !stop.load(Ordering::Acquire) {
        let index = client.put(&format!("looks/{n}/k"), "v").await.unwrap();
        let (status, list) = client.get(&format!("/v1/state/kv?prefix=looks/{n}/")).await;
        assert_eq!((status, list["items"][0]["index"].as_i64()), (200, Some(index)), "{list}");
        looked += 1;
    }
    looked
}

/// Sessions of daemons that are in a transaction and do nothing, and those of readers.
async fn sessions(db: &Database) -> (i64, i64) {
    let sql = "SELECT count(*) FILTER (WHERE state LIKE 'idle in transaction%'),
                      count(*) FILTER (WHERE application_name LIKE '%/reader')
               FROM pg_stat_activity WHERE datname = $1 AND application_name LIKE 'sop/%'";
    sqlx::query_as(sql).bind(&db.name).fetch_one(&mut db.connect().await).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_hangs_up_anywhere_leaves_nothing_behind() {
    let db = database().await;
    let daemon = Launch::on(db.url()).env("SOP__DATABASE__READERS", "4").start().await;
    let client = Client::of(&daemon);
    let asks = asks(&client).await;
    assert!(asks.len() > 60, "{}", asks.len());
    let one = |n: u64| hang_up(client.clone_at_self(), &asks, Dice::new(n));
    let stop = AtomicBool::new(false);
    let all = async {
        join_all((0..CLIENTS).map(one)).await;
        stop.store(true, Ordering::Release);
    };
    let ((), looked) = tokio::join!(all, join_all((0..2).map(|n| look(client.clone_at_self(), n, &stop))));
    assert!(looked.iter().sum::<u64>() >= 4, "{looked:?}");
    for (gauge, least) in GAUGES {
        until(&format!("{gauge} to come down"), async || metric(&client, gauge).await <= least).await;
    }
    until("every session to be out of its transaction", async || sessions(&db).await.0 == 0).await;
    assert!(sessions(&db).await.1 <= 4, "readers");
    // Every reader's connection shows what is.
    for n in 0..4 {
        client.put(&format!("after/{n}"), "v").await.unwrap();
        let lists = join_all((0..16).map(|_| client.get("/v1/state/kv?prefix=after/"))).await;
        for (status, list) in lists {
            assert_eq!((status, list["items"].as_array().map(Vec::len)), (200, Some(n + 1)), "{list}");
        }
    }
    // What was granted to them, even now, goes with its lease, and nobody is left in a queue.
    until("the locks to be free", async || {
        let (_, leases) = client.get("/v1/state/leases?limit=1000").await;
        for lease in leases["items"].as_array().unwrap() {
            let path = format!("/v1/state/leases/{}", lease["id"].as_str().unwrap());
            client.request(Method::DELETE, &path).await.send().await.unwrap();
        }
        let lock =
            async |name| client.json(Method::POST, &format!("/v1/state/locks/{name}"), &json!({"ttl": 30})).await;
        let (one, many) = (lock("one").await, lock("many").await);
        one.0 == 200 && many.0 == 200
    })
    .await;
    let said = daemon.log();
    assert!(!said.contains("\"ERROR\"") && !said.contains("panicked"), "{said}");
    record::check(&db).await;
}

/// A client hangs up in the moment in which the transaction that would have read for it begins: the connection goes back to the
/// others, and a snapshot left on it would be what everybody reads from then on.
#[tokio::test(flavor = "multi_thread")]
async fn who_hangs_up_as_its_reading_begins_leaves_no_old_moment_to_others() {
    const READING: [(Method, &str, &str); 3] = [
        (Method::POST, "/v1/state/txn", MOMENT),
        (Method::GET, "/v1/audit/entries?action=state:put", ""),
        (Method::GET, "/v1/audit/facets?action=state:put", ""),
    ];
    let db = database().await;
    let proxy = Proxy::before(&db);
    let daemon = Launch::on(db.url_via(&proxy)).env("SOP__DATABASE__READERS", "1").start().await;
    let client = Client::of(&daemon);
    client.put("a", "0").await.unwrap();
    let gauge = "sop_api_requests_in_flight";
    let alone = metric(&client, gauge).await;
    let asked = |(method, path, body): &(Method, &'static str, &'static str)| {
        let (client, method, path, body) = (client.clone_at_self(), method.clone(), *path, *body);
        async move {
            let request = client.request(method, path).await.header("content-type", "application/json").body(body);
            request.send().await.unwrap().json::<Value>().await.unwrap()
        }
    };
    for (round, reading) in READING.iter().enumerate() {
        let begins = proxy.arm(Fault::hold_before().on("begin isolation level repeatable read read only"));
        let hangs_up = tokio::spawn(asked(reading));
        begins.hit().await;
        hangs_up.abort();
        until("the daemon to have noticed", async || metric(&client, gauge).await <= alone).await;
        begins.release();
        // By the one connection there is: what the first reads would be the moment of the others.
        for n in 0..3 {
            let (status, all) = client.get(&format!("/v1/state/kv?prefix=b/{round}/")).await;
            assert_eq!((status, all["items"].as_array().map(Vec::len)), (200, Some(n)), "{reading:?}: {all}");
            client.put(&format!("b/{round}/{n}"), "v").await.unwrap();
        }
        let read = asked(&READING[0]).await;
        assert_eq!(read["results"][0]["get"]["items"].as_array().map(Vec::len), Some(4 + round * 3), "{read}");
        let counted = asked(&READING[2]).await;
        assert_eq!(counted["entries"], 4 + round * 3, "{counted}");
    }
    record::check(&db).await;
}

/// While one change is on its way, others wait for their turn; those whose clients are gone when it comes are not begun. That one of
/// them was denied has happened, and is recorded.
#[tokio::test(flavor = "multi_thread")]
async fn who_hangs_up_before_its_turn_changes_nothing() {
    let db = database().await;
    let proxy = Proxy::before(&db);
    let daemon = Launch::on(db.url_via(&proxy)).start().await;
    let client = Client::of(&daemon);
    let reader = other(&client, "state:read").await;
    let put = |client: &Client, key: String| {
        let client = client.clone_at_self();
        tokio::spawn(async move { client.put(&key, "v").await })
    };
    put(&client, "first".to_owned()).await.unwrap().unwrap();
    assert_eq!(reader.get("/v1/state/kv").await.0, 200);
    let turn = proxy.arm(Fault::hold_before().committing("state.history"));
    let ahead = put(&client, "ahead".to_owned());
    turn.hit().await;
    let gone: Vec<_> = (0..20).map(|n| put(&client, format!("gone/{n}"))).collect();
    let denied = put(&reader, "denied".to_owned());
    let kept = put(&client, "kept".to_owned());
    let up = async |least: f64| metric(&client, "sop_api_requests_in_flight").await >= least;
    until("all to be on their way", async || up(24.0).await).await;
    gone.iter().chain([&denied]).for_each(|put| put.abort());
    until("the daemon to have noticed", async || !up(4.0).await).await;
    turn.release();
    let (ahead, kept) = (ahead.await.unwrap().unwrap(), kept.await.unwrap().unwrap());
    assert!(kept > ahead);
    let (_, all) = client.get("/v1/state/kv?keys_only=true").await;
    let keys: Vec<&str> = all["items"].as_array().unwrap().iter().map(|i| i["key"].as_str().unwrap()).collect();
    assert_eq!(keys, ["ahead", "first", "kept"]);
    assert!(metric(&client, "sop_ledger_given_up_total").await >= 1.0);
    until("the denial to be recorded", async || {
        let (_, found) = client.get("/v1/audit/entries?outcome=denied&action=state:put").await;
        found["items"].as_array().is_some_and(|items| items.len() == 1)
    })
    .await;
    record::check(&db).await;
}

/// A daemon that stops in the midst of reading holds its moment, and all that is dead since with it, no longer than a statement
/// may take.
#[tokio::test(flavor = "multi_thread")]
async fn who_stops_in_the_midst_of_reading_does_not_keep_its_moment() {
    let db = database().await;
    let proxy = Proxy::before(&db);
    let launch = Launch::on(db.url_via(&proxy)).env("SOP__DATABASE__STATEMENT_TIMEOUT", "1s");
    let daemon = launch.env("SOP__DATABASE__READERS", "1").start().await;
    let client = Client::of(&daemon);
    client.put("k", "v").await.unwrap();
    // Of three statements the second: how large what it reads is.
    let stops = proxy.arm(Fault::hold_after().on("as sizes"));
    let body: Value = serde_json::from_str(MOMENT).unwrap();
    let read = tokio::spawn({
        let (client, body) = (client.clone_at_self(), body.clone());
        async move { client.json(Method::POST, "/v1/state/txn", &body).await }
    });
    assert!(stops.hit().await.application.ends_with("/reader"));
    assert_eq!(sessions(&db).await.0, 1);
    until("its moment to be given up", async || sessions(&db).await.0 == 0).await;
    stops.release();
    assert_eq!(read.await.unwrap().0, 503, "whoever waited is told");
    let (status, read) = client.json(Method::POST, "/v1/state/txn", &body).await;
    assert_eq!((status, &read["results"][0]["get"]["items"][0]["key"]), (200, &"k".into()), "{read}");
}
