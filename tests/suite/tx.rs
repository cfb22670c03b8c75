//! `POST /v1/tx`: changes of several rooms as one, and what happens when one of them cannot be.

use std::time::Duration;

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use sop::audit::note::VerifierKey;
use sop::audit::proof::Proof;
use sop::kernel::crypto::base64;

use crate::events::proven;
use crate::ledger::metric;
use crate::policy::{activate, client as registered, post};
use crate::state::events;
use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::postgres::{Database, database};
use crate::support::{record, soon};

pub async fn start() -> (Database, Daemon, Client) {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    (db, daemon, client)
}

pub async fn tx(client: &Client, operations: &Value) -> (u16, Value) {
    post(client, "/v1/tx", &json!({"operations": operations})).await
}

pub fn event(id: &str) -> Value {
    json!({"specversion": "1.0", "id": id, "source": "/tx", "type": "t", "data": {"n": 1}})
}

pub fn publish(topic: &str, id: &str) -> Value {
    json!({"nexus:publish": {"topic": topic, "event": event(id)}})
}

pub fn put(key: &str) -> Value {
    json!({"state:put": {"key": key, "json": {"v": 1}}})
}

pub fn used(token: &Value, operation: &str) -> Value {
    json!({"token:operation-use": {"token": token["token"], "operation": operation}})
}

pub fn register(service: &str, id: &str) -> Value {
    json!({"nexus:register": {"service": service, "instance": id, "address": "http://h:1", "ttl": 60.5}})
}

pub async fn topic(client: &Client, name: &str) {
    let path = format!("/v1/nexus/topics/{name}");
    assert_eq!(client.json(Method::PUT, &path, &json!({"retention": 3600})).await.0, 201);
    assert_eq!(client.json(Method::PUT, &format!("{path}/groups/g"), &json!({})).await.0, 201);
}

pub async fn pull(client: &Client, topic: &str, wait: f64) -> Vec<Value> {
    let path = format!("/v1/nexus/topics/{topic}/groups/g/pull");
    let (status, answer) = post(client, &path, &json!({"max": 100, "wait": wait})).await;
    assert_eq!(status, 200, "{answer}");
    answer["messages"].as_array().unwrap().clone()
}

pub async fn token(client: &Client, max_uses: i64) -> Value {
    let wanted = json!({"kind": "test", "operation": "deploy", "max_uses": max_uses});
    let (status, issued) = post(client, "/v1/token/operations", &wanted).await;
    assert_eq!(status, 201, "{issued}");
    issued
}

pub async fn uses(client: &Client, token: &Value) -> i64 {
    let (_, shown) = client.get(&format!("/v1/token/operations/{}", token["id"].as_str().unwrap())).await;
    shown["uses"].as_i64().unwrap()
}

async fn receipt(client: &Client, index: i64) -> (Vec<u8>, Proof) {
    let key = client.bare(Method::GET, "/log/key").send().await.unwrap().text().await.unwrap();
    let path = format!("/v1/audit/entries/{index}/receipt");
    let text = client.request(Method::GET, &path).await.send().await.unwrap().text().await.unwrap();
    let proof = Proof::parse(&text).unwrap();
    let (leaf, _) = proof.verify(&VerifierKey::parse(&key).unwrap()).unwrap();
    (leaf.to_vec(), proof)
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_of_every_room_are_one_entry_at_one_index() {
    let (db, daemon, client) = start().await;
    let second = Launch::beside(&daemon, db.url()).start().await;
    let there = client.also_of(&second);
    topic(&client, "t").await;
    let token = token(&client, 4).await;
    let old = client.put("tx/old", "v").await.unwrap();
    // The second daemon knows the token, and the key, from before.
    assert_eq!(
        there.json(Method::POST, "/v1/token/operations/use", &used(&token, "deploy")["token:operation-use"]).await.0,
        200
    );
    there.put("tx/seen", "v").await.unwrap();
    let (_, lease) = post(&client, "/v1/state/leases", &json!({"ttl": 600})).await;
    let watch = there.request(Method::GET, "/v1/state/watch?prefix=tx/").await.send().await.unwrap();
    let watch = tokio::spawn(events(watch, |e| e.iter().filter(|e| e.0 != "bookmark").count() >= 4));
    let (a, b) = (there.clone_at_self(), there.clone_at_self());
    let pulled = tokio::spawn(async move { pull(&a, "t", 10.0).await });
    let services = b.request(Method::GET, "/v1/nexus/services/arp/watch").await.send().await.unwrap();
    let services = tokio::spawn(events(services, |e| e.iter().any(|e| e.0 == "register")));
    let operations = json!([
        put("tx/a"),
        {"state:put": {"key": "tx/b", "value": "AP8=", "content_type": "x/y", "lease": lease["id"]}},
        {"state:delete": {"key": "tx/old", "if_match": [1, old]}},
        {"state:put": {"key": "tx/seen", "json": 2, "if_match": "*"}},
        publish("t", "1"), publish("t", "2"), publish("t", "1"),
        used(&token, "deploy"), used(&token, "deploy"),
        {"audit:event": {"event": event("first")}}, {"audit:event": {"event": event("second")}},
        register("arp", "i"),
    ]);
    let request = client.request(Method::POST, "/v1/tx").await.json(&json!({"operations": operations}));
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let header: i64 = answer.headers()["sop-index"].to_str().unwrap().parse().unwrap();
    let done: Value = answer.json().await.unwrap();
    let (index, results) = (done["index"].as_i64().unwrap(), &done["results"]);
    assert_eq!(header, index);
    assert_eq!(results[0], json!({"key": "tx/a", "index": index, "created_index": index, "version": 1, "lease": null}));
    assert_eq!((&results[1]["lease"], &results[2]["previous_index"]), (&lease["id"], &json!(old)), "{done}");
    assert_eq!(results[3]["version"], 2);
    let placed = |i: usize| (results[i]["index"].as_i64(), results[i]["position"].as_i64(), &results[i]["duplicate"]);
    assert_eq!(placed(4), (Some(index), Some(0), &Value::Null));
    assert_eq!(placed(5), (Some(index), Some(1), &Value::Null));
    assert_eq!(placed(6), (Some(index), Some(0), &json!(true)), "the third sees the first");
    assert_eq!((&results[7]["uses"], &results[8]["uses"], &results[8]["remaining"]), (&json!(2), &json!(3), &json!(1)));
    assert_eq!(results[9], json!({"index": index, "position": 0, "id": "first"}));
    assert_eq!((&results[10]["position"], &results[11]["status"]), (&json!(1), &json!("passing")));

    // Whoever follows, on another daemon, sees all of it at that index.
    let seen = watch.await.unwrap();
    let seen: Vec<_> = seen.iter().filter(|e| e.0 != "bookmark").collect();
    let told: Vec<String> = seen.iter().map(|e| format!("{} {}", e.0, e.2["key"].as_str().unwrap())).collect();
    assert_eq!(told, ["put tx/a", "put tx/b", "delete tx/old", "put tx/seen"]);
    assert!(seen.iter().all(|e| e.2["index"] == index) && seen[3].1 == Some(index));
    let messages = pulled.await.unwrap();
    let got: Vec<_> =
        messages.iter().map(|m| (m["index"].as_i64().unwrap(), m["event"]["id"].as_str().unwrap())).collect();
    assert_eq!(got, [(index, "1"), (index, "2")]);
    let (_, at, instance) = services.await.unwrap().into_iter().find(|e| e.0 == "register").unwrap();
    assert_eq!((at, instance["id"].as_str(), instance["ttl"].as_f64()), (Some(index), Some("i"), Some(60.5)));
    assert_eq!(
        there.json(Method::POST, "/v1/token/operations/use", &used(&token, "deploy")["token:operation-use"]).await.1["uses"],
        4
    );
    let put = there.request(Method::PUT, "/v1/state/kv/tx/seen").await.header("if-match", format!("\"{index}\""));
    assert_eq!(
        put.body("v").send().await.unwrap().status(),
        200,
        "what the writer knew of the key is not what it knows now"
    );

    // One entry, one receipt, and one for each event in it.
    let (leaf, proof) = receipt(&client, index).await;
    let (_, entry) = client.get(&format!("/v1/audit/entries/{index}")).await;
    assert_eq!((entry["leaf"].as_str(), i64::try_from(proof.index).unwrap()), (Some(base64(leaf).as_str()), index));
    assert_eq!((&entry["action"], &entry["details"]["resource"]), (&json!("ledger:tx"), &json!(format!("tx/{index}"))));
    let list = entry["details"]["change"]["operations"].as_array().unwrap();
    let named: Vec<_> =
        list.iter().map(|o| format!("{} {}", o["action"].as_str().unwrap(), o["resource"].as_str().unwrap())).collect();
    let operation = format!("token:operation-use operation/{}", token["id"].as_str().unwrap());
    assert_eq!(
        &named[..5],
        [
            "state:put key/tx/a",
            "state:put key/tx/b",
            "state:delete key/tx/old",
            "state:put key/tx/seen",
            "nexus:publish topic/t"
        ]
    );
    assert_eq!((&named[8], &named[9]), (&operation, &"audit:event event//tx".to_owned()));
    assert_eq!(
        (&list[0]["change"]["version"], &list[8]["change"]["use"], &entry["details"]["records"]),
        (&json!(1), &json!(3), &json!(2))
    );
    for (position, id) in [(0, "first"), (1, "second")] {
        let record = proven(&client, index, position).await;
        assert!(record["event"].as_str().unwrap().contains(&format!("\"id\":\"{id}\"")), "{record}");
    }
    let (fine, said) = daemon.launch.run(&["verify", "--json"]).await;
    assert!(fine, "{said}");
    assert_eq!((metric_of(&client, "state:put").await, metric_of(&client, "token:operation-use").await), (3.0, 2.0));
    record::check(&db).await;
}

pub async fn metric_of(client: &Client, verb: &str) -> f64 {
    metric(client, &format!("sop_ledger_tx_operations_total{{verb=\"{verb}\"}}")).await
}

const EYES: &str = r#"
@id("pay") @approvals("1")
forbid (principal, action == Sop::Action::"nexus:publish", resource == Sop::Topic::"pay")
unless { context has approved && context.approved };"#;

async fn sent(client: &Client, header: (&str, &str), operations: &Value) -> (u16, Value) {
    let request = client.request(Method::POST, "/v1/tx").await.header(header.0, header.1);
    let answer = request.json(&json!({"operations": operations})).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn retries_fencing_and_four_eyes_are_as_for_any_change() {
    let (db, _daemon, client) = start().await;
    topic(&client, "t").await;
    topic(&client, "pay").await;
    let token = token(&client, 10).await;
    // Once, however often it is sent; what was refused stays refused.
    let work = json!([put("i/a"), used(&token, "deploy"), publish("t", "i")]);
    let first = sent(&client, ("idempotency-key", "k1"), &work).await;
    assert_eq!(first.0, 200, "{}", first.1);
    assert_eq!(sent(&client, ("idempotency-key", "k1"), &work).await, first);
    assert_eq!((uses(&client, &token).await, pull(&client, "t", 0.0).await.len()), (1, 1));
    assert_eq!(metric_of(&client, "nexus:publish").await, 1.0, "a repeat is not counted");
    assert_eq!(sent(&client, ("idempotency-key", "k1"), &json!([put("i/b")])).await.0, 422);
    let late = json!([used(&token, "deploy"), {"state:put": {"key": "i/late", "json": 1, "if_match": "*"}}]);
    let refused = sent(&client, ("idempotency-key", "k2"), &late).await;
    assert_eq!((refused.0, &refused.1["errors"][0]["pointer"]), (412, &json!("/operations/1")));
    client.put("i/late", "v").await.unwrap();
    let again = sent(&client, ("idempotency-key", "k2"), &late).await;
    assert_eq!((again.0, &again.1["errors"]), (412, &refused.1["errors"]));
    // A lock that is not held.
    let (_, held) = post(&client, "/v1/state/locks/l", &json!({"ttl": 60})).await;
    let fence = |n: i64| format!("l={}", held["fencing_token"].as_i64().unwrap() + n);
    let fenced = json!([put("f/a"), used(&token, "deploy")]);
    assert_eq!(sent(&client, ("if-fencing-token", &fence(-1)), &fenced).await.0, 412);
    assert_eq!((client.get("/v1/state/kv/f/a").await.0, uses(&client, &token).await), (404, 1));
    assert_eq!(sent(&client, ("if-fencing-token", &fence(0)), &fenced).await.0, 200);
    // One of them needs others: all of it waits, and is made once they have said yes.
    let other = registered(&client, "admin").await;
    activate(&client, &other, EYES, None).await;
    let work = json!([put("p/a"), publish("pay", "p"), used(&token, "deploy")]);
    let (status, said) = tx(&client, &work).await;
    assert_eq!((status, said["type"].as_str()), (409, Some("/problems/not-approved")), "{said}");
    let (status, proposal) = sent(&client, ("sop-propose", "payday"), &work).await;
    assert_eq!((status, &proposal["kind"]), (202, &json!("request")), "{proposal}");
    let id = proposal["id"].as_str().unwrap();
    let approved = ("sop-proposal", id);
    assert_eq!(sent(&client, approved, &work).await.0, 409, "nobody has yet");
    assert_eq!(
        post(&other, &format!("/v1/governance/proposals/{id}/approve"), &json!({"reason": "fine"})).await.0,
        200
    );
    assert_eq!(sent(&client, approved, &json!([put("p/b"), publish("pay", "p")])).await.0, 409, "something else");
    assert_eq!(client.get("/v1/state/kv?prefix=p/").await.1["items"], json!([]));
    let (status, done) = sent(&client, approved, &work).await;
    assert_eq!(status, 200, "{done}");
    let (_, entry) = client.get(&format!("/v1/audit/entries/{}", done["index"])).await;
    assert_eq!(entry["details"]["change"]["proposal"], id, "{entry}");
    assert_eq!(sent(&client, approved, &work).await.0, 409, "once");
    assert_eq!((pull(&client, "pay", 0.0).await.len(), uses(&client, &token).await), (1, 3));
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_for_a_service_is_used_by_whoever_is_it() {
    let (db, _daemon, client) = start().await;
    let (arp, other) = (
        registered(&client, "state nexus token:operation-use").await,
        registered(&client, "state nexus token:operation-use").await,
    );
    let (status, done) = tx(&arp, &json!([register("arp", "i")])).await;
    assert_eq!(status, 200, "{done}");
    let wanted = json!({"kind": "test", "operation": "deploy", "audience": "arp", "max_uses": 5});
    let (_, token) = post(&client, "/v1/token/operations", &wanted).await;
    let (status, done) = tx(&arp, &json!([put("s/a"), used(&token, "deploy")])).await;
    assert_eq!((status, &done["results"][1]["uses"]), (200, &json!(1)), "{done}");
    let (_, entry) = client.get(&format!("/v1/audit/entries/{}", done["index"])).await;
    assert_eq!(entry["details"]["change"]["operations"][1]["change"]["as"], "arp");
    let (status, said) = tx(&other, &json!([put("s/b"), used(&token, "deploy")])).await;
    assert_eq!((status, &said["errors"][0]["pointer"]), (403, &json!("/operations/1")), "{said}");
    assert_eq!((client.get("/v1/state/kv/s/b").await.0, uses(&client, &token).await), (404, 1));
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_leaves_all_of_a_transaction_or_nothing() {
    let (db, mut daemon, client) = start().await;
    topic(&client, "t").await;
    let token = token(&client, 1_000_000).await;
    let (tell, url) = tokio::sync::watch::channel(Some(daemon.url.clone()));
    let (count, mut acknowledged) = tokio::sync::watch::channel(0);
    let writers: Vec<_> = (0..8)
        .map(|w| {
            let (client, token, url, count) = (client.clone_at_self(), token.clone(), url.clone(), count.clone());
            tokio::spawn(async move {
                let mut made = Vec::new();
                for n in 0.. {
                    let Some(at) = url.borrow().clone() else { break };
                    let name = format!("{w}-{n}");
                    let body = json!({"operations": [
                        put(&format!("c/a/{name}")), publish("t", &name), used(&token, "deploy"), put(&format!("c/b/{name}")),
                        {"audit:event": {"event": event(&name)}},
                    ]});
                    let request = client.clone_at(&at).request(Method::POST, "/v1/tx").await.json(&body);
                    match request.send().await {
                        Ok(answer) if answer.status() == 200 => {
                            let done: Value = answer.json().await.unwrap();
                            made.push((name, done["index"].as_i64().unwrap()));
                            count.send_modify(|c| *c += 1);
                        }
                        _ => tokio::time::sleep(Duration::from_millis(5)).await,
                    }
                }
                made
            })
        })
        .collect();
    for _ in 0..4 {
        let now = *acknowledged.borrow();
        let more = acknowledged.wait_for(|c| *c >= now + 40);
        soon("writers go on", more).await.unwrap();
        daemon = daemon.restart().await;
        tell.send_replace(Some(daemon.url.clone()));
    }
    tell.send_replace(None);
    let made: Vec<_> = join_all(writers).await.into_iter().flat_map(Result::unwrap).collect();
    let mut conn = db.connect().await;
    let column = "SELECT convert_from(substr(key, 5), 'UTF8') || ' ' || index FROM state.kv WHERE key >= $1 AND key < $2 ORDER BY 1";
    let mut all: Vec<Vec<String>> = Vec::new();
    for prefix in ["c/a/", "c/b/"] {
        let end = prefix.replace("/a/", "/a0").replace("/b/", "/b0");
        all.push(
            sqlx::query_scalar(column).bind(prefix.as_bytes()).bind(end.as_bytes()).fetch_all(&mut conn).await.unwrap(),
        );
    }
    let column = "SELECT convert_from(event, 'UTF8')::jsonb ->> 'id' || ' ' || index FROM nexus.messages ORDER BY 1";
    all.push(sqlx::query_scalar(column).fetch_all(&mut conn).await.unwrap());
    all.iter_mut().for_each(|names| names.sort());
    assert!(all[0] == all[1] && all[1] == all[2], "some of a transaction is missing: {all:?}");
    let lost: Vec<_> = made.iter().filter(|(n, i)| all[0].binary_search(&format!("{n} {i}")).is_err()).collect();
    assert!(made.len() >= 160 && lost.is_empty(), "{} made, lost {lost:?}", made.len());
    let kept: i64 = sqlx::query_scalar("SELECT count(*) FROM audit.segments").fetch_one(&mut conn).await.unwrap();
    let many = i64::try_from(all[0].len()).unwrap();
    assert_eq!((kept, uses(&client.clone_at(&daemon.url), &token).await), (many, many));
    record::check_on(&mut conn).await;
}
