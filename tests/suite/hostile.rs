//! What an outsider could try: every route of the API with what it does not expect. The answer is never a 5xx, always in the
//! form of a refusal, and the daemon goes on.

use futures_util::{StreamExt, stream};
use reqwest::{Method, StatusCode};
use serde_json::Value;

use crate::support::client::Client;
use crate::support::daemon::Launch;
use crate::support::postgres::database;
use crate::support::{PATIENCE, record};

/// What stands for a part of a path.
const PARTS: &[&str] = &[
    "x",
    "..",
    "%00",
    "%ff",
    "a%2F..%2Fb",
    "%F0%9F%98%80",
    "99999999999999999999",
    "-1",
    "01a20b19-3012-73e6-9c59-d9c4c3767c2d",
];

const QUERIES: &[&str] = &[
    "limit=-1",
    "limit=99999999999999999999",
    "limit=1&limit=2",
    "after=%00",
    "after=e30",
    "after=eyJhdCI6LTEsImtleSI6IiJ9",
    "at=-1",
    "at=9223372036854775807",
    "prefix=%ff",
    "prefix=..%2F",
    "since=-1",
    "until=9999-99-99T00:00:00Z",
    "min_index=-1",
    "min_index=x",
    "consistency=eventual",
    "nope=1",
    "%=%&&==",
];

const TYPES: &[&str] = &[
    "application/json",
    "application/cloudevents+json",
    "application/cloudevents-batch+json",
    "application/x-www-form-urlencoded",
    "text/plain",
    "multipart/form-data; boundary=x",
    "nonsense",
];

fn bodies() -> Vec<Vec<u8>> {
    let mut bodies: Vec<Vec<u8>> = [
        "",
        "{",
        "{}",
        "[]",
        "null",
        "0",
        "\"\"",
        "[{}]",
        "{\"\":1}",
        "{\"a\":1,\"a\":2}",
        "{\"__proto__\":{}}",
        "{\"name\":\"\\u0000\",\"type\":\"\\ud800\"}",
        "{\"ttl\":1e999}",
        "{\"ttl_seconds\":-1,\"uses\":-1,\"max_uses\":18446744073709551616}",
        "{\"subject\":{\"type\":\"\",\"id\":\"\"},\"action\":{\"name\":\"\"},\"resource\":{\"type\":\"x\",\"id\":\"\\u0000\"}}",
        "{\"evaluations\":[]}",
        "{\"specversion\":\"1.0\",\"id\":\"\",\"source\":\"\",\"type\":\"\"}",
        "[{\"specversion\":\"1.0\",\"id\":\"\\u0000\",\"source\":\"/\\u0000\",\"type\":\"t\"}]",
        "grant_type=client_credentials&grant_type=x&client_id=%00&client_secret=%ff",
        "token=%00&token_type_hint=%ff",
        "a=%",
    ]
    .iter()
    .map(|b| b.as_bytes().to_vec())
    .collect();
    bodies.push(b"\xff\xfe{}".to_vec());
    bodies.push("[".repeat(50_000).into_bytes());
    bodies.push("{\"a\":".repeat(50_000).into_bytes());
    bodies.push(format!("{{\"name\":\"{}\"}}", "x".repeat(200_000)).into_bytes());
    bodies
}

/// A method, a path with its query, and a body with its type.
struct Shot {
    method: Method,
    path: String,
    sent: Option<(&'static str, Vec<u8>)>,
}

/// Every operation of the document, aimed at badly.
fn shots(document: &Value) -> Vec<Shot> {
    let mut shots = Vec::new();
    let bodies = bodies();
    for (template, item) in document["paths"].as_object().unwrap() {
        for method in
            item.as_object().unwrap().keys().filter_map(|m| Method::from_bytes(m.to_uppercase().as_bytes()).ok())
        {
            let aimed = |part: &str| {
                let mut path = template.clone();
                while let (Some(from), Some(to)) = (path.find('{'), path.find('}')) {
                    path.replace_range(from..=to, part);
                }
                path
            };
            let parts = if template.contains('{') { PARTS } else { &PARTS[..1] };
            shots.extend(parts.iter().map(|p| Shot { method: method.clone(), path: aimed(p), sent: None }));
            if matches!(method, Method::GET | Method::HEAD) {
                let query = |q: &&str| Shot { method: method.clone(), path: format!("{}?{q}", aimed("x")), sent: None };
                shots.extend(QUERIES.iter().map(query));
                continue;
            }
            for (i, body) in bodies.iter().enumerate() {
                // Each body as what it pretends to be, and as something else.
                for kind in [TYPES[0], TYPES[1 + i % (TYPES.len() - 1)]] {
                    let sent = Some((kind, body.clone()));
                    shots.push(Shot { method: method.clone(), path: aimed("x"), sent });
                }
            }
        }
    }
    shots
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_sent_is_refused_in_form_and_never_breaks_anything() {
    let db = database().await;
    let daemon = Launch::on(db.url()).env("SOP__SERVER__RATE", "1000000").start().await;
    let client = Client::of(&daemon);
    let (_, document) = client.get("/openapi.json").await;
    let shots = shots(&document);
    assert!(shots.len() > 2000, "the document lists the routes: {} shots", shots.len());
    let faults = stream::iter(&shots)
        .map(|shot| fault(&client, shot))
        .buffer_unordered(16)
        .filter_map(async |fault| fault)
        .collect::<Vec<String>>()
        .await;
    assert!(
        faults.is_empty(),
        "{} of {} shots hit:\n{}",
        faults.len(),
        shots.len(),
        faults[..faults.len().min(40)].join("\n")
    );
    let metrics = client.bare(Method::GET, "/metrics").send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains("\nsop_api_panics_total 0\n"), "something panicked");
    client.put("after", "all").await.unwrap();
    record::check(&db).await;
}

/// What is wrong with the answer to a shot, if something is.
async fn fault(client: &Client, shot: &Shot) -> Option<String> {
    let mut request = client.request(shot.method.clone(), &shot.path).await.header("sop-timeout", "0");
    if let Some((kind, body)) = &shot.sent {
        request = request.header("content-type", *kind).body(body.clone());
    }
    let shown = || {
        let body =
            shot.sent.as_ref().map(|(kind, b)| format!(" {kind} {:?}", String::from_utf8_lossy(&b[..b.len().min(80)])));
        format!("{} {}{}", shot.method, shot.path, body.unwrap_or_default())
    };
    let answer = match tokio::time::timeout(PATIENCE, request.send()).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(e)) => return Some(format!("{}: no answer: {e:?}", shown())),
        Err(_) => return Some(format!("{}: no answer in {PATIENCE:?}", shown())),
    };
    let (status, headers) = (answer.status(), answer.headers().clone());
    let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    if text("x-request-id").is_empty() || text("sop-index").is_empty() {
        return Some(format!("{}: {status} without X-Request-ID or Sop-Index", shown()));
    }
    // An index that is not reached in time is what was asked for.
    if status.is_server_error() && status != StatusCode::GATEWAY_TIMEOUT {
        return Some(format!("{}: {status} {}", shown(), answer.text().await.unwrap_or_default()));
    }
    let own_form = shot.path.starts_with("/oauth2/")
        || shot.path.starts_with("/access/")
        || shot.path.starts_with("/.well-known/");
    if status.is_client_error() && !own_form && shot.method != Method::HEAD {
        if text("content-type") != "application/problem+json" {
            return Some(format!("{}: {status} as {}", shown(), text("content-type")));
        }
        let problem: Value = answer.json().await.unwrap_or_default();
        if problem["status"] != status.as_u16() || !problem["type"].is_string() || !problem["title"].is_string() {
            return Some(format!("{}: {status} with {problem}", shown()));
        }
    }
    None
}
