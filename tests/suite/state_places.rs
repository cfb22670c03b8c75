//! What one lease has of a lock, and what becomes of it when several requests ask by it: one hold or one place, on one set of
//! terms, kept as long as one of them waits.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::ledger::metric;
use crate::state_etcd::start;
use crate::state_leases::{grant, other};
use crate::state_locks::{lock, token, unlock};
use crate::support::client::Client;
use crate::support::daemon::Launch;
use crate::support::postgres::database;
use crate::support::proxy::{Fault, Proxy};
use crate::support::{record, soon, until};

type Waiter = JoinHandle<(u16, Value)>;

fn waits(client: &Client, name: &'static str, body: Value) -> Waiter {
    let client = client.clone_at_self();
    tokio::spawn(async move { lock(&client, name, body).await })
}

async fn stands(client: &Client, name: &str) -> (usize, usize) {
    let (_, stands) = client.get(&format!("/v1/state/locks/{name}")).await;
    let many = |list: &str| stands[list].as_array().unwrap().len();
    (many("holders"), many("queue"))
}

/// Until so many requests wait for locks on the daemon of this client.
async fn waiting(client: &Client, n: f64) {
    until("so many to wait", || async { metric(client, "sop_state_lock_waits_count").await == n }).await;
}

/// The entries of a lock with this action.
async fn entries(client: &Client, name: &str, action: &str) -> usize {
    let (_, page) = client.get(&format!("/v1/audit/entries?action={action}&resource=lock/{name}")).await;
    page["items"].as_array().unwrap().len()
}

#[tokio::test(flavor = "multi_thread")]
async fn by_one_lease_a_lock_is_had_on_one_set_of_terms() {
    let (db, _daemon, a) = start().await;
    let b = other(&a, "state").await;
    let (ours, theirs) = (grant(&a, 600.0).await, grant(&b, 600.0).await);
    let (_, first) = lock(&a, "rw", json!({"lease": ours, "mode": "read"})).await;
    let (_, second) = lock(&b, "rw", json!({"lease": theirs, "mode": "read"})).await;
    for terms in [json!({}), json!({"mode": "write"}), json!({"limit": 2})] {
        let mut body = terms.clone();
        body["lease"] = ours.clone().into();
        for wait in [0.0, 5.0] {
            body["wait"] = wait.into();
            let (status, said) = lock(&a, "rw", body.clone()).await;
            assert_eq!((status, token(&said)), (409, token(&second)), "{terms}: whoever reads is not alone: {said}");
            assert!(said["detail"].as_str().unwrap().contains("let go of it first"), "{said}");
            assert_eq!(said["holders"].as_array().unwrap().len(), 2);
        }
    }
    let path = "/v1/state/elections/rw/campaign";
    let (status, said) = a.json(Method::POST, path, &json!({"lease": ours, "value": "me"})).await;
    assert_eq!((status, said["holders"].as_array().unwrap().len()), (409, 2), "nor does it lead: {said}");
    let (_, again) = lock(&a, "rw", json!({"lease": ours, "mode": "read"})).await;
    assert_eq!(again, first, "the same again is the same hold");
    // So is it for so many at once, and for who waits.
    let _ = lock(&a, "some", json!({"lease": ours, "limit": 2})).await;
    let _ = lock(&b, "some", json!({"lease": theirs, "limit": 2})).await;
    for body in [json!({"lease": ours}), json!({"lease": ours, "limit": 3}), json!({"lease": ours, "mode": "read"})] {
        let (status, said) = lock(&a, "some", body).await;
        assert_eq!((status, said["limit"].as_i64()), (409, Some(2)), "{said}");
    }
    let (_, alone) = lock(&b, "q", json!({"ttl": 600})).await;
    let reads = waits(&a, "q", json!({"lease": ours, "mode": "read", "wait": 30}));
    until("it to wait", || async { stands(&a, "q").await == (1, 1) }).await;
    let (status, said) = lock(&a, "q", json!({"lease": ours, "wait": 5})).await;
    assert_eq!((status, token(&said)), (409, token(&alone)), "{said}");
    assert_eq!(unlock(&b, "q", &alone).await, 200);
    assert_eq!(soon("it reads", reads).await.unwrap().0, 200);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_stays_while_one_waits_in_it_here_or_on_another_daemon() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let two = Launch::beside(&one, db.url()).start().await;
    let (a, b) = (Client::of(&one), Client::of(&one).also_of(&two));
    b.token().await;
    let lease = grant(&a, 600.0).await;
    let (_, held) = lock(&a, "p", json!({"ttl": 600})).await;
    let gone = waits(&a, "p", json!({"lease": lease, "wait": 60}));
    until("it to wait", || async { stands(&b, "p").await == (1, 1) }).await;
    let behind = waits(&b, "p", json!({"ttl": 600, "wait": 60}));
    until("the next to wait", || async { stands(&b, "p").await == (1, 2) }).await;
    // The connection breaks after the client has asked again, of another daemon, and of that one twice.
    let again = waits(&b, "p", json!({"lease": lease, "wait": 60}));
    until("the place to be taken over", || async { entries(&b, "p", "state:lock-wait").await == 3 }).await;
    let (began, short) = (Instant::now(), waits(&b, "p", json!({"lease": lease, "wait": 1})));
    gone.abort();
    waiting(&a, 0.0).await;
    for n in 0..5 {
        a.put("meanwhile", &n.to_string()).await.unwrap();
    }
    let (status, said) = soon("the short one", short).await.unwrap();
    assert_eq!((status, token(&said)), (409, token(&held)), "{said}");
    assert!(began.elapsed() >= Duration::from_millis(900), "it waits as long as it said");
    assert_eq!(stands(&a, "p").await, (1, 2), "who waits longer has the place still");
    assert_eq!(unlock(&a, "p", &held).await, 200);
    let (status, got) = soon("it gets it", again).await.unwrap();
    assert_eq!((status, got["lease"].as_str()), (200, Some(lease.as_str())), "before who came later: {got}");
    assert_eq!(unlock(&a, "p", &got).await, 200);
    let (_, last) = soon("the next gets it", behind).await.unwrap();
    // The last of them gives it up, and is told as much as any.
    let pair = [waits(&a, "p", json!({"lease": lease, "wait": 1})), waits(&a, "p", json!({"lease": lease, "wait": 1}))];
    for one in pair {
        let (status, said) = soon("it gives up", one).await.unwrap();
        assert_eq!((status, token(&said)), (409, token(&last)), "{said}");
    }
    assert_eq!(stands(&a, "p").await, (1, 0));
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_who_wait_by_a_lease_hear_of_its_turn_and_none_takes_it_back() {
    let (db, _daemon, client) = start().await;
    let lease = grant(&client, 600.0).await;
    let (_, held) = lock(&client, "t", json!({"ttl": 600})).await;
    let three = [(); 3].map(|()| waits(&client, "t", json!({"lease": lease, "wait": 60})));
    waiting(&client, 3.0).await;
    three[2].abort();
    waiting(&client, 2.0).await;
    assert_eq!(unlock(&client, "t", &held).await, 200);
    let [one, other, _] = three;
    let (one, other) = (soon("one", one).await.unwrap(), soon("the other", other).await.unwrap());
    assert_eq!((one.0, &one.1), (200, &other.1), "one hold, and all hear of it");
    waiting(&client, 0.0).await;
    client.put("meanwhile", "v").await.unwrap();
    assert_eq!(stands(&client, "t").await, (1, 0));
    assert_eq!(unlock(&client, "t", &one.1).await, 200);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whose_wait_is_ended_by_others_is_told_why_and_who_holds_it() {
    let (db, _daemon, client) = start().await;
    let (_, held) = lock(&client, "e", json!({"ttl": 600})).await;
    for (path, why) in [("/v1/state/leases/", "the lease ended"), ("/v1/state/locks/e?lease=", "was given up")] {
        let lease = grant(&client, 600.0).await;
        let waiter = waits(&client, "e", json!({"lease": lease, "wait": 60}));
        until("it to wait", || async { stands(&client, "e").await == (1, 1) }).await;
        let done = client.request(Method::DELETE, &format!("{path}{lease}")).await.send().await.unwrap();
        assert_eq!(done.status(), 200);
        let (status, said) = soon("it hears", waiter).await.unwrap();
        assert_eq!((status, token(&said), said["waiting"].as_i64()), (409, token(&held), Some(0)), "{said}");
        assert!(said["detail"].as_str().unwrap().contains(why), "{said}");
    }
    record::check(&db).await;
}

/// Under an idempotency key a wait is found again as long as it goes on or has what it waited for; it is begun once.
#[tokio::test(flavor = "multi_thread")]
async fn a_wait_is_found_again_under_its_idempotency_key() {
    let (db, _daemon, client) = start().await;
    let lease = grant(&client, 600.0).await;
    for (name, body) in [("i", json!({"ttl": 600, "wait": 60})), ("j", json!({"lease": lease, "wait": 60}))] {
        let (_, held) = lock(&client, name, json!({"ttl": 600})).await;
        let keyed = || {
            let (client, body) = (client.clone_at_self(), body.clone());
            tokio::spawn(async move {
                let request = client.request(Method::POST, &format!("/v1/state/locks/{name}")).await;
                let answer = request.header("idempotency-key", name).json(&body).send().await.unwrap();
                (answer.status().as_u16(), answer.json::<Value>().await.unwrap())
            })
        };
        let gone = keyed();
        waiting(&client, 1.0).await;
        let again = keyed();
        waiting(&client, 2.0).await;
        gone.abort();
        waiting(&client, 1.0).await;
        assert_eq!(stands(&client, name).await, (1, 1), "one place for both");
        assert_eq!(unlock(&client, name, &held).await, 200);
        let (status, got) = soon("it gets it", again).await.unwrap();
        assert_eq!((status, token(&got) > token(&held)), (200, true), "{got}");
        let (status, same) = keyed().await.unwrap();
        assert_eq!((status, &same), (200, &got), "whose answer was lost hears it again");
        assert_eq!(unlock(&client, name, &got).await, 200);
        let (status, over) = keyed().await.unwrap();
        assert_eq!((status, stands(&client, name).await), (409, (0, 0)), "it is not had twice: {over}");
        assert!(over["detail"].as_str().unwrap().contains("has ended"), "{over}");
    }
    record::check(&db).await;
}

/// A place is its client's: others who name the lease, which they may see, have no part in it.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_else_has_a_part_in_a_place() {
    let (db, _daemon, client) = start().await;
    let (stranger, reader) = (other(&client, "state").await, other(&client, "state:read").await);
    let lease = grant(&client, 600.0).await;
    let (_, held) = lock(&client, "s", json!({"ttl": 600})).await;
    let waiter = waits(&client, "s", json!({"lease": lease, "wait": 60}));
    waiting(&client, 1.0).await;
    for (who, status) in [(&stranger, 404), (&reader, 403)] {
        assert_eq!(lock(who, "s", json!({"lease": lease, "wait": 60})).await.0, status);
    }
    assert_eq!(lock(&client, "s", json!({"lease": lease, "wait": 60, "mode": "read"})).await.0, 409);
    assert_eq!(stands(&client, "s").await, (1, 1));
    waiter.abort();
    until("it to be given up", || async { stands(&client, "s").await == (1, 0) }).await;
    assert_eq!(unlock(&client, "s", &held).await, 200);
    record::check(&db).await;
}

/// The outcome of another request, told again under its key, is no answer to those who wait now.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_outcome_told_again_leaves_a_place_to_those_who_wait() {
    let (db, _daemon, client) = start().await;
    let lease = grant(&client, 600.0).await;
    let keyed = async || {
        let request = client.request(Method::POST, "/v1/state/locks/o").await.header("idempotency-key", "o");
        let answer = request.json(&json!({"lease": lease, "wait": 5})).send().await.unwrap();
        (answer.status().as_u16(), answer.json::<Value>().await.unwrap())
    };
    let (_, first) = keyed().await;
    assert_eq!(unlock(&client, "o", &first).await, 200);
    let (_, held) = lock(&client, "o", json!({"ttl": 600})).await;
    let waiter = waits(&client, "o", json!({"lease": lease, "wait": 60}));
    waiting(&client, 1.0).await;
    assert_eq!(keyed().await, (200, first));
    waiter.abort();
    until("it to be given up", || async { stands(&client, "o").await == (1, 0) }).await;
    assert_eq!(unlock(&client, "o", &held).await, 200);
    record::check(&db).await;
}

/// Two daemons wait by one lease; its turn comes; the one that asked last goes before it hears of that. Whoever was told that it
/// holds the lock does.
#[tokio::test(flavor = "multi_thread")]
async fn what_one_daemon_told_another_does_not_take_back() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let proxy = Proxy::before(&db);
    let two = Launch::beside(&one, db.url_via(&proxy)).start().await;
    let (a, b) = (Client::of(&one), Client::of(&one).also_of(&two));
    b.token().await;
    let lease = grant(&a, 600.0).await;
    let (_, held) = lock(&a, "w", json!({"ttl": 600})).await;
    let first = waits(&a, "w", json!({"lease": lease, "wait": 60}));
    waiting(&a, 1.0).await;
    let last = waits(&b, "w", json!({"lease": lease, "wait": 60}));
    waiting(&b, 1.0).await;
    // From here on the other daemon cannot look.
    let late = proxy.arm(Fault::hold_before().on("FROM state.holds AS h"));
    assert_eq!(unlock(&a, "w", &held).await, 200);
    late.hit().await;
    let (status, got) = soon("it is told", first).await.unwrap();
    assert_eq!(status, 200, "{got}");
    last.abort();
    waiting(&b, 0.0).await;
    late.release();
    for n in 0..5 {
        b.put("meanwhile", &n.to_string()).await.unwrap();
    }
    assert_eq!(stands(&a, "w").await, (1, 0));
    assert_eq!(unlock(&a, "w", &got).await, 200);
    record::check(&db).await;
}
