//! The record over HTTP: entries, receipts, tiles, checkpoints; saving and verifying it elsewhere.

use std::path::Path;

use reqwest::Method;
use serde_json::Value;
use sop::audit::note::{Checkpoint, VerifierKey};
use sop::audit::proof::Proof;
use sop::kernel::crypto::{self, Domain};
use sop::ledger::entry::{canonical, commitment};

use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::postgres::{Database, database};
use crate::support::{reaper, soon, until};

async fn start() -> (Database, Daemon, Client) {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    (db, daemon, client)
}

async fn text(client: &Client, path: &str) -> String {
    client.request(Method::GET, path).await.send().await.unwrap().error_for_status().unwrap().text().await.unwrap()
}

async fn log_key(client: &Client) -> VerifierKey {
    let text = client.bare(Method::GET, "/log/key").send().await.unwrap().text().await.unwrap();
    VerifierKey::parse(&text).unwrap()
}

async fn published(client: &Client, key: &VerifierKey, size: u64) -> Checkpoint {
    let get = || async {
        let note = client.bare(Method::GET, "/log/checkpoint").send().await.ok()?.text().await.ok()?;
        Checkpoint::open(&note, key).ok()
    };
    until("the checkpoint", || async { get().await.is_some_and(|c| c.size >= size) }).await;
    get().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_entry_has_a_receipt_that_verifies_offline() {
    let (_db, _daemon, client) = start().await;
    let mut last = 0;
    for i in 0..20 {
        last = client.put(&format!("k/{i}"), "v").await.unwrap();
    }
    let key = log_key(&client).await;
    for index in 0..=last {
        let proof = Proof::parse(&text(&client, &format!("/v1/audit/entries/{index}/receipt")).await).unwrap();
        let (leaf, checkpoint) = proof.verify(&key).unwrap();
        assert!(checkpoint.size > u64::try_from(index).unwrap());
        // The details that are shown are those the leaf commits to.
        let (_, entry) = client.get(&format!("/v1/audit/entries/{index}")).await;
        assert_eq!(entry["leaf"], crypto::base64(leaf));
        let salt = crypto::from_base64(entry["salt"].as_str().unwrap()).unwrap();
        assert_eq!(entry["body"], crypto::base64(commitment(&salt, &canonical(&entry["details"]))));
    }
    let (status, body) = client.get(&format!("/v1/audit/entries/{}/receipt", last + 1000)).await;
    assert_eq!((status, body["type"].as_str()), (404, Some("/problems/not-found")));
    assert_eq!(client.get("/v1/audit/entries/x").await.0, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn any_size_has_receipts_and_any_two_are_shown_to_be_one_log() {
    let (_db, _daemon, client) = start().await;
    let writes = (0..300).map(|i| {
        let client = &client;
        async move { client.put(&format!("t/{i}"), "v").await.unwrap() }
    });
    futures_util::future::join_all(writes).await;
    let key = log_key(&client).await;
    let newest = published(&client, &key, 300).await;
    for (index, size) in [(0, 1), (0, 2), (5, 6), (5, 256), (255, 256), (7, 257), (260, 299)] {
        let path = format!("/v1/audit/entries/{index}/receipt?size={size}");
        let proof = Proof::parse(&text(&client, &path).await).unwrap();
        let (_, checkpoint) = proof.verify(&key).unwrap();
        assert_eq!((proof.index, checkpoint.size), (index, size));
    }
    let status = async |path: &str| client.get(path).await.0;
    assert_eq!(status("/v1/audit/entries/5/receipt?size=5").await, 400, "it does not hold the entry");
    assert_eq!(status("/v1/audit/entries/5/receipt?size=99999999").await, 404);
    assert_eq!(status("/v1/audit/entries/5/receipt?size=x").await, 400);
    let hash = |v: &Value| -> [u8; 32] { crypto::from_base64(v.as_str().unwrap()).unwrap().try_into().unwrap() };
    for (from, to) in [(0, 10), (1, 300), (100, 300), (255, 256), (256, 300), (300, 300)] {
        let (status, said) = client.get(&format!("/v1/audit/consistency?from={from}&to={to}")).await;
        assert_eq!(status, 200, "{said}");
        let proof: Vec<_> = said["proof"].as_array().unwrap().iter().map(hash).collect();
        let (old, new) = (hash(&said["from_root"]), hash(&said["to_root"]));
        assert!(sop::ledger::merkle::verify_consistency(from, to, &old, &new, &proof), "{from} to {to}");
    }
    let (_, said) = client.get("/v1/audit/consistency?from=1").await;
    assert!(said["to"].as_u64().unwrap() >= newest.size);
    assert_eq!(status("/v1/audit/consistency?from=9&to=8").await, 400);
    assert_eq!(status("/v1/audit/consistency?from=9&to=99999999").await, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn tiles_are_what_the_leaves_give() {
    let (_db, _daemon, client) = start().await;
    let writes = (0..300).map(|i| {
        let client = &client;
        async move { client.put(&format!("t/{}", i % 7), "v").await.unwrap() }
    });
    futures_util::future::join_all(writes).await;
    let key = log_key(&client).await;
    let checkpoint = published(&client, &key, 300).await;
    let get = |path: String| {
        let client = &client;
        async move { client.request(Method::GET, &path).await.send().await.unwrap() }
    };
    let tile = get("/log/tile/0/000".into()).await;
    assert_eq!(tile.headers()["content-type"], "application/octet-stream");
    assert!(tile.headers()["cache-control"].to_str().unwrap().contains("immutable"));
    let tile = tile.bytes().await.unwrap();
    assert_eq!(tile.len(), 8192);
    let bundle = get("/log/tile/entries/000".into()).await.bytes().await.unwrap();
    let (mut rest, mut at) = (&bundle[..], 0);
    while let Some((length, tail)) = rest.split_at_checked(2) {
        let (leaf, tail) = tail.split_at(usize::from(u16::from_be_bytes([length[0], length[1]])));
        assert_eq!(crypto::hash(Domain::Leaf, &[leaf])[..], tile[at * 32..at * 32 + 32]);
        rest = tail;
        at += 1;
    }
    assert_eq!(at, 256);
    let request = client.request(Method::GET, "/log/tile/entries/000").await.header("accept-encoding", "gzip");
    let coded = request.send().await.unwrap();
    assert_eq!(
        (&coded.headers()["content-encoding"], &coded.headers()["vary"]),
        (&"gzip".parse().unwrap(), &"accept-encoding".parse().unwrap())
    );
    let (coded, mut plain) = (coded.bytes().await.unwrap(), Vec::new());
    std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&coded[..]), &mut plain).unwrap();
    assert!(plain == bundle && coded.len() < bundle.len() / 2, "leaves get shorter");
    let level1 = get("/log/tile/1/000.p/1".into()).await.bytes().await.unwrap();
    let hashes: Vec<[u8; 32]> = tile.as_chunks::<32>().0.to_vec();
    assert_eq!(level1[..], sop::ledger::merkle::root(&hashes)[..]);
    let width = checkpoint.size % 256;
    assert_eq!(get(format!("/log/tile/0/001.p/{width}")).await.bytes().await.unwrap().len() as u64, width * 32);
    for none in [
        "/log/tile/0/002",
        "/log/tile/1/000",
        "/log/tile/2/000.p/1",
        "/log/tile/0/1",
        "/log/tile/x/000",
        "/log/tile/0/000.p/256",
    ] {
        assert_eq!(get(none.into()).await.status(), 404, "{none}");
    }
    assert_eq!(client.bare(Method::GET, "/log/tile/0/000").send().await.unwrap().status(), 200, "hashes are public");
    assert_eq!(
        client.bare(Method::GET, "/log/tile/entries/000").send().await.unwrap().status(),
        401,
        "entries are not"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_are_found_by_what_is_known_of_them() {
    let (_db, _daemon, client) = start().await;
    for i in 0..12 {
        client.put(&format!("arp/{i}"), "v").await.unwrap();
    }
    client.put("scp/1", "v").await.unwrap();
    let list = |query: String| {
        let client = &client;
        async move { client.get(&format!("/v1/audit/entries?{query}")).await }
    };
    let (_, page) = list("action=state:put&resource=key/arp/&limit=5".into()).await;
    let indexes = |page: &Value| {
        page["items"].as_array().unwrap().iter().map(|e| e["index"].as_i64().unwrap()).collect::<Vec<_>>()
    };
    let mut seen = indexes(&page);
    assert!(seen.windows(2).all(|w| w[0] > w[1]), "newest first");
    let mut next = page["next"].as_str().map(str::to_owned);
    while let Some(after) = next {
        let (_, page) = list(format!("action=state:put&resource=key/arp/&limit=5&after={after}")).await;
        seen.extend(indexes(&page));
        next = page["next"].as_str().map(str::to_owned);
    }
    assert_eq!(seen.len(), 12, "paging ends although reading is recorded");
    assert_eq!(indexes(&list("room=state&order=asc".into()).await.1).len(), 13);
    assert!(indexes(&list("room=audit".into()).await.1).len() >= 4, "reading the record is in the record");
    assert_eq!(indexes(&list("until=2000-01-01T00:00:00Z".into()).await.1), [0i64; 0]);
    assert_eq!(indexes(&list("since=2100-01-01T00:00:00Z".into()).await.1), [0i64; 0]);
    // Each time that stands in the record divides it where it stands, whatever else is asked.
    let (_, all) = list("room=state&order=asc".into()).await;
    let puts: Vec<(i64, String)> = all["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| (e["index"].as_i64().unwrap(), e["time"].as_str().unwrap().to_owned()))
        .collect();
    for (_, time) in &puts {
        let expected = |keep: fn(&str, &str) -> bool| -> Vec<i64> {
            puts.iter().filter(|(_, t)| keep(t, time)).map(|(i, _)| *i).collect()
        };
        let since = indexes(&list(format!("room=state&order=asc&since={time}")).await.1);
        let until = indexes(&list(format!("room=state&order=asc&until={time}")).await.1);
        assert_eq!((since, until), (expected(|t, at| t >= at), expected(|t, at| t < at)), "{time}");
    }
    for bad in ["order=up", "since=yesterday", "limit=0", "after=x", "nope=1"] {
        assert_eq!(list(bad.into()).await.0, 400, "{bad}");
    }
}

async fn sop(args: &[&str]) -> (bool, String) {
    let done = tokio::process::Command::new(env!("CARGO_BIN_EXE_sop")).args(args).output().await.unwrap();
    (
        done.status.success(),
        format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr)),
    )
}

fn flip(file: &Path, at: usize) {
    let mut bytes = std::fs::read(file).unwrap();
    bytes[at] ^= 1;
    std::fs::write(file, bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saved_log_verifies_offline_and_each_change_of_it_is_named() {
    let (_db, daemon, client) = start().await;
    for i in 0..10 {
        client.put(&format!("k/{i}"), "v").await.unwrap();
    }
    let key = log_key(&client).await;
    published(&client, &key, 12).await;
    let data = daemon.launch.dir.display().to_string();
    let save = |details: bool| {
        let data = data.clone();
        async move {
            let dir = reaper::folder("save");
            let text = dir.display().to_string();
            let mut args = vec!["audit", "save", &text, "--data-dir", &data];
            if details {
                args.push("--details");
            }
            let (fine, said) = sop(&args).await;
            assert!(fine, "{said}");
            dir
        }
    };
    let key = key.to_string();
    let verify = |dir: std::path::PathBuf| {
        let key = key.clone();
        async move { sop(&["verify", &dir.display().to_string(), "--key", &key]).await }
    };
    let dir = save(true).await;
    let (fine, said) = verify(dir.clone()).await;
    assert!(fine && said.contains("details checked"), "{said}");
    let since = dir.join("checkpoint").display().to_string();
    let (fine, said) = sop(&["verify", "--data-dir", &data, "--since", &since]).await;
    assert!(fine, "{said}");
    let (fine, said) = sop(&["verify", &dir.display().to_string(), "--key", &key, "--since", &since]).await;
    assert!(fine, "nothing is new: {said}");
    let partial = |kind: &str| std::fs::read_dir(dir.join(kind)).unwrap().next().unwrap().unwrap().path();
    for (file, at, named) in [
        (partial("tile/entries/000.p"), 20, "entry 0"),
        (partial("tile/0/000.p"), 40, "tile 0/000"),
        (dir.join("checkpoint"), 12, "signature"),
        (dir.join("details/000.ndjson"), 60, "details"),
    ] {
        let before = std::fs::read(&file).unwrap();
        flip(&file, at);
        let (fine, said) = verify(dir.clone()).await;
        assert!(!fine && said.contains(named), "{}: {said}", file.display());
        std::fs::write(&file, before).unwrap();
    }
    // A log that is smaller than one that was seen before has shrunk.
    client.put("one/more", "v").await.unwrap();
    let larger = save(false).await;
    let seen = larger.join("checkpoint").display().to_string();
    let (fine, said) = sop(&["verify", &dir.display().to_string(), "--key", &key, "--since", &seen]).await;
    assert!(!fine && said.contains("shrunk"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_need_a_token_however_the_path_is_written() {
    let (_db, _daemon, client) = start().await;
    let writes = (0..260).map(|i| {
        let client = &client;
        async move { client.put(&format!("k/{}", i % 9), "v").await.unwrap() }
    });
    futures_util::future::join_all(writes).await;
    published(&client, &log_key(&client).await, 257).await;
    for path in ["entries/000", "%65ntries/000", "entrie%73/000", "entries%2F000"] {
        let answer = client.bare(Method::GET, &format!("/log/tile/{path}")).send().await.unwrap();
        assert_eq!(answer.status(), 401, "{path}");
    }
    let allowed = client.request(Method::GET, "/log/tile/entries/000").await.send().await.unwrap();
    assert_eq!(allowed.status(), 200);
    assert!(allowed.headers()["cache-control"].to_str().unwrap().starts_with("private"), "no shared cache may keep it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_with_a_segment_verifies_with_its_details() {
    let (_db, daemon, client) = start().await;
    let question = serde_json::json!({"subject": {"type": "user", "id": "a"}, "action": {"name": "read"},
        "resource": {"type": "doc", "id": "1"}});
    let (status, answer) = client.json(Method::POST, "/access/v1/evaluation", &question).await;
    assert_eq!(status, 200);
    let index = answer["context"]["index"].as_u64().unwrap();
    let (_, entry) = client.get(&format!("/v1/audit/entries/{index}")).await;
    assert_eq!(crypto::from_base64(entry["segment"].as_str().unwrap()).unwrap().len(), 32);
    let key = log_key(&client).await;
    published(&client, &key, index + 1).await;
    let dir = reaper::folder("save").display().to_string();
    let data = daemon.launch.dir.display().to_string();
    let (fine, said) = sop(&["audit", "save", &dir, "--data-dir", &data, "--details"]).await;
    assert!(fine, "{said}");
    let (fine, said) = sop(&["verify", &dir, "--key", &key.to_string()]).await;
    assert!(fine, "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_lost_its_log_is_refused() {
    let (_db, mut daemon, client) = start().await;
    let last = client.put("k", "v").await.unwrap();
    let signed = u64::try_from(last).unwrap() + 1;
    published(&client, &log_key(&client).await, signed).await;
    assert!(daemon.terminate().await.success());
    let file = daemon.launch.dir.join("checkpoint");
    let kept = std::fs::read(&file).unwrap();
    let empty = database().await;
    let started = tokio::process::Command::new(env!("CARGO_BIN_EXE_sop"))
        .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
        .arg(&daemon.launch.dir)
        .env("SOP__DATABASE__URL", empty.url())
        .kill_on_drop(true)
        .output();
    let ended = soon("it does not run on it", started).await.unwrap();
    assert!(!ended.status.success());
    assert!(String::from_utf8_lossy(&ended.stderr).contains("record-behind"), "{ended:?}");
    assert_eq!(std::fs::read(&file).unwrap(), kept, "what was signed before is still known");
}
