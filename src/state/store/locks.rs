//! Rows of locks: who holds one, and who waits for it.

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row as _};
use uuid::Uuid;

use crate::kernel::Timestamp;
use crate::state::locks::{Hold, Terms, Waiter};

fn terms(r: &PgRow) -> Result<Terms, sqlx::Error> {
    Ok(Terms { read: r.try_get("read")?, slots: r.try_get("slots")? })
}

/// Who holds a lock, the oldest first.
pub(in crate::state) async fn holds(conn: &mut PgConnection, name: &str) -> Result<Vec<Hold>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT h.lease, h.owner, h.token, h.read, h.slots, h.value, h.asker, l.ttl_ms FROM state.holds AS h
         JOIN state.leases AS l ON l.id = h.lease WHERE h.name = $1 ORDER BY h.token, h.lease",
    )
    .bind(name)
    .fetch_all(conn)
    .await?;
    rows.iter()
        .map(|r| {
            Ok(Hold {
                lease: r.try_get("lease")?,
                owner: r.try_get("owner")?,
                token: r.try_get("token")?,
                terms: terms(r)?,
                value: r.try_get("value")?,
                ttl_ms: r.try_get("ttl_ms")?,
                asker: r.try_get("asker")?,
            })
        })
        .collect()
}

/// Who waits for a lock, in order.
pub(in crate::state) async fn queue(conn: &mut PgConnection, name: &str) -> Result<Vec<Waiter>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT place, lease, owner, read, slots, value, asker FROM state.queue WHERE name = $1 ORDER BY place",
    )
    .bind(name)
    .fetch_all(conn)
    .await?;
    rows.iter()
        .map(|r| {
            Ok(Waiter {
                place: r.try_get("place")?,
                lease: r.try_get("lease")?,
                owner: r.try_get("owner")?,
                terms: terms(r)?,
                value: r.try_get("value")?,
                asker: r.try_get("asker")?,
            })
        })
        .collect()
}

/// Gives a lock to a lease; the same again changes what its holder says, and who was not told yet.
pub(in crate::state) async fn hold(conn: &mut PgConnection, name: &str, hold: &Hold) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO state.holds (name, lease, owner, token, read, slots, value, asker) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
         ON CONFLICT (name, lease) DO UPDATE SET value = excluded.value, asker = excluded.asker",
    )
    .bind(name)
    .bind(hold.lease)
    .bind(&hold.owner)
    .bind(hold.token)
    .bind(hold.terms.read)
    .bind(hold.terms.slots)
    .bind(&hold.value)
    .bind(hold.asker)
    .execute(conn)
    .await?;
    Ok(())
}

pub(in crate::state) async fn unhold(conn: &mut PgConnection, name: &str, lease: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM state.holds WHERE name = $1 AND lease = $2")
        .bind(name)
        .bind(lease)
        .execute(conn)
        .await
        .map(|_| ())
}

pub(in crate::state) async fn enqueue(conn: &mut PgConnection, name: &str, w: &Waiter) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO state.queue (name, place, lease, owner, read, slots, value, asker) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
    )
    .bind(name)
    .bind(w.place)
    .bind(w.lease)
    .bind(&w.owner)
    .bind(w.terms.read)
    .bind(w.terms.slots)
    .bind(&w.value)
    .bind(w.asker)
    .execute(conn)
    .await?;
    Ok(())
}

/// A place comes to be another asker's, and what they would say.
pub(in crate::state) async fn take_over(conn: &mut PgConnection, name: &str, w: &Waiter) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE state.queue SET asker = $3, value = $4 WHERE name = $1 AND place = $2")
        .bind(name)
        .bind(w.place)
        .bind(w.asker)
        .bind(&w.value)
        .execute(conn)
        .await
        .map(|_| ())
}

pub(in crate::state) async fn dequeue(conn: &mut PgConnection, name: &str, place: i64) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM state.queue WHERE name = $1 AND place = $2")
        .bind(name)
        .bind(place)
        .execute(conn)
        .await
        .map(|_| ())
}

/// Gives a lock to who waits at a place; its lease has its whole time from here on.
pub(in crate::state) async fn pass(
    conn: &mut PgConnection,
    name: &str,
    place: i64,
    index: i64,
    now: Timestamp,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "WITH waited AS (
             DELETE FROM state.queue WHERE name = $1 AND place = $2 RETURNING name, lease, owner, read, slots, value, asker
         ), revived AS (
             UPDATE state.leases SET beat = $3, renewed = $4 WHERE id = (SELECT lease FROM waited)
         )
         INSERT INTO state.holds (name, lease, owner, token, read, slots, value, asker)
         SELECT name, lease, owner, $3, read, slots, value, asker FROM waited",
    )
    .bind(name)
    .bind(place)
    .bind(index)
    .bind(now.to_offset())
    .execute(conn)
    .await?;
    Ok(())
}

/// Takes a lease off everything it holds or waits for; the names of those locks.
pub(in crate::state) async fn let_go(conn: &mut PgConnection, lease: Uuid) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(
        "WITH held AS (DELETE FROM state.holds WHERE lease = $1 RETURNING name),
              waited AS (DELETE FROM state.queue WHERE lease = $1 RETURNING name)
         SELECT name FROM held UNION SELECT name FROM waited ORDER BY name",
    )
    .bind(lease)
    .fetch_all(conn)
    .await
}

/// Whether a token is that of a hold there is; and the newest there is.
pub(in crate::state) async fn fenced(
    conn: &mut PgConnection,
    name: &str,
    token: i64,
) -> Result<(bool, Option<i64>), sqlx::Error> {
    let row = sqlx::query(
        "SELECT coalesce(bool_or(token = $2), false) AS holds, max(token) AS newest FROM state.holds WHERE name = $1",
    )
    .bind(name)
    .bind(token)
    .fetch_one(conn)
    .await?;
    Ok((row.try_get("holds")?, row.try_get("newest")?))
}
