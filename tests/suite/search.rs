//! Entries found by what is known of them; counted; followed as they come.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::StreamExt as _;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::postgres::{Database, database};
use crate::support::soon;

async fn start() -> (Database, Daemon, Client) {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    (db, daemon, client)
}

/// Of all pages: one that takes too long on a busy machine ends early, and says where to go on.
async fn found(client: &Client, query: &str) -> Vec<i64> {
    let (mut found, mut after) = (Vec::new(), String::new());
    loop {
        let (status, page) = client.get(&format!("/v1/audit/entries?{query}&limit=1000&order=asc{after}")).await;
        assert_eq!(status, 200, "{query}: {page}");
        found.extend(page["items"].as_array().unwrap().iter().map(|e| e["index"].as_i64().unwrap()));
        let Some(next) = page["next"].as_str() else { return found };
        after = format!("&after={next}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_combination_finds_what_a_plain_look_at_every_entry_finds() {
    let (_db, _daemon, client) = start().await;
    // Enough for whole blocks and a tail, with kinds that meet and kinds that do not.
    let (_, made) =
        client.json(Method::POST, "/oauth2/register", &json!({"client_name": "r", "scope": "state:read"})).await;
    let (id, secret) = (made["client_id"].as_str().unwrap(), made["client_secret"].as_str().unwrap());
    let reader = client.with(id, secret);
    for round in 0..10 {
        let puts = (0..60).map(|i| {
            let client = &client;
            async move { client.put(&format!("arp/{round}/{}", i % 9), "v").await.unwrap() }
        });
        futures_util::future::join_all(puts).await;
        let key = format!("/v1/state/kv/arp/{round}/0");
        assert_eq!(reader.send(Method::PUT, &key, b"v".to_vec()).await.unwrap().status(), 403);
        client
            .request(Method::PUT, &key)
            .await
            .header("x-request-id", format!("it-{round}"))
            .body("v")
            .send()
            .await
            .unwrap();
    }
    let mut all = Vec::new();
    let mut after = String::new();
    loop {
        let (_, page) = client.get(&format!("/v1/audit/entries?limit=333{after}")).await;
        all.extend(page["items"].as_array().unwrap().iter().cloned());
        match page["next"].as_str() {
            Some(next) => after = format!("&after={next}"),
            None => break,
        }
    }
    let upto = all.iter().map(|e| e["index"].as_i64().unwrap()).max().unwrap();
    assert!(upto > 600, "two blocks at least: {upto}");
    assert_eq!(all.len() as i64, upto + 1, "every entry once");
    let actor = all.iter().find(|e| e["outcome"] == "denied").unwrap()["actor"].as_str().unwrap().to_owned();
    let known = [
        ("actor", actor.as_str()),
        ("room", "state"),
        ("action", "state:put"),
        ("resource", "key/arp/3"),
        ("outcome", "denied"),
        ("request_id", "it-3"),
    ];
    for mask in 0..(1 << known.len()) {
        let given: Vec<_> = (0..known.len()).filter(|i| mask >> i & 1 == 1).map(|i| known[i]).collect();
        let query: Vec<String> = given.iter().map(|(n, v)| format!("{n}={v}")).collect();
        let fits = |e: &&Value| {
            given.iter().all(|(name, value)| match *name {
                "resource" => e["resource"].as_str().unwrap().starts_with(value),
                name => e[name] == *value,
            })
        };
        let expected: BTreeSet<i64> = all.iter().filter(fits).map(|e| e["index"].as_i64().unwrap()).collect();
        let got: Vec<i64> = found(&client, &query.join("&")).await.into_iter().filter(|i| *i <= upto).collect();
        assert!(got.windows(2).all(|w| w[0] < w[1]), "{query:?}");
        assert_eq!(got.into_iter().collect::<BTreeSet<_>>(), expected, "{query:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn words_of_the_details_are_found_wherever_they_stand() {
    let (_db, _daemon, client) = start().await;
    for i in 0..300 {
        client.put(&format!("plans/{i}"), "v").await.unwrap();
    }
    let rare = client.put("plans/Overview-41", "v").await.unwrap();
    for i in 0..300 {
        client.put(&format!("plans/{i}"), "w").await.unwrap();
    }
    assert_eq!(found(&client, "text=overview").await, [rare], "whatever its case");
    assert_eq!(found(&client, "text=41+plans+OVERVIEW&action=state:put").await, [rare]);
    // Of puts: that the signing keys were made in the 41st second is a word of their entry.
    let hits = found(&client, "text=41&action=state:put").await;
    assert_eq!(hits.len(), 3, "a word, in a block or not yet in one: {hits:?}");
    assert_eq!(found(&client, "text=verview").await, [0i64; 0], "whole words");
    assert_eq!(client.get("/v1/audit/entries?text=--").await.0, 400);
    assert_eq!(client.get("/v1/audit/entries?outcome=perhaps").await.0, 400);
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let put = client.request(Method::PUT, "/v1/state/kv/traced").await.header("traceparent", trace).body("v");
    let index: Value = put.send().await.unwrap().json().await.unwrap();
    let hits = found(&client, "trace_id=4bf92f3577b34da6a3ce929d0e0e4736").await;
    assert_eq!(hits, [index["index"].as_i64().unwrap()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn counts_by_facet_are_those_of_the_entries() {
    let (_db, _daemon, client) = start().await;
    for i in 0..300 {
        client.put(&format!("a/{i}"), "v").await.unwrap();
    }
    for i in 0..7 {
        client.request(Method::DELETE, &format!("/v1/state/kv/a/{i}")).await.send().await.unwrap();
    }
    let (status, said) = client.get("/v1/audit/facets?room=state").await;
    assert_eq!((status, &said["entries"], &said["complete"]), (200, &307.into(), &true.into()), "{said}");
    let actions = said["facets"]["action"].as_array().unwrap();
    assert_eq!(actions[0], json!({"value": "state:put", "count": 300}));
    assert_eq!(actions[1], json!({"value": "state:delete", "count": 7}));
    let (_, said) = client.get("/v1/audit/facets?room=state&text=299").await;
    assert_eq!(said["entries"], 1, "{said}");
    let (_, said) = client.get("/v1/audit/facets?action=nothing:at-all").await;
    assert_eq!((&said["entries"], &said["complete"]), (&0.into(), &true.into()));
}

/// More than a shelf of blocks (16,384 entries), loose blocks after it, and a tail: what is rare is found in each of them, in both
/// orders and over pages.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_rare_is_found_on_a_shelf_off_it_and_in_the_tail() {
    let (db, _daemon, client) = start().await;
    let mut rare = Vec::new();
    for round in 0..5 {
        let index = client.put(&format!("rare/Gem-{round}"), "v").await.unwrap();
        rare.push(index);
        let many = if round < 3 { 5_500 } else { 400 };
        let puts = futures_util::stream::iter(0..many).for_each_concurrent(128, |i| {
            let client = &client;
            async move {
                client.put(&format!("many/{round}/{i}"), "v").await.unwrap();
            }
        });
        // Whatever is made of it meanwhile, what there is is found.
        let looking = async {
            loop {
                assert_eq!(found(&client, "resource=key/rare/Gem").await, rare);
            }
        };
        tokio::select! {
            () = puts => {}
            () = looking => {}
        }
    }
    let last = client.put("rare/Gem-5", "v").await.unwrap();
    rare.push(last);
    assert!(last > 16_384 + 512, "past a shelf: {last}");
    let mut conn = db.connect().await;
    let count = async |conn: &mut sqlx::PgConnection, table: &str| {
        let sql = sqlx::AssertSqlSafe(format!("SELECT count(*) FROM audit.{table}"));
        sqlx::query_scalar::<_, i64>(sql).fetch_one(conn).await.unwrap()
    };
    for query in ["text=gem", "resource=key/rare/", "resource=key/rare/Gem", "text=GEM&action=state:put&outcome=ok"] {
        assert_eq!(found(&client, query).await, rare, "{query}");
    }
    assert_eq!(found(&client, "resource=key/rare/Gem-1").await, [rare[1]]);
    assert_eq!(found(&client, "text=gem&action=state:delete").await, [0i64; 0]);
    assert_eq!(count(&mut conn, "shelves").await, 1);
    assert_eq!(count(&mut conn, "loose").await, count(&mut conn, "blocks").await - 64);
    // By pages, the newest first.
    let (mut pages, mut after) = (Vec::new(), String::new());
    loop {
        let (_, page) = client.get(&format!("/v1/audit/entries?resource=key/rare/&limit=2{after}")).await;
        pages.extend(page["items"].as_array().unwrap().iter().map(|e| e["index"].as_i64().unwrap()));
        match page["next"].as_str() {
            Some(next) => after = format!("&after={next}"),
            None => break,
        }
    }
    assert_eq!(pages, rare.iter().rev().copied().collect::<Vec<_>>());
    // Between two times, and counted.
    let (_, entry) = client.get(&format!("/v1/audit/entries/{}", rare[2])).await;
    let time = entry["time"].as_str().unwrap();
    assert_eq!(found(&client, &format!("text=gem&since={time}")).await, rare[2..]);
    assert_eq!(found(&client, &format!("text=gem&until={time}")).await, rare[..2]);
    let (_, said) = client.get("/v1/audit/facets?resource=key/").await;
    assert_eq!(said["entries"], 6 + 3 * 5_500 + 2 * 400);
}

/// Reads a stream until `enough`; the (event, id, data) of each.
async fn read(
    answer: reqwest::Response,
    enough: impl Fn(&[(String, i64, Value)]) -> bool,
) -> Vec<(String, i64, Value)> {
    let mut body = answer.bytes_stream();
    let (mut text, mut told) = (String::new(), Vec::new());
    while !enough(&told) {
        let part = soon("the stream goes on", body.next()).await.expect("more").unwrap();
        text.push_str(std::str::from_utf8(&part).unwrap());
        while let Some((event, rest)) = text.split_once("\n\n") {
            let field =
                |name: &str| event.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default().trim().to_owned();
            told.push((field("event:"), field("id:").parse().unwrap(), serde_json::from_str(&field("data:")).unwrap()));
            text = rest.to_owned();
        }
    }
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tail_goes_on_at_another_daemon_without_loss_or_repeats() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let two = Launch::beside(&one, db.url()).start().await;
    let (a, b) = (Client::of(&one), Client::of(&one).also_of(&two));
    let before = a.put("t/0", "v").await.unwrap();
    let path = format!("/v1/audit/stream?action=state:put&after={before}");
    let stream = a.request(Method::GET, &path).await.send().await.unwrap();
    assert_eq!(stream.headers()["content-type"], "text/event-stream");
    let writer = a.clone_at(&two.url);
    let writes = tokio::spawn(async move {
        let mut all = Vec::new();
        for i in 0..60 {
            all.push(writer.put(&format!("t/{i}"), "v").await.unwrap());
        }
        all
    });
    let entries =
        |told: &[(String, i64, Value)]| -> Vec<i64> { told.iter().filter(|t| t.0 == "entry").map(|t| t.1).collect() };
    let first = read(stream, |told| entries(told).len() >= 20).await;
    assert!(first.iter().any(|t| t.0 == "bookmark"), "it says where it stands");
    let entry = first.iter().find(|t| t.0 == "entry").unwrap();
    assert_eq!((&entry.2["action"], entry.2["index"].as_i64()), (&"state:put".into(), Some(entry.1)));
    let last = first.last().unwrap().1;
    let again = b.request(Method::GET, "/v1/audit/stream?action=state:put").await.header("last-event-id", last);
    let all = writes.await.unwrap();
    let rest = read(again.send().await.unwrap(), |told| entries(told).last() == all.last()).await;
    assert_eq!([entries(&first), entries(&rest)].concat(), all);
    assert_eq!(a.get("/v1/audit/stream?after=x").await.0, 400);
    assert_eq!(a.bare(Method::GET, "/v1/audit/stream").send().await.unwrap().status(), 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saved_search_is_searched_by_and_raises_its_alert_once() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let _two = Launch::beside(&one, db.url()).start().await;
    let client = Client::of(&one);
    let saved =
        json!({"outcome": "denied", "alert": {"more_than": 2, "within": 60, "by": "actor", "severity": "critical"}});
    let path = "/v1/audit/searches/denials";
    assert_eq!(client.json(Method::PUT, path, &saved).await.0, 201);
    assert_eq!(client.json(Method::PUT, path, &saved).await.0, 200);
    let (_, made) =
        client.json(Method::POST, "/oauth2/register", &json!({"client_name": "r", "scope": "state:read"})).await;
    let (id, secret) = (made["client_id"].as_str().unwrap(), made["client_secret"].as_str().unwrap());
    let reader = client.with(id, secret);
    let incidents = async || {
        let (_, page) = client.get("/v1/health/incidents").await;
        page["items"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|i| i["fingerprint"].as_str().unwrap().starts_with("audit/alert/denials/"))
            .count()
    };
    let deny = async || reader.send(Method::PUT, "/v1/state/kv/k", b"v".to_vec()).await.unwrap().status().as_u16();
    for _ in 0..2 {
        assert_eq!(deny().await, 403);
    }
    tokio::time::sleep(Duration::from_millis(800)).await;
    assert_eq!(incidents().await, 0, "two are not more than two");
    for _ in 0..5 {
        assert_eq!(deny().await, 403);
    }
    crate::support::until("the incident", || async { incidents().await == 1 }).await;
    let alerts = found(&client, "action=audit:alert").await;
    assert_eq!(alerts.len(), 1, "once in its time, on two daemons");
    assert_eq!(found(&client, "search=denials").await.len(), 7);
    assert_eq!(found(&client, "search=denials&action=state:get").await, [0i64; 0]);
    assert_eq!(client.get("/v1/audit/entries?search=nothing").await.0, 404);
    let (_, listed) = client.get("/v1/audit/searches").await;
    assert_eq!(
        (&listed["items"][0]["name"], &listed["items"][0]["alert"]["more_than"]),
        (&"denials".into(), &2.into())
    );
    for bad in [
        json!({"alert": {"more_than": 1, "within": 0}}),
        json!({"alert": {"more_than": 1, "within": 60, "by": "time"}}),
        json!({"nobody": 1}),
        json!({"outcome": "perhaps"}),
    ] {
        assert_eq!(client.json(Method::PUT, path, &bad).await.0, 400, "{bad}");
    }
    assert_eq!(client.request(Method::DELETE, path).await.send().await.unwrap().status(), 204);
    assert_eq!(client.get(path).await.0, 404);
    assert_eq!(client.request(Method::DELETE, path).await.send().await.unwrap().status(), 404);
}
