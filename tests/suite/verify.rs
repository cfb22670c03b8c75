//! `sop verify` as an auditor uses it: again and again, with receipts and checkpoints that were kept.

use std::path::Path;

use reqwest::Method;

use crate::support::client::Client;
use crate::support::daemon::Launch;
use crate::support::postgres::database;
use crate::support::{reaper, soon, until};

async fn sop(args: &[&str]) -> (bool, String) {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_sop"));
    command.args(args).current_dir(reaper::base()).kill_on_drop(true);
    let done = soon("it ends", command.output()).await.unwrap();
    (done.status.success(), String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned())
}

async fn text(client: &Client, path: &str) -> String {
    client.request(Method::GET, path).await.send().await.unwrap().text().await.unwrap()
}

async fn puts(client: &Client, n: usize) {
    let all = (0..n).map(|i| async move { client.put(&format!("k/{i}"), "v").await.unwrap() });
    futures_util::future::join_all(all).await;
    let head = client.put("last", "v").await.unwrap();
    until("the checkpoint", || async {
        let note = text(client, "/log/checkpoint").await;
        note.lines().nth(1).is_some_and(|size| size.parse::<i64>().is_ok_and(|s| s > head))
    })
    .await;
}

fn path(p: &Path) -> String {
    p.display().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_run_reads_only_what_is_new_and_finds_a_past_that_was_changed() {
    let db = database().await;
    let daemon = Launch::on(db.url()).env("SOP__AUDIT__PUBLIC_ENTRIES", "true").start().await;
    let client = Client::of(&daemon);
    let key = text(&client, "/log/key").await.trim().to_owned();
    let data = path(&daemon.launch.dir);
    puts(&client, 700).await;
    let since = path(&reaper::folder("v").join("seen"));
    let (fine, said) = sop(&["verify", "log", &daemon.url, "--key", &key, "--since", &since]).await;
    assert!(fine && !said.contains("known from before"), "{said}");
    let first = std::fs::read_to_string(&since).unwrap();
    puts(&client, 300).await;
    let dir = reaper::folder("saved");
    let (fine, said) = sop(&["audit", "save", &path(&dir), "--data-dir", &data]).await;
    assert!(fine, "{said}");
    assert!(dir.join("tile/1").exists(), "the tiles above are saved too");
    let (fine, said) = sop(&["verify", &path(&dir), "--key", &key]).await;
    assert!(fine, "{said}");
    // What was verified before is not read again.
    for old in ["tile/entries/000", "tile/entries/001", "tile/0/000"] {
        std::fs::remove_file(dir.join(old)).unwrap();
    }
    assert!(!sop(&["verify", &path(&dir), "--key", &key]).await.0);
    let (fine, said) = sop(&["verify", "log", &path(&dir), "--key", &key, "--since", &since]).await;
    assert!(fine && said.contains("known from before"), "{said}");
    assert_ne!(std::fs::read_to_string(&since).unwrap(), first, "the next run begins here");
    let (fine, said) = sop(&["verify", "log", &daemon.url, "--key", &key, "--since", &since]).await;
    assert!(fine && said.contains("known from before"), "{said}");

    // Two checkpoints that were kept are of one log; and a tile above that was changed is named.
    let dir_now = reaper::folder("saved");
    assert!(sop(&["audit", "save", &path(&dir_now), "--data-dir", &data]).await.0);
    let old = dir_now.join("old");
    std::fs::write(&old, &first).unwrap();
    let args = ["verify", "consistency", &path(&old), &since, &path(&dir_now), "--key", &key];
    let (fine, said) = sop(&args).await;
    assert!(fine && said.contains("extends"), "{said}");
    let (fine, said) = sop(&["verify", "consistency", &since, &path(&old), &path(&dir_now), "--key", &key]).await;
    assert!(!fine && said.contains("shrunk"), "{said}");
    let level1 = std::fs::read_dir(dir_now.join("tile/1/000.p")).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&level1).unwrap();
    bytes[40] ^= 1;
    std::fs::write(&level1, &bytes).unwrap();
    let (fine, said) = sop(&["verify", &path(&dir_now), "--key", &key]).await;
    assert!(!fine && said.contains("tile 1/000.p/"), "{said}");
    let (fine, said) = sop(&["verify", "log", &path(&dir_now), "--key", &key, "--since", &path(&old)]).await;
    assert!(!fine && said.contains("its past was changed"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn receipts_verify_from_files_and_a_foreign_key_is_told_apart() {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    let key = text(&client, "/log/key").await.trim().to_owned();
    let index = client.put("k", "v").await.unwrap();
    let event = serde_json::json!({"specversion": "1.0", "id": "e-1", "source": "/s", "type": "t"});
    let request = client.request(Method::POST, "/v1/audit/events").await;
    let request = request.header("content-type", "application/cloudevents+json").body(event.to_string());
    let said: serde_json::Value = request.send().await.unwrap().json().await.unwrap();
    let dir = reaper::folder("v");
    let (plain, record, keys) = (dir.join("plain"), dir.join("record"), dir.join("keys"));
    std::fs::write(&plain, text(&client, &format!("/v1/audit/entries/{index}/receipt")).await).unwrap();
    let of_record = format!("/v1/audit/entries/{}/records/0/receipt", said["index"]);
    std::fs::write(&record, text(&client, &of_record).await).unwrap();
    let other = "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8";
    std::fs::write(&keys, format!("# those of the log\n{other}\n{key}\n")).unwrap();
    let (fine, said) = sop(&["verify", "receipt", &path(&plain), "--key", &path(&keys)]).await;
    assert!(fine && said.contains(&format!("entry {index} is in")), "{said}");
    let (fine, said) = sop(&["verify", "receipt", &path(&record), "--key", &key]).await;
    assert!(fine && said.contains("e-1"), "{said}");
    let (fine, said) = sop(&["verify", "receipt", &path(&plain), "--key", other]).await;
    assert!(!fine && said.contains("the key is of sum.golang.org"), "{said}");
    let (fine, said) = sop(&["verify", "receipt", &path(&plain), "--key", &key, "--require-witnesses", "1"]).await;
    assert!(!fine && said.contains("0 of the given witnesses"), "{said}");
    assert!(!sop(&["verify", "receipt", &path(&plain)]).await.0, "without a key nothing is known");
    let bytes = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, bytes.replacen("extra e", "extra f", 1)).unwrap();
    assert!(!sop(&["verify", "receipt", &path(&record), "--key", &key]).await.0);
    let (fine, said) = sop(&["verify", "one", "two", "three"]).await;
    assert!(!fine && said.contains("what is to be verified"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_logs_key_is_replaced_and_what_the_old_one_signed_holds() {
    let db = database().await;
    let mut one = Launch::on(db.url()).start().await;
    let two = Launch::beside(&one, db.url()).start().await;
    let (a, b) = (Client::of(&one), Client::of(&one).also_of(&two));
    let old = text(&a, "/log/key").await.trim().to_owned();
    let index = a.put("k", "v").await.unwrap();
    let dir = reaper::folder("v");
    let (before, after) = (dir.join("before"), dir.join("after"));
    std::fs::write(&before, text(&a, &format!("/v1/audit/entries/{index}/receipt")).await).unwrap();
    let (fine, said) = one.launch.run(&["audit", "rotate-key", "--overlap", "4"]).await;
    assert!(fine, "{said}");
    let (_, page) = a.get("/v1/audit/entries?action=audit:key-rotate").await;
    assert_eq!(page["items"][0]["details"]["change"]["old"], old.as_str());
    let new = text(&a, "/log/key").await.trim().to_owned();
    assert_ne!(new, old);
    // While both sign, whoever has either key goes on, on either daemon.
    let index = b.put("k", "w").await.unwrap();
    std::fs::write(&after, text(&b, &format!("/v1/audit/entries/{index}/receipt")).await).unwrap();
    for (file, key, fine) in [(&before, &old, true), (&before, &new, false), (&after, &old, true), (&after, &new, true)]
    {
        let (done, said) = sop(&["verify", "receipt", &path(file), "--key", key]).await;
        assert_eq!(done, fine, "{}: {said}", file.display());
    }
    until("the old key's time to end", || async {
        a.put("k", "x").await.unwrap();
        text(&a, "/log/checkpoint").await.matches('\u{2014}').count() == 1
    })
    .await;
    let (fine, _) = one.launch.run(&["verify", "--key", &old]).await;
    assert!(!fine, "it signs no more");
    let (fine, said) = one.launch.run(&["verify", "--key", &new]).await;
    assert!(fine, "{said}");
    assert!(sop(&["verify", "receipt", &path(&before), "--key", &old]).await.0, "what it signed holds");
    assert_eq!(a.get("/v1/audit/log-keys").await.1["items"].as_array().unwrap().len(), 2);
    let bad = a.json(Method::POST, "/v1/audit/log-keys/rotate", &serde_json::json!({"overlap": -1})).await;
    assert_eq!(bad.0, 400);
    assert!(one.terminate().await.success());
    let one = one.launch.clone().start().await;
    Client::of(&one).put("k", "a restart finds its checkpoint signed by a key it knows").await.unwrap();
}
