//! Keys in a row, in any order, of the present or of the past; and how much they are.

use sqlx::{PgConnection, Row as _};

use crate::state::model::{Change, Item};
use crate::state::range::{By, Found, Range};
use crate::state::span::Span;

use super::item;

/// Keys of a row as they are; the index as of which they are read is none.
const PRESENT: &str =
    "(SELECT * FROM state.kv WHERE key >= $1 AND ($2::bytea IS NULL OR key < $2) AND $10::int8 IS NULL)";
/// The same as they were.
const PAST: &str = "(SELECT * FROM (
        SELECT DISTINCT ON (key) * FROM state.history
        WHERE key >= $1 AND ($2::bytea IS NULL OR key < $2) AND index <= $10 ORDER BY key, index DESC
    ) AS newest WHERE version > 0)";

/// Reads a range: its values come to `bytes` at most, but for the first.
pub(in crate::state) async fn read(conn: &mut PgConnection, range: &Range, bytes: i64) -> Result<Found, sqlx::Error> {
    let source = if range.at.is_some() { PAST } else { PRESENT };
    let by = match range.by {
        By::Key => "key",
        By::Version => "version",
        By::Created => "created_index",
        By::Index => "index",
        By::Value => "value",
    };
    let order = format!("{by} {}, key", if range.descending { "DESC" } else { "ASC" });
    // One statement, one snapshot: index, mark, number and rows belong together.
    let sql = format!(
        "SELECT h.index AS head, c.mark, n.total, k.*
         FROM ledger.head AS h CROSS JOIN state.compaction AS c
         CROSS JOIN (SELECT CASE WHEN $11 THEN (SELECT count(*) FROM {source} AS s) ELSE 0 END AS total) AS n
         LEFT JOIN LATERAL (
             SELECT key, index, created_index, version, content_type, CASE WHEN $8 THEN value ELSE '' END AS value, lease,
                    place, fits
             FROM (SELECT page.*, count(*) OVER () AS fits,
                          (sum(octet_length(value)) OVER (ORDER BY place))::int8 - octet_length(value) AS before
                   FROM (SELECT s.*, row_number() OVER (ORDER BY {order}) AS place FROM {source} AS s
                         WHERE s.index BETWEEN $3 AND $4 AND s.created_index BETWEEN $5 AND $6
                         ORDER BY {order} LIMIT $7 + 1) AS page) AS sized
             WHERE NOT $8 OR before < $9
         ) AS k ON true WHERE h.id = 1 AND c.id = 1 ORDER BY k.place"
    );
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(&range.keys.from)
        .bind(&range.keys.end)
        .bind(range.changed.0)
        .bind(range.changed.1)
        .bind(range.created.0)
        .bind(range.created.1)
        .bind(range.limit)
        .bind(range.values)
        .bind(bytes)
        .bind(range.at)
        .bind(range.counted)
        .fetch_all(conn)
        .await?;
    let first = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    let fits: i64 = first.try_get::<Option<i64>, _>("fits")?.unwrap_or(0);
    let mut items = Vec::new();
    for row in &rows {
        if row.try_get::<Option<i64>, _>("place")?.is_some() {
            items.push(item(row)?);
        }
    }
    let cut = (items.len() as i64) < fits;
    items.truncate(usize::try_from(range.limit).unwrap_or(0));
    Ok(Found {
        head: first.try_get("head")?,
        mark: first.try_get("mark")?,
        total: first.try_get("total")?,
        more: fits > range.limit,
        cut: cut && (items.len() as i64) < range.limit,
        items,
    })
}

/// How many keys of a span there are among its first `limit`, and bytes of their values.
pub(in crate::state) async fn weight(
    conn: &mut PgConnection,
    keys: &Span,
    limit: i64,
) -> Result<(i64, i64), sqlx::Error> {
    let row = sqlx::query(
        "SELECT count(*) AS number, coalesce(sum(size), 0)::int8 AS bytes FROM (
             SELECT octet_length(value) AS size FROM state.kv WHERE key >= $1 AND ($2::bytea IS NULL OR key < $2)
             ORDER BY key LIMIT $3
         ) AS sizes",
    )
    .bind(&keys.from)
    .bind(&keys.end)
    .bind(limit)
    .fetch_one(conn)
    .await?;
    Ok((row.try_get("number")?, row.try_get("bytes")?))
}

/// These keys as they are; one that is not there has no item.
pub(in crate::state) async fn items(conn: &mut PgConnection, keys: &[&[u8]]) -> Result<Vec<Item>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT key, index, created_index, version, content_type, value, lease FROM state.kv WHERE key = ANY ($1)",
    )
    .bind(keys)
    .fetch_all(conn)
    .await?;
    rows.iter().map(item).collect()
}

/// What keys were before these changes, as far as that was not dropped; in no order.
pub(in crate::state) async fn before(conn: &mut PgConnection, changes: &[&Change]) -> Result<Vec<Item>, sqlx::Error> {
    let (keys, indexes): (Vec<&[u8]>, Vec<i64>) = changes.iter().map(|c| (c.item.key.as_slice(), c.previous)).unzip();
    let rows = sqlx::query(
        "SELECT h.key, h.index, h.created_index, h.version, h.content_type, h.value, h.lease
         FROM unnest($1::bytea[], $2::int8[]) AS p (key, index) JOIN state.history AS h ON h.key = p.key AND h.index = p.index
         WHERE h.version > 0",
    )
    .bind(keys)
    .bind(indexes)
    .fetch_all(conn)
    .await?;
    rows.iter().map(item).collect()
}
