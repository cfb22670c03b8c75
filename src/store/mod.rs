//! PostgreSQL: the private cluster or a given one, connections, migrations, and whether there is room on the disk.
//!
//! **Invariants.** A database newer than this binary is never touched. The private cluster listens on a unix socket only and is
//! never run as root. A data folder has one daemon. No connection goes back to the readers inside a transaction.
//!
//! **Not here.** Any statement on a room's tables: those are in each room's `store.rs`.
//!
//! **Why this way.** With nothing configured the daemon runs PostgreSQL itself, so that starting it is one command; with a URL
//! it takes what operators already run and trust.

mod cluster;
mod guard;
mod hosts;
mod lock;
mod migrate;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus::IntGauge;
use rustix::process::Pid;
use sqlx::error::DatabaseError;
use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use sqlx::{Connection as _, PgConnection, PgPool, Postgres, SqlStr, Transaction};

use crate::config::Config;
use crate::kernel::supervisor::{self, Supervisor, Task, give_way};
use crate::kernel::{Clock, Refusal, crypto};

pub use lock::DataLock;
pub use migrate::Pending;

use cluster::Cluster;
use hosts::Hosts;

/// Begins a transaction that sees all of one moment and changes nothing.
pub const MOMENT: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";

/// The name of the database in the private cluster.
const DATABASE: &str = "sop";

/// The database as the house uses it. Cheap to clone.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    hosts: Hosts,
    cluster: Option<Arc<Cluster>>,
    reader: PgPool,
    moved: Moved,
    /// How long a statement of a reader may take.
    statement: Duration,
    daemon: String,
    full: Arc<AtomicBool>,
    lock_wait: Duration,
}

impl Store {
    /// Opens the database: starts or adopts the private cluster, or finds the writable host of the given URL. The schema is
    /// not looked at; see [`Store::migrate`].
    ///
    /// # Errors
    /// With a sentence for the operator.
    pub async fn open(config: &Config) -> Result<Self, String> {
        let daemon = crypto::random::<4>().map(|b| b.iter().map(|b| format!("{b:02x}")).collect::<String>());
        let daemon = daemon.map_err(|e| e.to_string())?;
        let (hosts, cluster) = match &config.database.url {
            Some(url) => (Hosts::parse(url)?, None),
            None => {
                let cluster = Arc::new(Cluster::new(config)?);
                cluster.start().await?;
                cluster.make_database(DATABASE).await?;
                (Hosts::one(cluster.options().database(DATABASE)), Some(cluster))
            }
        };
        let (options, _) = hosts.writable().await.map_err(|e| format!("no writable PostgreSQL can be reached: {e}"))?;
        let statement = config.database.statement_timeout.get();
        let moved = Moved::never();
        let since = moved.clone();
        let reader = PgPoolOptions::new()
            .max_connections(config.database.readers)
            .acquire_timeout(config.database.acquire_timeout.get())
            .before_acquire(move |_, about| {
                let fits = since.keeps(about.age);
                Box::pin(async move { Ok(fits) })
            })
            .connect_lazy_with(session(options, &daemon, "reader", Some(statement)));
        let full = Arc::new(AtomicBool::new(false));
        let lock_wait = config.ledger.lock_wait.get();
        Ok(Self(Arc::new(Inner { hosts, cluster, reader, moved, statement, daemon, full, lock_wait })))
    }

    /// This daemon's id: random, new at each start.
    #[must_use]
    pub fn daemon(&self) -> &str {
        &self.0.daemon
    }

    /// Connections for reading. Whoever may be dropped on its way, as a request may, begins a transaction on one by
    /// [`moment`](Self::moment) only.
    #[must_use]
    pub fn reader(&self) -> &PgPool {
        &self.0.reader
    }

    /// A reader's transaction that sees all of one moment.
    ///
    /// It is begun apart from the caller: a `BEGIN` of sqlx that is dropped on its way (a client that hangs up) is not rolled back
    /// (sqlx issue 4385, in 0.9.0), and its snapshot would be what whoever has the connection next reads of.
    ///
    /// # Errors
    /// When there is no connection, or it breaks.
    pub async fn moment(&self) -> Result<Transaction<'static, Postgres>, sqlx::Error> {
        let conn = self.0.reader.acquire().await?;
        let begun = supervisor::detach(Transaction::begin(conn, Some(SqlStr::from_static(MOMENT))));
        begun.await.unwrap_or(Err(sqlx::Error::WorkerCrashed))
    }

    /// A connection of one's own to the writable host.
    ///
    /// # Errors
    /// When there is none.
    pub async fn dedicated(&self, purpose: &str) -> Result<PgConnection, sqlx::Error> {
        let options = self.writable(purpose).await?;
        tokio::time::timeout(CONNECT, PgConnection::connect_with(&options)).await.map_err(|_| timed_out())?
    }

    /// The same for work in long pieces that nobody waits for: on the private cluster, whose processes are of this machine, its
    /// session lets everybody else go first.
    ///
    /// # Errors
    /// When there is none.
    pub async fn background(&self, purpose: &str) -> Result<PgConnection, sqlx::Error> {
        let mut conn = self.dedicated(purpose).await?;
        if self.0.cluster.is_some() {
            let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut conn).await?;
            give_way(Pid::from_raw(pid));
        }
        Ok(conn)
    }

    /// A connection that listens to a channel.
    ///
    /// # Errors
    /// When there is none.
    pub async fn listener(&self, channel: &str) -> Result<PgListener, sqlx::Error> {
        let options = self.writable("listener").await?;
        let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(CONNECT).connect_lazy_with(options);
        let mut listener = PgListener::connect_with(&pool).await?;
        // A listener that reconnects by itself loses notifications in silence: its owner must hear of it and look anew.
        listener.eager_reconnect(false);
        listener.listen(channel).await?;
        Ok(listener)
    }

    async fn writable(&self, purpose: &str) -> Result<PgConnectOptions, sqlx::Error> {
        let (options, moved) = self.0.hosts.writable().await?;
        if moved {
            tracing::warn!(host = %options.get_host(), "another host of database.url takes writes now");
            let reader = session(options.clone(), &self.0.daemon, "reader", Some(self.0.statement));
            self.0.reader.set_connect_options(reader);
            self.0.moved.now();
        }
        let idle = self.0.lock_wait.as_millis().to_string();
        let options =
            session(options, &self.0.daemon, purpose, None).options([("idle_in_transaction_session_timeout", idle)]);
        if purpose != "writer" {
            return Ok(options);
        }
        // Its plans are made once, some while the tables are empty: a plan that reads a whole table must not be kept.
        Ok(options.options([("enable_seqscan", "off"), ("enable_hashjoin", "off"), ("enable_mergejoin", "off")]))
    }

    /// What a database error means to a caller.
    #[must_use]
    pub fn refusal(&self, e: sqlx::Error) -> Refusal {
        match e {
            sqlx::Error::Io(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::Protocol(_)
            | sqlx::Error::Tls(_)
            | sqlx::Error::WorkerCrashed => {
                tracing::warn!(error = %e, "the database cannot be reached");
                Refusal::unavailable("the database cannot be reached; nothing was changed")
            }
            sqlx::Error::Database(db) if broke_off(&*db) => {
                tracing::warn!(error = %db, "the database broke off");
                Refusal::unavailable("the database broke off; nothing was changed")
            }
            // No room on its disk, no memory, no connection left.
            sqlx::Error::Database(db) if db.code().is_some_and(|c| c.starts_with("53")) => {
                tracing::error!(error = %db, "the database is out of something");
                Refusal::unavailable("the database has no room for this now; nothing was changed")
            }
            e => Refusal::internal(e),
        }
    }

    /// Whether writes are refused because the disk is nearly full.
    #[must_use]
    pub fn storage_full(&self) -> bool {
        self.0.full.load(Ordering::Acquire)
    }

    /// Brings the schema up to this binary.
    ///
    /// # Errors
    /// When the database is newer than this binary, or a migration fails.
    pub async fn migrate(&self) -> Result<(), String> {
        let mut conn = self.started().await.map_err(|e| e.to_string())?;
        migrate::run(&mut conn).await
    }

    /// A connection to a server that may be on its way up, after a crash or with the machine: that is waited for.
    async fn started(&self) -> Result<PgConnection, sqlx::Error> {
        let clock = Clock::system();
        let began = clock.elapsed();
        loop {
            let error = match self.dedicated("migrate").await {
                Ok(conn) => return Ok(conn),
                Err(error) => error,
            };
            let starting = error.as_database_error().is_some_and(|e| e.code().as_deref() == Some(STARTING));
            if !starting || clock.elapsed().saturating_sub(began) > START {
                return Err(error);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// What [`migrate`](Self::migrate) would do.
    ///
    /// # Errors
    /// When the database is newer than this binary or cannot be read.
    pub async fn pending(&self) -> Result<Vec<Pending>, String> {
        let mut conn = self.dedicated("check").await.map_err(|e| e.to_string())?;
        migrate::pending(&mut conn).await
    }

    /// The age of the oldest snapshot any session holds, in seconds, and whether the database answers at all.
    ///
    /// # Errors
    /// When it does not.
    pub async fn health(&self) -> Result<f64, sqlx::Error> {
        sqlx::query_scalar(
            "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 0)::float8
             FROM pg_stat_activity WHERE backend_xmin IS NOT NULL AND pid <> pg_backend_pid()",
        )
        .fetch_one(&self.0.reader)
        .await
    }

    /// Starts what watches over the private cluster and its disk.
    ///
    /// # Errors
    /// When a metric is registered twice.
    pub fn start_tasks(
        &self,
        config: &Config,
        tasks: &Supervisor,
        registry: &prometheus::Registry,
    ) -> Result<(), prometheus::Error> {
        let full =
            IntGauge::new("sop_store_storage_full", "1 when writes are refused because the disk is nearly full")?;
        registry.register(Box::new(full.clone()))?;
        if let Some(cluster) = self.0.cluster.clone() {
            tasks.start(Task::periodic("store/cluster", Duration::from_millis(200), move || {
                let cluster = cluster.clone();
                async move { cluster.revive().await.map_err(Into::into) }
            }));
            guard::start(config, tasks, full, self.0.full.clone());
        }
        Ok(())
    }

    /// Closes connections and stops the private cluster, if there is one.
    pub async fn stop(&self) {
        let _ = tokio::time::timeout(Duration::from_secs(2), self.0.reader.close()).await;
        if let Some(cluster) = &self.0.cluster {
            cluster.stop().await;
        }
    }
}

/// When another host was found to take writes: a reader's connection that is older reads from one that may have been left
/// behind, and answer, for a long time.
#[derive(Clone)]
struct Moved {
    clock: Clock,
    at: Arc<Mutex<Option<Duration>>>,
}

impl Moved {
    /// Never yet.
    fn never() -> Self {
        Self { clock: Clock::system(), at: Arc::default() }
    }

    fn now(&self) {
        *self.at.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.clock.elapsed());
    }

    /// Whether a connection of that age was made since.
    fn keeps(&self, age: Duration) -> bool {
        let moved = *self.at.lock().unwrap_or_else(PoisonError::into_inner);
        moved.is_none_or(|at| age < self.clock.elapsed().saturating_sub(at))
    }
}

/// Whether the server ended the session or is going down, and not the statement is at fault: class 57, operator intervention
/// (terminated, shut down); 08, the connection; 25P03, idle in a transaction too long.
#[must_use]
pub fn broke_off(e: &dyn DatabaseError) -> bool {
    e.code().is_some_and(|c| c.starts_with("57") || c.starts_with("08") || c == "25P03")
}

/// How long a server may take to start, and the SQLSTATE by which it says that it does (`cannot_connect_now`).
const START: Duration = Duration::from_secs(30);
const STARTING: &str = "57P03";

/// How long a new connection may take.
const CONNECT: Duration = Duration::from_secs(3);

fn timed_out() -> sqlx::Error {
    sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, "connecting took too long"))
}

/// The settings every session of ours has.
fn session(options: PgConnectOptions, daemon: &str, purpose: &str, statement: Option<Duration>) -> PgConnectOptions {
    let options = options.application_name(&format!("sop/{daemon}/{purpose}")).options([
        ("jit", "off"),
        // A worker that starts and ends for a page of rows costs more than the page.
        ("max_parallel_workers_per_gather", "0"),
        ("plan_cache_mode", "force_generic_plan"),
        ("default_transaction_isolation", "read committed"),
        ("tcp_keepalives_idle", "5"),
        ("tcp_keepalives_interval", "2"),
        ("tcp_keepalives_count", "3"),
        ("tcp_user_timeout", "10000"),
    ]);
    let Some(limit) = statement.map(|limit| limit.as_millis().to_string()) else { return options };
    // Whoever stops in the midst of reading (a frozen daemon) does not keep its moment, and with it all that is dead since.
    options.options([("statement_timeout", limit.clone()), ("idle_in_transaction_session_timeout", limit)])
}

/// Takes the data folder for this process.
///
/// # Errors
/// When another daemon has it; the message says which.
pub fn take_folder(dir: &Path) -> Result<DataLock, String> {
    lock::take(dir)
}
