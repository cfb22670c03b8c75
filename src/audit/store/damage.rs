//! What the self-audit found, and what it reads to find it.

use sqlx::{PgConnection, Row as _};

use crate::kernel::Timestamp;

/// An entry with all that is stored of it, as it is stored.
pub(in crate::audit) struct Row {
    pub index: i64,
    pub leaf: Vec<u8>,
    pub hash: Vec<u8>,
    pub salt: Option<Vec<u8>>,
    pub details: Option<Vec<u8>>,
    pub segment: Option<Vec<u8>>,
}

/// Entries from `from` to before `to`, in order.
pub(in crate::audit) async fn rows(conn: &mut PgConnection, from: i64, to: i64) -> Result<Vec<Row>, sqlx::Error> {
    // The range is said of both tables: a join does not carry it over.
    let rows = sqlx::query(
        "SELECT e.index, e.leaf, e.hash, d.salt, d.details, d.segment FROM ledger.entries e
         LEFT JOIN ledger.details d ON d.index = e.index AND d.index >= $1 AND d.index < $2
         WHERE e.index >= $1 AND e.index < $2 ORDER BY e.index",
    )
    .bind(from)
    .bind(to)
    .fetch_all(conn)
    .await?;
    let read = |r: &sqlx::postgres::PgRow| {
        Ok(Row {
            index: r.try_get("index")?,
            leaf: r.try_get("leaf")?,
            hash: r.try_get("hash")?,
            salt: r.try_get("salt")?,
            details: r.try_get("details")?,
            segment: r.try_get("segment")?,
        })
    };
    rows.iter().map(read).collect()
}

/// A whole tile as it is kept.
pub(in crate::audit) async fn tile(
    conn: &mut PgConnection,
    level: i16,
    n: i64,
) -> Result<Option<Vec<u8>>, sqlx::Error> {
    sqlx::query_scalar("SELECT hashes FROM audit.tiles WHERE level = $1 AND n = $2")
        .bind(level)
        .bind(n)
        .fetch_optional(conn)
        .await
}

/// Index, root and frontier of the head.
pub(in crate::audit) async fn head(conn: &mut PgConnection) -> Result<Option<(i64, Vec<u8>, Vec<u8>)>, sqlx::Error> {
    sqlx::query_as("SELECT index, root, frontier FROM ledger.head WHERE id = 1").fetch_optional(conn).await
}

/// Keeps what was found; what is known stays as it is.
pub(in crate::audit) async fn keep(
    conn: &mut PgConnection,
    found: &[(Option<i64>, String)],
    now: Timestamp,
) -> Result<(), sqlx::Error> {
    for (index, what) in found {
        sqlx::query("INSERT INTO audit.damage (what, index, time) VALUES ($1, $2, $3) ON CONFLICT (what) DO NOTHING")
            .bind(what)
            .bind(index)
            .bind(now.to_offset())
            .execute(&mut *conn)
            .await?;
    }
    Ok(())
}

/// What was found and not accepted, the lowest index first.
pub(in crate::audit) async fn open(conn: &mut PgConnection) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar("SELECT what FROM audit.damage WHERE accepted IS NULL ORDER BY index NULLS LAST, what LIMIT 100")
        .fetch_all(conn)
        .await
}

/// What was accepted.
pub(in crate::audit) async fn accepted(conn: &mut PgConnection) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar("SELECT what FROM audit.damage WHERE accepted IS NOT NULL").fetch_all(conn).await
}

/// Accepts all that was found, by the entry at `index`.
pub(in crate::audit) async fn accept(conn: &mut PgConnection, index: i64) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE audit.damage SET accepted = $1 WHERE accepted IS NULL")
        .bind(index)
        .execute(conn)
        .await
        .map(|_| ())
}
