//! The room's SQL: keys as they are, and the statement that changes one.

pub(super) mod history;
pub(super) mod leases;
pub(super) mod locks;
pub(super) mod ranges;
pub(super) mod txn;

use std::collections::HashSet;

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row as _};

use crate::ledger::hot::Column;

use super::model::{Change, Item};

/// Values in a page at most, bytes; the first is there whatever its size.
pub(super) const PAGE_BYTES: i64 = 16 * 1024 * 1024;

fn item(row: &PgRow) -> Result<Item, sqlx::Error> {
    Ok(Item {
        key: row.try_get("key")?,
        index: row.try_get("index")?,
        created_index: row.try_get("created_index")?,
        version: row.try_get("version")?,
        content_type: row.try_get("content_type")?,
        value: row.try_get("value")?,
        lease: row.try_get("lease")?,
    })
}

/// Where a key stands: index, created index, version.
#[derive(Clone, Copy, Debug)]
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

/// The key as it is.
pub(super) async fn current(conn: &mut PgConnection, key: &[u8]) -> Result<Option<Item>, sqlx::Error> {
    let row = sqlx::query(
        "SELECT key, index, created_index, version, content_type, value, lease FROM state.kv WHERE key = $1",
    )
    .bind(key)
    .fetch_optional(conn)
    .await?;
    row.as_ref().map(item).transpose()
}

/// The database's size, bytes.
pub(super) async fn size(conn: &mut PgConnection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT pg_database_size(current_database())").fetch_one(conn).await
}

/// The head's index.
pub(super) async fn head(conn: &mut PgConnection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT index FROM ledger.head WHERE id = 1").fetch_one(conn).await
}

/// The first key that is past every key with this prefix; `None` if there is none.
pub(super) fn prefix_end(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|b| *b != 0xff)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end)
}

/// What a list asks for.
pub(super) struct Wanted<'a> {
    pub prefix: &'a [u8],
    /// Only keys after this one.
    pub after: Option<&'a [u8]>,
    /// Keys at most.
    pub limit: i64,
    /// With their values; without, these are empty.
    pub values: bool,
    /// Values at most, bytes.
    pub bytes: i64,
}

/// Keys of a list.
pub(super) struct Found {
    /// The index that they are of.
    pub head: i64,
    /// Below this index history is incomplete.
    pub mark: i64,
    pub items: Vec<Item>,
    /// Whether there are more than these: past the limit, or past the bytes.
    pub more: bool,
}

fn found(rows: &[PgRow], wanted: &Wanted<'_>) -> Result<Found, sqlx::Error> {
    let first = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    let (head, mark) = (first.try_get("head")?, first.try_get("mark")?);
    let there = |r: &&PgRow| r.try_get::<Option<Vec<u8>>, _>("key").is_ok_and(|k| k.is_some());
    let total: Option<i64> = first.try_get("total")?;
    let mut items = rows.iter().filter(there).map(item).collect::<Result<Vec<_>, _>>()?;
    items.truncate(usize::try_from(wanted.limit).unwrap_or(0));
    let more = total.unwrap_or(0) > items.len() as i64;
    Ok(Found { head, mark, items, more })
}

/// Keys as they are, in order, with the head's index in the same snapshot.
pub(super) async fn list(conn: &mut PgConnection, wanted: &Wanted<'_>) -> Result<Found, sqlx::Error> {
    // One statement, one snapshot: the index and the rows belong together. Sizes are known without the values being read.
    let rows = sqlx::query(
        "SELECT h.index AS head, 0::int8 AS mark, k.* FROM ledger.head AS h LEFT JOIN LATERAL (
             SELECT key, index, created_index, version, content_type, CASE WHEN $5 THEN value ELSE '' END AS value, lease, total
             FROM (SELECT page.*, count(*) OVER () AS total,
                          (sum(octet_length(value)) OVER (ORDER BY key))::int8 - octet_length(value) AS before
                   FROM (SELECT * FROM state.kv WHERE key >= $1 AND ($2::bytea IS NULL OR key < $2)
                             AND ($3::bytea IS NULL OR key > $3) ORDER BY key LIMIT $4 + 1) AS page) AS sized
             WHERE NOT $5 OR before < $6
         ) AS k ON true WHERE h.id = 1 ORDER BY k.key",
    )
    .bind(wanted.prefix)
    .bind(prefix_end(wanted.prefix))
    .bind(wanted.after)
    .bind(wanted.limit)
    .bind(wanted.values)
    .bind(wanted.bytes)
    .fetch_all(conn)
    .await?;
    found(&rows, wanted)
}

/// Keys after this one, in order, ten thousand at most.
pub(super) async fn every_key(conn: &mut PgConnection, after: Option<&[u8]>) -> Result<Vec<Vec<u8>>, sqlx::Error> {
    match after {
        None => sqlx::query_scalar("SELECT key FROM state.kv ORDER BY key LIMIT 10000"),
        Some(after) => {
            sqlx::query_scalar("SELECT key FROM state.kv WHERE key > $1 ORDER BY key LIMIT 10000").bind(after)
        }
    }
    .fetch_all(conn)
    .await
}

/// The room's parts of the ledger's statement: of each key the last of a batch's changes becomes its state, each becomes a row
/// of history. A key is either put or deleted, never both: one statement that did both would leave the row. What is put so hangs
/// on no lease.
macro_rules! changes {
    ($gone:literal) => {
        concat!(
            ", kv AS MATERIALIZED (
        SELECT c.* FROM head, unnest({0}::bytea[], {1}::int8[], {2}::int8[], {3}::int8[], {4}::int8[], {5}::text[],
                                     {6}::bytea[], {7}::bool[])
                   AS c (key, index, created_index, version, previous, content_type, value, last)
    ), kept AS (
        INSERT INTO state.kv (key, index, created_index, version, content_type, value)
        SELECT key, index, created_index, version, content_type, value FROM kv WHERE last AND version > 0
        ON CONFLICT (key) DO UPDATE SET index = excluded.index, created_index = excluded.created_index,
            version = excluded.version, content_type = excluded.content_type, value = excluded.value, lease = NULL
    )",
            $gone,
            ", history AS (
        INSERT INTO state.history (key, index, created_index, version, previous, content_type, value)
        SELECT key, index, created_index, version, previous, content_type, value FROM kv
    )"
        )
    };
}
const CHANGES: &str = changes!("");
const DELETIONS: &str = changes!(
    ", gone AS (
        DELETE FROM state.kv AS k USING head, unnest({8}::bytea[]) AS g (key) WHERE k.key = g.key
    )"
);

/// The parts that write these columns: without deletions there is a part less.
pub(super) fn parts(columns: &[Column]) -> &'static str {
    if columns.len() > 8 { DELETIONS } else { CHANGES }
}

/// The columns of changes; the keys that are deleted last, if there are any.
pub(super) fn columns(changes: Vec<Change>) -> Vec<Column> {
    // The later of two wins.
    let mut later = HashSet::with_capacity(changes.len());
    let mut is_last: Vec<bool> = changes.iter().rev().map(|c| later.insert(c.item.key.as_slice())).collect();
    is_last.reverse();
    let gone = changes.iter().zip(&is_last).filter(|(c, last)| c.deleted && **last).map(|(c, _)| c.item.key.clone());
    let gone: Vec<Vec<u8>> = gone.collect();
    let ints = |of: fn(&Change) -> i64| Column::Ints(changes.iter().map(of).collect());
    let (index, created) = (ints(|c| c.item.index), ints(|c| c.item.created_index));
    let (version, previous) = (ints(|c| c.item.version), ints(|c| c.previous));
    let (mut keys, mut types, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for change in changes {
        keys.push(change.item.key);
        types.push(change.item.content_type);
        values.push(change.item.value);
    }
    let mut columns = vec![
        Column::Bytes(keys),
        index,
        created,
        version,
        previous,
        Column::Texts(types),
        Column::Bytes(values),
        Column::Flags(is_last),
    ];
    if !gone.is_empty() {
        columns.push(Column::Bytes(gone));
    }
    columns
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
