//! Keys as they were, and what changed when. Every statement looks at the compaction mark in its own snapshot (rule 16): rows
//! that a mark gives up are there for a minute after it, so whoever sees the older mark sees them too.

use sqlx::{PgConnection, Row as _};

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

/// Changes after `after` up to `to`, in order, at most `limit`.
pub(in crate::state) async fn changes(
    conn: &mut PgConnection,
    after: i64,
    to: i64,
    limit: i64,
) -> Result<Vec<Change>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT key, index, created_index, version, content_type, value, lease, previous FROM state.history
         WHERE index > $1 AND index <= $2 ORDER BY index, key LIMIT $3",
    )
    .bind(after)
    .bind(to)
    .bind(limit)
    .fetch_all(conn)
    .await?;
    rows.iter()
        .map(|r| {
            let item = item(r)?;
            Ok(Change { deleted: item.version == 0, previous: r.try_get("previous")?, item })
        })
        .collect()
}
