//! Bundles, and what was in force when.

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row as _};

use crate::kernel::Timestamp;

/// A bundle as it is stored, without its text.
#[derive(Clone, Debug)]
pub(in crate::governance) struct Bundle {
    pub id: String,
    pub scope: String,
    pub note: String,
    pub author: String,
    pub validated: bool,
    pub count: i32,
    pub status: String,
    pub shipped: Option<i32>,
    pub created: i64,
    pub time: Timestamp,
    pub index: i64,
    pub activated: Option<i64>,
}

/// Its text.
pub(in crate::governance) struct Text {
    pub policies: Vec<u8>,
    pub schema: Option<Vec<u8>>,
    /// Its cases, JSON.
    pub tests: Option<Vec<u8>>,
}

/// What is in force from an index on.
#[derive(Clone, Debug)]
pub(in crate::governance) struct InForce {
    pub index: i64,
    pub system: String,
    pub application: Option<String>,
    pub canary: Option<String>,
    pub percent: f64,
    /// New denials, of a hundred decisions of the canary, above which it stops.
    pub stop_at: f64,
}

const COLUMNS: &str = "id, scope, note, author, validated, count, status, shipped, created, time, index, activated";

fn bundle(r: &PgRow) -> Result<Bundle, sqlx::Error> {
    Ok(Bundle {
        id: r.try_get("id")?,
        scope: r.try_get("scope")?,
        note: r.try_get("note")?,
        author: r.try_get("author")?,
        validated: r.try_get("validated")?,
        count: r.try_get("count")?,
        status: r.try_get("status")?,
        shipped: r.try_get("shipped")?,
        created: r.try_get("created")?,
        time: Timestamp::from_offset(r.try_get("time")?),
        index: r.try_get("index")?,
        activated: r.try_get("activated")?,
    })
}

pub(in crate::governance) async fn put(conn: &mut PgConnection, b: &Bundle, text: &Text) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO governance.bundles (id, scope, policies, schema, note, author, validated, count, status, shipped, created, time, index, tests)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $11, $13)",
    )
    .bind(&b.id)
    .bind(&b.scope)
    .bind(&text.policies)
    .bind(&text.schema)
    .bind(&b.note)
    .bind(&b.author)
    .bind(b.validated)
    .bind(b.count)
    .bind(&b.status)
    .bind(b.shipped)
    .bind(b.created)
    .bind(b.time.to_offset())
    .bind(&text.tests)
    .execute(conn)
    .await
    .map(|_| ())
}

pub(in crate::governance) async fn one(conn: &mut PgConnection, id: &str) -> Result<Option<Bundle>, sqlx::Error> {
    let sql = format!("SELECT {COLUMNS} FROM governance.bundles WHERE id = $1");
    let row = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(id).fetch_optional(conn).await?;
    row.as_ref().map(bundle).transpose()
}

pub(in crate::governance) async fn text(conn: &mut PgConnection, id: &str) -> Result<Option<Text>, sqlx::Error> {
    let row = sqlx::query("SELECT policies, schema, tests FROM governance.bundles WHERE id = $1")
        .bind(id)
        .fetch_optional(conn)
        .await?;
    let read = |r: PgRow| {
        Ok(Text { policies: r.try_get("policies")?, schema: r.try_get("schema")?, tests: r.try_get("tests")? })
    };
    row.map(read).transpose()
}

/// Newest first, those made before `before`.
pub(in crate::governance) async fn page(
    conn: &mut PgConnection,
    before: i64,
    status: Option<&str>,
    limit: i64,
) -> Result<Vec<Bundle>, sqlx::Error> {
    let sql = format!(
        "SELECT {COLUMNS} FROM governance.bundles WHERE created < $1 AND ($2::text IS NULL OR status = $2)
         ORDER BY created DESC LIMIT $3"
    );
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(before).bind(status).bind(limit).fetch_all(conn).await?;
    rows.iter().map(bundle).collect()
}

pub(in crate::governance) async fn set_status(
    conn: &mut PgConnection,
    id: &str,
    status: &str,
    index: i64,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "UPDATE governance.bundles SET status = $2, index = $3, activated = CASE WHEN $2 = 'active' THEN $3 ELSE activated END,
             resting = CASE WHEN $2 IN ('validated', 'retired') THEN $2 ELSE resting END
         WHERE id = $1",
    )
    .bind(id)
    .bind(status)
    .bind(index)
    .execute(conn)
    .await
    .map(|_| ())
}

/// A trial has ended: the bundle is again what it was before.
pub(in crate::governance) async fn rest(conn: &mut PgConnection, id: &str, index: i64) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE governance.bundles SET status = resting, index = $2 WHERE id = $1")
        .bind(id)
        .bind(index)
        .execute(conn)
        .await
        .map(|_| ())
}

fn in_force(r: &PgRow) -> Result<InForce, sqlx::Error> {
    Ok(InForce {
        index: r.try_get("index")?,
        system: r.try_get("system")?,
        application: r.try_get("application")?,
        canary: r.try_get("canary")?,
        percent: r.try_get("percent")?,
        stop_at: r.try_get("stop_at")?,
    })
}

/// What was in force at an index.
pub(in crate::governance) async fn in_force_at(
    conn: &mut PgConnection,
    at: i64,
) -> Result<Option<InForce>, sqlx::Error> {
    let row = sqlx::query(
        "SELECT index, system, application, canary, percent, stop_at FROM governance.in_force WHERE index <= $1 ORDER BY index DESC LIMIT 1",
    )
    .bind(at)
    .fetch_optional(conn)
    .await?;
    row.as_ref().map(in_force).transpose()
}

/// Bundles that came into force lately, the newest first.
pub(in crate::governance) async fn lately(conn: &mut PgConnection, limit: i64) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar("SELECT id FROM governance.bundles WHERE activated IS NOT NULL ORDER BY activated DESC LIMIT $1")
        .bind(limit)
        .fetch_all(conn)
        .await
}

/// The application's bundle that was in force before the one that is: the outer `None` when there was no other time.
pub(in crate::governance) async fn before(
    conn: &mut PgConnection,
    now: &InForce,
) -> Result<Option<Option<String>>, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT application FROM governance.in_force WHERE application IS DISTINCT FROM $1 ORDER BY index DESC LIMIT 1",
    )
    .bind(&now.application)
    .fetch_optional(conn)
    .await
}

pub(in crate::governance) async fn enforce(
    conn: &mut PgConnection,
    now: &InForce,
    cause: &str,
    actor: &str,
    time: Timestamp,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO governance.in_force (index, system, application, canary, percent, stop_at, cause, actor, time)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
    )
    .bind(now.index)
    .bind(&now.system)
    .bind(&now.application)
    .bind(&now.canary)
    .bind(now.percent)
    .bind(now.stop_at)
    .bind(cause)
    .bind(actor)
    .bind(time.to_offset())
    .execute(conn)
    .await
    .map(|_| ())
}
