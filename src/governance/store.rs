//! The room's SQL.

pub(super) mod bundles;
pub(super) mod decisions;
pub(super) mod proposals;
pub(super) mod shadows;

use futures_util::{StreamExt as _, TryStreamExt as _};
use serde_json::Value;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row as _};

use crate::kernel::web::EntityName;

/// An entity as it is stored.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub name: EntityName,
    pub attrs: Value,
    pub parents: Vec<EntityName>,
    pub index: i64,
}

fn row(r: &PgRow) -> Result<Row, sqlx::Error> {
    let json = |column: &str| -> Result<Value, sqlx::Error> {
        let bytes: Vec<u8> = r.try_get(column)?;
        serde_json::from_slice(&bytes).map_err(|e| sqlx::Error::Decode(Box::new(e)))
    };
    let parents = serde_json::from_value(json("parents")?).map_err(|e| sqlx::Error::Decode(Box::new(e)))?;
    Ok(Row {
        name: EntityName { kind: r.try_get("type")?, id: r.try_get("id")? },
        attrs: json("attrs")?,
        parents,
        index: r.try_get("index")?,
    })
}

/// All of them, each read as it comes: that many are not held twice.
pub(super) async fn all(conn: &mut PgConnection) -> Result<Vec<Row>, sqlx::Error> {
    let rows = sqlx::query("SELECT type, id, attrs, parents, index FROM governance.entities").fetch(conn);
    rows.map(|r| row(&r?)).try_collect().await
}

pub(super) async fn some(conn: &mut PgConnection, names: &[EntityName]) -> Result<Vec<Row>, sqlx::Error> {
    let kinds: Vec<&str> = names.iter().map(|n| n.kind.as_str()).collect();
    let ids: Vec<&str> = names.iter().map(|n| n.id.as_str()).collect();
    let rows = sqlx::query(
        "SELECT type, id, attrs, parents, index FROM governance.entities
         WHERE (type, id) IN (SELECT * FROM unnest($1::text[], $2::text[]))",
    )
    .bind(kinds)
    .bind(ids)
    .fetch_all(conn)
    .await?;
    rows.iter().map(row).collect()
}

pub(super) async fn put(
    conn: &mut PgConnection,
    name: &EntityName,
    attrs: &[u8],
    parents: &[u8],
    index: i64,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO governance.entities (type, id, attrs, parents, index) VALUES ($1, $2, $3, $4, $5)
         ON CONFLICT (type, id) DO UPDATE SET attrs = excluded.attrs, parents = excluded.parents, index = excluded.index",
    )
    .bind(&name.kind)
    .bind(&name.id)
    .bind(attrs)
    .bind(parents)
    .bind(index)
    .execute(&mut *conn)
    .await?;
    remember(conn, name, Some(attrs), Some(parents), index).await
}

/// Keeps an entity as it is from this index on.
async fn remember(
    conn: &mut PgConnection,
    name: &EntityName,
    attrs: Option<&[u8]>,
    parents: Option<&[u8]>,
    index: i64,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO governance.entity_history (type, id, index, attrs, parents) VALUES ($1, $2, $3, $4, $5)
         ON CONFLICT (type, id, index) DO UPDATE SET attrs = excluded.attrs, parents = excluded.parents",
    )
    .bind(&name.kind)
    .bind(&name.id)
    .bind(index)
    .bind(attrs)
    .bind(parents)
    .execute(conn)
    .await?;
    Ok(())
}

pub(super) async fn remove(conn: &mut PgConnection, name: &EntityName, index: i64) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM governance.entities WHERE type = $1 AND id = $2")
        .bind(&name.kind)
        .bind(&name.id)
        .execute(&mut *conn)
        .await?;
    remember(conn, name, None, None, index).await
}

/// These entities as they were at an index.
pub(super) async fn some_at(conn: &mut PgConnection, names: &[EntityName], at: i64) -> Result<Vec<Row>, sqlx::Error> {
    let kinds: Vec<&str> = names.iter().map(|n| n.kind.as_str()).collect();
    let ids: Vec<&str> = names.iter().map(|n| n.id.as_str()).collect();
    let rows = sqlx::query(
        "SELECT h.* FROM unnest($1::text[], $2::text[]) AS n (type, id), LATERAL (
             SELECT h.type, h.id, h.attrs, h.parents, h.index FROM governance.entity_history AS h
             WHERE h.type = n.type AND h.id = n.id AND h.index <= $3 ORDER BY h.index DESC LIMIT 1
         ) AS h WHERE h.attrs IS NOT NULL",
    )
    .bind(kinds)
    .bind(ids)
    .bind(at)
    .fetch_all(conn)
    .await?;
    rows.iter().map(row).collect()
}
