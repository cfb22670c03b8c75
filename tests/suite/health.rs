//! Checks that look, reports that stop, incidents that open and end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::postgres::{Database, database};
use crate::support::{record, until};

/// Something to look at: answers with a status that the test sets, and counts.
struct Target {
    url: String,
    address: String,
    status: Arc<AtomicU16>,
    looks: Arc<AtomicUsize>,
    _task: JoinSet<()>,
}

impl Target {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (status, looks) = (Arc::new(AtomicU16::new(200)), Arc::new(AtomicUsize::new(0)));
        let mut task = JoinSet::new();
        let (s, l) = (status.clone(), looks.clone());
        task.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let (s, l) = (s.clone(), l.clone());
                connections.spawn(async move {
                    let mut buffer = [0; 2048];
                    if !matches!(stream.read(&mut buffer).await, Ok(n) if n > 0) {
                        return;
                    }
                    l.fetch_add(1, Ordering::SeqCst);
                    let status = s.load(Ordering::SeqCst);
                    if status == 0 {
                        // It never answers.
                        std::future::pending::<()>().await;
                    }
                    if status == 1 {
                        // It never ends.
                        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
                        while stream.write_all(b"4\r\nmore\r\n").await.is_ok() {
                            tokio::time::sleep(Duration::from_millis(5)).await;
                        }
                        return;
                    }
                    let answer = format!("HTTP/1.1 {status} X\r\ncontent-length: 0\r\nlocation: http://127.0.0.1:1/\r\nconnection: close\r\n\r\n");
                    let _ = stream.write_all(answer.as_bytes()).await;
                });
            }
        });
        Self { url: format!("http://{address}/"), address, status, looks, _task: task }
    }

    fn says(&self, status: u16) {
        self.status.store(status, Ordering::SeqCst);
    }
}

async fn start() -> (Database, Daemon, Client) {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    (db, daemon, client)
}

async fn becomes(client: &Client, path: &str, status: &str) -> Value {
    let mut last = Value::Null;
    for _ in 0..1500 {
        last = client.get(path).await.1;
        if last["status"] == status {
            return last;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{path} never became {status}: {last}")
}

fn http(target: &Target) -> Value {
    json!({"kind": "http", "target": target.url, "interval": 0.5, "timeout": 0.3, "rise": 2, "fall": 2,
           "severity": "critical", "service": "arp"})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_that_fails_opens_an_incident_and_one_that_passes_ends_it() {
    let (db, _daemon, client) = start().await;
    let target = Target::start().await;
    let check = "/v1/health/checks/arp%2Fhttp";
    let (status, made) = client.json(Method::PUT, check, &http(&target)).await;
    assert_eq!((status, made["status"].as_str(), made["rise"].as_i64()), (201, Some("unknown"), Some(2)), "{made}");
    assert_eq!(client.get("/v1/health/services/arp").await.1["status"], "unknown");
    becomes(&client, check, "passing").await;
    assert!(target.looks.load(Ordering::SeqCst) >= 2, "it rose by looking twice");
    assert_eq!(client.get("/v1/health/incidents").await.1["items"], json!([]));
    // A redirect is an answer, and is not followed.
    target.says(302);
    let looks = target.looks.load(Ordering::SeqCst);
    until("more looks", || async { target.looks.load(Ordering::SeqCst) >= looks + 3 }).await;
    assert_eq!(client.get(check).await.1["status"], "passing");
    target.says(500);
    let bad = becomes(&client, check, "critical").await;
    assert_eq!(bad["output"], "answered 500");
    let (_, open) = client.get("/v1/health/incidents?status=open&severity=critical").await;
    let incident = &open["items"][0];
    assert_eq!((open["items"].as_array().unwrap().len(), &incident["fingerprint"]), (1, &json!("check/arp/http")));
    assert_eq!(incident["opened_index"], bad["index"], "in the same commit");
    let service = client.get("/v1/health/services/arp").await.1;
    assert_eq!(service["status"], "critical");
    assert!(service["why"][0].as_str().unwrap().contains("answered 500"), "{service}");
    let path = format!("/v1/health/incidents/{}", incident["id"].as_str().unwrap());
    let (status, seen) = client.json(Method::POST, &format!("{path}/acknowledge"), &json!({"note": "looking"})).await;
    assert_eq!((status, &seen["status"]), (200, &json!("acknowledged")));
    client.json(Method::POST, &format!("{path}/comment"), &json!({"note": "a bad disk"})).await;
    target.says(204);
    becomes(&client, check, "passing").await;
    let over = client.get(&path).await.1;
    let kinds: Vec<&str> = over["events"].as_array().unwrap().iter().map(|e| e["kind"].as_str().unwrap()).collect();
    assert_eq!(
        (over["status"].as_str(), kinds),
        (Some("resolved"), vec!["opened", "acknowledged", "comment", "resolved"])
    );
    let (status, _) = client.json(Method::POST, &format!("{path}/resolve"), &json!({})).await;
    assert_eq!(status, 409);
    // The next time is another incident.
    target.says(500);
    becomes(&client, check, "critical").await;
    let again = client.get("/v1/health/incidents?limit=1").await.1;
    assert_ne!(again["items"][0]["id"], over["id"]);
    let older = client.get(&format!("/v1/health/incidents?limit=1&after={}", again["next"].as_str().unwrap())).await.1;
    assert_eq!(older["items"][0]["id"], over["id"]);
    assert_eq!(client.json(Method::DELETE, check, &json!({})).await.0, 200);
    assert_eq!(client.get("/v1/health/incidents?status=open").await.1["items"], json!([]), "nothing is wrong any more");
    let (_, page) = client.get("/v1/audit/entries?action=health:status").await;
    assert!(page["items"].as_array().unwrap().len() >= 4);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_never_answers_or_never_ends_costs_a_look_and_no_more() {
    let (db, _daemon, client) = start().await;
    let (mute, endless, fine) = (Target::start().await, Target::start().await, Target::start().await);
    mute.says(0);
    endless.says(1);
    for (name, target) in [("mute", &mute), ("endless", &endless), ("fine", &fine)] {
        assert_eq!(client.json(Method::PUT, &format!("/v1/health/checks/{name}"), &http(target)).await.0, 201);
    }
    let tcp = json!({"kind": "tcp", "target": fine.address, "interval": 0.5, "rise": 1});
    assert_eq!(client.json(Method::PUT, "/v1/health/checks/tcp", &tcp).await.0, 201);
    let nothing = json!({"kind": "tcp", "target": "127.0.0.1:1", "interval": 0.5, "fall": 1});
    assert_eq!(client.json(Method::PUT, "/v1/health/checks/nothing", &nothing).await.0, 201);
    let bad = becomes(&client, "/v1/health/checks/mute", "critical").await;
    assert_eq!(bad["output"], "no answer within 300 ms");
    becomes(&client, "/v1/health/checks/endless", "passing").await;
    becomes(&client, "/v1/health/checks/fine", "passing").await;
    becomes(&client, "/v1/health/checks/tcp", "passing").await;
    let bad = becomes(&client, "/v1/health/checks/nothing", "critical").await;
    assert!(bad["output"].as_str().unwrap().starts_with("no connection:"), "{bad}");
    let listed = client.get("/v1/health/checks?status=critical&limit=1").await.1;
    assert_eq!(listed["items"][0]["name"], "mute");
    let rest =
        client.get(&format!("/v1/health/checks?status=critical&after={}", listed["next"].as_str().unwrap())).await;
    assert_eq!(rest.1["items"][0]["name"], "nothing");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_that_is_reported_fails_by_word_and_by_silence() {
    let (db, _daemon, client) = start().await;
    let check = "/v1/health/checks/nightly";
    assert_eq!(client.json(Method::PUT, check, &json!({"kind": "ttl", "interval": 1.5})).await.0, 201);
    let report = |body: Value| {
        let client = &client;
        async move { client.json(Method::POST, &format!("{check}/report"), &body).await }
    };
    let (status, now) = report(json!({"status": "passing", "output": "done"})).await;
    assert_eq!((status, &now["status"], &now["output"]), (200, &json!("passing"), &json!("done")));
    // Reports that change nothing share entries.
    let began = tokio::time::Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        let both = tokio::join!(report(json!({"status": "passing"})), report(json!({"status": "passing"})));
        assert_eq!((both.0.0, both.1.0, &both.0.1["status"]), (200, 200, &json!("passing")));
    }
    let (_, page) = client.get("/v1/audit/entries?action=health:report&limit=1").await;
    assert_eq!(page["items"][0]["details"]["change"]["reports"].as_array().unwrap().len(), 2);
    let bad = becomes(&client, check, "critical").await;
    assert_eq!(bad["output"], "no report for 1500 ms");
    assert_eq!(report(json!({"status": "passing"})).await.1["status"], "passing");
    assert_eq!(report(json!({"status": "critical", "output": "no space"})).await.1["status"], "critical");
    let (_, open) = client.get("/v1/health/incidents?status=open").await;
    assert!(open["items"][0]["summary"].as_str().unwrap().ends_with("no space"), "{open}");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_daemons_look_once_and_the_death_of_one_stops_nothing() {
    let db = database().await;
    let mut one = Launch::on(db.url()).start().await;
    let mut two = Launch::beside(&one, db.url()).start().await;
    let a = Client::of(&one);
    let target = Target::start().await;
    let check = "/v1/health/checks/c";
    let mut body = http(&target);
    body["interval"] = json!(1);
    assert_eq!(a.json(Method::PUT, check, &body).await.0, 201);
    becomes(&a, check, "passing").await;
    let (before, began) = (target.looks.load(Ordering::SeqCst), tokio::time::Instant::now());
    until("five more looks", || async { target.looks.load(Ordering::SeqCst) >= before + 5 }).await;
    assert!(began.elapsed() > Duration::from_millis(3800), "one look a second, not two: {:?}", began.elapsed());
    let holder: String = sqlx::query_scalar("SELECT holder FROM ledger.claims WHERE name = 'health/runner'")
        .fetch_one(&mut db.connect().await)
        .await
        .unwrap();
    let b = a.also_of(&two);
    b.token().await;
    // Whichever looks is killed.
    let metrics = a.bare(Method::GET, "/metrics").send().await.unwrap().text().await.unwrap();
    let first_looks =
        metrics.lines().any(|l| l.starts_with("sop_health_probes_total{result=\"good\"}") && !l.ends_with(" 0"));
    let left = if first_looks {
        one.kill().await;
        b
    } else {
        two.kill().await;
        a
    };
    target.says(503);
    let bad = becomes(&left, check, "critical").await;
    assert_eq!(bad["output"], "answered 503");
    let now: String = sqlx::query_scalar("SELECT holder FROM ledger.claims WHERE name = 'health/runner'")
        .fetch_one(&mut db.connect().await)
        .await
        .unwrap();
    assert_ne!(holder, now);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_is_as_fit_as_its_checks_say() {
    let (db, _daemon, client) = start().await;
    let (good, bad) = (Target::start().await, Target::start().await);
    bad.says(500);
    let probe = |t: &Target| json!({"kind": "http", "target": t.url, "interval": 0.5, "rise": 1, "fall": 1});
    for (id, checks) in [("1", json!([probe(&good)])), ("2", json!([probe(&good), probe(&bad)]))] {
        let body = json!({"address": "x", "ttl": 60, "checks": checks});
        let path = format!("/v1/nexus/services/scp/instances/{id}");
        assert_eq!(client.json(Method::PUT, &path, &body).await.0, 201);
    }
    becomes(&client, "/v1/health/services/scp", "warning").await;
    let (_, healthy) = client.get("/v1/nexus/services/scp?healthy=true").await;
    assert_eq!(healthy["instances"].as_array().unwrap().len(), 1, "{healthy}");
    assert_eq!(healthy["instances"][0]["id"], "1");
    bad.says(200);
    becomes(&client, "/v1/health/services/scp", "passing").await;
    good.says(500);
    becomes(&client, "/v1/health/services/scp", "critical").await;
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_with_a_signal_opens_an_incident_once() {
    let db = database().await;
    let one = Launch::on(db.url()).env("SOP__LEDGER__LOCK_WAIT", "500ms").start().await;
    let two = Launch::beside(&one, db.url()).env("SOP__LEDGER__LOCK_WAIT", "500ms").start().await;
    let (a, b) = (Client::of(&one), Client::of(&one).also_of(&two));
    a.put("k", "1").await.unwrap();
    b.token().await;
    // A session of a daemon's name keeps the head: whoever waits ends it, and says so with a signal.
    let mut stalled = db.connect_as("sop/other/writer").await;
    sqlx::raw_sql("BEGIN; SELECT index FROM ledger.head FOR UPDATE").execute(&mut stalled).await.unwrap();
    b.put("k", "2").await.expect("it goes on");
    let mut items = Value::Null;
    until("the incident", || async {
        a.get("/v1/health/incidents").await.1["items"].as_array().is_some_and(|i| !i.is_empty())
    })
    .await;
    items.clone_from(&a.get("/v1/health/incidents").await.1["items"]);
    assert_eq!(items.as_array().unwrap().len(), 1, "two daemons, one incident: {items}");
    assert_eq!(items[0]["fingerprint"], "ledger/stalled/sop/other/writer");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused() {
    let (db, _daemon, client) = start().await;
    let check = "/v1/health/checks/c";
    for (body, pointer) in [
        (json!({"kind": "exec", "target": "rm"}), "/kind"),
        (json!({"kind": "http", "target": "ftp://x"}), "/target"),
        (json!({"kind": "tcp"}), "/target"),
        (json!({"kind": "ttl", "target": "x"}), "/target"),
        (json!({"kind": "tcp", "target": "x:1", "interval": 0.1}), "/interval"),
        (json!({"kind": "tcp", "target": "x:1", "timeout": "2s"}), "/timeout"),
        (json!({"kind": "tcp", "target": "x:1", "rise": 0}), "/rise"),
        (json!({"kind": "tcp", "target": "x:1", "severity": "bad"}), "/severity"),
        (json!({"kind": "tcp", "target": "x:1", "service": "a b"}), "/service"),
        (json!({"kind": "tcp", "target": "x:1", "more": 1}), "/more"),
    ] {
        let (status, answer) = client.json(Method::PUT, check, &body).await;
        assert_eq!((status, answer["errors"][0]["pointer"].as_str()), (400, Some(pointer)), "{body}: {answer}");
    }
    let tcp = json!({"kind": "tcp", "target": "127.0.0.1:1", "interval": 60});
    assert_eq!(client.json(Method::PUT, check, &tcp).await.0, 201);
    let report = format!("{check}/report");
    assert_eq!(client.json(Method::POST, &report, &json!({"status": "passing"})).await.0, 409);
    assert_eq!(client.json(Method::POST, &report, &json!({"status": "unknown"})).await.0, 400);
    assert_eq!(client.json(Method::POST, "/v1/health/checks/none/report", &json!({"status": "passing"})).await.0, 404);
    assert_eq!(client.get("/v1/health/services/none").await.0, 404);
    assert_eq!(client.get("/v1/health/incidents/x").await.0, 404);
    assert_eq!(client.get("/v1/health/incidents?status=bad").await.0, 400);
    let made =
        client.json(Method::POST, "/oauth2/register", &json!({"client_name": "r", "scope": "health:read"})).await.1;
    let reader = client.with(made["client_id"].as_str().unwrap(), made["client_secret"].as_str().unwrap());
    assert_eq!(reader.get(check).await.0, 200);
    assert_eq!(reader.json(Method::PUT, check, &tcp).await.0, 403);
    assert_eq!(reader.json(Method::POST, &report, &json!({"status": "passing"})).await.0, 403);
    record::check(&db).await;
}
