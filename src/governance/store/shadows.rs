//! Bundles in shadow, and what they would have decided otherwise.

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row as _};

/// A trial as it is stored.
#[derive(Clone, Debug)]
pub(in crate::governance) struct Shadow {
    pub bundle: String,
    pub since: i64,
    pub until: Option<i64>,
    pub reached: i64,
    pub read: i64,
    pub skipped: i64,
    pub changed: i64,
    pub groups: Vec<u8>,
}

const COLUMNS: &str = "bundle, since, until, reached, read, skipped, changed, groups";

fn shadow(r: &PgRow) -> Result<Shadow, sqlx::Error> {
    Ok(Shadow {
        bundle: r.try_get("bundle")?,
        since: r.try_get("since")?,
        until: r.try_get("until")?,
        reached: r.try_get("reached")?,
        read: r.try_get("read")?,
        skipped: r.try_get("skipped")?,
        changed: r.try_get("changed")?,
        groups: r.try_get("groups")?,
    })
}

/// Begins anew: what an earlier trial of the bundle found is gone.
pub(in crate::governance) async fn begin(conn: &mut PgConnection, bundle: &str, since: i64) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM governance.shadow_flips WHERE bundle = $1").bind(bundle).execute(&mut *conn).await?;
    sqlx::query(
        "INSERT INTO governance.shadows (bundle, since, reached, groups) VALUES ($1, $2, $2, '{}')
         ON CONFLICT (bundle) DO UPDATE SET since = $2, until = NULL, reached = $2, read = 0, skipped = 0, changed = 0, groups = '{}'",
    )
    .bind(bundle)
    .bind(since)
    .execute(conn)
    .await
    .map(|_| ())
}

/// Ends the trial of a bundle, if there is one.
pub(in crate::governance) async fn end(conn: &mut PgConnection, bundle: &str, until: i64) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE governance.shadows SET until = $2 WHERE bundle = $1 AND until IS NULL")
        .bind(bundle)
        .bind(until)
        .execute(conn)
        .await
        .map(|_| ())
}

/// Those that go on.
pub(in crate::governance) async fn open(conn: &mut PgConnection) -> Result<Vec<Shadow>, sqlx::Error> {
    let sql = format!("SELECT {COLUMNS} FROM governance.shadows WHERE until IS NULL ORDER BY since");
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql)).fetch_all(conn).await?;
    rows.iter().map(shadow).collect()
}

pub(in crate::governance) async fn one(conn: &mut PgConnection, bundle: &str) -> Result<Option<Shadow>, sqlx::Error> {
    let sql = format!("SELECT {COLUMNS} FROM governance.shadows WHERE bundle = $1");
    let row = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(bundle).fetch_optional(conn).await?;
    row.as_ref().map(shadow).transpose()
}

/// A difference to be listed: where it is, and what.
pub(in crate::governance) struct Flip {
    pub index: i64,
    pub position: i64,
    pub flip: Vec<u8>,
}

/// Writes how far a trial has come, and what was found on the way; not where it has ended, begun anew or come further meanwhile.
pub(in crate::governance) async fn advance(
    conn: &mut PgConnection,
    was: &Shadow,
    now: &Shadow,
    flips: &[Flip],
) -> Result<bool, sqlx::Error> {
    // One statement: a daemon that stalls between two would keep the row from whoever ends the trial, and holds the head.
    let done: i64 = sqlx::query_scalar(
        "WITH s AS (
             UPDATE governance.shadows SET reached = $4, read = $5, skipped = $6, changed = $7, groups = $8
             WHERE bundle = $1 AND since = $2 AND reached = $3 AND until IS NULL RETURNING bundle
         ), f AS (
             INSERT INTO governance.shadow_flips (bundle, index, position, flip)
             SELECT s.bundle, f.index, f.position, f.flip
             FROM s, unnest($9::int8[], $10::int8[], $11::bytea[]) AS f (index, position, flip)
         )
         SELECT count(*) FROM s",
    )
    .bind(&was.bundle)
    .bind(was.since)
    .bind(was.reached)
    .bind(now.reached)
    .bind(now.read)
    .bind(now.skipped)
    .bind(now.changed)
    .bind(&now.groups)
    .bind(flips.iter().map(|f| f.index).collect::<Vec<_>>())
    .bind(flips.iter().map(|f| f.position).collect::<Vec<_>>())
    .bind(flips.iter().map(|f| f.flip.as_slice()).collect::<Vec<_>>())
    .fetch_one(conn)
    .await?;
    Ok(done == 1)
}

/// Differences after a place, in order.
pub(in crate::governance) async fn flips(
    conn: &mut PgConnection,
    bundle: &str,
    after: (i64, i64),
    limit: i64,
) -> Result<Vec<Flip>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT index, position, flip FROM governance.shadow_flips
         WHERE bundle = $1 AND (index, position) > ($2, $3) ORDER BY index, position LIMIT $4",
    )
    .bind(bundle)
    .bind(after.0)
    .bind(after.1)
    .bind(limit)
    .fetch_all(conn)
    .await?;
    let flip =
        |r: &PgRow| Ok(Flip { index: r.try_get("index")?, position: r.try_get("position")?, flip: r.try_get("flip")? });
    rows.iter().map(flip).collect()
}
