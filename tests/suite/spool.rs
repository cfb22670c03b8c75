//! Decisions that were answered while the store was away, or while nobody could say what became of their first write: each is in
//! the record once, and found by its id.

use std::collections::HashMap;
use std::path::Path;

use reqwest::Method;
use serde_json::json;
use sop::kernel::crypto;
use uuid::{Builder, Uuid};

use crate::policy::{SCHEMA, VIEW, activate, asks, client, decide, member, post, start};
use crate::rollout::STALE;
use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::postgres::database;
use crate::support::proxy::{Fault, Proxy};
use crate::support::{record, until};

/// Milliseconds of now.
fn now() -> u64 {
    let (seconds, nanos) = Uuid::now_v7().get_timestamp().unwrap().to_unix();
    seconds * 1000 + u64::from(nanos) / 1_000_000
}

fn id_at(ms: u64) -> Uuid {
    Builder::from_unix_timestamp_millis(ms, &crypto::random().unwrap()).into_uuid()
}

/// What a daemon keeps on disk of one decision.
fn frame(record: &[u8]) -> Vec<u8> {
    let length = u32::try_from(record.len()).unwrap().to_be_bytes();
    [&length[..], &crypto::sha256(record)[..8], record].concat()
}

fn kept(id: &Uuid, subject: &str) -> Vec<u8> {
    let record = json!({"actor": "client/test", "at": 1, "bundle": ["b"], "decision": true, "id": id.to_string(),
        "origin": "authzen", "policies": ["view"], "request": asks(subject, "view", 1).to_string(), "request_id": "r",
        "salt": "", "time": "2026-01-01T00:00:00.000Z"});
    frame(record.to_string().as_bytes())
}

fn waits(dir: &Path) -> bool {
    let open = std::fs::metadata(dir.join("spool/decisions")).is_ok_and(|m| m.len() > 0);
    open || dir.join("spool/decisions.closed").exists()
}

pub async fn spooled(daemon: &Daemon) -> Option<u64> {
    let text = Client::of(daemon).bare(Method::GET, "/metrics").send().await.ok()?.text().await.ok()?;
    text.lines().find_map(|line| line.strip_prefix("sop_governance_spooled_records "))?.parse().ok()
}

/// How often each decision about somebody is in the record.
async fn listed(admin: &Client, subject: &str) -> HashMap<String, usize> {
    let (mut times, mut after) = (HashMap::new(), String::new());
    loop {
        let path = format!("/v1/governance/decisions?origin=authzen&subject={subject}&limit=1000{after}");
        let (status, page) = admin.get(&path).await;
        assert_eq!(status, 200, "{page}");
        for d in page["items"].as_array().unwrap() {
            *times.entry(d["decision_id"].as_str().unwrap().to_owned()).or_default() += 1;
        }
        match page["next"].as_str() {
            Some(next) => after = format!("&after={next}"),
            None => return times,
        }
    }
}

/// Starts it again with this in its spool, and waits until nothing waits any more.
async fn again_with(mut daemon: Daemon, spool: &[u8]) -> Daemon {
    daemon.terminate().await;
    let dir = daemon.launch.dir.join("spool");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("decisions"), spool).unwrap();
    let daemon = daemon.restart().await;
    until("nothing waits any more", || async { !waits(&daemon.launch.dir) }).await;
    assert_eq!(spooled(&daemon).await, Some(0));
    daemon
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decision_whose_first_write_is_still_on_its_way_is_recorded_once() {
    let db = database().await;
    let proxy = Proxy::before(&db);
    let daemon = Launch::on(db.url_via(&proxy)).env("SOP__LEDGER__WRITE_TIMEOUT", "1s").start().await;
    let admin = Client::of(&daemon);
    let other = client(&admin, "admin").await;
    member(&admin, "ann").await;
    activate(&admin, &other, STALE, Some(SCHEMA)).await;
    assert_eq!(decide(&admin, &asks("ann", "view", 1)).await["decision"], true);
    assert_eq!(spooled(&daemon).await, Some(0));
    let hold = proxy.arm(Fault::hold_before().on("insert into governance.segments"));
    let answer = decide(&admin, &asks("ann", "view", 2)).await;
    hold.hit().await;
    assert!(answer["context"]["stale"].is_object(), "nobody knows what became of it: {answer}");
    let id = answer["context"]["decision_id"].as_str().unwrap();
    assert_eq!(spooled(&daemon).await, Some(1));
    // By now it was looked for in vain by anybody who looks too early.
    until("it is tried to put it into the record", || async { daemon.log().contains("governance/spool failed") }).await;
    hold.release();
    until("nothing waits any more", || async { !waits(&daemon.launch.dir) }).await;
    assert_eq!(spooled(&daemon).await, Some(0));
    let times = listed(&admin, "ann").await;
    assert_eq!((times.len(), times[id]), (2, 1), "{times:?}");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_kept_long_before_is_found_by_its_id_and_recorded_once() {
    let (db, daemon, admin, _) = start().await;
    // Of an hour ago, and later than everything in between.
    let (old, new) = (id_at(now() - 3_600_000), id_at(now() + 60_000));
    let mut normal = Vec::new();
    for _ in 0..70 {
        normal.push(decide(&admin, &asks("bob", "view", 1)).await["context"]["decision_id"].clone());
    }
    let spool = [kept(&old, "eve"), kept(&new, "eve"), kept(&old, "eve")].concat();
    let daemon = again_with(daemon, &spool).await;
    let admin = Client::of(&daemon);
    for id in [json!(old.to_string()), json!(new.to_string()), normal[0].clone(), normal[69].clone()] {
        let (status, found) = admin.get(&format!("/v1/governance/decisions/{}", id.as_str().unwrap())).await;
        assert_eq!((status, &found["decision_id"]), (200, &id), "{found}");
    }
    assert_eq!(admin.get(&format!("/v1/governance/decisions/{}", id_at(now() - 1_000_000))).await.0, 404);
    // It died after the commit, and before it could forget what it had kept: with more beside it now.
    let more = id_at(now() - 1000);
    let daemon = again_with(daemon, &[spool, kept(&more, "eve")].concat()).await;
    let admin = Client::of(&daemon);
    let times = listed(&admin, "eve").await;
    let expected: HashMap<String, usize> = [old, new, more].map(|id| (id.to_string(), 1)).into();
    assert_eq!(times, expected);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_torn_is_forgotten_and_what_cannot_be_read_is_kept_beside() {
    let (db, daemon, ..) = start().await;
    let ids: Vec<Uuid> = (0..2500).map(|n| id_at(now() - 3_000_000 + n)).collect();
    let mut spool: Vec<u8> = ids.iter().flat_map(|id| kept(id, "eve")).collect();
    spool.extend(frame(br#"{"id": "nobody's"}"#));
    let last = id_at(now());
    spool.extend(kept(&last, "eve"));
    let whole = spool.clone();
    spool.extend(&kept(&last, "eve")[..40]);
    let daemon = again_with(daemon, &spool).await;
    let admin = Client::of(&daemon);
    let beside = daemon.launch.dir.join("spool/decisions.unread-1");
    assert_eq!(std::fs::read(beside).unwrap(), whole, "with the one that is no decision");
    let log = daemon.log();
    assert!(log.contains("is no decision") && log.contains("was torn"), "{log}");
    let times = listed(&admin, "eve").await;
    assert_eq!((times.len(), times.values().max()), (2501, Some(&1)));
    assert!(ids.iter().chain([&last]).all(|id| times.contains_key(&id.to_string())));
    let counts = "SELECT count FROM governance.segments ORDER BY index";
    let counts: Vec<i64> = sqlx::query_scalar(counts).fetch_all(&mut db.connect().await).await.unwrap();
    assert_eq!(counts, [1000, 1000, 501]);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_batch_is_several_segments_and_each_record_is_where_it_is_said_to_be() {
    let (db, _daemon, admin, _) = start().await;
    let one = json!({"resource": {"type": "doc", "id": "d"}});
    let batch =
        json!({"subject": {"type": "user", "id": "eve"}, "action": {"name": "view"}, "evaluations": vec![one; 2500]});
    let (status, answers) = post(&admin, "/access/v1/evaluations", &batch).await;
    assert_eq!(status, 200, "{answers}");
    let answers = answers["evaluations"].as_array().unwrap();
    let mut segments: Vec<(i64, u64)> = Vec::new();
    for answer in answers {
        let said = &answer["context"];
        let (index, position) = (said["index"].as_i64().unwrap(), said["position"].as_u64().unwrap());
        match segments.last_mut() {
            Some((last, count)) if *last == index => {
                assert_eq!(position, *count);
                *count += 1;
            }
            _ => {
                assert_eq!(position, 0);
                segments.push((index, 1));
            }
        }
    }
    assert_eq!(segments.iter().map(|(_, count)| *count).collect::<Vec<_>>(), [1000, 1000, 500]);
    for n in [0, 999, 1000, 2499] {
        let said = &answers[n]["context"];
        let (_, found) =
            admin.get(&format!("/v1/governance/decisions/{}", said["decision_id"].as_str().unwrap())).await;
        assert_eq!((&found["index"], &found["position"]), (&said["index"], &said["position"]), "{found}");
    }
    assert_eq!(listed(&admin, "eve").await.len(), 2500);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_reads_only_segments_that_can_have_what_it_asks_for_and_misses_none() {
    let (db, daemon, admin, other) = start().await;
    member(&admin, "eve").await;
    let bundle = activate(&admin, &other, VIEW, Some(SCHEMA)).await;
    let early = now() - 3_000_000;
    let ids: Vec<Uuid> = (0..30_000).map(|n| id_at(early + n)).collect();
    let of = |n: usize| if n == 77 { "adam".to_owned() } else { format!("user-{n}") };
    let spool: Vec<u8> = ids.iter().enumerate().flat_map(|(n, id)| kept(id, &of(n))).collect();
    let daemon = again_with(daemon, &spool).await;
    let admin = Client::of(&daemon);
    let ask = |n: usize| {
        json!({"subject": {"type": "user", "id": if n == 7 { "eve" } else { "bob" }}, "action": {"name": "view"},
            "resource": {"type": "doc", "id": format!("shelf-{n}/page"), "properties": {"level": 1}}})
    };
    for n in 0..20 {
        decide(&admin, &ask(n)).await;
    }
    let found = async |query: &str| {
        let (mut items, mut after, mut pages) = (Vec::new(), String::new(), 0);
        loop {
            let (status, page) = admin.get(&format!("/v1/governance/decisions?limit=1000&{query}{after}")).await;
            assert_eq!(status, 200, "{page}");
            items.extend(page["items"].as_array().unwrap().clone());
            pages += 1;
            match page["next"].as_str() {
                Some(next) => after = format!("&after={next}"),
                None => return (items, pages),
            }
        }
    };
    let wanted = [
        ("subject=adam".to_owned(), 1),
        ("subject=user-29999".to_owned(), 1),
        ("subject=nobody".to_owned(), 0),
        ("subject=eve".to_owned(), 1),
        ("subject=bob&origin=authzen".to_owned(), 19),
        ("subject=bob&origin=api".to_owned(), 0),
        ("resource=shelf-7".to_owned(), 1),
        ("resource=shelf-1".to_owned(), 11),
        ("resource=shelf-12/page".to_owned(), 1),
        ("resource=shelf-12/pages".to_owned(), 0),
        ("resource=shelf&decision=true".to_owned(), 1),
        ("policy=view&resource=shelf".to_owned(), 1),
        (format!("bundle={bundle}&decision=false"), 19),
        ("action=edit&origin=authzen".to_owned(), 0),
    ];
    let all = async |wanted: &[(String, usize)]| {
        let mut pages = 0;
        for (query, count) in wanted {
            let (items, took) = found(query).await;
            assert_eq!(items.len(), *count, "{query}");
            pages += took;
        }
        pages
    };
    // Thirty large segments between what is asked for and the end are more than a page has time for.
    let pages = all(&wanted).await;
    assert!(pages <= 20, "{pages} pages for 14 lists");
    assert_eq!(found("resource=sh").await.0.len(), 20, "a beginning too short for the sieve");
    // What older versions wrote has neither sieve nor marks, and is all read.
    let older = "UPDATE governance.segments SET sieve = NULL, marks = NULL";
    sqlx::query(older).execute(&mut db.connect().await).await.unwrap();
    assert!(all(&wanted[2..6]).await >= 8, "all of it is read");
    let (status, adam) = admin.get(&format!("/v1/governance/decisions/{}", ids[77])).await;
    assert_eq!((status, &adam["subject"]["id"]), (200, &json!("adam")), "{adam}");
    record::check(&db).await;
}
