//! The room's SQL.

use std::collections::HashMap;

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row as _};

use crate::ledger::hot::Column;

use super::model::{Change, Item};

fn item(row: &PgRow) -> Result<Item, sqlx::Error> {
    Ok(Item {
        key: row.try_get("key")?,
        index: row.try_get("index")?,
        created_index: row.try_get("created_index")?,
        version: row.try_get("version")?,
        content_type: row.try_get("content_type")?,
        value: row.try_get("value")?,
    })
}

/// Where a key stands: index, created index, version.
pub(super) struct Standing {
    pub index: i64,
    pub created_index: i64,
    pub version: i64,
}

/// Where keys stand; one that is not there has no row.
pub(super) async fn standings(
    conn: &mut PgConnection,
    keys: &[Vec<u8>],
) -> Result<Vec<(Vec<u8>, Standing)>, sqlx::Error> {
    let rows = sqlx::query("SELECT key, index, created_index, version FROM state.kv WHERE key = ANY ($1)")
        .bind(keys)
        .fetch_all(conn)
        .await?;
    rows.iter()
        .map(|r| {
            let standing = Standing {
                index: r.try_get("index")?,
                created_index: r.try_get("created_index")?,
                version: r.try_get("version")?,
            };
            Ok((r.try_get("key")?, standing))
        })
        .collect()
}

/// The key as it is, with the head's index in the same snapshot.
pub(super) async fn current(conn: &mut PgConnection, key: &[u8]) -> Result<Option<Item>, sqlx::Error> {
    let row =
        sqlx::query("SELECT key, index, created_index, version, content_type, value FROM state.kv WHERE key = $1")
            .bind(key)
            .fetch_optional(conn)
            .await?;
    row.as_ref().map(item).transpose()
}

/// The key as it was at `at`.
pub(super) async fn as_of(conn: &mut PgConnection, key: &[u8], at: i64) -> Result<Option<Item>, sqlx::Error> {
    let row = sqlx::query(
        "SELECT key, index, created_index, version, content_type, value FROM state.history
         WHERE key = $1 AND index <= $2 ORDER BY index DESC LIMIT 1",
    )
    .bind(key)
    .bind(at)
    .fetch_optional(conn)
    .await?;
    Ok(row.as_ref().map(item).transpose()?.filter(|i| i.version > 0))
}

/// The compaction mark: what was before it is incomplete. Read after the history it guards, in the same statement's snapshot
/// or a later one, so that a mark that came in between is seen.
pub(super) async fn mark(conn: &mut PgConnection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT mark FROM state.compaction WHERE id = 1").fetch_one(conn).await
}

/// The first key that is past every key with this prefix; `None` if there is none.
pub(super) fn prefix_end(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|b| *b != 0xff)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end)
}

/// A page of keys as of `at`, in order of the key, after `after`.
pub(super) async fn list_as_of(
    conn: &mut PgConnection,
    prefix: &[u8],
    after: Option<&[u8]>,
    at: i64,
    limit: i64,
) -> Result<Vec<Item>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT key, index, created_index, version, content_type, value FROM (
             SELECT DISTINCT ON (key) key, index, created_index, version, content_type, value FROM state.history
             WHERE key >= $1 AND ($2::bytea IS NULL OR key < $2) AND ($3::bytea IS NULL OR key > $3) AND index <= $4
             ORDER BY key, index DESC
         ) AS newest WHERE version > 0 ORDER BY key LIMIT $5",
    )
    .bind(prefix)
    .bind(prefix_end(prefix))
    .bind(after)
    .bind(at)
    .bind(limit)
    .fetch_all(conn)
    .await?;
    rows.iter().map(item).collect()
}

/// The first page of keys as they are, and the head's index in the same snapshot.
pub(super) async fn list_current(
    conn: &mut PgConnection,
    prefix: &[u8],
    limit: i64,
) -> Result<(i64, Vec<Item>), sqlx::Error> {
    // One statement, one snapshot: the index and the rows belong together.
    let rows = sqlx::query(
        "SELECT h.index AS head, k.key, k.index, k.created_index, k.version, k.content_type, k.value
         FROM ledger.head AS h LEFT JOIN LATERAL (
             SELECT * FROM state.kv WHERE key >= $1 AND ($2::bytea IS NULL OR key < $2) ORDER BY key LIMIT $3
         ) AS k ON true WHERE h.id = 1 ORDER BY k.key",
    )
    .bind(prefix)
    .bind(prefix_end(prefix))
    .bind(limit)
    .fetch_all(conn)
    .await?;
    let head = rows.first().map(|r| r.try_get("head")).transpose()?.unwrap_or(-1);
    let items = rows
        .iter()
        .filter(|r| r.try_get::<Option<Vec<u8>>, _>("key").is_ok_and(|k| k.is_some()))
        .map(item)
        .collect::<Result<_, _>>()?;
    Ok((head, items))
}

/// The room's parts of the ledger's statement: of each key the last of a batch's changes becomes its state, each becomes a row
/// of history. A key is either put or deleted, never both: one statement that did both would leave the row.
pub(super) const CHANGES: &str = ", kv AS MATERIALIZED (
        SELECT c.* FROM head, unnest({0}::bytea[], {1}::int8[], {2}::int8[], {3}::int8[], {4}::int8[], {5}::text[],
                                     {6}::bytea[], {7}::bool[])
                   AS c (key, index, created_index, version, previous, content_type, value, last)
    ), kept AS (
        INSERT INTO state.kv (key, index, created_index, version, content_type, value)
        SELECT key, index, created_index, version, content_type, value FROM kv WHERE last AND version > 0
        ON CONFLICT (key) DO UPDATE SET index = excluded.index, created_index = excluded.created_index,
            version = excluded.version, content_type = excluded.content_type, value = excluded.value
    ), gone AS (
        DELETE FROM state.kv USING head WHERE key = ANY ({8}::bytea[])
    ), history AS (
        INSERT INTO state.history (key, index, created_index, version, previous, content_type, value)
        SELECT key, index, created_index, version, previous, content_type, value FROM kv
    )";

/// The columns of [`CHANGES`].
pub(super) fn columns(changes: Vec<Change>) -> Vec<Column> {
    // The later of two wins.
    let last: HashMap<&[u8], i64> = changes.iter().map(|c| (c.item.key.as_slice(), c.item.index)).collect();
    let is_last: Vec<bool> = changes.iter().map(|c| last.get(c.item.key.as_slice()) == Some(&c.item.index)).collect();
    let gone = changes.iter().zip(&is_last).filter(|(c, last)| c.deleted && **last).map(|(c, _)| c.item.key.clone());
    let gone = gone.collect();
    let ints = |of: fn(&Change) -> i64| Column::Ints(changes.iter().map(of).collect());
    let (index, created) = (ints(|c| c.item.index), ints(|c| c.item.created_index));
    let (version, previous) = (ints(|c| c.item.version), ints(|c| c.previous));
    let (mut keys, mut types, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for change in changes {
        keys.push(change.item.key);
        types.push(change.item.content_type);
        values.push(change.item.value);
    }
    vec![
        Column::Bytes(keys),
        index,
        created,
        version,
        previous,
        Column::Texts(types),
        Column::Bytes(values),
        Column::Flags(is_last),
        Column::Bytes(gone),
    ]
}

/// Changes after `after` up to `to`, in order, at most `limit`.
pub(super) async fn changes(
    conn: &mut PgConnection,
    after: i64,
    to: i64,
    limit: i64,
) -> Result<Vec<Change>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT key, index, created_index, version, content_type, value, previous FROM state.history
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

#[cfg(test)]
mod tests {
    use super::prefix_end;

    #[test]
    fn the_end_of_a_prefix() {
        assert_eq!(prefix_end(b""), None);
        assert_eq!(prefix_end(b"a/"), Some(b"a0".to_vec()));
        assert_eq!(prefix_end(b"a\xff\xff"), Some(b"b".to_vec()));
        assert_eq!(prefix_end(b"\xff"), None);
    }
}
