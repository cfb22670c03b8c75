//! Locks, fencing, elections: who holds what when, in which order, and what a holder of the past can still do (nothing).

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use crate::ledger::metric;
use crate::state::events;
use crate::state_leases::{grant, other};
use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::postgres::{Database, database};
use crate::support::{record, soon, until};

async fn start() -> (Database, Daemon, Client) {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    (db, daemon, client)
}

pub async fn lock(client: &Client, name: &str, body: Value) -> (u16, Value) {
    client.json(Method::POST, &format!("/v1/state/locks/{name}"), &body).await
}

pub async fn unlock(client: &Client, name: &str, held: &Value) -> u16 {
    let path = format!("/v1/state/locks/{name}?lease={}", held["lease"].as_str().unwrap());
    client.request(Method::DELETE, &path).await.send().await.unwrap().status().as_u16()
}

pub fn token(held: &Value) -> i64 {
    held["fencing_token"].as_i64().unwrap_or_else(|| panic!("no token in {held}"))
}

async fn fenced(client: &Client, method: Method, path: &str, fence: &str, body: Value) -> (u16, Value) {
    let answer = client.request(method, path).await.header("if-fencing-token", fence).json(&body).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_has_one_holder_and_its_token_fences_every_room() {
    let (db, _daemon, client) = start().await;
    let b = other(&client, "state").await;
    let (status, held) = lock(&client, "jobs/nightly", json!({"ttl": 30})).await;
    assert_eq!(
        (status, held["name"].as_str(), held["ttl"].as_f64()),
        (200, Some("jobs/nightly"), Some(30.0)),
        "{held}"
    );
    let (_, entry) = client.get(&format!("/v1/audit/entries/{}", token(&held))).await;
    assert_eq!(entry["action"], "state:lock-acquire", "the token is the index of the acquisition");
    for who in [&b, &client] {
        let (status, said) = lock(who, "jobs/nightly", json!({"ttl": 30})).await;
        assert_eq!((status, &said["holder"], token(&said)), (409, &held["holder"], token(&held)), "{said}");
    }
    let (_, again) = lock(&client, "jobs/nightly", json!({"lease": held["lease"]})).await;
    assert_eq!(again, held, "by its lease it is the same hold");
    let fence = format!("jobs/nightly={}", token(&held));
    let mutations = |fence: String| {
        let client = &client;
        async move {
            let send = |method, path, body| fenced(client, method, path, &fence, body);
            vec![
                send(Method::PUT, "/v1/state/kv/f", json!(1)).await,
                send(Method::POST, "/v1/state/txn", json!({"then": [{"put": {"key": "f/t", "json": 1}}]})).await,
                send(Method::POST, "/v1/state/leases", json!({"ttl": 5})).await,
                send(Method::PUT, "/v1/nexus/topics/f", json!({"retention": 60})).await,
                send(Method::PUT, "/v1/nexus/services/f/instances/i", json!({"address": "http://h:1", "ttl": 60}))
                    .await,
                send(Method::POST, "/v1/nexus/services/f/instances/i/heartbeat", json!({})).await,
                send(Method::PUT, "/v1/health/checks/f", json!({"kind": "ttl"})).await,
                send(Method::PUT, "/v1/governance/entities/user/f", json!({"attrs": {}})).await,
                send(Method::POST, "/oauth2/register", json!({"client_name": "f"})).await,
            ]
        }
    };
    let all = mutations(fence.clone()).await;
    assert!(all.iter().all(|(status, _)| *status < 300), "{all:?}");
    assert_eq!(unlock(&b, "jobs/nightly", &held).await, 404, "it is another's");
    assert_eq!(unlock(&client, "jobs/nightly", &held).await, 200);
    assert_eq!(unlock(&client, "jobs/nightly", &held).await, 404);
    let all = mutations(fence.clone()).await;
    assert!(
        all.iter().all(|(status, said)| *status == 412 && said["lock"] == "jobs/nightly"),
        "nobody holds it: {all:?}"
    );
    let (_, next) = lock(&b, "jobs/nightly", json!({"ttl": 30})).await;
    assert!(token(&next) > token(&held));
    let all = mutations(fence).await;
    assert!(all.iter().all(|(status, said)| *status == 412 && token(said) == token(&next)), "{all:?}");
    assert!(metric(&client, "sop_ledger_fenced_total").await >= 18.0);
    for bad in ["jobs", "jobs=", "jobs=x", "a//b=1", "=1", "jobs=1.5"] {
        assert_eq!(fenced(&client, Method::PUT, "/v1/state/kv/f", bad, json!(1)).await.0, 400, "{bad}");
    }
    assert_eq!(
        fenced(&client, Method::GET, "/v1/state/kv/f", "jobs/nightly=1", json!(1)).await.0,
        200,
        "a read is no change"
    );
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_lock_refuses() {
    let (_db, _daemon, client) = start().await;
    for (body, pointer) in [
        (json!({}), "/ttl"),
        (json!({"ttl": 0.1}), "/ttl"),
        (json!({"ttl": 5, "wait": 61}), "/wait"),
        (json!({"ttl": 5, "mode": "both"}), "/mode"),
        (json!({"ttl": 5, "limit": 0}), "/limit"),
        (json!({"ttl": 5, "limit": 2, "mode": "read"}), "/limit"),
        (json!({"ttl": 5, "lease": "01a20b19-3012-73e6-9c59-d9c4c3767c2d"}), "/ttl"),
        (json!({"lease": 1}), "/lease"),
    ] {
        let (status, said) = lock(&client, "l", body.clone()).await;
        assert_eq!((status, said["errors"][0]["pointer"].as_str()), (400, Some(pointer)), "{said} to {body}");
    }
    assert_eq!(lock(&client, "a//b", json!({"ttl": 5})).await.0, 400);
    assert_eq!(lock(&client, &"n".repeat(256), json!({"ttl": 5})).await.0, 200, "as long as a name may be");
    assert_eq!(lock(&client, "l", json!({"lease": "01a20b19-3012-73e6-9c59-d9c4c3767c2d"})).await.0, 404);
    let reader = other(&client, "state:read").await;
    assert_eq!(lock(&reader, "l", json!({"ttl": 5})).await.0, 403);
    let (status, free) = reader.get("/v1/state/locks/l").await;
    assert_eq!((status, &free["holder"], &free["queue"]), (200, &Value::Null, &json!([])));
    let large = json!({"ttl": 5, "value": "x".repeat(20_000)});
    assert_eq!(client.json(Method::POST, "/v1/state/elections/e/campaign", &large).await.0, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_gets_it_in_order_on_any_daemon() {
    let (db, daemon, client) = start().await;
    let two = Launch::beside(&daemon, db.url()).start().await;
    let there = client.also_of(&two);
    there.token().await;
    let (_, first) = lock(&client, "q", json!({"ttl": 30})).await;
    let mut waiting = Vec::new();
    for n in 0..6 {
        let client = client.clone_at(if n % 2 == 0 { &daemon.url } else { &two.url });
        waiting.push(tokio::spawn(async move {
            let (status, held) = lock(&client, "q", json!({"ttl": 30, "wait": 30})).await;
            assert_eq!(status, 200, "{held}");
            (held, Instant::now(), client)
        }));
        let seen = || async { there.get("/v1/state/locks/q").await.1["queue"].as_array().unwrap().len() == n + 1 };
        until("it to queue", seen).await;
    }
    // Who does not wait is not let in before them, and one that gives up leaves no gap.
    assert_eq!(lock(&client, "q", json!({"ttl": 5})).await.0, 409);
    let began = Instant::now();
    let (status, said) = lock(&there, "q", json!({"ttl": 5, "wait": 0.5})).await;
    assert_eq!((status, said["holder"].as_str().is_some()), (409, true), "{said}");
    assert!(began.elapsed() >= Duration::from_millis(450));
    assert_eq!(there.get("/v1/state/locks/q").await.1["queue"].as_array().unwrap().len(), 6);
    // One hangs up: it is no longer waited for.
    let gone = tokio::time::timeout(Duration::from_millis(500), lock(&there, "q", json!({"ttl": 30, "wait": 30})));
    assert!(gone.await.is_err());
    let six = || async { there.get("/v1/state/locks/q").await.1["queue"].as_array().unwrap().len() == 6 };
    until("it to be withdrawn", six).await;
    let (mut held, mut tokens) = (first, Vec::new());
    for next in waiting {
        tokens.push(token(&held));
        assert_eq!(unlock(&client, "q", &held).await, 200);
        held = soon("the next in order", next).await.unwrap().0;
    }
    tokens.push(token(&held));
    assert!(tokens.is_sorted_by(|a, b| a < b), "{tokens:?}");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn semaphores_and_readers_share() {
    let (db, _daemon, client) = start().await;
    let try_one = |body: Value| lock(&client, "s", body);
    let (_, a) = try_one(json!({"ttl": 30, "limit": 2})).await;
    let (status, b) = try_one(json!({"ttl": 30, "limit": 2})).await;
    assert_eq!(status, 200);
    let (status, said) = try_one(json!({"ttl": 30, "limit": 2})).await;
    assert_eq!((status, said["holders"].as_array().unwrap().len()), (409, 2));
    let (status, said) = try_one(json!({"ttl": 30, "limit": 3})).await;
    assert_eq!((status, said["limit"].as_i64()), (409, Some(2)), "all agree on the limit: {said}");
    for held in [&a, &b] {
        let fence = format!("s={}", token(held));
        assert_eq!(
            fenced(&client, Method::PUT, "/v1/state/kv/s", &fence, json!(1)).await.0,
            200,
            "each of them holds it"
        );
        assert_eq!(unlock(&client, "s", held).await, 200);
    }
    let rw = |body: Value| lock(&client, "rw", body);
    let (_, r1) = rw(json!({"ttl": 30, "mode": "read"})).await;
    let (status, r2) = rw(json!({"ttl": 30, "mode": "read"})).await;
    assert_eq!(status, 200);
    assert_eq!(rw(json!({"ttl": 30})).await.0, 409);
    // A writer waits; readers who come later wait behind it.
    let writer = client.clone_at_self();
    let writer = tokio::spawn(async move { lock(&writer, "rw", json!({"ttl": 30, "wait": 30})).await.1 });
    let queued = |n: usize| {
        let client = &client;
        move || async move { client.get("/v1/state/locks/rw").await.1["queue"].as_array().unwrap().len() == n }
    };
    until("it to wait", queued(1)).await;
    assert_eq!(rw(json!({"ttl": 30, "mode": "read"})).await.0, 409, "a writer that waits is not passed by");
    let late: Vec<_> = (0..2)
        .map(|_| {
            let client = client.clone_at_self();
            tokio::spawn(async move { lock(&client, "rw", json!({"ttl": 30, "mode": "read", "wait": 30})).await.1 })
        })
        .collect();
    until("they to wait", queued(3)).await;
    unlock(&client, "rw", &r1).await;
    assert_eq!(client.get("/v1/state/locks/rw").await.1["holders"].as_array().unwrap().len(), 1);
    unlock(&client, "rw", &r2).await;
    let writer = writer.await.unwrap();
    unlock(&client, "rw", &writer).await;
    let late = join_all(late).await;
    assert!(late.iter().all(|h| token(h.as_ref().unwrap()) > token(&writer)), "both readers at once");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_that_died_or_froze_is_passed_over_and_fenced_off() {
    let (db, daemon, client) = start().await;
    let lease = grant(&client, 1.5).await;
    let (status, held) = lock(&client, "w", json!({"lease": lease})).await;
    assert_eq!((status, held["lease"].as_str()), (200, Some(lease.as_str())), "{held}");
    client.put("w/at", "1").await.unwrap();
    // A holder that writes under its token, in a process that is stopped past its lease.
    let url = daemon.url.clone();
    let command = format!(
        "while :; do curl -s -o /dev/null -w '%{{http_code}}\\n' -X PUT -H 'authorization: Bearer {}' -H 'if-fencing-token: w={}' --data x {url}/v1/state/kv/w/at; sleep 0.1; done",
        client.token().await,
        token(&held)
    );
    let mut child = tokio::process::Command::new("sh");
    child.args(["-c", &command]).stdout(std::process::Stdio::piped()).kill_on_drop(true);
    let mut child = child.spawn().unwrap();
    let mut lines = tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(child.stdout.take().unwrap()));
    assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("200"), "it holds the lock");
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let (status, next) = lock(&client, "w", json!({"ttl": 30, "wait": 30})).await;
    assert_eq!(status, 200, "the lock passes on when its lease has run out: {next}");
    assert!(token(&next) > token(&held));
    client.put("w/at", "2").await.unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    let late = async {
        loop {
            match lines.next_line().await.unwrap().as_deref() {
                // What it had sent before it was stopped.
                Some("200") => {}
                other => return other.map(str::to_owned),
            }
        }
    };
    let late = soon("it wakes up", late).await;
    assert_eq!(late.as_deref(), Some("412"), "it wakes up, believes it holds the lock, and is refused");
    let now = client.request(Method::GET, "/v1/state/kv/w/at").await.send().await.unwrap();
    assert_eq!(now.text().await.unwrap(), "2");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_counter_under_a_lock_is_exact_though_daemons_are_killed() {
    let (db, mut daemon, client) = start().await;
    let two = Launch::beside(&daemon, db.url()).start().await;
    client.put("n", "0").await.unwrap();
    let (tell, url) = tokio::sync::watch::channel(daemon.url.clone());
    let work = (0..6).map(|w| {
        let (client, url, other) = (client.clone_at_self(), url.clone(), two.url.clone());
        tokio::spawn(async move {
            let mut done = 0;
            while done < 5 {
                let client = client.clone_at(&if w % 2 == 0 { url.borrow().clone() } else { other.clone() });
                done += i64::from(count(&client).await.unwrap_or(false));
            }
        })
    });
    let work: Vec<_> = work.collect();
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_millis(700)).await;
        daemon = daemon.restart().await;
        tell.send_replace(daemon.url.clone());
    }
    for done in work {
        soon("they go on", done).await.unwrap();
    }
    let n = client.clone_at(&two.url).request(Method::GET, "/v1/state/kv/n").await.send().await.unwrap();
    // One whose answer was lost may have counted twice; never is a count lost, for no two wrote at once.
    let n: i64 = n.text().await.unwrap().parse().unwrap();
    let puts: Vec<String> =
        sqlx::query_scalar("SELECT convert_from(value, 'UTF8') FROM state.history WHERE key = 'n' ORDER BY index")
            .fetch_all(&mut db.connect().await)
            .await
            .unwrap();
    assert!(n >= 30, "{n}");
    assert_eq!(puts, (0..=n).map(|i| i.to_string()).collect::<Vec<_>>(), "each wrote what followed the one before");
    record::check(&db).await;
}

/// Reads, adds one, and writes, under the lock and its token; without conditions on the key.
async fn count(client: &Client) -> Result<bool, reqwest::Error> {
    let body = json!({"ttl": 2, "wait": 20}).to_string().into_bytes();
    let request =
        client.request(Method::POST, "/v1/state/locks/counter").await.header("content-type", "application/json");
    let answer = request.body(body).send().await?;
    if answer.status() != 200 {
        return Ok(false);
    }
    let held: Value = answer.json().await?;
    let fence = format!("counter={}", token(&held));
    let now = client.request(Method::GET, "/v1/state/kv/n").await.send().await?.error_for_status()?.text().await?;
    let next = (now.parse::<i64>().unwrap() + 1).to_string();
    let put = client.request(Method::PUT, "/v1/state/kv/n").await.header("if-fencing-token", fence).body(next);
    let done = put.send().await?.status() == 200;
    unlock_quietly(client, &held).await;
    Ok(done)
}

async fn unlock_quietly(client: &Client, held: &Value) {
    let path = format!("/v1/state/locks/counter?lease={}", held["lease"].as_str().unwrap());
    let _ = client.request(Method::DELETE, &path).await.send().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_election_has_one_leader_whom_all_hear_of() {
    let (db, daemon, client) = start().await;
    let two = Launch::beside(&daemon, db.url()).start().await;
    let there = client.also_of(&two);
    there.token().await;
    let path = |what: &str| format!("/v1/state/elections/arp%2Fleader{what}");
    let observed = there.request(Method::GET, &path("/observe")).await.send().await.unwrap();
    let observed = tokio::spawn(events(observed, |e| e.iter().filter(|e| e.0 == "leader").count() == 5));
    tokio::time::sleep(Duration::from_millis(300)).await;
    let campaign = |client: Client, body: Value| {
        let path = path("/campaign");
        async move { client.json(Method::POST, &path, &body).await }
    };
    let (status, one) = campaign(client.clone_at_self(), json!({"value": {"at": "one"}, "ttl": 30})).await;
    assert_eq!((status, &one["value"]), (200, &json!({"at": "one"})), "{one}");
    let (status, said) = campaign(client.clone_at_self(), json!({"value": "two", "ttl": 30})).await;
    assert_eq!((status, token(&said)), (409, token(&one)));
    let second = tokio::spawn(campaign(there.clone_at_self(), json!({"value": "two", "ttl": 30, "wait": 30})));
    until("it to stand", || async {
        client.get(&path("")).await.1["queue"] == json!([{"holder": one["holder"], "since_index": client.get(&path("")).await.1["queue"][0]["since_index"], "mode": "write", "value": "two"}])
    })
    .await;
    // The leader says something else, without losing its office.
    let (status, again) = campaign(client.clone_at_self(), json!({"value": 2, "lease": one["lease"]})).await;
    assert_eq!((status, token(&again), &again["value"]), (200, token(&one), &json!(2)));
    let (status, _) = client.json(Method::POST, &path("/resign"), &json!({"lease": one["lease"]})).await;
    assert_eq!(status, 200);
    let (_, two) = second.await.unwrap();
    assert!(token(&two) > token(&one));
    let fence = format!("arp/leader={}", token(&one));
    assert_eq!(
        fenced(&client, Method::PUT, "/v1/state/kv/e", &fence, json!(1)).await.0,
        412,
        "who resigned is fenced off"
    );
    let (_, shown) = client.get(&path("")).await;
    assert_eq!((token(&shown), &shown["value"]), (token(&two), &json!("two")));
    assert_eq!(client.json(Method::POST, &path("/resign"), &json!({"lease": one["lease"]})).await.0, 404);
    client.json(Method::POST, &path("/resign"), &json!({"lease": two["lease"]})).await;
    let heard = observed.await.unwrap();
    let said: Vec<&Value> = heard.iter().filter(|e| e.0 == "leader").map(|e| &e.2["value"]).collect();
    assert_eq!(said, [&Value::Null, &json!({"at": "one"}), &json!(2), &json!("two"), &Value::Null]);
    record::check(&db).await;
}

async fn sop_lock(daemon: &Daemon, args: &[&str]) -> (Option<i32>, String) {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_sop"));
    command.args(["--data-dir"]).arg(&daemon.launch.dir).args(["state", "lock"]).args(args).kill_on_drop(true);
    let done = soon("it ends", command.output()).await.unwrap();
    (done.status.code(), String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_runs_under_a_lock() {
    let (db, daemon, client) = start().await;
    let (code, said) =
        sop_lock(&daemon, &["cli/x", "--ttl", "1.5", "--", "sh", "-c", "sleep 3; echo $SOP_FENCING_TOKEN"]).await;
    assert!(code == Some(0) && said.starts_with("cli/x="), "it was renewed past its ttl: {said}");
    assert_eq!(client.get("/v1/state/locks/cli/x").await.1["holder"], Value::Null, "and given back");
    for (script, ends) in [("exit 3", 3), ("kill -TERM $$", 143)] {
        let (code, said) = sop_lock(&daemon, &["cli/x", "--", "sh", "-c", script]).await;
        assert!(code == Some(ends) && said.contains("sh ended with"), "{code:?} {said}");
    }
    let (_, held) = lock(&client, "cli/x", json!({"ttl": 60})).await;
    let (code, said) = sop_lock(&daemon, &["cli/x", "--wait", "0", "--", "true"]).await;
    assert!(code == Some(1) && said.contains("is held by"), "{said}");
    assert!(sop_lock(&daemon, &["cli/x"]).await.1.contains(&format!("token {}", token(&held))));
    // Whoever loses the lock meanwhile is ended.
    unlock(&client, "cli/x", &held).await;
    let losing = tokio::spawn(async move {
        let said = sop_lock(&daemon, &["cli/x", "--ttl", "3", "--", "sleep", "60"]).await;
        (said, daemon)
    });
    until("it to hold", || async { client.get("/v1/state/locks/cli/x").await.1["holder"].is_string() }).await;
    let (_, leases) = client.get("/v1/state/leases").await;
    let path = format!("/v1/state/leases/{}", leases["items"][0]["id"].as_str().unwrap());
    assert_eq!(client.request(Method::DELETE, &path).await.send().await.unwrap().status(), 200);
    let ((code, said), _daemon) = losing.await.unwrap();
    assert!(code == Some(1) && said.contains("the lock was lost"), "{said}");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_sop_lock_is_fenced_off_and_ends_its_command_when_it_wakes() {
    let (db, daemon, client) = start().await;
    let script = "while :; do curl -s -o /dev/null -w '%{http_code}\\n' -X PUT -H \"authorization: Bearer $TOKEN\" \
        -H \"if-fencing-token: $SOP_FENCING_TOKEN\" --data x $KEY; sleep 0.1; done";
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_sop"));
    command.args(["--data-dir"]).arg(&daemon.launch.dir).args(["state", "lock", "cli/f", "--ttl", "1.5", "--"]);
    command.args(["sh", "-c", script]).env("TOKEN", client.token().await);
    command.env("KEY", format!("{}/v1/state/kv/cli/at", daemon.url));
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().unwrap();
    let mut lines = tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(child.stdout.take().unwrap()));
    assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("200"), "its command writes under its token");
    // What renews is stopped; what writes goes on.
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let (status, next) = lock(&client, "cli/f", json!({"ttl": 60, "wait": 30})).await;
    assert_eq!(status, 200, "{next}");
    let at = client.put("cli/at", "of the next").await.unwrap();
    let refused = async { while lines.next_line().await.unwrap().as_deref() != Some("412") {} };
    soon("its command is refused", refused).await;
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    // The end of the lines is the end of the command, which is stopped along.
    let rest = async { while lines.next_line().await.unwrap().is_some_and(|said| said == "412") {} };
    soon("it ends its command", rest).await;
    let done = soon("it ends", child.wait_with_output()).await.unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!done.status.success() && said.contains("the lock was lost"), "{said}");
    let read = client.request(Method::GET, "/v1/state/kv/cli/at").await.send().await.unwrap();
    assert_eq!(read.headers()["etag"].to_str().unwrap(), format!("\"{at}\""), "nothing of it came through");
    assert_eq!(unlock(&client, "cli/f", &next).await, 200, "who holds it now still does");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_changes_hands_at_once_loses_nobody_who_waits() {
    let (db, daemon, client) = start().await;
    let second = Launch::beside(&daemon, db.url()).start().await;
    let there = client.also_of(&second);
    let began = Instant::now();
    let contend = async |who: &Client| {
        let mut tokens = Vec::new();
        while began.elapsed() < Duration::from_secs(3) {
            let (status, held) = lock(who, "wanted", json!({"ttl": 30, "wait": 30})).await;
            assert_eq!(status, 200, "whoever waits gets it: {held}");
            tokens.push(token(&held));
            assert_eq!(unlock(who, "wanted", &held).await, 200);
        }
        tokens
    };
    let all = join_all((0..16).map(|i| contend(if i % 2 == 0 { &client } else { &there }))).await.concat();
    let mut once = all.clone();
    once.sort_unstable();
    once.dedup();
    assert_eq!(once.len(), all.len(), "no two had the same token");
    record::check(&db).await;
}
