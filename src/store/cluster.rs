//! The private cluster: a PostgreSQL of the machine's own programs, in the data folder, on a unix socket.

mod process;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection as _, PgConnection};
use tokio::sync::Mutex;

use crate::config::Config;

use process::{Postmaster, RunAs, programs};

/// A socket's path has 108 bytes, one of them the end; PostgreSQL adds `/.s.PGSQL.5432`.
const SOCKET_MAX: usize = 107 - "/.s.PGSQL.5432".len();
/// How long the server may take to answer its first query; recovery after a crash is part of it.
const READY: Duration = Duration::from_secs(60);
/// How often a start is tried again, every 100 ms, while a dead server's last process is not reaped yet.
const RETRIES: u32 = 50;

pub(super) struct Cluster {
    bin: PathBuf,
    data: PathBuf,
    run: PathBuf,
    log: PathBuf,
    user: RunAs,
    sync: bool,
    server: Mutex<Option<Postmaster>>,
    stopping: AtomicBool,
}

impl Cluster {
    pub fn new(config: &Config) -> Result<Self, String> {
        let dir = std::path::absolute(&config.data.dir).map_err(|e| e.to_string())?;
        let bin = programs(config.database.bin_dir.as_deref())?;
        let user = RunAs::choose(&config.database.service_user)?;
        let run = dir.join("run");
        if run.as_os_str().len() > SOCKET_MAX {
            return Err(format!(
                "the data folder's path is too long for a unix socket ({} bytes, at most {SOCKET_MAX} for {}): choose a shorter one",
                run.as_os_str().len(),
                run.display()
            ));
        }
        let log = dir.join("pg.log");
        Ok(Self {
            bin,
            data: dir.join("pg"),
            run,
            log,
            user,
            sync: config.database.sync,
            server: Mutex::new(None),
            stopping: AtomicBool::new(false),
        })
    }

    /// How to connect, to whichever database.
    pub fn options(&self) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass().socket(&self.run).port(5432).username("sop").database("postgres")
    }

    /// Makes the cluster if there is none, adopts its server if one still runs, starts it otherwise, and waits until it answers.
    pub async fn start(&self) -> Result<(), String> {
        if !self.data.join("PG_VERSION").exists() {
            self.init().await?;
        }
        process::own_folder(&self.run, 0o700, &self.user)?;
        let mut server = self.server.lock().await;
        *server = Some(self.launch().await?);
        Ok(())
    }

    async fn launch(&self) -> Result<Postmaster, String> {
        if let Some(running) = Postmaster::adopt(&self.data) {
            if self.answers(&mut None).await.is_ok() {
                tracing::info!(pid = running.pid(), "adopted the PostgreSQL that an earlier daemon left running");
                return Ok(running);
            }
            return Err(format!(
                "a PostgreSQL (process {}) runs on {} but does not answer",
                running.pid(),
                self.data.display()
            ));
        }
        let mut tried = 0;
        loop {
            tried += 1;
            let mut server = Some(self.spawn()?);
            match self.answers(&mut server).await {
                Ok(()) => return server.ok_or_else(|| "PostgreSQL ended as it started".to_owned()),
                // The last process of a killed server may not be reaped yet: its lock file then still counts.
                Err(e) if tried < RETRIES && e.contains("already exists") => {
                    tokio::time::sleep(Duration::from_millis(100)).await
                }
                Err(e) => return Err(e),
            }
        }
    }

    fn spawn(&self) -> Result<Postmaster, String> {
        let sync = if self.sync { "on" } else { "off" };
        let run = self.run.display().to_string();
        let settings = [
            ("listen_addresses", ""),
            ("unix_socket_directories", &run),
            ("unix_socket_permissions", "0700"),
            ("port", "5432"),
            ("max_connections", "64"),
            ("shared_buffers", "128MB"),
            ("wal_buffers", "16MB"),
            ("wal_level", "replica"),
            ("max_wal_size", "1GB"),
            // A segment that is written over stalls nobody; a new one is 16 MiB of zeros that every commit waits for.
            ("min_wal_size", "256MB"),
            ("fsync", sync),
            ("synchronous_commit", "on"),
            ("jit", "off"),
            ("log_min_messages", "warning"),
            ("log_line_prefix", "%m [%p] %a "),
            ("timezone", "UTC"),
        ];
        Postmaster::spawn(&self.bin, &self.data, &self.log, &settings, &self.user)
    }

    /// Waits until a query is answered, or the server has ended.
    async fn answers(&self, server: &mut Option<Postmaster>) -> Result<(), String> {
        let mut last = String::new();
        let answered = tokio::time::timeout(READY, self.first_answer(server, &mut last)).await;
        answered.unwrap_or_else(|_| {
            Err(format!("PostgreSQL did not answer within {} s: {last}; see {}", READY.as_secs(), self.log.display()))
        })
    }

    async fn first_answer(&self, server: &mut Option<Postmaster>, last: &mut String) -> Result<(), String> {
        loop {
            let tried = match PgConnection::connect_with(&self.options()).await {
                Ok(mut conn) => conn.ping().await,
                Err(e) => Err(e),
            };
            let Err(e) = tried else { return Ok(()) };
            if let Some(s) = server
                && let Some(status) = s.ended()
            {
                return Err(format!("PostgreSQL ended as it started ({status}): {}", last_lines(&self.log)));
            }
            *last = e.to_string();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// A half-made cluster is never mistaken for one: it is made beside its place and then renamed.
    async fn init(&self) -> Result<(), String> {
        let half = self.data.with_extension("init");
        if half.exists() {
            std::fs::remove_dir_all(&half).map_err(|e| format!("{} cannot be removed: {e}", half.display()))?;
        }
        process::own_folder(&half, 0o700, &self.user)?;
        process::init(&self.bin, &half, self.sync, &self.user).await?;
        let map = self.user.names().iter().map(|n| format!("sop {n} sop\n")).collect::<String>();
        let wrote = std::fs::write(half.join("pg_hba.conf"), "local all all peer map=sop\n")
            .and_then(|()| std::fs::write(half.join("pg_ident.conf"), map))
            .and_then(|()| std::fs::rename(&half, &self.data));
        wrote.map_err(|e| format!("the new cluster in {} cannot be finished: {e}", half.display()))
    }

    pub async fn make_database(&self, name: &'static str) -> Result<(), String> {
        let failed = |e: sqlx::Error| format!("the database {name} cannot be made: {e}");
        let mut conn = PgConnection::connect_with(&self.options()).await.map_err(failed)?;
        let there: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)")
            .bind(name)
            .fetch_one(&mut conn)
            .await
            .map_err(failed)?;
        if !there {
            sqlx::raw_sql("CREATE DATABASE sop").execute(&mut conn).await.map_err(failed)?;
        }
        Ok(())
    }

    /// Starts the server again if it died.
    pub async fn revive(&self) -> Result<(), String> {
        let mut server = self.server.lock().await;
        if self.stopping.load(Ordering::Acquire) || server.as_mut().is_some_and(|s| s.ended().is_none()) {
            return Ok(());
        }
        tracing::error!("PostgreSQL of the data folder has died; starting it again");
        *server = None;
        *server = Some(self.launch().await?);
        tracing::info!("PostgreSQL of the data folder runs again");
        Ok(())
    }

    /// Stops the server: fast, and if that takes too long, at once (it recovers at the next start).
    pub async fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        if let Some(server) = self.server.lock().await.take() {
            server.stop(&self.data).await;
        }
    }
}

fn last_lines(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(4).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
}
