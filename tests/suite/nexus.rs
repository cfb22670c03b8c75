//! Services that live and die, messages that are delivered until they are acknowledged.

use std::collections::HashSet;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join_all;
use reqwest::Method;
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

/// Reads server-sent events until one of that name; its data.
async fn event(answer: reqwest::Response, name: &str) -> Value {
    let mut stream = answer.bytes_stream();
    let mut text = String::new();
    let wait = async {
        while let Some(part) = stream.next().await {
            text.push_str(std::str::from_utf8(&part.unwrap()).unwrap());
            for block in text.split("\n\n") {
                if block.lines().any(|l| l == format!("event: {name}"))
                    && let Some(data) = block.lines().find_map(|l| l.strip_prefix("data: "))
                {
                    return serde_json::from_str(data).unwrap();
                }
            }
        }
        panic!("the stream ended: {text}")
    };
    soon(name, wait).await
}

async fn publish(client: &Client, topic: &str, id: &str, data: &Value) -> (u16, Value) {
    let body = json!({"specversion": "1.0", "id": id, "source": "/test", "type": "t", "data": data});
    let request = client.request(Method::POST, &format!("/v1/nexus/topics/{topic}/messages")).await;
    let answer =
        request.header("content-type", "application/cloudevents+json").body(body.to_string()).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

async fn pull(client: &Client, path: &str, max: i64, wait: f64) -> Vec<Value> {
    let (status, answer) = client.json(Method::POST, &format!("{path}/pull"), &json!({"max": max, "wait": wait})).await;
    assert_eq!(status, 200, "{answer}");
    answer["messages"].as_array().unwrap().clone()
}

async fn say(client: &Client, path: &str, word: &str, ids: &[&Value]) -> Value {
    let (status, answer) = client.json(Method::POST, &format!("{path}/{word}"), &json!({"ids": ids})).await;
    assert_eq!(status, 200, "{answer}");
    answer
}

async fn group(client: &Client, body: &Value) -> String {
    let (status, _) = client.json(Method::PUT, "/v1/nexus/topics/t", &json!({"retention": 3600})).await;
    assert!(status == 201 || status == 200);
    let path = "/v1/nexus/topics/t/groups/g";
    let (status, made) = client.json(Method::PUT, path, body).await;
    assert_eq!(status, 201, "{made}");
    path.to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_lives_as_long_as_it_beats() {
    let (db, _daemon, client) = start().await;
    let path = "/v1/nexus/services/arp/instances/1";
    let body = json!({"address": "http://127.0.0.1:1", "ttl": 1.5, "meta": {"zone": "a"}});
    let (status, made) = client.json(Method::PUT, path, &body).await;
    assert_eq!((status, made["status"].as_str(), made["weight"].as_i64()), (201, Some("passing"), Some(1)), "{made}");
    let (status, again) = client.json(Method::PUT, path, &body).await;
    assert_eq!((status, &again["created_index"]), (200, &made["index"]));
    let watch = client.request(Method::GET, "/v1/nexus/services/arp/watch?after=0").await.send().await.unwrap();
    // It outlives its time by heartbeats.
    let began = tokio::time::Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        let (status, beat) = client.json(Method::POST, &format!("{path}/heartbeat"), &json!({})).await;
        assert_eq!((status, beat["ttl"].as_f64()), (200, Some(1.5)), "{beat}");
    }
    let (_, seen) = client.get("/v1/nexus/services/arp?healthy=true").await;
    assert_eq!(seen["instances"][0]["meta"]["zone"], "a");
    let (_, list) = client.get("/v1/nexus/services").await;
    assert_eq!(list["items"], json!([{"name": "arp", "instances": 1, "passing": 1}]));
    // Then it falls silent.
    let gone = event(watch, "expire").await;
    assert_eq!((&gone["id"], &gone["status"]), (&json!("1"), &json!("critical")));
    let (status, _) = client.json(Method::POST, &format!("{path}/heartbeat"), &json!({})).await;
    assert_eq!(status, 404, "it must register anew");
    assert_eq!(client.get("/v1/nexus/services/arp").await.0, 404);
    let (_, page) = client.get("/v1/audit/entries?action=nexus:expire").await;
    assert_eq!(page["items"][0]["resource"], "instance/arp/1");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_share_entries_and_each_is_answered() {
    let (db, _daemon, client) = start().await;
    for n in 0..20 {
        let body = json!({"address": "x", "ttl": 60});
        let path = format!("/v1/nexus/services/s/instances/{n}");
        assert_eq!(client.json(Method::PUT, &path, &body).await.0, 201);
    }
    let beat = |n: usize| {
        let client = &client;
        async move {
            let path = format!("/v1/nexus/services/s/instances/{n}/heartbeat");
            let answer = client.request(Method::POST, &path).await.json(&json!({})).send().await.unwrap();
            (answer.status().as_u16(), answer.headers()["sop-index"].to_str().unwrap().to_owned())
        }
    };
    let all = join_all((0..21).map(beat)).await;
    let (fine, absent): (Vec<_>, Vec<_>) = all.iter().partition(|(status, _)| *status == 200);
    assert_eq!((fine.len(), absent.len(), absent[0].0), (20, 1, 404));
    let entries: HashSet<&String> = fine.iter().map(|(_, index)| index).collect();
    assert!(entries.len() <= 4, "{entries:?}");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_is_noticed_though_the_daemon_that_looked_is_killed() {
    let db = database().await;
    let mut one = Launch::on(db.url()).start().await;
    let a = Client::of(&one);
    let body = json!({"address": "x", "ttl": 2});
    assert_eq!(a.json(Method::PUT, "/v1/nexus/services/s/instances/1", &body).await.0, 201);
    let claimed = || async {
        let held: Option<String> = sqlx::query_scalar("SELECT holder FROM ledger.claims WHERE name = 'nexus/expiry'")
            .fetch_optional(&mut db.connect().await)
            .await
            .unwrap();
        held
    };
    until("the first to look", || async { claimed().await.is_some() }).await;
    let first = claimed().await;
    let two = Launch::beside(&one, db.url()).start().await;
    let b = a.also_of(&two);
    b.token().await;
    one.kill().await;
    let watch = b.request(Method::GET, "/v1/nexus/services/s/watch?after=0").await.send().await.unwrap();
    event(watch, "expire").await;
    assert_ne!(claimed().await, first, "another looks now");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_stood_still_has_watched_nobody_fall_silent() {
    let (db, daemon, client) = start().await;
    let path = "/v1/nexus/services/s/instances/1";
    assert_eq!(client.json(Method::PUT, path, &json!({"address": "x", "ttl": 2})).await.0, 201);
    let held = || async {
        let n: i64 = sqlx::query_scalar("SELECT count(*) FROM ledger.claims WHERE name = 'nexus/expiry'")
            .fetch_one(&mut db.connect().await)
            .await
            .unwrap();
        n == 1
    };
    until("it to look", held).await;
    daemon.freeze();
    tokio::time::sleep(Duration::from_secs(4)).await;
    daemon.thaw();
    // Nobody could give a sign of life while the only daemon slept: a full time is granted anew.
    tokio::time::sleep(Duration::from_millis(700)).await;
    let (status, answer) = client.json(Method::POST, &format!("{path}/heartbeat"), &json!({})).await;
    assert_eq!(status, 200, "{answer}");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_is_delivered_until_it_is_acknowledged() {
    let (db, _daemon, client) = start().await;
    let path = group(&client, &json!({"ack_wait": 0.5, "backoff": 0.3, "max_attempts": 3})).await;
    let (status, first) = publish(&client, "t", "1", &json!({"n": 1})).await;
    assert_eq!(status, 201, "{first}");
    let (status, again) = publish(&client, "t", "1", &json!({"n": 2})).await;
    assert_eq!((status, &again["id"], &again["index"]), (200, &first["id"], &first["index"]), "known by source and id");
    let got = pull(&client, &path, 10, 0.0).await;
    assert_eq!((got.len(), &got[0]["id"], &got[0]["attempt"]), (1, &first["id"], &json!(1)));
    assert_eq!(got[0]["event"]["data"]["n"], 1);
    assert!(pull(&client, &path, 10, 0.0).await.is_empty(), "it is with somebody");
    // Not acknowledged in time: again. Refused: again, after the backoff.
    let got = pull(&client, &path, 10, 5.0).await;
    assert_eq!((got.len(), &got[0]["attempt"]), (1, &json!(2)));
    assert_eq!(say(&client, &path, "nack", &[&got[0]["id"]]).await["nacked"], json!([first["id"]]));
    assert!(pull(&client, &path, 10, 0.0).await.is_empty(), "it waits");
    let got = pull(&client, &path, 10, 5.0).await;
    assert_eq!(got[0]["attempt"], 3);
    assert_eq!(say(&client, &path, "extend", &[&got[0]["id"]]).await["extended"], json!([first["id"]]));
    assert_eq!(say(&client, &path, "ack", &[&got[0]["id"]]).await["acked"], json!([first["id"]]));
    assert_eq!(say(&client, &path, "ack", &[&got[0]["id"]]).await["acked"], json!([]), "it is nobody's any more");
    let head = client.get("/v1/audit/entries?limit=1").await.1["items"][0]["index"].clone();
    assert!(pull(&client, &path, 10, 0.7).await.is_empty());
    let (_, pulls) = client.get("/v1/audit/entries?action=nexus:pull&limit=1").await;
    assert!(pulls["items"][0]["index"].as_i64() < head.as_i64(), "a pull that gives nothing is not in the record");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_nobody_can_take_goes_to_the_dead_letters() {
    let (db, _daemon, client) = start().await;
    assert_eq!(client.json(Method::PUT, "/v1/nexus/topics/dead", &json!({"retention": 60})).await.0, 201);
    let path = group(&client, &json!({"ack_wait": 0.1, "backoff": 0, "max_attempts": 2, "dead_letter": "dead"})).await;
    let dead = "/v1/nexus/topics/dead/groups/d";
    assert_eq!(client.json(Method::PUT, dead, &json!({})).await.0, 201);
    publish(&client, "t", "1", &json!("poison")).await;
    for attempt in [1, 2] {
        assert_eq!(pull(&client, &path, 1, 5.0).await[0]["attempt"], attempt);
    }
    assert!(pull(&client, &path, 1, 0.5).await.is_empty(), "out of attempts");
    let got = pull(&client, dead, 1, 5.0).await;
    assert_eq!(got[0]["event"]["data"], "poison");
    let (_, shown) = client.get(&path).await;
    assert_eq!((&shown["outstanding"], &shown["dead"]), (&json!(0), &json!(0)));
    // Without a topic for them they stay, and are counted.
    let (status, _) = client.json(Method::PUT, &path, &json!({"ack_wait": 0.1, "max_attempts": 1})).await;
    assert_eq!(status, 200);
    publish(&client, "t", "2", &json!("poison")).await;
    assert_eq!(pull(&client, &path, 1, 5.0).await.len(), 1);
    assert!(pull(&client, &path, 1, 0.5).await.is_empty());
    assert_eq!(client.get(&path).await.1["dead"], 1);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn consumers_on_two_daemons_share_a_group_and_a_killed_daemon_loses_nothing() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let mut two = Launch::beside(&one, db.url()).start().await;
    let a = Client::of(&one);
    let path = group(&a, &json!({"ack_wait": 2, "max_attempts": 100})).await;
    a.token().await;
    let publishing = join_all((0..300).map(|n| {
        let a = &a;
        async move { assert_eq!(publish(a, "t", &n.to_string(), &json!(n)).await.0, 201) }
    }));
    let consume = |client: Client| {
        let path = path.clone();
        tokio::spawn(async move {
            let mut mine = Vec::new();
            loop {
                let body = json!({"max": 7, "wait": 3});
                let request = client.request(Method::POST, &format!("{path}/pull")).await.json(&body).send().await;
                let Ok(answer) = request else { return mine };
                let Ok(answer) = answer.json::<Value>().await else { return mine };
                let Some(got) = answer["messages"].as_array().filter(|m| !m.is_empty()) else { return mine };
                let ids: Vec<&Value> = got.iter().map(|m| &m["id"]).collect();
                let request = client.request(Method::POST, &format!("{path}/ack")).await.json(&json!({"ids": ids}));
                let Ok(answer) = request.send().await else { return mine };
                let Ok(answer) = answer.json::<Value>().await else { return mine };
                for id in answer["acked"].as_array().into_iter().flatten() {
                    let message = got.iter().find(|m| m["id"] == *id).unwrap();
                    mine.push(message["event"]["data"].as_i64().unwrap());
                }
            }
        })
    };
    let consumers: Vec<_> =
        (0..4).map(|i| consume(if i % 2 == 0 { a.clone_at_self() } else { a.clone_at(&two.url) })).collect();
    publishing.await;
    two.kill().await;
    let mut acked = Vec::new();
    for consumer in consumers {
        acked.extend(consumer.await.unwrap());
    }
    // What was with the killed daemon's consumers, or acknowledged without their hearing of it.
    let left: i64 =
        sqlx::query_scalar("SELECT count(*) FROM nexus.deliveries").fetch_one(&mut db.connect().await).await.unwrap();
    let unique: HashSet<i64> = acked.iter().copied().collect();
    assert_eq!(unique.len(), acked.len(), "nothing was acknowledged twice");
    let (_, shown) = a.get(&path).await;
    assert_eq!(shown["outstanding"].as_i64(), Some(left));
    let mut rest = 0;
    while left > rest {
        let got = pull(&a, &path, 100, 5.0).await;
        assert!(!got.is_empty(), "{left} were left, {rest} came");
        rest += got.len() as i64;
        say(&a, &path, "ack", &got.iter().map(|m| &m["id"]).collect::<Vec<_>>()).await;
    }
    assert!(pull(&a, &path, 100, 0.0).await.is_empty());
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_one_entry_and_a_delay_is_kept() {
    let (db, _daemon, client) = start().await;
    let path = group(&client, &json!({})).await;
    let one = |id: &str| json!({"specversion": "1.0", "id": id, "source": "/b", "type": "t"});
    let request = client.request(Method::POST, "/v1/nexus/topics/t/messages").await;
    let body = json!([one("1"), one("2"), one("1")]).to_string();
    let answer = request.header("content-type", "application/cloudevents-batch+json").body(body).send().await.unwrap();
    assert_eq!(answer.status(), 201);
    let answer: Value = answer.json().await.unwrap();
    let items = answer["items"].as_array().unwrap();
    assert!(items.iter().all(|i| i["index"] == items[0]["index"]));
    assert_eq!((&items[1]["position"], &items[2]["id"]), (&json!(1), &items[0]["id"]));
    assert_eq!(pull(&client, &path, 10, 0.0).await.len(), 2);
    // Binary mode, delayed.
    let began = tokio::time::Instant::now();
    let request = client.request(Method::POST, "/v1/nexus/topics/t/messages").await;
    let headers =
        [("ce-specversion", "1.0"), ("ce-id", "9"), ("ce-source", "/b"), ("ce-type", "t"), ("nexus-delay", "0.6")];
    let request = headers.iter().fold(request, |r, (name, value)| r.header(*name, *value));
    let answer = request.header("content-type", "text/plain").body("late").send().await.unwrap();
    assert_eq!(answer.status(), 201);
    let got = pull(&client, &path, 10, 10.0).await;
    assert!(began.elapsed() >= Duration::from_millis(590), "{:?}", began.elapsed());
    assert_eq!((&got[0]["event"]["data_base64"], &got[0]["attempt"]), (&json!("bGF0ZQ=="), &json!(1)));
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_past_their_retention_are_dropped_with_an_entry() {
    let db = database().await;
    let daemon = Launch::on(db.url()).env("SOP__NEXUS__RETENTION_INTERVAL", "200ms").start().await;
    let client = Client::of(&daemon);
    assert_eq!(client.json(Method::PUT, "/v1/nexus/topics/t", &json!({"retention": 1})).await.0, 201);
    let (_, first) = publish(&client, "t", "1", &json!(1)).await;
    until("it to be dropped", || async {
        let n: i64 =
            sqlx::query_scalar("SELECT count(*) FROM nexus.messages").fetch_one(&mut db.connect().await).await.unwrap();
        n == 0
    })
    .await;
    let (_, page) = client.get("/v1/audit/entries?action=nexus:retire").await;
    assert_eq!(page["items"][0]["details"]["change"]["up_to_index"], first["index"]);
    // Its source and id are free again.
    assert_eq!(publish(&client, "t", "1", &json!(1)).await.0, 201);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused() {
    let (db, _daemon, client) = start().await;
    let path = group(&client, &json!({})).await;
    let instance = "/v1/nexus/services/s/instances/1";
    for (method, path, body, status, pointer) in [
        (Method::PUT, instance, json!({"address": "x"}), 400, ""),
        (Method::PUT, instance, json!({"address": "x", "ttl": "2s"}), 400, "/ttl"),
        (Method::PUT, instance, json!({"address": "x", "ttl": 0.1}), 400, "/ttl"),
        (Method::PUT, instance, json!({"address": "", "ttl": 1}), 400, "/address"),
        (Method::PUT, instance, json!({"address": "x", "ttl": 1, "weight": 1001}), 400, "/weight"),
        (Method::PUT, instance, json!({"address": "x", "ttl": 1, "other": 1}), 400, "/other"),
        (Method::PUT, "/v1/nexus/services/a%20b/instances/1", json!({"address": "x", "ttl": 1}), 400, ""),
        (Method::PUT, "/v1/nexus/topics/u", json!({"retention": 0}), 400, "/retention"),
        (Method::PUT, "/v1/nexus/topics/u/groups/g", json!({}), 404, ""),
        (Method::PUT, "/v1/nexus/topics/t/groups/h", json!({"max_attempts": 0}), 400, "/max_attempts"),
        (Method::PUT, "/v1/nexus/topics/t/groups/h", json!({"dead_letter": "t"}), 400, "/dead_letter"),
        (Method::PUT, "/v1/nexus/topics/t/groups/h", json!({"dead_letter": "none"}), 404, ""),
        (Method::POST, "/v1/nexus/topics/t/groups/none/pull", json!({}), 404, ""),
        (Method::POST, &format!("{path}/pull"), json!({"max": 1001}), 400, "/max"),
        (Method::POST, &format!("{path}/pull"), json!({"wait": 61}), 400, "/wait"),
        (Method::POST, &format!("{path}/ack"), json!({"ids": []}), 400, "/ids"),
        (Method::POST, &format!("{path}/ack"), json!({"ids": ["x"]}), 400, "/ids/0"),
        (Method::DELETE, "/v1/nexus/topics/u", json!({}), 404, ""),
    ] {
        let (got, answer) = client.json(method.clone(), path, &body).await;
        assert_eq!(got, status, "{method} {path} {body}: {answer}");
        if !pointer.is_empty() {
            assert_eq!(answer["errors"][0]["pointer"], pointer, "{path} {body}: {answer}");
        }
    }
    assert_eq!(publish(&client, "none", "1", &json!(1)).await.0, 404);
    let made =
        client.json(Method::POST, "/oauth2/register", &json!({"client_name": "r", "scope": "nexus:read"})).await.1;
    let reader = client.with(made["client_id"].as_str().unwrap(), made["client_secret"].as_str().unwrap());
    assert_eq!(reader.get(&path).await.0, 200);
    assert_eq!(publish(&reader, "t", "1", &json!(1)).await.0, 403);
    assert_eq!(reader.json(Method::POST, &format!("{path}/pull"), &json!({})).await.0, 403);
    assert_eq!(client.json(Method::DELETE, "/v1/nexus/topics/t", &json!({})).await.0, 200);
    assert_eq!(publish(&client, "t", "1", &json!(1)).await.0, 404, "it is forgotten with the topic");
    assert_eq!(client.get(&path).await.0, 404);
    record::check(&db).await;
}
