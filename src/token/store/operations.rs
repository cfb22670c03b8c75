//! Rows of operation tokens.

use std::collections::HashMap;
use std::sync::Arc;

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row as _};
use uuid::Uuid;

use crate::kernel::Timestamp;
use crate::ledger::hot::Column;
use crate::token::model::Operation;
use crate::token::operations::{Standing, digest};

fn operation(r: &PgRow) -> Result<Operation, sqlx::Error> {
    Ok(Operation {
        id: r.try_get("id")?,
        token: None,
        kind: r.try_get("kind")?,
        status: r.try_get("status")?,
        operation: r.try_get("operation")?,
        audience: r.try_get("audience")?,
        resource: r.try_get("resource")?,
        subject: r.try_get("subject")?,
        purpose: r.try_get("purpose")?,
        issuer: r.try_get("issuer")?,
        parent: r.try_get("parent")?,
        max_uses: r.try_get("max_uses")?,
        uses: r.try_get("uses")?,
        issued_at: Timestamp::from_offset(r.try_get("issued_at")?),
        expires_at: Timestamp::from_offset(r.try_get("expires_at")?),
    })
}

/// The room's part of the ledger's statement: how often each token was used, once for each token of a batch.
pub(in crate::token) const USES: &str = ", used AS (
        UPDATE token.operations AS o SET uses = u.uses FROM head, unnest({0}::uuid[], {1}::int8[]) AS u (id, uses)
        WHERE o.id = u.id
    )";

/// The columns of [`USES`]: of several uses of one token the last counts.
pub(in crate::token) fn columns(used: Vec<(Uuid, i64)>) -> Vec<Column> {
    let last: HashMap<Uuid, i64> = used.into_iter().collect();
    let (ids, uses) = last.into_iter().unzip();
    vec![Column::Ids(ids), Column::Ints(uses)]
}

/// What there is to know of tokens with these digests.
pub(in crate::token) async fn standings(
    conn: &mut PgConnection,
    digests: &[Vec<u8>],
) -> Result<Vec<(Vec<u8>, Standing)>, sqlx::Error> {
    let rows =
        sqlx::query("SELECT * FROM token.operations WHERE digest = ANY ($1)").bind(digests).fetch_all(conn).await?;
    let standing = |r: &PgRow| {
        let token = operation(r)?;
        let uses = token.uses;
        Ok((r.try_get("digest")?, Standing { token: Arc::new(token), uses }))
    };
    rows.iter().map(standing).collect()
}

/// A token and its digest.
pub(in crate::token) async fn by_id(
    conn: &mut PgConnection,
    id: Uuid,
) -> Result<Option<(Operation, Vec<u8>)>, sqlx::Error> {
    let row = sqlx::query("SELECT * FROM token.operations WHERE id = $1").bind(id).fetch_optional(conn).await?;
    row.map(|r| Ok((operation(&r)?, r.try_get("digest")?))).transpose()
}

/// Tokens in order of their id, after `after`; those of a todo's steps, if it is named.
pub(in crate::token) async fn list(
    conn: &mut PgConnection,
    todo: Option<Uuid>,
    after: Option<Uuid>,
    limit: i64,
) -> Result<Vec<Operation>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT * FROM token.operations WHERE ($1::uuid IS NULL OR id > $1) AND ($2::uuid IS NULL OR parent = $2)
         ORDER BY id LIMIT $3",
    )
    .bind(after)
    .bind(todo)
    .bind(limit)
    .fetch_all(conn)
    .await?;
    rows.iter().map(operation).collect()
}

pub(in crate::token) async fn put(conn: &mut PgConnection, tokens: &[Operation]) -> Result<(), sqlx::Error> {
    let texts = |of: fn(&Operation) -> &String| tokens.iter().map(|o| of(o).clone()).collect::<Vec<_>>();
    let maybe = |of: fn(&Operation) -> &Option<String>| tokens.iter().map(|o| of(o).clone()).collect::<Vec<_>>();
    let times = |of: fn(&Operation) -> Timestamp| tokens.iter().map(|o| of(o).to_offset()).collect::<Vec<_>>();
    sqlx::query(
        "INSERT INTO token.operations (id, digest, kind, operation, audience, resource, subject, purpose, issuer, parent,
                                       max_uses, uses, status, issued_at, expires_at)
         SELECT id, digest, kind, operation, audience, resource, subject, purpose, issuer, parent, max_uses, 0, 'active',
                issued_at, expires_at
         FROM unnest($1::uuid[], $2::bytea[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[],
                     $9::text[], $10::uuid[], $11::int8[], $12::timestamptz[], $13::timestamptz[])
              AS t (id, digest, kind, operation, audience, resource, subject, purpose, issuer, parent, max_uses, issued_at,
                    expires_at)",
    )
    .bind(tokens.iter().map(|o| o.id).collect::<Vec<_>>())
    .bind(tokens.iter().map(|o| digest(o.token.as_deref().unwrap_or_default()).to_vec()).collect::<Vec<_>>())
    .bind(texts(|o| &o.kind))
    .bind(texts(|o| &o.operation))
    .bind(texts(|o| &o.audience))
    .bind(maybe(|o| &o.resource))
    .bind(maybe(|o| &o.subject))
    .bind(maybe(|o| &o.purpose))
    .bind(texts(|o| &o.issuer))
    .bind(tokens.iter().map(|o| o.parent).collect::<Vec<_>>())
    .bind(tokens.iter().map(|o| o.max_uses).collect::<Vec<_>>())
    .bind(times(|o| o.issued_at))
    .bind(times(|o| o.expires_at))
    .execute(conn)
    .await?;
    Ok(())
}

pub(in crate::token) async fn set_uses(conn: &mut PgConnection, id: Uuid, uses: i64) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE token.operations SET uses = $2 WHERE id = $1").bind(id).bind(uses).execute(conn).await?;
    Ok(())
}

pub(in crate::token) async fn set_status(
    conn: &mut PgConnection,
    ids: &[Uuid],
    status: &str,
) -> Result<(), sqlx::Error> {
    let sql = "UPDATE token.operations SET status = $2 WHERE id = ANY ($1)";
    sqlx::query(sql).bind(ids).bind(status).execute(conn).await?;
    Ok(())
}

/// The tokens that were issued with this one, and with those in turn, and are not ended.
pub(in crate::token) async fn descendants(conn: &mut PgConnection, id: Uuid) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar(
        "WITH RECURSIVE beneath AS (
             SELECT id, status FROM token.operations WHERE parent = $1
             UNION ALL
             SELECT o.id, o.status FROM token.operations AS o JOIN beneath AS b ON o.parent = b.id
         ) SELECT id FROM beneath WHERE status = 'active'",
    )
    .bind(id)
    .fetch_all(conn)
    .await
}
