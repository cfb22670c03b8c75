//! Whatever is changed in the database from outside is noticed, named, and nothing is built on it.

use std::time::Duration;

use reqwest::Method;
use serde_json::json;
use sqlx::{AssertSqlSafe, PgConnection};

use crate::support::client::Client;
use crate::support::daemon::Launch;
use crate::support::postgres::database;
use crate::support::until;

async fn sql(conn: &mut PgConnection, text: &str) {
    for part in text.split(';').filter(|p| !p.trim().is_empty()) {
        sqlx::query(AssertSqlSafe(part)).execute(&mut *conn).await.unwrap_or_else(|e| panic!("{part}: {e}"));
    }
}

/// Flips one bit of a column; doing it again undoes it.
fn flip(table: &str, column: &str, which: &str) -> String {
    format!("UPDATE {table} SET {column} = set_bit({column}, 77, 1 - get_bit({column}, 77)) WHERE {which}")
}

#[tokio::test(flavor = "multi_thread")]
async fn each_thing_that_is_stored_is_named_when_it_was_changed() {
    let db = database().await;
    let mut daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    let events = json!([{"specversion": "1.0", "id": "1", "source": "/s", "type": "t"},
                        {"specversion": "1.0", "id": "2", "source": "/s", "type": "t"}]);
    let request = client.request(Method::POST, "/v1/audit/events").await;
    let request = request.header("content-type", "application/cloudevents-batch+json").body(events.to_string());
    let said: serde_json::Value = request.send().await.unwrap().json().await.unwrap();
    let segment = said["index"].as_i64().unwrap();
    let puts = (0..600).map(|i| {
        let client = &client;
        async move { client.put(&format!("k/{i}"), "v").await.unwrap() }
    });
    let head = futures_util::future::join_all(puts).await.into_iter().max().unwrap();
    assert!(head > 512, "two whole tiles");
    assert!(daemon.terminate().await.success());
    let launch = daemon.launch.clone();
    let (fine, said) = launch.run(&["audit", "diagnose"]).await;
    assert!(fine && said.contains("all as they were written"), "{said}");

    let keep = "CREATE TABLE public.kept AS SELECT * FROM ledger.entries WHERE index";
    let bring = "INSERT INTO ledger.entries SELECT * FROM public.kept; DROP TABLE public.kept";
    let swap = "UPDATE ledger.entries e SET leaf = o.leaf, hash = o.hash FROM ledger.entries o
                WHERE (e.index, o.index) IN ((40, 41), (41, 40))";
    let tail = head + 1 - 20;
    let same = |text: String| (text.clone(), text);
    let cases: Vec<((String, String), Vec<String>)> = vec![
        (same(flip("ledger.entries", "leaf", "index = 300")), vec!["entry 300: its leaf was changed".into()]),
        (same(flip("ledger.entries", "leaf", &format!("index = {head}"))), vec![format!("entry {head}: its leaf")]),
        (same(flip("ledger.entries", "hash", "index = 301")), vec!["entry 301: the hash beside".into()]),
        (
            same(format!(
                "{}; {}",
                flip("ledger.entries", "leaf", "index = 3"),
                flip("ledger.details", "salt", "index = 9")
            )),
            vec!["entry 3: its leaf".into(), "entry 9: its details".into()],
        ),
        (same(flip("ledger.details", "details", "index = 302")), vec!["entry 302: its details".into()]),
        (
            same(flip("ledger.details", "segment", &format!("index = {segment}"))),
            vec![format!("entry {segment}: its details")],
        ),
        (
            same(flip("audit.segments", "records", &format!("index = {segment}"))),
            vec![format!("entry {segment}: its records")],
        ),
        (same(flip("audit.tiles", "hashes", "level = 0 AND n = 1")), vec!["tile 0/1 was changed".into()]),
        (same(flip("audit.tiles", "hashes", "level = 1 AND n = 0")), vec!["tile".into()]),
        (same(flip("ledger.head", "root", "id = 1")), vec!["the head was changed".into()]),
        (same(flip("ledger.head", "frontier", "id = 1")), vec!["the head was changed: its frontier".into()]),
        (same(flip("audit.checkpoint", "root", "id = 1")), vec!["the published checkpoint was changed".into()]),
        (same(flip("audit.checkpoint", "note", "id = 1")), vec!["the published checkpoint was changed".into()]),
        (
            (format!("{keep} = 77; DELETE FROM ledger.entries WHERE index = 77"), bring.into()),
            vec!["entry 77: it is missing".into()],
        ),
        (
            (format!("{keep} >= {tail}; DELETE FROM ledger.entries WHERE index >= {tail}"), bring.into()),
            vec![format!("entry {tail}: it is missing")],
        ),
        (same(swap.to_owned()), vec!["entry 40: it was swapped with entry 41".into(), "entry 41".into()]),
    ];
    let mut conn = db.connect().await;
    for ((change, undo), names) in cases {
        sql(&mut conn, &change).await;
        let (fine, said) = launch.run(&["audit", "diagnose"]).await;
        assert!(!fine, "{change} was not noticed: {said}");
        for name in names {
            assert!(said.contains(&name), "{change}: {name:?} is not in: {said}");
        }
        sql(&mut conn, &undo).await;
    }
    let file = launch.dir.join("checkpoint");
    let note = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, note.replace("\n\n", "\n\n\u{2014} x AAAA\n").replace('1', "2")).unwrap();
    let (fine, said) = launch.run(&["audit", "diagnose"]).await;
    assert!(!fine && said.contains("checkpoint in the data folder"), "{said}");
    std::fs::write(&file, note).unwrap();
    let (fine, said) = launch.run(&["audit", "diagnose", "--json"]).await;
    assert!(fine, "what was put back is as it was: {said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_self_audit_finds_stops_writing_on_every_daemon_until_somebody_accepts_it() {
    let db = database().await;
    let one = Launch::on(db.url()).env("SOP__AUDIT__SELF_AUDIT_INTERVAL", "200ms").start().await;
    let two = Launch::beside(&one, db.url()).env("SOP__AUDIT__SELF_AUDIT_INTERVAL", "200ms").start().await;
    let (a, b) = (Client::of(&one), Client::of(&one).also_of(&two));
    let index = a.put("k", "v").await.unwrap();
    b.put("k", "w").await.unwrap();
    sql(&mut db.connect().await, &flip("ledger.details", "details", &format!("index = {index}"))).await;
    for client in [&a, &b] {
        until("writing stops", || async {
            let answer = client.request(Method::PUT, "/v1/state/kv/k").await.body("x").send().await.unwrap();
            answer.status() == 503 && answer.text().await.unwrap().contains("record-damaged")
        })
        .await;
        let ready = client.bare(Method::GET, "/readyz?verbose").send().await.unwrap();
        assert_eq!(ready.status(), 503);
        assert!(ready.text().await.unwrap().contains(&format!("entry {index}: its details")));
        let read = client.request(Method::GET, "/v1/state/kv/k").await.send().await.unwrap();
        assert_eq!(read.status(), 200, "reading goes on");
    }
    let (mut one, mut two) = (one, two);
    assert!(one.terminate().await.success());
    assert!(two.terminate().await.success());
    // A restart does not forget it.
    let mut one = one.launch.clone().start().await;
    let ready = Client::of(&one).bare(Method::GET, "/readyz?verbose").send().await.unwrap();
    assert!(ready.text().await.unwrap().contains("record-damaged"));
    let (fine, said) = one.launch.run(&["audit", "diagnose"]).await;
    assert!(!fine && said.contains("in use by the daemon"), "{said}");
    assert!(one.terminate().await.success());
    let (fine, said) = one.launch.run(&["audit", "resume", "--reason", "we know who it was"]).await;
    assert!(fine && said.contains(&format!("accepted: entry {index}")), "{said}");
    let one = one.launch.clone().start().await;
    let client = Client::of(&one);
    client.put("k", "goes on").await.unwrap();
    let (_, page) = client.get("/v1/audit/entries?action=audit:resume").await;
    assert_eq!(page["items"][0]["reason"], "we know who it was");
    tokio::time::sleep(Duration::from_millis(600)).await;
    client.put("k", "and is not stopped by what was accepted").await.unwrap();
    until("the incident", || async {
        client.get("/v1/health/incidents").await.1.to_string().contains("audit/record-damaged")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_put_back_to_yesterdays_copy_is_not_written_until_the_gap_is_an_entry() {
    let db = database().await;
    let mut daemon = Launch::on(db.url()).start().await;
    Client::of(&daemon).put("k", "yesterday").await.unwrap();
    assert!(daemon.terminate().await.success());
    let yesterday = db.copy().await;
    let mut daemon = daemon.launch.clone().start().await;
    let key = Client::of(&daemon).bare(Method::GET, "/log/key").send().await.unwrap().text().await.unwrap();
    let client = Client::of(&daemon);
    let today = client.put("k", "today").await.unwrap();
    let token = client.token().await;
    // Stopping signs what is there; this is what a witness or a client holds.
    assert!(daemon.terminate().await.success());
    let held = std::fs::read_to_string(daemon.launch.dir.join("checkpoint")).unwrap();
    assert!(held.lines().nth(1).unwrap().parse::<i64>().unwrap() > today);

    let launch = daemon.launch.clone().database(yesterday.url());
    let mut daemon = launch.clone().start().await;
    let client = Client::of(&daemon);
    let ready = client.bare(Method::GET, "/readyz?verbose").send().await.unwrap();
    assert_eq!(ready.status(), 503);
    assert!(ready.text().await.unwrap().contains("record-behind"));
    let refused = client.bare(Method::PUT, "/v1/state/kv/k").bearer_auth(token).body("forked").send().await.unwrap();
    assert_eq!(refused.status(), 503);
    assert!(refused.text().await.unwrap().contains("record-behind"));
    let note = client.bare(Method::GET, "/log/checkpoint").send().await.unwrap().text().await.unwrap();
    assert!(note.lines().nth(1).unwrap().parse::<i64>().unwrap() <= today, "nothing was added: {note}");
    assert!(daemon.terminate().await.success());
    assert_eq!(
        std::fs::read_to_string(launch.dir.join("checkpoint")).unwrap(),
        held,
        "what was signed is not forgotten"
    );

    let (fine, said) = launch.run(&["audit", "resume", "--reason", "restored"]).await;
    assert!(fine, "{said}");
    let daemon = launch.start().await;
    let client = Client::of(&daemon);
    assert!(client.put("k", "goes on").await.unwrap() > 0);
    let (_, page) = client.get("/v1/audit/entries?action=audit:resume&min_index=1").await;
    let gap = &page["items"][0];
    assert_eq!(gap["details"]["change"]["published_size"], json!(held.lines().nth(1).unwrap().parse::<i64>().unwrap()));
    let same = client.bare(Method::GET, "/log/key").send().await.unwrap().text().await.unwrap();
    assert_eq!(same, key, "the same log goes on, and says in it what it lost");
}

/// Divides the first partition of a table at `at` and detaches what lies before.
fn divide(table: &str, at: i64) -> String {
    format!(
        "ALTER TABLE {table} DETACH PARTITION {table}_0; CREATE TABLE {table}_{at} (LIKE {table} INCLUDING ALL);
         INSERT INTO {table}_{at} SELECT * FROM {table}_0 WHERE index >= {at};
         ALTER TABLE {table} ATTACH PARTITION {table}_{at} FOR VALUES FROM ({at}) TO (8388608)"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_detached_leaves_its_tiles_and_the_rest_is_proven_as_before() {
    let db = database().await;
    let mut daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    let puts = (0..600).map(|i| {
        let client = &client;
        async move { client.put(&format!("k/{i}"), "v").await.unwrap() }
    });
    let head = futures_util::future::join_all(puts).await.into_iter().max().unwrap();
    let get = |path: String| {
        let request = client.bare(Method::GET, &path);
        async move { request.send().await.unwrap() }
    };
    until("the tile", || async { get("/log/tile/0/001".into()).await.status() == 200 }).await;
    let tile = get("/log/tile/0/000".into()).await.bytes().await.unwrap();
    assert_eq!(tile.len(), 256 * 32);
    assert!(daemon.terminate().await.success());
    let mut conn = db.connect().await;
    for table in ["ledger.entries", "ledger.details"] {
        sql(&mut conn, &divide(table, 512)).await;
    }
    let launch = daemon.launch.clone().env("SOP__AUDIT__SELF_AUDIT_INTERVAL", "100ms");
    let (fine, said) = launch.run(&["audit", "diagnose"]).await;
    assert!(fine && said.contains("all as they were written"), "{said}");
    let mut daemon = launch.clone().start().await;
    let client = Client::of(&daemon);
    let key = client.bare(Method::GET, "/log/key").send().await.unwrap().text().await.unwrap();
    let key = sop::audit::note::VerifierKey::parse(&key).unwrap();
    let again = client.bare(Method::GET, "/log/tile/0/000").send().await.unwrap().bytes().await.unwrap();
    assert_eq!(again, tile, "a tile is what it was");
    let old = client.request(Method::GET, "/v1/audit/entries/5/receipt").await.send().await.unwrap();
    assert_eq!(old.status(), 410);
    for index in [512, head, client.put("k/new", "v").await.unwrap()] {
        let text = client.request(Method::GET, &format!("/v1/audit/entries/{index}/receipt")).await;
        let text = text.send().await.unwrap().text().await.unwrap();
        sop::audit::proof::Proof::parse(&text).unwrap().verify(&key).unwrap();
    }
    let path = format!("/v1/audit/consistency?from=100&to={}", head + 1);
    assert_eq!(client.request(Method::GET, &path).await.send().await.unwrap().status(), 200);
    until("some self-audits", || async { crate::ledger::metric(&client, "sop_audit_self_audits_total").await > 20.0 })
        .await;
    client.put("k/new", "still written").await.unwrap();
    assert!(daemon.terminate().await.success());
    // A tile of what was detached is still held against the one above.
    sql(&mut conn, &flip("audit.tiles", "hashes", "level = 0 AND n = 1")).await;
    let (fine, said) = launch.run(&["audit", "diagnose"]).await;
    assert!(!fine && said.contains("tile"), "{said}");
}
