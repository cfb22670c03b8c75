//! The ledger under faults: commits whose fate is unknown, holders that stall, daemons that share a database.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::postgres::{Database, database, database_alone};
use crate::support::proxy::{Armed, Fault, Proxy};
use crate::support::{record, until};

pub async fn metric(client: &Client, name: &str) -> f64 {
    let text = client.bare(Method::GET, "/metrics").send().await.unwrap().text().await.unwrap();
    let line = text.lines().find(|l| l.starts_with(&format!("{name} "))).unwrap_or_else(|| panic!("no metric {name}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// A daemon behind the proxy and one beside it that wait for the head so long, and a client of each.
async fn two_daemons(db: &Database, proxy: &Proxy, wait: &str) -> (Daemon, Daemon, Client, Client) {
    let one = Launch::on(db.url_via(proxy)).env("SOP__LEDGER__LOCK_WAIT", wait).start().await;
    let two = Launch::beside(&one, db.url()).env("SOP__LEDGER__LOCK_WAIT", wait).start().await;
    let (a, b) = (Client::of(&one), Client::of(&one).also_of(&two));
    (one, two, a, b)
}

/// A put whose statement stands still and has the head locked. One that found the head moved, because another daemon wrote
/// something of its own, holds nothing, and is let go.
async fn stalled_put(db: &Database, proxy: &Proxy, a: &Client) -> (Armed, JoinHandle<Result<i64, String>>) {
    let mut conn = db.connect().await;
    for _ in 0..10 {
        // Between Execute and Sync the server is `active`: the idle limit of the session never comes.
        let stall = proxy.arm(Fault::stall().on("UPDATE ledger.head"));
        let a = a.clone_at_self();
        let put = tokio::spawn(async move { a.put("k", "stalled").await });
        stall.hit().await;
        for _ in 0..20 {
            let free = sqlx::query("SELECT FROM ledger.head FOR UPDATE NOWAIT").execute(&mut conn).await;
            let code = free.err().and_then(|e| e.as_database_error()?.code().map(|c| c.into_owned()));
            if code.as_deref() == Some("55P03") {
                return (stall, put);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        stall.release();
        let _ = put.await;
    }
    panic!("the head moved before each of ten puts");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_of_unknown_fate_is_found_out() {
    for (cut, happened) in [(Fault::cut_before(), false), (Fault::cut_after(), true)] {
        let db = database().await;
        let proxy = Proxy::before(&db);
        let daemon = Launch::on(db.url_via(&proxy)).start().await;
        let client = Client::of(&daemon);
        let first = client.put("k", "one").await.unwrap();
        let fault = proxy.arm(cut.committing("state.history").paused());
        let put = tokio::spawn({
            let client = client.also_of(&daemon);
            client.token().await;
            async move { client.put("k", "two").await }
        });
        fault.hit().await;
        let kept: i64 =
            sqlx::query_scalar("SELECT count(*) FROM state.history").fetch_one(&mut db.connect().await).await.unwrap();
        assert_eq!(kept, if happened { 2 } else { 1 }, "the fault is where it should be");
        fault.release();
        let second = put.await.unwrap().expect("the caller hears what became of it");
        assert!(second > first);
        assert!(metric(&client, "sop_ledger_unknown_commits_total").await >= 1.0);
        let (_, answer) = client.get("/v1/state/kv?prefix=k").await;
        assert_eq!(
            (answer["items"][0]["index"].as_i64(), answer["items"][0]["version"].as_i64()),
            (Some(second), Some(2))
        );
        record::check(&db).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_writer_may_advance_while_a_commit_is_unknown() {
    for cut in [Fault::cut_before(), Fault::cut_after()] {
        let db = database().await;
        let proxy = Proxy::before(&db);
        // The other daemon must not end the first one's session before the cut does.
        let (one, _two, a, b) = two_daemons(&db, &proxy, "1s").await;
        a.put("k", "0").await.unwrap();
        b.put("other", "0").await.unwrap();
        let fault = proxy.arm(cut.committing("state.history").paused());
        let put = tokio::spawn({
            let a = a.also_of(&one);
            a.token().await;
            async move { a.put("k", "1").await }
        });
        fault.hit().await;
        let foreign = tokio::spawn(async move {
            for n in 1..=5 {
                b.put("other", &n.to_string()).await.unwrap();
            }
        });
        // After the commit the other goes on at once; before it, it ends the session that holds the head.
        foreign.await.unwrap();
        fault.release();
        put.await.unwrap().expect("the caller hears what became of it");
        let versions: Vec<i64> = sqlx::query_scalar("SELECT version FROM state.history WHERE key = 'k' ORDER BY index")
            .fetch_all(&mut db.connect().await)
            .await
            .unwrap();
        assert_eq!(versions, [1, 2], "done once, not twice");
        record::check(&db).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_that_stalls_is_ended_and_does_no_harm() {
    let db = database().await;
    let proxy = Proxy::before(&db);
    let (_one, _two, a, b) = two_daemons(&db, &proxy, "500ms").await;
    a.put("k", "0").await.unwrap();
    b.token().await;
    let (stall, stalled) = stalled_put(&db, &proxy, &a).await;
    let began = tokio::time::Instant::now();
    b.put("k", "went on").await.expect("the other daemon goes on");
    assert!(began.elapsed() < Duration::from_secs(4), "took {:?}", began.elapsed());
    stall.release();
    // What the stalled one was doing is done again, or refused; never half done.
    let _ = stalled.await;
    a.put("after", "1").await.expect("the stalled daemon serves again");
    until("the end of its session to be in the record", || async {
        let (_, page) = b.get("/v1/audit/entries?action=ledger:end-session").await;
        !page["items"].as_array().unwrap().is_empty()
    })
    .await;
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_one_that_stalls_is_ended_not_those_that_wait_with_us() {
    let db = database().await;
    // Long enough that a slow disk under the other tests is not taken for a stall.
    let proxy = Proxy::before(&db);
    let one = Launch::on(db.url_via(&proxy)).env("SOP__LEDGER__LOCK_WAIT", "2s").start().await;
    let two = Launch::beside(&one, db.url()).env("SOP__LEDGER__LOCK_WAIT", "2s").start().await;
    let three = Launch::beside(&one, db.url()).env("SOP__LEDGER__LOCK_WAIT", "2s").start().await;
    let a = Client::of(&one);
    a.token().await;
    a.put("k", "0").await.unwrap();
    let (stall, stalled) = stalled_put(&db, &proxy, &a).await;
    let (b, c) = (a.clone_at(&two.url), a.clone_at(&three.url));
    let (x, y) = tokio::join!(b.put("k", "two"), c.put("k", "three"));
    x.and(y).expect("both others go on");
    stall.release();
    let _ = stalled.await;
    a.put("after", "1").await.expect("the stalled daemon serves again");
    until("the end of its session to be in the record", || async {
        let (_, page) = b.get("/v1/audit/entries?action=ledger:end-session").await;
        !page["items"].as_array().unwrap().is_empty()
    })
    .await;
    let (_, page) = b.get("/v1/audit/entries?action=ledger:end-session").await;
    let ended: Vec<&str> = page["items"].as_array().unwrap().iter().map(|e| e["resource"].as_str().unwrap()).collect();
    let (log_two, log_three) = (two.log(), three.log());
    assert!(!log_two.contains("lost its connection") && !log_three.contains("lost its connection"), "{ended:?}");
    assert!(!ended.is_empty() && ended.iter().all(|e| *e == ended[0]), "{ended:?}");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_daemon_is_left_behind_and_wakes_up_harmless() {
    let db = database().await;
    let proxy = Proxy::before(&db);
    let (one, _two, a, b) = two_daemons(&db, &proxy, "500ms").await;
    a.put("k", "0").await.unwrap();
    b.token().await;
    a.put("k", "1").await.unwrap();
    // The daemon freezes with the head locked: its answer is held, and then it is stopped.
    let hold = proxy.arm(Fault::hold_after().on("UPDATE ledger.head"));
    let writing = tokio::spawn({
        let a = a.clone_at_self();
        async move { a.put("k", "frozen").await }
    });
    hold.hit().await;
    one.freeze();
    hold.release();
    b.put("k", "went on").await.expect("the other daemon goes on");
    one.thaw();
    let _ = writing.await;
    a.put("after", "1").await.expect("the thawed daemon serves again");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn counters_on_two_daemons_are_exact_and_reads_see_what_was_written() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let two = Launch::beside(&one, db.url()).start().await;
    let (a, b) = (Client::of(&one), Client::of(&one).also_of(&two));
    a.put("n", "0").await.unwrap();
    let count = |client: Client| async move {
        for _ in 0..15 {
            loop {
                let now = client.request(Method::GET, "/v1/state/kv/n").await.send().await.unwrap();
                let tag = now.headers()["etag"].to_str().unwrap().to_owned();
                let n: i64 = now.text().await.unwrap().parse().unwrap();
                let put = client
                    .request(Method::PUT, "/v1/state/kv/n")
                    .await
                    .header("if-match", tag)
                    .body((n + 1).to_string());
                match put.send().await.unwrap().status().as_u16() {
                    200 => break,
                    412 => {}
                    other => panic!("{other}"),
                }
            }
        }
    };
    join_all((0..6).map(|i| count(if i % 2 == 0 { a.also_of(&one) } else { a.also_of(&two) }))).await;
    for client in [&a, &b] {
        let n = client.request(Method::GET, "/v1/state/kv/n").await.send().await.unwrap().text().await.unwrap();
        assert_eq!(n, "90");
    }
    // What one daemon acknowledged, the other shows to the next read.
    for i in 0..20 {
        let (writer, reader) = if i % 2 == 0 { (&a, &b) } else { (&b, &a) };
        let index = writer.put("seen", &i.to_string()).await.unwrap();
        let read = reader.request(Method::GET, "/v1/state/kv/seen").await.send().await.unwrap();
        assert!(read.headers()["sop-index"].to_str().unwrap().parse::<i64>().unwrap() >= index);
        assert_eq!(read.text().await.unwrap(), i.to_string());
    }
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_revoked_on_one_daemon_is_dead_on_the_other() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let two = Launch::beside(&one, db.url()).start().await;
    let admin = Client::of(&one);
    for round in 0..5 {
        let wanted = json!({"client_name": "c", "scope": "state"});
        let (status, made) = admin.json(Method::POST, "/oauth2/register", &wanted).await;
        assert_eq!(status, 201);
        let (id, secret) = (made["client_id"].as_str().unwrap(), made["client_secret"].as_str().unwrap());
        let (a, b) = (admin.with(id, secret), admin.also_of(&two).with(id, secret));
        let token = a.token().await;
        let ask = |method, client: &Client| client.bare(method, "/v1/state/kv/x").bearer_auth(&token).body("v").send();
        assert_eq!(ask(Method::PUT, &b).await.unwrap().status(), 200, "known on the other at once");
        let form = [("token", token.as_str())];
        let done =
            a.bare(Method::POST, "/oauth2/revoke").basic_auth(id, Some(secret)).form(&form).send().await.unwrap();
        assert_eq!(done.status(), 200);
        let method = if round % 2 == 0 { Method::PUT } else { Method::GET };
        assert_eq!(ask(method, &b).await.unwrap().status(), 401, "dead on the other at the next request");
        let asked =
            b.bare(Method::POST, "/oauth2/introspect").basic_auth(id, Some(secret)).form(&form).send().await.unwrap();
        assert_eq!(asked.json::<Value>().await.unwrap(), json!({"active": false}));
    }
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_says_so_and_recovers() {
    let db = database().await;
    let proxy = Proxy::before(&db);
    let daemon = Launch::on(db.url_via(&proxy)).env("SOP__LEDGER__QUEUE", "2").start().await;
    let client = Client::of(&daemon);
    client.put("k", "0").await.unwrap();
    let hold = proxy.arm(Fault::hold_before().committing("state.history"));
    let token = client.token().await;
    let writes: Vec<_> = (0..12)
        .map(|i| {
            tokio::spawn(client.bare(Method::PUT, &format!("/v1/state/kv/q{i}")).bearer_auth(&token).body("v").send())
        })
        .collect();
    hold.hit().await;
    until("some to be refused", || async { metric(&client, "sop_ledger_overloaded_total").await >= 1.0 }).await;
    hold.release();
    let (mut fine, mut refused) = (0, 0);
    for write in writes {
        let answer = write.await.unwrap().unwrap();
        match answer.status().as_u16() {
            200 => fine += 1,
            503 => {
                assert!(answer.headers().contains_key("retry-after"));
                assert_eq!(answer.json::<Value>().await.unwrap()["type"], "/problems/overloaded");
                refused += 1;
            }
            other => panic!("{other}"),
        }
    }
    assert!(fine >= 1 && refused >= 1, "{fine} fine, {refused} refused");
    client.put("k", "1").await.expect("and it goes on");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_with_the_same_key_gets_the_same_answer() {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    let ask = |key: &'static str, body: Value| {
        let client = &client;
        async move {
            let request = client.request(Method::POST, "/v1/token/operations").await.header("idempotency-key", key);
            let answer = request.json(&body).send().await.unwrap();
            (answer.status().as_u16(), answer.json::<Value>().await.unwrap())
        }
    };
    let body = json!({"kind": "test", "operation": "deploy"});
    let all = join_all((0..5).map(|_| ask("one", body.clone()))).await;
    assert!(all.iter().all(|a| *a == all[0] && a.0 == 201), "the secret too: {all:?}");
    let (status, other) = ask("one", json!({"kind": "test", "operation": "other"})).await;
    assert_eq!((status, other["type"].as_str()), (422, Some("/problems/idempotency-mismatch")));
    let (_, fresh) = ask("two", body).await;
    assert_ne!(fresh["id"], all[0].1["id"]);
    let kept: Vec<Vec<u8>> =
        sqlx::query_scalar("SELECT sealed FROM ledger.outcomes").fetch_all(&mut db.connect().await).await.unwrap();
    let secret = all[0].1["token"].as_str().unwrap().as_bytes();
    assert!(kept.len() == 2 && kept.iter().all(|k| !k.windows(secret.len()).any(|w| w == secret)), "kept sealed");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_database_a_daemon_says_so_and_recovers() {
    let db = database_alone().await;
    // What was sent when the connection died may have happened: for so long it is tried to find out.
    let daemon = Launch::on(db.url()).env("SOP__LEDGER__WRITE_TIMEOUT", "2s").start().await;
    let client = Client::of(&daemon);
    client.put("k", "0").await.unwrap();
    let pid: i32 = std::fs::read_to_string(db.cluster.data.join("postmaster.pid"))
        .unwrap()
        .lines()
        .next()
        .unwrap()
        .parse()
        .unwrap();
    let postmaster = rustix::process::Pid::from_raw(pid).unwrap();
    let backends = db.backends().await;
    rustix::process::kill_process(postmaster, rustix::process::Signal::STOP).unwrap();
    // However this test ends, PostgreSQL goes on, so that it can be stopped.
    struct Goes(rustix::process::Pid);
    impl Drop for Goes {
        fn drop(&mut self) {
            let _ = rustix::process::kill_process(self.0, rustix::process::Signal::CONT);
        }
    }
    let goes = Goes(postmaster);
    for backend in backends {
        let _ = rustix::process::kill_process(
            rustix::process::Pid::from_raw(backend).unwrap(),
            rustix::process::Signal::KILL,
        );
    }
    let refused = client.request(Method::PUT, "/v1/state/kv/k").await.body("1").send().await.unwrap();
    assert_eq!(refused.status(), 503);
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(client.bare(Method::GET, "/livez").send().await.unwrap().status(), 200);
    let ready = client.bare(Method::GET, "/readyz?verbose").send().await.unwrap();
    assert_eq!(ready.status(), 503);
    assert!(ready.text().await.unwrap().contains("[-] database: does not answer"));
    drop(goes);
    until("writes to go on", || async { client.put("k", "2").await.is_ok() }).await;
    until("readiness", || async { client.bare(Method::GET, "/readyz").send().await.unwrap().status() == 200 }).await;
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_go_on_in_the_next_partition() {
    let db = database().await;
    // As if the first partition were nearly full: it ends at 32, and nothing follows it.
    for table in ["ledger.entries", "ledger.details", "audit.segments", "state.renewals"] {
        let narrow =
            format!("DROP TABLE {table}_0; CREATE TABLE {table}_0 PARTITION OF {table} FOR VALUES FROM (0) TO (32)");
        sqlx::raw_sql(sqlx::AssertSqlSafe(narrow)).execute(&mut db.connect().await).await.unwrap();
    }
    // Two that start see the same need; one of them meets it.
    let key = Launch::on(db.url());
    let file = key.dir.join("shared.key");
    std::fs::write(&file, [7u8; 32]).unwrap();
    let with_key = |l: Launch| l.env("SOP__SECRETS__MASTER_KEY_FILE", &file.display().to_string());
    let (a, b) = tokio::join!(with_key(key.clone()).start(), with_key(Launch::on(db.url())).start());
    let first = if a.admin().is_some() { Client::of(&a) } else { Client::of(&b) };
    let clients = [first.also_of(&a), first.also_of(&b)];
    let mut last = 0;
    for n in 0..40 {
        last = clients[n % 2].put(&format!("partition/{n}"), "v").await.unwrap();
    }
    assert!(last > 40, "it went past the end of the first partition");
    let partitions: i64 =
        sqlx::query_scalar("SELECT count(*) FROM pg_inherits WHERE inhparent = 'ledger.entries'::regclass")
            .fetch_one(&mut db.connect().await)
            .await
            .unwrap();
    assert_eq!(partitions, 2);
    let (_, page) =
        first.get(&format!("/v1/audit/entries?action=state:put&order=asc&limit=100&min_index={last}")).await;
    assert_eq!(page["items"].as_array().unwrap().len(), 40, "the search reads on across the end");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_writes_alone_is_served_on_the_spot_and_loses_nothing_when_sessions_end() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let client = Client::of(&one);
    let spot = async || metric(&client, "sop_ledger_spot_turns_total").await;
    client.put("k", "0").await.unwrap();
    let before = spot().await;
    let mut last = 0;
    for n in 0..50 {
        let index = client.put("k", &n.to_string()).await.unwrap();
        assert!(index > last);
        last = index;
    }
    // Beside what the daemon writes of its own accord.
    let alone = spot().await - before;
    assert!(alone >= 40.0, "{alone} of 50 changes of one client were served on the spot");
    // Those of several gather, and both ways make one record, whichever sessions are ended.
    let mut conn = db.connect().await;
    for round in 0..10 {
        let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                   WHERE datname = current_database() AND application_name LIKE 'sop/%/writer'";
        let ended: i64 = sqlx::query_scalar(end).fetch_one(&mut conn).await.unwrap();
        assert!(ended >= 1, "there are sessions that write");
        client.put("k", &format!("alone {round}")).await.unwrap();
        let many = join_all((0..8).map(|n| {
            let client = client.clone_at_self();
            async move { client.put(&format!("many/{n}"), "v").await }
        }));
        assert!(many.await.into_iter().all(|done| done.is_ok()));
    }
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_came_later_is_told_at_once() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let a = Client::of(&one);
    a.put("k", "0").await.unwrap();
    let two = Launch::beside(&one, db.url()).start().await;
    let b = a.clone_at(&two.url);
    // It finds what it was not told by looking, twice a second; told, it knows in a few milliseconds.
    let median = async || {
        let mut took = Vec::new();
        for n in 0..15 {
            let index = a.put("k", &n.to_string()).await.unwrap();
            let began = Instant::now();
            until("the other daemon to know", async || metric(&b, "sop_ledger_followed_index").await >= index as f64)
                .await;
            took.push(began.elapsed());
        }
        took.sort();
        took[7]
    };
    until("it to be told", async || median().await < Duration::from_millis(100)).await;
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_end_again_and_again_keep_no_reader_waiting() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let client = Client::of(&one);
    client.put("k", "0").await.unwrap();
    let mut conn = db.connect().await;
    let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
               WHERE datname = current_database() AND application_name LIKE 'sop/%'";
    for round in 0..9 {
        let ended: i64 = sqlx::query_scalar(end).fetch_one(&mut conn).await.unwrap();
        assert!(ended >= 1);
        let began = Instant::now();
        until("a change, and a read that sees it", async || {
            client.put("k", &round.to_string()).await.is_ok() && client.get("/v1/state/kv?limit=1").await.0 == 200
        })
        .await;
        // A task that waits twice as long after each end would wait half a minute in the end.
        assert!(began.elapsed() < Duration::from_secs(4), "round {round}: {:?}", began.elapsed());
    }
    record::check(&db).await;
}
