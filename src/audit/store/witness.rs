//! What was seen of other logs, and what others signed of this one.

use sqlx::{PgConnection, Row as _};

use crate::kernel::Timestamp;

/// Size and root of a log as it was seen last.
pub(in crate::audit) async fn seen(
    conn: &mut PgConnection,
    origin: &str,
) -> Result<Option<(u64, Vec<u8>)>, sqlx::Error> {
    let row = sqlx::query("SELECT size, root FROM audit.witnessed WHERE origin = $1")
        .bind(origin)
        .fetch_optional(conn)
        .await?;
    row.map(|r| Ok((u64::try_from(r.try_get::<i64, _>("size")?).unwrap_or(0), r.try_get("root")?))).transpose()
}

/// Moves on from `old`; false if another was quicker.
pub(in crate::audit) async fn see(
    conn: &mut PgConnection,
    origin: &str,
    old: Option<(u64, &[u8])>,
    new: (u64, &[u8]),
    now: Timestamp,
) -> Result<bool, sqlx::Error> {
    let size = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let query = match old {
        None => sqlx::query(
            "INSERT INTO audit.witnessed (origin, size, root, time) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
        ),
        Some(_) => sqlx::query(
            "UPDATE audit.witnessed SET size = $2, root = $3, time = $4 WHERE origin = $1 AND size = $5 AND root = $6",
        ),
    };
    let mut query = query.bind(origin).bind(size(new.0)).bind(new.1).bind(now.to_offset());
    if let Some((n, root)) = old {
        query = query.bind(size(n)).bind(root);
    }
    Ok(query.execute(conn).await?.rows_affected() == 1)
}

/// The newest note that witnesses signed: its size, itself, when.
pub(in crate::audit) async fn cosigned(
    conn: &mut PgConnection,
) -> Result<Option<(u64, String, Timestamp)>, sqlx::Error> {
    let row = sqlx::query(
        "SELECT size, note, (extract(epoch FROM time) * 1000)::int8 AS ms FROM audit.cosigned WHERE id = 1",
    )
    .fetch_optional(conn)
    .await?;
    row.map(|r| {
        let note: Vec<u8> = r.try_get("note")?;
        let size = u64::try_from(r.try_get::<i64, _>("size")?).unwrap_or(0);
        Ok((size, String::from_utf8_lossy(&note).into_owned(), Timestamp::from_millis(r.try_get("ms")?)))
    })
    .transpose()
}

/// Keeps a note with what witnesses signed; an older one does not replace a newer.
pub(in crate::audit) async fn keep_cosigned(
    conn: &mut PgConnection,
    size: u64,
    note: &str,
    now: Timestamp,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO audit.cosigned (id, size, note, time) VALUES (1, $1, $2, $3)
         ON CONFLICT (id) DO UPDATE SET size = excluded.size, note = excluded.note, time = excluded.time
         WHERE cosigned.size < excluded.size OR (cosigned.size = excluded.size AND length(cosigned.note) <= length(excluded.note))",
    )
    .bind(i64::try_from(size).unwrap_or(i64::MAX))
    .bind(note.as_bytes())
    .bind(now.to_offset())
    .execute(conn)
    .await
    .map(|_| ())
}
