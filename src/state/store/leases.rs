//! Rows of leases, and of the keys that hang on them.

use std::collections::HashMap;
use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row as _};
use uuid::Uuid;

use crate::kernel::Timestamp;
use crate::ledger::Sign;
use crate::state::leases::number;

/// A lease as it stands.
#[derive(Clone, Debug)]
pub(in crate::state) struct Row {
    pub id: Uuid,
    pub owner: String,
    pub ttl_ms: i64,
    pub granted_index: i64,
    pub beat: i64,
    pub renewed: Timestamp,
    pub lock: Option<String>,
}

const COLUMNS: &str = "id, owner, ttl_ms, granted_index, beat, renewed, lock";

fn row(r: &PgRow) -> Result<Row, sqlx::Error> {
    Ok(Row {
        id: r.try_get("id")?,
        owner: r.try_get("owner")?,
        ttl_ms: r.try_get("ttl_ms")?,
        granted_index: r.try_get("granted_index")?,
        beat: r.try_get("beat")?,
        renewed: Timestamp::from_offset(r.try_get("renewed")?),
        lock: r.try_get("lock")?,
    })
}

pub(in crate::state) async fn one(conn: &mut PgConnection, id: Uuid) -> Result<Option<Row>, sqlx::Error> {
    let sql = format!("SELECT {COLUMNS} FROM state.leases WHERE id = $1");
    let found = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(id).fetch_optional(conn).await?;
    found.as_ref().map(row).transpose()
}

/// Leases in order of their ids, which is that of their grants, after `after`.
pub(in crate::state) async fn list(
    conn: &mut PgConnection,
    after: Option<Uuid>,
    limit: i64,
) -> Result<Vec<Row>, sqlx::Error> {
    let sql = format!("SELECT {COLUMNS} FROM state.leases WHERE $1::uuid IS NULL OR id > $1 ORDER BY id LIMIT $2");
    let found = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(after).bind(limit).fetch_all(conn).await?;
    found.iter().map(row).collect()
}

/// Which of these are there and that client's.
pub(in crate::state) async fn owned(
    conn: &mut PgConnection,
    ids: &[Uuid],
    owner: &str,
) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar("SELECT id FROM state.leases WHERE id = ANY ($1) AND owner = $2")
        .bind(ids)
        .bind(owner)
        .fetch_all(conn)
        .await
}

/// Leases of these numbers, with them.
pub(in crate::state) async fn numbered(
    conn: &mut PgConnection,
    numbers: &[i64],
) -> Result<HashMap<i64, Uuid>, sqlx::Error> {
    let rows = sqlx::query("SELECT number, id FROM state.leases WHERE number = ANY ($1)")
        .bind(numbers)
        .fetch_all(conn)
        .await?;
    rows.iter().map(|r| Ok((r.try_get("number")?, r.try_get("id")?))).collect()
}

pub(in crate::state) async fn grant(conn: &mut PgConnection, lease: &Row) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO state.leases (id, owner, ttl_ms, granted_index, beat, renewed, lock, number)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
    )
    .bind(lease.id)
    .bind(&lease.owner)
    .bind(lease.ttl_ms)
    .bind(lease.granted_index)
    .bind(lease.beat)
    .bind(lease.renewed.to_offset())
    .bind(&lease.lock)
    .bind(number(lease.id))
    .execute(conn)
    .await?;
    Ok(())
}

/// Gives leases their whole time again, each if it is that client's; which there were, whose, and their time to live.
pub(in crate::state) async fn renew(
    conn: &mut PgConnection,
    index: i64,
    now: Timestamp,
    ids: &[Uuid],
    owners: &[&str],
) -> Result<HashMap<Uuid, (String, i64)>, sqlx::Error> {
    let rows = sqlx::query(
        "UPDATE state.leases AS l SET beat = $1, renewed = $2 FROM unnest($3::uuid[], $4::text[]) AS r (id, owner)
         WHERE l.id = r.id AND l.owner = r.owner RETURNING l.id, l.owner, l.ttl_ms",
    )
    .bind(index)
    .bind(now.to_offset())
    .bind(ids)
    .bind(owners)
    .fetch_all(conn)
    .await?;
    rows.iter().map(|r| Ok((r.try_get("id")?, (r.try_get("owner")?, r.try_get("ttl_ms")?)))).collect()
}

pub(in crate::state) async fn keep_records(
    conn: &mut PgConnection,
    index: i64,
    records: &[Vec<u8>],
) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO state.renewals (index, records) VALUES ($1, $2)")
        .bind(index)
        .bind(records)
        .execute(conn)
        .await?;
    Ok(())
}

/// The records of an entry of renewals.
pub(in crate::state) async fn records(conn: &mut PgConnection, index: i64) -> Result<Vec<Vec<u8>>, sqlx::Error> {
    let found = sqlx::query_scalar("SELECT records FROM state.renewals WHERE index = $1").bind(index);
    Ok(found.fetch_optional(conn).await?.unwrap_or_default())
}

/// The signs of life of all leases.
pub(in crate::state) async fn signs(conn: &mut PgConnection) -> Result<Vec<Sign<Uuid>>, sqlx::Error> {
    let rows = sqlx::query("SELECT id, beat, ttl_ms FROM state.leases").fetch_all(conn).await?;
    rows.iter()
        .map(|r| {
            let ttl: i64 = r.try_get("ttl_ms")?;
            let ttl = Duration::from_millis(u64::try_from(ttl).unwrap_or(0));
            Ok(Sign { of: r.try_get("id")?, beat: r.try_get("beat")?, ttl })
        })
        .collect()
}

/// Names of up to `limit` keys that hang on a lease, in order.
pub(in crate::state) async fn keys(conn: &mut PgConnection, id: Uuid, limit: i64) -> Result<Vec<Vec<u8>>, sqlx::Error> {
    sqlx::query_scalar("SELECT key FROM state.kv WHERE lease = $1 ORDER BY key LIMIT $2")
        .bind(id)
        .bind(limit)
        .fetch_all(conn)
        .await
}

/// Deletes up to `limit` keys that hang on a lease; which.
pub(in crate::state) async fn drop_keys(
    conn: &mut PgConnection,
    id: Uuid,
    index: i64,
    limit: i64,
) -> Result<Vec<Vec<u8>>, sqlx::Error> {
    sqlx::query_scalar(
        "WITH gone AS (
             DELETE FROM state.kv WHERE key IN (SELECT key FROM state.kv WHERE lease = $1 ORDER BY key LIMIT $3)
             RETURNING key, index, created_index
         ), told AS (
             INSERT INTO state.history (key, index, created_index, version, previous, content_type, value)
             SELECT key, $2, created_index, 0, index, '', '' FROM gone
         ) SELECT key FROM gone",
    )
    .bind(id)
    .bind(index)
    .bind(limit)
    .fetch_all(conn)
    .await
}

pub(in crate::state) async fn remove(conn: &mut PgConnection, id: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM state.leases WHERE id = $1").bind(id).execute(conn).await.map(|_| ())
}
