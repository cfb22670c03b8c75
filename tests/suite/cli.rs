//! The command line: the demo against a daemon that runs, and the rooms from a shell.

use serde_json::Value;
use tokio::io::AsyncBufReadExt as _;

use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::postgres::database;
use crate::support::{record, soon};

async fn sop(daemon: &Daemon, args: &[&str]) -> (bool, String) {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_sop"));
    command.args(["--data-dir"]).arg(&daemon.launch.dir).args(args);
    let done = command.output().await.unwrap();
    (done.status.success(), String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_day_of_logos_leaves_a_record_that_verifies() {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    let (fine, said) = sop(&daemon, &["demo", "--speed", "40", "--json"]).await;
    assert!(fine, "{said}");
    let done: Value = serde_json::from_str(&said).unwrap();
    assert!(done["verified"]["entries"].as_u64() > Some(300), "{said}");
    assert_eq!(done["verified"]["entries"], done["verified"]["details"]);
    assert!(done["verified"]["denied"].as_u64() >= Some(2) && done["refused"].as_u64() >= Some(3), "{said}");
    assert!(done["receipts"].as_u64() >= Some(15), "{said}");
    for action in ["nexus:expire", "health:status", "token:operation-use", "governance:evaluate"] {
        let (_, page) = client.get(&format!("/v1/audit/entries?action={action}")).await;
        assert!(!page["items"].as_array().unwrap().is_empty(), "no {action}");
    }
    let (_, incidents) = client.get("/v1/health/incidents").await;
    assert_eq!(incidents["items"][0]["status"], "resolved", "who failed came back: {incidents}");
    assert_eq!(client.get("/v1/nexus/services").await.1["items"], serde_json::json!([]), "all have left");
    // Once more, with some of them, as lines.
    let (fine, said) = sop(&daemon, &["demo", "--speed", "100", "--protocols", "SOP,SCP"]).await;
    assert!(fine, "{said}");
    assert!(said.contains("it had when it failed, delivered again"), "{said}");
    assert!(said.contains("verified offline with sop/") && !said.contains("ARP"), "{said}");
    let (fine, said) = sop(&daemon, &["demo", "--protocols", "XYZ"]).await;
    assert!(!fine && said.contains("there is no protocol XYZ"), "{said}");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn services_messages_and_checks_from_the_command_line() {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    for (path, body) in [
        ("/v1/nexus/services/arp%2Fplan/instances/i", serde_json::json!({"address": "http://h:1", "ttl": 60})),
        ("/v1/nexus/topics/a%2Fb", serde_json::json!({"retention": 60})),
        ("/v1/nexus/topics/a%2Fb/groups/g", serde_json::json!({})),
        ("/v1/health/checks/nightly", serde_json::json!({"kind": "ttl", "service": "jobs"})),
    ] {
        assert_eq!(client.json(reqwest::Method::PUT, path, &body).await.0, 201);
    }
    assert_eq!(sop(&daemon, &["nexus", "services"]).await, (true, "arp/plan\t1 of 1 passing\n".into()));
    assert!(sop(&daemon, &["nexus", "service", "arp/plan", "--healthy"]).await.1.contains("http://h:1\tpassing"));
    let (fine, said) = sop(&daemon, &["nexus", "publish", "a/b", "höllo", "--id", "ä 1", "--type", "x"]).await;
    assert!(fine && said.contains(" at index "), "{said}");
    let (_, said) = sop(&daemon, &["nexus", "pull", "a/b", "g", "--json"]).await;
    let got: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(got["event"]["id"], "ä 1");
    let id = got["id"].as_str().unwrap();
    assert!(sop(&daemon, &["nexus", "ack", "a/b", "g", id]).await.0);
    assert!(!sop(&daemon, &["nexus", "ack", "a/b", "g", id]).await.0, "it is dealt with");
    assert!(!sop(&daemon, &["nexus", "publish", "absent", "x"]).await.0);
    let (fine, said) = sop(&daemon, &["health", "service", "jobs"]).await;
    assert!(!fine && said.contains("jobs is unknown"), "{said}");
    assert!(sop(&daemon, &["health", "report", "nightly", "critical", "--output", "no space"]).await.0);
    let (_, said) = sop(&daemon, &["health", "incidents"]).await;
    assert!(said.contains("\topen\twarning\t") && said.contains("no space"), "{said}");
    let id = said.split('\t').next().unwrap().to_owned();
    assert!(sop(&daemon, &["health", "acknowledge", &id, "--note", "looking"]).await.0);
    assert!(sop(&daemon, &["health", "report", "nightly", "passing"]).await.0);
    assert_eq!(sop(&daemon, &["health", "service", "jobs"]).await, (true, "jobs is passing\n".into()));
    assert_eq!(sop(&daemon, &["health", "incidents"]).await, (true, String::new()));
    assert!(sop(&daemon, &["health", "incidents", "--all"]).await.1.contains("resolved"));
    assert!(sop(&daemon, &["health", "checks"]).await.1.starts_with("nightly\tpassing\t"));
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_tokens_and_the_policy_from_the_command_line() {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    let (fine, said) = sop(&daemon, &["token", "register", "reader", "--scope", "state:read", "--json"]).await;
    assert!(fine, "{said}");
    let made: Value = serde_json::from_str(&said).unwrap();
    let (id, secret) = (made["client_id"].as_str().unwrap(), made["client_secret"].as_str().unwrap());
    let token = client.with(id, secret).token().await;
    assert_eq!(sop(&daemon, &["token", "introspect", &token]).await.1, format!("active: {id} with scope state:read\n"));
    let name = format!("Sop::Client::{id}");
    let (fine, said) = sop(&daemon, &["policy", "ask", &name, "state:get", "Sop::Key::a/b"]).await;
    assert!(fine && said.contains("may state:get Sop::Key::a/b: by state:read; decision "), "{said}");
    let (fine, said) = sop(&daemon, &["policy", "ask", &name, "state:put", "Sop::Key::a/b"]).await;
    assert!(!fine && said.contains("may not state:put Sop::Key::a/b: no policy permits it"), "{said}");
    assert!(sop(&daemon, &["policy", "put", "user::ada", "--attrs", "{\"n\": 1}", "--parent", "group::staff"]).await.0);
    let (_, said) = sop(&daemon, &["policy", "entity", "user::ada"]).await;
    let entity: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(
        (&entity["attrs"]["n"], &entity["parents"][0]["id"]),
        (&Value::from(1), &Value::from("staff")),
        "{said}"
    );
    assert!(sop(&daemon, &["policy", "rm", "user::ada"]).await.0);
    assert!(!sop(&daemon, &["policy", "entity", "user::ada"]).await.0);
    let (_, said) = sop(&daemon, &["token", "operation", "deploy", "--max-uses", "1"]).await;
    let secret = said.lines().next().unwrap().to_owned();
    assert!(secret.starts_with("sopt_") && said.contains("1 uses until"), "{said}");
    assert_eq!(sop(&daemon, &["token", "use", &secret, "deploy"]).await, (true, "used; 0 left\n".into()));
    assert!(!sop(&daemon, &["token", "use", &secret, "deploy"]).await.0, "spent");
    let (_, own) = sop(&daemon, &["token", "issue"]).await;
    assert_eq!(sop(&daemon, &["token", "revoke", own.trim()]).await, (true, "revoked\n".into()));
    assert!(sop(&daemon, &["token", "introspect", own.trim()]).await.1.starts_with("not active"));
    assert!(sop(&daemon, &["token", "unregister", id]).await.0);
    assert_eq!(sop(&daemon, &["token", "introspect", &token]).await.1, "not active, or not for you to know\n");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_are_looked_after_and_keys_replaced_from_the_command_line() {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    let register = ["token", "register", "ARP", "--agent-type", "system", "--exchange", "--json"];
    let made: Value = serde_json::from_str(&sop(&daemon, &register).await.1).unwrap();
    assert_eq!(made["scope"], "state nexus health", "what its type may");
    let (id, secret) = (made["client_id"].as_str().unwrap(), made["client_secret"].as_str().unwrap());
    let (_, all) = sop(&daemon, &["token", "clients"]).await;
    assert!(
        all.lines().any(|l| l.starts_with(id) && l.contains("system") && l.ends_with("never used                ARP")),
        "{all}"
    );
    let token = client.with(id, secret).token().await;
    // Ended one by one, by its id, and all; the client is disabled and enabled.
    let (fine, said) = sop(&daemon, &["token", "end", "--token", &token, "--family", "--reason", "lost"]).await;
    assert!(fine && said.starts_with("token ") && said.contains(id), "{said}");
    let (fine, said) = sop(&daemon, &["token", "end", id]).await;
    assert!(fine && said.starts_with("all tokens of "), "{said}");
    assert!(!sop(&daemon, &["token", "end"]).await.0);
    assert!(sop(&daemon, &["token", "disable", id, "--reason", "retired"]).await.0);
    assert!(sop(&daemon, &["token", "clients"]).await.1.contains("ARP  (disabled)"));
    assert!(!sop(&daemon, &["token", "disable", id]).await.0, "once");
    assert!(sop(&daemon, &["token", "enable", id]).await.0);
    assert_eq!(sop(&daemon, &["token", "lockouts"]).await.1, "nobody is locked out\n");
    assert!(!sop(&daemon, &["token", "release", id]).await.0);
    // A todo, its step, and the end of both.
    let todo = ["token", "operation", "deploy", "--kind", "todo", "--json"];
    let todo: Value = serde_json::from_str(&sop(&daemon, &todo).await.1).unwrap();
    let step = ["token", "operation", "deploy/copy", "--todo", todo["token"].as_str().unwrap()];
    let (fine, step) = sop(&daemon, &step).await;
    assert!(fine, "{step}");
    let (_, listed) = sop(&daemon, &["token", "operations"]).await;
    assert!(
        listed.contains("active     1/100  deploy\n") && listed.contains("active     0/1  deploy/copy"),
        "{listed}"
    );
    assert!(sop(&daemon, &["token", "complete", todo["id"].as_str().unwrap()]).await.0);
    assert!(!sop(&daemon, &["token", "use", step.lines().next().unwrap(), "deploy/copy"]).await.0);
    let (_, listed) = sop(&daemon, &["token", "operations"]).await;
    assert!(listed.contains("completed") && listed.contains("revoked"), "{listed}");
    // Keys.
    let (_, before) = sop(&daemon, &["key", "ls"]).await;
    assert!(before.lines().count() == 2 && before.contains("EdDSA  active"), "{before}");
    let (fine, said) = sop(&daemon, &["key", "rotate"]).await;
    assert!(fine && said.contains(" signs from "), "{said}");
    assert!(sop(&daemon, &["key", "ls"]).await.1.contains("pending"));
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_at_the_machine_gets_back_in_and_the_record_says_so() {
    let db = database().await;
    let mut daemon = Launch::on(db.url()).start().await;
    let (lost, _) = daemon.admin().unwrap();
    let (fine, said) = daemon.launch.run(&["admin", "recover"]).await;
    assert!(!fine && said.contains("in use by the daemon"), "{said}");
    assert!(daemon.terminate().await.success());
    let (fine, said) = daemon.launch.run(&["--json", "admin", "recover"]).await;
    assert!(fine, "{said}");
    let done: Value = serde_json::from_str(said.lines().next().unwrap()).unwrap();
    let daemon = daemon.launch.clone().start().await;
    let (id, secret) = daemon.admin().unwrap();
    assert!(id != lost && done["client_id"] == id.as_str(), "{said}");
    assert!(!said.contains(&secret), "the secret is in the file, and nowhere else");
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(daemon.launch.dir.join("admin.json")).unwrap().permissions(),
    );
    assert_eq!(mode & 0o777, 0o600);
    let client = Client::of(&daemon);
    client.put("k", "v").await.unwrap();
    let (_, page) = client.get("/v1/audit/entries?action=token:recover").await;
    assert_eq!(page["items"][0]["index"], done["index"]);
    assert_eq!(page["items"][0]["details"]["signal"]["severity"], "critical");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_record_is_looked_into_from_the_command_line() {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let file = daemon.launch.dir.join("event.json");
    let event = r#"{"specversion":"1.0","id":"e-1","source":"/arp","type":"arp.plan"}"#;
    std::fs::write(&file, format!("[{event}, {{}}]")).unwrap();
    let path = file.display().to_string();
    let (fine, said) = sop(&daemon, &["audit", "event", &path]).await;
    assert!(fine && said.contains("\"accepted\":1"), "{said}");
    let (fine, said) = sop(&daemon, &["audit", "event", &path, "--atomic"]).await;
    assert!(!fine && said.contains("none was"), "{said}");
    let (fine, said) = sop(&daemon, &["audit", "search", "plan", "--action", "audit:event"]).await;
    assert!(fine && said.lines().count() == 1 && said.contains("event//arp"), "{said}");
    let (fine, said) = sop(&daemon, &["audit", "facets", "--room", "audit"]).await;
    assert!(fine && said.contains("audit:event"), "{said}");
    std::fs::write(&file, r#"{"action": "audit:event"}"#).unwrap();
    assert!(sop(&daemon, &["audit", "save-search", "events", &path]).await.0);
    let (fine, said) = sop(&daemon, &["audit", "search", "--saved", "events", "--json"]).await;
    assert!(fine && said.lines().count() == 1, "{said}");
    let (_, said) = sop(&daemon, &["audit", "searches"]).await;
    assert!(said.contains("\"name\":\"events\""), "{said}");
    assert!(sop(&daemon, &["audit", "forget-search", "events"]).await.0);
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_sop"));
    command.args(["audit", "tail", "--action", "audit:event", "--after", "0", "--data-dir"]).arg(&daemon.launch.dir);
    let mut tail = command.stdout(std::process::Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let mut lines = tokio::io::BufReader::new(tail.stdout.take().unwrap()).lines();
    let line = soon("a line", lines.next_line()).await.unwrap();
    assert!(line.unwrap().contains("audit:event"));
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_locks_and_changes_of_several_rooms_from_the_command_line() {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    let json = async |args: &[&str]| -> Value {
        let (fine, said) = sop(&daemon, &[args, &["--json"]].concat()).await;
        assert!(fine, "{said}");
        serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}"))
    };
    let put = json(&["state", "put", "a/b", "höllo", "--content-type", "text/plain"]).await;
    let index = put["index"].as_i64().unwrap();
    let at = index.to_string();
    assert_eq!(sop(&daemon, &["state", "get", "a/b"]).await, (true, "höllo".into()), "the very bytes");
    let item = serde_json::json!({"key": "a/b", "value": sop::kernel::crypto::base64("höllo"), "content_type": "text/plain",
        "index": index, "created_index": index, "version": 1});
    assert_eq!(json(&["state", "get", "a/b"]).await, item);
    assert!(sop(&daemon, &["state", "put", "a/b", "x", "--if-index", &at]).await.0);
    assert_eq!(json(&["state", "get", "a/b", "--at", &at]).await, item, "as it was then");
    assert!(!sop(&daemon, &["state", "put", "a/b", "y", "--if-index", &at]).await.0);
    assert_eq!(json(&["state", "ls", "a/"]).await["version"], 2);
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_sop"));
    command.args(["state", "watch", "a/", "--after", &at, "--json", "--data-dir"]).arg(&daemon.launch.dir);
    let mut watch = command.stdout(std::process::Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let mut lines = tokio::io::BufReader::new(watch.stdout.take().unwrap()).lines();
    let mut heard = async || -> Value {
        let line = soon("a change", lines.next_line()).await;
        serde_json::from_str(&line.unwrap().unwrap()).unwrap()
    };
    assert_eq!(heard().await["version"], 2);
    // Held while a command runs, which finds the token in its environment.
    assert_eq!(json(&["state", "lock", "l"]).await["holders"], serde_json::json!([]));
    let (fine, said) = sop(&daemon, &["state", "lock", "l", "--", "sh", "-c", "echo $SOP_FENCING_TOKEN"]).await;
    assert!(fine && said.starts_with("l="), "{said}");
    assert!(!sop(&daemon, &["state", "lock", "l", "--", "false"]).await.0);
    // Changes of two rooms as one.
    let topic = serde_json::json!({"retention": 60});
    assert_eq!(client.json(reqwest::Method::PUT, "/v1/nexus/topics/t", &topic).await.0, 201);
    let file = daemon.launch.dir.join("tx.json");
    let event = r#"{"specversion": "1.0", "id": "1", "source": "/s", "type": "t"}"#;
    let work = format!(
        r#"{{"operations": [{{"state:delete": {{"key": "a/b"}}}}, {{"nexus:publish": {{"topic": "t", "event": {event}}}}}]}}"#
    );
    std::fs::write(&file, &work).unwrap();
    let path = file.display().to_string();
    let done = json(&["state", "tx", &path]).await;
    assert_eq!((&done["results"][0]["key"], &done["results"][1]["index"]), (&Value::from("a/b"), &done["index"]));
    assert_eq!((&heard().await["event"], done["index"].as_i64() > Some(index)), (&Value::from("delete"), true));
    let (fine, said) = sop(&daemon, &["state", "tx", &path]).await;
    assert!(!fine && said.contains("there is no key a/b (404)"), "{said}");
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_sop"));
    command.args(["state", "tx", "-", "--data-dir"]).arg(&daemon.launch.dir);
    let mut child = command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let work = r#"{"operations": [{"state:put": {"key": "a/c", "json": 1}}]}"#;
    tokio::io::AsyncWriteExt::write_all(&mut stdin, work.as_bytes()).await.unwrap();
    drop(stdin);
    let said: Value = serde_json::from_slice(&child.wait_with_output().await.unwrap().stdout).unwrap();
    assert_eq!(said["results"][0]["version"], 1);
    assert!(sop(&daemon, &["state", "rm", "a/c"]).await.0);
    assert_eq!(sop(&daemon, &["state", "ls"]).await, (true, String::new()));
    record::check(&db).await;
}
