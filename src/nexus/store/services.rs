//! Rows of services.

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row as _};

use crate::nexus::model::{Fitness, Instance, Registration, Service};

fn instance(row: &PgRow) -> Result<Instance, sqlx::Error> {
    let bytes: Vec<u8> = row.try_get("instance")?;
    let registration: Registration = serde_json::from_slice(&bytes).map_err(|e| sqlx::Error::Decode(Box::new(e)))?;
    let passing: bool = row.try_get("passing")?;
    Ok(Instance {
        service: row.try_get("service")?,
        id: row.try_get("id")?,
        registration,
        status: if passing { Fitness::Passing } else { Fitness::Critical },
        why: row.try_get("why")?,
        index: row.try_get("index")?,
        created_index: row.try_get("created_index")?,
    })
}

const COLUMNS: &str = "service, id, instance, passing, why, index, created_index";

pub(in crate::nexus) async fn one(
    conn: &mut PgConnection,
    service: &str,
    id: &str,
) -> Result<Option<Instance>, sqlx::Error> {
    let sql = format!("SELECT {COLUMNS} FROM nexus.instances WHERE service = $1 AND id = $2");
    let row = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(service).bind(id).fetch_optional(conn).await?;
    row.as_ref().map(instance).transpose()
}

pub(in crate::nexus) async fn of(conn: &mut PgConnection, service: &str) -> Result<Vec<Instance>, sqlx::Error> {
    let sql = format!("SELECT {COLUMNS} FROM nexus.instances WHERE service = $1 ORDER BY id LIMIT 10000");
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(service).fetch_all(conn).await?;
    rows.iter().map(instance).collect()
}

/// Instances that have checks of their own.
pub(in crate::nexus) async fn checked(conn: &mut PgConnection) -> Result<Vec<Instance>, sqlx::Error> {
    let sql = format!("SELECT {COLUMNS} FROM nexus.instances WHERE checked ORDER BY service, id LIMIT 10000");
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql)).fetch_all(conn).await?;
    rows.iter().map(instance).collect()
}

/// Whether this client, or anybody, has registered an instance of this service.
pub(in crate::nexus) async fn provides(
    conn: &mut PgConnection,
    client: Option<&str>,
    service: &str,
) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT EXISTS (SELECT FROM nexus.instances WHERE service = $1 AND ($2::text IS NULL OR owner = $2))",
    )
    .bind(service)
    .bind(client)
    .fetch_one(conn)
    .await
}

/// Services in order of the name, after `after`.
pub(in crate::nexus) async fn list(
    conn: &mut PgConnection,
    after: &str,
    limit: i64,
) -> Result<Vec<Service>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT service, count(*) AS instances, count(*) FILTER (WHERE passing) AS passing FROM nexus.instances
         WHERE service > $1 GROUP BY service ORDER BY service LIMIT $2",
    )
    .bind(after)
    .bind(limit)
    .fetch_all(conn)
    .await?;
    let row = |r: &PgRow| {
        Ok(Service { name: r.try_get("service")?, instances: r.try_get("instances")?, passing: r.try_get("passing")? })
    };
    rows.iter().map(row).collect()
}

/// Puts an instance, and what happened to it.
pub(in crate::nexus) async fn put(
    conn: &mut PgConnection,
    instance: &Instance,
    owner: &str,
    event: &str,
) -> Result<(), sqlx::Error> {
    let kept = serde_json::to_vec(&instance.registration).map_err(|e| sqlx::Error::Encode(Box::new(e)))?;
    sqlx::query(
        "INSERT INTO nexus.instances (service, id, instance, ttl_ms, passing, why, created_index, index, beat, checked, owner)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $8, $9, $10)
         ON CONFLICT (service, id) DO UPDATE SET instance = excluded.instance, ttl_ms = excluded.ttl_ms,
             passing = excluded.passing, why = excluded.why, index = excluded.index, beat = excluded.beat,
             checked = excluded.checked, owner = excluded.owner",
    )
    .bind(&instance.service)
    .bind(&instance.id)
    .bind(kept)
    .bind(instance.registration.ttl_ms())
    .bind(instance.status == Fitness::Passing)
    .bind(&instance.why)
    .bind(instance.created_index)
    .bind(instance.index)
    .bind(!instance.registration.checks.is_empty())
    .bind(owner)
    .execute(&mut *conn)
    .await?;
    tell(conn, instance, instance.index, event).await
}

/// Says how an instance is from now on.
pub(in crate::nexus) async fn set_status(conn: &mut PgConnection, instance: &Instance) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE nexus.instances SET passing = $3, why = $4, index = $5 WHERE service = $1 AND id = $2")
        .bind(&instance.service)
        .bind(&instance.id)
        .bind(instance.status == Fitness::Passing)
        .bind(&instance.why)
        .bind(instance.index)
        .execute(&mut *conn)
        .await?;
    tell(conn, instance, instance.index, "status").await
}

pub(in crate::nexus) async fn remove(
    conn: &mut PgConnection,
    instance: &Instance,
    index: i64,
    event: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM nexus.instances WHERE service = $1 AND id = $2")
        .bind(&instance.service)
        .bind(&instance.id)
        .execute(&mut *conn)
        .await?;
    tell(conn, instance, index, event).await
}

async fn tell(conn: &mut PgConnection, instance: &Instance, index: i64, event: &str) -> Result<(), sqlx::Error> {
    let shown = serde_json::to_vec(instance).map_err(|e| sqlx::Error::Encode(Box::new(e)))?;
    sqlx::query("INSERT INTO nexus.changes (index, service, id, event, instance) VALUES ($1, $2, $3, $4, $5)")
        .bind(index)
        .bind(&instance.service)
        .bind(&instance.id)
        .bind(event)
        .bind(shown)
        .execute(conn)
        .await?;
    Ok(())
}

/// What happened to a service's instances after `after`, in order: index, event, the instance after it as JSON.
pub(in crate::nexus) async fn changes(
    conn: &mut PgConnection,
    service: &str,
    after: i64,
    limit: i64,
) -> Result<Vec<(i64, String, Vec<u8>)>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT index, event, instance FROM nexus.changes WHERE service = $1 AND index > $2 ORDER BY index, id LIMIT $3",
    )
    .bind(service)
    .bind(after)
    .bind(limit)
    .fetch_all(conn)
    .await?;
    rows.iter().map(|r| Ok((r.try_get("index")?, r.try_get("event")?, r.try_get("instance")?))).collect()
}

/// Notes signs of life; which instances there were, with their time to live.
pub(in crate::nexus) async fn beat(
    conn: &mut PgConnection,
    index: i64,
    services: &[&str],
    ids: &[&str],
) -> Result<Vec<(String, String, i64)>, sqlx::Error> {
    let rows = sqlx::query(
        "UPDATE nexus.instances AS i SET beat = $1 FROM unnest($2::text[], $3::text[]) AS b (service, id)
         WHERE i.service = b.service AND i.id = b.id RETURNING i.service, i.id, i.ttl_ms",
    )
    .bind(index)
    .bind(services)
    .bind(ids)
    .fetch_all(conn)
    .await?;
    rows.iter().map(|r| Ok((r.try_get("service")?, r.try_get("id")?, r.try_get("ttl_ms")?))).collect()
}

/// An instance's last sign of life.
pub(in crate::nexus) struct Sign {
    pub service: String,
    pub id: String,
    pub beat: i64,
    pub ttl_ms: i64,
}

pub(in crate::nexus) async fn signs(conn: &mut PgConnection) -> Result<Vec<Sign>, sqlx::Error> {
    let rows = sqlx::query("SELECT service, id, beat, ttl_ms FROM nexus.instances").fetch_all(conn).await?;
    let row = |r: &PgRow| {
        Ok(Sign {
            service: r.try_get("service")?,
            id: r.try_get("id")?,
            beat: r.try_get("beat")?,
            ttl_ms: r.try_get("ttl_ms")?,
        })
    };
    rows.iter().map(row).collect()
}

/// The beat of one instance.
pub(in crate::nexus) async fn beat_of(
    conn: &mut PgConnection,
    service: &str,
    id: &str,
) -> Result<Option<i64>, sqlx::Error> {
    sqlx::query_scalar("SELECT beat FROM nexus.instances WHERE service = $1 AND id = $2")
        .bind(service)
        .bind(id)
        .fetch_optional(conn)
        .await
}
