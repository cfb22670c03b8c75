//! Several hosts: what a failover keeps, what it loses, and what may not be acknowledged while nobody knows.

use std::time::Duration;

use futures_util::future::join_all;
use reqwest::Method;

use crate::ledger::metric;
use crate::support::client::Client;
use crate::support::daemon::Launch;
use crate::support::postgres::{Database, database_alone};
use crate::support::{record, until};

/// Until the standby has what the primary has.
async fn followed(db: &Database) {
    let sql = "SELECT count(*) > 0 FROM pg_stat_replication WHERE replay_lsn = pg_current_wal_lsn()";
    until("the standby to follow", || async {
        sqlx::query_scalar(sql).fetch_one(&mut db.cluster.admin().await).await.unwrap()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_is_followed_and_loses_nothing_that_was_acknowledged() {
    let db = database_alone().await;
    let standby = db.cluster.standby().await;
    let daemon = Launch::on(db.url_with(&standby)).env("SOP__LEDGER__WRITE_TIMEOUT", "2s").start().await;
    let client = Client::of(&daemon);
    followed(&db).await;
    let mut admin = db.cluster.admin().await;
    sqlx::query("ALTER SYSTEM SET synchronous_standby_names = '*'").execute(&mut admin).await.unwrap();
    sqlx::query("SELECT pg_reload_conf()").execute(&mut admin).await.unwrap();
    until("replication to be synchronous", || async {
        let sql = "SELECT count(*) > 0 FROM pg_stat_replication WHERE sync_state = 'sync'";
        sqlx::query_scalar(sql).fetch_one(&mut db.cluster.admin().await).await.unwrap()
    })
    .await;
    let mut last = 0;
    for n in 0..20 {
        last = client.put("failover", &n.to_string()).await.unwrap();
    }
    db.cluster.kill().await;
    assert!(client.put("failover", "lost").await.is_err(), "nobody takes writes now");
    standby.promote().await;
    until("writes to go on", || async { client.put("failover", "after").await.is_ok() }).await;
    // Readers too are on the host that takes writes: many at once, so that each of their connections is asked.
    let path = format!("/v1/state/kv/failover?at={last}");
    let reads = join_all((0..32).map(|_| async {
        let read = client.request(Method::GET, &path).await.send().await.unwrap();
        (read.status().as_u16(), read.text().await.unwrap())
    }));
    let acknowledged = (200, "19".to_owned());
    assert!(reads.await.iter().all(|read| *read == acknowledged), "what was acknowledged is there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_that_lost_entries_stops_the_writing_until_an_operator_resumes() {
    let db = database_alone().await;
    let standby = db.cluster.standby().await;
    let mut daemon = Launch::on(db.url_with(&standby)).env("SOP__LEDGER__WRITE_TIMEOUT", "2s").start().await;
    let client = Client::of(&daemon);
    client.put("k", "kept").await.unwrap();
    followed(&db).await;
    // The standby hears of nothing more.
    sqlx::query("ALTER SYSTEM SET primary_conninfo = 'host=/nowhere'")
        .execute(&mut standby.admin().await)
        .await
        .unwrap();
    sqlx::query("SELECT pg_reload_conf()").execute(&mut standby.admin().await).await.unwrap();
    until("the standby to be cut off", || async {
        let sql = "SELECT count(*) = 0 FROM pg_stat_replication";
        sqlx::query_scalar(sql).fetch_one(&mut db.cluster.admin().await).await.unwrap()
    })
    .await;
    let lost = client.put("k", "lost").await.unwrap();
    // It was published: others may hold a checkpoint that has it.
    let file = daemon.launch.dir.join("checkpoint");
    let kept = || {
        let kept = std::fs::read_to_string(&file).unwrap_or_default();
        kept.lines().nth(1).and_then(|size| size.parse::<i64>().ok()).unwrap_or_default()
    };
    until("the checkpoint", || async { kept() > lost }).await;
    db.cluster.kill().await;
    standby.promote().await;
    let refused = || async { client.request(Method::PUT, "/v1/state/kv/k").await.body("forked").send().await.unwrap() };
    until("the loss to be noticed", || async {
        let refused = refused().await;
        assert!(!refused.status().is_success(), "it wrote on a record that lost entries");
        refused.text().await.unwrap().contains("record-behind")
    })
    .await;
    let ready = client.bare(Method::GET, "/readyz?verbose").send().await.unwrap();
    assert_eq!(ready.status(), 503);
    assert!(ready.text().await.unwrap().contains("record-behind"));
    assert!(metric(&client, "sop_ledger_record_behind").await > 0.0);
    let resume = ["audit", "resume", "--reason", "the primary is lost for good"];
    let (fine, said) = daemon.launch.run(&resume).await;
    assert!(!fine && said.contains("in use by the daemon"), "{said}");
    assert!(daemon.terminate().await.success());
    assert!(kept() > lost, "the proof of what was lost is kept");
    // It starts, is read, and writes nothing.
    let mut daemon = daemon.launch.clone().start().await;
    let ready = Client::of(&daemon).bare(Method::GET, "/readyz?verbose").send().await.unwrap();
    assert_eq!(ready.status(), 503);
    let said = ready.text().await.unwrap();
    assert!(said.contains("record-behind") && said.contains("sop audit resume"), "{said}");
    assert!(Client::of(&daemon).bare(Method::GET, "/log/checkpoint").send().await.unwrap().status().is_success());
    assert!(daemon.terminate().await.success());
    let (fine, said) = daemon.launch.run(&resume).await;
    assert!(fine, "{said}");
    let (fine, said) = daemon.launch.run(&resume).await;
    assert!(!fine && said.contains("nothing is lost"), "{said}");
    let daemon = daemon.launch.clone().start().await;
    let client = Client::of(&daemon);
    client.put("k", "goes on").await.unwrap();
    let (_, page) = client.get("/v1/audit/entries?action=audit:resume&min_index=1").await;
    let entry = &page["items"][0];
    assert_eq!(entry["reason"], "the primary is lost for good");
    assert!(entry["details"]["change"]["published_size"].as_i64() > Some(lost));
    until("the incident", || async {
        let (_, incidents) = client.get("/v1/health/incidents").await;
        incidents.to_string().contains("audit/record-behind")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_may_not_have_been_replicated_is_not_acknowledged() {
    let db = database_alone().await;
    let daemon = Launch::on(db.url()).env("SOP__LEDGER__WRITE_TIMEOUT", "60s").start().await;
    let client = Client::of(&daemon);
    client.put("k", "before").await.unwrap();
    let set = async |names: &str| {
        let mut admin = db.cluster.admin().await;
        let sql = format!("ALTER SYSTEM SET synchronous_standby_names = '{names}'");
        sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&mut admin).await.unwrap();
        sqlx::query("SELECT pg_reload_conf()").execute(&mut admin).await.unwrap();
    };
    // A writer's session that waits for a standby that does not come, and is not this one.
    let waits = async |other_than: i32| -> i32 {
        let sql =
            "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name LIKE 'sop/%/writer'";
        for _ in 0..3000 {
            let pid: Option<i32> = sqlx::query_scalar(sql).fetch_optional(&mut db.cluster.admin().await).await.unwrap();
            match pid.filter(|pid| *pid != other_than) {
                Some(pid) => return pid,
                None => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
        panic!("no writer waits for a standby");
    };
    set("nobody").await;
    // The server takes the setting over when its checkpointer wakes up: from then on a commit of anybody waits.
    until("commits wait for a standby", || async {
        let mut admin = db.cluster.admin().await;
        let commit = sqlx::query("SELECT pg_logical_emit_message(true, 'probe', '')").execute(&mut admin);
        tokio::time::timeout(Duration::from_millis(500), commit).await.is_err()
    })
    .await;
    let put = tokio::spawn({
        let client = client.clone_at_self();
        async move { client.put("k", "after").await }
    });
    let pid = waits(0).await;
    sqlx::query("SELECT pg_cancel_backend($1)").bind(pid).execute(&mut db.cluster.admin().await).await.unwrap();
    waits(pid).await;
    assert!(!put.is_finished(), "it was acknowledged although it may be lost");
    set("").await;
    let index = put.await.unwrap().unwrap();
    assert!(metric(&client, "sop_ledger_unknown_commits_total").await >= 1.0);
    let read = client.request(Method::GET, "/v1/state/kv/k").await.send().await.unwrap();
    assert_eq!(read.headers()["etag"], format!("\"{index}\""));
    assert_eq!(read.text().await.unwrap(), "after");
    record::check(&db).await;
}
