//! The past of keys: how far it can be read, what compaction gives up and when, and how old a stale read is.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use crate::state::{events, problem};
use crate::support::client::Client;
use crate::support::daemon::Launch;
use crate::support::postgres::{Database, database, database_alone};
use crate::support::{record, until};

async fn compact(client: &Client, before: i64) -> (u16, Value) {
    client.json(Method::POST, "/v1/state/compact", &json!({"before": before})).await
}

async fn status(client: &Client, path: &str) -> (u16, String) {
    let answer = client.request(Method::GET, path).await.send().await.unwrap();
    if answer.status() == 200 {
        return (200, String::new());
    }
    let (status, kind, _) = problem(answer).await;
    (status, kind)
}

async fn rows(db: &Database) -> i64 {
    sqlx::query_scalar("SELECT count(*) FROM state.history").fetch_one(&mut db.connect().await).await.unwrap()
}

/// A daemon that drops rows soon after they were given up.
fn hasty(db: &Database) -> Launch {
    Launch::on(db.url()).env("SOP__DATABASE__STATEMENT_TIMEOUT", "2s").env("SOP__STATE__HISTORY__GRACE", "2s")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_compacted_is_gone_and_the_rest_is_whole() {
    let db = database().await;
    let daemon = hasty(&db).start().await;
    let client = Client::of(&daemon);
    let mut at = Vec::new();
    for i in 0..5 {
        at.push(client.put("h/a", &i.to_string()).await.unwrap());
        client.put(&format!("h/once{i}"), "v").await.unwrap();
    }
    client.put("h/gone", "v").await.unwrap();
    client.request(Method::DELETE, "/v1/state/kv/h/gone").await.send().await.unwrap();
    let mark = at[3];
    let (_, before) = client.get(&format!("/v1/state/kv?prefix=h/&at={mark}")).await;
    let (ok, done) = compact(&client, mark).await;
    assert_eq!((ok, done["before"].as_i64()), (200, Some(mark)), "{done}");
    let index = done["index"].as_i64().unwrap();
    let (_, entry) = client.get(&format!("/v1/audit/entries/{index}")).await;
    assert_eq!(
        (entry["action"].as_str(), entry["details"]["change"]["before"].as_i64()),
        (Some("state:compact"), Some(mark))
    );
    // At once, although the rows are there for a while: a read that began before the mark may still be under way.
    let all = rows(&db).await;
    assert_eq!(all, 12);
    let old = mark - 1;
    let compacted = (410, "compacted".to_owned());
    for path in ["/v1/state/kv/h/a?at=", "/v1/state/kv?prefix=h/&at=", "/v1/state/watch?prefix=h/&after="] {
        assert_eq!(status(&client, &format!("{path}{old}")).await, compacted, "{path}");
    }
    assert_eq!(status(&client, &format!("/v1/state/kv/h/a?at={mark}")).await.0, 200);
    let (again, said) = compact(&client, mark).await;
    assert_eq!((again, said["before"].as_i64()), (409, Some(mark)));
    assert_eq!(compact(&client, index + 1000).await.1["type"], "/problems/beyond-head");
    assert_eq!(client.json(Method::POST, "/v1/state/compact", &json!({})).await.0, 400);
    until("the rows to go", || async { rows(&db).await == all - 3 }).await;
    assert_eq!(client.get(&format!("/v1/state/kv?prefix=h/&at={mark}")).await.1, before, "as of the mark all is there");
    let watch =
        client.request(Method::GET, &format!("/v1/state/watch?prefix=h/&after={mark}")).await.send().await.unwrap();
    let seen = events(watch, |e| e.iter().any(|e| e.0 == "delete")).await;
    assert_eq!(seen.iter().filter(|e| e.0 == "put").count(), 4, "what came after the mark is told");
    // The next one gives up what the deletion left too.
    let head = client.put("h/last", "v").await.unwrap();
    assert_eq!(compact(&client, head).await.0, 200);
    until("the rest to go", || async { rows(&db).await == 7 }).await;
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_may_do_anything_in_the_room_compacts() {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    let index = client.put("c", "v").await.unwrap();
    for (scope, status) in [("state:write", 403), ("state:read", 403), ("state", 200)] {
        let (_, made) =
            client.json(Method::POST, "/oauth2/register", &json!({"client_name": "c", "scope": scope})).await;
        let other = client.with(made["client_id"].as_str().unwrap(), made["client_secret"].as_str().unwrap());
        assert_eq!(compact(&other, index).await.0, status, "{scope}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn history_is_kept_for_so_long_and_so_many_changes() {
    for (key, value) in [("KEEP", "3s"), ("KEEP_VERSIONS", "4")] {
        let db = database().await;
        let other = if key == "KEEP" { ("KEEP_VERSIONS", "0") } else { ("KEEP", "0s") };
        let launch = hasty(&db)
            .env(&format!("SOP__STATE__HISTORY__{key}"), value)
            .env(&format!("SOP__STATE__HISTORY__{}", other.0), other.1);
        let daemon = launch.start().await;
        let client = Client::of(&daemon);
        for i in 0..10 {
            client.put("k", &i.to_string()).await.unwrap();
        }
        // By number it is looked at once a minute, and at the start: this is another start.
        let daemon = if key == "KEEP" { daemon } else { daemon.restart().await };
        let client = client.clone_at(&daemon.url);
        let kept = if key == "KEEP" { 1 } else { 5 };
        until("history to be short", || async { rows(&db).await == kept }).await;
        let now = client.request(Method::GET, "/v1/state/kv/k").await.send().await.unwrap();
        let now = now.headers()["sop-index"].to_str().unwrap().to_owned();
        assert_eq!(status(&client, &format!("/v1/state/kv/k?at={now}")).await.0, 200, "what is now is not given up");
        assert_eq!(status(&client, "/v1/state/kv/k?at=1").await.0, 410);
        record::check(&db).await;
    }
    let said = Launch::on("postgres:///none".into()).env("SOP__STATE__HISTORY__GRACE", "1s").refused().await;
    assert!(said.contains("state.history.grace"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_goes_on_where_a_killed_daemon_was() {
    let db = database().await;
    let daemon = hasty(&db).start().await;
    let client = Client::of(&daemon);
    client.put("k", "0").await.unwrap();
    let mut last = 0;
    for n in 1..=30 {
        let many: Vec<Value> = (0..100).map(|i| json!({"put": {"key": format!("m/{i}"), "json": n}})).collect();
        let (_, done) = client.json(Method::POST, "/v1/state/txn", &json!({"then": many})).await;
        last = done["index"].as_i64().unwrap();
    }
    assert_eq!(compact(&client, last).await.0, 200);
    until("some rows to go", || async { rows(&db).await < 3001 }).await;
    let daemon = daemon.restart().await;
    let client = client.clone_at(&daemon.url);
    until("the rest to go", || async { rows(&db).await == 101 }).await;
    let (_, page) = client.get(&format!("/v1/state/kv?at={last}&limit=1000&keys_only=true")).await;
    assert_eq!(page["items"].as_array().unwrap().len(), 101);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_read_says_how_stale_it_is() {
    let db = database_alone().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    client.put("s", "v").await.unwrap();
    let read = |query: &'static str| {
        let client = &client;
        async move { client.request(Method::GET, &format!("/v1/state/kv/s{query}")).await.send().await.unwrap() }
    };
    let plain = read("").await;
    assert!(!plain.headers().contains_key("sop-staleness"));
    let age = |answer: &reqwest::Response| answer.headers()["sop-staleness"].to_str().unwrap().parse::<f64>().unwrap();
    let stale = read("?consistency=stale").await;
    assert!((0.0..1.5).contains(&age(&stale)), "{}", age(&stale));
    // Without its database a daemon still knows what it read lately, and that it grows old.
    db.cluster.kill().await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(read("").await.status(), 503);
    let stale = read("?consistency=stale").await;
    assert_eq!(stale.status(), 200);
    assert!(age(&stale) > 1.5, "{}", age(&stale));
    assert_eq!(stale.text().await.unwrap(), "v");
}
