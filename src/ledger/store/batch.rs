//! The statement that writes a batch.

use sqlx::{AssertSqlSafe, PgConnection};
use uuid::Uuid;

use crate::kernel::Timestamp;
use crate::kernel::crypto::Hash;
use crate::ledger::entry::Sealed;
use crate::ledger::hot::{self, Column, Hot, Row, Texts};
use crate::telemetry;

use super::unwarned;

/// What a batch leaves behind: the new head, its entries, and rows by kind.
pub(in crate::ledger) struct Batch {
    pub id: Uuid,
    pub before: i64,
    pub root: Hash,
    pub frontier: Vec<u8>,
    pub time: Timestamp,
    pub entries: Vec<Sealed>,
    pub columns: Vec<(&'static dyn Hot, Vec<Column>)>,
    /// Whether there may be somebody to notify.
    pub tell: bool,
}

/// Advances the head from `before` to `before + k` **where it still is `before`**, and inserts the entries; the parts of the
/// rooms follow. Every part reads from the head's update, so that a head that has moved leaves nothing at all behind. The
/// time may not be further ahead of the database's clock than $7 ms (rule 17). The notification is a column.
const ADVANCE: &str = "
    WITH head AS (
        UPDATE ledger.head SET index = $1, root = $2, frontier = $3, time = $4, batch = $5
        WHERE id = 1 AND index = $6 AND $4 <= clock_timestamp() + $7 * interval '1 ms' RETURNING index
    ), entries AS (
        INSERT INTO ledger.entries (index, leaf, hash, batch, touched)
        SELECT e.index, e.leaf, e.hash, $5, e.touched
        FROM head, unnest($8::int8[], $9::bytea[], $10::bytea[], $11::bytea[]) AS e (index, leaf, hash, touched)
    ), details AS (
        INSERT INTO ledger.details (index, salt, details, segment)
        SELECT d.index, d.salt, d.details, d.segment
        FROM head, unnest($8::int8[], $12::bytea[], $13::bytea[], $14::bytea[]) AS d (index, salt, details, segment)
    )";
const ADVANCED: &str = " SELECT pg_notify('sop_ledger', head.index::text) IS NOT NULL FROM head";
/// The same where nobody else listens: a notification costs every commit a lock of the whole database, and a wake-up of ours.
const ALONE: &str = " SELECT true FROM head";
/// The first parameter that is free for the rooms' parts.
const FREE: usize = 15;

/// How far ahead of the database's clock an entry's time may be.
pub(in crate::ledger) const AHEAD_MS: i64 = 5_000;

/// Writes a batch; `false` if the head was not where it was expected, and then nothing was written. Outside a transaction this
/// is the commit.
pub(in crate::ledger) async fn advance(
    conn: &mut PgConnection,
    texts: &Texts,
    batch: &Batch,
) -> Result<bool, sqlx::Error> {
    let k = i64::try_from(batch.entries.len()).unwrap_or(0);
    let tail = if batch.tell { ADVANCED } else { ALONE };
    let one = match batch.entries.as_slice() {
        [one] if batch.columns.iter().flat_map(|(_, columns)| columns).all(|column| column.len() == 1) => Some(one),
        _ => None,
    };
    let text = texts.joined(ADVANCE, FREE, tail, &batch.columns, one.is_some());
    let query = sqlx::query(AssertSqlSafe(text))
        .bind(batch.before + k)
        .bind(batch.root.as_slice())
        .bind(&batch.frontier)
        .bind(batch.time.to_offset())
        .bind(batch.id)
        .bind(batch.before)
        .bind(AHEAD_MS as f64);
    let query = match one {
        Some(entry) => {
            let query = query
                .bind(batch.before + 1)
                .bind(entry.leaf.as_slice())
                .bind(entry.hash.as_slice())
                .bind(entry.touched.as_slice())
                .bind(entry.salt.as_slice())
                .bind(entry.details.as_slice())
                .bind(entry.segment.as_ref().map(|h| h.as_slice()));
            batch.columns.iter().flat_map(|(_, c)| c).fold(query, bind_one)
        }
        None => {
            let all = batch.entries.as_slice();
            let query = query
                .bind((batch.before + 1..=batch.before + k).collect::<Vec<i64>>())
                .bind(column(all, |e| e.leaf.as_slice()))
                .bind(column(all, |e| e.hash.as_slice()))
                .bind(column(all, |e| e.touched.as_slice()))
                .bind(column(all, |e| e.salt.as_slice()))
                .bind(column(all, |e| e.details.as_slice()))
                .bind(column(all, |e| e.segment.as_ref().map(|h| h.as_slice())));
            batch.columns.iter().flat_map(|(_, c)| c).fold(query, bind)
        }
    };
    let (done, warned) = telemetry::warned(query.fetch_all(conn)).await;
    let advanced = !done?.is_empty();
    unwarned(warned)?;
    Ok(advanced)
}

fn column<'a, T>(entries: &'a [Sealed], of: impl Fn(&'a Sealed) -> T) -> Vec<T> {
    entries.iter().map(of).collect()
}

/// Writes rows of hot commands inside a transaction that holds the head: there it need not be asked.
pub(in crate::ledger) async fn write_rows(
    conn: &mut PgConnection,
    kind: &dyn Hot,
    rows: Vec<Row>,
) -> Result<(), sqlx::Error> {
    let columns = kind.columns(rows);
    let text = format!("WITH head AS (SELECT 1){} SELECT 1", hot::numbered(kind.parts(&columns), 1));
    columns.iter().fold(sqlx::query(AssertSqlSafe(text)), bind).execute(conn).await?;
    Ok(())
}

type Query<'q> = sqlx::query::Query<'q, sqlx::Postgres, sqlx::postgres::PgArguments>;

fn bind<'q>(query: Query<'q>, column: &'q Column) -> Query<'q> {
    match column {
        Column::Bytes(v) => query.bind(v),
        Column::Ints(v) => query.bind(v),
        Column::Texts(v) => query.bind(v),
        Column::Flags(v) => query.bind(v),
        Column::Ids(v) => query.bind(v),
    }
}

/// The one value of a column that has one.
fn bind_one<'q>(query: Query<'q>, column: &'q Column) -> Query<'q> {
    match column {
        Column::Bytes(v) => query.bind(v.first()),
        Column::Ints(v) => query.bind(v.first()),
        Column::Texts(v) => query.bind(v.first()),
        Column::Flags(v) => query.bind(v.first()),
        Column::Ids(v) => query.bind(v.first()),
    }
}
