//! Operation tokens: exact counts, steps of a todo, ends, services, crashes.

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::postgres::{Database, database};
use crate::support::proxy::{Fault, Proxy};
use crate::support::record;

async fn start() -> (Database, Daemon, Client) {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    (db, daemon, client)
}

async fn register(admin: &Client, wanted: Value) -> Value {
    let (status, made) = admin.json(Method::POST, "/oauth2/register", &wanted).await;
    assert_eq!(status, 201, "{made}");
    made
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_else(|| panic!("no {name} in {value}"))
}

async fn issue(client: &Client, wanted: Value) -> Value {
    let (status, issued) = client.json(Method::POST, "/v1/token/operations", &wanted).await;
    assert_eq!(status, 201, "{issued}");
    issued
}

async fn used(client: &Client, token: &str, operation: &str) -> (u16, Value) {
    client.json(Method::POST, "/v1/token/operations/use", &json!({"token": token, "operation": operation})).await
}

#[tokio::test(flavor = "multi_thread")]
async fn operation_tokens_are_counted_exactly_on_two_daemons() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let two = Launch::beside(&one, db.url()).start().await;
    let a = Client::of(&one);
    let b = a.also_of(&two);
    let (status, issued) = a
        .json(
            Method::POST,
            "/v1/token/operations",
            &json!({"kind": "todo", "operation": "fix", "resource": "r", "max_uses": 20}),
        )
        .await;
    assert_eq!((status, text(&issued, "status"), issued["uses"].as_i64()), (201, "active", Some(0)));
    let token = text(&issued, "token");
    let body = json!({"token": token, "operation": "fix", "resource": "r"});
    let (x, y) = (&a, &b);
    let uses = join_all((0..40).map(|i| {
        let body = body.clone();
        async move { if i % 2 == 0 { x } else { y }.json(Method::POST, "/v1/token/operations/use", &body).await }
    }))
    .await;
    let mut counts: Vec<i64> = uses.iter().filter(|u| u.0 == 200).map(|u| u.1["uses"].as_i64().unwrap()).collect();
    counts.sort_unstable();
    assert_eq!(counts, (1..=20).collect::<Vec<_>>());
    assert!(uses.iter().filter(|u| u.0 != 200).all(|u| u.0 == 409 && u.1["type"] == "/problems/exhausted"));
    let id = text(&issued, "id");
    let (_, shown) = b.get(&format!("/v1/token/operations/{id}")).await;
    assert_eq!((shown["uses"].as_i64(), shown.get("token")), (Some(20), None));
    let (_, page) = a
        .get(&format!("/v1/audit/entries?action=token:operation-use&resource=operation/{id}&outcome=ok&limit=100"))
        .await;
    assert_eq!(page["items"].as_array().unwrap().len(), 20, "an entry a use");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn operation_tokens_are_bound_and_end() {
    let (db, _daemon, admin) = start().await;
    let made = register(&admin, json!({"scope": "token"})).await;
    let other = admin.with(text(&made, "client_id"), text(&made, "client_secret"));
    let issue = |more: Value| {
        let mut body = json!({"kind": "test", "operation": "go", "max_uses": 5});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let admin = &admin;
        async move { admin.json(Method::POST, "/v1/token/operations", &body).await.1 }
    };
    let go = |client: Client, token: String, operation: &'static str, resource: Option<&'static str>| async move {
        let mut body = json!({"token": token, "operation": operation});
        if let Some(r) = resource {
            body["resource"] = json!(r);
        }
        client.json(Method::POST, "/v1/token/operations/use", &body).await.0
    };
    let bound = issue(json!({"resource": "r"})).await;
    let token = text(&bound, "token").to_owned();
    let mine = || admin.clone_at_self();
    assert_eq!(go(mine(), token.clone(), "other", Some("r")).await, 403);
    assert_eq!(go(mine(), token.clone(), "go", Some("s")).await, 403);
    assert_eq!(go(mine(), token.clone(), "go", None).await, 403);
    assert_eq!(go(other.clone_at_self(), token.clone(), "go", Some("r")).await, 403, "for another audience");
    assert_eq!(go(mine(), token.clone(), "go", Some("r")).await, 200);
    assert_eq!(go(mine(), "sopt_unknown".into(), "go", None).await, 404);
    let (_, page) = admin.get("/v1/audit/entries?action=token:operation-use&outcome=denied").await;
    assert_eq!(page["items"].as_array().unwrap().len(), 4, "each denial is in the record");
    let for_other = issue(json!({"audience": text(&made, "client_id")})).await;
    assert_eq!(go(other.clone_at_self(), text(&for_other, "token").into(), "go", Some("x")).await, 200);
    let id = text(&bound, "id");
    let (status, done) = admin.json(Method::POST, &format!("/v1/token/operations/{id}/complete"), &json!({})).await;
    assert_eq!((status, text(&done, "status")), (200, "completed"));
    assert_eq!(go(mine(), token, "go", Some("r")).await, 410);
    let revoked = issue(json!({})).await;
    assert_eq!(
        admin.json(Method::DELETE, &format!("/v1/token/operations/{}", text(&revoked, "id")), &json!({})).await.0,
        200
    );
    assert_eq!(go(mine(), text(&revoked, "token").into(), "go", None).await, 410);
    let short = issue(json!({"expires_in": 1})).await;
    let expired = || async { go(mine(), text(&short, "token").into(), "go", None).await == 410 };
    crate::support::until("it to expire", expired).await;
    for bad in [
        json!({"kind": "x", "operation": "y"}),
        json!({"kind": "test"}),
        json!({"kind": "test", "operation": "y", "nope": 1}),
        json!({"kind": "test", "operation": "y", "expires_in": "1s"}),
    ] {
        assert_eq!(admin.json(Method::POST, "/v1/token/operations", &bad).await.0, 400, "{bad}");
    }
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_issued_whole_or_not_at_all() {
    let (db, _daemon, admin) = start().await;
    let wanted: Vec<Value> = (0..300).map(|n| json!({"kind": "operation", "operation": format!("step/{n}")})).collect();
    let batch = "/v1/token/operations/batch";
    let (status, issued) = admin.json(Method::POST, batch, &json!({"items": wanted})).await;
    assert_eq!(status, 201, "{issued}");
    let items = issued["items"].as_array().unwrap();
    assert_eq!(items.len(), 300);
    assert_eq!(text(&items[299], "operation"), "step/299", "in the order they were asked for");
    assert_eq!(used(&admin, text(&items[299], "token"), "step/299").await.0, 200);
    let (_, page) = admin.get("/v1/audit/entries?action=token:operation-issue").await;
    let entries = page["items"].as_array().unwrap();
    assert_eq!((entries.len(), entries[0]["details"]["change"]["tokens"].as_array().map(Vec::len)), (1, Some(300)));
    for (bad, at) in [
        (json!({"items": []}), "/items"),
        (
            json!({"items": [{"kind": "test", "operation": "x"}, {"kind": "test", "operation": ""}]}),
            "/items/1/operation",
        ),
        (json!({"items": vec![json!({"kind": "test", "operation": "x"}); 1001]}), "/items"),
    ] {
        let (status, refused) = admin.json(Method::POST, batch, &bad).await;
        assert_eq!((status, text(&refused["errors"][0], "pointer")), (400, at));
    }
    let (_, page) = admin.get("/v1/token/operations?limit=1000").await;
    assert_eq!(page["items"].as_array().unwrap().len(), 300, "nothing of what was refused");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_todo_issues_the_tokens_of_its_steps_and_they_end_with_it() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let two = Launch::beside(&one, db.url()).start().await;
    let admin = Client::of(&one);
    let other = admin.also_of(&two);
    let made = register(&admin, json!({"scope": "health"})).await;
    let worker = admin.with(text(&made, "client_id"), text(&made, "client_secret"));
    let todo = json!({"kind": "todo", "operation": "todo:7", "resource": "r", "audience": text(&made, "client_id"), "max_uses": 4});
    let todo = issue(&admin, todo).await;
    let secret = text(&todo, "token");
    // The worker may not issue tokens by policy; with the todo's it may, within it.
    assert_eq!(
        worker.json(Method::POST, "/v1/token/operations", &json!({"kind": "test", "operation": "x"})).await.0,
        403
    );
    let step = |more: Value| {
        let mut body = json!({"kind": "operation", "operation": "todo:7/fetch", "todo": secret});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let first = issue(&worker, step(json!({}))).await;
    assert_eq!((text(&first, "parent"), text(&first, "resource")), (text(&todo, "id"), "r"));
    assert!(text(&first, "expires_at") <= text(&todo, "expires_at"));
    for (wider, status) in [
        (step(json!({"operation": "todo:8"})), 403),
        (step(json!({"resource": "s"})), 403),
        (step(json!({"todo": "sopt_unknown"})), 404),
        (step(json!({"todo": text(&first, "token")})), 403),
    ] {
        assert_eq!(worker.json(Method::POST, "/v1/token/operations", &wider).await.0, status, "{wider}");
    }
    let deeper = issue(&worker, step(json!({"kind": "todo", "operation": "todo:7/sub"}))).await;
    let below = json!({"kind": "test", "operation": "todo:7/sub/x", "todo": text(&deeper, "token")});
    let below = issue(&worker, below).await;
    let many = |n: usize| json!({"todo": secret, "items": vec![json!({"kind": "test", "operation": "todo:7"}); n]});
    let (status, refused) = worker.json(Method::POST, "/v1/token/operations/batch", &many(3)).await;
    assert_eq!((status, text(&refused, "type")), (409, "/problems/exhausted"), "two uses are left");
    assert_eq!(worker.json(Method::POST, "/v1/token/operations/batch", &many(2)).await.0, 201);
    let (_, page) = admin.get(&format!("/v1/token/operations?todo={}", text(&todo, "id"))).await;
    assert_eq!(page["items"].as_array().unwrap().len(), 4);
    // It is known to both daemons, and ends on both with its todo, and so does what is below it.
    let go = |client: Client, token: String, operation: &'static str| async move {
        let body = json!({"token": token, "operation": operation, "resource": "r"});
        client.json(Method::POST, "/v1/token/operations/use", &body).await.0
    };
    let worker_there = worker.clone_at(&two.url);
    assert_eq!(go(worker_there.clone_at_self(), text(&below, "token").into(), "todo:7/sub/x").await, 200);
    let revoke = format!("/v1/token/operations/{}", text(&todo, "id"));
    assert_eq!(other.json(Method::DELETE, &revoke, &json!({})).await.0, 200);
    for client in [&worker, &worker_there] {
        assert_eq!(go(client.clone_at_self(), text(&first, "token").into(), "todo:7/fetch").await, 410);
        assert_eq!(go(client.clone_at_self(), text(&below, "token").into(), "todo:7/sub/x").await, 410);
    }
    let (_, page) = admin.get("/v1/audit/entries?action=token:operation-revoke").await;
    assert_eq!(page["items"][0]["details"]["change"]["steps_revoked"], json!(5));
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_for_a_service_is_for_whoever_registered_it() {
    let (db, _daemon, admin) = start().await;
    let mut clients = Vec::new();
    for name in ["reasoner", "stranger"] {
        let made = register(&admin, json!({"client_name": name, "scope": "nexus"})).await;
        clients.push(admin.with(text(&made, "client_id"), text(&made, "client_secret")));
    }
    let (reasoner, stranger) = (&clients[0], &clients[1]);
    let token = issue(&admin, json!({"kind": "todo", "operation": "think", "audience": "arp.reasoner"})).await;
    let token = text(&token, "token");
    assert_eq!(used(reasoner, token, "think").await.0, 403, "nobody is that service yet");
    let instance = "/v1/nexus/services/arp.reasoner/instances/a";
    let (status, said) =
        reasoner.json(Method::PUT, instance, &json!({"address": "http://127.0.0.1:1", "ttl": 60})).await;
    assert!(status == 200 || status == 201, "{said}");
    assert_eq!(used(reasoner, token, "think").await.0, 200);
    // An access token may be for a registered service too (RFC 8707), and is none for the daemon then.
    let basic = stranger.credential();
    let ask = |resource: &'static str| {
        let form = [("grant_type", "client_credentials"), ("resource", resource)];
        let request = admin.bare(Method::POST, "/oauth2/token").basic_auth(&basic.0, Some(&basic.1)).form(&form);
        async move { request.send().await.unwrap().json::<Value>().await.unwrap() }
    };
    let given = ask("arp.reasoner").await;
    let entered = admin.bare(Method::GET, "/v1/nexus/services").bearer_auth(text(&given, "access_token")).send().await;
    assert_eq!(entered.unwrap().status(), 401);
    assert_eq!(ask("arp.nobody").await["error"], "invalid_target");
    assert_eq!(used(stranger, token, "think").await.0, 403);
    let (_, page) = admin.get("/v1/audit/entries?action=token:operation-use&outcome=ok").await;
    assert_eq!(page["items"][0]["details"]["change"]["as"], "arp.reasoner");
    assert_eq!(reasoner.json(Method::DELETE, instance, &json!({})).await.0, 200);
    assert_eq!(used(reasoner, token, "think").await.0, 403);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_use_whose_answer_was_lost_is_not_given_back_nor_counted_twice() {
    let db = database().await;
    let proxy = Proxy::before(&db);
    let mut daemon = Launch::on(db.url_via(&proxy)).start().await;
    let admin = Client::of(&daemon);
    let token = issue(&admin, json!({"kind": "todo", "operation": "pay", "max_uses": 3})).await;
    let body = json!({"token": text(&token, "token"), "operation": "pay"});
    let pay = |client: Client| {
        let body = body.clone();
        async move {
            let request = client.request(Method::POST, "/v1/token/operations/use").await;
            let answer = request.header("Idempotency-Key", "pay-1").json(&body).send().await?;
            Ok::<_, reqwest::Error>((answer.status().as_u16(), answer.json::<Value>().await.unwrap_or_default()))
        }
    };
    // It is committed, and the daemon dies before anyone hears.
    let fault = proxy.arm(Fault::hold_after().committing("token.operations"));
    let lost = tokio::spawn(pay(admin.clone_at_self()));
    fault.hit().await;
    daemon.kill().await;
    assert!(lost.await.unwrap().is_err());
    fault.release();
    let daemon = daemon.restart().await;
    let again = admin.clone_at(&daemon.url);
    let (status, answer) = pay(again.clone_at_self()).await.unwrap();
    assert_eq!((status, answer["uses"].as_i64(), answer["remaining"].as_i64()), (200, Some(1), Some(2)));
    assert_eq!(pay(again.clone_at_self()).await.unwrap(), (status, answer), "the same answer, again");
    let (_, shown) = again.get(&format!("/v1/token/operations/{}", text(&token, "id"))).await;
    assert_eq!(shown["uses"].as_i64(), Some(1));
    let (status, other) = used(&again, text(&token, "token"), "pay").await;
    assert_eq!((status, other["uses"].as_i64()), (200, Some(2)), "without the key it is another use");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_hot_token_is_spent_exactly_while_daemons_are_killed() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let mut two = Launch::beside(&one, db.url()).start().await;
    let admin = Client::of(&one);
    let token = issue(&admin, json!({"kind": "todo", "operation": "x", "max_uses": 1_000_000})).await;
    let there = admin.also_of(&two);
    there.token().await;
    let users = (0..16).map(|n| {
        let (client, token) =
            (if n % 2 == 0 { admin.clone_at_self() } else { there.clone_at_self() }, text(&token, "token").to_owned());
        async move {
            let mut heard = Vec::new();
            for _ in 0..60 {
                let request = client.request(Method::POST, "/v1/token/operations/use").await;
                // From the daemon that was killed nothing comes any more.
                let Ok(answer) = request.json(&json!({"token": token, "operation": "x"})).send().await else { break };
                let answer: Value = answer.json().await.unwrap_or_default();
                heard.extend(answer["uses"].as_i64());
            }
            heard
        }
    });
    let users = tokio::spawn(join_all(users));
    crate::support::until("half of it to be used", || async {
        admin.get(&format!("/v1/token/operations/{}", text(&token, "id"))).await.1["uses"].as_i64() > Some(300)
    })
    .await;
    two.kill().await;
    let mut heard: Vec<i64> = users.await.unwrap().into_iter().flatten().collect();
    heard.sort_unstable();
    let count = heard.len();
    heard.dedup();
    assert_eq!(heard.len(), count, "no use was given out twice");
    let (_, shown) = admin.get(&format!("/v1/token/operations/{}", text(&token, "id"))).await;
    let sql = "SELECT count(*) FROM ledger.entries WHERE convert_from(leaf, 'UTF8') LIKE '%token:operation-use%'";
    let entries: i64 = sqlx::query_scalar(sql).fetch_one(&mut db.connect().await).await.unwrap();
    assert_eq!(shown["uses"].as_i64(), Some(entries), "as many uses as entries");
    assert!(entries >= i64::try_from(count).unwrap() && count >= 480, "{entries} {count}");
    record::check(&db).await;
}
