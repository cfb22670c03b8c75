//! The front over real sockets: TLS, certificates that change, metrics of their own, compression, systemd.

use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use reqwest::Method;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::client::Client;
use crate::support::daemon::Launch;
use crate::support::postgres::database;
use crate::support::{PATIENCE, reaper, soon, until};

/// An authority, and the folder its certificates are written to.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: PathBuf,
}

impl Authority {
    fn new(name: &str) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let dir = reaper::folder("ca");
        std::fs::write(dir.join("ca.pem"), issuer.pem()).unwrap();
        Self { issuer, dir }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Writes a certificate and its key.
    fn issue(&self, name: &str) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned(), "localhost".to_owned()]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(self.file(&format!("{name}.key")), key.serialize_pem()).unwrap();
        std::fs::write(self.file(&format!("{name}.pem")), cert.pem()).unwrap();
    }

    fn client(&self, identity: Option<(&Authority, &str)>) -> reqwest::Client {
        let ca = reqwest::Certificate::from_pem(&std::fs::read(self.file("ca.pem")).unwrap()).unwrap();
        let mut builder = reqwest::Client::builder().no_proxy().tls_certs_only([ca]).pool_max_idle_per_host(0);
        if let Some((authority, name)) = identity {
            let read = |suffix: &str| std::fs::read(authority.file(&format!("{name}.{suffix}"))).unwrap();
            builder = builder.identity(reqwest::Identity::from_pem(&[read("pem"), read("key")].concat()).unwrap());
        }
        builder.build().unwrap()
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_is_served_over_tls_and_its_certificate_changes_without_a_restart() {
    let db = database().await;
    let (ours, theirs, other) = (Authority::new("ours"), Authority::new("theirs"), Authority::new("other"));
    ours.issue("server");
    let daemon = Launch::on(db.url())
        .env("SOP__SERVER__TLS_CERT", &text(&ours.file("server.pem")))
        .env("SOP__SERVER__TLS_KEY", &text(&ours.file("server.key")))
        .env("SOP__SERVER__TLS_CLIENT_CA", &text(&theirs.file("ca.pem")))
        .start()
        .await;
    assert!(daemon.url.starts_with("https://127.0.0.1:"), "{}", daemon.url);
    let version = format!("{}/version", daemon.url);
    let get = |client: reqwest::Client| {
        let version = version.clone();
        async move { client.get(version).send().await.map(|a| a.status().as_u16()) }
    };
    assert_eq!(get(ours.client(None)).await.unwrap(), 200);
    assert!(get(other.client(None)).await.is_err(), "not of an authority that is trusted");
    // A client's certificate is looked at if it is sent.
    theirs.issue("client");
    other.issue("stranger");
    assert_eq!(get(ours.client(Some((&theirs, "client")))).await.unwrap(), 200);
    assert!(get(ours.client(Some((&other, "stranger")))).await.is_err(), "of an authority nobody named");
    // Plain HTTP to the TLS port is cut, and a handshake that never comes keeps nobody waiting.
    let address = daemon.url.trim_start_matches("https://").to_owned();
    let mut plain = tokio::net::TcpStream::connect(&address).await.unwrap();
    plain.write_all(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = soon("it is cut", plain.read_to_end(&mut answer)).await;
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    let _silent = tokio::net::TcpStream::connect(&address).await.unwrap();
    assert_eq!(get(ours.client(None)).await.unwrap(), 200);
    // The command line trusts whom it is told to.
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_sop"));
    command.args(["--data-dir", &text(&daemon.launch.dir), "state", "put", "k", "v"]);
    assert!(!command.output().await.unwrap().status.success());
    command.env("SOP_CA_FILE", ours.file("ca.pem"));
    assert!(command.output().await.unwrap().status.success());
    // A new certificate, of another authority.
    other.issue("server");
    std::fs::copy(other.file("server.key"), ours.file("server.key")).unwrap();
    std::fs::copy(other.file("server.pem"), ours.file("server.pem")).unwrap();
    until("the new certificate", || async { get(other.client(None)).await.is_ok() }).await;
    assert!(get(ours.client(None)).await.is_err(), "the old one is served no more");
    // One that cannot be used changes nothing, and is spoken of.
    std::fs::write(ours.file("server.pem"), "no certificate").unwrap();
    let ready = format!("{}/readyz?verbose", daemon.url);
    until("the fault to be shown", || async {
        let answer = other.client(None).get(&ready).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        answer.text().await.unwrap().contains("certificate: the old one is served")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http_is_for_loopback() {
    let db = database().await;
    let refused = Launch::on(db.url()).env("SOP__SERVER__LISTEN", "0.0.0.0:0").refused().await;
    assert!(refused.contains("is not a loopback address") && refused.contains("server.tls_cert"), "{refused}");
    let refused = Launch::on(db.url()).env("SOP__SERVER__TLS_CERT", "/nonexistent").refused().await;
    assert!(refused.contains("go together"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_have_a_listener_of_their_own() {
    let db = database().await;
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let listen = format!("127.0.0.1:{port}");
    let daemon = Launch::on(db.url()).env("SOP__SERVER__METRICS_LISTEN", &listen).start().await;
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let get = |path: &str| http.get(format!("http://{listen}{path}")).send();
    assert!(get("/metrics").await.unwrap().text().await.unwrap().contains("sop_ledger_entries_total"));
    assert_eq!(get("/readyz").await.unwrap().status(), 200);
    assert_eq!(get("/v1/state/kv").await.unwrap().status(), 404, "nothing else is there");
    assert_eq!(Client::of(&daemon).bare(Method::GET, "/metrics").send().await.unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn large_answers_are_compressed_for_those_who_ask() {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    let plain = client.bare(Method::GET, "/openapi.json").send().await.unwrap();
    assert!(!plain.headers().contains_key("content-encoding"));
    let plain = plain.bytes().await.unwrap();
    let ask = |path: &str| client.bare(Method::GET, path).header("accept-encoding", "gzip").send();
    let packed = ask("/openapi.json").await.unwrap();
    assert_eq!(packed.headers()["content-encoding"], "gzip");
    let packed = packed.bytes().await.unwrap();
    assert!(packed.starts_with(&[0x1f, 0x8b]) && packed.len() * 3 < plain.len(), "{} of {}", packed.len(), plain.len());
    assert!(!ask("/version").await.unwrap().headers().contains_key("content-encoding"), "not worth it");
}

#[tokio::test(flavor = "multi_thread")]
async fn systemd_hears_that_the_daemon_is_ready_alive_and_stopping() {
    let db = database().await;
    let dir = reaper::folder("nt");
    let socket = tokio::net::UnixDatagram::bind(dir.join("notify")).unwrap();
    let mut daemon = Launch::on(db.url())
        .env("NOTIFY_SOCKET", &text(&dir.join("notify")))
        .env("WATCHDOG_USEC", "400000")
        .start()
        .await;
    let mut heard = String::new();
    let hear = async |what: &str, heard: &mut String| {
        let mut buffer = [0; 1024];
        while !heard.contains(what) {
            let wait = tokio::time::timeout(PATIENCE, socket.recv(&mut buffer)).await;
            let n = wait.unwrap_or_else(|_| panic!("no {what} in {heard}")).unwrap();
            heard.push_str(&String::from_utf8_lossy(&buffer[..n]));
            heard.push('\n');
        }
    };
    hear("READY=1", &mut heard).await;
    hear("WATCHDOG=1", &mut heard).await;
    heard.clear();
    hear("WATCHDOG=1", &mut heard).await;
    daemon.terminate().await;
    hear("STOPPING=1", &mut heard).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_watched_is_what_there_is() {
    let db = database().await;
    // With a witness, so that what is counted of it is there too; nobody needs to answer.
    let (key, _) = sop::kernel::crypto::SigningKey::generate().unwrap();
    let witness = sop::audit::note::VerifierKey::witness("w.example/w", key.public());
    let daemon =
        Launch::on(db.url()).env("SOP__AUDIT__WITNESSES", &format!("http://127.0.0.1:9 {witness}")).start().await;
    let client = Client::of(&daemon);
    client.put("k", "v").await.unwrap();
    let metrics = client.bare(Method::GET, "/metrics").send().await.unwrap().text().await.unwrap();
    let known: Vec<&str> = metrics.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let board: Value = serde_json::from_str(include_str!("../../config/grafana/sop.json")).unwrap();
    assert!(board["panels"].as_array().unwrap().len() >= 8);
    for (file, text) in [
        ("grafana", include_str!("../../config/grafana/sop.json")),
        ("alerts", include_str!("../../config/prometheus/alerts.yml")),
    ] {
        let names = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).filter(|w| w.starts_with("sop_"));
        let mut n = 0;
        for name in names {
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s)).unwrap_or(name);
            assert!(known.contains(&name) || known.contains(&base), "{file} speaks of {name}, which there is not");
            n += 1;
        }
        assert!(n >= 5, "{file}: {n}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_known_fills_no_record() {
    let db = database().await;
    let daemon = Launch::on(db.url()).env("SOP__SERVER__REFUSALS_INTERVAL", "2s").start().await;
    let client = Client::of(&daemon);
    let guess = |n: usize| {
        let request = client.bare(Method::GET, "/v1/state/kv/x").bearer_auth(format!("guess-{n}"));
        async move { assert_eq!(request.send().await.unwrap().status(), 401) }
    };
    futures_util::future::join_all((0..200).map(guess)).await;
    let form = [("grant_type", "client_credentials")];
    let answer = client.bare(Method::POST, "/oauth2/token").basic_auth("nobody", Some("x")).form(&form).send().await;
    assert_eq!(answer.unwrap().status(), 401);
    let entries = || async {
        let (_, page) = client.get("/v1/audit/entries?action=api:refuse").await;
        page["items"].as_array().unwrap().clone()
    };
    let counted =
        |all: &[Value]| -> i64 { all.iter().filter_map(|e| e["details"]["change"]["requests"].as_i64()).sum() };
    until("the entries", || async { counted(&entries().await) == 201 }).await;
    let all = entries().await;
    // Two reasons; the guesses may have fallen into two intervals.
    assert!(all.len() <= 4, "{all:?}");
    assert!(all.iter().all(|e| e["resource"] == "address/127.0.0.0/24" && e["outcome"] == "denied"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_nearly_full_stops_writes_and_nothing_else() {
    // The guard looks at the disk of the data folder, so it is for a PostgreSQL that has its data there.
    let mut daemon = Launch::alone().start().await;
    let client = Client::of(&daemon);
    client.put("k", "v").await.unwrap();
    let token = client.token().await;
    daemon.terminate().await;
    let launch = daemon.launch.clone();
    // A guard that every disk has passed.
    let mut full = launch.clone().env("SOP__DISK__GUARD_PERCENT", "0").start().await;
    let there = client.clone_at(&full.url);
    let ask = |method, path: &str| there.bare(method, path).bearer_auth(&token).body("w").send();
    until("the guard to look", || async { ask(Method::PUT, "/v1/state/kv/k").await.unwrap().status() == 507 }).await;
    let refused = ask(Method::PUT, "/v1/state/kv/k").await.unwrap();
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(refused.json::<Value>().await.unwrap()["type"], "/problems/storage-full");
    assert_eq!(ask(Method::GET, "/v1/state/kv/k").await.unwrap().text().await.unwrap(), "v", "reads go on");
    let ready = there.bare(Method::GET, "/readyz?verbose").send().await.unwrap();
    assert_eq!(ready.status(), 503);
    assert!(ready.text().await.unwrap().contains("[-] disk: nearly full"));
    full.terminate().await;
    let mut again = launch.start().await;
    client.clone_at(&again.url).put("k", "w").await.expect("with room it goes on");
    again.terminate().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_configuration_is_taken_over_on_sighup() {
    let db = database().await;
    let launch = Launch::on(db.url());
    let file = launch.dir.join("sop.toml");
    let write = |text: &str| std::fs::write(&file, text).unwrap();
    write("[server]\nrate = 2000\n");
    let daemon = launch.config(file.clone()).start().await;
    let client = Client::of(&daemon);
    client.put("k", "v").await.unwrap();
    // What cannot be read changes nothing and ends nothing.
    write("[server]\nrat = 1\n");
    daemon.reload();
    until("the complaint", async || daemon.log().contains("was not reloaded")).await;
    client.put("k", "v").await.unwrap();
    write("[server]\nrate = 1\n[telemetry]\nfilter = \"debug\"\n[token]\nttl = \"7s\"\n");
    daemon.reload();
    until("the reload", async || daemon.log().contains("wait for a restart: token.ttl")).await;
    assert!(daemon.log().contains("other than at the start: server.rate, telemetry.filter"));
    let mut limited = 0;
    for _ in 0..10 {
        let answer = client.request(Method::GET, "/v1/state/kv/k").await.send().await.unwrap();
        limited += u32::from(answer.status() == 429);
    }
    assert!(limited >= 5, "{limited} of 10 were refused");
    assert!(daemon.log().contains("\"level\":\"DEBUG\""));
}
