//! The ledger's SQL.

mod batch;

use std::ops::Range;
use std::time::Duration;

use sqlx::{AssertSqlSafe, PgConnection, Row as _};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::kernel::Timestamp;
use crate::kernel::crypto::Hash;
use crate::kernel::web::Idempotency;
use crate::telemetry;

use super::entry::SIGNAL;
use super::touch::Touch;

pub(super) use batch::{AHEAD_MS, Batch, advance, write_rows};

/// The head row, and the database's clock when it was read.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub index: i64,
    pub root: Hash,
    pub frontier: Vec<u8>,
    pub time: Timestamp,
    pub database_time: Timestamp,
}

/// Starts the transaction of a turn and takes the fence. The locking statement reads nothing but the row it locks: a
/// statement that waited for the lock would show the new head beside old rows of other tables (rule 2). Sent as one simple
/// query; each statement of it has a snapshot of its own.
const LOCK: &str = "BEGIN ISOLATION LEVEL READ COMMITTED;
    SELECT index, root, frontier, (extract(epoch FROM time) * 1000)::int8 AS time,
           (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS database_time
    FROM ledger.head WHERE id = 1 FOR UPDATE";

pub(super) async fn lock_head(conn: &mut PgConnection) -> Result<Option<Head>, sqlx::Error> {
    let rows = sqlx::raw_sql(LOCK).fetch_all(conn).await?;
    rows.last().map(head).transpose()
}

fn head(row: &sqlx::postgres::PgRow) -> Result<Head, sqlx::Error> {
    Ok(Head {
        index: row.try_get("index")?,
        root: hash(row.try_get("root")?)?,
        frontier: row.try_get("frontier")?,
        time: Timestamp::from_millis(row.try_get("time")?),
        database_time: Timestamp::from_millis(row.try_get("database_time")?),
    })
}

fn hash(bytes: Vec<u8>) -> Result<Hash, sqlx::Error> {
    bytes.try_into().map_err(|_| sqlx::Error::Decode("a hash in the ledger does not have 32 bytes".into()))
}

pub(super) async fn head_index(conn: &mut PgConnection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT index FROM ledger.head WHERE id = 1").fetch_one(conn).await
}

/// This transaction holds no lock, and may stand idle while what it read is made into what is wanted: a hundred thousand rows took
/// a slow machine longer than a writer may hold the head.
pub(super) async fn unhurried(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query("SET LOCAL idle_in_transaction_session_timeout = '60s'").execute(conn).await.map(|_| ())
}

/// The leaf of an entry that is there.
pub(super) async fn leaf(conn: &mut PgConnection, index: i64) -> Result<Vec<u8>, sqlx::Error> {
    sqlx::query_scalar("SELECT leaf FROM ledger.entries WHERE index = $1").bind(index).fetch_one(conn).await
}

/// Makes the head of an empty log; a head that is there stays as it is.
pub(super) async fn make_head(conn: &mut PgConnection, root: &Hash) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO ledger.head (id, index, root, frontier, time, batch)
         VALUES (1, -1, $1, '', 'epoch', '00000000-0000-0000-0000-000000000000') ON CONFLICT (id) DO NOTHING",
    )
    .bind(root.as_slice())
    .execute(conn)
    .await?;
    Ok(())
}

/// Changes nothing, but its commit is one that a standby must have before it is acknowledged, and with it all before it.
pub(super) async fn touch_head(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE ledger.head SET index = index WHERE id = 1").execute(conn).await.map(|_| ())
}

/// Commits. One that is answered with a warning may be on this host alone (the wait for the standby was cancelled): that is no
/// answer.
pub(super) async fn commit(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    let (done, warned) = telemetry::warned(sqlx::raw_sql("COMMIT").execute(conn)).await;
    done?;
    unwarned(warned)
}

/// An error if PostgreSQL warned.
fn unwarned(warned: bool) -> Result<(), sqlx::Error> {
    if !warned {
        return Ok(());
    }
    Err(sqlx::Error::Protocol("a commit was answered with a warning: it may not have been replicated".into()))
}

pub(super) async fn rollback(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::raw_sql("ROLLBACK").execute(conn).await.map(|_| ())
}

/// Whether a batch of that id stands after `before`. Only meaningful while the head is locked.
pub(super) async fn batch_stands(conn: &mut PgConnection, before: i64, id: Uuid) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("SELECT EXISTS (SELECT FROM ledger.entries WHERE index > $1 AND batch = $2)")
        .bind(before)
        .bind(id)
        .fetch_one(conn)
        .await
}

/// An entry as another daemon needs it to catch up.
pub(super) struct Advance {
    pub index: i64,
    pub hash: Hash,
    pub touched: Vec<Touch>,
}

/// Entries after `after` up to `to`, at most `limit`, in order.
pub(super) async fn entries_after(
    conn: &mut PgConnection,
    after: i64,
    to: i64,
    limit: i64,
) -> Result<Vec<Advance>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT index, hash, touched FROM ledger.entries WHERE index > $1 AND index <= $2 ORDER BY index LIMIT $3",
    )
    .bind(after)
    .bind(to)
    .bind(limit)
    .fetch_all(conn)
    .await?;
    rows.iter()
        .map(|row| {
            let touched: Vec<u8> = row.try_get("touched")?;
            let touched = Touch::decode(&touched)
                .ok_or_else(|| sqlx::Error::Decode("the column `touched` of an entry cannot be read".into()))?;
            Ok(Advance { index: row.try_get("index")?, hash: hash(row.try_get("hash")?)?, touched })
        })
        .collect()
}

/// Details of entries in (`after`, `to`] that carry a signal, in order, at most `limit`.
pub(super) async fn signals(
    conn: &mut PgConnection,
    after: i64,
    to: i64,
    limit: i64,
) -> Result<Vec<(i64, Vec<u8>)>, sqlx::Error> {
    // A touch begins with the length of its kind and the kind.
    let rows = sqlx::query(
        "SELECT e.index, d.details FROM ledger.entries AS e JOIN ledger.details AS d USING (index)
         WHERE e.index > $1 AND e.index <= $2 AND d.index > $1 AND d.index <= $2 AND position($3 IN e.touched) > 0 AND d.details IS NOT NULL
         ORDER BY e.index LIMIT $4",
    )
    .bind(after)
    .bind(to)
    .bind([&[SIGNAL.len() as u8], SIGNAL.as_bytes()].concat())
    .bind(limit)
    .fetch_all(conn)
    .await?;
    rows.iter().map(|r| Ok((r.try_get("index")?, r.try_get("details")?))).collect()
}

/// A stored outcome.
pub(super) struct Outcome {
    pub fingerprint: [u8; 32],
    pub index: Option<i64>,
    pub sealed: Vec<u8>,
    pub time: Timestamp,
}

pub(super) async fn outcome(conn: &mut PgConnection, key: &[u8; 32]) -> Result<Option<Outcome>, sqlx::Error> {
    let row = sqlx::query("SELECT fingerprint, index, sealed, time FROM ledger.outcomes WHERE key = $1")
        .bind(key.as_slice())
        .fetch_optional(conn)
        .await?;
    row.map(|row| {
        Ok(Outcome {
            fingerprint: hash(row.try_get("fingerprint")?)?,
            index: row.try_get("index")?,
            sealed: row.try_get("sealed")?,
            time: Timestamp::from_offset(row.try_get("time")?),
        })
    })
    .transpose()
}

pub(super) async fn keep_outcome(
    conn: &mut PgConnection,
    key: &Idempotency,
    index: Option<i64>,
    sealed: &[u8],
    time: Timestamp,
) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO ledger.outcomes (key, fingerprint, index, sealed, time) VALUES ($1, $2, $3, $4, $5)")
        .bind(key.key.as_slice())
        .bind(key.fingerprint.as_slice())
        .bind(index)
        .bind(sealed)
        .bind(time.to_offset())
        .execute(conn)
        .await?;
    Ok(())
}

/// Drops outcomes older than `before`, at most a thousand at a time.
pub(super) async fn drop_outcomes(conn: &mut PgConnection, before: Timestamp) -> Result<u64, sqlx::Error> {
    let done = sqlx::query(
        "DELETE FROM ledger.outcomes WHERE key IN (SELECT key FROM ledger.outcomes WHERE time < $1 LIMIT 1000)",
    )
    .bind(before.to_offset())
    .execute(conn)
    .await?;
    Ok(done.rows_affected())
}

pub(super) async fn backend_pid(conn: &mut PgConnection) -> Result<i32, sqlx::Error> {
    sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(conn).await
}

/// A daemon's session that holds what another waits for.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Holder {
    pub pid: i32,
    pub name: String,
    /// When anything last came from it, seconds.
    pub heard: f64,
}

/// The daemon's session that holds what `waiting` waits for; sessions of others are none of ours.
///
/// `pg_blocking_pids` also names those that merely queue before us, so the chain is followed to whoever blocks and is not blocked.
pub(super) async fn holder(conn: &mut PgConnection, waiting: i32) -> Result<Option<Holder>, sqlx::Error> {
    let row = sqlx::query(
        "WITH RECURSIVE chain AS (
             SELECT unnest(pg_blocking_pids($1)) AS pid
             UNION SELECT unnest(pg_blocking_pids(chain.pid)) FROM chain
         )
         SELECT a.pid, a.application_name AS name, extract(epoch FROM greatest(a.query_start, a.state_change))::float8 AS heard
         FROM chain JOIN pg_stat_activity AS a ON a.pid = chain.pid
         WHERE cardinality(pg_blocking_pids(a.pid)) = 0 AND a.application_name LIKE 'sop/%'",
    )
    .bind(waiting)
    .fetch_optional(conn)
    .await?;
    row.map(|r| Ok(Holder { pid: r.try_get("pid")?, name: r.try_get("name")?, heard: r.try_get("heard")? })).transpose()
}

pub(super) async fn end_session(conn: &mut PgConnection, pid: i32) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("SELECT pg_terminate_backend($1)").bind(pid).fetch_one(conn).await
}

/// The indexes that have a place: those of the partitions that are attached. What is before was detached by an operator, what is
/// after has no partition yet.
pub async fn attached(conn: &mut PgConnection) -> Result<Range<i64>, sqlx::Error> {
    let bounds: Vec<String> = sqlx::query_scalar(
        "SELECT pg_get_expr(c.relpartbound, c.oid) FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
         WHERE i.inhparent = 'ledger.entries'::regclass",
    )
    .fetch_all(conn)
    .await?;
    // FOR VALUES FROM ('0') TO ('8388608')
    let place = |bound: &String, n: usize| bound.split('\'').nth(n).and_then(|n| n.parse::<i64>().ok());
    let start = bounds.iter().filter_map(|b| place(b, 1)).min().unwrap_or(0);
    Ok(start..bounds.iter().filter_map(|b| place(b, 3)).max().unwrap_or(0))
}

/// Indexes in one partition: a whole number of tiles at every level that matters.
pub(super) const PARTITION: i64 = 8_388_608;

/// Makes the partition that begins at `from`. Made apart and then attached, which does not lock readers out.
pub(super) async fn add_partition(
    conn: &mut PgConnection,
    from: i64,
    beside: &[&'static str],
) -> Result<(), sqlx::Error> {
    let to = from + PARTITION;
    let mut sql = String::from("BEGIN;");
    for table in ["ledger.entries", "ledger.details"].iter().chain(beside) {
        sql.push_str(&format!(
            "CREATE TABLE IF NOT EXISTS {table}_{from} (LIKE {table} INCLUDING ALL);
             ALTER TABLE {table} ATTACH PARTITION {table}_{from} FOR VALUES FROM ({from}) TO ({to});"
        ));
    }
    sql.push_str("COMMIT");
    let done = sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *conn).await;
    if done.is_err() {
        // Another daemon was quicker; the transaction must not stay open.
        rollback(conn).await?;
    }
    Ok(())
}

/// Sets a setting if nobody did before, and answers what it is.
pub(super) async fn settle_setting(conn: &mut PgConnection, name: &str, value: &[u8]) -> Result<Vec<u8>, sqlx::Error> {
    sqlx::query("INSERT INTO ledger.settings (name, value) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING")
        .bind(name)
        .bind(value)
        .execute(&mut *conn)
        .await?;
    sqlx::query_scalar("SELECT value FROM ledger.settings WHERE name = $1").bind(name).fetch_one(conn).await
}

/// The database's clock, and whether another daemon listens for news.
pub(super) async fn surroundings(conn: &mut PgConnection, daemon: &str) -> Result<(Timestamp, bool), sqlx::Error> {
    let (t, others): (OffsetDateTime, bool) = sqlx::query_as(
        "SELECT clock_timestamp(), EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()
                                           AND application_name LIKE 'sop/%/listener' AND application_name <> $1)",
    )
    .bind(format!("sop/{daemon}/listener"))
    .fetch_one(conn)
    .await?;
    Ok((Timestamp::from_offset(t), others))
}

/// Tells who listens that somebody has come. No index is this small, so there is nothing to read.
pub(super) async fn announce(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query("SELECT pg_notify('sop_ledger', '-1')").execute(conn).await.map(|_| ())
}

/// A claim as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ClaimRow {
    pub holder: String,
    pub token: i64,
    pub beats: i64,
    pub ttl_ms: i64,
}

pub(super) async fn claim(conn: &mut PgConnection, name: &str) -> Result<Option<ClaimRow>, sqlx::Error> {
    let row = sqlx::query("SELECT holder, token, beats, ttl_ms FROM ledger.claims WHERE name = $1")
        .bind(name)
        .fetch_optional(conn)
        .await?;
    row.map(|r| {
        Ok(ClaimRow {
            holder: r.try_get("holder")?,
            token: r.try_get("token")?,
            beats: r.try_get("beats")?,
            ttl_ms: r.try_get("ttl_ms")?,
        })
    })
    .transpose()
}

/// Renews; `false` if it is no longer that holder's.
pub(super) async fn beat(
    conn: &mut PgConnection,
    name: &str,
    holder: &str,
    token: i64,
    now: Timestamp,
) -> Result<bool, sqlx::Error> {
    let done = sqlx::query(
        "UPDATE ledger.claims SET beats = beats + 1, time = $4 WHERE name = $1 AND holder = $2 AND token = $3",
    )
    .bind(name)
    .bind(holder)
    .bind(token)
    .bind(now.to_offset())
    .execute(conn)
    .await?;
    Ok(done.rows_affected() == 1)
}

pub(super) async fn take_claim(
    conn: &mut PgConnection,
    name: &str,
    holder: &str,
    token: i64,
    ttl: Duration,
    now: Timestamp,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO ledger.claims (name, holder, token, beats, ttl_ms, time) VALUES ($1, $2, $3, 0, $4, $5)
         ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, token = excluded.token, beats = 0,
             ttl_ms = excluded.ttl_ms, time = excluded.time",
    )
    .bind(name)
    .bind(holder)
    .bind(token)
    .bind(i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX))
    .bind(now.to_offset())
    .execute(conn)
    .await?;
    Ok(())
}

pub(super) async fn drop_claim(conn: &mut PgConnection, name: &str) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM ledger.claims WHERE name = $1").bind(name).execute(conn).await?;
    Ok(())
}
