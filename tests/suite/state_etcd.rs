//! etcd's JSON gateway: the room's keys, leases and watches as etcd's clients find them.

use reqwest::Method;
use serde_json::{Value, json};
use sop::kernel::crypto::base64 as b64;

use crate::policy;
use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::postgres::{Database, database};
use crate::support::record;

pub async fn start() -> (Database, Daemon, Client) {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    (db, daemon, client)
}

/// As a client of etcd sends it: the token by itself, and no media type.
pub async fn raw(client: &Client, path: &str, body: impl Into<reqwest::Body>) -> (u16, Value) {
    let request = client.bare(Method::POST, path).header("authorization", client.token().await).body(body);
    let answer = request.send().await.unwrap();
    let status = answer.status().as_u16();
    (status, answer.json().await.unwrap())
}

pub async fn v3(client: &Client, path: &str, body: Value) -> Value {
    let (status, said) = raw(client, path, body.to_string()).await;
    assert_eq!(status, 200, "{path} {body}: {said}");
    said
}

/// Status, code and message.
pub async fn refused(client: &Client, path: &str, body: Value) -> (u16, i64, String) {
    let (status, said) = raw(client, path, body.to_string()).await;
    assert_eq!(said["error"], said["message"], "{said}");
    (status, said["code"].as_i64().unwrap(), said["message"].as_str().unwrap().to_owned())
}

pub fn etcd(status: u16, code: i64, text: &str) -> (u16, i64, String) {
    (status, code, format!("etcdserver: {text}"))
}

pub async fn put(client: &Client, key: &str, value: &str) -> i64 {
    let done = v3(client, "/v3/kv/put", json!({"key": b64(key), "value": b64(value)})).await;
    revision(&done)
}

pub fn revision(said: &Value) -> i64 {
    said["header"]["revision"].as_str().unwrap().parse().unwrap()
}

pub async fn keys(client: &Client, body: Value) -> Vec<String> {
    let said = v3(client, "/v3/kv/range", body).await;
    let key = |kv: &Value| sop::kernel::crypto::from_base64(kv["key"].as_str().unwrap()).unwrap();
    let kvs = said["kvs"].as_array().cloned().unwrap_or_default();
    kvs.iter().map(|kv| String::from_utf8_lossy(&key(kv)).into_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_any_bytes_are_put_read_and_deleted() {
    let (db, _daemon, client) = start().await;
    let first = put(&client, "a/1", "one").await;
    let odd = b64(b"a/\xff\x00");
    let second = revision(&v3(&client, "/v3/kv/put", json!({"key": odd, "value": ""})).await);
    // What is zero is left out, numbers are strings, and both spellings are read.
    let said = v3(&client, "/v3/kv/range", json!({"key": b64("a/"), "rangeEnd": b64("a0")})).await;
    assert!(revision(&said) >= second);
    let one = json!({"key": b64("a/1"), "create_revision": first.to_string(), "mod_revision": first.to_string(), "version": "1", "value": b64("one")});
    let two =
        json!({"key": odd, "create_revision": second.to_string(), "mod_revision": second.to_string(), "version": "1"});
    assert_eq!((&said["kvs"], &said["count"], said.get("more")), (&json!([one, two]), &json!("2"), None));
    // They are the room's own keys: in its lists, in its record, by one text each.
    let (_, listed) = client.get("/v1/state/kv?prefix=a/").await;
    assert_eq!((&listed["items"][0]["key"], &listed["items"][1]["key_base64"]), (&json!("a/1"), &json!(odd)));
    let (_, entry) = client.get(&format!("/v1/audit/entries/{second}")).await;
    assert_eq!((&entry["action"], &entry["resource"]), (&json!("state:put"), &json!("key/a/%FF%00")));
    let (_, read) = client.get("/v1/state/kv/a/1").await;
    assert_eq!(read, json!(null), "the bytes, which are no JSON");
    // What was before, and what stays.
    let again = json!({"key": b64("a/1"), "value": b64("two"), "prev_kv": true});
    let third = v3(&client, "/v3/kv/put", again).await;
    assert_eq!(third["prev_kv"], one);
    let lease = v3(&client, "/v3/lease/grant", json!({"TTL": 60})).await["ID"].clone();
    v3(&client, "/v3/kv/put", json!({"key": b64("a/1"), "lease": lease, "ignore_value": true})).await;
    v3(&client, "/v3/kv/put", json!({"key": b64("a/1"), "value": b64("three"), "ignore_lease": true})).await;
    let now = v3(&client, "/v3/kv/range", json!({"key": b64("a/1")})).await;
    assert_eq!(now["kvs"][0]["value"], b64("three"));
    assert_eq!((&now["kvs"][0]["lease"], &now["kvs"][0]["version"]), (&lease, &json!("4")));
    let past = v3(&client, "/v3/kv/range", json!({"key": b64("a/1"), "revision": first})).await;
    assert_eq!((&past["kvs"], revision(&past) >= revision(&now)), (&json!([one]), true));
    // A row of keys goes at one revision; what is not there takes none.
    let gone = json!({"key": b64("a/"), "range_end": b64("a0"), "prev_kv": true});
    let gone = v3(&client, "/v3/kv/deleterange", gone).await;
    assert_eq!((&gone["deleted"], gone["prev_kvs"].as_array().unwrap().len()), (&json!("2"), 2));
    let none = v3(&client, "/v3/kv/deleterange", json!({"key": b64("a/1")})).await;
    assert_eq!((revision(&none) >= revision(&gone), none.get("deleted")), (true, None));
    let empty = v3(&client, "/v3/kv/range", json!({"key": "AA==", "range_end": "AA==", "serializable": true})).await;
    assert_eq!(empty.as_object().unwrap().keys().collect::<Vec<_>>(), ["header"]);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_are_ordered_limited_counted_and_bounded() {
    let (db, _daemon, client) = start().await;
    for (key, value) in [("r/a", "3"), ("r/b", "1"), ("r/c", "2"), ("r/b", "0"), ("s", "9")] {
        put(&client, key, value).await;
    }
    let b = v3(&client, "/v3/kv/range", json!({"key": b64("r/b")})).await["kvs"][0].clone();
    let all = |more: Value| {
        let mut body = json!({"key": b64("r/"), "range_end": b64("r0")});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    for (more, expected) in [
        (json!({}), &["r/a", "r/b", "r/c"][..]),
        (json!({"sort_order": "DESCEND"}), &["r/c", "r/b", "r/a"]),
        (json!({"sort_target": "VALUE"}), &["r/b", "r/c", "r/a"]),
        (json!({"sortOrder": 2, "sortTarget": 4, "limit": 2}), &["r/a", "r/c"]),
        (json!({"sort_target": "MOD", "sort_order": "DESCEND", "limit": "1"}), &["r/b"]),
        (json!({"sort_target": "CREATE"}), &["r/a", "r/b", "r/c"]),
        (json!({"sort_target": "VERSION", "sort_order": "DESCEND", "limit": 1}), &["r/b"]),
        (json!({"min_mod_revision": b["mod_revision"]}), &["r/b"]),
        (json!({"max_mod_revision": b["create_revision"]}), &["r/a"]),
        (json!({"min_create_revision": b["create_revision"], "max_create_revision": b["create_revision"]}), &["r/b"]),
        (json!({"limit": 2}), &["r/a", "r/b"]),
        (json!({"revision": b["create_revision"], "limit": 5}), &["r/a", "r/b"]),
        (json!({"range_end": "AA=="}), &["r/a", "r/b", "r/c", "s"]),
        (json!({"range_end": b64("r/b")}), &["r/a"]),
        (json!({"range_end": b64("a")}), &[]),
        (json!({"key": b64("r/a"), "range_end": b64("r/c")}), &["r/a", "r/b"]),
    ] {
        assert_eq!(keys(&client, all(more.clone())).await, expected, "{more}");
    }
    let page = v3(&client, "/v3/kv/range", all(json!({"limit": 2, "keys_only": true}))).await;
    assert_eq!((&page["more"], &page["count"], page["kvs"][0].get("value")), (&json!(true), &json!("3"), None));
    let whole = v3(&client, "/v3/kv/range", all(json!({"limit": 3}))).await;
    assert_eq!((whole.get("more"), &whole["count"]), (None, &json!("3")));
    let count = v3(&client, "/v3/kv/range", all(json!({"count_only": true, "limit": 1}))).await;
    assert_eq!((&count["count"], count.get("kvs"), count.get("more")), (&json!("3"), None, None));
    // More than can be answered at once is refused, not cut.
    let value = "v".repeat(1024 * 1024);
    for i in 0..17 {
        put(&client, &format!("big/{i}"), &value).await;
    }
    let big = json!({"key": b64("big/"), "range_end": b64("big0")});
    let (status, code, _) = refused(&client, "/v3/kv/range", big.clone()).await;
    assert_eq!((status, code), (429, 8));
    let inside = json!({"success": [{"request_range": big}]});
    assert_eq!(refused(&client, "/v3/kv/txn", inside).await.1, 3);
    let (status, _, said) = refused(&client, "/v3/kv/put", json!({"key": b64("x"), "value": b64(value + "v")})).await;
    assert_eq!((status, said.as_str()), (400, "etcdserver: request is too large"));
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_in_the_words_of_etcd() {
    let (db, _daemon, client) = start().await;
    let key = b64("k");
    let first = put(&client, "k", "1").await;
    let second = put(&client, "k", "2").await;
    for (path, body, expected) in [
        ("/v3/kv/put", json!({"value": "MQ=="}), etcd(400, 3, "key is not provided")),
        ("/v3/kv/range", json!({}), etcd(400, 3, "key is not provided")),
        ("/v3/kv/deleterange", json!({"key": null}), etcd(400, 3, "key is not provided")),
        ("/v3/kv/put", json!({"key": key, "lease": "9"}), etcd(404, 5, "requested lease not found")),
        ("/v3/kv/put", json!({"key": key, "value": "MQ==", "ignore_value": true}), etcd(400, 3, "value is provided")),
        ("/v3/kv/put", json!({"key": key, "lease": 1, "ignore_lease": true}), etcd(400, 3, "lease is provided")),
        ("/v3/kv/put", json!({"key": b64("no"), "ignore_value": true}), etcd(400, 3, "key not found")),
        ("/v3/kv/put", json!({"key": b64("x".repeat(1025))}), etcd(400, 3, "key is too long, 1024 bytes are the most")),
        (
            "/v3/kv/range",
            json!({"key": key, "revision": second + 1000}),
            etcd(400, 11, "mvcc: required revision is a future revision"),
        ),
        (
            "/v3/kv/compaction",
            json!({"revision": "99999"}),
            etcd(400, 11, "mvcc: required revision is a future revision"),
        ),
        ("/v3/kv/txn", json!({"compare": [{"target": "MOD"}]}), etcd(400, 3, "key is not provided")),
        ("/v3/kv/txn", json!({"success": [{}]}), etcd(400, 3, "key not found")),
        (
            "/v3/kv/txn",
            json!({"success": [{"request_put": {"key": key}}, {"request_delete_range": {"key": b64("a"), "range_end": b64("z")}}]}),
            etcd(400, 3, "duplicate key given in txn request"),
        ),
        (
            "/v3/kv/txn",
            json!({"success": vec![json!({"request_range": {"key": key}}); 129]}),
            etcd(400, 3, "too many operations in txn request"),
        ),
        (
            "/v3/kv/txn",
            json!({"success": [{"request_txn": {"success": vec![json!({"request_range": {"key": key}}); 129]}}]}),
            etcd(400, 3, "too many operations in txn request"),
        ),
        (
            "/v3/kv/txn",
            json!({"success": vec![json!({"request_txn": {"failure": vec![json!({"request_range": {"key": key}}); 128]}}); 8]}),
            etcd(400, 3, "too many operations in txn request"),
        ),
        (
            "/v3/kv/txn",
            json!({"success": [{"request_put": {"key": key, "lease": "9"}}]}),
            etcd(404, 5, "requested lease not found"),
        ),
        ("/v3/lease/grant", json!({"TTL": "86401"}), etcd(400, 11, "too large lease TTL")),
        ("/v3/lease/revoke", json!({"ID": "9"}), etcd(404, 5, "requested lease not found")),
        ("/v3/watch", json!({}), etcd(400, 3, "a create_request is wanted")),
    ] {
        assert_eq!(refused(&client, path, body.clone()).await, expected, "{path} {body}");
    }
    for body in [
        "[]",
        "7",
        "{",
        "{\"key\": 7}",
        "{\"key\": \"%\"}",
        "{\"key\": \"aw==\", \"revision\": 1.5}",
        "\u{0}",
        "{\"key\": [\"aw==\"]}",
    ] {
        let (status, said) = raw(&client, "/v3/kv/range", body).await;
        assert_eq!((status, said["code"].as_i64()), (400, Some(3)), "{body}: {said}");
    }
    let deep = format!("{{\"x\": {}", "[".repeat(100_000));
    assert_eq!(raw(&client, "/v3/kv/txn", deep).await.0, 400);
    assert_eq!(raw(&client, "/v3/kv/nope", "{}").await.0, 404);
    let answer = client.request(Method::GET, "/v3/kv/range").await.send().await.unwrap();
    assert_eq!((answer.status().as_u16(), answer.headers()["allow"].to_str().unwrap()), (405, "POST"));
    // The past that was given up is gone for everyone.
    v3(&client, "/v3/kv/compaction", json!({"revision": second, "physical": true})).await;
    let gone = etcd(400, 11, "mvcc: required revision has been compacted");
    assert_eq!(refused(&client, "/v3/kv/range", json!({"key": key, "revision": first})).await, gone);
    assert_eq!(refused(&client, "/v3/kv/compaction", json!({"revision": second})).await, gone);
    let inside =
        json!({"success": [{"request_put": {"key": key}}, {"request_range": {"key": key, "revision": first}}]});
    assert_eq!(refused(&client, "/v3/kv/txn", inside).await, gone, "and nothing is put");
    assert_eq!(v3(&client, "/v3/kv/range", json!({"key": key, "revision": second})).await["count"], "1");
    let (_, now) = client.get("/v1/state/kv?prefix=k").await;
    assert_eq!(now["items"][0]["version"], 2);
    record::check(&db).await;
    // The last on its connection: of a body that is too large not all is read.
    let (status, said) = raw(&client, "/v3/kv/range", vec![b' '; 3 * 1024 * 1024]).await;
    assert_eq!((status, &said["error"]), (400, &json!("etcdserver: request is too large")));
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_compare_and_do() {
    let (db, _daemon, client) = start().await;
    let lease = v3(&client, "/v3/lease/grant", json!({"TTL": "60", "ID": "-7"})).await;
    assert_eq!((&lease["ID"], &lease["TTL"]), (&json!("-7"), &json!("60")));
    let made = v3(
        &client,
        "/v3/kv/txn",
        json!({
            "compare": [{"key": b64("t/a"), "target": "CREATE", "result": "EQUAL", "create_revision": "0"}],
            "success": [{"request_put": {"key": b64("t/a"), "value": b64("1"), "lease": -7}}, {"requestPut": {"key": b64("t/b"), "value": b64("2")}},
                        {"request_range": {"key": b64("t/"), "range_end": b64("t0"), "keys_only": true}}],
            "failure": [{"request_range": {"key": b64("t/a")}}],
        }),
    )
    .await;
    let at = revision(&made).to_string();
    assert_eq!(made["succeeded"], true);
    assert_eq!(made["responses"][0], json!({"response_put": {"header": {"revision": at}}}));
    assert_eq!(made["responses"][2]["response_range"]["count"], "2");
    let (key, other, none) = (b64("t/a"), b64("t/b"), b64("t/none"));
    let row = |rest: Value| {
        let mut body = json!({"key": b64("t/"), "range_end": b64("t0")});
        body.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        body
    };
    for (compare, holds) in [
        (json!({"key": key, "target": "VERSION", "version": 1}), true),
        (json!({"key": key, "target": 0, "result": 3, "version": "1"}), false),
        (json!({"key": key, "target": "MOD", "mod_revision": at}), true),
        (json!({"key": key, "target": "MOD", "result": "LESS", "modRevision": at}), false),
        (json!({"key": key, "target": "VALUE", "value": b64("1")}), true),
        (json!({"key": key, "target": "VALUE", "result": "GREATER", "value": b64("0")}), true),
        (json!({"key": none, "target": "VALUE", "result": "NOT_EQUAL", "value": b64("1")}), false),
        (json!({"key": none, "target": "VERSION", "version": "0"}), true),
        (json!({"key": key, "target": "LEASE", "lease": "-7"}), true),
        (json!({"key": other, "target": "LEASE", "lease": 0}), true),
        (json!({"key": other, "target": "LEASE", "result": "NOT_EQUAL", "lease": "0"}), false),
        (row(json!({"target": "VERSION", "result": "LESS", "version": "2"})), true),
        (row(json!({"target": "VALUE", "result": "LESS", "value": b64("2")})), false),
        (row(json!({"target": "LEASE", "result": "EQUAL", "lease": "-7"})), false),
        (json!({"key": b64("u"), "range_end": b64("v"), "target": "CREATE", "create_revision": 0}), true),
        (json!({"key": b64("u"), "range_end": b64("v"), "target": "VALUE", "result": "NOT_EQUAL"}), false),
    ] {
        let said = v3(&client, "/v3/kv/txn", json!({"compare": [compare]})).await;
        assert_eq!(said["succeeded"] == true, holds, "{compare}");
    }
    let (_, entries) = client.get("/v1/audit/entries?action=state:txn&limit=1").await;
    assert_eq!(entries["items"][0]["index"].to_string(), at, "what changes nothing takes no revision");
    // What is deleted twice goes once, whichever way it is named; a put says what was before.
    let deletes = json!({"success": [
        {"request_put": {"key": key, "value": b64("3"), "prev_kv": true}}, {"request_delete_range": {"key": other, "prev_kv": true}},
        {"request_delete_range": {"key": other}}, {"request_delete_range": {"key": other, "range_end": b64("t/c")}},
        {"request_delete_range": {"key": other}}, {"request_range": row(json!({}))},
    ]});
    let done = v3(&client, "/v3/kv/txn", deletes).await;
    let told = done["responses"].as_array().unwrap();
    assert_eq!(told[0]["response_put"]["prev_kv"]["lease"], "-7");
    assert_eq!(told[1]["response_delete_range"]["prev_kvs"][0]["value"], b64("2"));
    let deleted: Vec<&Value> = told[1..5].iter().map(|r| &r["response_delete_range"]["deleted"]).collect();
    assert_eq!(deleted, [&json!("1"), &json!(null), &json!(null), &json!(null)]);
    assert_eq!(told[5]["response_range"]["kvs"].as_array().unwrap().len(), 1);
    assert!(told[5]["response_range"]["kvs"][0].get("lease").is_none(), "a put without a lease takes it off");
    let (_, entry) = client.get(&format!("/v1/audit/entries/{}", revision(&done))).await;
    assert_eq!((&entry["action"], &entry["details"]["change"]["deleted"]), (&json!("state:txn"), &json!(["t/b"])));
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_is_decided_on_as_everywhere() {
    let (db, daemon, client) = start().await;
    let answer = client.bare(Method::GET, "/version").send().await.unwrap().json::<Value>().await.unwrap();
    assert!(answer["etcdserver"].as_str().unwrap().split('.').all(|n| n.parse::<u32>().is_ok()), "{answer}");
    // Before it has a token a client finds the members, as it does with etcd; nothing else.
    let members =
        client.bare(Method::POST, "/v3/cluster/member/list").send().await.unwrap().json::<Value>().await.unwrap();
    assert_eq!(members["members"][0]["clientURLs"], json!([daemon.url]));
    for path in ["/v3/kv/range", "/v3/watch", "/v3/maintenance/status", "/v3/lease/leases", "/v3/nope"] {
        let answer = client.bare(Method::POST, path).body("{}").send().await.unwrap();
        let (status, said) = (answer.status().as_u16(), answer.json::<Value>().await.unwrap());
        assert_eq!((status, &said["code"], &said["error"]), (400, &json!(3), &json!("etcdserver: user name is empty")));
        let answer =
            client.bare(Method::POST, path).header("authorization", "eyJh.x.y").body("{}").send().await.unwrap();
        let (status, said) = (answer.status().as_u16(), answer.json::<Value>().await.unwrap());
        assert_eq!(
            (status, &said["code"], &said["error"]),
            (401, &json!(16), &json!("etcdserver: invalid auth token"))
        );
    }
    // Name and password are a client's id and secret, and what comes of them is an access token like any.
    let reader = policy::client(&client, "state:read").await;
    let (name, password) = reader.credential();
    let given = client.bare(Method::POST, "/v3/auth/authenticate");
    let given =
        given.json(&json!({"name": name, "password": password})).send().await.unwrap().json::<Value>().await.unwrap();
    let token = given["token"].as_str().unwrap();
    for header in [token.to_owned(), format!("Bearer {token}")] {
        let request = client.bare(Method::POST, "/v3/maintenance/status").header("authorization", header);
        let status = request.send().await.unwrap().json::<Value>().await.unwrap();
        assert!(status["dbSize"].as_str().unwrap().parse::<i64>().unwrap() > 0, "{status}");
    }
    assert_eq!(
        client.bare(Method::GET, "/v1/state/kv").bearer_auth(token).send().await.unwrap().status().as_u16(),
        200
    );
    for wrong in [json!({"name": name, "password": "x"}), json!({"name": "nobody", "password": password}), json!({})] {
        let answer = client.bare(Method::POST, "/v3/auth/authenticate").json(&wrong).send().await.unwrap();
        let (status, said) = (answer.status().as_u16(), answer.json::<Value>().await.unwrap());
        let text = "etcdserver: authentication failed, invalid user ID or password";
        assert_eq!((status, &said["code"], &said["error"]), (400, &json!(3), &json!(text)));
    }
    // A scope to read does not write, and to be told what was before is to read.
    assert_eq!(keys(&reader, json!({"key": b64("a")})).await, [""; 0]);
    let (status, said) = raw(&reader, "/v3/kv/put", json!({"key": b64("a"), "value": ""}).to_string()).await;
    assert_eq!((status, &said["code"], &said["error"]), (403, &json!(7), &json!("etcdserver: permission denied")));
    let decision = said["decision"].as_str().expect("the decision");
    assert_eq!(client.get(&format!("/v1/governance/decisions/{decision}")).await.0, 200);
    let denied = etcd(403, 7, "permission denied");
    let writer = policy::client(&client, "state:write").await;
    put(&writer, "a", "1").await;
    for (path, body) in [
        ("/v3/kv/range", json!({"key": b64("a")})),
        ("/v3/kv/put", json!({"key": b64("a"), "prev_kv": true})),
        ("/v3/kv/deleterange", json!({"key": b64("a"), "prev_kv": true})),
        ("/v3/kv/txn", json!({"compare": [{"key": b64("a"), "target": "VALUE"}]})),
        ("/v3/kv/compaction", json!({"revision": 1})),
        ("/v3/watch", json!({"create_request": {"key": b64("a")}})),
        ("/v3/lease/timetolive", json!({"ID": 1})),
    ] {
        assert_eq!(refused(&writer, path, body).await, denied, "{path}");
    }
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_of_keys_is_decided_on_as_the_prefix_they_share() {
    let (db, _daemon, admin, other) = policy::start().await;
    let (_, made) = admin.json(Method::POST, "/oauth2/register", &json!({"scope": "nexus:read"})).await;
    let arp = admin.with(made["client_id"].as_str().unwrap(), made["client_secret"].as_str().unwrap());
    let name = made["client_id"].as_str().unwrap();
    let policies = format!(
        r#"@id("arp") permit (principal == Sop::Client::"{name}", action in Sop::Action::"state", resource is Sop::Key)
        when {{ resource.name like "arp/*" }};"#
    );
    policy::activate(&admin, &other, &policies, None).await;
    put(&arp, "arp/a", "1").await;
    v3(&arp, "/v3/kv/put", json!({"key": b64(b"arp/\xff")})).await;
    for (from, end) in [("arp/", "arp0"), ("arp/a", "arp/c"), ("arp/", "arp/\u{0}")] {
        v3(&arp, "/v3/kv/range", json!({"key": b64(from), "range_end": b64(end)})).await;
        v3(&arp, "/v3/kv/deleterange", json!({"key": b64(from), "range_end": b64(end)})).await;
    }
    let denied = etcd(403, 7, "permission denied");
    for (from, end) in
        [("arp/a", "arq"), ("arp", "arp0"), ("arp/", "arp1"), ("arp/", "\u{0}"), ("arp%2F", ""), ("a", "b")]
    {
        let body = json!({"key": b64(from), "range_end": b64(end)});
        assert_eq!(refused(&arp, "/v3/kv/range", body.clone()).await, denied, "{from} {end}");
        assert_eq!(refused(&arp, "/v3/kv/deleterange", body.clone()).await, denied, "{from} {end}");
        assert_eq!(refused(&arp, "/v3/watch", json!({"create_request": body})).await, denied, "{from} {end}");
    }
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_inside_a_transaction() {
    let (db, _daemon, client) = start().await;
    let put = |key: &str, value: &str| json!({"request_put": {"key": b64(key), "value": b64(value)}});
    let get = |key: &str| json!({"request_range": {"key": b64(key)}});
    let delete = |key: &str| json!({"request_delete_range": {"key": b64(key)}});
    let there = |key: &str, version: i64| json!({"key": b64(key), "target": "VERSION", "version": version});
    let inside = |compare: Value, success: Value, failure: Value| json!({"request_txn": {"compare": [compare], "success": success, "failure": failure}});
    // Its conditions are about what was before all of it; its reads see what was done before them.
    let deep = inside(there("b", 0), json!([put("c", "3")]), json!([]));
    let nested = inside(there("a", 0), json!([put("b", "2"), get("a"), deep]), json!([get("none")]));
    let ops =
        json!([put("a", "1"), nested, get("b"), inside(there("a", 1), json!([put("d", "4")]), json!([get("d")]))]);
    let done = v3(&client, "/v3/kv/txn", json!({"success": ops})).await;
    let at = revision(&done).to_string();
    let header = json!({"revision": at});
    let told = |key: &str, value: &str| {
        json!({"header": header, "count": "1", "kvs": [{
        "key": b64(key), "value": b64(value), "create_revision": at, "mod_revision": at, "version": "1"}]})
    };
    assert_eq!(
        done["responses"],
        json!([
            {"response_put": {"header": header}},
            {"response_txn": {"header": {}, "succeeded": true, "responses": [
                {"response_put": {"header": header}},
                {"response_range": told("a", "1")},
                {"response_txn": {"header": {}, "succeeded": true, "responses": [{"response_put": {"header": header}}]}},
            ]}},
            {"response_range": told("b", "2")},
            {"response_txn": {"header": {}, "responses": [{"response_range": {"header": header}}]}},
        ])
    );
    let (_, entry) = client.get(&format!("/v1/audit/entries/{at}")).await;
    let change = &entry["details"]["change"];
    assert_eq!(
        (&change["put"], &change["inside"]),
        (&json!(["a", "b", "c"]), &json!([true, true, false])),
        "one entry"
    );
    // What may be put and deleted together, whichever branches are taken.
    let all = |ops: Value| json!({"success": ops});
    let either = inside(there("a", 1), json!([put("a", "2")]), json!([put("a", "3")]));
    v3(&client, "/v3/kv/txn", all(json!([either]))).await;
    assert_eq!(v3(&client, "/v3/kv/range", json!({"key": b64("a")})).await["kvs"][0]["value"], b64("2"));
    let twice = etcd(400, 3, "duplicate key given in txn request");
    for ops in [
        json!([put("a", "4"), inside(there("a", 9), json!([put("a", "5")]), json!([]))]),
        json!([
            inside(there("a", 9), json!([put("a", "5")]), json!([])),
            inside(there("a", 9), json!([]), json!([put("a", "5")]))
        ]),
        json!([delete("a"), inside(there("a", 9), json!([]), json!([put("a", "5")]))]),
        json!([put("a", "5"), inside(there("a", 9), json!([delete("a")]), json!([]))]),
        json!([
            inside(there("a", 9), json!([put("a", "5")]), json!([])),
            inside(there("a", 9), json!([delete("a")]), json!([]))
        ]),
    ] {
        assert_eq!(refused(&client, "/v3/kv/txn", all(ops.clone())).await, twice, "{ops}");
    }
    // One that only reads takes no revision.
    let before = client.last_entry().await;
    v3(&client, "/v3/kv/txn", all(json!([inside(there("a", 2), json!([get("a")]), json!([]))]))).await;
    assert_eq!(client.last_entry().await, before);
    // Whoever may not do all of it, whichever branch it is in, does nothing; nor does who may not look.
    let reader = policy::client(&client, "state:read").await;
    let hidden = all(json!([inside(there("a", 2), json!([get("a")]), json!([delete("a")]))]));
    assert_eq!(refused(&reader, "/v3/kv/txn", hidden).await, etcd(403, 7, "permission denied"));
    let nobody = policy::client(&client, "nexus").await;
    for inner in [inside(there("a", 2), json!([]), json!([])), json!({"request_txn": {"failure": [get("a")]}})] {
        let looks = all(json!([json!({"request_txn": {"success": [inner]}})]));
        assert_eq!(refused(&nobody, "/v3/kv/txn", looks).await, etcd(403, 7, "permission denied"));
    }
    let absent =
        all(json!([inside(there("a", 2), json!([{"request_put": {"key": b64("l"), "lease": "9"}}]), json!([]))]));
    assert_eq!(refused(&client, "/v3/kv/txn", absent).await, etcd(404, 5, "requested lease not found"));
    let unwanted = json!({"request_put": {"key": b64("l"), "lease": "9"}});
    v3(
        &client,
        "/v3/kv/txn",
        all(json!([inside(there("a", 2), json!([delete("a")]), json!([delete("b"), unwanted]))])),
    )
    .await;
    assert_eq!(keys(&client, json!({"key": b64("a"), "range_end": b64("z")})).await, ["b", "c"]);
    record::check(&db).await;
}
