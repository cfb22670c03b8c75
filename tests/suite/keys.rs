//! The keys that sign access tokens: announced, replaced, compromised, on several daemons.

use std::collections::BTreeSet;
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use sop::kernel::crypto::{from_base64url, verify_ed25519};

use crate::support::client::Client;
use crate::support::daemon::Launch;
use crate::support::postgres::database;
use crate::support::until;

async fn jwks(client: &Client) -> Vec<Value> {
    let answer = client.bare(Method::GET, "/.well-known/jwks.json").send().await.unwrap();
    assert_eq!(answer.headers()["cache-control"], "public, max-age=30");
    answer.json::<Value>().await.unwrap()["keys"].as_array().unwrap().clone()
}

fn kids(keys: &[Value]) -> BTreeSet<String> {
    keys.iter().map(|k| k["kid"].as_str().unwrap().to_owned()).collect()
}

fn header(token: &str) -> Value {
    serde_json::from_slice(&from_base64url(token.split('.').next().unwrap()).unwrap()).unwrap()
}

/// What a verifier does with the keys it has: whether one of them signed.
fn verifies(token: &str, keys: &[Value]) -> bool {
    let header = header(token);
    let Some(key) = keys.iter().find(|k| k["kid"] == header["kid"]) else { return false };
    let (signed, signature) = token.rsplit_once('.').unwrap();
    let part = |name: &str| from_base64url(key[name].as_str().unwrap()).unwrap();
    let signature = from_base64url(signature).unwrap();
    match key["alg"].as_str().unwrap() {
        "EdDSA" => verify_ed25519(&part("x"), signed.as_bytes(), &signature),
        "ES256" => {
            let point = [vec![4], part("x"), part("y")].concat();
            let key = ring::signature::UnparsedPublicKey::new(&ring::signature::ECDSA_P256_SHA256_FIXED, point);
            key.verify(signed.as_bytes(), &signature).is_ok()
        }
        other => panic!("{other}"),
    }
}

async fn issue(client: &Client, id: &str, secret: &str) -> String {
    let form = [("grant_type", "client_credentials"), ("client_id", id), ("client_secret", secret)];
    let answer = client.bare(Method::POST, "/oauth2/token").form(&form).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    answer.json::<Value>().await.unwrap()["access_token"].as_str().unwrap().to_owned()
}

async fn registered(admin: &Client, alg: Option<&str>) -> (String, String) {
    let mut wanted = json!({"client_name": "ARP", "scope": "state"});
    if let Some(alg) = alg {
        wanted["access_token_signed_response_alg"] = alg.into();
    }
    let (status, made) = admin.json(Method::POST, "/oauth2/register", &wanted).await;
    assert_eq!(status, 201, "{made}");
    assert_eq!(made["access_token_signed_response_alg"], alg.unwrap_or("EdDSA"));
    let text = |name: &str| made[name].as_str().unwrap().to_owned();
    (text("client_id"), text("client_secret"))
}

async fn status(client: &Client, token: &str) -> u16 {
    let request = client.bare(Method::GET, "/v1/state/kv/nothing").bearer_auth(token);
    request.send().await.unwrap().status().as_u16()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_is_answered_in_the_algorithm_it_registered() {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let admin = Client::of(&daemon);
    for alg in [None, Some("EdDSA"), Some("ES256")] {
        let (id, secret) = registered(&admin, alg).await;
        let token = issue(&admin, &id, &secret).await;
        assert_eq!(header(&token)["alg"], alg.unwrap_or("EdDSA"));
        assert!(verifies(&token, &jwks(&admin).await));
        assert_eq!(status(&admin, &token).await, 404, "it is let in");
    }
    let wanted = json!({"client_name": "x", "access_token_signed_response_alg": "HS256"});
    let (status, refused) = admin.json(Method::POST, "/oauth2/register", &wanted).await;
    assert_eq!((status, &refused["error"]), (400, &json!("invalid_client_metadata")));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_keeps_the_key_set_as_long_as_it_may_sees_no_failure_while_keys_are_replaced() {
    let db = database().await;
    let lead = Duration::from_secs(3);
    let one = Launch::on(db.url()).env("SOP__TOKEN__KEY_LEAD", "3s").start().await;
    let two = Launch::beside(&one, db.url()).env("SOP__TOKEN__KEY_LEAD", "3s").start().await;
    let admin = Client::of(&one);
    let other = admin.also_of(&two);
    let (id, secret) = registered(&admin, Some("ES256")).await;
    let before = issue(&other, &id, &secret).await;
    let old = jwks(&other).await;
    let (code, made) = admin.json(Method::POST, "/v1/token/signing-keys/rotate", &json!({})).await;
    assert_eq!(code, 201, "{made}");
    let announced = std::time::Instant::now();
    assert!(!kids(&old).contains(made["kid"].as_str().unwrap()));
    // A verifier that looked just before keeps what it has for two thirds of the lead, as with the defaults, then looks again.
    let mut known = old.clone();
    let mut signers = BTreeSet::new();
    let mut looked_again = false;
    until("the new keys to sign on both", || async { announced.elapsed() > lead * 2 / 3 }).await;
    while announced.elapsed() < lead * 2 {
        if !looked_again && announced.elapsed() >= lead * 2 / 3 {
            known = jwks(&other).await;
            assert_eq!(kids(&known).len(), kids(&old).len() + 2, "the old ones stay");
            looked_again = true;
        }
        for at in [&admin, &other] {
            let token = issue(at, &id, &secret).await;
            assert!(verifies(&token, &known), "{}", header(&token));
            assert_eq!(status(&admin, &token).await, 404);
            assert_eq!(status(&other, &token).await, 404);
            signers.insert(header(&token)["kid"].as_str().unwrap().to_owned());
        }
    }
    assert_eq!(signers.len(), 2, "it was replaced once: {signers:?}");
    assert_eq!(status(&other, &before).await, 404, "what the old one signed counts on");
    let (_, listed) = admin.get("/v1/token/signing-keys").await;
    let of = |s: &str| listed["items"].as_array().unwrap().iter().filter(|k| k["status"] == s).count();
    assert_eq!((of("active"), of("ending"), of("pending")), (2, 2, 0), "{listed}");
    let (_, entries) = admin.get("/v1/audit/entries?action=token:keys-rotate").await;
    assert_eq!(entries["items"][0]["details"]["change"]["keys"].as_array().unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_compromised_keys_signed_is_refused_by_the_next_request_on_any_daemon() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let two = Launch::beside(&one, db.url()).start().await;
    let admin = Client::of(&one);
    let other = admin.also_of(&two);
    let (id, secret) = registered(&admin, None).await;
    let stolen = issue(&other, &id, &secret).await;
    assert_eq!(status(&other, &stolen).await, 404);
    let old = kids(&jwks(&admin).await);
    let rotate = "/v1/token/signing-keys/rotate?immediately=true";
    let (code, made) = admin.json(Method::POST, rotate, &json!({})).await;
    assert_eq!(code, 201, "{made}");
    // The very next request, at the daemon that did not do it.
    assert_eq!(status(&other, &stolen).await, 401);
    let put = other.bare(Method::PUT, "/v1/state/kv/k").bearer_auth(&stolen).body("x").send().await.unwrap();
    assert_eq!(put.status(), 401);
    let form = [("client_id", id.as_str()), ("client_secret", secret.as_str()), ("token", stolen.as_str())];
    let seen = other.bare(Method::POST, "/oauth2/introspect").form(&form).send().await.unwrap();
    assert_eq!(seen.json::<Value>().await.unwrap(), json!({"active": false}));
    assert!(kids(&jwks(&other).await).is_disjoint(&old), "the old keys are not listed any more");
    let fresh = issue(&other, &id, &secret).await;
    assert_eq!(header(&fresh)["kid"], made["kid"]);
    assert_eq!(status(&admin, &fresh).await, 404);
    // The administrator's own token was signed by the old key too.
    let again = admin.also_of(&one);
    until("the incident", || async {
        let (_, incidents) = again.get("/v1/health/incidents").await;
        incidents.to_string().contains("token/signing-keys-compromised")
    })
    .await;
    let (refused, _) = {
        let (id, secret) = registered(&again, None).await;
        again.with(&id, &secret).json(Method::POST, rotate, &json!({})).await
    };
    assert_eq!(refused, 403, "not for everybody");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_replaced_when_they_are_old_once_for_all_daemons() {
    let db = database().await;
    let launch = Launch::on(db.url()).env("SOP__TOKEN__KEY_ROTATION", "2s").env("SOP__TOKEN__KEY_LEAD", "0s");
    let one = launch.start().await;
    let two = Launch::beside(&one, db.url())
        .env("SOP__TOKEN__KEY_ROTATION", "2s")
        .env("SOP__TOKEN__KEY_LEAD", "0s")
        .start()
        .await;
    let admin = Client::of(&one);
    let first = kids(&jwks(&admin).await);
    assert_eq!(first.len(), 2);
    until("two rotations", || async { jwks(&admin).await.len() >= 6 }).await;
    let (a, b) = (kids(&jwks(&admin).await), kids(&jwks(&admin.also_of(&two)).await));
    assert!(a.is_superset(&first) && b.is_superset(&first));
    let (_, page) = admin.get("/v1/audit/entries?action=token:keys-rotate&order=asc").await;
    let times: Vec<&str> = page["items"].as_array().unwrap().iter().map(|e| e["time"].as_str().unwrap()).collect();
    let seconds = |t: &str| t[17..23].parse::<f64>().unwrap() + 60.0 * t[14..16].parse::<f64>().unwrap();
    for pair in times.windows(2) {
        let apart = (seconds(pair[1]) - seconds(pair[0])).rem_euclid(3600.0);
        assert!(apart >= 1.9, "one rotation each time, not one a daemon: {times:?}");
    }
}
