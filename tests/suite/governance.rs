//! Policy over HTTP: what is permitted, what is denied and recorded, AuthZEN.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::postgres::{Database, database};
use crate::support::record;

async fn start() -> (Database, Daemon, Client) {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    (db, daemon, client)
}

async fn client(admin: &Client, scope: &str) -> (String, Client) {
    let (status, made) = admin.json(Method::POST, "/oauth2/register", &json!({"scope": scope})).await;
    assert_eq!(status, 201);
    let id = made["client_id"].as_str().unwrap().to_owned();
    let client = admin.with(&id, made["client_secret"].as_str().unwrap());
    (id, client)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scope_gives_what_it_says_and_a_denial_is_recorded() {
    let (db, _daemon, admin) = start().await;
    let (id, reader) = client(&admin, "state:read").await;
    admin.put("a", "v").await.unwrap();
    assert_eq!(reader.request(Method::GET, "/v1/state/kv/a").await.send().await.unwrap().status(), 200);
    let denied = reader.request(Method::PUT, "/v1/state/kv/a").await.body("w").send().await.unwrap();
    assert_eq!(denied.status(), 403);
    let index: i64 = denied.headers()["sop-index"].to_str().unwrap().parse().unwrap();
    let body: Value = denied.json().await.unwrap();
    assert_eq!(body["type"], "/problems/denied");
    let (_, entry) = admin.get(&format!("/v1/audit/entries/{index}")).await;
    assert_eq!(
        (entry["outcome"].as_str(), entry["action"].as_str(), entry["actor"].as_str()),
        (Some("denied"), Some("state:put"), Some(id.as_str()))
    );
    assert_eq!(entry["details"]["decision"]["id"], body["decision"], "the decision is in it");
    for (method, path) in [
        (Method::GET, "/v1/audit/entries"),
        (Method::GET, "/v1/token/operations"),
        (Method::GET, "/log/tile/entries/000.p/1"),
        (Method::PUT, "/v1/governance/entities/user/x"),
    ] {
        let answer = reader.request(method, path).await.json(&json!({})).send().await.unwrap();
        assert_eq!(answer.status(), 403, "{path}");
    }
    let (_, page) = admin.get(&format!("/v1/audit/entries?actor={id}&outcome=denied")).await;
    assert_eq!(page["items"].as_array().unwrap().len(), 5);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_mutation_carries_its_decision() {
    let (db, _daemon, admin) = start().await;
    let index = admin.put("a", "v").await.unwrap();
    let (_, entry) = admin.get(&format!("/v1/audit/entries/{index}")).await;
    let decision = &entry["details"]["decision"];
    assert_eq!((decision["policies"][0].as_str(), decision["action"].as_str()), (Some("admin"), Some("state:put")));
    assert_eq!(decision["resource"], json!({"type": "Sop::Key", "id": "a"}));
    assert!(decision["at"].as_i64().unwrap() < index);
    record::check(&db).await;
}

fn question(client: &str, action: &str, key: &str) -> Value {
    json!({"subject": {"type": "Sop::Client", "id": client}, "action": {"name": action}, "resource": {"type": "Sop::Key", "id": key}})
}

#[tokio::test(flavor = "multi_thread")]
async fn evaluations_answer_and_are_in_the_record() {
    let (db, _daemon, admin) = start().await;
    let (id, _) = client(&admin, "state:read").await;
    let (status, yes) = admin.json(Method::POST, "/access/v1/evaluation", &question(&id, "state:get", "a")).await;
    assert_eq!((status, &yes["decision"], &yes["context"]["policies"]), (200, &json!(true), &json!(["state:read"])));
    let (_, no) = admin.json(Method::POST, "/access/v1/evaluation", &question(&id, "state:put", "a")).await;
    assert_eq!(no["decision"], json!(false));
    let (_, nobody) = admin.json(Method::POST, "/access/v1/evaluation", &json!({"subject": {"type": "user", "id": "x"}, "action": {"name": "fly"}, "resource": {"type": "sky", "id": "y"}, "more": 1})).await;
    assert_eq!(nobody["decision"], json!(false), "what no policy permits is denied, and unknown members are ignored");
    let (status, kept) =
        admin.get(&format!("/v1/governance/decisions/{}", no["context"]["decision_id"].as_str().unwrap())).await;
    assert_eq!((status, &kept["index"], &kept["decision"]), (200, &no["context"]["index"], &json!(false)), "{kept}");
    for bad in [
        json!([]),
        json!({}),
        json!({"subject": "x"}),
        json!({"subject": {"type": "user", "id": "x"}, "action": {"name": 3}, "resource": {"type": "a", "id": "b"}}),
    ] {
        assert_eq!(admin.json(Method::POST, "/access/v1/evaluation", &bad).await.0, 400, "{bad}");
    }
    let plain = admin
        .request(Method::POST, "/access/v1/evaluation")
        .await
        .header("content-type", "text/plain")
        .body("{}")
        .send()
        .await
        .unwrap();
    assert_eq!(plain.status(), 400);
    assert_eq!(
        admin
            .bare(Method::POST, "/access/v1/evaluation")
            .json(&question(&id, "state:get", "a"))
            .send()
            .await
            .unwrap()
            .status(),
        401
    );
    let host: Value =
        admin.bare(Method::GET, "/.well-known/authzen-configuration").send().await.unwrap().json().await.unwrap();
    assert!(host["access_evaluation_endpoint"].as_str().unwrap().ends_with("/access/v1/evaluation"));
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_merge_defaults_and_stop_as_asked() {
    let (db, _daemon, admin) = start().await;
    let (id, _) = client(&admin, "state:read").await;
    let mut batch = question(&id, "state:get", "a");
    batch["evaluations"] =
        json!([{}, {"action": {"name": "state:put"}}, {"resource": 3}, {"action": {"name": "state:list"}}]);
    let decisions = |answer: &Value| {
        answer["evaluations"].as_array().unwrap().iter().map(|e| e["decision"].as_bool().unwrap()).collect::<Vec<_>>()
    };
    let (_, all) = admin.json(Method::POST, "/access/v1/evaluations", &batch).await;
    assert_eq!(decisions(&all), [true, false, false, true]);
    assert!(all["evaluations"][2]["context"]["error"].is_object(), "a broken item stays in its place");
    let ids: std::collections::HashSet<_> =
        [0, 1, 3].iter().map(|i| all["evaluations"][*i]["context"]["decision_id"].to_string()).collect();
    assert_eq!(ids.len(), 3);
    batch["options"] = json!({"evaluations_semantic": "deny_on_first_deny"});
    assert_eq!(decisions(&admin.json(Method::POST, "/access/v1/evaluations", &batch).await.1), [true, false]);
    batch["options"] = json!({"evaluations_semantic": "permit_on_first_permit"});
    assert_eq!(decisions(&admin.json(Method::POST, "/access/v1/evaluations", &batch).await.1), [true]);
    batch["options"] = json!({"evaluations_semantic": "guess"});
    assert_eq!(admin.json(Method::POST, "/access/v1/evaluations", &batch).await.0, 400);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn entities_are_put_read_and_deleted() {
    let (db, _daemon, admin) = start().await;
    let path = "/v1/governance/entities/user/alice%40x";
    let (status, put) =
        admin.json(Method::PUT, path, &json!({"attrs": {"level": 3}, "parents": [{"type": "group", "id": "g"}]})).await;
    assert_eq!((status, put["id"].as_str()), (200, Some("alice@x")));
    assert_eq!(admin.get(path).await.1["attrs"]["level"], 3);
    let cycle = json!({"parents": [{"type": "user", "id": "alice@x"}]});
    let (status, refused) = admin.json(Method::PUT, "/v1/governance/entities/group/g", &cycle).await;
    assert_eq!((status, refused["errors"][0]["pointer"].as_str()), (422, Some("/parents")));
    for (path, body, want) in [
        ("/v1/governance/entities/not%20a%20type/x", json!({}), 400),
        ("/v1/governance/entities/user/x", json!({"attrs": {"a": null}}), 400),
        ("/v1/governance/entities/user/x", json!({"nope": 1}), 400),
        ("/v1/governance/entities/Sop::Client/x", json!({}), 422),
    ] {
        assert_eq!(admin.json(Method::PUT, path, &body).await.0, want, "{path} {body}");
    }
    assert_eq!(admin.json(Method::DELETE, path, &json!({})).await.0, 200);
    assert_eq!(admin.get(path).await.0, 404);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_about_whoever_bears_a_token_is_about_what_the_token_says() {
    let (db, _daemon, admin, _) = crate::policy::start().await;
    let client = crate::policy::client(&admin, "state nexus").await;
    let (id, secret) = client.credential();
    let form = [("grant_type", "client_credentials"), ("scope", "nexus")];
    let request = admin.bare(Method::POST, "/oauth2/token").basic_auth(&id, Some(&secret)).form(&form);
    let narrow: Value = request.send().await.unwrap().json().await.unwrap();
    let narrow = narrow["access_token"].as_str().unwrap().to_owned();
    let asks = |properties: Value| json!({"subject": {"type": "Sop::Client", "id": id, "properties": properties}, "action": {"name": "state:put"}, "resource": {"type": "Sop::Key", "id": "k"}});
    let ask = async |properties: Value| admin.json(Method::POST, "/access/v1/evaluation", &asks(properties)).await;
    assert_eq!(ask(json!({})).await.1["decision"], true, "it is registered with state");
    let (status, no) = ask(json!({"token": narrow})).await;
    assert_eq!((status, &no["decision"]), (200, &json!(false)), "its token is for nexus only: {no}");
    assert_eq!(ask(json!({"token": client.token().await})).await.1["decision"], true);
    // It is explained later by what the token said, and the token is nowhere.
    let decision = no["context"]["decision_id"].as_str().unwrap();
    let (_, why) = admin.json(Method::POST, &format!("/v1/governance/decisions/{decision}/explain"), &json!({})).await;
    assert_eq!((&why["decision"], &why["reproduced"]), (&json!(false), &json!(true)), "{why}");
    let kept: Vec<Vec<u8>> =
        sqlx::query_scalar("SELECT records FROM governance.segments").fetch_all(&mut db.connect().await).await.unwrap();
    let kept = kept.concat();
    let kept = String::from_utf8_lossy(&kept);
    assert!(!kept.contains(&narrow[narrow.len() - 40..]), "a token is in the record");
    // Of others, made up, revoked.
    for token in [json!(admin.token().await), json!("x.y.z"), json!(7)] {
        let (status, refused) = ask(json!({"token": token})).await;
        assert_eq!((status, &refused["errors"][0]["pointer"]), (400, &json!("/subject/properties/token")), "{refused}");
    }
    let gone = admin.bare(Method::POST, "/oauth2/revoke").basic_auth(&id, Some(&secret)).form(&[("token", &narrow)]);
    assert_eq!(gone.send().await.unwrap().status(), 200);
    assert_eq!(ask(json!({"token": narrow})).await.0, 400, "it was revoked");
    let batch = json!({"evaluations": [asks(json!({"token": narrow})), asks(json!({}))]});
    let (_, both) = admin.json(Method::POST, "/access/v1/evaluations", &batch).await;
    assert_eq!(both["evaluations"][0]["context"]["error"]["status"], 400, "{both}");
    assert_eq!(both["evaluations"][1]["decision"], true, "{both}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_may_not_ask_is_told_so_before_what_they_ask_is_read() {
    let (db, _daemon, admin, _) = crate::policy::start().await;
    let nobody = crate::policy::client(&admin, "state").await;
    for path in ["/access/v1/evaluation", "/access/v1/evaluations"] {
        for body in [json!({"evaluations": 7}), crate::policy::asks("ann", "view", 1)] {
            let (status, refused) = nobody.json(Method::POST, path, &body).await;
            assert_eq!((status, refused["type"].as_str()), (403, Some("/problems/denied")), "{refused}");
        }
        assert_eq!(admin.json(Method::POST, path, &json!({"evaluations": 7})).await.0, 400);
    }
    record::check(&db).await;
}
