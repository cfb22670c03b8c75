//! Policy tests over HTTP: cases beside a bundle, and what it takes for a draft to be validated.

use reqwest::Method;
use serde_json::{Value, json};

use crate::policy::{SCHEMA, VIEW, client, post, start};
use crate::support::client::Client;
use crate::support::daemon::Launch;
use crate::support::postgres::database;
use crate::support::record;

const MORE: &str = r#"
@id("edit") permit (principal, action == Action::"edit", resource) when { principal has level && principal.level > resource.level };
@id("never") forbid (principal in group::"banned", action, resource);
@id("mfa") forbid (principal, action == Action::"edit", resource) unless { context has mfa && context.mfa };"#;

/// A case about `ann`, who is in these groups, and a document of this level.
pub fn case(name: &str, groups: &[&str], action: &str, level: i64, expect: bool) -> Value {
    let parents: Vec<Value> = groups.iter().map(|g| json!({"type": "group", "id": g})).collect();
    let mut ann = json!({"type": "user", "id": "ann"});
    if !parents.is_empty() {
        ann["parents"] = parents.into();
    }
    json!({
        "name": name,
        "request": {"subject": {"type": "user", "id": "ann"}, "action": {"name": action}, "resource": {"type": "doc", "id": "d"}},
        "entities": [ann, {"type": "doc", "id": "d", "attrs": {"level": level}}],
        "expect": expect,
    })
}

async fn draft(admin: &Client, policies: &str, schema: Option<&str>, tests: &Value) -> String {
    let body = json!({"policies": policies, "schema": schema, "tests": tests});
    let (status, made) = post(admin, "/v1/governance/bundles", &body).await;
    assert_eq!((status, made["status"].as_str()), (201, Some("draft")), "{made}");
    made["id"].as_str().unwrap().to_owned()
}

async fn validate(admin: &Client, id: &str) -> (u16, Value) {
    post(admin, &format!("/v1/governance/bundles/{id}/validate"), &json!({})).await
}

async fn shown(admin: &Client, id: &str) -> Value {
    admin.get(&format!("/v1/governance/bundles/{id}")).await.1
}

async fn counted(admin: &Client, outcome: &str) -> u64 {
    let text = admin.bare(Method::GET, "/metrics").send().await.unwrap().text().await.unwrap();
    let line = format!("sop_governance_cases_total{{outcome=\"{outcome}\"}} ");
    text.lines().find_map(|l| l.strip_prefix(&line)).unwrap_or_else(|| panic!("no {line}")).parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draft_becomes_validated_once_all_its_cases_come_out_as_they_must() {
    let (db, _daemon, admin, other) = start().await;
    let tests = json!([
        case("staff view", &["g"], "view", 3, true),
        case("not above 3", &["g"], "view", 4, false),
        case("nobody else", &[], "view", 1, false),
    ]);
    let wrong = json!([tests[0], case("a slip", &["g"], "view", 4, true), case("another", &[], "view", 1, true)]);
    let id = draft(&admin, VIEW, Some(SCHEMA), &wrong).await;
    let before = shown(&admin, &id).await;
    assert_eq!(before["tests"], wrong, "as it was given");
    let (status, refused) = validate(&admin, &id).await;
    assert_eq!((status, refused["type"].as_str()), (422, Some("/problems/unprocessable")), "{refused}");
    let errors = refused["errors"].as_array().unwrap();
    assert_eq!(errors.iter().map(|e| e["pointer"].as_str().unwrap()).collect::<Vec<_>>(), ["/tests/1", "/tests/2"]);
    assert_eq!(
        errors[0]["detail"],
        "a slip: expected permit, decided deny: no policy permits it; view would, but for when { resource.level <= 3 }"
    );
    assert_eq!((&refused["cases"], &refused["passed"]), (&json!(3), &json!(1)));
    assert_eq!(shown(&admin, &id).await, before, "nothing changes");
    assert_eq!((counted(&admin, "passed").await, counted(&admin, "failed").await), (1, 2));
    // One that holds.
    let id = draft(&admin, VIEW, Some(SCHEMA), &tests).await;
    let (status, done) = validate(&admin, &id).await;
    assert_eq!((status, done["status"].as_str()), (200, Some("validated")), "{done}");
    assert_eq!((&done["cases"], &done["passed"], &done["failed"]), (&json!(3), &json!(3), &json!([])));
    assert_eq!((&done["validated"], &done["coverage"]["covered"]), (&json!(true), &json!(1)));
    assert_eq!(
        done["results"][0],
        json!({"name": "staff view", "expected": true, "decided": true, "policies": ["view"], "ok": true})
    );
    let now = shown(&admin, &id).await;
    let (_, entry) = admin.get(&format!("/v1/audit/entries/{}", now["index"])).await;
    assert_eq!((&now["status"], &entry["action"]), (&json!("validated"), &json!("governance:validate")));
    assert_eq!(entry["details"]["change"]["cases"], 3, "{entry}");
    let (_, page) = admin.get("/v1/governance/bundles?status=validated").await;
    assert_eq!((page["items"].as_array().unwrap().len(), &page["items"][0]["tests"]), (1, &Value::Null), "{page}");
    assert_eq!(validate(&admin, &id).await.0, 200, "again");
    // From here on it lives as any other.
    let (_, proposal) = post(&admin, &format!("/v1/governance/bundles/{id}/propose"), &json!({})).await;
    let approve = format!("/v1/governance/proposals/{}/approve", proposal["id"].as_str().unwrap());
    assert_eq!(post(&other, &approve, &json!({})).await.0, 200);
    assert_eq!(post(&admin, &format!("/v1/governance/bundles/{id}/activate"), &json!({})).await.0, 200);
    assert_eq!(validate(&admin, &id).await.0, 409, "it is in force");
    // Who may, and what there is.
    let reader = client(&admin, "governance:read").await;
    assert_eq!(validate(&reader, &id).await.0, 403);
    assert_eq!(validate(&admin, "nothing").await.0, 404);
    let bare = admin.bare(Method::POST, &format!("/v1/governance/bundles/{id}/validate")).send().await.unwrap();
    assert_eq!(bare.status(), 401);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_is_covered_when_it_determined_a_case() {
    let (db, _daemon, admin, _) = start().await;
    let policies = format!("{VIEW}{MORE}");
    let mut with_mfa = case("an editor edits", &["g"], "edit", 1, false);
    with_mfa["request"]["context"] = json!({"mfa": true});
    let mut by_other = case("seen by another", &["g"], "view", 1, true);
    by_other["policies"] = json!(["edit"]);
    let id = draft(&admin, &policies, Some(SCHEMA), &json!([by_other])).await;
    let (status, refused) = validate(&admin, &id).await;
    assert_eq!(
        (status, refused["errors"][0]["detail"].as_str().unwrap()),
        (422, "seen by another: expected permit, decided permit: determined by view, not by edit")
    );
    assert_eq!(refused["coverage"]["uncovered"], json!(["edit", "never", "mfa"]));
    let tests =
        json!([case("staff view", &["g"], "view", 1, true), with_mfa, case("no factor", &["g"], "edit", 1, false)]);
    let id = draft(&admin, &policies, Some(SCHEMA), &tests).await;
    let (_, done) = validate(&admin, &id).await;
    let coverage = &done["coverage"];
    assert_eq!((&coverage["policies"], &coverage["covered"]), (&json!(4), &json!(2)), "{done}");
    assert_eq!(coverage["uncovered"], json!(["edit", "never"]), "nobody's level is above, nobody is banned");
    assert_eq!(coverage["reached"], json!(["edit"]), "its scope matched");
    // A case that asks what the schema does not know is told so: its denial says nothing.
    let mut typo = case("a slip of the pen", &["g"], "vieww", 1, false);
    typo["request"]["context"] = json!({"ip": "::1"});
    let id = draft(&admin, &policies, Some(SCHEMA), &json!([typo])).await;
    let (status, done) = validate(&admin, &id).await;
    let warnings = done["results"][0]["warnings"].to_string();
    assert!(status == 200 && warnings.contains("vieww"), "{done}");
    // Policies of the system's bundle count for nothing here, even under the same name.
    let admin_too = r#"@id("admin") permit (principal, action == Action::"view", resource) when { false };"#;
    let own = json!({"name": "the daemon's own", "expect": true, "policies": ["admin"],
        "request": {"subject": {"type": "Sop::Client", "id": "c"}, "action": {"name": "state:put"}, "resource": {"type": "Sop::Key", "id": "k"}, "context": {"scopes": ["admin"]}},
        "entities": [{"type": "Sop::Client", "id": "c", "attrs": {"name": "c", "scopes": ["admin"], "agent_type": "user"}, "parents": [{"type": "Sop::Role", "id": "admin"}]}, {"type": "Sop::Role", "id": "admin"}]});
    let id = draft(&admin, admin_too, Some(SCHEMA), &json!([own])).await;
    let (status, done) = validate(&admin, &id).await;
    assert_eq!((status, &done["coverage"]["uncovered"]), (200, &json!(["admin"])), "{done}");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_schema_or_cases_there_is_less_to_hold_to() {
    let (db, _daemon, admin, _) = start().await;
    let loose = draft(&admin, VIEW, None, &json!([case("staff view", &["g"], "view", 3, true)])).await;
    let (status, done) = validate(&admin, &loose).await;
    assert_eq!((status, &done["status"], &done["validated"]), (200, &json!("validated"), &json!(false)), "{done}");
    assert_eq!(shown(&admin, &loose).await["validated"], false, "that is about the schema");
    let bare = draft(&admin, VIEW, Some(SCHEMA), &json!([])).await;
    assert_eq!(shown(&admin, &bare).await["tests"], Value::Null);
    let (status, done) = validate(&admin, &bare).await;
    assert_eq!((status, &done["cases"], &done["coverage"]["uncovered"]), (200, &json!(0), &json!(["view"])));
    // A system bundle is put to its cases alone, in the place of the one that is in force.
    let body = json!({"scope": "system", "policies": "@id(\"all\") permit (principal, action, resource);", "tests": [
        {"name": "anybody", "expect": true, "policies": ["all"], "request": {"subject": {"type": "Sop::Client", "id": "c"},
         "action": {"name": "state:put"}, "resource": {"type": "Sop::Key", "id": "k"}}}]});
    let (_, made) = post(&admin, "/v1/governance/bundles", &body).await;
    let id = made["id"].as_str().unwrap();
    let (status, done) = validate(&admin, id).await;
    assert_eq!((status, &done["system"], &done["coverage"]["covered"]), (200, &json!(id), &json!(1)), "{done}");
    // An old row has no cases.
    let mut conn = db.connect().await;
    let sql = "UPDATE governance.bundles SET tests = NULL";
    sqlx::raw_sql(sql).execute(&mut conn).await.unwrap();
    let old = shown(&admin, &loose).await;
    assert_eq!((&old["tests"], validate(&admin, &loose).await.1["cases"].as_u64()), (&Value::Null, Some(0)));
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cases_that_cannot_be_are_refused_where_they_stand() {
    let db = database().await;
    let launch = Launch::on(db.url()).env("SOP__GOVERNANCE__CASES_TIMEOUT", "60s");
    let daemon = launch.env("SOP__SERVER__BODY_LIMIT", "8388608").start().await;
    let admin = Client::of(&daemon);
    let good = || case("n", &["g"], "view", 1, true);
    let with = |change: &dyn Fn(&mut Value)| {
        let mut v = good();
        change(&mut v);
        json!({"policies": VIEW, "schema": SCHEMA, "tests": [good(), v]})
    };
    let parent = json!([{"type": "doc", "id": "d"}]);
    let chain: Vec<Value> =
        (0..1001).map(|i| json!({"type": "group", "id": format!("g{i}"), "parents": [{"type": "group", "id": format!("g{}", i + 1)}]})).collect();
    for (body, status, pointer) in [
        (with(&|v| v["expect"] = json!("true")), 400, "/tests/1/expect"),
        (with(&|v| v["expects"] = json!(true)), 400, "/tests/1/expects"),
        (with(&|v| drop(v.as_object_mut().unwrap().remove("expect"))), 400, "/tests/1"),
        (with(&|v| v["request"]["contxt"] = json!({})), 400, "/tests/1/request/contxt"),
        (with(&|v| v["request"]["subject"]["id"] = json!("x".repeat(513))), 400, "/tests/1/request/subject/id"),
        (with(&|v| v["name"] = json!("x".repeat(513))), 400, "/tests/1/name"),
        (with(&|v| v["name"] = json!("a\u{0}b")), 400, "/tests/1/name"),
        (with(&|v| v["entities"][0]["type"] = json!("no type")), 400, "/tests/1/entities/0/type"),
        (with(&|v| v["entities"][1]["attrs"] = json!({"level": null})), 400, "/tests/1/entities/1/attrs"),
        (with(&|v| v["entities"][1]["parents"] = parent.clone()), 422, "/tests/1/entities/1/parents"),
        (with(&|v| v["entities"][1] = v["entities"][0].clone()), 422, "/tests/1/entities/1"),
        (with(&|v| v["entities"] = json!(chain)), 422, "/tests/1/entities"),
        (json!({"policies": VIEW, "tests": vec![good(); 10_001]}), 422, "/tests"),
        (json!({"policies": VIEW, "tests": good()}), 400, "/tests"),
    ] {
        let (got, refused) = post(&admin, "/v1/governance/bundles", &body).await;
        let at = refused["errors"][0]["pointer"].as_str();
        assert_eq!((got, at), (status, Some(pointer)), "{refused}");
    }
    // Names that are no trouble, types that nobody knows, and what cannot be decided: a case, and not the daemon, fails.
    let mut odd = case("<&>\"' ]]> 🦀", &["g"], "view", 1, true);
    odd["request"]["subject"]["type"] = json!("not a type");
    let mut unknown = case("unknown", &["g"], "view", 1, true);
    unknown["request"]["resource"] = json!({"type": "Nothing::Known", "id": "x"});
    let mut float = case("a fraction", &["g"], "view", 1, true);
    float["request"]["context"] = json!({"mfa": 1.5});
    let id = draft(&admin, VIEW, Some(SCHEMA), &json!([odd, unknown, float])).await;
    let (status, refused) = validate(&admin, &id).await;
    let errors = refused["errors"].as_array().unwrap();
    assert_eq!((status, errors.len()), (422, 3), "{refused}");
    assert!(
        errors[0]["detail"]
            .as_str()
            .unwrap()
            .starts_with("<&>\"' ]]> 🦀: expected permit, decided nothing: it cannot be decided")
    );
    assert!(errors[1]["detail"].as_str().unwrap().contains("decided deny"), "{refused}");
    // As many as there may be, each in a world of its own.
    let many: Vec<Value> = (0..1000).map(|i| case(&format!("n{i}"), &["g"], "view", i % 6, i % 6 <= 3)).collect();
    let id = draft(&admin, VIEW, Some(SCHEMA), &json!(many)).await;
    let (status, done) = validate(&admin, &id).await;
    assert_eq!((status, &done["passed"], done["results"].as_array().unwrap().len()), (200, &json!(1000), 1000));
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn validations_race_on_two_daemons_and_against_an_activation() {
    let (db, daemon, admin, other) = start().await;
    let second = Launch::beside(&daemon, db.url()).start().await;
    let there = admin.also_of(&second);
    for round in 0..4 {
        let tests = json!([case("staff view", &["g"], "view", 3, true)]);
        let id = draft(&admin, &VIEW.replace("3", &(3 + round).to_string()), Some(SCHEMA), &tests).await;
        let (a, b) = tokio::join!(validate(&admin, &id), validate(&there, &id));
        assert_eq!((a.0, b.0), (200, 200), "each is a step of its own: {} {}", a.1, b.1);
        assert_eq!(shown(&there, &id).await["status"], "validated");
        let (_, proposal) = post(&admin, &format!("/v1/governance/bundles/{id}/propose"), &json!({})).await;
        let approve = format!("/v1/governance/proposals/{}/approve", proposal["id"].as_str().unwrap());
        assert_eq!(post(&other, &approve, &json!({})).await.0, 200);
        let activate = format!("/v1/governance/bundles/{id}/activate");
        let none = json!({});
        let (active, checked) = tokio::join!(post(&admin, &activate, &none), validate(&there, &id));
        assert_eq!(active.0, 200, "{}", active.1);
        assert!([200, 409].contains(&checked.0), "before it or not at all: {}", checked.1);
        assert_eq!(shown(&there, &id).await["status"], "active", "what is in force is not set back");
    }
    let (_, page) = admin.get("/v1/audit/entries?action=governance:validate").await;
    assert!(page["items"].as_array().unwrap().len() >= 8, "{page}");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_takes_too_long_is_given_up_and_nobody_else_waits() {
    let db = database().await;
    let daemon = Launch::on(db.url()).env("SOP__GOVERNANCE__CASES_TIMEOUT", "1s").start().await;
    let admin = Client::of(&daemon);
    // Each the deepest hierarchy there may be: to close over it is what costs.
    let chain: Vec<Value> = (0..990)
        .map(|i| json!({"type": "group", "id": i.to_string(), "parents": [{"type": "group", "id": (i + 1).to_string()}]}))
        .collect();
    let mut deep = case("deep", &["0"], "view", 1, false);
    deep["entities"].as_array_mut().unwrap().extend(chain);
    let id = draft(&admin, VIEW, Some(SCHEMA), &json!(vec![deep; 60])).await;
    let began = std::time::Instant::now();
    let work = validate(&admin, &id);
    let beside = async {
        let mut worst = std::time::Duration::ZERO;
        for i in 0..20 {
            let began = std::time::Instant::now();
            admin.put("beside", &i.to_string()).await.unwrap();
            worst = worst.max(began.elapsed());
        }
        worst
    };
    let ((status, said), worst) = tokio::join!(work, beside);
    assert_eq!(status, 422, "{said}");
    assert!(said["detail"].as_str().unwrap().starts_with("after 1 s, "), "{said}");
    assert!(
        began.elapsed() < std::time::Duration::from_secs(9) && worst < std::time::Duration::from_secs(1),
        "{worst:?}"
    );
    assert_eq!(shown(&admin, &id).await["status"], "draft");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_shipped_bundle_takes_the_place_of_an_older_one() {
    let (db, mut daemon, _, _) = start().await;
    daemon.kill().await;
    let mut conn = db.connect().await;
    let sql = "UPDATE governance.bundles SET id = 'system-older', shipped = 1 WHERE shipped IS NOT NULL;
        UPDATE governance.in_force SET system = 'system-older'";
    sqlx::raw_sql(sql).execute(&mut conn).await.unwrap();
    let daemon = daemon.restart().await;
    let admin = Client::of(&daemon);
    let (_, now) = admin.get("/v1/governance/active").await;
    assert_ne!(now["system"], "system-older", "{now}");
    assert_eq!(shown(&admin, "system-older").await["status"], "retired");
    assert_eq!(shown(&admin, now["system"].as_str().unwrap()).await["status"], "active");
    let id = draft(&admin, VIEW, Some(SCHEMA), &json!([case("staff view", &["g"], "view", 3, true)])).await;
    assert_eq!(validate(&admin, &id).await.0, 200, "what only the newer one knows");
    record::check(&db).await;
}
