//! The rollout of a bundle over HTTP: shadow, canary, what stops by itself, and daemons that die in the middle.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use crate::policy::{SCHEMA, VIEW, activate, asks, decide, member, post, start};
use crate::support::client::Client;
use crate::support::daemon::Launch;
use crate::support::{record, until};

async fn draft(admin: &Client, policies: &str) -> String {
    let (status, made) = post(admin, "/v1/governance/bundles", &json!({"policies": policies, "schema": SCHEMA})).await;
    assert_eq!(status, 201, "{made}");
    made["id"].as_str().unwrap().to_owned()
}

async fn status_of(admin: &Client, bundle: &str) -> String {
    let (_, shown) = admin.get(&format!("/v1/governance/bundles/{bundle}")).await;
    shown["status"].as_str().unwrap_or_default().to_owned()
}

/// What a trial found, once it has looked at everything up to now.
async fn found(admin: &Client, bundle: &str) -> Value {
    let index = admin.put("now", "1").await.unwrap();
    let path = format!("/v1/governance/bundles/{bundle}/shadow?limit=1000");
    until("the trial catches up", || async {
        admin.get(&path).await.1["reached"].as_i64().is_some_and(|reached| reached >= index)
    })
    .await;
    admin.get(&path).await.1
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shadow_says_what_would_have_been_and_changes_nothing() {
    let (db, mut daemon, admin, other) = start().await;
    let second = Launch::beside(&daemon, db.url()).start().await;
    let there = admin.also_of(&second);
    member(&admin, "ann").await;
    activate(&admin, &other, VIEW, Some(SCHEMA)).await;
    decide(&admin, &asks("ann", "view", 3)).await;
    let strict = VIEW.replace("<= 3", "<= 1").replace("@id(\"view\")", "@id(\"strict\")");
    let bundle = draft(&admin, &strict).await;
    let path = format!("/v1/governance/bundles/{bundle}/shadow");
    assert_eq!(admin.get(&path).await.0, 404, "it was never tried");
    let (status, begun) = post(&admin, &path, &json!({})).await;
    assert_eq!((status, begun["reached"] == begun["since"]), (200, true), "{begun}");
    assert_eq!(status_of(&admin, &bundle).await, "shadow");
    assert_eq!(post(&admin, &path, &json!({})).await.0, 409);
    // On either daemon; nothing that is answered changes.
    for (client, level) in [(&admin, 0), (&there, 2), (&admin, 3), (&there, 5)] {
        assert_eq!(decide(client, &asks("ann", "view", level)).await["decision"], level <= 3);
    }
    let first = found(&admin, &bundle).await;
    assert_eq!(first["changed"], 2, "{first}");
    assert_eq!(first["groups"]["subject"]["user::ann"], 2, "{first}");
    assert_eq!(first["groups"]["policy"], json!({"view": 2}), "{first}");
    let flips = first["flips"].as_array().unwrap();
    assert!(flips.iter().all(|f| f["before"] == true && f["after"] == false), "{first}");
    assert!(flips.iter().all(|f| f["index"].as_i64() > begun["since"].as_i64()), "{first}");
    let (_, page) = admin.get(&format!("{path}?limit=1")).await;
    let (_, rest) = admin.get(&format!("{path}?limit=5&after={}", page["next"].as_str().unwrap())).await;
    assert_eq!((rest["flips"].as_array().unwrap().len(), &rest["flips"][0]), (1, &flips[1]));
    // It is exactly what a replay of the same range says.
    let range = json!({"from": begun["since"].as_i64().unwrap() + 1, "to": first["reached"]});
    let (_, replay) = post(&admin, &format!("/v1/governance/bundles/{bundle}/replay"), &range).await;
    for name in ["read", "changed", "skipped", "groups", "flips"] {
        assert_eq!(replay[name], first[name], "{name}");
    }
    let metrics = admin.request(Method::GET, "/metrics").await.send().await.unwrap().text().await.unwrap();
    let theirs = there.request(Method::GET, "/metrics").await.send().await.unwrap().text().await.unwrap();
    let other_line = format!("sop_governance_shadow_decisions_total{{bundle=\"{bundle}\",outcome=\"other\"}} 2");
    assert!(metrics.contains(&other_line) || theirs.contains(&other_line), "one of the daemons counted it");
    until("the stage is told", || async {
        let text = there.request(Method::GET, "/metrics").await.send().await.unwrap().text().await.unwrap();
        text.contains(&format!("sop_governance_rollout_info{{bundle=\"{bundle}\",stage=\"shadow\"}} 1"))
    })
    .await;
    // Whoever tried dies; the other goes on from where it was, and nothing is counted twice.
    daemon.kill().await;
    decide(&there, &asks("ann", "view", 2)).await;
    let then = found(&there, &bundle).await;
    assert_eq!((&then["changed"], then["flips"].as_array().unwrap().len()), (&json!(3), 3), "{then}");
    let (status, ended) = post(&there, &path, &json!({"on": false})).await;
    assert_eq!((status, ended["until"].is_i64()), (200, true), "{ended}");
    assert_eq!(status_of(&there, &bundle).await, "draft");
    assert_eq!(post(&there, &path, &json!({"on": false})).await.0, 409);
    assert_eq!(post(&there, &path, &json!({"off": true})).await.0, 400);
    let (_, entries) = there.get("/v1/audit/entries?action=governance:shadow").await;
    assert_eq!(entries["items"].as_array().unwrap().len(), 2, "{entries}");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canary_stops_itself_when_it_denies_what_the_active_bundle_permits() {
    let db = crate::support::postgres::database().await;
    let daemon = Launch::on(db.url()).env("SOP__GOVERNANCE__CANARY_DECISIONS", "10").start().await;
    let admin = Client::of(&daemon);
    let other = crate::policy::client(&admin, "admin").await;
    for user in ["ann", "bob"] {
        member(&admin, user).await;
    }
    let active = activate(&admin, &other, VIEW, Some(SCHEMA)).await;
    let stricter = draft(&admin, &VIEW.replace("<= 3", "<= 2")).await;
    let canary = format!("/v1/governance/bundles/{stricter}/canary");
    for wrong in [json!({"percent": 101}), json!({"percent": 5, "stop_at": -1}), json!({})] {
        assert_eq!(post(&admin, &canary, &wrong).await.0, 400, "{wrong}");
    }
    let (status, ruling) = post(&admin, &canary, &json!({"percent": 100})).await;
    assert_eq!((status, ruling["stop_at"].as_f64()), (200, Some(5.0)), "{ruling}");
    assert_eq!(status_of(&admin, &stricter).await, "canary");
    // Denials that the active bundle gives too are no reason.
    for _ in 0..30 {
        assert_eq!(decide(&admin, &asks("ann", "view", 4)).await["decision"], false);
    }
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(status_of(&admin, &stricter).await, "canary");
    for _ in 0..6 {
        decide(&admin, &asks("bob", "view", 3)).await;
    }
    until("the canary stops", || async { status_of(&admin, &stricter).await == "draft" }).await;
    let now = decide(&admin, &asks("bob", "view", 3)).await;
    assert_eq!((&now["decision"], &now["context"]["bundle"]), (&json!(true), &json!(active)), "{now}");
    let (_, page) = admin.get("/v1/audit/entries?action=governance:canary&limit=1").await;
    let index = page["items"][0]["index"].as_i64().unwrap();
    let (_, entry) = admin.get(&format!("/v1/audit/entries/{index}")).await;
    assert_eq!(entry["actor"], "daemon:governance", "{entry}");
    assert!(entry["details"]["reason"].as_str().unwrap().contains("denied what the active bundle permits"), "{entry}");
    until("an incident says so", || async {
        let (_, open) = admin.get("/v1/health/incidents").await;
        open["items"].as_array().unwrap().iter().any(|i| i.to_string().contains("governance-canary"))
    })
    .await;
    // Who wants it all the same says so.
    assert_eq!(post(&admin, &canary, &json!({"percent": 100, "stop_at": 100})).await.0, 200);
    for _ in 0..20 {
        assert_eq!(decide(&admin, &asks("bob", "view", 3)).await["decision"], false);
    }
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(status_of(&admin, &stricter).await, "canary");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_dies_in_a_step_leaves_the_step_done_or_not_done() {
    let (db, daemon, admin, other) = start().await;
    member(&admin, "ann").await;
    let first = activate(&admin, &other, VIEW, Some(SCHEMA)).await;
    let candidate = draft(&admin, &VIEW.replace("<= 3", "<= 5")).await;
    let (credential, mut daemon) = (admin.credential(), daemon);
    let mut done = 0;
    for round in 0..12_u64 {
        let client = Client::of(&daemon).with(&credential.0, &credential.1);
        client.token().await;
        let (path, body) = match round % 4 {
            0 => (format!("/v1/governance/bundles/{candidate}/shadow"), json!({})),
            1 => (format!("/v1/governance/bundles/{candidate}/canary"), json!({"percent": 50})),
            2 => (format!("/v1/governance/bundles/{candidate}/canary"), json!({"percent": 0})),
            _ => ("/v1/governance/rollback".to_owned(), json!({"to": first, "reason": "crash"})),
        };
        let request = client.request(Method::POST, &path).await.json(&body);
        let sent = tokio::spawn(request.send());
        tokio::time::sleep(Duration::from_millis(round * 2 % 11)).await;
        daemon.kill().await;
        let answered = sent.await.unwrap().is_ok_and(|a| a.status() == 200);
        done += u64::from(answered);
        daemon = daemon.restart().await;
        consistent(&Client::of(&daemon), &candidate, &first).await;
    }
    // What is left is usable.
    let admin = Client::of(&daemon);
    let other = admin.with(&other.credential().0, &other.credential().1);
    activate(&admin, &other, &VIEW.replace("<= 3", "<= 7"), Some(SCHEMA)).await;
    assert_eq!(decide(&admin, &asks("ann", "view", 7)).await["decision"], true, "after {done} answered steps");
    record::check(&db).await;
}

/// What is in force, what each bundle says it is, and the newest entry about it agree.
async fn consistent(admin: &Client, candidate: &str, first: &str) {
    let (_, force) = admin.get("/v1/governance/active").await;
    assert_eq!(force["application"], first, "{force}");
    let status = status_of(admin, candidate).await;
    assert_eq!(force["canary"] == candidate, status == "canary", "{force} {status}");
    let (code, trial) = admin.get(&format!("/v1/governance/bundles/{candidate}/shadow")).await;
    assert_eq!(code == 200 && trial["until"].is_null(), status == "shadow", "{trial} {status}");
    assert_eq!(status_of(admin, first).await, "active");
    let since = force["index"].as_i64().unwrap();
    let (_, entry) = admin.get(&format!("/v1/audit/entries/{since}")).await;
    assert!(entry["action"].as_str().unwrap().starts_with("governance:"), "{entry}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hierarchy_without_end_is_refused_and_harms_nobody() {
    let (db, daemon, admin, other) = start().await;
    member(&admin, "ann").await;
    activate(&admin, &other, VIEW, Some(SCHEMA)).await;
    // From below, each parent is still to come, so nothing is too deep when it is put.
    let depth = 1_100;
    for level in 0..depth {
        let body = json!({"parents": [{"type": "group", "id": format!("deep-{}", level + 1)}]});
        let (status, put) =
            admin.json(Method::PUT, &format!("/v1/governance/entities/group/deep-{level}"), &body).await;
        assert_eq!(status, 200, "{put}");
    }
    let below = json!({"parents": [{"type": "group", "id": "deep-0"}]});
    let (status, refused) = admin.json(Method::PUT, "/v1/governance/entities/user/low", &below).await;
    assert_eq!((status, &refused["errors"][0]["pointer"]), (422, &json!("/parents")), "{refused}");
    // The deepest that is not refused is decided, and does no harm either.
    for top in [150, 300] {
        let asked = json!({"subject": {"type": "group", "id": format!("deep-{top}")}, "action": {"name": "view"}, "resource": {"type": "doc", "id": "d"}});
        for _ in 0..4 {
            let (status, answer) = post(&admin, "/access/v1/evaluation", &asked).await;
            assert_eq!((status, &answer["decision"]), (200, &json!(false)), "{answer}");
        }
    }
    // A hundred thousand, as a restored database may have them.
    let mut conn = db.connect().await;
    sqlx::query(
        "INSERT INTO governance.entities SELECT 'group', 'chain-' || n, '{}', convert_to('[{\"type\":\"group\",\"id\":\"chain-' || (n + 1) || '\"}]', 'UTF8'), 1
         FROM generate_series(0, 99999) AS n",
    )
    .execute(&mut conn)
    .await
    .unwrap();
    let daemon = daemon.restart().await;
    let admin = Client::of(&daemon);
    for group in ["deep-0", "chain-0"] {
        let asked = json!({"subject": {"type": "group", "id": group}, "action": {"name": "view"}, "resource": {"type": "doc", "id": "d"}});
        let (status, refused) = post(&admin, "/access/v1/evaluation", &asked).await;
        assert_eq!(status, 422, "{refused}");
        let batch = json!({"evaluations": [asked, asks("ann", "view", 1)]});
        let (status, answers) = post(&admin, "/access/v1/evaluations", &batch).await;
        assert_eq!(status, 200, "{answers}");
        assert_eq!(answers["evaluations"][0]["context"]["error"]["status"], 422, "{answers}");
        assert_eq!(answers["evaluations"][1]["decision"], true, "its neighbour does not notice: {answers}");
    }
    let below = json!({"parents": [{"type": "group", "id": "chain-50000"}]});
    assert_eq!(admin.json(Method::PUT, "/v1/governance/entities/user/low", &below).await.0, 422);
    // Round in a circle, in one step and in two.
    let own = json!({"parents": [{"type": "group", "id": "a"}]});
    assert_eq!(admin.json(Method::PUT, "/v1/governance/entities/group/a", &own).await.0, 422);
    assert_eq!(admin.json(Method::PUT, "/v1/governance/entities/group/b", &own).await.0, 200);
    let round = json!({"parents": [{"type": "group", "id": "b"}]});
    assert_eq!(admin.json(Method::PUT, "/v1/governance/entities/group/a", &round).await.0, 422);
    assert_eq!(decide(&admin, &asks("ann", "view", 1)).await["decision"], true);
    record::check(&db).await;
}

pub const STALE: &str = r#"@id("view") @stale_ok("1h") permit (principal in group::"g", action == Action::"view", resource)
when { resource.level <= 3 };
@id("edit") permit (principal in group::"g", action == Action::"edit", resource);
@id("never") @stale_ok("1s") forbid (principal, action == Action::"edit", resource) when { resource.level > 7 };"#;

/// What is between the daemon and its database, until it is not.
struct Line {
    socket: std::path::PathBuf,
    aside: std::path::PathBuf,
}

impl Line {
    fn of(proxy: &crate::support::proxy::Proxy) -> Self {
        let socket = proxy.sockets().join(".s.PGSQL.5432");
        let aside = proxy.sockets().join("aside");
        Self { socket, aside }
    }

    /// No new connection, and the ones there are end.
    async fn cut(&self, db: &crate::support::postgres::Database) {
        std::fs::rename(&self.socket, &self.aside).unwrap();
        let ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'sop/%' AND datname = current_database()";
        sqlx::query(ended).execute(&mut db.connect_as("test").await).await.unwrap();
    }

    fn mend(&self) {
        std::fs::rename(&self.aside, &self.socket).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_store_is_away_only_what_a_policy_allows_is_answered_and_recorded_later() {
    let db = crate::support::postgres::database().await;
    let proxy = crate::support::proxy::Proxy::before(&db);
    let line = Line::of(&proxy);
    let mut daemon = Launch::on(db.url_via(&proxy)).start().await;
    let admin = Client::of(&daemon);
    let other = crate::policy::client(&admin, "admin").await;
    member(&admin, "ann").await;
    let wrong = STALE.replace("1h", "soon");
    let (status, refused) = post(&admin, "/v1/governance/bundles", &json!({"policies": wrong})).await;
    assert_eq!(status, 422, "{refused}");
    activate(&admin, &other, STALE, Some(SCHEMA)).await;
    assert_eq!(decide(&admin, &asks("ann", "view", 1)).await["decision"], true);
    line.cut(&db).await;
    until("the store is away", || async {
        let (status, answer) = post(&admin, "/access/v1/evaluation", &asks("ann", "view", 1)).await;
        status == 200 && answer["context"]["stale"].is_object()
    })
    .await;
    let (status, answer) = post(&admin, "/access/v1/evaluation", &asks("ann", "view", 2)).await;
    assert_eq!(
        (status, &answer["decision"], &answer["context"]["index"]),
        (200, &json!(true), &Value::Null),
        "{answer}"
    );
    let stale = answer["context"]["decision_id"].as_str().unwrap().to_owned();
    // Of other policies, of none at all, or older than the policy allows: it is not decided.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    for asked in [asks("ann", "edit", 1), asks("ann", "edit", 9), asks("bob", "view", 1), asks("ann", "view", 9)] {
        let (status, refused) = post(&admin, "/access/v1/evaluation", &asked).await;
        assert_eq!((status, refused["type"].as_str()), (503, Some("/problems/unavailable")), "{asked} {refused}");
    }
    let batch = json!({"evaluations": [asks("ann", "view", 3), asks("ann", "edit", 1)]});
    let (status, answers) = post(&admin, "/access/v1/evaluations", &batch).await;
    assert_eq!(status, 200, "{answers}");
    assert_eq!(answers["evaluations"][0]["decision"], true, "{answers}");
    assert_eq!(answers["evaluations"][1]["context"]["error"]["status"], 503, "{answers}");
    let in_batch = answers["evaluations"][0]["context"]["decision_id"].as_str().unwrap().to_owned();
    assert!(admin.put("x", "1").await.is_err(), "nothing is written");
    let waiting = crate::spool::spooled(&daemon).await;
    assert_eq!(waiting, Some(3), "how many wait is said while they do");
    // It dies before the store is back, and the record is complete all the same.
    daemon.kill().await;
    line.mend();
    let daemon = daemon.restart().await;
    let admin = Client::of(&daemon);
    for id in [&stale, &in_batch] {
        until("it is in the record", || async { admin.get(&format!("/v1/governance/decisions/{id}")).await.0 == 200 })
            .await;
        let (_, why) = post(&admin, &format!("/v1/governance/decisions/{id}/explain"), &json!({})).await;
        assert_eq!(
            (&why["decision"], &why["reproduced"], &why["policies"][0]["id"]),
            (&json!(true), &json!(true), &json!("view")),
            "{why}"
        );
    }
    let (_, page) = admin.get("/v1/audit/entries?action=governance:evaluate&limit=1").await;
    let (_, entry) = admin.get(&format!("/v1/audit/entries/{}", page["items"][0]["index"])).await;
    assert_eq!(entry["details"]["change"]["late"], true, "{entry}");
    until("nothing waits any more", || async { !daemon.launch.dir.join("spool/decisions.closed").exists() }).await;
    let (_, all) = admin.get("/v1/governance/decisions?origin=authzen&subject=ann").await;
    let all: Vec<&str> = all["items"].as_array().unwrap().iter().map(|d| d["decision_id"].as_str().unwrap()).collect();
    assert_eq!(all.iter().filter(|id| **id == stale).count(), 1, "once: {all:?}");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canary_never_rules_the_daemon_itself() {
    let (db, _daemon, admin, _) = start().await;
    let weak = crate::policy::client(&admin, "governance").await;
    let all = json!({"policies": "permit (principal, action, resource);"});
    let (_, made) = post(&weak, "/v1/governance/bundles", &all).await;
    let canary = format!("/v1/governance/bundles/{}/canary", made["id"].as_str().unwrap());
    assert_eq!(post(&weak, &canary, &json!({"percent": 100, "stop_at": 100})).await.0, 200);
    assert!(weak.put("mine", "1").await.is_err(), "nobody approved it");
    assert_eq!(
        decide(&weak, &asks("ann", "view", 1)).await["decision"],
        true,
        "subjects of applications it decides for"
    );
    assert_eq!(post(&weak, &canary, &json!({"percent": 0})).await.0, 200);
    record::check(&db).await;
}
