//! kill -9 of everything that can be killed, under writers: nothing acknowledged is lost, nothing is done twice, the log verifies.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::Method;
use rustix::process::{Pid, Signal, kill_process};
use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection, PgConnection};
use tokio::sync::{Mutex, watch};
use tokio::task::JoinSet;

use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::postgres::database_alone;
use crate::support::proxy::{Fault, Proxy};
use crate::support::record::{self, Acknowledged};
use crate::support::soon;

const WRITERS: usize = 32;

/// Writers that go on through every failure, each on its own key; what was acknowledged.
struct Writers {
    stop: Arc<AtomicBool>,
    done: JoinSet<(String, Vec<i64>)>,
    acknowledged: watch::Receiver<usize>,
}

impl Writers {
    /// `url` says where the daemon is now.
    fn start(first: &Client, url: watch::Receiver<String>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (count, acknowledged) = watch::channel(0);
        let count = Arc::new(Mutex::new(count));
        let mut done = JoinSet::new();
        for w in 0..WRITERS {
            let (stop, url, count) = (stop.clone(), url.clone(), count.clone());
            let client = first.clone_at(&url.borrow());
            done.spawn(async move {
                let (key, mut indexes) = (format!("crash/{w}"), Vec::new());
                for n in 0.. {
                    if stop.load(Ordering::Acquire) {
                        break;
                    }
                    let client = client.clone_at(&url.borrow());
                    match client.put(&key, &n.to_string()).await {
                        Ok(index) => {
                            indexes.push(index);
                            count.lock().await.send_modify(|c| *c += 1);
                        }
                        Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                    }
                }
                (key, indexes)
            });
        }
        Self { stop, done, acknowledged }
    }

    /// Waits until so many more were acknowledged.
    async fn more(&mut self, n: usize) {
        let now = *self.acknowledged.borrow();
        let more = self.acknowledged.wait_for(|c| *c >= now + n);
        soon("writers go on", more).await.expect("writers live");
    }

    async fn finish(mut self) -> Acknowledged {
        self.stop.store(true, Ordering::Release);
        let mut all = Acknowledged::new();
        while let Some(done) = self.done.join_next().await {
            let (key, indexes) = done.expect("a writer");
            all.insert(key, indexes);
        }
        all
    }
}

async fn checkpoint_size(client: &Client) -> Option<u64> {
    let text =
        client.bare(Method::GET, "/log/checkpoint").send().await.ok()?.error_for_status().ok()?.text().await.ok()?;
    text.lines().nth(1)?.parse().ok()
}

/// A checkpoint never shrinks, through whatever happened.
async fn grows(client: &Client, least: &mut u64) {
    if let Some(size) = checkpoint_size(client).await {
        assert!(size >= *least, "the log shrank from {least} to {size}");
        *least = size;
    }
}

fn kill(pid: i32) {
    let _ = kill_process(Pid::from_raw(pid).expect("a pid"), Signal::KILL);
}

pub async fn verify(daemon: &Daemon) {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_sop"));
    command.args(["verify", "--json", "--data-dir"]).arg(&daemon.launch.dir);
    let done = command.output().await.expect("sop verify runs");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_daemons_and_backends_lose_nothing() {
    let db = database_alone().await;
    let mut daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    client.put("crash/warm", "0").await.unwrap();
    let (tell, url) = watch::channel(daemon.url.clone());
    let mut writers = Writers::start(&client, url);
    let mut least = 0;
    for round in 0..16 {
        writers.more(40).await;
        grows(&client.clone_at(&daemon.url), &mut least).await;
        match round % 4 {
            // The daemon itself.
            0 | 2 => {
                daemon = daemon.restart().await;
                tell.send_replace(daemon.url.clone());
            }
            // Its sessions, by the administrator.
            1 => {
                sqlx::query(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'sop/%'",
                )
                .execute(&mut db.cluster.admin().await)
                .await
                .unwrap();
            }
            // One backend, hard: PostgreSQL restarts them all and recovers.
            _ => {
                let backends = db.backends().await;
                kill(backends[round % backends.len()]);
            }
        }
    }
    writers.more(40).await;
    let acknowledged = writers.finish().await;
    let mut conn = db.connect().await;
    record::holds(&mut conn, &acknowledged).await;
    record::check_on(&mut conn).await;
    grows(&client.clone_at(&daemon.url), &mut least).await;
    verify(&daemon).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_private_postgres_is_revived_and_a_killed_daemon_adopts_it() {
    let mut daemon = Launch::alone().start().await;
    let client = Client::of(&daemon);
    client.put("crash/warm", "0").await.unwrap();
    let (tell, url) = watch::channel(daemon.url.clone());
    let mut writers = Writers::start(&client, url);
    let mut least = 0;
    for round in 0..6 {
        writers.more(40).await;
        grows(&client.clone_at(&daemon.url), &mut least).await;
        let pid = std::fs::read_to_string(daemon.launch.dir.join("pg/postmaster.pid")).unwrap();
        if round % 3 != 1 {
            kill(pid.lines().next().unwrap().parse().unwrap());
        }
        if round % 3 != 0 {
            daemon = daemon.restart().await;
            tell.send_replace(daemon.url.clone());
        }
    }
    writers.more(40).await;
    let acknowledged = writers.finish().await;
    grows(&client.clone_at(&daemon.url), &mut least).await;
    verify(&daemon).await;
    let options =
        PgConnectOptions::new_without_pgpass().socket(daemon.launch.dir.join("run")).username("sop").database("sop");
    let mut conn = PgConnection::connect_with(&options).await.unwrap();
    record::holds(&mut conn, &acknowledged).await;
    record::check_on(&mut conn).await;
    drop(conn);
    let status = daemon.terminate().await;
    assert!(status.success(), "{status}");
    assert!(!daemon.launch.dir.join("pg/postmaster.pid").exists(), "PostgreSQL was stopped last");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_daemon_and_a_wrong_key_are_refused_with_a_reason() {
    let first = Launch::alone().start().await;
    let run = |key: Option<&std::path::Path>, dir: &std::path::Path| {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_sop"));
        command.args(["serve", "--listen", "127.0.0.1:0", "--data-dir"]).arg(dir).kill_on_drop(true);
        if let Some(key) = key {
            command.env("SOP__SECRETS__MASTER_KEY_FILE", key);
        }
        async move {
            let done = soon("it ends", command.output()).await.expect("it ran");
            (done.status.code(), String::from_utf8_lossy(&done.stderr).into_owned())
        }
    };
    let dir = first.launch.dir.clone();
    let (code, said) = run(None, &dir).await;
    assert_eq!(code, Some(1));
    assert!(said.contains("in use by the daemon with process id"), "{said}");
    let mut first = first;
    assert!(first.terminate().await.success());
    let wrong = dir.join("wrong.key");
    std::fs::write(&wrong, [9u8; 32]).unwrap();
    let (code, said) = run(Some(&wrong), &dir).await;
    assert_eq!(code, Some(1));
    assert!(said.contains("the master key is not the one this database was made with"), "{said}");
    std::fs::remove_file(dir.join("master.key")).unwrap();
    let (code, said) = run(None, &dir).await;
    assert_eq!(code, Some(1));
    assert!(said.contains("master.key is missing"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_database_is_found_out_at_start_and_by_verify() {
    let mut daemon = Launch::alone().start().await;
    let client = Client::of(&daemon);
    for i in 0..5 {
        client.put("k", &i.to_string()).await.unwrap();
    }
    let index = client.put("k", "last").await.unwrap();
    let covered = || async { checkpoint_size(&client).await.is_some_and(|s| s > u64::try_from(index).unwrap()) };
    crate::support::until("the checkpoint", covered).await;
    let options =
        PgConnectOptions::new_without_pgpass().socket(daemon.launch.dir.join("run")).username("sop").database("sop");
    let mut conn = PgConnection::connect_with(&options).await.unwrap();
    sqlx::query("UPDATE ledger.entries SET leaf = set_byte(leaf, 12, get_byte(leaf, 12) # 1) WHERE index = 4")
        .execute(&mut conn)
        .await
        .unwrap();
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_sop"));
    command.args(["verify", "--data-dir"]).arg(&daemon.launch.dir);
    let done = command.output().await.unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!done.status.success() && said.contains("entry 4"), "{said}");
    // The same with the hash changed along, as someone would who knows how: the head's root does not fit any more.
    let hash = "UPDATE ledger.entries SET hash = sha256(decode('00', 'hex') || leaf) WHERE index = 4";
    sqlx::query(hash).execute(&mut conn).await.unwrap();
    drop(conn);
    assert!(daemon.terminate().await.success());
    let daemon = daemon.launch.clone().start().await;
    let ready = Client::of(&daemon).bare(reqwest::Method::GET, "/readyz?verbose").send().await.unwrap();
    assert_eq!(ready.status(), 503, "it may be read, and writes nothing");
    let said = ready.text().await.unwrap();
    assert!(said.contains("record-damaged") && said.contains("the database was changed from outside"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_starts_beside_one_that_publishes_sees_no_loss() {
    let db = database_alone().await;
    let one = Launch::on(db.url()).start().await;
    let client = Client::of(&one);
    client.put("k", "before").await.unwrap();
    let proxy = Proxy::before(&db);
    // It has read where the head is, and goes on when the other has written and published past that.
    let held = proxy.arm(Fault::hold_after().on("SELECT index, root FROM ledger.head"));
    let two = tokio::spawn(Launch::beside(&one, db.url_via(&proxy)).start());
    held.hit().await;
    let index = client.put("k", "meanwhile").await.unwrap();
    let covered = || async { checkpoint_size(&client).await.is_some_and(|s| s > u64::try_from(index).unwrap()) };
    crate::support::until("the checkpoint", covered).await;
    held.release();
    let two = two.await.unwrap();
    let told = |d: &Daemon| d.log().contains("the first administrator's credential is in");
    assert!(told(&one) && !told(&two), "there is one, and the second daemon has nothing of it");
    let there = client.clone_at(&two.url);
    there.put("k", "after").await.expect("nothing was lost, and it writes");
    assert!(there.bare(Method::GET, "/readyz").send().await.unwrap().status().is_success());
    record::check(&db).await;
}
