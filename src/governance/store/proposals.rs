//! Proposals, and who approved them.

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row as _};
use uuid::Uuid;

use crate::governance::needs::{self, Need};
use crate::kernel::Timestamp;

/// A proposal as it is stored.
#[derive(Clone, Debug)]
pub(in crate::governance) struct Proposal {
    pub id: Uuid,
    pub kind: String,
    pub action: String,
    pub target: String,
    pub change: Vec<u8>,
    pub body: Option<Vec<u8>>,
    pub author: String,
    pub authors: Vec<String>,
    pub reason: String,
    pub needs: Vec<Need>,
    pub status: String,
    pub overridden: Option<String>,
    pub reviewed: Option<String>,
    pub created: i64,
    pub time: Timestamp,
    pub expires: Timestamp,
    pub index: i64,
    pub applied: Option<i64>,
}

/// One voice.
#[derive(Clone, Debug)]
pub(in crate::governance) struct Voice {
    pub approver: String,
    pub approves: bool,
    pub outside: bool,
    /// Those of the roles that were wanted which they were in.
    pub roles: Vec<String>,
    pub reason: String,
    pub index: i64,
    pub time: Timestamp,
}

const COLUMNS: &str = "id, kind, action, target, change, body, author, authors, reason, needs, status, override, reviewed, created, time, expires, index, applied";
/// The same, but for the body.
const LISTED: &str = "id, kind, action, target, change, NULL::bytea AS body, author, authors, reason, needs, status, override, reviewed, created, time, expires, index, applied";

fn proposal(r: &PgRow) -> Result<Proposal, sqlx::Error> {
    Ok(Proposal {
        id: r.try_get("id")?,
        kind: r.try_get("kind")?,
        action: r.try_get("action")?,
        target: r.try_get("target")?,
        change: r.try_get("change")?,
        body: r.try_get("body")?,
        author: r.try_get("author")?,
        authors: r.try_get("authors")?,
        reason: r.try_get("reason")?,
        needs: serde_json::from_slice(r.try_get("needs")?).map_err(|e| sqlx::Error::Decode(Box::new(e)))?,
        status: r.try_get("status")?,
        overridden: r.try_get("override")?,
        reviewed: r.try_get("reviewed")?,
        created: r.try_get("created")?,
        time: Timestamp::from_offset(r.try_get("time")?),
        expires: Timestamp::from_offset(r.try_get("expires")?),
        index: r.try_get("index")?,
        applied: r.try_get("applied")?,
    })
}

pub(in crate::governance) async fn put(conn: &mut PgConnection, p: &Proposal) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO governance.proposals (id, kind, action, target, change, body, author, authors, reason, required, role, outside, needs, status, created, time, expires, index)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $15)",
    )
    .bind(p.id)
    .bind(&p.kind)
    .bind(&p.action)
    .bind(&p.target)
    .bind(&p.change)
    .bind(&p.body)
    .bind(&p.author)
    .bind(&p.authors)
    .bind(&p.reason)
    .bind(needs::required(&p.needs))
    .bind(needs::role(&p.needs))
    .bind(needs::outside(&p.needs))
    .bind(serde_json::to_vec(&p.needs).map_err(|e| sqlx::Error::Encode(Box::new(e)))?)
    .bind(&p.status)
    .bind(p.created)
    .bind(p.time.to_offset())
    .bind(p.expires.to_offset())
    .execute(conn)
    .await
    .map(|_| ())
}

pub(in crate::governance) async fn one(conn: &mut PgConnection, id: Uuid) -> Result<Option<Proposal>, sqlx::Error> {
    let sql = format!("SELECT {COLUMNS} FROM governance.proposals WHERE id = $1");
    let row = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(id).fetch_optional(conn).await?;
    row.as_ref().map(proposal).transpose()
}

/// Approved ones that allow this change now, the oldest first.
pub(in crate::governance) async fn approved(
    conn: &mut PgConnection,
    change: &[u8],
    now: Timestamp,
) -> Result<Vec<Proposal>, sqlx::Error> {
    let sql = format!(
        "SELECT {LISTED} FROM governance.proposals WHERE change = $1 AND status = 'approved' AND expires > $2 ORDER BY created LIMIT 10"
    );
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(change).bind(now.to_offset()).fetch_all(conn).await?;
    rows.iter().map(proposal).collect()
}

/// How many of an author are pending.
pub(in crate::governance) async fn pending(conn: &mut PgConnection, author: &str) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT count(*) FROM governance.proposals WHERE author = $1 AND status = 'pending'")
        .bind(author)
        .fetch_one(conn)
        .await
}

/// Newest first, those made before `before`.
pub(in crate::governance) async fn page(
    conn: &mut PgConnection,
    before: i64,
    status: Option<&str>,
    unreviewed: bool,
    limit: i64,
) -> Result<Vec<Proposal>, sqlx::Error> {
    let sql = format!(
        "SELECT {LISTED} FROM governance.proposals WHERE created < $1 AND ($2::text IS NULL OR status = $2)
         AND (NOT $3 OR (override IS NOT NULL AND reviewed IS NULL)) ORDER BY created DESC LIMIT $4"
    );
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(before)
        .bind(status)
        .bind(unreviewed)
        .bind(limit)
        .fetch_all(conn)
        .await?;
    rows.iter().map(proposal).collect()
}

/// Open ones that are past their time.
pub(in crate::governance) async fn past(conn: &mut PgConnection, now: Timestamp) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT id FROM governance.proposals WHERE status IN ('pending', 'approved') AND expires <= $1 ORDER BY expires LIMIT 100",
    )
    .bind(now.to_offset())
    .fetch_all(conn)
    .await
}

/// Writes what of a proposal can change.
pub(in crate::governance) async fn update(conn: &mut PgConnection, p: &Proposal) -> Result<(), sqlx::Error> {
    sqlx::query(
        "UPDATE governance.proposals SET status = $2, override = $3, reviewed = $4, index = $5, applied = $6 WHERE id = $1",
    )
    .bind(p.id)
    .bind(&p.status)
    .bind(&p.overridden)
    .bind(&p.reviewed)
    .bind(p.index)
    .bind(p.applied)
    .execute(conn)
    .await
    .map(|_| ())
}

pub(in crate::governance) async fn voices(conn: &mut PgConnection, id: Uuid) -> Result<Vec<Voice>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT approver, approves, outside, roles, reason, index, time FROM governance.approvals WHERE proposal = $1 ORDER BY index",
    )
    .bind(id)
    .fetch_all(conn)
    .await?;
    let voice = |r: &PgRow| {
        Ok(Voice {
            approver: r.try_get("approver")?,
            approves: r.try_get("approves")?,
            outside: r.try_get("outside")?,
            roles: r.try_get("roles")?,
            reason: r.try_get("reason")?,
            index: r.try_get("index")?,
            time: Timestamp::from_offset(r.try_get("time")?),
        })
    };
    rows.iter().map(voice).collect()
}

pub(in crate::governance) async fn speak(conn: &mut PgConnection, id: Uuid, v: &Voice) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO governance.approvals (proposal, approver, approves, outside, reason, index, time, roles) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
    )
    .bind(id)
    .bind(&v.approver)
    .bind(v.approves)
    .bind(v.outside)
    .bind(&v.reason)
    .bind(v.index)
    .bind(v.time.to_offset())
    .bind(&v.roles)
    .execute(conn)
    .await
    .map(|_| ())
}
