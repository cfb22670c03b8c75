//! Two installations that watch each other, and logs and witnesses that do not play by the rules.

use std::time::Duration;

use reqwest::Method;
use sop::audit::note::{Checkpoint, VerifierKey};
use sop::kernel::crypto::{self, Hash, SigningKey};
use sop::ledger::merkle;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::support::client::Client;
use crate::support::daemon::Launch;
use crate::support::postgres::database;
use crate::support::{reaper, until};

async fn text(client: &Client, path: &str) -> String {
    client.bare(Method::GET, path).send().await.unwrap().text().await.unwrap().trim().to_owned()
}

async fn metric(client: &Client, line: &str) -> bool {
    text(client, "/metrics").await.lines().any(|l| l.contains(line) && !l.ends_with(" 0"))
}

#[tokio::test(flavor = "multi_thread")]
async fn two_installations_sign_each_others_checkpoints_and_rest_when_nothing_happens() {
    let (db_a, db_b) = (database().await, database().await);
    let (mut a, mut b) = (Launch::on(db_a.url()).start().await, Launch::on(db_b.url()).start().await);
    let keys = async |d: &crate::support::daemon::Daemon| {
        let client = Client::of(d);
        (text(&client, "/log/key").await, text(&client, "/witness/key").await)
    };
    let ((log_a, seer_a), (log_b, seer_b)) = (keys(&a).await, keys(&b).await);
    for d in [&mut a, &mut b] {
        assert!(d.terminate().await.success());
    }
    let with = |l: Launch, url: &str, seer: &str, log: &str| {
        let l = l.env("SOP__AUDIT__WITNESSES", &format!("{url} {seer}"));
        l.env("SOP__AUDIT__WITNESS_LOGS", log)
    };
    // B first knows where A was, and not where it will be: what cannot be reached does not hold anybody up.
    let b = with(b.launch.clone(), &a.url, &seer_a, &log_a).start().await;
    let a = with(a.launch.clone(), &b.url, &seer_b, &log_b).start().await;
    let client = Client::of(&a);
    let index = client.put("k", "v").await.unwrap();
    let seer = VerifierKey::parse(&seer_b).unwrap();
    until("a checkpoint that B signed", || async {
        let note = client.bare(Method::GET, "/log/checkpoint").send().await.unwrap().text().await.unwrap();
        let size = Checkpoint::unverified(&note).map_or(0, |c| c.size);
        seer.cosigned(&note).is_some() && size > u64::try_from(index).unwrap()
    })
    .await;
    let dir = reaper::folder("v");
    let receipt =
        client.request(Method::GET, &format!("/v1/audit/entries/{index}/receipt")).await.send().await.unwrap();
    std::fs::write(dir.join("receipt"), receipt.text().await.unwrap()).unwrap();
    let receipt = dir.join("receipt").display().to_string();
    for (args, fine) in [
        (vec!["verify", "--require-witnesses", "1", "--witness", &seer_b], true),
        (vec!["verify", "receipt", &receipt, "--key", &log_a, "--require-witnesses", "1", "--witness", &seer_b], true),
        (vec!["verify", "--require-witnesses", "2", "--witness", &seer_b, "--witness", &seer_a], false),
        (vec!["verify", "--require-witnesses", "1", "--witness", &seer_a], false),
    ] {
        let (done, said) = a.launch.run(&args).await;
        assert_eq!(done, fine, "{args:?}: {said}");
    }
    assert!(metric(&client, "outcome=\"signed\"").await);
    // It comes to rest: two sizes some seconds apart are the same.
    let size = async || Checkpoint::unverified(&format!("{}\n", text(&client, "/log/checkpoint").await)).unwrap().size;
    until("both logs rest", || async {
        let before = size().await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        size().await == before
    })
    .await;
    drop(b);
}

/// A log of our own, that signs whatever it is told to.
struct Log {
    key: SigningKey,
    name: String,
    leaves: Vec<Hash>,
}

impl Log {
    fn new(name: &str, leaves: u8) -> Self {
        let (key, _) = SigningKey::generate().unwrap();
        Self { key, name: name.into(), leaves: (0..leaves).map(|i| [i; 32]).collect() }
    }

    fn verifier(&self) -> VerifierKey {
        VerifierKey::log(&self.name, self.key.public())
    }

    fn request(&self, old: u64, size: u64) -> String {
        let leaves = &self.leaves[..usize::try_from(size).unwrap()];
        let root = merkle::root(leaves);
        let mut body = format!("old {old}\n");
        if old > 0 && old < size {
            for (start, end) in merkle::consistency(old, size) {
                let part = &leaves[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()];
                body.push_str(&format!("{}\n", crypto::base64(merkle::root(part))));
            }
        }
        let note = Checkpoint { origin: self.name.clone(), size, root }.sign(&self.key);
        format!("{body}\n{note}")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_extend_is_refused_and_a_fork_opens_an_incident() {
    let db = database().await;
    let mut log = Log::new("log.example/one", 40);
    let daemon = Launch::on(db.url()).env("SOP__AUDIT__WITNESS_LOGS", &log.verifier().to_string()).start().await;
    let client = Client::of(&daemon);
    let seer = VerifierKey::parse(&text(&client, "/witness/key").await).unwrap();
    let add = async |body: String| {
        let answer = client.bare(Method::POST, "/witness/add-checkpoint").body(body).send().await.unwrap();
        let kind = answer.headers()["content-type"].to_str().unwrap().to_owned();
        (answer.status().as_u16(), kind, answer.text().await.unwrap())
    };
    let incidents =
        async || client.get("/v1/health/incidents").await.1.to_string().matches("audit/fork/log.example/one").count();
    let first = log.request(0, 10);
    let (status, _, line) = add(first.clone()).await;
    assert_eq!(status, 200, "{line}");
    let note = first.split_once("\n\n").unwrap().1;
    assert!(seer.cosigned(&format!("{note}{line}")).is_some());
    let (status, kind, size) = add(log.request(0, 12)).await;
    assert_eq!((status, kind.as_str(), size.as_str()), (409, "text/x.tlog.size", "10\n"));
    assert_eq!(add(log.request(10, 10)).await.0, 200, "the same again is signed again");
    assert_eq!(add(log.request(10, 33)).await.0, 200);
    assert_eq!(add(log.request(33, 20)).await.0, 400, "the old size is above it");
    let other = Log::new("log.example/one", 40);
    assert_eq!(add(other.request(33, 34)).await.0, 403, "signed by another key");
    assert_eq!(add(Log::new("log.example/two", 4).request(0, 3)).await.0, 404);
    for garbage in ["", "old 33\n", "old 33\n\nx", "old x\n\n"] {
        assert_eq!(add(garbage.to_owned()).await.0, 400, "{garbage:?}");
    }
    assert_eq!(add("x".repeat(70_000)).await.0, 413);
    let mut forged = log.request(33, 40).into_bytes();
    forged[8] ^= 1;
    assert!([400, 422].contains(&add(String::from_utf8(forged).unwrap()).await.0), "a proof that does not hold");
    log.leaves[3] = [99; 32];
    let (status, _, size) = add(log.request(33, 33)).await;
    assert_eq!((status, size.as_str()), (409, "33\n"), "the same size with another root");
    assert_eq!(add(log.request(33, 40)).await.0, 422, "another past");
    until("the incident", || async { incidents().await > 0 }).await;
    let (_, page) = client.get("/v1/audit/entries?action=audit:witness").await;
    let outcomes: Vec<&str> =
        page["items"].as_array().unwrap().iter().map(|e| e["outcome"].as_str().unwrap()).collect();
    assert!(outcomes.contains(&"failed") && outcomes.last() == Some(&"ok"), "{outcomes:?}");
    log.leaves[3] = [3; 32];
    // Many at once: the witness moves on one step at a time, and never back.
    let all = (34..=40).map(|size| {
        let body = log.request(33, size);
        let request = client.bare(Method::POST, "/witness/add-checkpoint").body(body);
        async move { request.send().await.unwrap().status().as_u16() }
    });
    let all = futures_util::future::join_all(all).await;
    assert_eq!(all.iter().filter(|s| **s == 200).count(), 1, "{all:?}");
}

/// A witness that answers every request with this; `None`: with nothing.
async fn answering(answer: Option<String>) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((mut socket, _)) = listener.accept().await {
            let Some(answer) = &answer else {
                held.push(socket);
                continue;
            };
            let mut bytes = [0; 65_536];
            let _ = socket.read(&mut bytes).await;
            let _ = socket.write_all(answer.as_bytes()).await;
        }
    });
    url
}

#[tokio::test(flavor = "multi_thread")]
async fn a_witness_that_answers_garbage_or_never_holds_nobody_up_and_one_that_is_ahead_stops_the_writing() {
    let db = database().await;
    let seer = Log::new("w.example/w", 0);
    let key = VerifierKey::witness(&seer.name, seer.key.public()).to_string();
    let garbage = answering(Some("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n\u{2014} x AAA".into())).await;
    let never = answering(None).await;
    let witnesses = format!("{garbage} {key}, {never} {key}");
    let mut daemon = Launch::on(db.url()).env("SOP__AUDIT__WITNESSES", &witnesses).start().await;
    let client = Client::of(&daemon);
    client.put("k", "v").await.unwrap();
    until("it is counted", || metric(&client, "outcome=\"failed\"")).await;
    client.put("k", "w").await.unwrap();
    let note = client.bare(Method::GET, "/log/checkpoint").send().await.unwrap().text().await.unwrap();
    assert_eq!(note.matches('\u{2014}').count(), 1, "what does not verify is not served");
    assert!(daemon.terminate().await.success());
    let ahead = "HTTP/1.1 409 Conflict\r\nContent-Type: text/x.tlog.size\r\nContent-Length: 7\r\n\r\n999999\n";
    let ahead = answering(Some(ahead.into())).await;
    let mut daemon = daemon.launch.clone().env("SOP__AUDIT__WITNESSES", &format!("{ahead} {key}")).start().await;
    let ready = Client::of(&daemon).bare(Method::GET, "/readyz?verbose").send().await.unwrap();
    assert_eq!(ready.status(), 503);
    let said = ready.text().await.unwrap();
    assert!(said.contains("record-behind") && said.contains("999999"), "{said}");
    assert!(daemon.terminate().await.success());
    let refused = daemon.launch.clone().env("SOP__AUDIT__WITNESSES", "nonsense").refused().await;
    assert!(refused.contains("audit.witnesses"), "{refused}");
}
