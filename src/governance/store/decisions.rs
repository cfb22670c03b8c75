//! Decisions: segments of them, and those that entries carry.

use sqlx::{PgConnection, Row as _};
use uuid::Uuid;

use crate::ledger::hot::Column;

use super::{EntityName, Row, row};

/// A segment's part of the ledger's statement.
pub(in crate::governance) const SEGMENTS: &str = ", decided AS (
        INSERT INTO governance.segments (index, count, first, last, records)
        SELECT s.index, s.count, s.first, s.last, s.records FROM head,
               unnest({0}::int8[], {1}::int8[], {2}::uuid[], {3}::uuid[], {4}::bytea[]) AS s (index, count, first, last, records)
    )";

/// A segment to be written.
pub(in crate::governance) struct Segment {
    pub index: i64,
    pub count: i64,
    pub first: Uuid,
    pub last: Uuid,
    pub records: Vec<u8>,
}

/// The columns of [`SEGMENTS`].
pub(in crate::governance) fn columns(segments: Vec<Segment>) -> Vec<Column> {
    let ints = |f: fn(&Segment) -> i64| Column::Ints(segments.iter().map(f).collect());
    let ids = |f: fn(&Segment) -> Uuid| Column::Ids(segments.iter().map(f).collect());
    let (indexes, counts) = (ints(|s| s.index), ints(|s| s.count));
    let (firsts, lasts) = (ids(|s| s.first), ids(|s| s.last));
    vec![indexes, counts, firsts, lasts, Column::Bytes(segments.into_iter().map(|s| s.records).collect())]
}

/// The records of a segment, as they were framed.
pub(in crate::governance) async fn records(
    conn: &mut PgConnection,
    index: i64,
) -> Result<Option<Vec<u8>>, sqlx::Error> {
    sqlx::query_scalar("SELECT records FROM governance.segments WHERE index = $1")
        .bind(index)
        .fetch_optional(conn)
        .await
}

/// Segments that can hold this decision, the likeliest first.
pub(in crate::governance) async fn around(
    conn: &mut PgConnection,
    id: Uuid,
) -> Result<Vec<(i64, Vec<u8>)>, sqlx::Error> {
    sqlx::query_as(
        "SELECT index, records FROM (SELECT * FROM governance.segments WHERE last >= $1 ORDER BY last LIMIT 64) AS s WHERE first <= $1",
    )
    .bind(id)
    .fetch_all(conn)
    .await
}

/// What an entry has of decisions.
pub(in crate::governance) struct Kept {
    pub index: i64,
    pub leaf: Vec<u8>,
    pub details: Option<Vec<u8>>,
    /// A segment's.
    pub records: Option<Vec<u8>>,
}

/// Entries from one index to another.
pub(in crate::governance) async fn between(
    conn: &mut PgConnection,
    from: i64,
    to: i64,
) -> Result<Vec<Kept>, sqlx::Error> {
    // The range is said of each table: a join does not carry it over.
    let rows = sqlx::query(
        "SELECT e.index, e.leaf, d.details, s.records FROM ledger.entries AS e
         LEFT JOIN ledger.details AS d ON d.index = e.index AND d.index BETWEEN $1 AND $2
         LEFT JOIN governance.segments AS s ON s.index = e.index AND s.index BETWEEN $1 AND $2
         WHERE e.index BETWEEN $1 AND $2 ORDER BY e.index",
    )
    .bind(from)
    .bind(to)
    .fetch_all(conn)
    .await?;
    let kept = |r: &sqlx::postgres::PgRow| {
        Ok(Kept {
            index: r.try_get("index")?,
            leaf: r.try_get("leaf")?,
            details: r.try_get("details")?,
            records: r.try_get("records")?,
        })
    };
    rows.iter().map(kept).collect()
}

/// The leaf at or after an index.
pub(in crate::governance) async fn leaf(
    conn: &mut PgConnection,
    index: i64,
) -> Result<Option<(i64, Vec<u8>)>, sqlx::Error> {
    sqlx::query_as("SELECT index, leaf FROM ledger.entries WHERE index >= $1 ORDER BY index LIMIT 1")
        .bind(index)
        .fetch_optional(conn)
        .await
}

/// How far from an index up to another one gets with records of so many bytes; one entry at least.
pub(in crate::governance) async fn reach(
    conn: &mut PgConnection,
    from: i64,
    to: i64,
    bytes: i64,
) -> Result<i64, sqlx::Error> {
    let first: Option<i64> = sqlx::query_scalar(
        "SELECT min(index) FROM (
             SELECT index, sum(octet_length(records)) OVER (ORDER BY index) AS size FROM governance.segments
             WHERE index BETWEEN $1 AND $2) AS s
         WHERE size > $3 AND index > $1",
    )
    .bind(from)
    .bind(to)
    .bind(bytes)
    .fetch_one(conn)
    .await?;
    Ok(first.map_or(to, |first| first - 1))
}

/// Entities as they were at an index, by their names, those after one of them; without a row it had been removed.
pub(in crate::governance) async fn all_at(
    conn: &mut PgConnection,
    at: i64,
    after: Option<&EntityName>,
    limit: usize,
) -> Result<Vec<(EntityName, Option<Row>)>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT DISTINCT ON (type, id) type, id, attrs, parents, index FROM governance.entity_history
         WHERE index <= $1 AND ($2::text IS NULL OR (type, id) > ($2, $3))
         ORDER BY type, id, index DESC LIMIT $4",
    )
    .bind(at)
    .bind(after.map(|name| &name.kind))
    .bind(after.map(|name| &name.id))
    .bind(i64::try_from(limit).unwrap_or(i64::MAX))
    .fetch_all(conn)
    .await?;
    rows.iter().map(version).collect()
}

/// One version of an entity.
fn version(r: &sqlx::postgres::PgRow) -> Result<(EntityName, Option<Row>), sqlx::Error> {
    let name = EntityName { kind: r.try_get("type")?, id: r.try_get("id")? };
    let removed = r.try_get::<Option<Vec<u8>>, _>("attrs")?.is_none();
    Ok((name, if removed { None } else { Some(row(r)?) }))
}

/// Changes of entities after one index up to another, in order; without a row the entity was removed.
pub(in crate::governance) async fn changes(
    conn: &mut PgConnection,
    after: i64,
    to: i64,
) -> Result<Vec<(i64, EntityName, Option<Row>)>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT type, id, attrs, parents, index FROM governance.entity_history WHERE index > $1 AND index <= $2 ORDER BY index",
    )
    .bind(after)
    .bind(to)
    .fetch_all(conn)
    .await?;
    let change = |r: &sqlx::postgres::PgRow| {
        let (name, row) = version(r)?;
        Ok((r.try_get("index")?, name, row))
    };
    rows.iter().map(change).collect()
}
