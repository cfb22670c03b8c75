//! Records of segments: one row an entry, each record with its length before it.

use sqlx::PgConnection;

/// The part of the ledger's statement that keeps records.
pub(in crate::audit) const SEGMENTS: &str = ", segments AS (
        INSERT INTO audit.segments (index, records)
        SELECT s.* FROM head, unnest({0}::int8[], {1}::bytea[]) AS s (index, records))";

/// Keeps records outside of a run.
pub(in crate::audit) async fn keep(conn: &mut PgConnection, index: i64, records: &[u8]) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO audit.segments (index, records) VALUES ($1, $2)")
        .bind(index)
        .bind(records)
        .execute(conn)
        .await
        .map(|_| ())
}

/// The records of an entry, as they are kept.
pub(in crate::audit) async fn records(conn: &mut PgConnection, index: i64) -> Result<Option<Vec<u8>>, sqlx::Error> {
    sqlx::query_scalar("SELECT records FROM audit.segments WHERE index = $1").bind(index).fetch_optional(conn).await
}
