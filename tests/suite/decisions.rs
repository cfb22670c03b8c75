//! Decisions after they were made, and before anybody asks: the list, explanations, replay, search.

use reqwest::Method;
use serde_json::{Value, json};

use crate::policy::{SCHEMA, VIEW, activate, asks, decide, member, post, start};
use crate::support::client::Client;
use crate::support::record;

#[tokio::test(flavor = "multi_thread")]
async fn decisions_are_listed_explained_and_replayed_as_of_their_time() {
    let (db, daemon, admin, other) = start().await;
    member(&admin, "ann").await;
    let first = activate(&admin, &other, VIEW, Some(SCHEMA)).await;
    let from = admin.put("mark", "1").await.unwrap();
    let mut ids = Vec::new();
    for level in 0..8 {
        ids.push(
            decide(&admin, &asks("ann", "view", level)).await["context"]["decision_id"].as_str().unwrap().to_owned(),
        );
    }
    let mut asked = asks("ann", "view", 9);
    asked["options"] = json!({"explain": true});
    let why = decide(&admin, &asked).await["context"]["explanation"].clone();
    assert_eq!(
        why["missed"][0],
        json!({"id": "view", "effect": "permit", "failed": "when { resource.level <= 3 }"}),
        "{why}"
    );
    let nobody = decide(&admin, &asks("bob", "view", 1)).await;
    // From here on ann is no member, and the bundle is another: what was decided before is explained as it was.
    assert_eq!(admin.json(Method::PUT, "/v1/governance/entities/user/ann", &json!({})).await.0, 200);
    let to = admin.put("mark", "2").await.unwrap();
    let stricter = VIEW.replace("<= 3", "<= 1").replace("view\")", "strict\")");
    let second = activate(&admin, &other, &stricter, Some(SCHEMA)).await;
    let (_, page) = admin.get("/v1/governance/decisions?origin=authzen&subject=ann&decision=true&limit=3").await;
    assert_eq!(page["items"].as_array().unwrap().len(), 3, "{page}");
    assert_eq!((&page["items"][0]["decision_id"], &page["items"][0]["bundle"]), (&json!(ids[3]), &json!(first)));
    let (_, rest) = admin
        .get(&format!(
            "/v1/governance/decisions?origin=authzen&subject=ann&decision=true&after={}",
            page["next"].as_str().unwrap()
        ))
        .await;
    assert_eq!(
        rest["items"].as_array().unwrap().iter().map(|d| &d["decision_id"]).collect::<Vec<_>>(),
        [&json!(ids[0])]
    );
    let explain = async |id: &str| post(&admin, &format!("/v1/governance/decisions/{id}/explain"), &json!({})).await.1;
    let yes = explain(&ids[1]).await;
    assert_eq!(
        (&yes["decision"], &yes["policies"][0]["id"], &yes["reproduced"], &yes["bundle"]),
        (&json!(true), &json!("view"), &json!(true), &json!(first)),
        "{yes}"
    );
    assert!(yes["policies"][0]["text"].as_str().unwrap().contains("resource.level <= 3"));
    let no = explain(&ids[5]).await;
    assert_eq!(
        (&no["decision"], &no["missed"][0]["failed"]),
        (&json!(false), &json!("when { resource.level <= 3 }")),
        "{no}"
    );
    let near = explain(nobody["context"]["decision_id"].as_str().unwrap()).await;
    assert_eq!(near["missed"][0]["failed"], "scope: principal", "{near}");
    // A mutation's decision is in the same list, and explained the same way.
    let (_, api) = admin.get(&format!("/v1/governance/decisions?origin=api&action=state:put&from={to}&to={to}")).await;
    let api = explain(api["items"][0]["decision_id"].as_str().unwrap()).await;
    assert_eq!(
        (&api["decision"], &api["policies"][0]["id"], &api["reproduced"]),
        (&json!(true), &json!("admin"), &json!(true)),
        "{api}"
    );
    assert_eq!(admin.get("/v1/governance/decisions/01a20a40-497c-7000-8000-000000000000").await.0, 404);
    // What the second bundle would have done then: two of ann's three views flip, by the policy that is not there.
    let path = format!("/v1/governance/bundles/{second}/replay");
    let (status, whole) = post(&admin, &path, &json!({"from": from, "to": to})).await;
    assert_eq!((status, whole["changed"].as_u64(), whole["skipped"].as_u64()), (200, Some(2), Some(0)), "{whole}");
    assert_eq!(
        (&whole["groups"]["subject"]["user::ann"], &whole["groups"]["policy"]["view"], &whole["next"]),
        (&json!(2), &json!(2), &Value::Null)
    );
    assert_eq!(
        (&whole["flips"][0]["decision_id"], &whole["flips"][0]["before"], &whole["flips"][0]["after"]),
        (&json!(ids[2]), &json!(true), &json!(false))
    );
    // In pieces it is the same.
    let (mut after, mut flips, mut read) = (Value::Null, Vec::new(), 0);
    loop {
        let (_, piece) = post(&admin, &path, &json!({"from": from, "to": to, "limit": 2, "after": after})).await;
        read += piece["read"].as_u64().unwrap();
        flips.extend(piece["flips"].as_array().unwrap().clone());
        after = piece["next"].clone();
        if after.is_null() {
            break;
        }
    }
    assert_eq!((Some(read), &json!(flips)), (whole["read"].as_u64(), &whole["flips"]));
    let (_, same) = post(&admin, &format!("/v1/governance/bundles/{first}/replay"), &json!({})).await;
    assert_eq!(
        (same["changed"].as_u64(), same["skipped"].as_u64()),
        (Some(0), Some(0)),
        "with itself, and no policy of the daemon's own, nothing flips: {same}"
    );
    assert!(same["read"].as_u64().unwrap() > 15, "{same}");
    let (_, one) =
        post(&admin, &format!("/v1/governance/decisions/{}/replay", ids[2]), &json!({"bundle": second})).await;
    assert_eq!((&one["before"], &one["after"]), (&json!(true), &json!(false)), "{one}");
    let restarted = daemon.restart().await;
    let admin = Client::of(&restarted);
    assert_eq!(
        post(&admin, &format!("/v1/governance/decisions/{}/explain", ids[1]), &json!({})).await.1["reproduced"],
        true
    );
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_search_agrees_with_evaluation_on_every_element() {
    let (db, _daemon, admin, other) = start().await;
    let put = async |kind: &str, id: &str, body: Value| {
        assert_eq!(admin.json(Method::PUT, &format!("/v1/governance/entities/{kind}/{id}"), &body).await.0, 200);
    };
    for i in 0..30 {
        let parents = if i % 3 == 0 { json!([{"type": "group", "id": "g"}]) } else { json!([]) };
        put("user", &format!("u{i:02}"), json!({"parents": parents, "attrs": {"level": i % 5}})).await;
        put("doc", &format!("d{i:02}"), json!({"attrs": {"level": i % 7}})).await;
    }
    let more = format!(
        "{VIEW} @id(\"edit\") permit (principal, action == Action::\"edit\", resource) when {{ principal has level && principal.level > resource.level }};"
    );
    activate(&admin, &other, &more, Some(SCHEMA)).await;
    for (what, action, fixed) in [
        ("subject", "view", "d02"),
        ("subject", "edit", "d03"),
        ("resource", "view", "u03"),
        ("resource", "edit", "u04"),
    ] {
        let (kind, other_kind) = if what == "subject" { ("user", "doc") } else { ("doc", "user") };
        let other_part = if what == "subject" { "resource" } else { "subject" };
        let (mut found, mut token) = (Vec::new(), String::new());
        loop {
            let body = json!({what: {"type": kind, "id": "ignored"}, other_part: {"type": other_kind, "id": fixed}, "action": {"name": action}, "page": {"limit": 4, "token": token}});
            let (status, page) = post(&admin, &format!("/access/v1/search/{what}"), &body).await;
            assert_eq!(status, 200, "{page}");
            assert!(page["results"].as_array().unwrap().len() <= 4);
            found.extend(page["results"].as_array().unwrap().iter().map(|r| r["id"].as_str().unwrap().to_owned()));
            token = page["page"]["next_token"].as_str().unwrap().to_owned();
            if token.is_empty() {
                break;
            }
        }
        let mut alone = Vec::new();
        for i in 0..30 {
            let id = format!("{}{i:02}", if kind == "user" { "u" } else { "d" });
            let body = json!({what: {"type": kind, "id": id}, other_part: {"type": other_kind, "id": fixed}, "action": {"name": action}});
            if decide(&admin, &body).await["decision"] == true {
                alone.push(id);
            }
        }
        assert_eq!(found, alone, "{what} {action}");
        assert!(!found.is_empty());
    }
    let body = json!({"subject": {"type": "user", "id": "u03"}, "resource": {"type": "doc", "id": "d01"}});
    let (_, actions) = post(&admin, "/access/v1/search/action", &body).await;
    assert_eq!(actions["results"], json!([{"name": "edit"}, {"name": "view"}]), "{actions}");
    let (_, own) = post(&admin, "/access/v1/search/action", &json!({"subject": {"type": "Sop::Client", "id": admin.credential().0}, "resource": {"type": "Sop::Key", "id": "a"}})).await;
    assert!(own["results"].as_array().unwrap().contains(&json!({"name": "state:put"})), "{own}");
    for bad in [
        json!([]),
        json!({"subject": {"type": "user"}}),
        json!({"subject": {"type": "user"}, "action": {"name": "view"}, "resource": {"type": "doc", "id": "x"}, "page": {"token": "x"}}),
    ] {
        assert_eq!(post(&admin, "/access/v1/search/subject", &bad).await.0, 400, "{bad}");
    }
    let index = actions["context"]["index"].as_i64().unwrap();
    assert_eq!(admin.get(&format!("/v1/audit/entries/{index}")).await.1["action"], "governance:search");
    record::check(&db).await;
}
