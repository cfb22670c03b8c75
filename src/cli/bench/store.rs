//! What the bench does in the database itself: the least that a durable put can cost, and a log made larger than the bench has
//! time to write.

use std::path::Path;

use anyhow::Context as _;
use axum::extract::{Path as Key, State};
use axum::http::StatusCode;
use axum::routing::put;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Connection as _, PgConnection, PgPool};

use crate::kernel::crypto::Hash;
use crate::kernel::supervisor::detach;
use crate::ledger::merkle::Frontier;

/// The private cluster of the daemon of that folder.
fn options(daemon: &Path) -> PgConnectOptions {
    PgConnectOptions::new_without_pgpass().socket(daemon.join("run")).username("sop").database("sop")
}

/// One bare INSERT behind axum, on the same PostgreSQL: no caller is known, nothing is decided, recorded or kept of the past.
/// The server ends with the bench.
pub(super) struct Bare {
    address: String,
}

impl Bare {
    /// Beside our tables, in the private cluster of the daemon of that folder.
    pub async fn start(daemon: &Path) -> anyhow::Result<Self> {
        let pool = PgPoolOptions::new().max_connections(16).test_before_acquire(false);
        let pool = pool.connect_with(options(daemon)).await?;
        sqlx::raw_sql(
            "CREATE SCHEMA bench; CREATE TABLE bench.bare (key bytea PRIMARY KEY, value bytea NOT NULL) WITH (fillfactor = 60)",
        )
        .execute(&pool)
        .await?;
        let router = axum::Router::new().route("/{*key}", put(insert)).with_state(pool);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr().context("a bound socket has an address")?.to_string();
        let listener = axum::serve::ListenerExt::tap_io(listener, |s| {
            let _ = s.set_nodelay(true);
        });
        detach(async move { axum::serve(listener, router).await.is_ok() });
        Ok(Self { address })
    }

    pub fn address(&self) -> &str {
        &self.address
    }
}

async fn insert(State(pool): State<PgPool>, Key(key): Key<String>, body: axum::body::Bytes) -> StatusCode {
    let done = sqlx::query(
        "INSERT INTO bench.bare (key, value) VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
    )
    .bind(key.as_bytes())
    .bind(&body[..])
    .execute(&pool)
    .await;
    if done.is_ok() { StatusCode::OK } else { StatusCode::INTERNAL_SERVER_ERROR }
}

/// Entries that one statement makes.
const CHUNK: i64 = 500_000;

/// Puts leaves into the log until it has `size`, as another daemon would in one turn: true hashes, the head with them, and no
/// details. The search is told that it has looked at them.
pub(super) async fn grow(daemon: &Path, size: i64) -> anyhow::Result<()> {
    let mut conn = PgConnection::connect_with(&options(daemon)).await?;
    // One by one: the daemon is at work on these tables.
    for table in ["ledger.entries", "ledger.details", "audit.segments"] {
        let sql = format!(
            "CREATE TABLE IF NOT EXISTS {table}_8388608 PARTITION OF {table} FOR VALUES FROM (8388608) TO (16777216)"
        );
        sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&mut conn).await?;
    }
    let mut tx = conn.begin().await?;
    let head = "SELECT index, frontier FROM ledger.head WHERE id = 1 FOR UPDATE";
    let (index, frontier): (i64, Vec<u8>) = sqlx::query_as(head).fetch_one(&mut *tx).await?;
    let mut frontier = Frontier::decode(&frontier, (index + 1).unsigned_abs()).context("the head has no frontier")?;
    while frontier.size() < size.unsigned_abs() {
        let from = i64::try_from(frontier.size())?;
        let hashes: Vec<Vec<u8>> = sqlx::query_scalar(
            "WITH made AS (
                 SELECT i, convert_to(format('{\"action\":\"bench:leaf\",\"body\":\"\",\"n\":%s,\"outcome\":\"ok\",\"room\":\"bench\",\"time\":\"2026-01-01T00:00:00.000Z\",\"v\":1}', i), 'UTF8') AS leaf
                 FROM generate_series($1::int8, $2::int8) AS i
             ), kept AS (
                 INSERT INTO ledger.entries (index, leaf, hash, batch, touched)
                 SELECT i, leaf, sha256('\\x00'::bytea || leaf), $3, '' FROM made
                 RETURNING index, hash
             ) SELECT hash FROM kept ORDER BY index",
        )
        .bind(from)
        .bind((from + CHUNK).min(size) - 1)
        .bind(uuid::Uuid::nil())
        .fetch_all(&mut *tx)
        .await?;
        for hash in hashes {
            frontier.push(Hash::try_from(hash).map_err(|_| anyhow::anyhow!("a hash has 32 bytes"))?);
        }
    }
    sqlx::query("UPDATE ledger.head SET index = $1, root = $2, frontier = $3 WHERE id = 1")
        .bind(size - 1)
        .bind(&frontier.root()[..])
        .bind(frontier.encode())
        .execute(&mut *tx)
        .await?;
    sqlx::query("UPDATE audit.indexed SET at = $1 WHERE id = 1").bind(size / 256 * 256 - 1).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(())
}

/// Tokens that were revoked and have not expired, for a daemon that starts after this.
pub(super) async fn revoke(daemon: &Path, count: i64) -> anyhow::Result<()> {
    let mut conn = PgConnection::connect_with(&options(daemon)).await?;
    sqlx::query(
        "INSERT INTO token.revocations (jti, client_id, expires, index)
         SELECT gen_random_uuid()::text, 'bench', now() + interval '1 hour', 0 FROM generate_series(1, $1)",
    )
    .bind(count)
    .execute(&mut conn)
    .await?;
    Ok(())
}
