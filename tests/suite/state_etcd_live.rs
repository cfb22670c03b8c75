//! etcd's JSON gateway: leases and watches, which live on between requests.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;

use reqwest::{Method, Response};
use serde_json::{Value, json};
use sop::kernel::crypto::base64 as b64;

use crate::policy;
use crate::state_etcd::{etcd, keys, put, raw, refused, revision, start, v3};
use crate::support::client::Client;
use crate::support::{record, soon, until};

#[tokio::test(flavor = "multi_thread")]
async fn leases_have_numbers_and_are_the_rooms_own() {
    let (db, _daemon, client) = start().await;
    let granted = v3(&client, "/v3/lease/grant", json!({"TTL": "30", "ID": "0"})).await;
    let id = granted["ID"].clone();
    assert!(id.as_str().unwrap().parse::<i64>().unwrap() > 0);
    v3(&client, "/v3/lease/grant", json!({"TTL": 5, "ID": 77})).await;
    let taken = etcd(412, 9, "lease already exists");
    assert_eq!(refused(&client, "/v3/lease/grant", json!({"TTL": 5, "ID": "77"})).await, taken);
    assert_eq!(refused(&client, "/v3/lease/grant", json!({"TTL": 5, "ID": id})).await, taken, "whoever chose it");
    assert_eq!(v3(&client, "/v3/lease/grant", json!({"TTL": -1})).await["TTL"], "1", "the shortest there is");
    // One of the room's has a number, and one with a number is of the room's.
    let (_, ours) = client.json(Method::POST, "/v1/state/leases", &json!({"ttl": 50})).await;
    let numbers = v3(&client, "/v3/kv/lease/leases", json!({})).await["leases"].clone();
    let (_, all) = client.get("/v1/state/leases").await;
    assert_eq!(all["items"].as_array().unwrap().len(), numbers.as_array().unwrap().len());
    let path = format!("/v1/state/kv/l/ours?lease={}", ours["id"].as_str().unwrap());
    client.request(Method::PUT, &path).await.body("v").send().await.unwrap().error_for_status().unwrap();
    let number = v3(&client, "/v3/kv/range", json!({"key": b64("l/ours")})).await["kvs"][0]["lease"].clone();
    assert!(numbers.as_array().unwrap().contains(&json!({"ID": number})));
    let alive = v3(&client, "/v3/lease/timetolive", json!({"ID": number, "keys": true})).await;
    assert_eq!((&alive["grantedTTL"], &alive["keys"]), (&json!("50"), &json!([b64("l/ours")])));
    assert!((48..=50).contains(&alive["TTL"].as_str().unwrap().parse::<i64>().unwrap()), "{alive}");
    let gone = v3(&client, "/v3/kv/lease/timetolive", json!({"ID": "123"})).await;
    assert_eq!((&gone["ID"], &gone["TTL"], gone.get("grantedTTL")), (&json!("123"), &json!("-1"), None));
    // Several at once are answered one a line.
    let token = client.token().await;
    let kept = client.bare(Method::POST, "/v3/lease/keepalive").header("authorization", token);
    let kept = kept.body("{\"ID\": \"77\"}\n{\"ID\": 123}").send().await.unwrap().text().await.unwrap();
    let lines: Vec<Value> = kept.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["result"].clone()).collect();
    assert_eq!((&lines[0]["ID"], &lines[0]["TTL"]), (&json!("77"), &json!("5")));
    assert_eq!((&lines[1]["ID"], lines[1].get("TTL")), (&json!("123"), None));
    // Keys go with it, at one revision; history still says what they hung on.
    let put = v3(&client, "/v3/kv/put", json!({"key": b64("l/77"), "value": b64("v"), "lease": "77"})).await;
    let ended = v3(&client, "/v3/kv/lease/revoke", json!({"ID": 77})).await;
    assert_eq!(keys(&client, json!({"key": b64("l/"), "range_end": b64("l0")})).await, ["l/ours"]);
    assert!(revision(&ended) > revision(&put));
    let past = v3(&client, "/v3/kv/range", json!({"key": b64("l/77"), "revision": revision(&put)})).await;
    assert_eq!(past["kvs"][0]["lease"], "77");
    v3(&client, "/v3/lease/grant", json!({"TTL": 5, "ID": 77})).await;
    // A lease is its own client's.
    let other = policy::client(&client, "state").await;
    let none = etcd(404, 5, "requested lease not found");
    assert_eq!(refused(&other, "/v3/kv/put", json!({"key": b64("l/o"), "lease": "77"})).await, none);
    assert_eq!(v3(&other, "/v3/lease/keepalive", json!({"ID": "77"})).await["result"].get("TTL"), None);
    assert_eq!(refused(&other, "/v3/lease/revoke", json!({"ID": "77"})).await, etcd(403, 7, "permission denied"));
    // Who does not keep it alive loses it.
    v3(&client, "/v3/kv/put", json!({"key": b64("l/77"), "lease": "77"})).await;
    until("the lease to end", || async {
        v3(&client, "/v3/lease/timetolive", json!({"ID": "77"})).await["TTL"] == "-1"
    })
    .await;
    assert_eq!(keys(&client, json!({"key": b64("l/77")})).await, [""; 0]);
    record::check(&db).await;
}

/// A watch, and what it says.
struct Watched(Response, Vec<u8>);

impl Watched {
    async fn begin(client: &Client, body: Value) -> Self {
        let token = client.token().await;
        let request = client.bare(Method::POST, "/v3/watch").header("authorization", token);
        let request = request.header("accept-encoding", "gzip");
        let answer = request.body(body.to_string()).send().await.unwrap();
        assert_eq!(answer.status().as_u16(), 200);
        assert!(answer.headers().get("content-encoding").is_none(), "a compressor would hold it back");
        Self(answer, Vec::new())
    }

    /// The next message; `None` after the last.
    async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.1.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.1.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).unwrap());
            }
            let piece = soon("a message", self.0.chunk()).await;
            self.1.extend_from_slice(&piece.unwrap()?);
        }
    }

    async fn result(&mut self) -> Value {
        self.next().await.unwrap()["result"].clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_tells_what_etcd_would() {
    let (db, mut daemon, client) = start().await;
    let before = put(&client, "w/a", "0").await;
    let row = json!({"key": b64("w/a"), "range_end": b64("w/c"), "prev_kv": true, "watch_id": "5"});
    let mut live = Watched::begin(&client, json!({"create_request": row})).await;
    let created = live.result().await;
    assert_eq!((&created["created"], &created["watch_id"]), (&json!(true), &json!("5")));
    // The daemon has entries of its own now and then; so far ahead it is not yet.
    let far = before + 30;
    let mut ahead = Watched::begin(&client, json!({"createRequest": {"key": b64("w/b"), "startRevision": far}})).await;
    assert_eq!(ahead.result().await["created"], true);
    let first = put(&client, "w/b", "1").await;
    put(&client, "w/c", "not in it").await;
    let both = json!({"success": [{"request_put": {"key": b64("w/b"), "value": b64("2")}}, {"request_delete_range": {"key": b64("w/a")}}]});
    let second = revision(&v3(&client, "/v3/kv/txn", both).await);
    let told = live.result().await;
    assert_eq!(told["header"]["revision"], first.to_string());
    assert_eq!(told["events"].as_array().unwrap().len(), 1);
    assert_eq!((told["events"][0].get("type"), told["events"][0].get("prev_kv")), (None, None));
    assert_eq!(told["events"][0]["kv"]["value"], b64("1"));
    let told = live.result().await;
    assert_eq!(told["events"].as_array().unwrap().len(), 2, "those of one revision together");
    assert_eq!(told["events"][0]["type"], "DELETE");
    assert_eq!(told["events"][0]["kv"], json!({"key": b64("w/a"), "mod_revision": second.to_string()}));
    assert_eq!(told["events"][0]["prev_kv"]["value"], b64("0"));
    assert_eq!(told["events"][1]["prev_kv"]["value"], b64("1"));
    let mut reached = 0;
    while reached < far {
        reached = put(&client, "w/b", "on").await;
    }
    let told = ahead.result().await;
    assert_eq!((&told["events"][0]["kv"]["mod_revision"], first < far), (&json!(reached.to_string()), true));
    // From the past, filtered.
    let filtered = json!({"key": b64("w/"), "range_end": b64("w0"), "start_revision": before, "filters": ["NOPUT"]});
    let mut past = Watched::begin(&client, json!({"create_request": filtered})).await;
    assert_eq!(past.result().await["created"], true);
    let told = past.result().await;
    assert_eq!((told["events"].as_array().unwrap().len(), &told["events"][0]["type"]), (1, &json!("DELETE")));
    // Progress comes when nothing else does.
    let quiet = json!({"key": b64("q"), "progress_notify": true});
    let mut quiet = Watched::begin(&client, json!({"create_request": quiet})).await;
    assert_eq!(quiet.result().await["created"], true);
    let progress = quiet.result().await;
    assert!(progress.get("events").is_none() && revision(&progress) >= second, "{progress}");
    // Nothing to watch, and what cannot be watched any more.
    let nothing = json!({"key": b64("b"), "range_end": b64("a")});
    let mut nothing = Watched::begin(&client, json!({"create_request": nothing})).await;
    assert_eq!(nothing.result().await["cancel_reason"], "mvcc: watcher range is empty");
    assert_eq!(nothing.next().await, None);
    v3(&client, "/v3/kv/compaction", json!({"revision": second})).await;
    let mut late =
        Watched::begin(&client, json!({"create_request": {"key": b64("w/b"), "start_revision": before}})).await;
    assert_eq!(late.result().await["created"], true);
    let canceled = late.result().await;
    assert_eq!(
        (&canceled["canceled"], &canceled["compact_revision"]),
        (&json!(true), &json!((second + 1).to_string()))
    );
    assert_eq!(late.next().await, None);
    let two = "{\"create_request\": {\"key\": \"YQ==\"}}\n{\"create_request\": {\"key\": \"Yg==\"}}";
    assert_eq!(raw(&client, "/v3/watch", two).await.0, 501);
    // A client that is deleted watches no longer; a daemon that stops says so.
    let other = policy::client(&client, "state").await;
    let mut theirs = Watched::begin(&other, json!({"create_request": {"key": b64("w/b")}})).await;
    assert_eq!(theirs.result().await["created"], true);
    let gone = client.request(Method::DELETE, &format!("/oauth2/register/{}", other.credential().0)).await;
    assert_eq!(gone.send().await.unwrap().status().as_u16(), 204);
    let canceled = theirs.result().await;
    assert_eq!(
        (&canceled["canceled"], &canceled["cancel_reason"]),
        (&json!(true), &json!("etcdserver: invalid auth token"))
    );
    record::check(&db).await;
    daemon.terminate().await;
    let mut ended = live.next().await.unwrap();
    while ended.get("result").is_some() {
        ended = live.next().await.unwrap();
    }
    assert_eq!((&ended["error"]["grpc_code"], &ended["error"]["http_code"]), (&json!(14), &json!(503)), "{ended}");
}

/// Counts under a key, each time by comparing the value it put last, until the daemon is gone; the last count that was
/// acknowledged, and its revision.
async fn count(client: &Client, key: &str, counted: &AtomicUsize) -> (i64, i64) {
    let token = client.token().await;
    let (mut last, mut at) = (0, 0);
    loop {
        let compare = match last {
            0 => json!({"key": b64(key), "target": "VERSION", "version": "0"}),
            n => json!({"key": b64(key), "target": "VALUE", "value": b64(n.to_string())}),
        };
        let put = json!({"request_put": {"key": b64(key), "value": b64((last + 1).to_string()), "prev_kv": true}});
        let body = json!({"compare": [compare], "success": [put]}).to_string();
        let request = client.bare(Method::POST, "/v3/kv/txn").header("authorization", &token).body(body);
        let Ok(answer) = request.send().await else { return (last, at) };
        let Ok(said) = answer.json::<Value>().await else { return (last, at) };
        assert_eq!(said["succeeded"], true, "nobody else puts it: {said}");
        let before = &said["responses"][0]["response_put"]["prev_kv"];
        assert_eq!(before["value"].as_str(), (last > 0).then(|| b64(last.to_string())).as_deref());
        (last, at) = (last + 1, revision(&said));
        counted.fetch_add(1, SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_loses_nothing_it_acknowledged_to_a_client_of_etcd() {
    let (db, mut daemon, client) = start().await;
    let began = put(&client, "k/began", "").await;
    v3(&client, "/v3/lease/grant", json!({"TTL": "60", "ID": "7"})).await;
    v3(&client, "/v3/kv/put", json!({"key": b64("k/leased"), "lease": "7"})).await;
    client.token().await;
    let names: Vec<String> = (0..16).map(|n| format!("n/{n:02}")).collect();
    let counted = AtomicUsize::new(0);
    let counts = futures_util::future::join_all(names.iter().map(|name| count(&client, name, &counted)));
    let killed = async {
        until("some counts", || async { counted.load(SeqCst) > 400 }).await;
        daemon.kill().await;
    };
    let (counts, ()) = tokio::join!(counts, killed);
    let daemon = daemon.restart().await;
    let client = client.clone_at(&daemon.url);
    let mut last = 0;
    for (name, (n, at)) in names.iter().zip(counts) {
        let said = v3(&client, "/v3/kv/range", json!({"key": b64(name)})).await;
        let kv = &said["kvs"][0];
        let number = |field: &str| kv[field].as_str().map_or(0, |text| text.parse::<i64>().unwrap());
        // What was on its way when the daemon died may have been done.
        let version = number("version");
        assert!(version == n || version == n + 1, "{name}: {n} were acknowledged, {kv}");
        assert_eq!(kv["value"], b64(version.to_string()));
        assert!(if version == n { number("mod_revision") == at } else { number("mod_revision") > at }, "{kv}, {at}");
        last = last.max(number("mod_revision"));
    }
    let alive = v3(&client, "/v3/lease/timetolive", json!({"ID": "7", "keys": true})).await;
    assert_eq!((&alive["grantedTTL"], &alive["keys"]), (&json!("60"), &json!([b64("k/leased")])));
    // A watch from before the kill tells of each count once, in order.
    let row = json!({"key": b64("n/"), "range_end": b64("n0"), "start_revision": began.to_string()});
    let mut watch = Watched::begin(&client, json!({"create_request": row})).await;
    assert_eq!(watch.result().await["created"], true);
    let mut told: BTreeMap<String, i64> = BTreeMap::new();
    let mut reached = 0;
    while reached < last {
        for event in watch.result().await["events"].as_array().into_iter().flatten() {
            let kv = &event["kv"];
            let next = told.entry(kv["key"].as_str().unwrap().to_owned()).or_default();
            *next += 1;
            assert_eq!(kv["value"], b64(next.to_string()), "{kv}");
            reached = kv["mod_revision"].as_str().unwrap().parse().unwrap();
        }
    }
    assert_eq!(told.len(), names.len());
    record::check(&db).await;
}
