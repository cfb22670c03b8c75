//! The room's SQL.

use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, PgConnection, Row as _};
use uuid::Uuid;

use crate::kernel::Timestamp;

use super::model::{Check, Happened, Incident, Stage, Status};

const CHECK: &str =
    "SELECT name, spec, status, output, since_ms, created_index, spec_index, index, beat FROM health.checks";

fn check(r: &PgRow) -> Result<Check, sqlx::Error> {
    let spec: Vec<u8> = r.try_get("spec")?;
    let status: String = r.try_get("status")?;
    Ok(Check {
        name: r.try_get("name")?,
        spec: serde_json::from_slice(&spec).map_err(|e| sqlx::Error::Decode(Box::new(e)))?,
        status: Status::of(&status),
        output: r.try_get("output")?,
        since: Timestamp::from_millis(r.try_get("since_ms")?),
        index: r.try_get("index")?,
        created_index: r.try_get("created_index")?,
        spec_index: r.try_get("spec_index")?,
        beat: r.try_get("beat")?,
    })
}

pub(super) async fn one(conn: &mut PgConnection, name: &str) -> Result<Option<Check>, sqlx::Error> {
    let sql = format!("{CHECK} WHERE name = $1");
    let row = sqlx::query(AssertSqlSafe(sql)).bind(name).fetch_optional(conn).await?;
    row.as_ref().map(check).transpose()
}

/// Checks in order of the name, after `after`.
pub(super) async fn list(
    conn: &mut PgConnection,
    status: Option<&str>,
    service: Option<&str>,
    after: &str,
    limit: i64,
) -> Result<Vec<Check>, sqlx::Error> {
    let sql = format!(
        "{CHECK} WHERE ($1::text IS NULL OR status = $1) AND ($2::text IS NULL OR service = $2) AND name > $3
         ORDER BY name LIMIT $4"
    );
    let rows =
        sqlx::query(AssertSqlSafe(sql)).bind(status).bind(service).bind(after).bind(limit).fetch_all(conn).await?;
    rows.iter().map(check).collect()
}

pub(super) async fn put(conn: &mut PgConnection, c: &Check) -> Result<(), sqlx::Error> {
    let spec = serde_json::to_vec(&c.spec).map_err(|e| sqlx::Error::Encode(Box::new(e)))?;
    sqlx::query(
        "INSERT INTO health.checks (name, spec, service, status, output, since_ms, created_index, spec_index, index, beat)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
         ON CONFLICT (name) DO UPDATE SET spec = excluded.spec, service = excluded.service, status = excluded.status,
             output = excluded.output, since_ms = excluded.since_ms, spec_index = excluded.spec_index,
             index = excluded.index, beat = excluded.beat",
    )
    .bind(&c.name)
    .bind(spec)
    .bind(&c.spec.service)
    .bind(c.status.as_str())
    .bind(&c.output)
    .bind(c.since.millis())
    .bind(c.created_index)
    .bind(c.spec_index)
    .bind(c.index)
    .bind(c.beat)
    .execute(conn)
    .await?;
    Ok(())
}

pub(super) async fn remove(conn: &mut PgConnection, name: &str) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM health.checks WHERE name = $1").bind(name).execute(conn).await.map(|_| ())
}

/// Notes reports that change nothing; which checks there were.
pub(super) async fn beat(conn: &mut PgConnection, names: &[&str], index: i64) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar("UPDATE health.checks SET beat = $2 WHERE name = ANY ($1) RETURNING name")
        .bind(names)
        .bind(index)
        .fetch_all(conn)
        .await
}

/// How many checks are how.
pub(super) async fn counts(conn: &mut PgConnection) -> Result<Vec<(String, i64)>, sqlx::Error> {
    let rows = sqlx::query("SELECT status, count(*) AS n FROM health.checks GROUP BY status").fetch_all(conn).await?;
    rows.iter().map(|r| Ok((r.try_get("status")?, r.try_get("n")?))).collect()
}

const INCIDENT: &str =
    "SELECT id, fingerprint, severity, status, summary, service, opened_ms, opened_index, resolved_ms, resolved_index
    FROM health.incidents";

fn incident(r: &PgRow) -> Result<Incident, sqlx::Error> {
    let status: String = r.try_get("status")?;
    let resolved: Option<i64> = r.try_get("resolved_ms")?;
    Ok(Incident {
        id: r.try_get("id")?,
        fingerprint: r.try_get("fingerprint")?,
        severity: r.try_get("severity")?,
        status: match status.as_str() {
            "open" => Stage::Open,
            "acknowledged" => Stage::Acknowledged,
            _ => Stage::Resolved,
        },
        summary: r.try_get("summary")?,
        service: r.try_get("service")?,
        opened_at: Timestamp::from_millis(r.try_get("opened_ms")?),
        opened_index: r.try_get("opened_index")?,
        resolved_at: resolved.map(Timestamp::from_millis),
        resolved_index: r.try_get("resolved_index")?,
        events: None,
    })
}

/// The incident of a fingerprint that is not over.
pub(super) async fn open(conn: &mut PgConnection, fingerprint: &str) -> Result<Option<Incident>, sqlx::Error> {
    let sql = format!("{INCIDENT} WHERE fingerprint = $1 AND status <> 'resolved'");
    let row = sqlx::query(AssertSqlSafe(sql)).bind(fingerprint).fetch_optional(conn).await?;
    row.as_ref().map(incident).transpose()
}

pub(super) async fn incident_of(conn: &mut PgConnection, id: Uuid) -> Result<Option<Incident>, sqlx::Error> {
    let sql = format!("{INCIDENT} WHERE id = $1");
    let row = sqlx::query(AssertSqlSafe(sql)).bind(id).fetch_optional(conn).await?;
    row.as_ref().map(incident).transpose()
}

/// Incidents, newest first, before `before`.
pub(super) async fn incidents(
    conn: &mut PgConnection,
    status: Option<&str>,
    severity: Option<&str>,
    before: (i64, Uuid),
    limit: i64,
) -> Result<Vec<Incident>, sqlx::Error> {
    let sql = format!(
        "{INCIDENT} WHERE ($1::text IS NULL OR status = $1) AND ($2::text IS NULL OR severity = $2)
         AND (opened_index, id) < ($3, $4) ORDER BY opened_index DESC, id DESC LIMIT $5"
    );
    let query = sqlx::query(AssertSqlSafe(sql)).bind(status).bind(severity).bind(before.0).bind(before.1).bind(limit);
    query.fetch_all(conn).await?.iter().map(incident).collect()
}

pub(super) async fn events(conn: &mut PgConnection, id: Uuid) -> Result<Vec<Happened>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT index, ms, actor, kind, note FROM health.incident_events WHERE incident = $1 ORDER BY index LIMIT 10000",
    )
    .bind(id)
    .fetch_all(conn)
    .await?;
    let row = |r: &PgRow| {
        Ok(Happened {
            index: r.try_get("index")?,
            time: Timestamp::from_millis(r.try_get("ms")?),
            actor: r.try_get("actor")?,
            kind: r.try_get("kind")?,
            note: r.try_get("note")?,
        })
    };
    rows.iter().map(row).collect()
}

/// Puts an incident, and what happened to it.
pub(super) async fn put_incident(
    conn: &mut PgConnection,
    i: &Incident,
    happened: &Happened,
) -> Result<(), sqlx::Error> {
    let status = match i.status {
        Stage::Open => "open",
        Stage::Acknowledged => "acknowledged",
        Stage::Resolved => "resolved",
    };
    sqlx::query(
        "INSERT INTO health.incidents (id, fingerprint, severity, status, summary, service, opened_ms, opened_index, resolved_ms, resolved_index)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
         ON CONFLICT (id) DO UPDATE SET status = excluded.status, resolved_ms = excluded.resolved_ms,
             resolved_index = excluded.resolved_index",
    )
    .bind(i.id)
    .bind(&i.fingerprint)
    .bind(&i.severity)
    .bind(status)
    .bind(&i.summary)
    .bind(&i.service)
    .bind(i.opened_at.millis())
    .bind(i.opened_index)
    .bind(i.resolved_at.map(Timestamp::millis))
    .bind(i.resolved_index)
    .execute(&mut *conn)
    .await?;
    sqlx::query(
        "INSERT INTO health.incident_events (incident, index, ms, actor, kind, note) VALUES ($1, $2, $3, $4, $5, $6)",
    )
    .bind(i.id)
    .bind(happened.index)
    .bind(happened.time.millis())
    .bind(&happened.actor)
    .bind(&happened.kind)
    .bind(&happened.note)
    .execute(conn)
    .await?;
    Ok(())
}

/// Up to where signals were taken in.
pub(super) async fn followed(conn: &mut PgConnection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT at FROM health.followed WHERE id = 1").fetch_one(conn).await
}

/// Moves that forward, never back, and not past the head: who knows entries that a failover lost must not pass over those that
/// come in their places.
pub(super) async fn follow(conn: &mut PgConnection, to: i64) -> Result<(), sqlx::Error> {
    sqlx::query(
        "UPDATE health.followed AS f SET at = least($1, h.index) FROM ledger.head AS h
         WHERE f.id = 1 AND h.id = 1 AND f.at < least($1, h.index)",
    )
    .bind(to)
    .execute(conn)
    .await
    .map(|_| ())
}
