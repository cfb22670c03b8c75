//! Token exchange (RFC 8693): down-scoping only, the chain of who acts for whom, and families that end together.

use reqwest::Method;
use serde_json::{Value, json};
use sop::kernel::crypto::from_base64url;

use crate::support::client::Client;
use crate::support::daemon::Launch;
use crate::support::postgres::database;

const GRANT: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
const ACCESS: &str = "urn:ietf:params:oauth:token-type:access_token";

struct Registered {
    id: String,
    secret: String,
}

async fn registered(admin: &Client, name: &str, scope: &str, more: Value) -> Registered {
    let mut wanted = json!({"client_name": name, "scope": scope, "grant_types": ["client_credentials", GRANT]});
    for (name, value) in more.as_object().unwrap() {
        wanted[name] = value.clone();
    }
    let (status, made) = admin.json(Method::POST, "/oauth2/register", &wanted).await;
    assert_eq!(status, 201, "{made}");
    let text = |name: &str| made[name].as_str().unwrap().to_owned();
    Registered { id: text("client_id"), secret: text("client_secret") }
}

async fn ask(at: &Client, who: &Registered, pairs: &[(&str, &str)]) -> (u16, Value) {
    let request = at.bare(Method::POST, "/oauth2/token").basic_auth(&who.id, Some(&who.secret)).form(pairs);
    let answer = request.send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

async fn own(at: &Client, who: &Registered, more: &[(&str, &str)]) -> String {
    let (status, got) = ask(at, who, &[&[("grant_type", "client_credentials")], more].concat()).await;
    assert_eq!(status, 200, "{got}");
    got["access_token"].as_str().unwrap().to_owned()
}

async fn exchange(at: &Client, who: &Registered, token: &str, more: &[(&str, &str)]) -> (u16, Value) {
    let pairs = [("grant_type", GRANT), ("subject_token", token), ("subject_token_type", ACCESS)];
    ask(at, who, &[&pairs, more].concat()).await
}

async fn exchanged(at: &Client, who: &Registered, token: &str) -> String {
    let (status, got) = exchange(at, who, token, &[]).await;
    assert_eq!(status, 200, "{got}");
    got["access_token"].as_str().unwrap().to_owned()
}

fn claims(token: &str) -> Value {
    serde_json::from_slice(&from_base64url(token.split('.').nth(1).unwrap()).unwrap()).unwrap()
}

async fn status(at: &Client, token: &str) -> u16 {
    at.bare(Method::GET, "/v1/state/kv/k").bearer_auth(token).send().await.unwrap().status().as_u16()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_handed_a_token_acts_for_its_subject_and_is_named_in_the_record() {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let admin = Client::of(&daemon);
    let user = registered(&admin, "user", "state audit:read", json!({})).await;
    let agent = registered(&admin, "agent", "nexus", json!({})).await;
    let handed = own(&admin, &user, &[]).await;
    let (code, got) = exchange(&admin, &agent, &handed, &[("scope", "state")]).await;
    assert_eq!(code, 200, "{got}");
    assert_eq!(
        (&got["issued_token_type"], &got["token_type"], &got["scope"]),
        (&json!(ACCESS), &json!("Bearer"), &json!("state"))
    );
    let token = got["access_token"].as_str().unwrap();
    let said = claims(token);
    assert_eq!(
        (&said["sub"], &said["client_id"], &said["act"]),
        (&json!(user.id), &json!(agent.id), &json!({"sub": agent.id}))
    );
    assert!(said["exp"].as_i64().unwrap() <= claims(&handed)["exp"].as_i64().unwrap(), "never longer");

    let put = admin.bare(Method::PUT, "/v1/state/kv/k").bearer_auth(token).body("v").send().await.unwrap();
    assert_eq!(put.status(), 200);
    let index = put.json::<Value>().await.unwrap()["index"].as_i64().unwrap();
    let (_, entry) = admin.get(&format!("/v1/audit/entries/{index}")).await;
    assert_eq!((&entry["actor"], &entry["details"]["via"]), (&json!(user.id), &json!([agent.id])), "{entry}");
    let read = admin.bare(Method::GET, "/v1/audit/entries").bearer_auth(token).send().await.unwrap();
    assert_eq!(read.status(), 403, "what was left out is not there");
    let (_, page) = admin.get("/v1/audit/entries?action=token:exchange").await;
    let change = &page["items"][0]["details"]["change"];
    assert_eq!((&change["act"], &change["family"]), (&json!([agent.id]), &json!([claims(&handed)["jti"]])));

    // An actor's token says who acts; the form's client only carries it.
    let worker = registered(&admin, "worker", "nexus", json!({})).await;
    let actor = own(&admin, &worker, &[]).await;
    let (code, got) = exchange(&admin, &agent, &handed, &[("actor_token", &actor), ("actor_token_type", ACCESS)]).await;
    assert_eq!(code, 200, "{got}");
    assert_eq!(claims(got["access_token"].as_str().unwrap())["act"], json!({"sub": worker.id}));
    // For another service, which may take it on from there.
    let (code, got) = exchange(&admin, &agent, &handed, &[("audience", &worker.id)]).await;
    assert_eq!(code, 200, "{got}");
    let passed = got["access_token"].as_str().unwrap();
    assert_eq!(claims(passed)["aud"], json!(worker.id));
    assert_eq!(status(&admin, passed).await, 401, "it is not for this daemon");
    let taken = exchanged(&admin, &worker, passed).await;
    assert_eq!(claims(&taken)["act"], json!({"sub": worker.id, "act": {"sub": agent.id}}));
    let metadata = admin.bare(Method::GET, "/.well-known/oauth-authorization-server").send().await.unwrap();
    assert!(metadata.text().await.unwrap().contains(GRANT));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_gained_by_an_exchange() {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let admin = Client::of(&daemon);
    let user = registered(&admin, "user", "state:read", json!({})).await;
    let agent = registered(&admin, "agent", "admin", json!({"allowed_resources": ["https://one.example"]})).await;
    let plain = registered(&admin, "plain", "state", json!({"grant_types": ["client_credentials"]})).await;
    let handed = own(&admin, &user, &[]).await;
    let elsewhere = own(&admin, &user, &[("resource", "https://other.example")]).await;
    let ended = own(&admin, &user, &[]).await;
    let form = [("token", ended.as_str())];
    let revoke = admin.bare(Method::POST, "/oauth2/revoke").basic_auth(&user.id, Some(&user.secret)).form(&form);
    assert_eq!(revoke.send().await.unwrap().status(), 200);
    let error = |got: (u16, Value)| (got.0, got.1["error"].as_str().unwrap_or_default().to_owned());
    let refused = |name: &str| (400, name.to_owned());
    for wider in ["admin", "state", "state:read state:write"] {
        assert_eq!(
            error(exchange(&admin, &agent, &handed, &[("scope", wider)]).await),
            refused("invalid_scope"),
            "{wider}"
        );
    }
    assert_eq!(error(exchange(&admin, &plain, &handed, &[]).await), refused("unauthorized_client"));
    // A client cannot register itself for it.
    let (_, made) = admin.json(Method::POST, "/oauth2/register", &json!({"client_name": "p", "scope": "state"})).await;
    for more in [json!({"grant_types": ["client_credentials", GRANT]}), json!({"agent_type": "system"})] {
        let mut wanted = json!({"client_name": "p", "scope": "state"});
        wanted.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let path = format!("/oauth2/register/{}", made["client_id"].as_str().unwrap());
        let token = made["registration_access_token"].as_str().unwrap();
        let update = admin.bare(Method::PUT, &path).bearer_auth(token).json(&wanted).send().await.unwrap();
        assert_eq!(update.status(), 400, "{wanted}");
    }
    for token in ["", "x", ended.as_str(), elsewhere.as_str(), &format!("{handed}=")] {
        assert_eq!(error(exchange(&admin, &agent, token, &[]).await), refused("invalid_request"), "{token}");
    }
    for more in [
        ("requested_token_type", "urn:ietf:params:oauth:token-type:refresh_token"),
        ("actor_token", "x"),
        ("actor_token_type", ACCESS),
    ] {
        assert_eq!(error(exchange(&admin, &agent, &handed, &[more]).await), refused("invalid_request"), "{more:?}");
    }
    let untyped = [("grant_type", GRANT), ("subject_token", handed.as_str())];
    assert_eq!(error(ask(&admin, &agent, &untyped).await), refused("invalid_request"));
    let saml = [untyped[0], untyped[1], ("subject_token_type", "urn:ietf:params:oauth:token-type:saml2")];
    assert_eq!(error(ask(&admin, &agent, &saml).await), refused("invalid_request"));
    for target in ["https://two.example", "nobody", "/x", "https://one.example#f"] {
        for name in ["resource", "audience"] {
            assert_eq!(
                error(exchange(&admin, &agent, &handed, &[(name, target)]).await),
                refused("invalid_target"),
                "{name}={target}"
            );
        }
    }
    assert_eq!(exchange(&admin, &agent, &handed, &[("resource", "https://one.example")]).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_has_an_end_and_a_family_ends_together_on_every_daemon() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let two = Launch::beside(&one, db.url()).start().await;
    let admin = Client::of(&one);
    let other = admin.also_of(&two);
    let user = registered(&admin, "user", "state", json!({})).await;
    let agents = [registered(&admin, "a", "state", json!({})).await, registered(&admin, "b", "state", json!({})).await];
    let root = own(&admin, &user, &[]).await;
    let mut line = vec![root.clone()];
    for i in 0..5 {
        let next = exchanged(&other, &agents[i % 2], line.last().unwrap()).await;
        line.push(next);
    }
    let deepest = line.last().unwrap();
    let (code, refused) = exchange(&other, &agents[1], deepest, &[]).await;
    assert_eq!((code, &refused["error"]), (400, &json!("invalid_request")));
    for token in &line {
        assert_eq!(status(&other, token).await, 404, "good, and no such key");
    }
    // One in the middle is revoked by the client it was issued to: it ends, and all that came of it.
    let form = [("token", line[3].as_str())];
    let revoke =
        admin.bare(Method::POST, "/oauth2/revoke").basic_auth(&agents[0].id, Some(&agents[0].secret)).form(&form);
    assert_eq!(revoke.send().await.unwrap().status(), 200);
    let mut seen = Vec::new();
    for token in &line {
        seen.push(status(&other, token).await);
    }
    assert_eq!(seen, [404, 404, 404, 401, 401, 401]);
    let (code, _) = exchange(&other, &agents[1], &line[4], &[]).await;
    assert_eq!(code, 400);
    // Without its subject there is nobody to act for.
    let gone = admin.request(Method::DELETE, &format!("/oauth2/register/{}", user.id)).await.send().await.unwrap();
    assert_eq!(gone.status(), 204);
    for token in &line[..3] {
        assert_eq!(status(&other, token).await, 401);
    }
}
