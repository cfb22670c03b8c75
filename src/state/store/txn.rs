//! What a transaction asks and changes.

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row as _};

use super::item;
use crate::state::model::{Change, Item};
use crate::state::span::Span;
use crate::state::txn::{Compare, Operand, Relation, Target};

/// Keys that a span deletes in one statement: another daemon that waits for the head sees that work goes on.
const STEP: i64 = 5_000;

/// What a comparison looks at.
#[derive(Default)]
pub(in crate::state) struct Compared {
    pub index: i64,
    pub created_index: i64,
    pub version: i64,
    /// The value against the operand, if the key is there and one was given: -1, 0, 1.
    pub value: Option<i32>,
    pub lease: Option<uuid::Uuid>,
}

/// Keys as they are; one whose value is larger than `most` bytes without what it is, one that is not there has no row.
pub(in crate::state) async fn small(
    conn: &mut PgConnection,
    keys: &[&[u8]],
    most: i32,
) -> Result<Vec<(Vec<u8>, Option<Item>)>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT key, index, created_index, version, content_type, lease,
                CASE WHEN octet_length(value) <= $2 THEN value END AS value FROM state.kv WHERE key = ANY ($1)",
    )
    .bind(keys)
    .bind(most)
    .fetch_all(conn)
    .await?;
    let small = |r: &PgRow| r.try_get::<Option<&[u8]>, _>("value")?.map(|_| item(r)).transpose();
    rows.iter().map(|r| Ok((r.try_get("key")?, small(r)?))).collect()
}

/// Looks at keys, each with a value to hold against its own; in the order they are given.
pub(in crate::state) async fn compared(
    conn: &mut PgConnection,
    keys: &[&[u8]],
    operands: &[Option<Vec<u8>>],
) -> Result<Vec<Compared>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT coalesce(k.index, 0) AS index, coalesce(k.created_index, 0) AS created_index,
                coalesce(k.version, 0) AS version,
                CASE WHEN c.operand IS NULL OR k.key IS NULL THEN NULL WHEN k.value = c.operand THEN 0
                     WHEN k.value < c.operand THEN -1 ELSE 1 END AS value,
                k.lease
         FROM unnest($1::bytea[], $2::bytea[]) WITH ORDINALITY AS c (key, operand, n)
         LEFT JOIN state.kv AS k ON k.key = c.key ORDER BY c.n",
    )
    .bind(keys)
    .bind(operands)
    .fetch_all(conn)
    .await?;
    rows.iter()
        .map(|r| {
            Ok(Compared {
                index: r.try_get("index")?,
                created_index: r.try_get("created_index")?,
                version: r.try_get("version")?,
                value: r.try_get("value")?,
                lease: r.try_get("lease")?,
            })
        })
        .collect()
}

/// How many keys of a span there are, and whether a comparison holds of each.
pub(in crate::state) async fn compared_all(
    conn: &mut PgConnection,
    compare: &Compare,
) -> Result<(i64, bool), sqlx::Error> {
    let of = match compare.target {
        Target::Index => "k.index",
        Target::CreatedIndex => "k.created_index",
        Target::Version => "k.version",
        Target::Exists => "1",
        Target::Lease => "coalesce(l.number, 0)",
        Target::Value => "k.value",
    };
    let how = match compare.relation {
        Relation::Eq => "=",
        Relation::Ne => "<>",
        Relation::Lt => "<",
        Relation::Gt => ">",
    };
    let sql = format!(
        "SELECT count(*) AS number, coalesce(bool_and({of} {how} $3), true) AS holds
         FROM state.kv AS k LEFT JOIN state.leases AS l ON l.id = k.lease
         WHERE k.key >= $1 AND ($2::bytea IS NULL OR k.key < $2)"
    );
    let query = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(&compare.keys.from).bind(&compare.keys.end);
    let query = match &compare.operand {
        Operand::Number(n) => query.bind(*n),
        Operand::Bytes(b) => query.bind(b.clone()),
    };
    let row = query.fetch_one(conn).await?;
    Ok((row.try_get("number")?, row.try_get("holds")?))
}

/// Whether there is a key of a span.
pub(in crate::state) async fn any(conn: &mut PgConnection, keys: &Span) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("SELECT EXISTS (SELECT FROM state.kv WHERE key >= $1 AND ($2::bytea IS NULL OR key < $2))")
        .bind(&keys.from)
        .bind(&keys.end)
        .fetch_one(conn)
        .await
}

/// Deletes all keys of a span at `index`; how many there were.
pub(in crate::state) async fn delete_span(
    conn: &mut PgConnection,
    keys: &Span,
    index: i64,
) -> Result<i64, sqlx::Error> {
    let (mut from, end, mut deleted) = (keys.from.clone(), keys.end.clone(), 0);
    loop {
        let next: Option<Vec<u8>> = sqlx::query_scalar(
            "SELECT key FROM state.kv WHERE key >= $1 AND ($2::bytea IS NULL OR key < $2) ORDER BY key OFFSET $3 LIMIT 1",
        )
        .bind(&from)
        .bind(&end)
        .bind(STEP)
        .fetch_optional(&mut *conn)
        .await?;
        let step: i64 = sqlx::query_scalar(
            "WITH gone AS (
                 DELETE FROM state.kv WHERE key >= $1 AND ($2::bytea IS NULL OR key < $2) RETURNING key, index, created_index
             ), told AS (
                 INSERT INTO state.history (key, index, created_index, version, previous, content_type, value)
                 SELECT key, $3, created_index, 0, index, '', '' FROM gone
             ) SELECT count(*) FROM gone",
        )
        .bind(&from)
        .bind(next.as_ref().or(end.as_ref()))
        .bind(index)
        .fetch_one(&mut *conn)
        .await?;
        deleted += step;
        match next {
            Some(next) => from = next,
            None => return Ok(deleted),
        }
    }
}

/// Writes changes of different keys.
pub(in crate::state) async fn write(conn: &mut PgConnection, changes: &[Change]) -> Result<(), sqlx::Error> {
    let ints = |of: fn(&Change) -> i64| changes.iter().map(of).collect::<Vec<_>>();
    let keys: Vec<&[u8]> = changes.iter().map(|c| c.item.key.as_slice()).collect();
    let types: Vec<&str> = changes.iter().map(|c| c.item.content_type.as_str()).collect();
    let values: Vec<&[u8]> = changes.iter().map(|c| c.item.value.as_slice()).collect();
    let leases: Vec<Option<uuid::Uuid>> = changes.iter().map(|c| c.item.lease).collect();
    sqlx::query(
        "WITH c AS MATERIALIZED (
             SELECT * FROM unnest($1::bytea[], $2::int8[], $3::int8[], $4::int8[], $5::int8[], $6::text[], $7::bytea[], $8::uuid[])
                 AS c (key, index, created_index, version, previous, content_type, value, lease)
         ), kept AS (
             INSERT INTO state.kv (key, index, created_index, version, content_type, value, lease)
             SELECT key, index, created_index, version, content_type, value, lease FROM c WHERE version > 0
             ON CONFLICT (key) DO UPDATE SET index = excluded.index, created_index = excluded.created_index,
                 version = excluded.version, content_type = excluded.content_type, value = excluded.value,
                 lease = excluded.lease
         ), gone AS (
             DELETE FROM state.kv USING c WHERE kv.key = c.key AND c.version = 0
         ) INSERT INTO state.history (key, index, created_index, version, previous, content_type, value, lease)
         SELECT key, index, created_index, version, previous, content_type, value, lease FROM c",
    )
    .bind(keys)
    .bind(ints(|c| c.item.index))
    .bind(ints(|c| c.item.created_index))
    .bind(ints(|c| c.item.version))
    .bind(ints(|c| c.previous))
    .bind(types)
    .bind(values)
    .bind(leases)
    .execute(conn)
    .await?;
    Ok(())
}
