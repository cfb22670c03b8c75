//! `POST /v1/tx` when one of the changes cannot be, or cannot be read.

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::json;
use sop::kernel::crypto::base64;

use crate::ledger::metric;
use crate::policy::client as registered;
use crate::support::{record, until};
use crate::tx::{event, metric_of, publish, pull, put, register, start, token, topic, tx, used, uses};

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_refused_refuses_all() {
    let (db, _daemon, client) = start().await;
    topic(&client, "t").await;
    let once = token(&client, 1).await;
    let spent = token(&client, 1).await;
    assert_eq!(tx(&client, &json!([used(&spent, "deploy")])).await.0, 200);
    let gone = token(&client, 5).await;
    let path = format!("/v1/token/operations/{}", gone["id"].as_str().unwrap());
    assert_eq!(client.json(Method::DELETE, &path, &json!({})).await.0, 200);
    let here = client.put("here", "v").await.unwrap();
    let nobody = json!({"token": "sopt_nobody"});
    let before = metric_of(&client, "state:put").await;
    for (culprit, status, slug) in [
        (json!([{"state:put": {"key": "here", "json": 1, "if_match": here - 1}}]), 412, "precondition-failed"),
        (json!([{"state:put": {"key": "here", "json": 1, "if_none_match": "*"}}]), 412, "precondition-failed"),
        (json!([{"state:put": {"key": "here", "json": 1, "if_none_match": [0, here]}}]), 412, "precondition-failed"),
        (
            json!([{"state:put": {"key": "k", "json": 1, "lease": "01a20a40-497c-7000-8000-000000000000"}}]),
            404,
            "not-found",
        ),
        (json!([{"state:delete": {"key": "absent"}}]), 404, "not-found"),
        (json!([{"state:delete": {"key": "here", "if_match": [1]}}]), 412, "precondition-failed"),
        (json!([publish("absent", "1")]), 404, "not-found"),
        (json!([used(&nobody, "deploy")]), 404, "not-found"),
        (json!([used(&spent, "deploy")]), 409, "exhausted"),
        (json!([used(&gone, "deploy")]), 410, "gone"),
        (json!([used(&once, "deploy"), used(&once, "deploy")]), 409, "exhausted"),
        (json!([used(&once, "other")]), 403, "denied"),
    ] {
        let mut operations = vec![put("r/a"), publish("t", "r"), used(&once, "deploy"), register("r", "i")];
        operations.push(json!({"audit:event": {"event": event("r")}}));
        if culprit[0] == used(&once, "deploy") {
            operations.remove(2);
        }
        let at = operations.len() + culprit.as_array().unwrap().len() - 1;
        operations.extend(culprit.as_array().unwrap().clone());
        operations.push(put("r/z"));
        let (code, said) = tx(&client, &json!(operations)).await;
        assert_eq!((code, said["type"].as_str()), (status, Some(format!("/problems/{slug}").as_str())), "{said}");
        assert_eq!(said["errors"][0]["pointer"], format!("/operations/{at}"), "{said}");
        assert_eq!(said["errors"][0]["detail"], said["detail"]);
    }
    // A token that is for another is a denial, and recorded as one.
    let (_, denials) = client.get("/v1/audit/entries?outcome=denied&action=token:operation-use").await;
    assert_eq!(denials["items"][0]["details"]["change"]["id"], once["id"], "{denials}");
    // What the policy denies of one, it denies of all; the decision is that of the one.
    let writer = registered(&client, "state:write").await;
    let (status, said) = tx(&writer, &json!([put("r/a"), publish("t", "r")])).await;
    assert_eq!((status, said["type"].as_str()), (403, Some("/problems/denied")), "{said}");
    assert!(said["detail"].as_str().unwrap().contains("nexus:publish on topic/t"), "{said}");
    let (_, decision) = client.get(&format!("/v1/governance/decisions/{}", said["decision"].as_str().unwrap())).await;
    assert_eq!((&decision["action"], &decision["decision"]), (&json!("nexus:publish"), &json!(false)), "{decision}");
    assert_eq!(tx(&writer, &json!([put("w/a"), put("w/b")])).await.0, 200);
    // Of all those nothing is there.
    for key in ["r/a", "r/z"] {
        assert_eq!(client.get(&format!("/v1/state/kv/{key}")).await.0, 404, "{key}");
    }
    assert!(pull(&client, "t", 0.0).await.is_empty());
    assert_eq!(client.get("/v1/nexus/services/r").await.0, 404);
    assert_eq!((uses(&client, &once).await, metric_of(&client, "state:put").await), (0, before + 2.0));
    let (_, all) = client.get("/v1/audit/entries?action=ledger:tx").await;
    assert_eq!(all["items"].as_array().unwrap().len(), 2);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_one_does_not_touch_its_neighbours_and_takes_no_index() {
    let (db, _daemon, client) = start().await;
    topic(&client, "t").await;
    let token = token(&client, 3).await;
    client.token().await;
    let before = metric(&client, "sop_ledger_singled_batches_total").await;
    // Held by somebody else, so that all of them are in one turn when it is let go.
    let mut holder = db.connect_as("holder").await;
    sqlx::raw_sql("BEGIN; SELECT index FROM ledger.head FOR UPDATE").execute(&mut holder).await.unwrap();
    let first = tokio::spawn({
        let client = client.clone_at_self();
        async move { client.put("n/first", "v").await }
    });
    let blocked = async || {
        let sql = "SELECT count(*) FROM pg_stat_activity
                   WHERE datname = current_database() AND application_name LIKE 'sop/%' AND wait_event_type = 'Lock'";
        sqlx::query_scalar::<_, i64>(sql).fetch_one(&mut db.connect().await).await.unwrap() > 0
    };
    until("the writer waits for the head", blocked).await;
    let work = (0..24).map(|n| {
        let (client, token) = (client.clone_at_self(), token.clone());
        tokio::spawn(async move {
            let good = json!([put(&format!("n/{n}/a")), publish("t", &format!("{n}")), used(&token, "deploy")]);
            match n % 3 {
                0 => client.put(&format!("n/{n}"), "v").await.map(|_| 200).unwrap_or(500),
                1 => {
                    tx(
                        &client,
                        &json!([put(&format!("n/{n}/a")), publish("t", &format!("{n}")), publish("absent", "1")]),
                    )
                    .await
                    .0
                }
                // Three of them find a use left.
                _ => tx(&client, &good).await.0,
            }
        })
    });
    let work: Vec<_> = work.collect();
    // The daemon's own work may wait among them.
    let queued = async || {
        let said = client.bare(Method::GET, "/readyz?verbose").send().await.unwrap().text().await.unwrap();
        let count = said.split(" changes wait").next().unwrap().rsplit(' ').next().unwrap();
        count.parse::<usize>().unwrap() >= 24
    };
    until("all of them wait", queued).await;
    sqlx::raw_sql("ROLLBACK").execute(&mut holder).await.unwrap();
    first.await.unwrap().unwrap();
    let codes: Vec<u16> = join_all(work).await.into_iter().map(Result::unwrap).collect();
    let of = |rest: usize| codes.iter().enumerate().filter(move |(n, _)| n % 3 == rest).map(|(_, c)| *c);
    assert!(of(0).all(|c| c == 200) && of(1).all(|c| c == 404), "{codes:?}");
    assert_eq!((of(2).filter(|c| *c == 200).count(), of(2).filter(|c| *c == 409).count()), (3, 5), "{codes:?}");
    assert_eq!(metric(&client, "sop_ledger_singled_batches_total").await, before, "nothing was rolled back");
    // Entries have no gaps, so whoever was refused took none.
    record::check(&db).await;
    let (_, all) = client.get("/v1/audit/entries?action=ledger:tx").await;
    assert_eq!(all["items"].as_array().unwrap().len(), 3);
    assert_eq!(
        client.get("/v1/state/kv?prefix=n/&keys_only=true").await.1["items"].as_array().unwrap().len(),
        1 + 8 + 3
    );
    assert_eq!((pull(&client, "t", 0.0).await.len(), uses(&client, &token).await), (3, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_is_pointed_at() {
    let (db, _daemon, client) = start().await;
    topic(&client, "t").await;
    let puts = |n: usize| (0..n).map(|i| put(&format!("m/{i}"))).collect::<Vec<_>>();
    for (operations, pointer) in [
        (json!([]), "/operations"),
        (json!(puts(129)), "/operations"),
        (json!({"state:put": {}}), "/operations"),
        (json!([put("a"), {}]), "/operations/1"),
        (json!([put("a"), 7]), "/operations/1"),
        (json!([put("a"), null]), "/operations/1"),
        (json!([{"state:put": {"key": "a", "json": 1}, "state:delete": {"key": "b"}}]), "/operations/0"),
        (json!([put("a"), {"state:get": {"key": "a"}}]), "/operations/1/state:get"),
        (json!([{"a/b~c": {}}]), "/operations/0/a~1b~0c"),
        (json!([put("a"), {"state:put": 1}]), "/operations/1/state:put"),
        (json!([put("a"), {"state:put": null}]), "/operations/1/state:put"),
        (json!([{"state:put": {"key": "a"}}]), "/operations/0/state:put"),
        (json!([{"state:put": {"key": "a", "json": 1, "value": ""}}]), "/operations/0/state:put"),
        (json!([{"state:put": {"key": "a//b", "json": 1}}]), "/operations/0/state:put/key"),
        (json!([{"state:put": {"key": 1, "json": 1}}]), "/operations/0/state:put/key"),
        (json!([{"state:put": {"key": "a", "value": "%"}}]), "/operations/0/state:put/value"),
        (json!([{"state:put": {"key": "a", "json": 1, "ttl": 1}}]), "/operations/0/state:put/ttl"),
        (json!([{"state:put": {"key": "a", "json": 1, "if_match": "1"}}]), "/operations/0/state:put/if_match"),
        (json!([{"state:put": {"key": "a", "json": 1, "if_match": 1, "if_none_match": 1}}]), "/operations/0/state:put"),
        (json!([{"state:put": {"key": "a", "json": 1, "lease": "x"}}]), "/operations/0/state:put/lease"),
        (json!([{"state:delete": {"key": ""}}]), "/operations/0/state:delete/key"),
        (json!([{"nexus:publish": {"topic": "a b", "event": event("1")}}]), "/operations/0/nexus:publish/topic"),
        (json!([{"nexus:publish": {"topic": "t", "event": 1}}]), "/operations/0/nexus:publish/event"),
        (json!([{"nexus:publish": {"topic": "t", "event": {"id": "1"}}}]), "/operations/0/nexus:publish/event/source"),
        (
            json!([{"nexus:publish": {"topic": "t", "event": event("1"), "delay": -1}}]),
            "/operations/0/nexus:publish/delay",
        ),
        (json!([{"audit:event": {"event": []}}]), "/operations/0/audit:event/event"),
        (json!([{"audit:event": event("1")}]), "/operations/0/audit:event/specversion"),
        (json!([{"token:operation-use": {"token": "x"}}]), "/operations/0/token:operation-use"),
        (
            json!([{"nexus:register": {"service": "a", "instance": "/", "address": "x", "ttl": 1}}]),
            "/operations/0/nexus:register/instance",
        ),
        (
            json!([{"nexus:register": {"service": "a", "instance": "i", "address": "x", "ttl": 0}}]),
            "/operations/0/nexus:register/ttl",
        ),
        (json!([put("a"), put("b"), {"state:delete": {"key": "a"}}]), "/operations/2/state:delete"),
        (json!([register("a", "i"), register("a", "j"), register("a", "i")]), "/operations/2/nexus:register"),
    ] {
        let (status, said) = tx(&client, &operations).await;
        assert_eq!((status, said["errors"][0]["pointer"].as_str()), (400, Some(pointer)), "{said}");
    }
    let (_, said) = tx(&client, &json!([{"state:put": {"key": "/"}}, put("b"), {"nope": 1}])).await;
    assert!(said["errors"].as_array().unwrap().len() >= 2, "all faults at once: {said}");
    for (body, kind, status) in [
        (b"{\"operations\": [".to_vec(), "application/json", 400),
        (b"{\"operations\": [], \"more\": 1}".to_vec(), "application/json", 400),
        (json!({"operations": [put("a")]}).to_string().into_bytes(), "text/plain", 415),
        (
            json!({"operations": [{"state:put": {"key": "a", "value": base64(vec![7; 1024 * 768])}}]})
                .to_string()
                .into_bytes(),
            "application/json",
            413,
        ),
        (format!("{{\"operations\": [{{\"state:put\": {}", "[".repeat(500_000)).into_bytes(), "application/json", 400),
    ] {
        let request = client.request(Method::POST, "/v1/tx").await.header("content-type", kind).body(body);
        assert_eq!(request.send().await.unwrap().status(), status);
    }
    assert_eq!(client.get("/v1/tx").await.0, 405);
    assert_eq!(
        client.bare(Method::POST, "/v1/tx").json(&json!({"operations": [put("a")]})).send().await.unwrap().status(),
        401
    );
    assert_eq!(client.get("/v1/state/kv").await.1["items"], json!([]), "nothing of all that was made");
    // As much as may be is no fault.
    let (status, done) = tx(&client, &json!(puts(128))).await;
    assert_eq!((status, done["results"].as_array().unwrap().len()), (200, 128));
    let big = vec![0xff; 760_000];
    assert_eq!(tx(&client, &json!([{"state:put": {"key": "big", "value": base64(&big)}}])).await.0, 200);
    let (_, document) = client.get("/openapi.json").await;
    let known = document["components"]["schemas"]["TxOperation"]["oneOf"].as_array().unwrap();
    let known: Vec<_> = known.iter().map(|o| o["required"][0].as_str().unwrap()).collect();
    assert_eq!(
        known,
        ["audit:event", "nexus:publish", "nexus:register", "state:delete", "state:put", "token:operation-use"]
    );
    record::check(&db).await;
}
