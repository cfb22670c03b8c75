//! One private cluster for the run, from the machine's own binaries; a database cloned from a migrated template for each test.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, Connection, Executor};
use tokio::sync::{mpsc, oneshot};

use super::{PATIENCE, proxy::Proxy, reaper};

const TEMPLATE: &str = "sop_template";

/// A running PostgreSQL that nobody else uses.
pub struct Cluster {
    /// Where its socket is.
    pub sockets: PathBuf,
    /// Its data folder; `postmaster.pid` is in it.
    pub data: PathBuf,
    orders: mpsc::UnboundedSender<Order>,
    next: AtomicU32,
}

enum Order {
    Create(String, oneshot::Sender<()>),
    Drop(String),
}

/// One test's database; dropped with it.
pub struct Database {
    pub name: String,
    pub cluster: Arc<Cluster>,
}

/// A database of the run's shared cluster.
pub async fn database() -> Database {
    static SHARED: OnceLock<Arc<Cluster>> = OnceLock::new();
    let cluster = tokio::task::spawn_blocking(|| SHARED.get_or_init(Cluster::start).clone()).await.expect("a cluster");
    cluster.database().await
}

/// A database of a cluster of its own, for a test that kills more than a connection.
pub async fn database_alone() -> Database {
    let cluster = tokio::task::spawn_blocking(Cluster::start).await.expect("a cluster");
    cluster.database().await
}

impl Cluster {
    fn start() -> Arc<Self> {
        let owner = service_user();
        let (home, data, sockets) = folders("pg", owner);
        let bin = binaries();
        let log = File::create(home.join("log")).expect("log");
        let done = as_user(&bin.join("initdb"), owner)
            .args([
                "-U",
                "postgres",
                "-E",
                "UTF8",
                "--locale=C",
                "--auth=trust",
                "--no-sync",
                "--no-instructions",
                "-D",
            ])
            .arg(&data)
            .stdout(log.try_clone().expect("log"))
            .stderr(log.try_clone().expect("log"))
            .status()
            .expect("initdb runs");
        assert!(done.success(), "initdb failed: {}", fs::read_to_string(home.join("log")).unwrap_or_default());
        let fsync = std::env::var("SOP_TEST_FSYNC").unwrap_or_else(|_| "on".into());
        let mut server = as_user(&bin.join("postgres"), owner);
        server.arg("-D").arg(&data).arg("-k").arg(&sockets).args(["-c", "listen_addresses="]);
        for setting in
            ["max_connections=300", "shared_buffers=64MB", "autovacuum_naptime=5s", "log_line_prefix=%m %a: "]
        {
            server.args(["-c", setting]);
        }
        let mut server = server
            .args(["-c", &format!("fsync={fsync}")])
            .process_group(0)
            .stdout(log.try_clone().expect("log"))
            .stderr(log)
            .spawn()
            .expect("postgres runs");
        let (orders, inbox) = mpsc::unbounded_channel();
        let cluster = Arc::new(Self { sockets, data, orders, next: AtomicU32::new(1) });
        let (ready, is_ready) = std::sync::mpsc::channel();
        let admin = cluster.options("postgres", "postgres");
        let template = cluster.options(TEMPLATE, "sop");
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            runtime.block_on(administer(admin, template, inbox, ready));
            // The cluster's last user is gone.
            let _ = Command::new("kill").args(["-QUIT", &server.id().to_string()]).status();
            let _ = server.wait();
        });
        is_ready.recv_timeout(PATIENCE).unwrap_or_else(|_| {
            panic!("the test cluster did not start: {}", fs::read_to_string(home.join("log")).unwrap_or_default())
        });
        cluster
    }

    /// A fresh database with every migration applied.
    pub async fn database(self: &Arc<Self>) -> Database {
        let name = format!("t_{}", self.next.fetch_add(1, Ordering::Relaxed));
        let (done, created) = oneshot::channel();
        self.orders.send(Order::Create(name.clone(), done)).expect("the cluster runs");
        created.await.expect("a database from the template");
        Database { name, cluster: self.clone() }
    }

    /// A second server that follows this one, as a failover needs it.
    pub async fn standby(&self) -> Standby {
        let primary = self.sockets.clone();
        tokio::task::spawn_blocking(move || Standby::start(&primary)).await.expect("a standby")
    }

    /// Ends the server at once, as a failing machine would. Its data folder stays.
    pub async fn kill(&self) {
        let pid = fs::read_to_string(self.data.join("postmaster.pid")).expect("it runs");
        let pid = pid.lines().next().and_then(|l| l.parse().ok()).and_then(rustix::process::Pid::from_raw);
        rustix::process::kill_process(pid.expect("a pid"), rustix::process::Signal::QUIT).expect("it runs");
        while PgConnection::connect_with(&self.options("postgres", "postgres")).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn options(&self, database: &str, user: &str) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass().socket(&self.sockets).username(user).database(database)
    }

    /// A connection that may do everything.
    pub async fn admin(&self) -> PgConnection {
        PgConnection::connect_with(&self.options("postgres", "postgres")).await.expect("the cluster answers")
    }
}

/// A server that follows another until it is promoted.
pub struct Standby {
    sockets: PathBuf,
    server: std::process::Child,
}

impl Standby {
    fn start(primary: &Path) -> Self {
        let owner = service_user();
        let (home, data, sockets) = folders("standby", owner);
        let bin = binaries();
        let log = File::create(home.join("log")).expect("log");
        let copied = as_user(&bin.join("pg_basebackup"), owner)
            .args(["-U", "postgres", "-R", "-X", "stream", "-c", "fast", "--no-sync", "-h"])
            .arg(primary)
            .arg("-D")
            .arg(&data)
            .stderr(log.try_clone().expect("log"))
            .status()
            .expect("pg_basebackup runs");
        assert!(copied.success(), "pg_basebackup: {}", fs::read_to_string(home.join("log")).unwrap_or_default());
        let server = as_user(&bin.join("postgres"), owner)
            .arg("-D")
            .arg(&data)
            .arg("-k")
            .arg(&sockets)
            .args(["-c", "listen_addresses=", "-c", "max_connections=300"])
            .process_group(0)
            .stdout(log.try_clone().expect("log"))
            .stderr(log)
            .spawn()
            .expect("postgres runs");
        Self { sockets, server }
    }

    /// As a superuser, once it answers.
    pub async fn admin(&self) -> PgConnection {
        let options = PgConnectOptions::new_without_pgpass().socket(&self.sockets).username("postgres");
        patiently(&options.database("postgres")).await
    }

    /// From now on it takes writes.
    pub async fn promote(&self) {
        let promoted: bool =
            sqlx::query_scalar("SELECT pg_promote()").fetch_one(&mut self.admin().await).await.unwrap();
        assert!(promoted);
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-QUIT", &self.server.id().to_string()]).status();
        let _ = self.server.wait();
    }
}

impl Database {
    /// Where a daemon finds it, on whichever of two servers takes writes.
    pub fn url_with(&self, standby: &Standby) -> String {
        let host = |p: &Path| p.display().to_string().replace('/', "%2F");
        format!("postgres://sop@{},{}/{}", host(&self.cluster.sockets), host(&standby.sockets), self.name)
    }

    /// Where a daemon finds it.
    pub fn url(&self) -> String {
        self.url_at(&self.cluster.sockets)
    }

    /// Where a daemon finds it behind a proxy.
    pub fn url_via(&self, proxy: &Proxy) -> String {
        self.url_at(proxy.sockets())
    }

    fn url_at(&self, sockets: &Path) -> String {
        format!("postgres:///{}?host={}&user=sop", self.name, sockets.display())
    }

    /// A copy of it as it is now; nobody may be connected to it.
    pub async fn copy(&self) -> Self {
        let name = format!("{}_copy", self.name);
        let sql = format!("CREATE DATABASE {name} TEMPLATE {} OWNER sop", self.name);
        self.cluster.admin().await.execute(AssertSqlSafe(sql)).await.expect("a copy");
        Self { name, cluster: self.cluster.clone() }
    }

    /// As the daemon's own role.
    pub async fn connect(&self) -> PgConnection {
        PgConnection::connect_with(&self.cluster.options(&self.name, "sop")).await.expect("the database answers")
    }

    /// Under a name of one's own.
    pub async fn connect_as(&self, name: &str) -> PgConnection {
        let options = PgConnectOptions::from_str(&self.url()).expect("url").application_name(name);
        PgConnection::connect_with(&options).await.expect("the database answers")
    }

    /// As the daemon's own role, through a proxy, under a name that faults look for.
    pub async fn connect_via(&self, proxy: &Proxy, name: &str) -> PgConnection {
        let options = PgConnectOptions::from_str(&self.url_via(proxy)).expect("url").application_name(name);
        PgConnection::connect_with(&options).await.expect("the proxy answers")
    }

    /// Process ids of the backends that daemons hold on it.
    pub async fn backends(&self) -> Vec<i32> {
        let sql = "SELECT pid FROM pg_stat_activity WHERE datname = $1 AND application_name LIKE 'sop/%'";
        let mut admin = self.cluster.admin().await;
        sqlx::query_scalar(sql).bind(&self.name).fetch_all(&mut admin).await.expect("pg_stat_activity")
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let _ = self.cluster.orders.send(Order::Drop(std::mem::take(&mut self.name)));
    }
}

/// A folder of a server's own, where its data will be, and one for its socket.
fn folders(purpose: &str, owner: Option<(u32, u32)>) -> (PathBuf, PathBuf, PathBuf) {
    let home = reaper::folder(purpose);
    let sockets = home.join("s");
    fs::create_dir(&sockets).expect("socket folder");
    if let Some((uid, gid)) = owner {
        chown(&home, Some(uid), Some(gid)).expect("chown");
        chown(&sockets, Some(uid), Some(gid)).expect("chown");
    }
    fs::set_permissions(&home, fs::Permissions::from_mode(0o755)).expect("chmod");
    (home.clone(), home.join("data"), sockets)
}

/// The one that creates and drops: two at once would wait for each other on the template anyway.
async fn administer(
    admin: PgConnectOptions,
    template: PgConnectOptions,
    mut inbox: mpsc::UnboundedReceiver<Order>,
    ready: std::sync::mpsc::Sender<()>,
) {
    let mut conn = patiently(&admin).await;
    let version: i32 = sqlx::query_scalar("SELECT current_setting('server_version_num')::int4")
        .fetch_one(&mut conn)
        .await
        .expect("version");
    assert!(version >= 140_000, "sop needs PostgreSQL 14 or later, this is {version}");
    for sql in ["CREATE ROLE sop LOGIN".to_owned(), format!("CREATE DATABASE {TEMPLATE} OWNER sop")] {
        conn.execute(AssertSqlSafe(sql)).await.expect("template");
    }
    let mut migrated = PgConnection::connect_with(&template).await.expect("template");
    let migrator = sqlx::migrate::Migrator::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations")).await;
    migrator.expect("migrations").run_direct(None, &mut migrated, false).await.expect("migrations apply");
    migrated.close().await.expect("template closes");
    let _ = ready.send(());
    while let Some(order) = inbox.recv().await {
        match order {
            Order::Create(name, done) => {
                let sql = format!("CREATE DATABASE {name} OWNER sop TEMPLATE {TEMPLATE}");
                if conn.execute(AssertSqlSafe(sql.clone())).await.is_err() {
                    // The server may have been killed by a test.
                    conn = patiently(&admin).await;
                    conn.execute(AssertSqlSafe(sql)).await.expect("a database from the template");
                }
                let _ = done.send(());
            }
            Order::Drop(name) => {
                let _ = conn.execute(AssertSqlSafe(format!("DROP DATABASE {name} WITH (FORCE)"))).await;
            }
        }
    }
}

async fn patiently(options: &PgConnectOptions) -> PgConnection {
    let start = Instant::now();
    loop {
        match PgConnection::connect_with(options).await {
            Ok(conn) => return conn,
            Err(error) => assert!(start.elapsed() < PATIENCE, "PostgreSQL does not answer: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn as_user(program: &Path, owner: Option<(u32, u32)>) -> Command {
    let mut command = Command::new(program);
    command.current_dir("/").stdin(Stdio::null()).env("LC_ALL", "C");
    if let Some((uid, gid)) = owner {
        command.uid(uid).gid(gid);
    }
    command
}

/// PostgreSQL refuses root: as root it runs as `postgres`, or as `nobody` where that does not exist.
fn service_user() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let passwd = fs::read_to_string("/etc/passwd").expect("passwd");
    ["postgres", "nobody"].iter().find_map(|user| {
        let line = passwd.lines().find(|line| line.split(':').next() == Some(user))?;
        let mut fields = line.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    })
}

/// Debian's place, newest first; else what is in `PATH`.
fn binaries() -> PathBuf {
    let debian = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found: Vec<(u32, PathBuf)> = debian
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
        .filter(|(version, bin)| *version >= 14 && bin.join("initdb").exists())
        .collect();
    found.sort();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = || std::env::split_paths(&path).find(|dir| dir.join("initdb").exists());
    found.pop().map(|(_, bin)| bin).or_else(in_path).expect("PostgreSQL server binaries: apt-get install postgresql")
}
