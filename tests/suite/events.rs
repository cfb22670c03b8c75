//! Events of the protocols: recorded as segments, each with a receipt of its own.

use std::io::Write as _;
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use sop::audit::note::VerifierKey;
use sop::audit::proof::Proof;
use sop::kernel::crypto::{self, Hash};
use sop::ledger::{entry, merkle, segment};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::postgres::{Database, database};
use crate::support::{record, soon};

const ONE: &str = "application/cloudevents+json";
const MANY: &str = "application/cloudevents-batch+json";

async fn start() -> (Database, Daemon, Client) {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    (db, daemon, client)
}

fn event(id: &str) -> Value {
    json!({"specversion": "1.0", "id": id, "source": "/arp/planner", "type": "arp.plan.made", "data": {"n": 1.50}})
}

async fn post(client: &Client, query: &str, kind: &str, body: Vec<u8>) -> (u16, Value) {
    let request = client.request(Method::POST, &format!("/v1/audit/events{query}")).await;
    let answer = request.header("content-type", kind).body(body).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap_or_default())
}

async fn text(client: &Client, path: &str) -> String {
    let answer = client.request(Method::GET, path).await.send().await.unwrap();
    answer.error_for_status().unwrap().text().await.unwrap()
}

/// Checks the receipt of a record with nothing but the key; the record.
pub async fn proven(client: &Client, index: i64, position: i64) -> Value {
    let key = VerifierKey::parse(&text(client, "/log/key").await).unwrap();
    let path = format!("/v1/audit/entries/{index}/records/{position}/receipt");
    let mut proof = Proof::parse(&text(client, &path).await).unwrap();
    let extra: Value = serde_json::from_slice(&proof.extra).unwrap();
    let bytes = |v: &Value| crypto::from_base64(v.as_str().unwrap()).unwrap();
    let hash = |v: &Value| -> Hash { bytes(v).try_into().unwrap() };
    assert_eq!(extra["position"], position);
    let (record, records) = (bytes(&extra["record"]), extra["records"].as_u64().unwrap());
    let path: Vec<Hash> = extra["path"].as_array().unwrap().iter().map(hash).collect();
    proof.extra = bytes(&extra["entry"]);
    let (leaf, _) = proof.verify(&key).unwrap();
    let leaf: Value = serde_json::from_slice(leaf).unwrap();
    // The root is not given: it is what the path leads to, and what the entry commits to.
    let (_, shown) = client.get(&format!("/v1/audit/entries/{index}")).await;
    let root = hash(&shown["segment"]);
    let at = u64::try_from(position).unwrap();
    assert!(merkle::verify_inclusion(&segment::record(&record), at, records, &path, &root));
    assert_eq!(leaf["body"], crypto::base64(entry::body(&hash(&extra["commitment"]), Some(&root))));
    serde_json::from_slice(&record).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_event_of_a_batch_is_judged_by_itself_and_has_a_receipt() {
    let (db, _daemon, client) = start().await;
    let (status, one) = post(&client, "", ONE, event("1").to_string().into_bytes()).await;
    assert_eq!((status, one["position"].as_i64(), one["id"].as_str()), (201, Some(0), Some("1")), "{one}");
    let record = proven(&client, one["index"].as_i64().unwrap(), 0).await;
    let kept: Value = serde_json::from_str(record["event"].as_str().unwrap()).unwrap();
    assert_eq!(kept, event("1"));
    assert!(record["event"].as_str().unwrap().contains("1.5"), "kept as it came");

    let batch = json!([event("a"), {"specversion": "1.0", "id": "b", "source": "/s"}, event("c"), 7]);
    let (status, said) = post(&client, "", MANY, batch.to_string().into_bytes()).await;
    assert_eq!((status, &said["accepted"], &said["refused"]), (201, &2.into(), &2.into()), "{said}");
    let index = said["index"].as_i64().unwrap();
    let items = said["items"].as_array().unwrap();
    assert_eq!((&items[0]["position"], &items[2]["position"]), (&0.into(), &1.into()));
    assert_eq!(items[1]["errors"][0]["pointer"], "/1/type");
    assert!(items[1].get("index").is_none() && items[3]["errors"][0]["pointer"] == "/3", "{said}");
    for (position, id) in [(0, "a"), (1, "c")] {
        let record = proven(&client, index, position).await;
        assert!(record["event"].as_str().unwrap().contains(&format!("\"id\":\"{id}\"")), "{record}");
    }
    let (_, listed) = client.get(&format!("/v1/audit/entries/{index}/records?limit=1")).await;
    assert_eq!((listed["items"].as_array().unwrap().len(), listed["next"].as_str()), (1, Some("0")));
    let (_, rest) = client.get(&format!("/v1/audit/entries/{index}/records?after=0")).await;
    assert_eq!((rest["items"][0]["position"].as_i64(), rest["next"].is_null()), (Some(1), true));
    let missing = |path: String| {
        let client = &client;
        async move { client.get(&path).await.0 }
    };
    assert_eq!(missing(format!("/v1/audit/entries/{index}/records/2/receipt")).await, 404);
    assert_eq!(missing("/v1/audit/entries/0/records".into()).await, 404, "an entry without records");

    let before = client.get("/v1/audit/entries?action=audit:event").await.1["items"].as_array().unwrap().len();
    let (status, said) = post(&client, "?atomic=true", MANY, batch.to_string().into_bytes()).await;
    assert_eq!((status, said["errors"][0]["pointer"].as_str()), (400, Some("/1/type")), "{said}");
    let (status, _) = post(&client, "", MANY, b"[{}]".to_vec()).await;
    assert_eq!(status, 400);
    let after = client.get("/v1/audit/entries?action=audit:event").await.1["items"].as_array().unwrap().len();
    assert_eq!(before, after, "a refused batch leaves nothing");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn decisions_and_messages_have_receipts_too() {
    let (_db, _daemon, client) = start().await;
    let ask = json!({"subject": {"type": "user", "id": "u"}, "action": {"name": "read"}, "resource": {"type": "doc", "id": "d"}});
    let (status, said) = client.json(Method::POST, "/access/v1/evaluation", &ask).await;
    assert_eq!(status, 200);
    let index = said["context"]["index"].as_i64().unwrap();
    let record = proven(&client, index, said["context"]["position"].as_i64().unwrap_or(0)).await;
    assert_eq!(record["decision"], said["decision"]);

    client.json(Method::PUT, "/v1/nexus/topics/t", &json!({"retention": 3600})).await;
    let request = client.request(Method::POST, "/v1/nexus/topics/t/messages").await.header("content-type", MANY);
    let batch = json!([event("1"), event("2"), event("3")]).to_string();
    let said: Value = request.body(batch).send().await.unwrap().json().await.unwrap();
    let record = proven(&client, said["items"][2]["index"].as_i64().unwrap(), 2).await;
    assert_eq!(record["id"], "3");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_record_events_is_policy_and_a_repeat_is_answered_again() {
    let (_db, _daemon, admin) = start().await;
    let wanted = json!({"client_name": "w", "scope": "audit:write"});
    let (_, made) = admin.json(Method::POST, "/oauth2/register", &wanted).await;
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    let writer = admin.with(&text(&made["client_id"]), &text(&made["client_secret"]));
    let send = async || {
        let request = writer.request(Method::POST, "/v1/audit/events").await.header("idempotency-key", "k-1");
        let answer = request.header("content-type", ONE).body(event("1").to_string()).send().await.unwrap();
        (answer.status().as_u16(), answer.json::<Value>().await.unwrap())
    };
    let (first, again) = (send().await, send().await);
    assert_eq!(first.0, 201, "{first:?}");
    assert_eq!(first.1, again.1, "the same request has one entry");
    let index = first.1["index"].as_i64().unwrap();
    assert_eq!(writer.get(&format!("/v1/audit/entries/{index}/records")).await.0, 403, "writing is not reading");
    proven(&admin, index, 0).await;
    let (_, made) = admin.json(Method::POST, "/oauth2/register", &json!({"client_name": "r", "scope": "state"})).await;
    let other = admin.with(&text(&made["client_id"]), &text(&made["client_secret"]));
    assert_eq!(post(&other, "", ONE, event("1").to_string().into_bytes()).await.0, 403);
    let (_, denied) = admin.get("/v1/audit/entries?action=audit:event&outcome=denied").await;
    assert_eq!(denied["items"][0]["resource"], "event//arp/planner");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_lies_is_refused_and_leaves_nothing() {
    let (_db, daemon, client) = start().await;
    let gzip = |bytes: &[u8]| {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    };
    let coded = |body: Vec<u8>, coding: &'static str| {
        let client = &client;
        async move {
            let request = client.request(Method::POST, "/v1/audit/events").await;
            let request = request.header("content-type", ONE).header("content-encoding", coding);
            let answer = request.body(body).send().await.unwrap();
            (answer.status().as_u16(), answer.headers().clone())
        }
    };
    let plain = event("z").to_string();
    assert_eq!(coded(gzip(plain.as_bytes()), "gzip").await.0, 201, "gzip is taken");
    let bomb = gzip(&vec![b' '; 200 << 20]);
    assert!(bomb.len() < 1 << 20, "it passes the limit of what arrives");
    assert_eq!(coded(bomb, "gzip").await.0, 413, "a bomb is stopped at the limit");
    let cut = gzip(plain.as_bytes());
    assert_eq!(coded(cut[..cut.len() - 9].to_vec(), "gzip").await.0, 400, "cut short");
    let (status, headers) = coded(plain.clone().into_bytes(), "br").await;
    assert_eq!((status, headers["accept-encoding"].to_str().unwrap()), (415, "gzip"));
    assert_eq!(post(&client, "", "text/plain", b"x".to_vec()).await.0, 415);
    assert_eq!(post(&client, "", ONE, vec![b' '; (1 << 20) + 1]).await.0, 413);
    let many = vec![event("x"); 1001];
    assert_eq!(post(&client, "", MANY, json!(many).to_string().into_bytes()).await.0, 400);

    // A length that is more than what comes, and then the connection ends.
    let (_, page) = client.get("/v1/audit/entries?action=audit:event").await;
    let before = page["items"].as_array().unwrap().len();
    let address = daemon.url.strip_prefix("http://").unwrap();
    let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
    let head = format!(
        "POST /v1/audit/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Type: {ONE}\r\nContent-Length: {}\r\n\r\n{plain}",
        client.token().await,
        plain.len() + 10
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    socket.shutdown().await.unwrap();
    let mut answer = String::new();
    let read = soon("it is answered or cut", socket.read_to_string(&mut answer)).await;
    read.ok();
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400"), "{answer}");
    let (_, page) = client.get("/v1/audit/entries?action=audit:event").await;
    assert_eq!(page["items"].as_array().unwrap().len(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_outlives_the_daemon() {
    let (db, mut daemon, client) = start().await;
    let client = std::sync::Arc::new(client);
    let writers: Vec<_> = (0..8)
        .map(|w| {
            let client = client.clone();
            tokio::spawn(async move {
                let mut told = Vec::new();
                for i in 0.. {
                    let batch = json!([event(&format!("{w}-{i}-0")), event(&format!("{w}-{i}-1"))]);
                    let request = client.bare(Method::POST, "/v1/audit/events").bearer_auth(client.token().await);
                    let request = request.header("content-type", MANY).body(batch.to_string());
                    let Ok(answer) = request.send().await else { break };
                    let Ok(said) = answer.json::<Value>().await else { break };
                    let Some(index) = said["index"].as_i64() else { break };
                    told.push((index, format!("{w}-{i}-1")));
                }
                told
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(700)).await;
    daemon.kill().await;
    let mut told = Vec::new();
    for writer in writers {
        told.extend(writer.await.unwrap());
    }
    assert!(told.len() > 8, "{}", told.len());
    let daemon = daemon.restart().await;
    let client = Client::of(&daemon);
    for (index, id) in told.iter().step_by(told.len() / 8) {
        let record = proven(&client, *index, 1).await;
        assert!(record["event"].as_str().unwrap().contains(id));
    }
    let mut conn = db.connect().await;
    let kept: i64 = sqlx::query_scalar("SELECT count(*) FROM audit.segments WHERE index = ANY ($1)")
        .bind(told.iter().map(|(i, _)| *i).collect::<Vec<_>>())
        .fetch_one(&mut conn)
        .await
        .unwrap();
    assert_eq!(kept, told.len() as i64);
    record::check(&db).await;
}
