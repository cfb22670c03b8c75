//! Clients whose keys are served elsewhere: fetched with limits, and never from inside unless that is allowed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use reqwest::Method;
use serde_json::{Value, json};
use sop::kernel::crypto::{SigningKey, base64url};
use tokio::sync::Mutex;

use crate::support::client::Client;
use crate::support::daemon::Launch;
use crate::support::postgres::database;
use crate::support::{record, until};

/// A server of key sets, on loopback.
#[derive(Clone)]
struct Keys {
    set: Arc<Mutex<Value>>,
    asked: Arc<AtomicUsize>,
    url: String,
}

impl Keys {
    async fn serve() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let keys = Self { set: Arc::default(), asked: Arc::default(), url: url.clone() };
        let own = keys.clone();
        let jwks = move || {
            let own = own.clone();
            async move {
                own.asked.fetch_add(1, Ordering::SeqCst);
                ([(header::CACHE_CONTROL, "max-age=3600")], own.set.lock().await.to_string())
            }
        };
        let elsewhere = format!("{url}/jwks");
        let redirect = move || {
            let to = elsewhere.clone();
            async move { (StatusCode::FOUND, [(header::LOCATION, to)]).into_response() }
        };
        let large = || async { format!("{{\"keys\": [], \"x\": \"{}\"}}", "x".repeat(100_000)) };
        let slow = || async {
            tokio::time::sleep(Duration::from_secs(60)).await;
            "{}"
        };
        let app = Router::new()
            .route("/jwks", get(jwks))
            .route("/redirect", get(redirect))
            .route("/large", get(large))
            .route("/slow", get(slow))
            .route("/garbage", get(|| async { "no JSON" }));
        tokio::spawn(async move { axum::serve(listener, app).await });
        keys
    }

    async fn hold(&self, keys: &[(&SigningKey, &str)]) {
        let jwk = |(key, kid): &(&SigningKey, &str)| json!({"kty": "OKP", "crv": "Ed25519", "x": base64url(key.public()), "kid": kid});
        *self.set.lock().await = json!({"keys": keys.iter().map(jwk).collect::<Vec<_>>()});
    }
}

async fn registered(admin: &Client, uri: &str) -> (u16, Value) {
    let wanted = json!({"scope": "state", "token_endpoint_auth_method": "private_key_jwt", "jwks_uri": uri});
    admin.json(Method::POST, "/oauth2/register", &wanted).await
}

async fn enters(at: &Client, aud: &str, id: &str, key: &SigningKey, kid: &str) -> u16 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let jti = uuid::Uuid::new_v4().to_string();
    let body = json!({"iss": id, "sub": id, "aud": aud, "exp": now + 60, "jti": jti});
    let signed =
        format!("{}.{}", base64url(json!({"alg": "EdDSA", "kid": kid}).to_string()), base64url(body.to_string()));
    let assertion = format!("{signed}.{}", base64url(key.sign(signed.as_bytes())));
    let pairs = [
        ("grant_type", "client_credentials"),
        ("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"),
        ("client_assertion", assertion.as_str()),
    ];
    at.bare(Method::POST, "/oauth2/token").form(&pairs).send().await.unwrap().status().as_u16()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_s_keys_are_fetched_when_they_are_wanted_and_no_oftener() {
    let db = database().await;
    let daemon = Launch::on(db.url())
        .env("SOP__TOKEN__JWKS_PRIVATE", "true")
        .env("SOP__TOKEN__LOCKOUT_FAILURES", "0")
        .start()
        .await;
    let admin = Client::of(&daemon);
    let keys = Keys::serve().await;
    let ((one, _), (two, _)) = (SigningKey::generate().unwrap(), SigningKey::generate().unwrap());
    keys.hold(&[(&one, "one")]).await;
    let (status, made) = registered(&admin, &format!("{}/jwks", keys.url)).await;
    assert_eq!((status, made["jwks_uri"].as_str()), (201, Some(format!("{}/jwks", keys.url).as_str())), "{made}");
    let id = made["client_id"].as_str().unwrap();
    assert_eq!(keys.asked.load(Ordering::SeqCst), 0, "not before they are wanted");
    for _ in 0..5 {
        assert_eq!(enters(&admin, &daemon.url, id, &one, "one").await, 200);
    }
    assert_eq!(enters(&admin, &daemon.url, id, &two, "one").await, 401, "another's key");
    assert_eq!(keys.asked.load(Ordering::SeqCst), 1, "kept");
    // Whoever asks for keys that are not there makes the daemon ask again, and only once in a while.
    for n in 0..20 {
        assert_eq!(enters(&admin, &daemon.url, id, &two, &format!("guess-{n}")).await, 401);
    }
    assert!(keys.asked.load(Ordering::SeqCst) <= 2);
    // A key that replaces the other is found by its id.
    keys.hold(&[(&two, "two")]).await;
    until("the new key to be found", || async { enters(&admin, &daemon.url, id, &two, "two").await == 200 }).await;
    assert_eq!(enters(&admin, &daemon.url, id, &one, "one").await, 401, "the one before is gone");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_key_set_or_lies_inside_is_not_fetched() {
    let db = database().await;
    let open = Launch::on(db.url()).env("SOP__TOKEN__JWKS_PRIVATE", "true").start().await;
    let shut = Launch::beside(&open, db.url()).start().await;
    let admin = Client::of(&open);
    let keys = Keys::serve().await;
    let (key, _) = SigningKey::generate().unwrap();
    keys.hold(&[(&key, "k")]).await;
    for path in ["redirect", "large", "slow", "garbage", "missing"] {
        let (_, made) = registered(&admin, &format!("{}/{path}", keys.url)).await;
        assert_eq!(enters(&admin, &open.url, made["client_id"].as_str().unwrap(), &key, "k").await, 401, "{path}");
    }
    assert_eq!(keys.asked.load(Ordering::SeqCst), 0, "a redirect is not followed");
    // The other daemon is not allowed to go there, whoever registered it.
    let (_, made) = registered(&admin, &format!("{}/jwks", keys.url)).await;
    let id = made["client_id"].as_str().unwrap();
    let there = admin.also_of(&shut);
    assert_eq!(enters(&there, &open.url, id, &key, "k").await, 401);
    assert_eq!(keys.asked.load(Ordering::SeqCst), 0);
    assert_eq!(enters(&admin, &open.url, id, &key, "k").await, 200);
    for uri in
        ["https://127.0.0.1/jwks", "https://169.254.169.254/latest", "https://[fd00::1]/", "http://keys.example/"]
    {
        let (status, refused) = registered(&there, uri).await;
        assert_eq!((status, refused["error"].as_str()), (400, Some("invalid_client_metadata")), "{uri}");
    }
    // A name that stands for an address inside is found out when it is resolved.
    let (status, made) = registered(&there, "https://localhost/jwks").await;
    assert_eq!(status, 201);
    assert_eq!(enters(&there, &open.url, made["client_id"].as_str().unwrap(), &key, "k").await, 401);
    assert!(shut.log().contains("stands for no public address"), "{}", shut.log());
    record::check(&db).await;
}
