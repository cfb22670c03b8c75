//! Looking after clients: ending their tokens, disabling them, seeing when they were last used.

use reqwest::Method;
use serde_json::{Value, json};

use crate::ledger::metric;
use crate::support::client::Client;
use crate::support::daemon::Launch;
use crate::support::postgres::database;
use crate::support::proxy::{Fault, Proxy};
use crate::support::{record, until};

const EXCHANGE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
const ACCESS: &str = "urn:ietf:params:oauth:token-type:access_token";

struct Registered {
    id: String,
    secret: String,
}

async fn registered(admin: &Client, name: &str) -> Registered {
    let wanted = json!({"client_name": name, "scope": "state", "grant_types": ["client_credentials", EXCHANGE]});
    let (status, made) = admin.json(Method::POST, "/oauth2/register", &wanted).await;
    assert_eq!(status, 201, "{made}");
    let text = |name: &str| made[name].as_str().unwrap().to_owned();
    Registered { id: text("client_id"), secret: text("client_secret") }
}

async fn grant(at: &Client, who: &Registered, pairs: &[(&str, &str)]) -> (u16, Value) {
    let request = at.bare(Method::POST, "/oauth2/token").basic_auth(&who.id, Some(&who.secret)).form(pairs);
    let answer = request.send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

async fn token(at: &Client, who: &Registered) -> String {
    let (status, got) = grant(at, who, &[("grant_type", "client_credentials")]).await;
    assert_eq!(status, 200, "{got}");
    got["access_token"].as_str().unwrap().to_owned()
}

async fn exchanged(at: &Client, who: &Registered, subject: &str) -> String {
    let pairs = [("grant_type", EXCHANGE), ("subject_token", subject), ("subject_token_type", ACCESS)];
    let (status, got) = grant(at, who, &pairs).await;
    assert_eq!(status, 200, "{got}");
    got["access_token"].as_str().unwrap().to_owned()
}

/// What a daemon answers a read with this token.
async fn enters(at: &Client, token: &str) -> u16 {
    at.bare(Method::GET, "/v1/state/kv").bearer_auth(token).send().await.unwrap().status().as_u16()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_token_a_family_or_all_of_a_client_end_in_one_commit_on_every_daemon() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let two = Launch::beside(&one, db.url()).start().await;
    let admin = Client::of(&one);
    let other = admin.also_of(&two);
    let (a, b) = (registered(&admin, "a").await, registered(&admin, "b").await);
    let revoke = |body: Value| {
        let admin = &admin;
        async move { admin.json(Method::POST, "/v1/token/revocations", &body).await }
    };
    // A family: named by its last member, it ends from its first on.
    let (first, beside) = (token(&admin, &a).await, token(&other, &a).await);
    let second = exchanged(&other, &b, &first).await;
    let third = exchanged(&admin, &a, &second).await;
    let (status, ended) = revoke(json!({"token": third, "family": true, "reason": "leaked"})).await;
    assert_eq!((status, ended["client_id"].as_str()), (201, Some(a.id.as_str())), "{ended}");
    for token in [&first, &second, &third] {
        assert_eq!((enters(&other, token).await, enters(&admin, token).await), (401, 401));
    }
    assert_eq!(enters(&other, &beside).await, 200, "another family");
    // One of which only the id is known: it is in the record of its issue.
    let lone = token(&other, &a).await;
    let (_, page) = admin.get(&format!("/v1/audit/entries?action=token:issue&actor={}", a.id)).await;
    let jti = page["items"][0]["details"]["change"]["jti"].clone();
    assert_eq!(revoke(json!({"client_id": a.id, "jti": jti})).await.0, 201);
    assert_eq!((enters(&other, &lone).await, enters(&other, &beside).await), (401, 200));
    assert_eq!(revoke(json!({"client_id": a.id, "jti": jti})).await.0, 409, "once");
    // All of a client, and what others have in its name; what it gets afterwards is good, in the same second too.
    let acting = exchanged(&admin, &b, &beside).await;
    let of_b = token(&admin, &b).await;
    assert_eq!(revoke(json!({"client_id": a.id})).await.0, 201);
    let after = token(&other, &a).await;
    assert_eq!((enters(&other, &beside).await, enters(&other, &acting).await), (401, 401));
    assert_eq!((enters(&other, &after).await, enters(&other, &of_b).await), (200, 200));
    let (_, page) = admin.get("/v1/audit/entries?action=token:revoke&outcome=ok").await;
    assert_eq!(page["items"].as_array().unwrap().len(), 3, "an entry each");
    for (bad, expected) in [
        (json!({}), 400),
        (json!({"token": after, "client_id": a.id}), 400),
        (json!({"client_id": a.id, "family": true}), 400),
        (json!({"client_id": "nobody"}), 404),
        (json!({"token": "garbage"}), 404),
    ] {
        assert_eq!(revoke(bad.clone()).await.0, expected, "{bad}");
    }
    let mine = admin.with(&b.id, &b.secret);
    assert_eq!(mine.json(Method::POST, "/v1/token/revocations", &json!({"client_id": a.id})).await.0, 403);
    assert_eq!(enters(&admin, &after).await, 200);
    record::check(&db).await;
}

/// The moment in which a daemon shows a client's registration and does not say yet that it reflects its index is held open: what
/// ended the client's tokens and a new signing key reach it at once, and the key is read last.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_given_right_after_all_were_ended_is_good() {
    let db = database().await;
    let proxy = Proxy::before(&db);
    let one = Launch::on(db.url()).start().await;
    let two = Launch::beside(&one, db.url_via(&proxy)).start().await;
    let admin = Client::of(&one);
    let other = admin.also_of(&two);
    let a = registered(&admin, "a").await;
    let had = token(&other, &a).await;
    let behind = proxy.arm(Fault::hold_before().on("governance.entity_history"));
    registered(&admin, "b").await;
    behind.hit().await;
    assert_eq!(admin.json(Method::POST, "/v1/token/revocations", &json!({"client_id": a.id})).await.0, 201);
    let (status, rotated) = admin.json(Method::POST, "/v1/token/signing-keys/rotate", &json!({})).await;
    assert!((200..300).contains(&status), "{rotated}");
    let within = proxy.arm(Fault::hold_before().on("from token.signing_keys"));
    behind.release();
    within.hit().await;
    // Once the registration was looked at, what is given on it is decided again, for it changed after what the daemon reflects.
    let stale = "sop_ledger_stale_permits_total";
    let before = metric(&other, stale).await;
    let (got, ()) = tokio::join!(token(&other, &a), async {
        until("the issue to wait", async || metric(&other, stale).await > before).await;
        within.release();
    });
    for daemon in [&other, &admin] {
        assert_eq!((enters(daemon, &had).await, enters(daemon, &got).await), (401, 200));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_client_has_no_tokens_and_gets_none() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let two = Launch::beside(&one, db.url()).start().await;
    let admin = Client::of(&one);
    let other = admin.also_of(&two);
    let a = registered(&admin, "a").await;
    let had = token(&other, &a).await;
    let wrong = Registered { id: a.id.clone(), secret: "wrong".to_owned() };
    let refused = grant(&other, &wrong, &[("grant_type", "client_credentials")]).await;
    let path = |what: &str| format!("/v1/token/clients/{}/{what}", a.id);
    assert_eq!(admin.json(Method::POST, &path("disable"), &json!({"reason": "retired"})).await.0, 204);
    assert_eq!(enters(&other, &had).await, 401);
    assert_eq!(grant(&other, &a, &[("grant_type", "client_credentials")]).await, refused, "as a wrong secret is");
    assert_eq!(admin.json(Method::POST, &path("disable"), &json!({})).await.0, 409);
    assert_eq!(other.get(&format!("/v1/token/clients/{}", a.id)).await.1["disabled"], true);
    assert_eq!(other.json(Method::POST, &path("enable"), &json!({})).await.0, 204);
    assert_eq!(enters(&admin, &had).await, 401, "what it had stays ended");
    let has = token(&admin, &a).await;
    assert_eq!(enters(&other, &has).await, 200);
    let mine = admin.with(&a.id, &a.secret);
    assert_eq!(mine.json(Method::POST, &path("disable"), &json!({})).await.0, 403);
    assert_eq!(admin.json(Method::POST, "/v1/token/clients/nobody/disable", &json!({})).await.0, 404);
    let (_, page) = admin.get("/v1/audit/entries?action=token:client-disable&outcome=ok").await;
    assert_eq!((page["items"].as_array().unwrap().len(), page["items"][0]["reason"].as_str()), (1, Some("retired")));
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_shown_when_a_client_was_last_used_on_any_daemon() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let two = Launch::beside(&one, db.url()).start().await;
    let admin = Client::of(&one);
    let other = admin.also_of(&two);
    let (a, b) = (registered(&admin, "a").await, registered(&admin, "b").await);
    let shown = |id: String| {
        let admin = &admin;
        async move { admin.get(&format!("/v1/token/clients/{id}")).await.1 }
    };
    assert_eq!(shown(a.id.clone()).await["last_used_at"], Value::Null, "never");
    let token = token(&other, &a).await;
    until("the first daemon to know", || async { shown(a.id.clone()).await["last_used_at"].is_string() }).await;
    let first = shown(a.id.clone()).await["last_used_at"].as_str().unwrap().to_owned();
    assert_eq!(enters(&admin, &token).await, 200);
    assert!(shown(a.id.clone()).await["last_used_at"].as_str().unwrap() > first.as_str(), "by a token as well");
    assert_eq!(shown(b.id.clone()).await["last_used_at"], Value::Null, "nobody else");
    let (_, page) = admin.get("/v1/token/clients?limit=2").await;
    assert_eq!(page["items"].as_array().unwrap().len(), 2);
    let (_, rest) = admin.get(&format!("/v1/token/clients?limit=2&after={}", page["next"].as_str().unwrap())).await;
    assert_eq!((rest["items"].as_array().unwrap().len(), &rest["next"]), (1, &Value::Null));
    assert!(!page.to_string().contains("secret\":"));
    assert_eq!(admin.with(&a.id, &a.secret).get("/v1/token/clients").await.0, 403);
    record::check(&db).await;
}
