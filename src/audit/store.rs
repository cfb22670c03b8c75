//! The room's SQL.

pub(super) mod damage;
pub(super) mod search;
pub(super) mod searches;
pub(super) mod segments;
pub(super) mod witness;

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row as _};

use crate::kernel::Timestamp;
use crate::kernel::crypto::Hash;

use super::model::Stored;
use super::tiles::Tile;

fn hash(bytes: Vec<u8>) -> Result<Hash, sqlx::Error> {
    bytes.try_into().map_err(|_| sqlx::Error::Decode("a hash does not have 32 bytes".into()))
}

/// The head's index and root.
pub(super) async fn head(conn: &mut PgConnection) -> Result<Option<(i64, Hash)>, sqlx::Error> {
    let row = sqlx::query("SELECT index, root FROM ledger.head WHERE id = 1").fetch_optional(conn).await?;
    row.map(|r| Ok((r.try_get("index")?, hash(r.try_get("root")?)?))).transpose()
}

/// The newest signed checkpoint.
pub(super) struct Published {
    pub size: u64,
    pub root: Hash,
    pub note: String,
}

pub(super) async fn checkpoint(conn: &mut PgConnection) -> Result<Option<Published>, sqlx::Error> {
    let row = sqlx::query("SELECT size, root, note FROM audit.checkpoint WHERE id = 1").fetch_optional(conn).await?;
    row.map(|r| {
        let size: i64 = r.try_get("size")?;
        let note: Vec<u8> = r.try_get("note")?;
        Ok(Published {
            size: u64::try_from(size).unwrap_or(0),
            root: hash(r.try_get("root")?)?,
            note: String::from_utf8_lossy(&note).into_owned(),
        })
    })
    .transpose()
}

/// Leaf hashes from index `from` to before `to`, in order. One array: to take a row for each apart was 3 %
/// of the daemon's instructions under puts.
pub(super) async fn hashes(conn: &mut PgConnection, from: u64, to: u64) -> Result<Vec<Hash>, sqlx::Error> {
    let all: Vec<Vec<u8>> = sqlx::query_scalar(
        "SELECT ARRAY(SELECT hash FROM ledger.entries WHERE index >= $1 AND index < $2 ORDER BY index)",
    )
    .bind(i64::try_from(from).unwrap_or(i64::MAX))
    .bind(i64::try_from(to).unwrap_or(i64::MAX))
    .fetch_one(conn)
    .await?;
    all.into_iter().map(hash).collect()
}

/// Leaves from index `from` to before `to`, in order.
pub(super) async fn leaves(conn: &mut PgConnection, from: u64, to: u64) -> Result<Vec<Vec<u8>>, sqlx::Error> {
    sqlx::query_scalar("SELECT leaf FROM ledger.entries WHERE index >= $1 AND index < $2 ORDER BY index")
        .bind(i64::try_from(from).unwrap_or(i64::MAX))
        .bind(i64::try_from(to).unwrap_or(i64::MAX))
        .fetch_all(conn)
        .await
}

/// A tile's hashes as they are kept.
pub(super) async fn tile(conn: &mut PgConnection, level: u8, n: u64) -> Result<Option<Vec<u8>>, sqlx::Error> {
    sqlx::query_scalar("SELECT hashes FROM audit.tiles WHERE level = $1 AND n = $2")
        .bind(i16::from(level))
        .bind(i64::try_from(n).unwrap_or(i64::MAX))
        .fetch_optional(conn)
        .await
}

/// Keeps tiles. A shorter one is the beginning of a longer one, so the longer stands.
pub(super) async fn keep_tiles(conn: &mut PgConnection, tiles: &[(Tile, Vec<u8>)]) -> Result<(), sqlx::Error> {
    let levels: Vec<i16> = tiles.iter().map(|(t, _)| i16::from(t.level)).collect();
    let ns: Vec<i64> = tiles.iter().map(|(t, _)| i64::try_from(t.n).unwrap_or(i64::MAX)).collect();
    let bytes: Vec<&[u8]> = tiles.iter().map(|(_, b)| b.as_slice()).collect();
    sqlx::query(
        "INSERT INTO audit.tiles (level, n, hashes) SELECT * FROM unnest($1::int2[], $2::int8[], $3::bytea[])
         ON CONFLICT (level, n) DO UPDATE SET hashes = excluded.hashes WHERE length(tiles.hashes) < length(excluded.hashes)",
    )
    .bind(levels)
    .bind(ns)
    .bind(bytes)
    .execute(conn)
    .await?;
    Ok(())
}

/// Keeps a checkpoint if it is larger than the one that is there.
pub(super) async fn keep_checkpoint(
    conn: &mut PgConnection,
    size: u64,
    root: &Hash,
    note: &str,
    now: Timestamp,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO audit.checkpoint (id, size, root, note, time) VALUES (1, $1, $2, $3, $4)
         ON CONFLICT (id) DO UPDATE SET size = excluded.size, root = excluded.root, note = excluded.note, time = excluded.time
         WHERE checkpoint.size < excluded.size",
    )
    .bind(i64::try_from(size).unwrap_or(i64::MAX))
    .bind(root.as_slice())
    .bind(note.as_bytes())
    .bind(now.to_offset())
    .execute(conn)
    .await?;
    Ok(())
}

/// One of the log's signing keys, with its sealed seed.
pub(super) struct LogKey {
    pub name: String,
    pub public: Hash,
    pub sealed: Vec<u8>,
    pub time: Timestamp,
    pub until: Option<Timestamp>,
}

/// The log's signing keys, the newest first.
pub(super) async fn log_keys(conn: &mut PgConnection) -> Result<Vec<LogKey>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT name, public, sealed, (extract(epoch FROM time) * 1000)::int8 AS since, (extract(epoch FROM until) * 1000)::int8 AS until
         FROM audit.log_keys ORDER BY id DESC",
    )
    .fetch_all(conn)
    .await?;
    let read = |r: &PgRow| {
        Ok(LogKey {
            name: r.try_get("name")?,
            public: hash(r.try_get("public")?)?,
            sealed: r.try_get("sealed")?,
            time: Timestamp::from_millis(r.try_get("since")?),
            until: r.try_get::<Option<i64>, _>("until")?.map(Timestamp::from_millis),
        })
    };
    rows.iter().map(read).collect()
}

/// Puts a new key in the place of the one that signs, which signs beside it until `until`.
pub(super) async fn replace_log_key(
    conn: &mut PgConnection,
    name: &str,
    public: &Hash,
    sealed: &[u8],
    now: Timestamp,
    until: Timestamp,
) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE audit.log_keys SET until = $1 WHERE until IS NULL")
        .bind(until.to_offset())
        .execute(&mut *conn)
        .await?;
    sqlx::query("INSERT INTO audit.log_keys (name, public, sealed, time) VALUES ($1, $2, $3, $4)")
        .bind(name)
        .bind(public.as_slice())
        .bind(sealed)
        .bind(now.to_offset())
        .execute(conn)
        .await
        .map(|_| ())
}

/// Makes the first signing key; one that is there stays.
pub(super) async fn make_log_key(
    conn: &mut PgConnection,
    name: &str,
    public: &Hash,
    sealed: &[u8],
    now: Timestamp,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO audit.log_keys (name, public, sealed, time)
         SELECT $1, $2, $3, $4 WHERE NOT EXISTS (SELECT FROM audit.log_keys)",
    )
    .bind(name)
    .bind(public.as_slice())
    .bind(sealed)
    .bind(now.to_offset())
    .execute(conn)
    .await?;
    Ok(())
}

fn stored(row: &PgRow) -> Result<Stored, sqlx::Error> {
    Ok(Stored {
        index: row.try_get("index")?,
        leaf: row.try_get("leaf")?,
        salt: row.try_get("salt")?,
        details: row.try_get("details")?,
        segment: row.try_get("segment")?,
    })
}

/// An entry with its details.
pub(super) async fn entries(conn: &mut PgConnection, indexes: &[i64]) -> Result<Vec<Stored>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT e.index, e.leaf, d.salt, d.details, d.segment FROM ledger.entries e LEFT JOIN ledger.details d USING (index)
         WHERE e.index = ANY ($1)",
    )
    .bind(indexes)
    .fetch_all(conn)
    .await?;
    rows.iter().map(stored).collect()
}

/// The `limit` entries after `after` that there are, in order, for the search. The range is said of both tables: a range is
/// not carried over by a join, and without it each round would read all details there are.
pub(super) async fn unindexed(conn: &mut PgConnection, after: i64, limit: i64) -> Result<Vec<Stored>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT e.index, e.leaf, d.salt, d.details, d.segment FROM ledger.entries e
         LEFT JOIN ledger.details d ON d.index = e.index AND d.index > $1 AND d.index <= $1 + $2
         WHERE e.index > $1 AND e.index <= $1 + $2 ORDER BY e.index",
    )
    .bind(after)
    .bind(limit)
    .fetch_all(conn)
    .await?;
    rows.iter().map(stored).collect()
}

/// The details of these entries, where they are kept.
pub(super) async fn details(conn: &mut PgConnection, indexes: &[i64]) -> Result<Vec<(i64, Vec<u8>)>, sqlx::Error> {
    sqlx::query_as("SELECT index, details FROM ledger.details WHERE index = ANY ($1) AND details IS NOT NULL")
        .bind(indexes)
        .fetch_all(conn)
        .await
}
