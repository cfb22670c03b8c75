//! The search's tables: a row a block of entries, a row a shelf of blocks.

use sqlx::{PgConnection, Row as _};

use crate::audit::search::block::Block;
use crate::audit::search::shelf::{self, Spot};
use crate::audit::search::tokens::Token;
use crate::kernel::Timestamp;

/// This transaction's commit does not wait for the disk.
pub(in crate::audit) async fn not_synchronous(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query("SET LOCAL synchronous_commit = off").execute(conn).await.map(|_| ())
}

/// The last entry of the last whole block; the row is kept for this transaction. `None`: another daemon is at it.
pub(in crate::audit) async fn take_indexed(conn: &mut PgConnection) -> Result<Option<i64>, sqlx::Error> {
    sqlx::query_scalar("SELECT at FROM audit.indexed WHERE id = 1 FOR UPDATE SKIP LOCKED").fetch_optional(conn).await
}

/// The last entry of the last whole block.
pub(in crate::audit) async fn indexed(conn: &mut PgConnection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT at FROM audit.indexed WHERE id = 1").fetch_one(conn).await
}

/// Keeps blocks, and moves the search to `to`.
pub(in crate::audit) async fn keep_blocks(
    conn: &mut PgConnection,
    blocks: &[Block],
    to: i64,
) -> Result<(), sqlx::Error> {
    let bytes = |tokens: &[Token]| tokens.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<u8>>();
    sqlx::query(
        "WITH loose AS (
             INSERT INTO audit.loose (block, tokens)
             SELECT * FROM unnest($1::int8[], $4::bytea[]) ON CONFLICT (block) DO NOTHING
         ), moved AS (
             UPDATE audit.indexed SET at = $5 WHERE id = 1
         ) INSERT INTO audit.blocks (block, outline, names)
           SELECT * FROM unnest($1::int8[], $2::bytea[], $3::bytea[]) ON CONFLICT (block) DO NOTHING",
    )
    .bind(blocks.iter().map(|b| b.number).collect::<Vec<_>>())
    .bind(blocks.iter().map(|b| b.outline.as_slice()).collect::<Vec<_>>())
    .bind(blocks.iter().map(|b| b.names.as_slice()).collect::<Vec<_>>())
    .bind(blocks.iter().map(|b| bytes(&b.tokens)).collect::<Vec<_>>())
    .bind(to)
    .execute(conn)
    .await
    .map(|_| ())
}

/// Tokens of blocks in no shelf yet, in order.
pub(in crate::audit) async fn loose(
    conn: &mut PgConnection,
    first: i64,
    last: i64,
) -> Result<Vec<(i64, Vec<Token>)>, sqlx::Error> {
    let rows: Vec<(i64, Vec<u8>)> =
        sqlx::query_as("SELECT block, tokens FROM audit.loose WHERE block BETWEEN $1 AND $2 ORDER BY block")
            .bind(first)
            .bind(last)
            .fetch_all(conn)
            .await?;
    let token = |bytes: &[u8]| bytes.try_into().map_or(0, Token::from_le_bytes);
    Ok(rows.into_iter().map(|(block, bytes)| (block, bytes.chunks(4).map(token).collect())).collect())
}

/// Keeps a shelf; the tokens of its blocks are in it.
pub(in crate::audit) async fn keep_shelf(conn: &mut PgConnection, shelf: i64, lines: &[u8]) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO audit.shelves (shelf, lines) VALUES ($1, $2) ON CONFLICT (shelf) DO NOTHING")
        .bind(shelf)
        .bind(lines)
        .execute(&mut *conn)
        .await?;
    sqlx::query("DELETE FROM audit.loose WHERE block < $1")
        .bind((shelf + 1) * shelf::BLOCKS)
        .execute(conn)
        .await
        .map(|_| ())
}

/// Of these shelves, which blocks may hold all the tokens that are at these spots; a bit a block.
pub(in crate::audit) async fn shelves(
    conn: &mut PgConnection,
    spots: &[Spot],
    first: i64,
    last: i64,
) -> Result<Vec<(i64, u64)>, sqlx::Error> {
    // A part of what is stored apart and not compressed is read without the rest.
    let rows = sqlx::query(
        "SELECT shelf, ARRAY (
             SELECT substring(lines, ((at * (octet_length(lines) / $4) >> 32) * $4 + 1)::int4, $4::int4)
             FROM unnest($1::int8[]) WITH ORDINALITY AS spot (at, n) ORDER BY n
         ) AS lines FROM audit.shelves WHERE shelf BETWEEN $2 AND $3 ORDER BY shelf",
    )
    .bind(spots.iter().map(|s| i64::from(s.at)).collect::<Vec<_>>())
    .bind(first)
    .bind(last)
    .bind(shelf::LINE as i64)
    .fetch_all(conn)
    .await?;
    rows.iter()
        .map(|row| {
            let lines: Vec<Vec<u8>> = row.try_get("lines")?;
            let blocks = spots.iter().zip(&lines).fold(u64::MAX, |all, (spot, line)| all & spot.blocks(line));
            Ok((row.try_get("shelf")?, blocks))
        })
        .collect()
}

/// A block as it is kept.
pub(in crate::audit) struct Kept {
    pub block: i64,
    pub outline: Vec<u8>,
    /// Only if they were asked for.
    pub names: Option<Vec<u8>>,
}

/// These blocks, in order.
pub(in crate::audit) async fn blocks(
    conn: &mut PgConnection,
    blocks: &[i64],
    names: bool,
) -> Result<Vec<Kept>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT block, outline, CASE WHEN $2 THEN names END AS names FROM audit.blocks WHERE block = ANY ($1) ORDER BY block",
    )
    .bind(blocks)
    .bind(names)
    .fetch_all(conn)
    .await?;
    rows.iter()
        .map(|r| Ok(Kept { block: r.try_get("block")?, outline: r.try_get("outline")?, names: r.try_get("names")? }))
        .collect()
}

/// The first index whose entry is not earlier than `time`. No entry is earlier than the one before it (rule 17 of the ledger),
/// so halving finds it.
pub(in crate::audit) async fn not_before(conn: &mut PgConnection, time: Timestamp) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(
        "WITH RECURSIVE b (lo, hi) AS (
             SELECT coalesce(min(index), 0), coalesce(max(index), -1) + 1 FROM ledger.entries
             UNION ALL
             SELECT CASE WHEN e.time < $1 THEN e.index + 1 ELSE b.lo END, CASE WHEN e.time < $1 THEN b.hi ELSE m.mid END
             FROM b, LATERAL (SELECT (b.lo + b.hi) / 2 AS mid) AS m,
                  LATERAL (SELECT index, (convert_from(leaf, 'UTF8')::json ->> 'time')::timestamptz AS time
                           FROM ledger.entries WHERE index >= m.mid ORDER BY index LIMIT 1) AS e
             WHERE b.lo < b.hi
         ) SELECT max(lo) FROM b",
    )
    .bind(time.to_offset())
    .fetch_one(conn)
    .await
}
