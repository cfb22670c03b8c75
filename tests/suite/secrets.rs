//! A whole run, and then a look for every secret of it wherever something is kept or said.

use reqwest::Method;
use serde_json::{Value, json};
use sop::kernel::crypto::{base64, base64url};
use sqlx::Row as _;

use crate::support::client::Client;
use crate::support::daemon::Launch;
use crate::support::postgres::{Database, database};

/// Everything in the database, as text: each row of each table.
async fn dump(db: &Database) -> String {
    let mut conn = db.connect().await;
    let tables = sqlx::query(
        "SELECT format('%I.%I', schemaname, tablename) AS name FROM pg_tables
         WHERE schemaname NOT IN ('pg_catalog', 'information_schema')",
    );
    let mut all = String::new();
    for table in tables.fetch_all(&mut conn).await.unwrap() {
        let name: String = table.get("name");
        let columns = sqlx::query_as::<_, (String, String)>(
            "SELECT quote_ident(attname), format_type(atttypid, NULL) FROM pg_attribute WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped",
        );
        for (column, kind) in columns.bind(&name).fetch_all(&mut conn).await.unwrap() {
            // Bytes as they are, as far as they are text: what is JSON in them can be read.
            let of = if kind == "bytea" { format!("encode({column}, 'escape')") } else { format!("{column}::text") };
            let sql = format!("SELECT coalesce(string_agg({of}, E'\\n'), '') FROM {name}");
            all += &sqlx::query_scalar::<_, String>(sqlx::AssertSqlSafe(sql)).fetch_one(&mut conn).await.unwrap();
        }
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_of_a_whole_run_is_logged_shown_counted_recorded_or_kept() {
    let db = database().await;
    let daemon = Launch::on(db.url()).env("SOP__TELEMETRY__FILTER", "trace").start().await;
    let admin = Client::of(&daemon);
    let mut secrets: Vec<(&str, String)> = vec![("the administrator's secret", daemon.admin().unwrap().1)];
    let text = |v: &Value, name: &str| v[name].as_str().unwrap_or_else(|| panic!("{name} in {v}")).to_owned();
    let mut said = String::new();
    // Clients, their secrets and tokens.
    let grant = "urn:ietf:params:oauth:grant-type:token-exchange";
    let wanted = json!({"scope": "state nexus", "grant_types": ["client_credentials", grant]});
    let (_, made) = admin.json(Method::POST, "/oauth2/register", &wanted).await;
    let (id, secret) = (text(&made, "client_id"), text(&made, "client_secret"));
    secrets.push(("a client's secret", secret.clone()));
    secrets.push(("a registration token", text(&made, "registration_access_token")));
    let form = |path: &'static str, pairs: Vec<(&'static str, String)>| {
        let request = admin.bare(Method::POST, path).basic_auth(&id, Some(&secret)).form(&pairs);
        async move { request.send().await.unwrap().json::<Value>().await.unwrap_or_default() }
    };
    let token = text(&form("/oauth2/token", vec![("grant_type", "client_credentials".into())]).await, "access_token");
    let pairs = vec![
        ("grant_type", grant.to_owned()),
        ("subject_token", token.clone()),
        ("subject_token_type", "urn:ietf:params:oauth:token-type:access_token".to_owned()),
    ];
    let exchanged = text(&form("/oauth2/token", pairs).await, "access_token");
    let seen = form("/oauth2/introspect", vec![("token", exchanged.clone())]).await;
    assert_eq!(seen["active"], true);
    said += &seen.to_string();
    let rotate = format!("/oauth2/register/{id}/secret");
    let (_, replaced) = admin.json(Method::POST, &rotate, &json!({"overlap": 60})).await;
    secrets.push(("a replaced secret", text(&replaced, "client_secret")));
    // Operation tokens, under a key that keeps the answer, and used.
    let issue = admin.request(Method::POST, "/v1/token/operations").await.header("Idempotency-Key", "one");
    let wanted = json!({"kind": "todo", "operation": "pay", "max_uses": 3});
    let todo: Value = issue.json(&wanted).send().await.unwrap().json().await.unwrap();
    let step = json!({"kind": "test", "operation": "pay", "todo": text(&todo, "token")});
    let (_, step) = admin.json(Method::POST, "/v1/token/operations", &step).await;
    let used = json!({"token": text(&todo, "token"), "operation": "pay"});
    assert_eq!(admin.json(Method::POST, "/v1/token/operations/use", &used).await.0, 200);
    // Secrets where they do not belong, in what is refused: the answers say nothing of them.
    let wrong = json!({"token": text(&todo, "token"), "operation": "steal", "nope": secret});
    said += &admin.json(Method::POST, "/v1/token/operations/use", &wrong).await.1.to_string();
    let wrong = json!({"token": text(&todo, "token"), "operation": "steal"});
    said += &admin.json(Method::POST, "/v1/token/operations/use", &wrong).await.1.to_string();
    said +=
        &form("/oauth2/token", vec![("grant_type", "password".into()), ("password", secret.clone())]).await.to_string();
    said +=
        &form("/oauth2/token", vec![("grant_type", grant.into()), ("subject_token", token.clone())]).await.to_string();
    said += &form("/oauth2/revoke", vec![("token", format!("{token}x"))]).await.to_string();
    let answer = admin.bare(Method::GET, "/v1/state/kv").bearer_auth(format!("{token}x")).send().await.unwrap();
    said += &answer.text().await.unwrap();
    assert_eq!(admin.json(Method::POST, "/v1/token/signing-keys/rotate?immediately=true", &json!({})).await.0, 201);
    secrets.push(("an operation token", text(&todo, "token")));
    secrets.push(("a step's token", text(&step, "token")));
    // Of an access token its signature is the secret: the rest is in its claims.
    for (what, token) in [("an access token", &token), ("an exchanged token", &exchanged)] {
        secrets.push((what, token.rsplit('.').next().unwrap().to_owned()));
    }
    let master = std::fs::read(daemon.launch.dir.join("master.key")).unwrap();
    secrets.push(("the master key", base64(&master)));
    secrets.push(("the master key", base64url(&master)));
    secrets.push(("the master key", master.iter().map(|b| format!("{b:02x}")).collect()));
    let again = admin.with(&daemon.admin().unwrap().0, &daemon.admin().unwrap().1);
    let page = |path: &'static str| {
        let again = &again;
        async move { again.request(Method::GET, path).await.send().await.unwrap().text().await.unwrap() }
    };
    said += &page("/metrics").await;
    said += &page("/v1/audit/entries?limit=1000").await;
    said += &page("/v1/token/clients").await;
    said += &page("/v1/token/operations").await;
    said += &page("/v1/token/signing-keys").await;
    said += &page("/openapi.json").await;
    said += &page("/readyz?verbose").await;
    let log = daemon.log();
    let kept = dump(&db).await;
    assert!(log.contains("DEBUG") && log.len() > 10_000, "the log is a whole one");
    assert!(kept.contains(&id) && kept.contains("token:operation-use") && said.contains(&id), "so is the rest");
    for (what, secret) in &secrets {
        assert!(secret.len() >= 32, "{what} is one");
        for (place, text) in [("the log", &log), ("an answer", &said), ("the database", &kept)] {
            let hex: String = secret.bytes().map(|b| format!("{b:02x}")).collect();
            assert!(!text.contains(secret.as_str()) && !text.contains(&hex), "{what} is in {place}");
        }
    }
}
