//! Leases: granted, renewed by the many, ended by who watched; keys that go with them.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use crate::ledger::metric;
use crate::state::events;
use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::postgres::{Database, database};
use crate::support::{record, until};

async fn start() -> (Database, Daemon, Client) {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    (db, daemon, client)
}

async fn post(client: &Client, path: &str, body: &Value) -> (u16, Value) {
    client.json(Method::POST, path, body).await
}

/// Grants a lease; its id.
pub async fn grant(client: &Client, ttl: f64) -> String {
    let (status, made) = post(client, "/v1/state/leases", &json!({"ttl": ttl})).await;
    assert_eq!(status, 201, "{made}");
    made["id"].as_str().unwrap().to_owned()
}

pub async fn renew(client: &Client, id: &str) -> u16 {
    post(client, &format!("/v1/state/leases/{id}/renew"), &json!({})).await.0
}

/// Another client with a scope.
pub async fn other(client: &Client, scope: &str) -> Client {
    let (_, made) = post(client, "/oauth2/register", &json!({"client_name": "other", "scope": scope})).await;
    client.with(made["client_id"].as_str().unwrap(), made["client_secret"].as_str().unwrap())
}

pub async fn put(client: &Client, key: &str, lease: &str) -> (u16, Value) {
    let path = format!("/v1/state/kv/{key}?lease={lease}");
    let answer = client.request(Method::PUT, &path).await.body("v").send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_go_with_their_lease_as_one_entry() {
    let (db, _daemon, client) = start().await;
    let lease = grant(&client, 60.0).await;
    let (status, written) = put(&client, "l/a", &lease).await;
    assert_eq!((status, written["lease"].as_str()), (200, Some(lease.as_str())));
    let ops = json!({"then": [{"put": {"key": "l/b", "json": 1, "lease": lease}}, {"put": {"key": "l/c", "json": 1, "lease": lease}}]});
    let (_, done) = post(&client, "/v1/state/txn", &ops).await;
    assert_eq!(done["results"][0]["put"]["lease"].as_str(), Some(lease.as_str()));
    // A put without a lease takes the key off it.
    client.put("l/c", "stays").await.unwrap();
    let (_, shown) = client.get(&format!("/v1/state/leases/{lease}")).await;
    assert_eq!((&shown["keys"], shown["ttl"].as_f64()), (&json!(["l/a", "l/b"]), Some(60.0)));
    assert!((50.0..=60.0).contains(&shown["remaining"].as_f64().unwrap()), "{shown}");
    let (_, list) = client.get("/v1/state/kv?prefix=l/").await;
    assert_eq!((&list["items"][0]["lease"], list["items"][2].get("lease")), (&json!(lease), None));
    let got = client.request(Method::GET, "/v1/state/kv/l/a").await.send().await.unwrap();
    assert_eq!(got.headers()["sop-lease"].to_str().unwrap(), lease);
    let watch = client.request(Method::GET, "/v1/state/watch?prefix=l/").await.send().await.unwrap();
    let watch = tokio::spawn(events(watch, |e| e.iter().filter(|e| e.0 == "delete").count() == 2));
    let path = format!("/v1/state/leases/{lease}");
    let ended = client.request(Method::DELETE, &path).await.send().await.unwrap();
    let index: i64 = ended.headers()["sop-index"].to_str().unwrap().parse().unwrap();
    assert_eq!(ended.json::<Value>().await.unwrap(), json!({"id": lease, "keys": 2, "locks": []}));
    let gone: Vec<_> = watch.await.unwrap().into_iter().filter(|e| e.0 == "delete").collect();
    assert!(gone.iter().all(|e| e.2["index"].as_i64() == Some(index)), "one entry: {gone:?}");
    assert_eq!(client.get("/v1/state/kv?prefix=l/").await.1["items"].as_array().unwrap().len(), 1);
    assert_eq!(client.get(&path).await.0, 404);
    assert_eq!(renew(&client, &lease).await, 404);
    assert_eq!(put(&client, "l/d", &lease).await.0, 404);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_its_own_clients() {
    let (db, _daemon, client) = start().await;
    let (a, b) = (other(&client, "state").await, other(&client, "state").await);
    let reader = other(&client, "state:read").await;
    let lease = grant(&a, 60.0).await;
    let path = format!("/v1/state/leases/{lease}");
    assert_eq!(renew(&a, &lease).await, 200);
    assert_eq!(renew(&b, &lease).await, 404, "another's");
    assert_eq!(put(&b, "x", &lease).await.0, 404);
    assert_eq!(
        post(&b, "/v1/state/txn", &json!({"then": [{"put": {"key": "x", "json": 1, "lease": lease}}]})).await.0,
        404
    );
    assert_eq!(post(&b, "/v1/state/locks/x", &json!({"lease": lease})).await.0, 404);
    assert_eq!(b.request(Method::DELETE, &path).await.send().await.unwrap().status(), 403);
    assert_eq!(post(&reader, "/v1/state/leases", &json!({"ttl": 5})).await.0, 403);
    assert_eq!(reader.get(&path).await.0, 200);
    let (_, page) = reader.get("/v1/state/leases?limit=1").await;
    assert_eq!(page["items"][0]["id"].as_str(), Some(lease.as_str()));
    assert_eq!(
        client.request(Method::DELETE, &path).await.send().await.unwrap().status(),
        200,
        "the administrator may"
    );
    for (body, pointer) in [
        (json!({"ttl": 0.5}), "/ttl"),
        (json!({"ttl": 86_401}), "/ttl"),
        (json!({"ttl": "5s"}), "/ttl"),
        (json!({"ttl": 5, "id": 1}), "/id"),
    ] {
        let (status, said) = post(&client, "/v1/state/leases", &body).await;
        assert_eq!((status, said["errors"][0]["pointer"].as_str()), (400, Some(pointer)), "{said}");
    }
    assert_eq!(client.get("/v1/state/leases/not-an-id").await.0, 400);
    assert_eq!(post(&client, "/v1/state/leases/renew", &json!({"ids": []})).await.0, 400);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_ends_by_silence_never_early_and_soon_after() {
    let (db, daemon, client) = start().await;
    let two = Launch::beside(&daemon, db.url()).start().await;
    let there = client.also_of(&two);
    there.token().await;
    let lease = grant(&client, 1.5).await;
    put(&client, "s/a", &lease).await;
    // Renewed on one daemon or the other, it lives; whichever watches.
    for n in 0..8 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(renew(if n % 2 == 0 { &client } else { &there }, &lease).await, 200);
    }
    let last = Instant::now();
    until("it to end", || async { client.get("/v1/state/kv/s/a").await.0 == 404 }).await;
    let late = Duration::from_secs(15);
    assert!(last.elapsed() >= Duration::from_millis(1400) && last.elapsed() < late, "{:?}", last.elapsed());
    let (_, page) = client.get("/v1/audit/entries?action=state:lease-expire").await;
    let ends = page["items"].as_array().unwrap();
    assert_eq!((ends.len(), ends[0]["actor"].as_str()), (1, Some("daemon:state")));
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_or_freeze_of_the_daemon_that_watches_never_ends_a_lease_early() {
    let db = database().await;
    let mut one = Launch::on(db.url()).start().await;
    let client = Client::of(&one);
    client.token().await;
    let doomed = grant(&client, 2.0).await;
    until("it to watch", || async {
        client.get("/v1/audit/entries?action=ledger:claim&resource=claim/state/leases").await.1["items"] != json!([])
    })
    .await;
    let two = Launch::beside(&one, db.url()).start().await;
    let there = client.clone_at(&two.url);
    let kept = grant(&there, 2.0).await;
    // The one that watches is frozen, then killed; the leases are renewed on the other all along, one of them.
    one.freeze();
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(5) {
        tokio::time::sleep(Duration::from_millis(400)).await;
        assert_eq!(renew(&there, &kept).await, 200);
    }
    one.thaw();
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(renew(&there, &kept).await, 200, "who was frozen has not watched");
    one.kill().await;
    let began = Instant::now();
    until("the silent one to end", || async {
        assert_eq!(renew(&there, &kept).await, 200);
        there.get(&format!("/v1/state/leases/{doomed}")).await.0 == 404
    })
    .await;
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    println!("a lease of 2 s ended {:?} after the daemon that watched was killed", began.elapsed());
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
pub async fn renewals_share_entries_and_each_has_a_receipt() {
    let (db, daemon, client) = start().await;
    let leases: Vec<String> = join_all((0..100).map(|_| grant(&client, 30.0))).await;
    let before: i64 = entries(&db).await;
    let rounds = 5;
    for _ in 0..rounds {
        let all = join_all(leases.iter().map(|l| renew(&client, l))).await;
        assert!(all.iter().all(|s| *s == 200));
    }
    let used = entries(&db).await - before;
    assert!(used <= 8 * rounds, "{used} entries for {} renewals", rounds * 100);
    // Many at once, with some that are not there and one twice.
    let mut ids: Vec<Value> = leases.iter().map(|l| json!(l)).collect();
    ids.push(ids[0].clone());
    ids.push(json!("01a20b19-3012-73e6-9c59-d9c4c3767c2d"));
    let (status, done) = post(&client, "/v1/state/leases/renew", &json!({"ids": ids})).await;
    assert_eq!((status, done["renewed"].as_array().unwrap().len()), (200, 101));
    assert_eq!(done["gone"], json!(["01a20b19-3012-73e6-9c59-d9c4c3767c2d"]));
    let (_, page) = client.get("/v1/audit/entries?action=state:lease-renew").await;
    let entry = &page["items"][0];
    assert_eq!(entry["details"]["records"], 100, "{entry}");
    let path = format!("/v1/audit/entries/{}/records/99/receipt", entry["index"]);
    let receipt = client.request(Method::GET, &path).await.send().await.unwrap();
    assert_eq!(receipt.status(), 200, "{}", receipt.text().await.unwrap());
    // None of them is there: nothing is written.
    let before = entries(&db).await;
    let (status, done) = post(&client, "/v1/state/leases/renew", &json!({"ids": [ids[101]]})).await;
    assert_eq!((status, done["renewed"].as_array().unwrap().len()), (200, 0));
    assert_eq!(entries(&db).await, before);
    // A restart in the middle: all that were granted are there, and live their time.
    let daemon = daemon.restart().await;
    let client = client.clone_at(&daemon.url);
    assert_eq!(renew(&client, &leases[0]).await, 200);
    until("they to be counted", || async { metric(&client, "sop_state_leases_count").await == 100.0 }).await;
    record::check(&db).await;
}

async fn entries(db: &Database) -> i64 {
    sqlx::query_scalar("SELECT index FROM ledger.head").fetch_one(&mut db.connect().await).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_with_very_many_keys_ends_at_once() {
    let (db, _daemon, client) = start().await;
    let lease = grant(&client, 60.0).await;
    let (_, put) = put(&client, "m", &lease).await;
    let index = put["index"].as_i64().unwrap();
    client.put("m0", "v").await.unwrap();
    let mut conn = db.connect().await;
    for (table, previous) in [("kv", ""), ("history", "previous, ")] {
        let zero = if previous.is_empty() { "" } else { "0, " };
        let sql = format!(
            "INSERT INTO state.{table} (key, index, created_index, version, {previous}content_type, value, lease)
             SELECT convert_to('m/' || lpad(i::text, 6, '0'), 'UTF8'), {index}, {index}, 1, {zero}'text/plain', 'v', '{lease}' FROM generate_series(1, 20000) AS i"
        );
        sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&mut conn).await.unwrap();
    }
    let ended = client.request(Method::DELETE, &format!("/v1/state/leases/{lease}")).await.send().await.unwrap();
    assert_eq!(ended.json::<Value>().await.unwrap()["keys"], 20_001);
    assert_eq!(client.get("/v1/state/kv?prefix=m").await.1["items"].as_array().unwrap().len(), 1);
    client.put("m0", "w").await.unwrap();
    record::check(&db).await;
}
