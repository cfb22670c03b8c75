//! A daemon whose wall clock jumps while it runs.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::Value;

use crate::state_leases::{grant, put, renew};
use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::postgres::{Database, database};
use crate::support::{reaper, record, until};

const HOUR: i64 = 3600;

/// A daemon on a wall clock that can be moved.
struct Moved {
    db: Database,
    daemon: Daemon,
    client: Client,
    by: PathBuf,
}

/// The library that moves it. Whoever can build this has a C compiler: rustc links with it.
async fn library() -> PathBuf {
    let file = reaper::folder("clock").join("clock.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/suite/clock.c");
    let args = ["-shared", "-fPIC", "-O1", "-o"];
    let made = tokio::process::Command::new("cc").args(args).arg(&file).arg(source).output().await.expect("cc runs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    file
}

fn set(by: &Path, seconds: i64) {
    // At once: no reader finds it empty.
    let next = by.with_extension("next");
    std::fs::write(&next, seconds.to_string()).unwrap();
    std::fs::rename(next, by).unwrap();
}

impl Moved {
    async fn start(seconds: i64) -> Self {
        let (db, library) = (database().await, library().await);
        let by = library.with_file_name("by");
        set(&by, seconds);
        let launch = Launch::on(db.url()).env("LD_PRELOAD", &library.display().to_string());
        let daemon = launch.env("SOP_TEST_CLOCK", &by.display().to_string()).start().await;
        let client = Client::of(&daemon);
        Self { db, daemon, client, by }
    }

    /// Moves it, and waits until the daemon has seen it.
    async fn jump(&self, seconds: i64) {
        set(&self.by, seconds);
        until("the daemon to see its clock jump", || async {
            let checks = self.client.bare(Method::GET, "/readyz?verbose").send().await.unwrap().text().await.unwrap();
            checks.contains("the wall clock has stepped by") == (seconds != 0)
        })
        .await;
    }
}

/// Milliseconds since 1970.
fn time(entry: &Value) -> i64 {
    sop::kernel::Timestamp::parse(entry["time"].as_str().unwrap()).unwrap().millis()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wall_clock_that_jumps_ends_no_lease_early_and_keeps_none_alive() {
    let m = Moved::start(0).await;
    m.client.token().await;
    for (round, jump) in [HOUR, -HOUR].into_iter().enumerate() {
        let (kept, silent) = (grant(&m.client, 2.0).await, grant(&m.client, 4.0).await);
        let (last, key) = (Instant::now(), format!("c/{round}"));
        put(&m.client, &key, &silent).await;
        let began = Instant::now();
        m.jump(jump).await;
        // Renewed, it lives; left alone, it lives as long as it should.
        while began.elapsed() < Duration::from_millis(3500) {
            assert_eq!(renew(&m.client, &kept).await, 200);
            assert_eq!(m.client.get(&format!("/v1/state/kv/{key}")).await.0, 200, "{jump}: early");
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        until("the silent one to end", || async { m.client.get(&format!("/v1/state/kv/{key}")).await.0 == 404 }).await;
        let lived = last.elapsed();
        assert!(lived >= Duration::from_secs(4) && lived < Duration::from_secs(16), "{jump}: {lived:?}");
        // The record goes on in the time that was, and so do credentials.
        let there = m.client.clone_at_self();
        there.token().await;
        there.put("c/after", "v").await.unwrap();
        let (_, page) = there.get("/v1/audit/entries?limit=1000&order=asc").await;
        let times: Vec<i64> = page["items"].as_array().unwrap().iter().map(time).collect();
        assert!(times.is_sorted() && times.last().unwrap() - times[0] < 60_000, "{times:?}");
        m.jump(0).await;
    }
    record::check(&m.db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_starts_ahead_of_the_database_writes_nothing() {
    let (db, library) = (database().await, library().await);
    let by = library.with_file_name("by");
    set(&by, HOUR);
    let mut daemon = Launch::on(db.url()).start().await;
    daemon.terminate().await;
    let before = record::check(&db).await;
    let launch = daemon.launch.clone().env("LD_PRELOAD", &library.display().to_string());
    let daemon = launch.env("SOP_TEST_CLOCK", &by.display().to_string()).start().await;
    let client = Client::of(&daemon);
    // A token is an entry too.
    let (id, secret) = client.credential();
    let form = [("grant_type", "client_credentials"), ("client_id", &id), ("client_secret", &secret)];
    let answer = client.bare(Method::POST, "/oauth2/token").form(&form).send().await.unwrap();
    let (status, said) = (answer.status(), answer.text().await.unwrap());
    assert!(status == 503 && said.contains("more than 5 seconds ahead of the database's"), "{status}: {said}");
    assert_eq!(record::check(&db).await, before, "nothing was written");
}
