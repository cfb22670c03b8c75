//! Saved searches and when their alerts were raised.

use sqlx::{PgConnection, Row as _};

use crate::kernel::Timestamp;

/// A saved search as it is kept.
pub(in crate::audit) struct Row {
    pub name: String,
    pub definition: Vec<u8>,
    pub index: i64,
}

fn read(r: &sqlx::postgres::PgRow) -> Result<Row, sqlx::Error> {
    Ok(Row { name: r.try_get("name")?, definition: r.try_get("definition")?, index: r.try_get("index")? })
}

pub(in crate::audit) async fn one(conn: &mut PgConnection, name: &str) -> Result<Option<Row>, sqlx::Error> {
    let row = sqlx::query("SELECT name, definition, index FROM audit.searches WHERE name = $1").bind(name);
    row.fetch_optional(conn).await?.as_ref().map(read).transpose()
}

/// In the order of their names, past `after`.
pub(in crate::audit) async fn list(conn: &mut PgConnection, after: &str, limit: i64) -> Result<Vec<Row>, sqlx::Error> {
    let rows = sqlx::query("SELECT name, definition, index FROM audit.searches WHERE name > $1 ORDER BY name LIMIT $2");
    rows.bind(after).bind(limit).fetch_all(conn).await?.iter().map(read).collect()
}

pub(in crate::audit) async fn put(conn: &mut PgConnection, row: &Row) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO audit.searches (name, definition, index) VALUES ($1, $2, $3)
         ON CONFLICT (name) DO UPDATE SET definition = excluded.definition, index = excluded.index",
    )
    .bind(&row.name)
    .bind(&row.definition)
    .bind(row.index)
    .execute(conn)
    .await
    .map(|_| ())
}

pub(in crate::audit) async fn remove(conn: &mut PgConnection, name: &str) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM audit.alerts WHERE name = $1").bind(name).execute(&mut *conn).await?;
    sqlx::query("DELETE FROM audit.searches WHERE name = $1").bind(name).execute(conn).await.map(|_| ())
}

/// When the alert of a group was raised last, milliseconds.
pub(in crate::audit) async fn raised(
    conn: &mut PgConnection,
    name: &str,
    group: &str,
) -> Result<Option<i64>, sqlx::Error> {
    sqlx::query_scalar("SELECT (extract(epoch FROM time) * 1000)::int8 FROM audit.alerts WHERE name = $1 AND grp = $2")
        .bind(name)
        .bind(group)
        .fetch_optional(conn)
        .await
}

pub(in crate::audit) async fn raise(
    conn: &mut PgConnection,
    name: &str,
    group: &str,
    time: Timestamp,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO audit.alerts (name, grp, time) VALUES ($1, $2, $3) ON CONFLICT (name, grp) DO UPDATE SET time = excluded.time",
    )
    .bind(name)
    .bind(group)
    .bind(time.to_offset())
    .execute(conn)
    .await
    .map(|_| ())
}
