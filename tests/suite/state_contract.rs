//! The small print of the contract, as somebody reads it who has only the contract.

use futures_util::StreamExt as _;
use reqwest::Method;
use serde_json::{Value, json};
use sop::kernel::crypto::base64 as b64;

use crate::state::{events, header, problem};
use crate::state_etcd::{revision, start, v3};
use crate::support::client::Client;
use crate::support::{record, soon};

async fn fault(client: &Client, method: Method, path: &str, body: Option<&Value>) -> (u16, String) {
    let mut request = client.request(method, path).await;
    if let Some(body) = body {
        request = request.json(body);
    }
    let (status, _, problem) = problem(request.send().await.unwrap()).await;
    (status, problem["errors"][0]["pointer"].as_str().unwrap_or_default().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_polls_without_waiting_is_told_all_there_is() {
    let (db, _daemon, client) = start().await;
    let index = client.put("w/one", "v").await.unwrap();
    for n in 0..12 {
        client.put(&format!("other/{n}"), "v").await.unwrap();
    }
    for round in 0..20 {
        let by_query =
            client.request(Method::GET, &format!("/v1/state/watch?wait=0&key=w/one&after={}", index - 1)).await;
        let by_field = client.request(Method::GET, "/v1/state/watch?wait=0&prefix=w/").await;
        for request in [by_query, by_field.header("last-event-id", index - 1)] {
            let told: Value = request.send().await.unwrap().json().await.unwrap();
            assert_eq!(
                (told["items"][0]["index"].as_i64(), told["items"].as_array().map(Vec::len)),
                (Some(index), Some(1)),
                "{round}"
            );
        }
        let (_, none) = client.get(&format!("/v1/state/watch?wait=0&key=w/one&after={index}")).await;
        assert_eq!(none["items"], json!([]));
    }
    // Who meant to go on and says it badly is told so, and does not begin at the head instead.
    for bad in ["abc", "-1", "99999999999999999999"] {
        let request = client.request(Method::GET, "/v1/state/watch?prefix=w/").await.header("last-event-id", bad);
        assert_eq!(problem(request.send().await.unwrap()).await.0, 400, "{bad}");
    }
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_fields_is_no_object() {
    let (db, _daemon, client) = start().await;
    let (_, lease) = client.json(Method::POST, "/v1/state/leases", &json!({"ttl": 60})).await;
    let before = client.last_entry().await;
    let put = json!(["list/1", "YQ=="]);
    for (path, body) in [
        ("/v1/state/txn", json!([])),
        ("/v1/state/txn", json!([[["x/1", "exists", "eq", true]], [{"put": put}], []])),
        ("/v1/state/txn", json!({"if": [["x/1", "exists", "eq", true]]})),
        ("/v1/state/txn", json!({"then": [{"put": put}]})),
        ("/v1/tx", json!([[{"state:put": {"key": "list/1", "value": "YQ=="}}]])),
        ("/v1/tx", json!({"operations": [{"state:put": put}]})),
        ("/v1/state/leases", json!([10])),
        ("/v1/state/leases/renew", json!([[lease["id"]]])),
        ("/v1/state/locks/list", json!([5])),
        ("/v1/state/elections/list/campaign", json!([1, 5])),
        ("/v1/state/compact", json!([1])),
    ] {
        assert_eq!(fault(&client, Method::POST, path, Some(&body)).await.0, 400, "{path} {body}");
    }
    assert_eq!(fault(&client, Method::PUT, "/v1/nexus/topics/list", Some(&json!([60]))).await.0, 400);
    let nested = json!({"create_request": ["bA=="]});
    let (status, _) = client.json(Method::POST, "/v3/watch", &nested).await;
    assert_eq!((status, client.last_entry().await), (400, before), "nothing was changed");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_route_takes_is_refused_and_named() {
    let (db, _daemon, client) = start().await;
    let index = client.put("x/1", "v").await.unwrap();
    let (_, lease) = client.json(Method::POST, "/v1/state/leases", &json!({"ttl": 60})).await;
    let lease = format!("/v1/state/leases/{}", lease["id"].as_str().unwrap());
    let before = client.last_entry().await;
    let txn = json!({"then": [{"delete": {"key": "x/1"}}]});
    let renew = format!("{lease}/renew");
    for (method, path, body) in [
        (Method::DELETE, "/v1/state/kv/x/1", None),
        (Method::POST, "/v1/state/txn", Some(txn)),
        (Method::POST, "/v1/tx", Some(json!({"operations": [{"state:delete": {"key": "x/1"}}]}))),
        (Method::POST, "/v1/state/compact", Some(json!({"before": index}))),
        (Method::POST, "/v1/state/leases", Some(json!({"ttl": 5}))),
        (Method::POST, renew.as_str(), None),
        (Method::GET, lease.as_str(), None),
        (Method::DELETE, lease.as_str(), None),
        (Method::POST, "/v1/state/locks/q", Some(json!({"ttl": 5}))),
        (Method::GET, "/v1/state/locks/q", None),
        (Method::GET, "/v1/state/elections/q", None),
        (Method::GET, "/v1/state/elections/q/observe", None),
        (Method::POST, "/v1/state/elections/q/campaign", Some(json!({"value": 1, "ttl": 5}))),
    ] {
        let answer = fault(&client, method.clone(), &format!("{path}?at=5"), body.as_ref()).await;
        assert_eq!(answer, (400, "?at".to_owned()), "{method} {path}");
    }
    for (method, path, body, at) in [
        (Method::POST, renew.as_str(), Some(json!({"x": 1})), "/x"),
        (Method::DELETE, "/v1/state/locks/q", None, "?lease"),
        (Method::GET, "/v1/state/kv/x/1?at=-1", None, "?at"),
        (Method::GET, "/v1/state/kv?at=-1", None, "?at"),
        (Method::POST, "/v1/state/compact", Some(json!({"before": -1})), "/before"),
    ] {
        let answer = fault(&client, method.clone(), path, body.as_ref()).await;
        assert_eq!(answer, (400, at.to_owned()), "{method} {path}");
    }
    assert_eq!(client.last_entry().await, before, "nothing was changed");
    // The pages of a list are of one index.
    client.put("x/2", "v").await.unwrap();
    let answer = client.request(Method::GET, "/v1/state/kv?prefix=x/&limit=1").await.send().await.unwrap();
    let at = header(&answer, "sop-index").to_owned();
    let page: Value = answer.json().await.unwrap();
    let next = page["next"].as_str().unwrap();
    assert_eq!(
        fault(&client, Method::GET, &format!("/v1/state/kv?prefix=x/&at={index}&after={next}"), None).await,
        (400, "?at".into())
    );
    assert_eq!(client.get(&format!("/v1/state/kv?prefix=x/&at={at}&after={next}")).await.0, 200);
    let other = fault(&client, Method::GET, &format!("/v1/state/kv?prefix=y/&after={next}"), None).await;
    assert_eq!(other, (400, "?after".into()), "a page of another list");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tags_are_compared_as_http_says() {
    let (db, _daemon, client) = start().await;
    let index = client.put("t/1", "v").await.unwrap();
    let ask = async |method: Method, name: &str, tag: String| {
        let request = client.request(method.clone(), "/v1/state/kv/t/1").await.header(name, tag);
        let request = if method == Method::PUT { request.body("w") } else { request };
        request.send().await.unwrap().status().as_u16()
    };
    assert_eq!(ask(Method::PUT, "if-match", format!("W/\"{index}\"")).await, 412, "If-Match wants the very same");
    assert_eq!(ask(Method::GET, "if-none-match", format!("W/\"{index}\"")).await, 304);
    assert_eq!(ask(Method::GET, "if-none-match", format!("\"0\", \"{index}\"")).await, 304);
    assert_eq!(ask(Method::GET, "if-none-match", "\"0\"".into()).await, 200);
    assert_eq!(ask(Method::PUT, "if-match", format!("\"0\", \"{index}\"")).await, 200);
    // Leases and locks are there or not, and have no tag.
    let (_, held) = client.json(Method::POST, "/v1/state/locks/t", &json!({"ttl": 60})).await;
    let lease = held["lease"].as_str().unwrap();
    for path in [format!("/v1/state/locks/t?lease={lease}"), format!("/v1/state/leases/{lease}")] {
        for (name, tag) in [("if-match", "\"1\""), ("if-none-match", "*")] {
            let answer = client.request(Method::DELETE, &path).await.header(name, tag).send().await.unwrap();
            assert_eq!(answer.status(), 412, "{path} {name}: {tag}");
        }
    }
    let there = client.request(Method::DELETE, &format!("/v1/state/leases/{lease}")).await.header("if-match", "*");
    assert_eq!(there.send().await.unwrap().status(), 200);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn null_is_a_value_like_any() {
    let (db, _daemon, client) = start().await;
    let put = json!({"key": "n/1", "json": null});
    let (status, _) = client.json(Method::POST, "/v1/state/txn", &json!({"then": [{"put": put}]})).await;
    assert_eq!(status, 200);
    let put = json!({"key": "n/2", "json": null});
    let (status, _) = client.json(Method::POST, "/v1/tx", &json!({"operations": [{"state:put": put}]})).await;
    assert_eq!(status, 200);
    for key in ["n/1", "n/2"] {
        let answer = client.request(Method::GET, &format!("/v1/state/kv/{key}")).await.send().await.unwrap();
        assert_eq!(header(&answer, "content-type"), "application/json");
        assert_eq!(header(&answer, "x-content-type-options"), "nosniff");
        assert_eq!(answer.text().await.unwrap(), "null");
    }
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_with_a_key_is_made_once() {
    let (db, _daemon, client) = start().await;
    let (_, lease) = client.json(Method::POST, "/v1/state/leases", &json!({"ttl": 60})).await;
    let id = lease["id"].as_str().unwrap();
    let one = (format!("/v1/state/leases/{id}/renew"), None);
    let many = ("/v1/state/leases/renew".to_owned(), Some(json!({"ids": [id]})));
    for (key, (path, body)) in [("renewal-1", one), ("renewal-2", many)] {
        let renew = async || {
            let request = client.request(Method::POST, &path).await.header("idempotency-key", key);
            let request = if let Some(body) = &body { request.json(body) } else { request };
            let answer = request.send().await.unwrap();
            (answer.status().as_u16(), header(&answer, "sop-index").to_owned(), answer.json::<Value>().await.unwrap())
        };
        let first = renew().await;
        client.put("between", "v").await.unwrap();
        assert_eq!((first.0, renew().await), (200, first.clone()));
        let index: i64 = first.1.parse().unwrap();
        let (_, entry) = client.get(&format!("/v1/audit/entries/{index}")).await;
        assert_eq!(entry["action"], "state:lease-renew", "{entry}");
    }
    let other = client.request(Method::POST, "/v1/state/leases/renew").await.header("idempotency-key", "renewal-2");
    let other = other.json(&json!({"ids": [id, id]})).send().await.unwrap();
    assert_eq!(problem(other).await.0, 422);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_looks_the_same_to_who_is_refused_and_to_who_reads() {
    let (db, _daemon, client) = start().await;
    client.json(Method::POST, "/v1/state/locks/one", &json!({"ttl": 60})).await;
    let (status, refused) = client.json(Method::POST, "/v1/state/locks/one", &json!({"ttl": 60})).await;
    let (_, read) = client.get("/v1/state/locks/one").await;
    assert_eq!((status, &refused["holders"], &read["holders"][0]["mode"]), (409, &read["holders"], &json!("write")));
    // An election is observed by whoever can only post, too.
    let observed = client.request(Method::POST, "/v1/state/elections/one/observe").await.send().await.unwrap();
    let heard = events(observed, |e| !e.is_empty()).await;
    assert_eq!((heard[0].0.as_str(), &heard[0].2["holder"]), ("leader", &read["holder"]));
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn revisions_of_the_gateway_never_go_back() {
    let (db, _daemon, client) = start().await;
    v3(&client, "/v3/kv/put", json!({"key": b64("r"), "value": b64("v")})).await;
    let mut last = 0;
    for _ in 0..5 {
        let granted = revision(&v3(&client, "/v3/lease/grant", json!({"TTL": 60})).await);
        let token = client.token().await;
        let body = json!({"create_request": {"key": b64("r")}}).to_string();
        let watch =
            client.bare(Method::POST, "/v3/watch").header("authorization", token).body(body).send().await.unwrap();
        let (mut pieces, mut text) = (watch.bytes_stream(), String::new());
        while !text.contains('\n') {
            let piece = soon("a piece", pieces.next()).await;
            text.push_str(std::str::from_utf8(&piece.unwrap().unwrap()).unwrap());
        }
        let said: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        let created = revision(&said["result"]);
        assert!(created >= granted && granted > last, "{last} {granted} {created}");
        last = created;
    }
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_document_says_what_can_be_answered_and_sent() {
    let (_db, _daemon, client) = start().await;
    let (_, document) = client.get("/openapi.json").await;
    for (path, item) in document["paths"].as_object().unwrap() {
        assert!(!path.contains('*'), "{path}");
        for (method, operation) in item.as_object().unwrap() {
            let refused = &operation["responses"]["default"];
            assert!(refused["description"].is_string(), "{method} {path}");
            let form = &refused["content"]["application/problem+json"]["schema"]["$ref"];
            assert_eq!(
                form == "#/components/schemas/Problem",
                path.starts_with("/v1/") || path.starts_with("/access/"),
                "{path}"
            );
            let named = operation["parameters"].as_array().into_iter().flatten();
            let named: Vec<_> = named.filter(|p| p["in"] == "path").map(|p| p["name"].as_str().unwrap()).collect();
            let wanted: Vec<_> = path.split('{').skip(1).map(|p| p.split('}').next().unwrap()).collect();
            assert_eq!(named, wanted, "{method} {path}");
        }
    }
    let schemas = &document["components"]["schemas"];
    assert!(schemas["Problem"]["properties"]["status"].is_object());
    let operations = schemas["TxOperation"]["oneOf"].as_array().unwrap();
    let put = operations.iter().find(|o| o["properties"]["state:put"].is_object()).unwrap();
    for any in [
        &schemas["TxnCondition"]["properties"]["operand"],
        &schemas["TxnPut"]["properties"]["json"],
        &put["properties"]["state:put"]["properties"]["json"],
        &schemas["Candidacy"]["properties"]["value"],
        &schemas["LockStanding"]["properties"]["value"],
    ] {
        assert!(any.is_object() && any.get("type").is_none(), "any JSON: {any}");
    }
    let put = document["paths"]["/v1/state/kv/{key}"]["put"]["parameters"].as_array().unwrap();
    assert!(["If-Match", "If-None-Match"].iter().all(|name| put.iter().any(|p| p["name"] == *name)));
}
