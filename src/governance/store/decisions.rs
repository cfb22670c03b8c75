//! Decisions: segments of them, and those that entries carry.

use sqlx::{PgConnection, Row as _};
use uuid::Uuid;

use crate::ledger::hot::Column;

use super::{EntityName, Row, row};

/// A segment's part of the ledger's statement.
pub(in crate::governance) const SEGMENTS: &str = ", decided AS (
        INSERT INTO governance.segments (index, count, span, marks, sieve, records)
        SELECT s.index, s.count, int8range(s.first, s.last, '[]'), s.marks, s.sieve, s.records
        FROM head,
               unnest({0}::int8[], {1}::int8[], {2}::int8[], {3}::int8[], {4}::bytea[], {5}::bytea[], {6}::bytea[])
               AS s (index, count, first, last, marks, sieve, records)
    )";

/// Bytes of an id that a segment keeps beside its records.
const MARK: usize = 4;

/// A segment to be written.
#[derive(Clone)]
pub(in crate::governance) struct Segment {
    pub index: i64,
    count: i64,
    first: i64,
    last: i64,
    marks: Vec<u8>,
    sieve: Vec<u8>,
    records: Vec<u8>,
}

impl Segment {
    /// Of records with these ids, in order; `index` is its entry's.
    pub fn new(index: i64, ids: &[Uuid], records: Vec<u8>, sieve: Vec<u8>) -> Self {
        let times = || ids.iter().map(time);
        Self {
            index,
            count: i64::try_from(ids.len()).unwrap_or(i64::MAX),
            first: times().min().unwrap_or_default(),
            last: times().max().unwrap_or_default(),
            marks: ids.iter().flat_map(mark).collect(),
            sieve,
            records,
        }
    }
}

/// The part of an id that grows with time. For ids that were made here it is milliseconds; of any other it keeps the order.
fn time(id: &Uuid) -> i64 {
    id.as_bytes()[..6].iter().fold(0, |time, byte| time << 8 | i64::from(*byte))
}

/// The end of an id, which is random.
fn mark(id: &Uuid) -> [u8; MARK] {
    let mut mark = [0; MARK];
    mark.copy_from_slice(&id.as_bytes()[16 - MARK..]);
    mark
}

/// The columns of [`SEGMENTS`].
pub(in crate::governance) fn columns(segments: Vec<Segment>) -> Vec<Column> {
    let ints = |f: fn(&Segment) -> i64| Column::Ints(segments.iter().map(f).collect());
    let (indexes, counts, firsts, lasts) = (ints(|s| s.index), ints(|s| s.count), ints(|s| s.first), ints(|s| s.last));
    let mut bytes = [const { Vec::new() }; 3];
    for segment in segments {
        bytes[0].push(segment.marks);
        bytes[1].push(segment.sieve);
        bytes[2].push(segment.records);
    }
    [indexes, counts, firsts, lasts].into_iter().chain(bytes.map(Column::Bytes)).collect()
}

/// Writes a segment by itself.
pub(in crate::governance) async fn keep(conn: &mut PgConnection, segment: &Segment) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO governance.segments (index, count, span, marks, sieve, records)
         VALUES ($1, $2, int8range($3, $4, '[]'), $5, $6, $7)",
    )
    .bind(segment.index)
    .bind(segment.count)
    .bind(segment.first)
    .bind(segment.last)
    .bind(&segment.marks)
    .bind(&segment.sieve)
    .bind(&segment.records)
    .execute(conn)
    .await
    .map(|_| ())
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

/// Segments that can hold some of these decisions: none that does is left out, and hardly one that does not is among them.
pub(in crate::governance) async fn holding(conn: &mut PgConnection, ids: &[Uuid]) -> Result<Vec<i64>, sqlx::Error> {
    let times: Vec<i64> = ids.iter().map(time).collect();
    let marks: Vec<Vec<u8>> = ids.iter().map(|id| mark(id).to_vec()).collect();
    // Segments of older versions have no marks. A mark that is found across two others is one more segment to read.
    sqlx::query_scalar(
        "SELECT DISTINCT s.index FROM unnest($1::int8[], $2::bytea[]) AS wanted (time, mark)
         JOIN governance.segments AS s ON s.span @> wanted.time
         WHERE s.marks IS NULL OR position(wanted.mark IN s.marks) > 0 ORDER BY s.index",
    )
    .bind(times)
    .bind(marks)
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

/// What an entry has of decisions, without the records of a segment.
pub(in crate::governance) struct Outline {
    pub index: i64,
    pub leaf: Vec<u8>,
    /// Of what is no segment.
    pub details: Option<Vec<u8>>,
    /// Of a segment; empty if it has none.
    pub sieve: Option<Vec<u8>>,
}

/// Outlines of entries from one index to another.
pub(in crate::governance) async fn outlines(
    conn: &mut PgConnection,
    from: i64,
    to: i64,
) -> Result<Vec<Outline>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT e.index, e.leaf, CASE WHEN s.index IS NULL THEN d.details END AS details,
                CASE WHEN s.index IS NOT NULL THEN coalesce(s.sieve, '') END AS sieve FROM ledger.entries AS e
         LEFT JOIN ledger.details AS d ON d.index = e.index AND d.index BETWEEN $1 AND $2
         LEFT JOIN governance.segments AS s ON s.index = e.index AND s.index BETWEEN $1 AND $2
         WHERE e.index BETWEEN $1 AND $2 ORDER BY e.index",
    )
    .bind(from)
    .bind(to)
    .fetch_all(conn)
    .await?;
    let outline = |r: &sqlx::postgres::PgRow| {
        Ok(Outline {
            index: r.try_get("index")?,
            leaf: r.try_get("leaf")?,
            details: r.try_get("details")?,
            sieve: r.try_get("sieve")?,
        })
    };
    rows.iter().map(outline).collect()
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
