//! The search's tables: a row an entry, and a set of tokens a block.

use sqlx::postgres::Postgres;
use sqlx::{Connection as _, PgConnection, QueryBuilder, Row as _};

use crate::audit::model::{Filter, Found};
use crate::kernel::Timestamp;

/// This transaction's commit does not wait for the disk.
pub(in crate::audit) async fn not_synchronous(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query("SET LOCAL synchronous_commit = off").execute(conn).await.map(|_| ())
}

/// How far the search has come; the row is kept for this transaction. `None`: another daemon is at it.
pub(in crate::audit) async fn take_indexed(conn: &mut PgConnection) -> Result<Option<i64>, sqlx::Error> {
    sqlx::query_scalar("SELECT at FROM audit.indexed WHERE id = 1 FOR UPDATE SKIP LOCKED").fetch_optional(conn).await
}

pub(in crate::audit) async fn indexed(conn: &mut PgConnection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT at FROM audit.indexed WHERE id = 1").fetch_one(conn).await
}

/// Puts entries into the search and moves it to `to`.
pub(in crate::audit) async fn index(conn: &mut PgConnection, found: &[Found], to: i64) -> Result<(), sqlx::Error> {
    let column = |f: fn(&Found) -> String| found.iter().map(f).collect::<Vec<_>>();
    sqlx::query(
        "INSERT INTO audit.search (index, time, room, action, outcome, actor, resource, request_id, trace_id)
         SELECT index, to_timestamp(ms / 1000.0), room, action, outcome, actor, resource, nullif(request_id, ''), nullif(trace_id, '')
         FROM unnest($1::int8[], $2::int8[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[])
              AS f (index, ms, room, action, outcome, actor, resource, request_id, trace_id)
         ON CONFLICT (index) DO NOTHING",
    )
    .bind(found.iter().map(|f| f.index).collect::<Vec<_>>())
    .bind(found.iter().map(|f| f.time.millis()).collect::<Vec<_>>())
    .bind(column(|f| f.room.clone()))
    .bind(column(|f| f.action.clone()))
    .bind(column(|f| f.outcome.clone()))
    .bind(column(|f| f.actor.replace('\0', "")))
    .bind(column(|f| f.resource.replace('\0', "")))
    .bind(column(|f| f.request_id.clone()))
    .bind(column(|f| f.trace_id.clone()))
    .execute(&mut *conn)
    .await?;
    sqlx::query("UPDATE audit.indexed SET at = $1 WHERE id = 1").bind(to).execute(conn).await?;
    Ok(())
}

/// Keeps what a block's entries can be found by.
pub(in crate::audit) async fn keep_block(
    conn: &mut PgConnection,
    block: i64,
    tokens: &[String],
) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO audit.blocks (block, tokens) VALUES ($1, array_to_tsvector($2)) ON CONFLICT (block) DO UPDATE SET tokens = excluded.tokens")
        .bind(block)
        .bind(tokens)
        .execute(conn)
        .await
        .map(|_| ())
}

/// Blocks below this one are whole, and have tokens.
pub(in crate::audit) async fn whole_blocks(conn: &mut PgConnection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT coalesce(max(block), -1) + 1 FROM audit.blocks").fetch_one(conn).await
}

/// Blocks that may hold what is looked for, at most `limit`, in order.
pub(in crate::audit) async fn blocks(
    conn: &mut PgConnection,
    query: &str,
    first: i64,
    last: i64,
    ascending: bool,
    limit: i64,
) -> Result<Vec<i64>, sqlx::Error> {
    let sql = if ascending {
        "SELECT block FROM audit.blocks WHERE tokens @@ $1::tsquery AND block + 0 BETWEEN $2 AND $3 ORDER BY block ASC LIMIT $4"
    } else {
        "SELECT block FROM audit.blocks WHERE tokens @@ $1::tsquery AND block + 0 BETWEEN $2 AND $3 ORDER BY block DESC LIMIT $4"
    };
    // The planner does not count what it costs to read a block's tokens (40 to 160 ms for a page, measured); their index need
    // not. `+ 0` keeps it from the primary key, whose bitmap would have them read.
    let mut tx = conn.begin().await?;
    let index =
        "SET LOCAL enable_seqscan = off; SET LOCAL enable_indexscan = off; SET LOCAL enable_indexonlyscan = off";
    sqlx::raw_sql(index).execute(&mut *tx).await?;
    let found = sqlx::query_scalar(sql).bind(query).bind(first).bind(last).bind(limit).fetch_all(&mut *tx).await?;
    tx.commit().await?;
    Ok(found)
}

/// The first index whose entry is not earlier than `time`. No entry is earlier than the one before it (rule 17 of the ledger),
/// so halving finds it.
pub(in crate::audit) async fn not_before(conn: &mut PgConnection, time: Timestamp) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(
        "WITH RECURSIVE b (lo, hi) AS (
             SELECT coalesce(min(index), 0), coalesce(max(index), -1) + 1 FROM audit.search
             UNION ALL
             SELECT CASE WHEN e.time < $1 THEN e.index + 1 ELSE b.lo END, CASE WHEN e.time < $1 THEN b.hi ELSE m.mid END
             FROM b, LATERAL (SELECT (b.lo + b.hi) / 2 AS mid) AS m,
                  LATERAL (SELECT index, time FROM audit.search WHERE index >= m.mid ORDER BY index LIMIT 1) AS e
             WHERE b.lo < b.hi
         ) SELECT max(lo) FROM b",
    )
    .bind(time.to_offset())
    .fetch_one(conn)
    .await
}

fn conditions(q: &mut QueryBuilder<Postgres>, filter: &Filter) {
    for (column, value) in [
        ("actor", &filter.actor),
        ("room", &filter.room),
        ("action", &filter.action),
        ("outcome", &filter.outcome),
        ("request_id", &filter.request_id),
        ("trace_id", &filter.trace_id),
    ] {
        if let Some(value) = value {
            q.push(format!(" AND {column} = ")).push_bind(value.clone());
        }
    }
    if let Some(resource) = &filter.resource {
        q.push(" AND starts_with(resource, ").push_bind(resource.clone()).push(")");
    }
}

/// Indexes from `from` to `to` that fit but for the words, in order.
pub(in crate::audit) async fn matching(
    conn: &mut PgConnection,
    filter: &Filter,
    from: i64,
    to: i64,
    ascending: bool,
    limit: i64,
) -> Result<Vec<i64>, sqlx::Error> {
    let mut q = QueryBuilder::new("SELECT index FROM audit.search WHERE index >= ");
    q.push_bind(from).push(" AND index <= ").push_bind(to);
    conditions(&mut q, filter);
    q.push(if ascending { " ORDER BY index ASC LIMIT " } else { " ORDER BY index DESC LIMIT " }).push_bind(limit);
    q.build_query_scalar().fetch_all(conn).await
}

/// What entries are counted by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(in crate::audit) struct Combined {
    actor: String,
    room: String,
    action: String,
    outcome: String,
}

impl Combined {
    /// The value of a facet.
    pub fn of(&self, facet: &str) -> &str {
        match facet {
            "actor" => &self.actor,
            "room" => &self.room,
            "action" => &self.action,
            _ => &self.outcome,
        }
    }
}

/// How many entries from `from` to `to` fit, of `only` these if given.
pub(in crate::audit) async fn combined(
    conn: &mut PgConnection,
    filter: &Filter,
    from: i64,
    to: i64,
    only: Option<Vec<i64>>,
) -> Result<Vec<(Combined, i64)>, sqlx::Error> {
    let mut q =
        QueryBuilder::new("SELECT actor, room, action, outcome, count(*) AS n FROM audit.search WHERE index >= ");
    q.push_bind(from).push(" AND index <= ").push_bind(to);
    conditions(&mut q, filter);
    if let Some(only) = only {
        q.push(" AND index = ANY (").push_bind(only).push(")");
    }
    q.push(" GROUP BY actor, room, action, outcome");
    let rows = q.build().fetch_all(conn).await?;
    let read = |r: &sqlx::postgres::PgRow| {
        let text = |name: &str| r.try_get::<String, _>(name);
        let combined =
            Combined { actor: text("actor")?, room: text("room")?, action: text("action")?, outcome: text("outcome")? };
        Ok((combined, r.try_get("n")?))
    };
    rows.iter().map(read).collect()
}
