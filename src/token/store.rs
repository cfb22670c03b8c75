//! The room's SQL.

pub(super) mod operations;

use std::sync::Arc;
use std::sync::atomic::AtomicI64;

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row as _};

use crate::kernel::Timestamp;

use super::keys::Alg;
use super::lockout::Locked;
use super::model::Client;

/// A client with the digests of its secrets.
#[derive(Clone)]
pub(super) struct Registered {
    pub client: Client,
    pub secret: Option<Vec<u8>>,
    /// The secret before, and until when it counts.
    pub previous: Option<(Vec<u8>, Timestamp)>,
    pub registration: Vec<u8>,
    /// It proves nothing.
    pub disabled: bool,
    /// Its tokens that were decided on before this index count no more.
    pub void_index: i64,
    /// When it was registered, or its registration last changed.
    pub index: i64,
    /// When this daemon last saw it, milliseconds since 1970.
    pub used: Arc<AtomicI64>,
}

impl Registered {
    /// Whether a token of it counts that was decided on at `index`.
    pub fn accepts(&self, index: i64) -> bool {
        !self.disabled && index >= self.void_index
    }
}

const CLIENT: &str =
    "SELECT client, secret, previous, previous_until, registration, disabled, void_index, index FROM token.clients";

fn registered(r: &PgRow) -> Result<Registered, sqlx::Error> {
    let client: Vec<u8> = r.try_get("client")?;
    Ok(Registered {
        client: serde_json::from_slice(&client).map_err(|e| sqlx::Error::Decode(Box::new(e)))?,
        secret: r.try_get("secret")?,
        previous: r
            .try_get::<Option<_>, _>("previous")?
            .zip(r.try_get::<Option<_>, _>("previous_until")?.map(Timestamp::from_offset)),
        registration: r.try_get("registration")?,
        disabled: r.try_get("disabled")?,
        void_index: r.try_get("void_index")?,
        index: r.try_get("index")?,
        used: Arc::default(),
    })
}

pub(super) async fn clients(conn: &mut PgConnection) -> Result<Vec<Registered>, sqlx::Error> {
    let rows = sqlx::query(CLIENT).fetch_all(conn).await?;
    rows.iter().map(registered).collect()
}

pub(super) async fn some_clients(conn: &mut PgConnection, ids: &[String]) -> Result<Vec<Registered>, sqlx::Error> {
    let sql = format!("{CLIENT} WHERE client_id = ANY ($1)");
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(ids).fetch_all(conn).await?;
    rows.iter().map(registered).collect()
}

pub(super) async fn client_exists(conn: &mut PgConnection, id: &str) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("SELECT EXISTS (SELECT FROM token.clients WHERE client_id = $1)").bind(id).fetch_one(conn).await
}

pub(super) async fn put_client(conn: &mut PgConnection, r: &Registered, index: i64) -> Result<(), sqlx::Error> {
    let client = serde_json::to_vec(&r.client).map_err(|e| sqlx::Error::Encode(Box::new(e)))?;
    sqlx::query(
        "INSERT INTO token.clients
             (client_id, client, secret, registration, index, previous, previous_until, disabled, void_index)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
         ON CONFLICT (client_id) DO UPDATE SET client = excluded.client, secret = excluded.secret,
             registration = excluded.registration, index = excluded.index, previous = excluded.previous,
             previous_until = excluded.previous_until, disabled = excluded.disabled, void_index = excluded.void_index",
    )
    .bind(&r.client.client_id)
    .bind(client)
    .bind(&r.secret)
    .bind(&r.registration)
    .bind(index)
    .bind(r.previous.as_ref().map(|p| &p.0))
    .bind(r.previous.as_ref().map(|p| p.1.to_offset()))
    .bind(r.disabled)
    .bind(r.void_index)
    .execute(conn)
    .await?;
    Ok(())
}

/// Clients in order of their id, after `after`, and when each was last seen.
pub(super) async fn list_clients(
    conn: &mut PgConnection,
    after: &str,
    limit: i64,
) -> Result<Vec<(Registered, Option<Timestamp>)>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT c.*, u.time FROM token.clients AS c LEFT JOIN token.last_use AS u USING (client_id)
         WHERE client_id > $1 ORDER BY client_id LIMIT $2",
    )
    .bind(after)
    .bind(limit)
    .fetch_all(conn)
    .await?;
    let seen = |r: &PgRow| Ok::<_, sqlx::Error>(r.try_get::<Option<_>, _>("time")?.map(Timestamp::from_offset));
    rows.iter().map(|r| Ok((registered(r)?, seen(r)?))).collect()
}

/// A client, and when it was last seen.
pub(super) async fn one_client(
    conn: &mut PgConnection,
    id: &str,
) -> Result<Option<(Registered, Option<Timestamp>)>, sqlx::Error> {
    let sql = "SELECT c.*, u.time FROM token.clients AS c LEFT JOIN token.last_use AS u USING (client_id) WHERE client_id = $1";
    let row = sqlx::query(sql).bind(id).fetch_optional(conn).await?;
    let seen = |r: &PgRow| Ok::<_, sqlx::Error>(r.try_get::<Option<_>, _>("time")?.map(Timestamp::from_offset));
    row.map(|r| Ok((registered(&r)?, seen(&r)?))).transpose()
}

/// Keeps when clients were last seen; of several daemons' words the latest counts.
pub(super) async fn saw(conn: &mut PgConnection, seen: &[(String, Timestamp)]) -> Result<(), sqlx::Error> {
    let (ids, times): (Vec<&str>, Vec<_>) = seen.iter().map(|(id, time)| (id.as_str(), time.to_offset())).unzip();
    sqlx::query(
        "INSERT INTO token.last_use (client_id, time) SELECT * FROM unnest($1::text[], $2::timestamptz[])
         ON CONFLICT (client_id) DO UPDATE SET time = greatest(last_use.time, excluded.time)",
    )
    .bind(ids)
    .bind(times)
    .execute(conn)
    .await?;
    Ok(())
}

pub(super) async fn delete_client(conn: &mut PgConnection, id: &str) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM token.clients WHERE client_id = $1").bind(id).execute(&mut *conn).await?;
    sqlx::query("DELETE FROM token.last_use WHERE client_id = $1").bind(id).execute(conn).await?;
    Ok(())
}

/// A signing key as it is stored.
#[derive(Clone)]
pub(super) struct StoredKey {
    pub kid: String,
    pub alg: Alg,
    pub public: Vec<u8>,
    pub sealed: Vec<u8>,
    pub active_at: Timestamp,
    pub ends_at: Option<Timestamp>,
}

/// Keys, newest first.
pub(super) async fn keys(conn: &mut PgConnection) -> Result<Vec<StoredKey>, sqlx::Error> {
    let sql = "SELECT kid, alg, public, sealed, active_at, ends_at FROM token.signing_keys ORDER BY index DESC, alg";
    let rows = sqlx::query(sql).fetch_all(conn).await?;
    let read = |r: &PgRow| {
        let alg: String = r.try_get("alg")?;
        Ok(StoredKey {
            kid: r.try_get("kid")?,
            alg: Alg::parse(&alg).ok_or_else(|| sqlx::Error::Decode(format!("{alg} is no algorithm").into()))?,
            public: r.try_get("public")?,
            sealed: r.try_get("sealed")?,
            active_at: Timestamp::from_offset(r.try_get("active_at")?),
            ends_at: r.try_get::<Option<_>, _>("ends_at")?.map(Timestamp::from_offset),
        })
    };
    rows.iter().map(read).collect()
}

/// Ends the keys of this algorithm then: those that have no end yet, or all of them.
pub(super) async fn end_keys(conn: &mut PgConnection, alg: Alg, ends: Timestamp, all: bool) -> Result<(), sqlx::Error> {
    sqlx::query(
        "UPDATE token.signing_keys SET ends_at = least(ends_at, $2) WHERE alg = $1 AND ($3 OR ends_at IS NULL)",
    )
    .bind(alg.as_str())
    .bind(ends.to_offset())
    .bind(all)
    .execute(conn)
    .await?;
    Ok(())
}

pub(super) async fn put_key(
    conn: &mut PgConnection,
    key: &StoredKey,
    index: i64,
    now: Timestamp,
) -> Result<(), sqlx::Error> {
    let sql = "INSERT INTO token.signing_keys (kid, alg, public, sealed, active_at, index, time) VALUES ($1, $2, $3, $4, $5, $6, $7)";
    sqlx::query(sql)
        .bind(&key.kid)
        .bind(key.alg.as_str())
        .bind(&key.public)
        .bind(&key.sealed)
        .bind(key.active_at.to_offset())
        .bind(index)
        .bind(now.to_offset())
        .execute(conn)
        .await?;
    Ok(())
}

/// Revoked tokens that have not expired: jti and expiry.
pub(super) async fn revocations(conn: &mut PgConnection, after: i64) -> Result<Vec<(String, Timestamp)>, sqlx::Error> {
    let rows =
        sqlx::query("SELECT jti, expires FROM token.revocations WHERE index > $1").bind(after).fetch_all(conn).await?;
    rows.iter().map(|r| Ok((r.try_get("jti")?, Timestamp::from_offset(r.try_get("expires")?)))).collect()
}

pub(super) async fn revoked(conn: &mut PgConnection, jti: &str) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("SELECT EXISTS (SELECT FROM token.revocations WHERE jti = $1)").bind(jti).fetch_one(conn).await
}

pub(super) async fn revoke(
    conn: &mut PgConnection,
    jti: &str,
    client: &str,
    expires: Timestamp,
    index: i64,
) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO token.revocations (jti, client_id, expires, index) VALUES ($1, $2, $3, $4)")
        .bind(jti)
        .bind(client)
        .bind(expires.to_offset())
        .bind(index)
        .execute(conn)
        .await?;
    Ok(())
}

pub(super) async fn assertion_used(conn: &mut PgConnection, digest: &[u8]) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("SELECT EXISTS (SELECT FROM token.assertions WHERE digest = $1)")
        .bind(digest)
        .fetch_one(conn)
        .await
}

pub(super) async fn use_assertion(
    conn: &mut PgConnection,
    digest: &[u8],
    expires: Timestamp,
) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO token.assertions (digest, expires) VALUES ($1, $2)")
        .bind(digest)
        .bind(expires.to_offset())
        .execute(conn)
        .await?;
    Ok(())
}

/// Drops what no longer matters: revocations and assertions that have expired.
pub(super) async fn tidy(conn: &mut PgConnection, now: Timestamp) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM token.revocations WHERE expires < $1").bind(now.to_offset()).execute(&mut *conn).await?;
    sqlx::query("DELETE FROM token.assertions WHERE expires < $1").bind(now.to_offset()).execute(&mut *conn).await?;
    sqlx::query("DELETE FROM token.signing_keys WHERE ends_at < $1").bind(now.to_offset()).execute(&mut *conn).await?;
    sqlx::query("DELETE FROM token.lockouts WHERE until < $1").bind(now.to_offset()).execute(conn).await?;
    Ok(())
}

pub(super) async fn lockouts(conn: &mut PgConnection) -> Result<Vec<Locked>, sqlx::Error> {
    let sql = "SELECT client_id, block, until FROM token.lockouts ORDER BY client_id, block";
    let read = |r: &PgRow| {
        let until = Timestamp::from_offset(r.try_get("until")?);
        Ok(Locked { client_id: r.try_get("client_id")?, block: r.try_get("block")?, until })
    };
    sqlx::query(sql).fetch_all(conn).await?.iter().map(read).collect()
}

pub(super) async fn lock_out(conn: &mut PgConnection, l: &Locked) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO token.lockouts (client_id, block, until) VALUES ($1, $2, $3)
         ON CONFLICT (client_id, block) DO UPDATE SET until = greatest(lockouts.until, excluded.until)",
    )
    .bind(&l.client_id)
    .bind(&l.block)
    .bind(l.until.to_offset())
    .execute(conn)
    .await?;
    Ok(())
}

pub(super) async fn release(conn: &mut PgConnection, client_id: &str) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM token.lockouts WHERE client_id = $1").bind(client_id).execute(conn).await?;
    Ok(())
}
