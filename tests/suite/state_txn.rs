//! Transactions: what they compare and do, what they refuse, and a model of them beside the daemon.

use std::collections::BTreeMap;

use reqwest::Method;
use serde_json::{Value, json};
use sop::kernel::crypto::base64;
use tokio::io::AsyncWriteExt as _;

use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::postgres::{Database, database};
use crate::support::record;

async fn start() -> (Database, Daemon, Client) {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    (db, daemon, client)
}

async fn txn(client: &Client, body: &Value) -> (u16, Value) {
    client.json(Method::POST, "/v1/state/txn", body).await
}

async fn head(client: &Client) -> i64 {
    let answer = client.request(Method::GET, "/v1/state/kv?limit=1").await.send().await.unwrap();
    answer.headers()["sop-index"].to_str().unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_is_one_entry_and_all_or_nothing() {
    let (db, _daemon, client) = start().await;
    let (status, made) = txn(
        &client,
        &json!({
            "if": [{"key": "t/a", "target": "exists", "op": "eq", "operand": false}],
            "then": [
                {"put": {"key": "t/a", "json": {"n": 1}}}, {"put": {"key": "t/b", "value": "AP8=", "content_type": "x/y"}},
                {"get": {"prefix": "t/", "keys_only": true}}, {"delete": {"key": "t/none"}},
            ],
            "else": [{"get": {"key": "t/a"}}],
        }),
    )
    .await;
    assert_eq!((status, &made["succeeded"]), (200, &json!(true)), "{made}");
    let index = made["index"].as_i64().unwrap();
    assert_eq!(
        made["results"][0]["put"],
        json!({"key": "t/a", "index": index, "created_index": index, "version": 1, "lease": null})
    );
    let keys: Vec<&str> =
        made["results"][2]["get"]["items"].as_array().unwrap().iter().map(|i| i["key"].as_str().unwrap()).collect();
    assert_eq!(keys, ["t/a", "t/b"], "a get sees what those before it did");
    assert_eq!(made["results"][3]["delete"], json!({"key": "t/none", "deleted": 0}));
    let got = client.request(Method::GET, "/v1/state/kv/t/b").await.send().await.unwrap();
    assert_eq!(
        (got.headers()["content-type"].to_str().unwrap(), got.headers()["etag"].to_str().unwrap()),
        ("x/y", format!("\"{index}\"").as_str())
    );
    assert_eq!(&got.bytes().await.unwrap()[..], [0, 255]);
    // The same again compares to false, only reads, and takes no index.
    let before = client.last_entry().await;
    let (_, again) = txn(
        &client,
        &json!({
            "if": [{"key": "t/a", "target": "version", "op": "gt", "operand": 1}],
            "then": [{"delete": {"prefix": "t/"}}], "else": [{"get": {"key": "t/a"}}, {"get": {"key": "t/none"}}],
        }),
    )
    .await;
    assert_eq!(again["succeeded"], false);
    assert_eq!(again["results"][0]["get"]["items"][0]["value"], base64(br#"{"n":1}"#));
    assert_eq!(again["results"][1]["get"]["items"], json!([]));
    let (_, nothing) =
        txn(&client, &json!({"then": [{"delete": {"key": "t/none"}}, {"delete": {"prefix": "none/"}}]})).await;
    assert_eq!(nothing["succeeded"], true);
    assert_eq!(client.last_entry().await, before, "what changes nothing takes no index");
    // What it deletes goes at one index, and a deleted key that is made again begins anew.
    let (_, gone) = txn(&client, &json!({"then": [{"delete": {"prefix": "t/"}}]})).await;
    assert_eq!(gone["results"][0]["delete"]["deleted"], 2);
    let at = gone["index"].as_i64().unwrap();
    assert_eq!(client.last_entry().await, at);
    let (_, entry) = client.get(&format!("/v1/audit/entries/{at}")).await;
    assert_eq!(
        (entry["action"].as_str(), &entry["details"]["change"]["deleted_prefixes"]),
        (Some("state:txn"), &json!({"t/": 2}))
    );
    let (_, anew) = txn(&client, &json!({"then": [{"put": {"key": "t/a", "json": 2}}]})).await;
    assert_eq!(anew["results"][0]["put"]["version"], 1);
    let (_, past) = client.get(&format!("/v1/state/kv?prefix=t/&at={before}")).await;
    assert_eq!(past["items"].as_array().unwrap().len(), 2);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_transaction_refuses() {
    let (db, _daemon, client) = start().await;
    for (body, pointer) in [
        (json!({"then": [{"put": {"key": "a"}}]}), "/then/0/put"),
        (json!({"then": [{"put": {"key": "a", "json": 1}}, {"delete": {"prefix": ""}}]}), "/then/1"),
        (json!({"if": [{"key": "a", "target": "index", "op": "eq", "operand": 1.5}]}), "/if/0/operand"),
        (json!({"when": []}), "/when"),
        (json!({"then": vec![json!({"get": {"key": "a"}}); 129]}), "/then"),
        (json!({"then": [{"put": {"key": "a", "json": 1, "lease": "x"}}]}), "/then/0/put/lease"),
    ] {
        let (status, said) = txn(&client, &body).await;
        assert_eq!((status, said["errors"][0]["pointer"].as_str()), (400, Some(pointer)), "{said}");
    }
    // As much as may be is no fault.
    let many: Vec<Value> = (0..128).map(|i| json!({"put": {"key": format!("m/{i:03}"), "json": i}})).collect();
    let conditions = vec![json!({"key": "m/0", "target": "exists", "op": "ne", "operand": true}); 128];
    let (status, done) = txn(&client, &json!({"if": conditions, "then": many, "else": many})).await;
    assert_eq!((status, done["results"].as_array().unwrap().len()), (200, 128));
    // Each resource it names is decided on, in the branch that is not taken too.
    let wanted = json!({"client_name": "reader", "scope": "state:read"});
    let (_, reader) = client.json(Method::POST, "/oauth2/register", &wanted).await;
    let reader = client.with(reader["client_id"].as_str().unwrap(), reader["client_secret"].as_str().unwrap());
    let condition = json!([{"key": "m/000", "target": "exists", "op": "eq", "operand": true}]);
    let (status, _) = txn(&reader, &json!({"if": condition, "then": [{"get": {"prefix": "m/"}}]})).await;
    assert_eq!(status, 200);
    let (status, said) = txn(
        &reader,
        &json!({"if": condition, "then": [{"get": {"key": "m/000"}}], "else": [{"delete": {"key": "x"}}]}),
    )
    .await;
    assert_eq!((status, said["type"].as_str()), (403, Some("/problems/denied")));
    // More than four MiB of values at once is refused, before anything is written.
    for i in 0..5 {
        let path = format!("/v1/state/kv/big/{i}");
        client.request(Method::PUT, &path).await.body(vec![7; 1024 * 1024]).send().await.unwrap();
    }
    let (status, said) =
        txn(&client, &json!({"then": [{"put": {"key": "x", "json": 1}}, {"get": {"prefix": "big/"}}]})).await;
    assert_eq!((status, said["type"].as_str()), (422, Some("/problems/unprocessable")));
    assert_eq!(client.get("/v1/state/kv/x").await.0, 404);
    let (status, said) = txn(&client, &json!({"then": [{"get": {"prefix": "big/", "keys_only": true}}]})).await;
    assert_eq!((status, said["results"][0]["get"]["items"].as_array().unwrap().len()), (200, 5));
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idempotent_transaction_is_done_once_and_answered_alike() {
    let (db, daemon, client) = start().await;
    let send = |body: Value| {
        let client = &client;
        async move {
            let request =
                client.request(Method::POST, "/v1/state/txn").await.header("idempotency-key", "k1").json(&body);
            let answer = request.send().await.unwrap();
            (answer.status().as_u16(), answer.json::<Value>().await.unwrap())
        }
    };
    let body = json!({"if": [{"key": "i", "target": "exists", "op": "eq", "operand": false}],
                      "then": [{"put": {"key": "i", "json": 1}}], "else": [{"get": {"key": "i"}}]});
    let first = send(body.clone()).await;
    assert_eq!(first.1["succeeded"], true);
    assert_eq!(send(body).await, first);
    assert_eq!(send(json!({"then": []})).await.0, 200, "a read is no second use");
    assert_eq!(send(json!({"then": [{"delete": {"key": "i"}}]})).await.0, 422);
    // The same from the command line.
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_sop"));
    command.args(["state", "txn", "-", "--data-dir"]).arg(&daemon.launch.dir);
    let mut child = command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(br#"{"then": [{"delete": {"key": "i"}}]}"#).await.unwrap();
    drop(stdin);
    let said: Value = serde_json::from_slice(&child.wait_with_output().await.unwrap().stdout).unwrap();
    assert_eq!(said["results"][0]["delete"]["deleted"], 1);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_keys_go_with_one_prefix() {
    let (db, daemon, client) = start().await;
    client.put("p", "0").await.unwrap();
    client.put("p0", "stays").await.unwrap();
    // As many puts would take a while: the rows are written as the daemon would, and it has not looked at them yet.
    let index = head(&client).await;
    let mut conn = db.connect().await;
    for table in [
        "kv (key, index, created_index, version, content_type, value)",
        "history (key, index, created_index, version, previous, content_type, value)",
    ] {
        let previous = if table.starts_with('h') { "0, " } else { "" };
        let sql = format!(
            "INSERT INTO state.{table} SELECT convert_to('p/' || lpad(i::text, 6, '0'), 'UTF8'), {index}, {index}, 1, {previous}'text/plain', 'v' FROM generate_series(1, 100000) AS i"
        );
        sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&mut conn).await.unwrap();
    }
    let two = Launch::beside(&daemon, db.url()).env("SOP__LEDGER__LOCK_WAIT", "500ms").start().await;
    let other = client.also_of(&two);
    let all = json!({"then": [{"delete": {"prefix": "p/"}}]});
    let (done, beside) = tokio::join!(txn(&client, &all), other.put("beside", "v"));
    assert_eq!((done.0, &done.1["results"][0]["delete"]["deleted"]), (200, &json!(100_000)), "{}", done.1);
    beside.expect("who waits for the head is not kept from it, and does not end who works");
    assert_eq!(client.get("/v1/state/kv?prefix=p/").await.1["items"], json!([]));
    assert_eq!(client.get("/v1/state/kv?prefix=p&keys_only=true").await.1["items"].as_array().unwrap().len(), 2);
    record::check(&db).await;
}

/// Adds one to a number by comparing its value, until it has `times`.
async fn count(client: &Client, times: usize) {
    let (mut now, mut added) = (0, 0);
    while added < times {
        let (next, value) = (now + 1, |n: usize| base64(n.to_string().as_bytes()));
        let body = json!({
            "if": [{"key": "n", "target": "value", "op": "eq", "operand": value(now)}],
            "then": [{"put": {"key": "n", "value": value(next)}}, {"get": {"key": "n"}}],
            "else": [{"get": {"key": "n"}}, {"put": {"key": "lost", "value": ""}}],
        });
        let (status, said) = txn(client, &body).await;
        assert_eq!(status, 200, "{said}");
        let won = said["succeeded"] == true;
        let got = &said["results"][usize::from(won)]["get"]["items"][0];
        let is: usize = String::from_utf8(base64_value(&got["value"])).unwrap().parse().unwrap();
        if won {
            assert_eq!((is, &got["index"]), (next, &said["index"]), "a get sees what those before it did");
            added += 1;
        } else {
            assert_ne!(is, now, "it holds, and was said not to");
        }
        now = is;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_compare_one_value_at_once_each_count_once() {
    let (db, daemon, client) = start().await;
    let two = Launch::beside(&daemon, db.url()).start().await;
    let other = client.also_of(&two);
    client.put("n", "0").await.unwrap();
    let counts = (0..8).map(|i| count(if i % 4 == 0 { &other } else { &client }, 20));
    futures_util::future::join_all(counts).await;
    assert_eq!(client.get("/v1/state/kv/n").await.1, json!(160));
    let metrics = client.request(Method::GET, "/metrics").await.send().await.unwrap().text().await.unwrap();
    let again = metrics.lines().find_map(|l| l.strip_prefix("sop_state_txn_again_total "));
    assert!(again.is_some_and(|n| n.parse::<f64>().unwrap() > 0.0), "nothing was ever read ahead too early: {again:?}");
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_too_large_to_be_read_ahead_is_given_all_the_same() {
    let (db, _daemon, client) = start().await;
    let large = vec![7; 200_000];
    let put = json!({"put": {"key": "large", "value": base64(&large)}});
    txn(&client, &json!({"then": [put]})).await;
    let all: Vec<Value> = (0..30).map(|_| json!({"get": {"key": "large"}})).collect();
    let (status, said) = txn(
        &client,
        &json!({
            "if": [{"key": "large", "target": "value", "op": "eq", "operand": base64(&large)}],
            "then": [{"get": {"key": "large"}}, {"put": {"key": "small", "value": "AA=="}}], "else": [],
        }),
    )
    .await;
    assert_eq!((status, &said["succeeded"]), (200, &json!(true)));
    assert_eq!(said["results"][0]["get"]["items"][0]["value"], base64(&large));
    // So much at once is refused, wherever it was read.
    let heavy = |mut ops: Vec<Value>| {
        ops.push(json!({"put": {"key": "small", "value": "AQ=="}}));
        json!({"then": ops})
    };
    assert_eq!(txn(&client, &heavy(all)).await.0, 422);
    let small = vec![7; 60_000];
    let puts: Vec<Value> =
        (0..80).map(|n| json!({"put": {"key": format!("s/{n}"), "value": base64(&small)}})).collect();
    for some in puts.chunks(10) {
        assert_eq!(txn(&client, &json!({"then": some})).await.0, 200);
    }
    let gets: Vec<Value> = (0..80).map(|n| json!({"get": {"key": format!("s/{n}")}})).collect();
    assert_eq!(txn(&client, &heavy(gets.clone())).await.0, 422);
    let (status, some) = txn(&client, &heavy(gets[..60].to_vec())).await;
    assert_eq!((status, some["results"].as_array().unwrap().len()), (200, 61));
    record::check(&db).await;
}

/// What the daemon should make of keys and transactions.
#[derive(Default)]
struct Model {
    keys: BTreeMap<String, Key>,
    head: i64,
}

#[derive(Clone)]
struct Key {
    value: Vec<u8>,
    index: i64,
    created: i64,
    version: i64,
}

impl Model {
    fn holds(&self, c: &Value) -> bool {
        let key = self.keys.get(c["key"].as_str().unwrap());
        let order = match c["target"].as_str().unwrap() {
            "value" => match key {
                Some(key) => base64_value(&c["operand"]).cmp(&key.value).reverse(),
                None => return false,
            },
            "exists" => key.is_some().cmp(&c["operand"].as_bool().unwrap()),
            target => {
                let number = key.map_or(0, |k| match target {
                    "index" => k.index,
                    "created_index" => k.created,
                    _ => k.version,
                });
                number.cmp(&c["operand"].as_i64().unwrap())
            }
        };
        match c["op"].as_str().unwrap() {
            "eq" => order.is_eq(),
            "ne" => order.is_ne(),
            "lt" => order.is_lt(),
            _ => order.is_gt(),
        }
    }

    fn item(&self, name: &str) -> Value {
        let k = &self.keys[name];
        json!({"key": name, "value": base64(&k.value), "content_type": "application/octet-stream", "index": k.index,
               "created_index": k.created, "version": k.version})
    }

    /// What a transaction should answer.
    fn run(&mut self, body: &Value) -> Value {
        let succeeded = body["if"].as_array().unwrap().iter().all(|c| self.holds(c));
        let index = self.head + 1;
        let (mut results, mut changed) = (Vec::new(), false);
        for op in body[if succeeded { "then" } else { "else" }].as_array().unwrap() {
            if let Some(put) = op.get("put") {
                let name = put["key"].as_str().unwrap().to_owned();
                let (created, version) = self.keys.get(&name).map_or((index, 1), |k| (k.created, k.version + 1));
                let value = base64_value(&put["value"]);
                self.keys.insert(name.clone(), Key { value, index, created, version });
                results.push(json!({"put": {"key": name, "index": index, "created_index": created, "version": version, "lease": null}}));
                changed = true;
            } else if let Some(name) = op["delete"]["key"].as_str() {
                let gone = self.keys.remove(name);
                changed |= gone.is_some();
                results.push(match gone {
                    Some(k) => json!({"delete": {"key": name, "deleted": 1, "previous_index": k.index}}),
                    None => json!({"delete": {"key": name, "deleted": 0}}),
                });
            } else if let Some(prefix) = op["delete"]["prefix"].as_str() {
                let before = self.keys.len();
                self.keys.retain(|k, _| !k.starts_with(prefix));
                let deleted = before - self.keys.len();
                changed |= deleted > 0;
                results.push(json!({"delete": {"prefix": prefix, "deleted": deleted}}));
            } else {
                let (key, prefix) = (op["get"]["key"].as_str(), op["get"]["prefix"].as_str());
                let fits = |k: &&String| key == Some(k.as_str()) || prefix.is_some_and(|p| k.starts_with(p));
                let limit = op["get"]["limit"].as_u64().unwrap_or(1000) as usize;
                let all: Vec<&String> = self.keys.keys().filter(fits).collect();
                let items: Vec<Value> = all.iter().take(limit).map(|k| self.item(k)).collect();
                results.push(json!({"get": {"items": items, "more": all.len() > limit}}));
            }
        }
        if changed {
            self.head = index;
        }
        json!({"succeeded": succeeded, "index": self.head, "results": results})
    }
}

fn base64_value(text: &Value) -> Vec<u8> {
    sop::kernel::crypto::from_base64(text.as_str().unwrap()).unwrap()
}

/// Small numbers in no order anybody would think of, the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % sides as u64).unwrap()
    }

    fn of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.roll(all.len())]
    }
}

const NAMES: &[&str] = &["a", "a/1", "a/2", "a.b", "b", "b/c/d"];
const VALUES: &[&[u8]] = &[b"", b"\0", b"v", b"va", b"w", b"\xff"];

fn condition(dice: &mut Dice, model: &Model) -> Value {
    let target = *dice.of(&["index", "created_index", "version", "value", "exists"]);
    let op = *dice.of(if target == "exists" { &["eq", "ne"][..] } else { &["eq", "ne", "lt", "gt"] });
    let near: Vec<i64> = model.keys.values().flat_map(|k| [k.index, k.created, k.version]).chain([0, 1, 2]).collect();
    let operand = match target {
        "value" => base64(dice.of(VALUES)).into(),
        "exists" => (dice.roll(2) == 0).into(),
        _ => Value::from(*dice.of(&near)),
    };
    json!({"key": dice.of(NAMES), "target": target, "op": op, "operand": operand})
}

fn branch(dice: &mut Dice) -> Vec<Value> {
    let (mut ops, mut changed): (Vec<Value>, Vec<String>) = (Vec::new(), Vec::new());
    for _ in 0..dice.roll(5) {
        let name = (*dice.of(NAMES)).to_owned();
        let prefix = (*dice.of(&["", "a", "a/", "b/", "zz"])).to_owned();
        let clash = |n: &str, prefix: bool| {
            changed.iter().any(|c| {
                c.starts_with(n) && (prefix || c == n) || n.starts_with(c.trim_end_matches('*')) && c.ends_with('*')
            })
        };
        match dice.roll(5) {
            0 | 1 if !clash(&name, false) => {
                ops.push(json!({"put": {"key": name, "value": base64(dice.of(VALUES))}}));
                changed.push(name);
            }
            2 if !clash(&name, false) => {
                ops.push(json!({"delete": {"key": name}}));
                changed.push(name);
            }
            3 if !clash(&prefix, true) && dice.roll(2) == 0 => {
                ops.push(json!({"delete": {"prefix": prefix}}));
                changed.push(format!("{prefix}*"));
            }
            4 => ops.push(json!({"get": {"prefix": prefix, "limit": 1 + dice.roll(4)}})),
            _ => ops.push(json!({"get": {"key": name}})),
        }
    }
    ops
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_are_what_a_model_of_them_says() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let two = Launch::beside(&one, db.url()).start().await;
    let a = Client::of(&one);
    let b = a.also_of(&two);
    a.token().await;
    b.token().await;
    let (mut dice, mut model) = (Dice(0x5eed_1234_9876_abcd), Model::default());
    for round in 0..400 {
        let conditions: Vec<Value> = (0..dice.roll(3)).map(|_| condition(&mut dice, &model)).collect();
        let body = json!({"if": conditions, "then": branch(&mut dice), "else": branch(&mut dice)});
        let client = if dice.roll(2) == 0 { &a } else { &b };
        // Entries of the daemons' own (claims) may come in between.
        let (status, said) = txn(client, &body).await;
        assert_eq!(status, 200, "{said} to {body}");
        let mut trial = Model { keys: model.keys.clone(), head: said["index"].as_i64().unwrap() };
        let unchanged = trial.run(&body);
        if unchanged != said {
            trial = Model { keys: model.keys, head: said["index"].as_i64().unwrap() - 1 };
            assert_eq!(trial.run(&body), said, "round {round}: {body}");
        }
        assert!(said["index"].as_i64().unwrap() >= model.head);
        model = Model { keys: trial.keys, head: said["index"].as_i64().unwrap() };
    }
    let (_, all) = a.get("/v1/state/kv").await;
    let expected: Vec<Value> = model.keys.keys().map(|k| model.item(k)).collect();
    assert_eq!(all["items"].as_array().unwrap(), &expected);
    record::check(&db).await;
}
