//! The layers of a request: each counts what it refuses, and says why in the record.

use reqwest::{Method, Response};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::support::client::Client;
use crate::support::daemon::Launch;
use crate::support::postgres::database;
use crate::support::until;

fn field(answer: &Response, name: &str) -> String {
    answer.headers().get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
}

async fn registered(admin: &Client, wanted: Value) -> Client {
    let (status, made) = admin.json(Method::POST, "/oauth2/register", &wanted).await;
    assert_eq!(status, 201, "{made}");
    admin.with(made["client_id"].as_str().unwrap(), made["client_secret"].as_str().unwrap())
}

async fn get(client: &Client, path: &str) -> Response {
    client.request(Method::GET, path).await.send().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_says_what_is_left_and_types_and_clients_have_their_own_limits() {
    let db = database().await;
    let daemon = Launch::on(db.url())
        .env("SOP__TOKEN__AGENTS__EXTERNAL__HOURLY_REQUESTS", "5")
        .env("SOP__TOKEN__AGENTS__EXTERNAL__TTL", "120s")
        .env("SOP__SERVER__OPERATION_RATES", "GET /v1/state/kv 1000")
        .start()
        .await;
    let admin = Client::of(&daemon);
    let free = get(&admin, "/v1/state/kv").await;
    assert_eq!(field(&free, "ratelimit-policy"), "\"second\";q=20000;w=1, \"operation\";q=1000;w=1");
    assert!(field(&free, "ratelimit").starts_with("\"second\";r=1999"), "{}", field(&free, "ratelimit"));
    // By type; what it is called decides nothing.
    let external = registered(&admin, json!({"client_name": "SOP-system", "scope": "state"})).await;
    let system = registered(&admin, json!({"client_name": "external", "agent_type": "system"})).await;
    let first = get(&external, "/v1/state/kv").await;
    assert!(field(&first, "ratelimit-policy").ends_with("\"requests\";q=5;w=3600"), "{first:?}");
    assert!(field(&first, "ratelimit").contains("\"requests\";r=4;t=3"), "{}", field(&first, "ratelimit"));
    for _ in 0..4 {
        assert_eq!(get(&external, "/v1/state/kv").await.status(), 200);
    }
    let spent = get(&external, "/v1/state/kv").await;
    assert_eq!((spent.status().as_u16(), field(&spent, "content-type").as_str()), (429, "application/problem+json"));
    assert!(field(&spent, "retry-after").parse::<u64>().unwrap() > 3500, "when the hour is over");
    assert!(field(&spent, "ratelimit").contains("\"requests\";r=0"));
    for _ in 0..7 {
        assert_eq!(get(&system, "/v1/state/kv").await.status(), 200, "the type's own scope, and no quota");
    }
    // One client may have more than its type, or less.
    let own = json!({"scope": "state", "limits": {"hourly_requests": 0, "rate": 3}, "access_token_ttl": 60});
    let (_, made) = admin.json(Method::POST, "/oauth2/register", &own).await;
    assert_eq!((&made["limits"]["rate"], &made["access_token_ttl"]), (&json!(3), &json!(60)));
    let own = admin.with(made["client_id"].as_str().unwrap(), made["client_secret"].as_str().unwrap());
    own.token().await;
    let mut seen = Vec::new();
    for _ in 0..12 {
        seen.push(get(&own, "/v1/state/kv").await.status().as_u16());
    }
    assert!(seen.contains(&429) && seen.iter().filter(|s| **s == 200).count() >= 3, "{seen:?}");
    // With its own registration token a client cannot change them.
    let path = format!("/oauth2/register/{}", made["client_id"].as_str().unwrap());
    let manage = made["registration_access_token"].as_str().unwrap();
    let raised = json!({"scope": "state", "limits": {"rate": 1000}, "access_token_ttl": 60});
    let answer = admin.bare(Method::PUT, &path).bearer_auth(manage).json(&raised).send().await.unwrap();
    assert_eq!(answer.status(), 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn generations_and_verifications_have_hourly_quotas() {
    let db = database().await;
    let daemon = Launch::on(db.url())
        .env("SOP__TOKEN__AGENTS__EXTERNAL__HOURLY_GENERATIONS", "10")
        .env("SOP__TOKEN__AGENTS__EXTERNAL__HOURLY_VERIFICATIONS", "50")
        .start()
        .await;
    let admin = Client::of(&daemon);
    let (_, made) = admin.json(Method::POST, "/oauth2/register", &json!({"scope": "token"})).await;
    let (id, secret) = (made["client_id"].as_str().unwrap(), made["client_secret"].as_str().unwrap());
    let form = |path: &'static str, more: &'static [(&'static str, &'static str)]| {
        let request = admin.bare(Method::POST, path).basic_auth(id, Some(secret)).form(more);
        async move { request.send().await.unwrap() }
    };
    let grant = || form("/oauth2/token", &[("grant_type", "client_credentials")]);
    for _ in 0..7 {
        assert_eq!(grant().await.status(), 200);
    }
    // Two tokens left after this: a batch counts as many as it has.
    let client = admin.with(id, secret);
    client.token().await;
    let batch = |n: usize| json!({"items": vec![json!({"kind": "test", "operation": "x"}); n]});
    let issue = |n: usize| {
        let (client, body) = (client.clone_at_self(), batch(n));
        async move { client.json(Method::POST, "/v1/token/operations/batch", &body).await.0 }
    };
    assert_eq!((issue(3).await, issue(2).await), (429, 201));
    let refused = grant().await;
    assert_eq!(refused.status(), 429);
    assert!(
        field(&refused, "ratelimit").starts_with("\"generations\";r=0;t=")
            && !field(&refused, "retry-after").is_empty()
    );
    assert_eq!(refused.json::<Value>().await.unwrap()["error"], "temporarily_unavailable");
    for n in 0..51 {
        let answer = form("/oauth2/introspect", &[("token", "x")]).await;
        assert_eq!(answer.status(), if n < 50 { 200 } else { 429 }, "{n}");
    }
    assert_eq!(
        client.json(Method::POST, "/v1/token/operations/use", &json!({"token": "x", "operation": "y"})).await.0,
        429
    );
    let (_, text) = (0, get(&admin, "/metrics").await.text().await.unwrap());
    assert!(text.contains("sop_token_limited_total{quota=\"generations\"} 2"), "both refusals");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_layer_counts_what_it_refuses_and_says_why_in_the_record() {
    let db = database().await;
    let daemon = Launch::on(db.url())
        .env("SOP__SERVER__REFUSALS_INTERVAL", "1s")
        .env("SOP__SERVER__OPERATION_RATES", "GET /v1/token/clients 1")
        .start()
        .await;
    let admin = Client::of(&daemon);
    let reader = registered(&admin, json!({"scope": "state:read"})).await;
    // Transport.
    let address = daemon.url.strip_prefix("http://").unwrap();
    let mut raw = tokio::net::TcpStream::connect(address).await.unwrap();
    raw.write_all(b"\x16\x03\x01 this is no HTTP\r\n\r\n").await.unwrap();
    let _ = raw.read_to_end(&mut Vec::new()).await;
    // Limits, authentication, decision, schema.
    let mut limited = false;
    for _ in 0..20 {
        limited |= get(&admin, "/v1/token/clients").await.status() == 429;
    }
    assert!(limited);
    assert_eq!(admin.bare(Method::GET, "/v1/state/kv").bearer_auth("x").send().await.unwrap().status(), 401);
    assert_eq!(reader.json(Method::PUT, "/v1/state/kv/k", &json!(1)).await.0, 403);
    assert_eq!(admin.json(Method::POST, "/v1/token/operations", &json!({"nope": 1})).await.0, 400);
    let form = admin.bare(Method::POST, "/oauth2/token").form(&[("grant_type", "password")]).send().await.unwrap();
    assert_eq!(form.status(), 400);
    let text = get(&admin, "/metrics").await.text().await.unwrap();
    for (layer, reason) in [
        ("transport", "not-http"),
        ("limits", "rate-limited"),
        ("authentication", "unauthenticated"),
        ("decision", "denied"),
        ("schema", "malformed"),
        ("schema", "unsupported_grant_type"),
    ] {
        let line = format!("sop_api_refused_total{{layer=\"{layer}\",reason=\"{reason}\"}}");
        assert!(text.contains(&line), "{line} in {text}");
    }
    let seen = || async {
        let (_, page) = admin.get("/v1/audit/entries?action=api:refuse&limit=1000").await;
        let said = |e: &Value| {
            (e["details"]["change"]["layer"].as_str().unwrap().to_owned(), e["reason"].as_str().unwrap().to_owned())
        };
        page["items"].as_array().unwrap().iter().map(said).collect::<Vec<_>>()
    };
    let expected = [
        ("transport", "not-http"),
        ("limits", "rate-limited"),
        ("authentication", "unauthenticated"),
        ("schema", "malformed"),
        ("schema", "unsupported_grant_type"),
    ];
    until("an entry of each layer", || async {
        let seen = seen().await;
        expected.iter().all(|(layer, why)| seen.contains(&((*layer).to_owned(), (*why).to_owned())))
    })
    .await;
    let (_, denied) = admin.get("/v1/audit/entries?action=state:put&outcome=denied").await;
    assert_eq!(denied["items"].as_array().unwrap().len(), 1, "a decision is an entry of its own");
}
