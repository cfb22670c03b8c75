//! Bundles over HTTP: from draft to rollback, with four eyes, on two daemons.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::postgres::{Database, database};
use crate::support::record;

pub const SCHEMA: &str = "entity group; entity user in [group] { level?: Long }; entity doc { level: Long };
    action view, edit appliesTo { principal: [user], resource: [doc], context: { mfa?: Bool } };";
pub const VIEW: &str = r#"@id("view") permit (principal in group::"g", action == Action::"view", resource)
when { resource.level <= 3 };"#;

pub async fn start() -> (Database, Daemon, Client, Client) {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let admin = Client::of(&daemon);
    let other = client(&admin, "admin").await;
    (db, daemon, admin, other)
}

pub async fn client(admin: &Client, scope: &str) -> Client {
    let (status, made) = admin.json(Method::POST, "/oauth2/register", &json!({"scope": scope})).await;
    assert_eq!(status, 201, "{made}");
    admin.with(made["client_id"].as_str().unwrap(), made["client_secret"].as_str().unwrap())
}

pub async fn post(client: &Client, path: &str, body: &Value) -> (u16, Value) {
    client.json(Method::POST, path, body).await
}

async fn draft(admin: &Client, policies: &str, schema: Option<&str>) -> String {
    let (status, made) =
        post(admin, "/v1/governance/bundles", &json!({"policies": policies, "schema": schema, "note": "test"})).await;
    assert_eq!((status, made["status"].as_str()), (201, Some("draft")), "{made}");
    made["id"].as_str().unwrap().to_owned()
}

/// Drafts, proposes, approves and activates.
pub async fn activate(admin: &Client, other: &Client, policies: &str, schema: Option<&str>) -> String {
    let id = draft(admin, policies, schema).await;
    let (status, proposal) = post(admin, &format!("/v1/governance/bundles/{id}/propose"), &json!({})).await;
    assert_eq!(status, 201, "{proposal}");
    let path = format!("/v1/governance/proposals/{}/approve", proposal["id"].as_str().unwrap());
    let (status, approved) = post(other, &path, &json!({"reason": "read it"})).await;
    assert_eq!((status, approved["status"].as_str()), (200, Some("approved")), "{approved}");
    let (status, active) = post(admin, &format!("/v1/governance/bundles/{id}/activate"), &json!({})).await;
    assert_eq!((status, active["application"].as_str()), (200, Some(id.as_str())), "{active}");
    id
}

pub fn asks(user: &str, action: &str, level: i64) -> Value {
    json!({"subject": {"type": "user", "id": user}, "action": {"name": action}, "resource": {"type": "doc", "id": "d", "properties": {"level": level}}})
}

pub async fn decide(client: &Client, body: &Value) -> Value {
    let (status, answer) = post(client, "/access/v1/evaluation", body).await;
    assert_eq!(status, 200, "{answer}");
    answer
}

pub async fn member(admin: &Client, user: &str) {
    let body = json!({"parents": [{"type": "group", "id": "g"}]});
    assert_eq!(admin.json(Method::PUT, &format!("/v1/governance/entities/user/{user}"), &body).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_goes_from_draft_to_rollback_on_every_daemon_at_once() {
    let (db, daemon, admin, other) = start().await;
    let second = Launch::beside(&daemon, db.url()).start().await;
    let there = admin.also_of(&second);
    member(&admin, "ann").await;
    assert_eq!(decide(&there, &asks("ann", "view", 1)).await["decision"], false);
    let first = activate(&admin, &other, VIEW, Some(SCHEMA)).await;
    let yes = decide(&there, &asks("ann", "view", 1)).await;
    assert_eq!((&yes["decision"], &yes["context"]["policies"]), (&json!(true), &json!(["view"])), "{yes}");
    assert_eq!(yes["context"]["bundle"], first.as_str());
    assert_eq!(decide(&there, &asks("ann", "view", 4)).await["decision"], false);
    assert_eq!(decide(&admin, &asks("bob", "view", 1)).await["decision"], false);
    let before: i64 = admin.put("mark", "1").await.unwrap();
    let wide = VIEW.replace("<= 3", "<= 5");
    let wider = activate(&admin, &other, &wide, Some(SCHEMA)).await;
    assert_eq!(decide(&there, &asks("ann", "view", 4)).await["decision"], true);
    // The way back needs nobody else, and holds for the next request to any daemon.
    let began = Instant::now();
    let (status, back) = post(&admin, "/v1/governance/rollback", &json!({"reason": "too wide"})).await;
    assert_eq!((status, back["application"].as_str()), (200, Some(first.as_str())), "{back}");
    let stale = admin.also_of(&second);
    stale.token().await;
    let path = "/access/v1/evaluation?consistency=stale";
    while post(&stale, path, &asks("ann", "view", 4)).await.1["decision"] == true {
        assert!(began.elapsed() < Duration::from_secs(2), "a daemon goes on with what was rolled back");
    }
    assert_eq!(decide(&there, &asks("ann", "view", 4)).await["decision"], false);
    // What was in force when.
    let (_, then) = admin.get(&format!("/v1/governance/active?at={before}")).await;
    assert_eq!(then["application"], first.as_str());
    let (_, gone) = admin.get(&format!("/v1/governance/bundles/{wider}")).await;
    assert_eq!((gone["status"].as_str(), gone["policies"].as_str()), (Some("retired"), Some(wide.as_str())));
    let index = back["index"].as_i64().unwrap();
    let (_, entry) = admin.get(&format!("/v1/audit/entries/{index}")).await;
    assert_eq!(
        (entry["action"].as_str(), entry["details"]["reason"].as_str()),
        (Some("governance:rollback"), Some("too wide"))
    );
    assert_eq!(post(&admin, "/v1/governance/rollback", &json!({"reason": "x", "to": "nothing"})).await.0, 404);
    let restarted = daemon.restart().await;
    let admin = Client::of(&restarted);
    assert_eq!(
        decide(&admin, &asks("ann", "view", 3)).await["decision"],
        true,
        "a restart goes on with what is in force"
    );
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_have_line_and_column_and_types_are_strict() {
    let (db, _daemon, admin, _) = start().await;
    for (body, pointer, line, column) in [
        (json!({"policies": "permit (principal, action, resource)\nwhen { nonsense };"}), "/policies", 2, 8),
        (
            json!({"policies": "permit (principal, action == Action::\"view\", resource)\n when { resource.levl == 1 };", "schema": SCHEMA}),
            "/policies",
            2,
            9,
        ),
        (json!({"policies": "", "schema": "entity user {"}), "/schema", 1, 14),
    ] {
        let (status, refused) = post(&admin, "/v1/governance/bundles", &body).await;
        let fault = &refused["errors"][0];
        assert_eq!((status, fault["pointer"].as_str()), (422, Some(pointer)), "{refused}");
        assert_eq!((fault["line"].as_i64(), fault["column"].as_i64()), (Some(line), Some(column)), "{refused}");
    }
    for body in
        [json!({}), json!({"policies": 3}), json!({"policies": "", "x": 1}), json!({"policies": "", "scope": "all"})]
    {
        assert_eq!(post(&admin, "/v1/governance/bundles", &body).await.0, 400, "{body}");
    }
    let (_, loose) = post(&admin, "/v1/governance/bundles", &json!({"policies": VIEW})).await;
    assert_eq!(loose["validated"], false);
    let json_policy = json!({"staticPolicies": {"all": {"effect": "permit", "principal": {"op": "All"}, "action": {"op": "All"}, "resource": {"op": "All"}, "conditions": []}}, "templates": {}, "templateLinks": []});
    let (status, made) = post(&admin, "/v1/governance/bundles", &json!({"policies": json_policy})).await;
    assert_eq!((status, made["count"].as_i64()), (201, Some(1)), "{made}");
    let (_, page) = admin.get("/v1/governance/bundles?limit=1").await;
    let next = page["next"].as_str().unwrap();
    let (_, page) = admin.get(&format!("/v1/governance/bundles?limit=5&after={next}")).await;
    assert_eq!(page["items"].as_array().unwrap().len(), 2, "the loose one and the shipped one: {page}");
    let large = format!("// {}\n{VIEW}", "x".repeat(2 << 20));
    assert_eq!(
        post(&admin, "/v1/governance/bundles", &json!({"policies": large})).await.0,
        201,
        "larger than other bodies"
    );
    let large = format!("// {}\n{VIEW}", "x".repeat(16 << 20));
    assert_eq!(post(&admin, "/v1/governance/bundles", &json!({"policies": large})).await.0, 413, "and not without end");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_schema_does_not_know_is_left_out_and_named() {
    let (db, _daemon, admin, other) = start().await;
    member(&admin, "ann").await;
    activate(&admin, &other, VIEW, Some(SCHEMA)).await;
    let mut body = asks("ann", "view", 1);
    body["resource"]["properties"]["color"] = json!("red");
    body["context"] = json!({"ip": "::1", "mfa": true});
    body["action"]["properties"] = json!({"how": "fast"});
    let answer = decide(&admin, &body).await;
    assert_eq!(answer["decision"], true);
    assert_eq!(answer["context"]["ignored"], json!(["/resource/properties/color", "/context/ip", "/context/action"]));
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn four_eyes_are_four() {
    let (db, _daemon, admin, other) = start().await;
    let id = draft(&admin, VIEW, Some(SCHEMA)).await;
    let activate = format!("/v1/governance/bundles/{id}/activate");
    let (status, refused) = post(&admin, &activate, &json!({})).await;
    assert_eq!(
        (status, refused["type"].as_str(), refused["required"].as_i64()),
        (409, Some("/problems/not-approved"), Some(1))
    );
    let (_, proposal) =
        post(&other, &format!("/v1/governance/bundles/{id}/propose"), &json!({"reason": "more to see"})).await;
    assert_eq!(
        (proposal["status"].as_str(), proposal["required"].as_i64(), proposal["target"].as_str()),
        (Some("pending"), Some(1), Some(id.as_str()))
    );
    let path = |what: &str| format!("/v1/governance/proposals/{}/{what}", proposal["id"].as_str().unwrap());
    for who in [&admin, &other] {
        let (status, refused) = post(who, &path("approve"), &json!({})).await;
        assert_eq!(status, 403, "neither who wrote it nor who proposed it: {refused}");
        assert!(refused["decision"].is_string());
    }
    assert_eq!(post(&admin, &path("withdraw"), &json!({})).await.0, 409, "another's");
    let third = client(&admin, "admin").await;
    let nobody = client(&admin, "state").await;
    assert_eq!(post(&nobody, &path("approve"), &json!({})).await.0, 403);
    assert_eq!(post(&third, &path("approve"), &json!({})).await.1["status"], "approved");
    assert_eq!(post(&third, &path("approve"), &json!({})).await.0, 409, "it is approved");
    let none = json!({});
    let (a, b) = tokio::join!(post(&admin, &activate, &none), post(&other, &activate, &none));
    let mut codes = [a.0, b.0];
    codes.sort_unstable();
    assert_eq!(codes, [200, 409], "two at once: one does it");
    let (_, used) = admin.get(path("").trim_end_matches('/')).await;
    assert_eq!(
        (used["status"].as_str(), used["approvals"][0]["approves"].as_bool()),
        (Some("applied"), Some(true)),
        "{used}"
    );
    // Rejected, withdrawn, overridden.
    let id = draft(&admin, &VIEW.replace('3', "4"), Some(SCHEMA)).await;
    let propose = format!("/v1/governance/bundles/{id}/propose");
    let again = async |what: &str, who: &Client, body: Value| {
        let (_, p) = post(&admin, &propose, &json!({})).await;
        post(who, &format!("/v1/governance/proposals/{}/{what}", p["id"].as_str().unwrap()), &body).await
    };
    assert_eq!(again("reject", &other, json!({"reason": "no"})).await.1["status"], "rejected");
    assert_eq!(again("withdraw", &admin, json!({})).await.1["status"], "withdrawn");
    assert_eq!(post(&admin, &format!("/v1/governance/bundles/{id}/activate"), &json!({})).await.0, 409);
    assert_eq!(again("override", &admin, json!({})).await.0, 400, "it wants a reason");
    let (_, loud) = again("override", &admin, json!({"reason": "fire"})).await;
    assert_eq!(loud["status"], "approved");
    assert_eq!(post(&admin, &format!("/v1/governance/bundles/{id}/activate"), &json!({})).await.0, 200);
    let (_, open) = admin.get("/v1/governance/proposals?review=pending").await;
    assert_eq!(open["items"].as_array().unwrap().len(), 1, "{open}");
    let review = format!("/v1/governance/proposals/{}/review", loud["id"].as_str().unwrap());
    assert_eq!(post(&admin, &review, &json!({"reason": "me again"})).await.0, 409);
    assert_eq!(post(&other, &review, &json!({"reason": "it burned"})).await.0, 200);
    assert_eq!(admin.get("/v1/governance/proposals?review=pending").await.1["items"], json!([]));
    crate::support::until("an incident says so", || async {
        admin.get("/v1/health/incidents").await.1.to_string().contains("governance-override/")
    })
    .await;
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn which_changes_wait_and_for_whom_is_policy() {
    let (db, _daemon, admin, other) = start().await;
    let rule = r#"@id("sensitive") @approvals("2") @outside("1") @approvers("security") @within("2s")
        forbid (principal, action in [Sop::Action::"governance:entity-put", Sop::Action::"governance:entity-delete"], resource)
        when { resource.name like "group/root*" } unless { context has approved && context.approved };"#;
    activate(&admin, &other, rule, None).await;
    assert_eq!(admin.json(Method::PUT, "/v1/governance/entities/group/plain", &json!({})).await.0, 200);
    let path = "/v1/governance/entities/group/root";
    let (status, refused) = admin.json(Method::PUT, path, &json!({"attrs": {"n": 1}})).await;
    assert_eq!((status, refused["required"].as_i64()), (409, Some(2)), "{refused}");
    let voice = async |scope: &str| client(&admin, &format!("admin {scope}")).await;
    let (one, two, three) =
        (voice("security team:red").await, voice("security team:red").await, voice("security team:blue").await);
    let author = voice("team:red").await;
    let wanted =
        json!({"change": "entity_put", "entity": {"type": "group", "id": "root"}, "attrs": {"n": 1}, "reason": "r"});
    let (status, p) = post(&author, "/v1/governance/proposals", &wanted).await;
    assert_eq!(
        (status, p["required"].as_i64(), p["outside"].as_i64(), p["role"].as_str()),
        (201, Some(2), Some(1), Some("security")),
        "{p}"
    );
    let approve = format!("/v1/governance/proposals/{}/approve", p["id"].as_str().unwrap());
    assert_eq!(post(&other, &approve, &json!({})).await.0, 409, "not of the role");
    assert_eq!(post(&one, &approve, &json!({})).await.1["status"], "pending");
    assert_eq!(post(&two, &approve, &json!({})).await.1["status"], "pending", "two of the same team are not enough");
    assert_eq!(post(&three, &approve, &json!({})).await.1["status"], "approved");
    assert_eq!(
        admin.json(Method::PUT, path, &json!({"attrs": {"n": 2}})).await.0,
        409,
        "another change than was approved"
    );
    assert_eq!(admin.json(Method::PUT, path, &json!({"attrs": {"n": 1}})).await.0, 200);
    assert_eq!(admin.json(Method::PUT, path, &json!({"attrs": {"n": 1}})).await.0, 409, "once");
    // Past its time it is an entry of its own.
    let (_, p) = post(&author, "/v1/governance/proposals", &wanted).await;
    let read = format!("/v1/governance/proposals/{}", p["id"].as_str().unwrap());
    crate::support::until("the proposal expires", || async {
        let (_, entries) = admin.get("/v1/audit/entries?action=governance:expire").await;
        admin.get(&read).await.1["status"] == "expired" && !entries["items"].as_array().unwrap().is_empty()
    })
    .await;
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_locked_out() {
    let (db, _daemon, admin, other) = start().await;
    let all = "@id(\"never\") forbid (principal, action, resource);";
    let ready = async |policies: &str, scope: &str| {
        let (status, made) =
            post(&admin, "/v1/governance/bundles", &json!({"policies": policies, "scope": scope})).await;
        assert_eq!(status, 201, "{made}");
        let id = made["id"].as_str().unwrap().to_owned();
        let (_, p) = post(&admin, &format!("/v1/governance/bundles/{id}/propose"), &json!({})).await;
        post(&other, &format!("/v1/governance/proposals/{}/approve", p["id"].as_str().unwrap()), &json!({})).await;
        format!("/v1/governance/bundles/{id}/activate")
    };
    let path = ready(all, "application").await;
    let (status, refused) = post(&admin, &path, &json!({"force": true})).await;
    assert_eq!(
        (status, refused["type"].as_str()),
        (422, Some("/problems/locks-out")),
        "the last way back is kept even by force"
    );
    let path =
        ready("@id(\"none\") permit (principal, action == Sop::Action::\"state:get\", resource);", "system").await;
    assert_eq!(post(&admin, &path, &json!({"force": true})).await.0, 422);
    let own = admin.credential().0;
    let me = format!(
        "forbid (principal == Sop::Client::\"{own}\", action == Sop::Action::\"governance:rollback\", resource);"
    );
    let path = ready(&me, "application").await;
    assert_eq!(post(&admin, &path, &json!({})).await.0, 422);
    assert_eq!(post(&admin, &path, &json!({"force": true})).await.0, 200, "others still can");
    assert_eq!(post(&admin, "/v1/governance/rollback", &json!({"reason": "r"})).await.0, 403);
    assert_eq!(post(&other, "/v1/governance/rollback", &json!({"reason": "r"})).await.1["application"], Value::Null);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canary_decides_for_its_share_and_always_the_same() {
    let (db, daemon, admin, other) = start().await;
    let second = Launch::beside(&daemon, db.url()).start().await;
    let there = admin.also_of(&second);
    activate(&admin, &other, "@id(\"old\") permit (principal is user, action, resource);", None).await;
    let id = draft(&admin, "@id(\"new\") permit (principal is user, action, resource);", None).await;
    let path = format!("/v1/governance/bundles/{id}/canary");
    assert_eq!(post(&admin, &path, &json!({"percent": 101})).await.0, 400);
    assert_eq!(post(&admin, &path, &json!({"percent": 30})).await.0, 200);
    let mut taken = 0;
    for i in 0..100 {
        let body = asks(&format!("u{i}"), "view", 1);
        let (here, too) = (decide(&admin, &body).await, decide(&there, &body).await);
        assert_eq!(here["context"]["policies"], too["context"]["policies"], "the same on each daemon");
        taken += i32::from(here["context"]["bundle"] == id.as_str());
    }
    assert!((15..=45).contains(&taken), "{taken} of 100");
    assert_eq!(post(&admin, &path, &json!({"percent": 0})).await.0, 200);
    assert_eq!(decide(&there, &asks("u1", "view", 1)).await["context"]["policies"], json!(["old"]));
    record::check(&db).await;
}
