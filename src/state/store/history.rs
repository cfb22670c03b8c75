//! Keys as they were, and what changed when. Every statement looks at the compaction mark in its own snapshot (rule 16): rows
//! that a mark gives up are there for a minute after it, so whoever sees the older mark sees them too.

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row as _};

use crate::state::hub::Selection;
use crate::state::model::{Change, Item};

use super::{Found, Wanted, found, item, prefix_end};

/// The key as it was at `at`, and the mark.
pub(in crate::state) async fn as_of(
    conn: &mut PgConnection,
    key: &[u8],
    at: i64,
) -> Result<(i64, Option<Item>), sqlx::Error> {
    let row = sqlx::query(
        "SELECT c.mark, h.* FROM state.compaction AS c LEFT JOIN LATERAL (
             SELECT key, index, created_index, version, content_type, value, lease FROM state.history
             WHERE key = $1 AND index <= $2 ORDER BY index DESC LIMIT 1
         ) AS h ON true WHERE c.id = 1",
    )
    .bind(key)
    .bind(at)
    .fetch_one(conn)
    .await?;
    let there = row.try_get::<Option<i64>, _>("version")?.is_some_and(|version| version > 0);
    Ok((row.try_get("mark")?, there.then(|| item(&row)).transpose()?))
}

/// Keys as of `at`, in order.
pub(in crate::state) async fn list_as_of(
    conn: &mut PgConnection,
    wanted: &Wanted<'_>,
    at: i64,
) -> Result<Found, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT $7::int8 AS head, c.mark, k.* FROM state.compaction AS c LEFT JOIN LATERAL (
             SELECT key, index, created_index, version, content_type, CASE WHEN $5 THEN value ELSE '' END AS value, lease, total
             FROM (SELECT page.*, count(*) OVER () AS total,
                          (sum(octet_length(value)) OVER (ORDER BY key))::int8 - octet_length(value) AS before
                   FROM (SELECT * FROM (
                             SELECT DISTINCT ON (key) * FROM state.history
                             WHERE key >= $1 AND ($2::bytea IS NULL OR key < $2) AND ($3::bytea IS NULL OR key > $3)
                                 AND index <= $7 ORDER BY key, index DESC
                         ) AS newest WHERE version > 0 ORDER BY key LIMIT $4 + 1) AS page) AS sized
             WHERE NOT $5 OR before < $6
         ) AS k ON true WHERE c.id = 1 ORDER BY k.key",
    )
    .bind(wanted.prefix)
    .bind(prefix_end(wanted.prefix))
    .bind(wanted.after)
    .bind(wanted.limit)
    .bind(wanted.values)
    .bind(wanted.bytes)
    .bind(at)
    .fetch_all(conn)
    .await?;
    found(&rows, wanted)
}

/// The mark: what was before it is incomplete.
pub(in crate::state) async fn mark(conn: &mut PgConnection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT mark FROM state.compaction WHERE id = 1").fetch_one(conn).await
}

/// Changes of what is selected after `after` up to `to`, in order, at most `limit`; and the mark.
pub(in crate::state) async fn changes(
    conn: &mut PgConnection,
    selection: &Selection,
    after: i64,
    to: i64,
    limit: i64,
) -> Result<(i64, Vec<Change>), sqlx::Error> {
    let all = selection.prefixes.iter().any(Vec::is_empty);
    let rows = sqlx::query(
        "SELECT c.mark, h.* FROM state.compaction AS c LEFT JOIN LATERAL (
             SELECT key, index, created_index, version, content_type, value, lease, previous FROM state.history
             WHERE index > $1 AND index <= $2 AND ($4 OR key = ANY ($5)
                 OR EXISTS (SELECT FROM unnest($6::bytea[]) AS p WHERE substring(key FROM 1 FOR octet_length(p)) = p))
             ORDER BY index, key LIMIT $3
         ) AS h ON true WHERE c.id = 1 ORDER BY h.index, h.key",
    )
    .bind(after)
    .bind(to)
    .bind(limit)
    .bind(all)
    .bind(&selection.keys)
    .bind(&selection.prefixes)
    .fetch_all(conn)
    .await?;
    told(&rows)
}

/// All changes of these indexes, in order; and the mark.
pub(in crate::state) async fn changes_at(
    conn: &mut PgConnection,
    indexes: &[i64],
) -> Result<(i64, Vec<Change>), sqlx::Error> {
    let rows = sqlx::query(
        "SELECT c.mark, h.* FROM state.compaction AS c LEFT JOIN state.history AS h ON h.index = ANY ($1)
         WHERE c.id = 1 ORDER BY h.index, h.key",
    )
    .bind(indexes)
    .fetch_all(conn)
    .await?;
    told(&rows)
}

fn told(rows: &[PgRow]) -> Result<(i64, Vec<Change>), sqlx::Error> {
    let mark = rows.first().ok_or(sqlx::Error::RowNotFound)?.try_get("mark")?;
    let there = |r: &&PgRow| r.try_get::<Option<i64>, _>("index").is_ok_and(|i| i.is_some());
    let change = |r: &PgRow| {
        let item = item(r)?;
        Ok(Change { deleted: item.version == 0, previous: r.try_get("previous")?, item })
    };
    Ok((mark, rows.iter().filter(there).map(change).collect::<Result<_, sqlx::Error>>()?))
}

/// Sets the mark.
pub(in crate::state) async fn set_mark(conn: &mut PgConnection, mark: i64) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE state.compaction SET mark = $1 WHERE id = 1").bind(mark).execute(conn).await.map(|_| ())
}

/// The index of the change before which there are `keep` newer ones; `None` if there are not so many.
pub(in crate::state) async fn beyond(conn: &mut PgConnection, keep: i64) -> Result<Option<i64>, sqlx::Error> {
    sqlx::query_scalar("SELECT index FROM state.history ORDER BY index DESC OFFSET $1 LIMIT 1")
        .bind(keep)
        .fetch_optional(conn)
        .await
}

/// Whether a key changed after `after`, up to `to`.
pub(in crate::state) async fn changed(conn: &mut PgConnection, after: i64, to: i64) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("SELECT EXISTS (SELECT FROM state.history WHERE index > $1 AND index <= $2)")
        .bind(after)
        .bind(to)
        .fetch_one(conn)
        .await
}

/// Drops what changes up to `mark` made the past, some hundred at a time: a change gives up the state it replaced, a deletion
/// itself as well. `None` once there is nothing left; else how many rows went.
pub(in crate::state) async fn drop_rows(conn: &mut PgConnection, mark: i64) -> Result<Option<i64>, sqlx::Error> {
    sqlx::query_scalar(
        "WITH from_here AS (SELECT done_index, done_key FROM state.compaction WHERE id = 1),
         step AS (
             SELECT h.index, h.key, h.previous, h.version FROM state.history AS h, from_here AS f
             WHERE h.index <= $1 AND (h.index, h.key) > (f.done_index, f.done_key) ORDER BY h.index, h.key LIMIT 500
         ), gone AS (
             DELETE FROM state.history AS h USING step AS s
             WHERE h.key = s.key AND (h.index = s.previous OR (h.index = s.index AND s.version = 0)) RETURNING 1
         ), last AS (SELECT index, key FROM step ORDER BY index DESC, key DESC LIMIT 1)
         UPDATE state.compaction AS c SET done_index = last.index, done_key = last.key FROM last
         WHERE c.id = 1 RETURNING (SELECT count(*) FROM gone)",
    )
    .bind(mark)
    .fetch_optional(conn)
    .await
}
