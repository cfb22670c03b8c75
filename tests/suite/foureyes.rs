//! Four eyes for changes of any room: which, and from whom, is policy.

use reqwest::Method;
use serde_json::{Value, json};

use crate::policy::{activate, client, post, start};
use crate::support::client::Client;
use crate::support::daemon::Launch;
use crate::support::{record, until};

const EYES: &str = r#"
@id("config") @approvals("1")
forbid (principal, action in [Sop::Action::"state:put", Sop::Action::"state:delete"], resource)
when { resource has name && resource.name like "config/*" } unless { context has approved && context.approved };
@id("topics") @approvals("2") @approvers("security") @outside("1") @within("72h")
forbid (principal, action == Sop::Action::"nexus:topic-delete", resource)
unless { context has approved && context.approved };
@id("pay") @approvals("1")
forbid (principal, action == Sop::Action::"nexus:publish", resource == Sop::Topic::"pay")
unless { context has approved && context.approved };
@id("keys") @approvals("1")
forbid (principal, action == Sop::Action::"token:keys-rotate", resource)
unless { context has approved && context.approved };"#;

async fn send(client: &Client, method: Method, path: &str, headers: &[(&str, &str)], body: &str) -> (u16, Value) {
    let mut request = client.request(method, path).await.body(body.to_owned());
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let answer = request.send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap_or_default())
}

async fn voice(who: &Client, what: &str, proposal: &Value) -> (u16, Value) {
    let path = format!("/v1/governance/proposals/{}/{what}", proposal["id"].as_str().unwrap());
    post(who, &path, &json!({"reason": "looked at it"})).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_any_room_waits_for_others_and_is_exactly_what_they_approved() {
    let (db, daemon, admin, other) = start().await;
    activate(&admin, &other, EYES, None).await;
    let second = Launch::beside(&daemon, db.url()).start().await;
    let (there, key) = (admin.also_of(&second), "/v1/state/kv/config/limit");
    let text = ("content-type", "text/plain");
    let (status, refused) = send(&admin, Method::PUT, key, &[text], "10").await;
    assert_eq!(
        (status, refused["type"].as_str(), refused["required"].as_i64()),
        (409, Some("/problems/not-approved"), Some(1)),
        "{refused}"
    );
    let propose = ("sop-propose", "the old limit is too low");
    let (status, proposal) = send(&admin, Method::PUT, key, &[text, propose], "10").await;
    assert_eq!(
        (status, &proposal["kind"], &proposal["action"]),
        (202, &json!("request"), &json!("state:put")),
        "{proposal}"
    );
    assert_eq!(
        proposal["body"],
        json!({"method": "PUT", "path": key, "content_type": "text/plain", "body": "10"}),
        "whoever approves sees what"
    );
    assert_eq!(admin.get(key).await.0, 404, "nothing was changed");
    let id = proposal["id"].as_str().unwrap().to_owned();
    let approved = ("sop-proposal", id.as_str());
    assert_eq!(send(&admin, Method::PUT, key, &[text, approved], "10").await.0, 409, "it is pending");
    assert_eq!(voice(&admin, "approve", &proposal).await.0, 403, "not one's own");
    assert_eq!(voice(&other, "approve", &proposal).await.1["status"], "approved");
    // Anything else than what was approved is not.
    for (method, path, kind, body) in [
        (Method::PUT, key, "text/plain", "11"),
        (Method::PUT, key, "text/html", "10"),
        (Method::PUT, "/v1/state/kv/config/limit?min_index=0", "text/plain", "10"),
        (Method::PUT, "/v1/state/kv/config/other", "text/plain", "10"),
        (Method::DELETE, key, "text/plain", "10"),
    ] {
        let (status, refused) = send(&admin, method, path, &[("content-type", kind), approved], body).await;
        assert_eq!(status, 409, "{path} {kind} {body}: {refused}");
    }
    // Two at once, on two daemons: one makes it.
    let headers = [text, approved];
    let (a, b) =
        tokio::join!(send(&admin, Method::PUT, key, &headers, "10"), send(&there, Method::PUT, key, &headers, "10"));
    let mut codes = [a.0, b.0];
    codes.sort_unstable();
    assert_eq!(codes, [200, 409], "{a:?} {b:?}");
    let done = if a.0 == 200 { a.1 } else { b.1 };
    let (_, entry) = admin.get(&format!("/v1/audit/entries/{}", done["index"])).await;
    assert_eq!(
        (&entry["action"], &entry["details"]["change"]["proposal"]),
        (&json!("state:put"), &json!(id)),
        "{entry}"
    );
    let (_, shown) = admin.get(&format!("/v1/governance/proposals/{id}")).await;
    assert_eq!((&shown["status"], &shown["applied_index"]), (&json!("applied"), &done["index"]), "{shown}");
    for (headers, status) in [
        (vec![("sop-proposal", "x")], 400),
        (vec![approved, propose], 400),
        (vec![("sop-proposal", "01a20a40-497c-7000-8000-000000000000")], 409),
    ] {
        assert_eq!(send(&admin, Method::PUT, key, &headers, "10").await.0, status, "{headers:?}");
    }
    // What needs nobody is simply made, whatever it says of itself.
    assert_eq!(send(&admin, Method::PUT, "/v1/state/kv/free", &[propose], "1").await.0, 200);
    // And what no approval would let through is not proposed.
    let reader = client(&admin, "state:read").await;
    assert_eq!(send(&reader, Method::PUT, key, &[propose], "1").await.0, 403);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_teams_rejections_and_retries_of_proposed_requests() {
    let (db, _daemon, admin, other) = start().await;
    let same = client(&admin, "admin security team:blue").await;
    let outside = client(&admin, "admin security team:red").await;
    let author = client(&admin, "admin team:blue").await;
    for topic in ["t", "pay"] {
        let path = format!("/v1/nexus/topics/{topic}");
        assert!(admin.json(Method::PUT, &path, &json!({"retention": 60})).await.0 < 300);
    }
    activate(&admin, &other, EYES, None).await;
    let path = "/v1/nexus/topics/t";
    let (status, p) = send(&author, Method::DELETE, path, &[("sop-propose", "unused")], "").await;
    assert_eq!(
        (status, &p["required"], &p["role"], &p["outside"]),
        (202, &json!(2), &json!("security"), &json!(1)),
        "{p}"
    );
    assert_eq!(voice(&other, "approve", &p).await.0, 409, "not in the role");
    assert_eq!(voice(&same, "approve", &p).await.1["status"], "pending");
    assert_eq!(voice(&outside, "approve", &p).await.1["status"], "approved");
    let id = p["id"].as_str().unwrap();
    assert_eq!(send(&author, Method::DELETE, path, &[("sop-proposal", id)], "").await.0, 200);
    assert_eq!(send(&author, Method::DELETE, path, &[("sop-proposal", id)], "").await.0, 409, "once");
    // Rejected, and overridden in an emergency.
    let keys = "/v1/token/signing-keys/rotate?immediately=true";
    let (_, p) = send(&author, Method::POST, keys, &[("sop-propose", "leaked")], "").await;
    assert_eq!(voice(&other, "reject", &p).await.1["status"], "rejected");
    let rejected = [("sop-proposal", p["id"].as_str().unwrap())];
    assert_eq!(send(&author, Method::POST, keys, &rejected, "").await.0, 409);
    let (_, p) = send(&author, Method::POST, keys, &[("sop-propose", "leaked, really")], "").await;
    assert_eq!(voice(&author, "override", &p).await.1["status"], "approved");
    let overridden = [("sop-proposal", p["id"].as_str().unwrap())];
    assert_eq!(send(&author, Method::POST, keys, &overridden, "").await.0, 201);
    let author = author.with(&author.credential().0, &author.credential().1);
    let admin = admin.with(&admin.credential().0, &admin.credential().1);
    let (_, open) = admin.get("/v1/governance/proposals?review=pending").await;
    assert_eq!(open["items"][0]["id"], p["id"], "an override is looked at afterwards: {open}");
    // A retry with the same Idempotency-Key hears what came of the first.
    let other = other.with(&other.credential().0, &other.credential().1);
    let event = r#"{"specversion":"1.0","id":"1","source":"/pay","type":"pay","data":{"eur":5}}"#;
    let kind = ("content-type", "application/cloudevents+json");
    let path = "/v1/nexus/topics/pay/messages";
    let (status, p) = send(&author, Method::POST, path, &[kind, ("sop-propose", "salary")], event).await;
    assert_eq!(status, 202, "{p}");
    assert_eq!(voice(&other, "approve", &p).await.1["status"], "approved");
    let headers = [kind, ("sop-proposal", p["id"].as_str().unwrap()), ("idempotency-key", "salary-1")];
    let first = send(&author, Method::POST, path, &headers, event).await;
    let again = send(&author, Method::POST, path, &headers, event).await;
    assert_eq!((first.0, &first), (201, &again), "{first:?} {again:?}");
    assert_eq!(send(&author, Method::POST, path, &headers[..2], event).await.0, 409, "not a second time");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_proposes_applies_and_tries() {
    let (db, daemon, admin, other) = start().await;
    activate(&admin, &other, EYES, None).await;
    let file = daemon.launch.dir.join("limit");
    std::fs::write(&file, [0, 159, 146, 150]).unwrap();
    let (path, file) = ("/v1/state/kv/config/limit", file.display().to_string());
    let propose =
        ["policy", "propose-change", "PUT", path, "--body", &file, "--content-type", "x/y", "--reason", "why"];
    let (fine, said) = daemon.launch.run(&propose).await;
    assert!(fine && said.contains("pending: needs 1 to approve it"), "{said}");
    let id = said.split(' ').next().unwrap();
    let (fine, said) = daemon.launch.run(&["policy", "apply", id]).await;
    assert!(!fine && said.contains("409"), "{said}");
    assert_eq!(voice(&other, "approve", &json!({"id": id})).await.0, 200);
    let (fine, said) = daemon.launch.run(&["policy", "apply", id]).await;
    assert!(fine && said.contains("state:put on config/limit is made, at index"), "{said}");
    let answer = admin.request(Method::GET, path).await.send().await.unwrap();
    assert_eq!(answer.headers()["content-type"], "x/y");
    assert_eq!(answer.bytes().await.unwrap()[..], [0, 159, 146, 150]);
    let (_, page) = admin.get("/v1/governance/bundles?status=active").await;
    let active = page["items"].as_array().unwrap().iter().find(|b| b["scope"] == "application").unwrap();
    let (_, whole) = admin.get(&format!("/v1/governance/bundles/{}", active["id"].as_str().unwrap())).await;
    let looser = whole["policies"].as_str().unwrap().replace("config/*", "settings/*");
    let (_, draft) = post(&admin, "/v1/governance/bundles", &json!({"policies": looser})).await;
    let bundle = draft["id"].as_str().unwrap();
    let (fine, said) = daemon.launch.run(&["policy", "shadow", bundle, "--on"]).await;
    assert!(fine && said.contains("is tried on every decision after"), "{said}");
    admin.put("settings/x", "1").await.unwrap();
    let mark = admin.put("mark", "1").await.unwrap();
    crate::support::until("it was looked at", || async {
        let (_, trial) = admin.get(&format!("/v1/governance/bundles/{bundle}/shadow")).await;
        trial["reached"].as_i64().is_some_and(|reached| reached >= mark)
    })
    .await;
    let (fine, said) = daemon.launch.run(&["policy", "shadow", bundle]).await;
    assert!(fine && said.contains("state:put Sop::Key::settings/x: permit -> deny"), "{said}");
    assert!(said.contains("by policy: admin 1, config 1") && said.contains(", 1 would be other ones"), "{said}");
    let (fine, said) = daemon.launch.run(&["policy", "canary", bundle, "10", "--stop-at", "50"]).await;
    assert!(fine && said.contains("for 10"), "{said}");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_others_in_everything_may_not_even_propose_and_stricter_rules_count_at_once() {
    let (db, _daemon, admin, other) = start().await;
    let agent = client(&admin, "state governance agent").await;
    let all = r#"@id("all") @approvals("1") forbid (principal in Sop::Role::"agent", action, resource)
        unless { context has approved && context.approved };
        @id("config") @approvals("1") forbid (principal, action == Sop::Action::"state:put", resource)
        when { resource has name && resource.name like "config/*" } unless { context has approved && context.approved };"#;
    activate(&admin, &other, all, None).await;
    let propose = ("sop-propose", "please");
    let (status, refused) = send(&agent, Method::PUT, "/v1/state/kv/x", &[propose], "1").await;
    assert_eq!((status, refused["type"].as_str()), (409, Some("/problems/not-approved")), "{refused}");
    // One that was proposed, approved, and then needs more than it had.
    let key = "/v1/state/kv/config/a";
    let (_, p) = send(&admin, Method::PUT, key, &[propose], "1").await;
    assert_eq!(voice(&other, "approve", &p).await.1["status"], "approved");
    let stricter = all.replace(r#"@id("config") @approvals("1")"#, r#"@id("config") @approvals("2")"#);
    activate(&admin, &other, &stricter, None).await;
    let approved = [("sop-proposal", p["id"].as_str().unwrap())];
    let (status, refused) = send(&admin, Method::PUT, key, &approved, "1").await;
    assert_eq!((status, refused["required"].as_i64()), (409, Some(2)), "{refused}");
    // A transaction that changes nothing uses nothing up.
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_policy_has_its_own_approvers_and_what_waits_is_in_the_record() {
    let (db, _daemon, admin, other) = start().await;
    let (security, finance) = (client(&admin, "admin security").await, client(&admin, "admin finance").await);
    let second = client(&admin, "admin security").await;
    let both = r#"@id("risk") @approvals("2") @approvers("security")
        forbid (principal, action == Sop::Action::"state:put", resource)
        when { resource has name && resource.name like "pay/*" } unless { context has approved && context.approved };
        @id("money") @approvals("1") @approvers("finance")
        forbid (principal, action in [Sop::Action::"state:put", Sop::Action::"state:get"], resource)
        when { resource has name && resource.name like "pay/*" } unless { context has approved && context.approved };"#;
    activate(&admin, &other, both, None).await;
    let key = "/v1/state/kv/pay/ann";
    let answer = admin.request(Method::PUT, key).await.body("1").send().await.unwrap();
    assert_eq!(answer.status(), 409);
    let index = answer.headers()["sop-index"].to_str().unwrap().to_owned();
    let refused: Value = answer.json().await.unwrap();
    let (_, entry) = admin.get(&format!("/v1/audit/entries/{index}")).await;
    assert_eq!((&entry["outcome"], &entry["action"]), (&json!("denied"), &json!("state:put")), "{entry}");
    assert_eq!(entry["details"]["decision"]["id"], refused["decision"], "{entry} {refused}");
    let (status, denied) = admin.get(key).await;
    assert_eq!((status, denied["type"].as_str()), (403, Some("/problems/denied")), "a read is not proposed: {denied}");
    let (status, p) = send(&admin, Method::PUT, key, &[("sop-propose", "salary")], "1").await;
    assert_eq!((status, &p["required"], &p["role"]), (202, &json!(2), &Value::Null), "{p}");
    assert_eq!(p["needs"].as_array().map(Vec::len), Some(2), "{p}");
    let (status, refused) = voice(&other, "approve", &p).await;
    assert!(status == 409 && refused.to_string().contains("security"), "{refused}");
    assert_eq!(voice(&security, "approve", &p).await.1["status"], "pending");
    assert_eq!(voice(&second, "approve", &p).await.1["status"], "pending", "nobody of finance has");
    let approved = [("sop-proposal", p["id"].as_str().unwrap())];
    assert_eq!(send(&admin, Method::PUT, key, &approved, "1").await.0, 409);
    assert_eq!(voice(&finance, "approve", &p).await.1["status"], "approved");
    assert_eq!(send(&admin, Method::PUT, key, &approved, "1").await.0, 200);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_writes_nothing_uses_an_approval_up_too_and_header_fields_are_part_of_the_change() {
    let (db, _daemon, admin, other) = start().await;
    let retention = json!({"retention": 60});
    assert!(admin.json(Method::PUT, "/v1/nexus/topics/pay", &retention).await.0 < 300);
    let instance = "/v1/nexus/services/s/instances/1";
    let registered = json!({"address": "http://127.0.0.1:1", "ttl": 60});
    assert!(admin.json(Method::PUT, instance, &registered).await.0 < 300);
    let (_, lease) = post(&admin, "/v1/state/leases", &json!({"ttl": 60})).await;
    let renew = format!("/v1/state/leases/{}/renew", lease["id"].as_str().unwrap());
    let beats = r#"@id("beats") @approvals("1")
        forbid (principal, action in [Sop::Action::"nexus:heartbeat", Sop::Action::"state:lease-renew"], resource)
        unless { context has approved && context.approved };"#;
    activate(&admin, &other, &format!("{EYES}{beats}"), None).await;
    // What commits nothing is decided by the bundle that this daemon has in force: within 100 ms that is the new one.
    until("the bundle to be in force", || async {
        send(&admin, Method::POST, &format!("{instance}/heartbeat"), &[], "").await.0 == 409
    })
    .await;
    for path in [&format!("{instance}/heartbeat"), &renew] {
        let (status, p) = send(&admin, Method::POST, path, &[("sop-propose", "it lives")], "").await;
        assert_eq!(status, 202, "{p}");
        assert_eq!(voice(&other, "approve", &p).await.1["status"], "approved");
        let approved = [("sop-proposal", p["id"].as_str().unwrap())];
        let first = send(&admin, Method::POST, path, &approved, "").await;
        assert!(first.0 < 300, "{first:?}");
        assert_eq!(send(&admin, Method::POST, path, &approved, "").await.0, 409, "once: {path}");
    }
    // The same event, but later; or under another id.
    let (path, kind) = ("/v1/nexus/topics/pay/messages", ("content-type", "text/plain"));
    let ce = [("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/pay"), ("ce-type", "pay")];
    let with = |more: &[(&'static str, &'static str)]| [&ce[..], &[kind], more].concat();
    let (status, p) = send(&admin, Method::POST, path, &with(&[("sop-propose", "salary")]), "5").await;
    assert_eq!((status, &p["body"]["headers"]["ce-id"]), (202, &json!("1")), "{p}");
    assert_eq!(voice(&other, "approve", &p).await.1["status"], "approved");
    let id = p["id"].as_str().unwrap().to_owned().leak() as &'static str;
    let later = with(&[("sop-proposal", id), ("nexus-delay", "60")]);
    assert_eq!(send(&admin, Method::POST, path, &later, "5").await.0, 409);
    let mut another = with(&[("sop-proposal", id)]);
    another[1].1 = "2";
    assert_eq!(send(&admin, Method::POST, path, &another, "5").await.0, 409);
    assert_eq!(send(&admin, Method::POST, path, &with(&[("sop-proposal", id)]), "5").await.0, 201);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn proposals_are_listed_without_what_they_carry_and_are_not_made_without_end() {
    let (db, _daemon, admin, other) = start().await;
    activate(&admin, &other, EYES, None).await;
    let (key, propose) = ("/v1/state/kv/config/limit", ("sop-propose", "more"));
    let (status, p) = send(&admin, Method::PUT, key, &[propose], "1").await;
    assert_eq!(status, 202, "{p}");
    let (_, page) = admin.get("/v1/governance/proposals?status=pending").await;
    assert_eq!((&page["items"][0]["id"], page["items"][0].get("body")), (&p["id"], None), "{page}");
    for n in 1..100 {
        assert_eq!(send(&admin, Method::PUT, key, &[propose], &n.to_string()).await.0, 202);
    }
    let (status, refused) = send(&admin, Method::PUT, key, &[propose], "101").await;
    assert!(status == 409 && refused.to_string().contains("are pending"), "{refused}");
    assert_eq!(send(&other, Method::PUT, key, &[propose], "1").await.0, 202, "each author for themselves");
    assert_eq!(voice(&admin, "withdraw", &p).await.0, 200);
    assert_eq!(send(&admin, Method::PUT, key, &[propose], "101").await.0, 202);
    // What is larger than other bodies may be sent with a key, once.
    let policies = format!("// {}\n{EYES}", "x".repeat(2 << 20));
    let body = json!({"policies": policies}).to_string();
    let headers = [("content-type", "application/json"), ("idempotency-key", "large")];
    let first = send(&admin, Method::POST, "/v1/governance/bundles", &headers, &body).await;
    let again = send(&admin, Method::POST, "/v1/governance/bundles", &headers, &body).await;
    assert_eq!((first.0, &first.1["id"]), (201, &again.1["id"]));
    let large = "x".repeat(2 << 20);
    let headers = [("idempotency-key", "large-2"), ("content-type", "application/json")];
    assert_eq!(send(&admin, Method::POST, "/v1/state/leases", &headers, &large).await.0, 413, "but no other body");
    record::check(&db).await;
}
