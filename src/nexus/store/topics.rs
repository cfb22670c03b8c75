//! Rows of topics, groups, messages and deliveries.

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row as _};
use uuid::Uuid;

use crate::kernel::Timestamp;
use crate::kernel::cloudevents::Event;
use crate::ledger::hot::Column;
use crate::nexus::model::{Group, Published, Topic};

fn topic(r: &PgRow) -> Result<Topic, sqlx::Error> {
    let retention_ms: i64 = r.try_get("retention_ms")?;
    Ok(Topic {
        name: r.try_get("name")?,
        retention: retention_ms as f64 / 1000.0,
        index: r.try_get("index")?,
        created_index: r.try_get("created_index")?,
    })
}

pub(in crate::nexus) async fn topic_of(conn: &mut PgConnection, name: &str) -> Result<Option<Topic>, sqlx::Error> {
    let row = sqlx::query("SELECT name, retention_ms, index, created_index FROM nexus.topics WHERE name = $1")
        .bind(name)
        .fetch_optional(conn)
        .await?;
    row.as_ref().map(topic).transpose()
}

/// Topics in order of the name, after `after`.
pub(in crate::nexus) async fn topics(
    conn: &mut PgConnection,
    after: &str,
    limit: i64,
) -> Result<Vec<Topic>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT name, retention_ms, index, created_index FROM nexus.topics WHERE name > $1 ORDER BY name LIMIT $2",
    )
    .bind(after)
    .bind(limit)
    .fetch_all(conn)
    .await?;
    rows.iter().map(topic).collect()
}

pub(in crate::nexus) async fn put_topic(conn: &mut PgConnection, topic: &Topic) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO nexus.topics (name, retention_ms, index, created_index) VALUES ($1, $2, $3, $4)
         ON CONFLICT (name) DO UPDATE SET retention_ms = excluded.retention_ms, index = excluded.index",
    )
    .bind(&topic.name)
    .bind((topic.retention * 1000.0) as i64)
    .bind(topic.index)
    .bind(topic.created_index)
    .execute(conn)
    .await?;
    Ok(())
}

/// Removes a topic with its messages and groups.
pub(in crate::nexus) async fn drop_topic(conn: &mut PgConnection, name: &str) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM nexus.messages WHERE topic = $1").bind(name).execute(&mut *conn).await?;
    sqlx::query("DELETE FROM nexus.topics WHERE name = $1").bind(name).execute(conn).await?;
    Ok(())
}

/// A group as a pull needs it.
pub(in crate::nexus) struct Cursor {
    pub max_attempts: i64,
    pub ack_wait_ms: i64,
    pub backoff_ms: i64,
    pub dead_letter: Option<String>,
    pub index: i64,
    pub position: i64,
}

pub(in crate::nexus) async fn cursor(
    conn: &mut PgConnection,
    topic: &str,
    group: &str,
) -> Result<Option<Cursor>, sqlx::Error> {
    let row = sqlx::query(
        "SELECT max_attempts, ack_wait_ms, backoff_ms, dead_letter, at_index, at_position FROM nexus.groups
         WHERE topic = $1 AND name = $2",
    )
    .bind(topic)
    .bind(group)
    .fetch_optional(conn)
    .await?;
    row.map(|r| {
        Ok(Cursor {
            max_attempts: r.try_get("max_attempts")?,
            ack_wait_ms: r.try_get("ack_wait_ms")?,
            backoff_ms: r.try_get("backoff_ms")?,
            dead_letter: r.try_get("dead_letter")?,
            index: r.try_get("at_index")?,
            position: r.try_get("at_position")?,
        })
    })
    .transpose()
}

pub(in crate::nexus) async fn move_cursor(
    conn: &mut PgConnection,
    topic: &str,
    group: &str,
    to: (i64, i64),
) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE nexus.groups SET at_index = $3, at_position = $4 WHERE topic = $1 AND name = $2")
        .bind(topic)
        .bind(group)
        .bind(to.0)
        .bind(to.1)
        .execute(conn)
        .await?;
    Ok(())
}

/// Groups of a topic in order of the name, after `after`.
pub(in crate::nexus) async fn groups(
    conn: &mut PgConnection,
    topic: &str,
    only: Option<&str>,
    after: &str,
    limit: i64,
) -> Result<Vec<Group>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT g.*, (SELECT count(*) FROM nexus.deliveries d WHERE d.topic = g.topic AND d.\"group\" = g.name AND NOT d.dead) AS outstanding,
                (SELECT count(*) FROM nexus.deliveries d WHERE d.topic = g.topic AND d.\"group\" = g.name AND d.dead) AS dead
         FROM nexus.groups g WHERE g.topic = $1 AND ($2::text IS NULL OR g.name = $2) AND g.name > $3 ORDER BY g.name LIMIT $4",
    )
    .bind(topic)
    .bind(only)
    .bind(after)
    .bind(limit)
    .fetch_all(conn)
    .await?;
    let seconds = |r: &PgRow, name: &str| Ok::<f64, sqlx::Error>(r.try_get::<i64, _>(name)? as f64 / 1000.0);
    let row = |r: &PgRow| {
        Ok(Group {
            topic: r.try_get("topic")?,
            name: r.try_get("name")?,
            max_attempts: r.try_get("max_attempts")?,
            ack_wait: seconds(r, "ack_wait_ms")?,
            backoff: seconds(r, "backoff_ms")?,
            dead_letter: r.try_get("dead_letter")?,
            outstanding: r.try_get("outstanding")?,
            dead: r.try_get("dead")?,
            index: r.try_get("index")?,
            created_index: r.try_get("created_index")?,
        })
    };
    rows.iter().map(row).collect()
}

pub(in crate::nexus) async fn put_group(conn: &mut PgConnection, g: &Group) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO nexus.groups (topic, name, max_attempts, ack_wait_ms, backoff_ms, dead_letter, at_index, at_position, created_index, index)
         VALUES ($1, $2, $3, $4, $5, $6, -1, 0, $7, $8)
         ON CONFLICT (topic, name) DO UPDATE SET max_attempts = excluded.max_attempts, ack_wait_ms = excluded.ack_wait_ms,
             backoff_ms = excluded.backoff_ms, dead_letter = excluded.dead_letter, index = excluded.index",
    )
    .bind(&g.topic)
    .bind(&g.name)
    .bind(g.max_attempts)
    .bind((g.ack_wait * 1000.0) as i64)
    .bind((g.backoff * 1000.0) as i64)
    .bind(&g.dead_letter)
    .bind(g.created_index)
    .bind(g.index)
    .execute(conn)
    .await?;
    Ok(())
}

pub(in crate::nexus) async fn drop_group(conn: &mut PgConnection, topic: &str, group: &str) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM nexus.groups WHERE topic = $1 AND name = $2")
        .bind(topic)
        .bind(group)
        .execute(conn)
        .await?;
    Ok(())
}

/// A message to be kept.
pub(in crate::nexus) struct Kept {
    pub topic: String,
    pub published: Published,
    pub event: Event,
    pub time: Timestamp,
    pub deliver: Timestamp,
}

/// The room's part of the ledger's statement.
pub(in crate::nexus) const MESSAGES: &str = ", messages AS (
        INSERT INTO nexus.messages (topic, index, position, id, dedupe, event, time_ms, deliver_ms)
        SELECT m.* FROM head, unnest({0}::text[], {1}::int8[], {2}::int8[], {3}::uuid[], {4}::bytea[], {5}::bytea[],
                                     {6}::int8[], {7}::int8[]) AS m
    )";

/// The columns of [`MESSAGES`].
pub(in crate::nexus) fn columns(all: Vec<Kept>) -> Vec<Column> {
    let ints = |of: fn(&Kept) -> i64| Column::Ints(all.iter().map(of).collect());
    let (index, position) = (ints(|m| m.published.index), ints(|m| m.published.position));
    let (time, deliver) = (ints(|m| m.time.millis()), ints(|m| m.deliver.millis()));
    let ids = Column::Ids(all.iter().map(|m| m.published.id).collect());
    let dedupe = Column::Bytes(all.iter().map(|m| m.event.dedupe.to_vec()).collect());
    let (topics, events): (Vec<String>, Vec<Vec<u8>>) = all.into_iter().map(|m| (m.topic, m.event.bytes)).unzip();
    vec![Column::Texts(topics), index, position, ids, dedupe, Column::Bytes(events), time, deliver]
}

/// Keeps messages, under the lock.
pub(in crate::nexus) async fn keep(conn: &mut PgConnection, all: &[Kept]) -> Result<(), sqlx::Error> {
    for m in all {
        sqlx::query("INSERT INTO nexus.messages (topic, index, position, id, dedupe, event, time_ms, deliver_ms) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)")
            .bind(&m.topic)
            .bind(m.published.index)
            .bind(m.published.position)
            .bind(m.published.id)
            .bind(m.event.dedupe.as_slice())
            .bind(&m.event.bytes)
            .bind(m.time.millis())
            .bind(m.deliver.millis())
            .execute(&mut *conn)
            .await?;
    }
    Ok(())
}

/// Which topics there are, and which of these messages were published before: by topic and digest.
pub(in crate::nexus) async fn standings(
    conn: &mut PgConnection,
    topics: &[&str],
    dedupes: &[&[u8]],
) -> Result<Vec<(String, Vec<u8>, Option<Published>)>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT k.topic, k.dedupe, m.index, m.position, m.id
         FROM unnest($1::text[], $2::bytea[]) AS k (topic, dedupe)
         JOIN nexus.topics AS t ON t.name = k.topic
         LEFT JOIN nexus.messages AS m ON m.topic = k.topic AND m.dedupe = k.dedupe",
    )
    .bind(topics)
    .bind(dedupes)
    .fetch_all(conn)
    .await?;
    let row = |r: &PgRow| {
        let first = match r.try_get::<Option<Uuid>, _>("id")? {
            Some(id) => {
                Some(Published { index: r.try_get("index")?, position: r.try_get("position")?, id, duplicate: true })
            }
            None => None,
        };
        Ok((r.try_get("topic")?, r.try_get("dedupe")?, first))
    };
    rows.iter().map(row).collect()
}

/// A message as a pull finds it.
pub(in crate::nexus) struct Found {
    pub index: i64,
    pub position: i64,
    pub id: Uuid,
    pub event: Vec<u8>,
    pub deliver_ms: i64,
    /// Attempts made so far.
    pub attempt: i64,
}

/// Deliveries whose time has come, oldest first.
pub(in crate::nexus) async fn due(
    conn: &mut PgConnection,
    topic: &str,
    group: &str,
    now: Timestamp,
    limit: i64,
) -> Result<Vec<Found>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT d.index, d.position, d.id, m.event, m.deliver_ms, d.attempt FROM nexus.deliveries AS d
         JOIN nexus.messages AS m ON m.topic = d.topic AND m.index = d.index AND m.position = d.position
         WHERE d.topic = $1 AND d.\"group\" = $2 AND NOT d.dead AND d.due_ms <= $3 ORDER BY d.due_ms, d.index, d.position LIMIT $4",
    )
    .bind(topic)
    .bind(group)
    .bind(now.millis())
    .bind(limit)
    .fetch_all(conn)
    .await?;
    rows.iter().map(found).collect()
}

fn found(r: &PgRow) -> Result<Found, sqlx::Error> {
    Ok(Found {
        index: r.try_get("index")?,
        position: r.try_get("position")?,
        id: r.try_get("id")?,
        event: r.try_get("event")?,
        deliver_ms: r.try_get("deliver_ms")?,
        attempt: r.try_get("attempt")?,
    })
}

/// Messages after the cursor.
pub(in crate::nexus) async fn fresh(
    conn: &mut PgConnection,
    topic: &str,
    after: (i64, i64),
    limit: i64,
) -> Result<Vec<Found>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT index, position, id, event, deliver_ms, 0::int8 AS attempt FROM nexus.messages
         WHERE topic = $1 AND (index, position) > ($2, $3) ORDER BY index, position LIMIT $4",
    )
    .bind(topic)
    .bind(after.0)
    .bind(after.1)
    .bind(limit)
    .fetch_all(conn)
    .await?;
    rows.iter().map(found).collect()
}

/// When the next of a group's deliveries falls due, and whether there are messages past its cursor.
pub(in crate::nexus) async fn waiting(
    conn: &mut PgConnection,
    topic: &str,
    group: &str,
) -> Result<Option<(Option<i64>, bool)>, sqlx::Error> {
    let row = sqlx::query(
        "SELECT (SELECT min(due_ms) FROM nexus.deliveries d WHERE d.topic = g.topic AND d.\"group\" = g.name AND NOT d.dead) AS due,
                EXISTS (SELECT FROM nexus.messages m WHERE m.topic = g.topic AND (m.index, m.position) > (g.at_index, g.at_position)) AS fresh
         FROM nexus.groups g WHERE g.topic = $1 AND g.name = $2",
    )
    .bind(topic)
    .bind(group)
    .fetch_optional(conn)
    .await?;
    row.map(|r| Ok((r.try_get("due")?, r.try_get("fresh")?))).transpose()
}

/// A delivery as it is to be.
pub(in crate::nexus) struct Delivery<'a> {
    pub index: i64,
    pub position: i64,
    pub id: Uuid,
    pub attempt: i64,
    pub due_ms: i64,
    pub holder: Option<&'a str>,
    pub dead: bool,
}

pub(in crate::nexus) async fn put_deliveries(
    conn: &mut PgConnection,
    topic: &str,
    group: &str,
    all: &[Delivery<'_>],
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO nexus.deliveries (topic, \"group\", index, position, id, attempt, due_ms, holder, dead)
         SELECT $1::text, $2::text, d.* FROM unnest($3::int8[], $4::int8[], $5::uuid[], $6::int8[], $7::int8[], $8::text[], $9::bool[]) AS d
         ON CONFLICT (topic, \"group\", index, position) DO UPDATE SET attempt = excluded.attempt, due_ms = excluded.due_ms,
             holder = excluded.holder, dead = excluded.dead",
    )
    .bind(topic)
    .bind(group)
    .bind(all.iter().map(|d| d.index).collect::<Vec<_>>())
    .bind(all.iter().map(|d| d.position).collect::<Vec<_>>())
    .bind(all.iter().map(|d| d.id).collect::<Vec<_>>())
    .bind(all.iter().map(|d| d.attempt).collect::<Vec<_>>())
    .bind(all.iter().map(|d| d.due_ms).collect::<Vec<_>>())
    .bind(all.iter().map(|d| d.holder.map(str::to_owned)).collect::<Vec<_>>())
    .bind(all.iter().map(|d| d.dead).collect::<Vec<_>>())
    .execute(conn)
    .await?;
    Ok(())
}

/// The deliveries of these messages that `holder` has: where they are, message, attempts.
pub(in crate::nexus) async fn held(
    conn: &mut PgConnection,
    topic: &str,
    group: &str,
    holder: &str,
    ids: &[Uuid],
) -> Result<Vec<(i64, i64, Uuid, i64)>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT index, position, id, attempt FROM nexus.deliveries
         WHERE topic = $1 AND \"group\" = $2 AND id = ANY ($3) AND holder = $4 AND NOT dead ORDER BY index, position",
    )
    .bind(topic)
    .bind(group)
    .bind(ids)
    .bind(holder)
    .fetch_all(conn)
    .await?;
    rows.iter()
        .map(|r| Ok((r.try_get("index")?, r.try_get("position")?, r.try_get("id")?, r.try_get("attempt")?)))
        .collect()
}

pub(in crate::nexus) async fn drop_deliveries(
    conn: &mut PgConnection,
    topic: &str,
    group: &str,
    ids: &[Uuid],
) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM nexus.deliveries WHERE topic = $1 AND \"group\" = $2 AND id = ANY ($3)")
        .bind(topic)
        .bind(group)
        .bind(ids)
        .execute(conn)
        .await?;
    Ok(())
}

/// The newest messages of a topic that are past its retention, at most `limit`: their number and the last one's place.
pub(in crate::nexus) async fn expired(
    conn: &mut PgConnection,
    topic: &str,
    before: Timestamp,
    limit: i64,
) -> Result<Option<(i64, i64)>, sqlx::Error> {
    let row = sqlx::query(
        "SELECT index, position FROM (
             SELECT index, position FROM nexus.messages WHERE topic = $1 AND time_ms < $2 AND deliver_ms < $2 ORDER BY index, position LIMIT $3
         ) AS old ORDER BY index DESC, position DESC LIMIT 1",
    )
    .bind(topic)
    .bind(before.millis())
    .bind(limit)
    .fetch_optional(conn)
    .await?;
    row.map(|r| Ok((r.try_get("index")?, r.try_get("position")?))).transpose()
}

/// Drops messages up to a place, with what is left of their deliveries; those that are not due yet stay.
pub(in crate::nexus) async fn retire(
    conn: &mut PgConnection,
    topic: &str,
    to: (i64, i64),
    before: Timestamp,
) -> Result<u64, sqlx::Error> {
    let done = sqlx::query(
        "WITH gone AS (
             DELETE FROM nexus.messages WHERE topic = $1 AND (index, position) <= ($2, $3) AND deliver_ms < $4
             RETURNING index, position
         ), undelivered AS (
             DELETE FROM nexus.deliveries AS d USING gone WHERE d.topic = $1 AND d.index = gone.index AND d.position = gone.position
         )
         SELECT count(*) FROM gone",
    )
    .bind(topic)
    .bind(to.0)
    .bind(to.1)
    .bind(before.millis())
    .fetch_one(conn)
    .await?;
    Ok(u64::try_from(done.try_get::<i64, _>(0)?).unwrap_or(0))
}

/// The messages of an entry, in order.
pub(in crate::nexus) async fn records(conn: &mut PgConnection, index: i64) -> Result<Vec<Vec<u8>>, sqlx::Error> {
    sqlx::query_scalar("SELECT event FROM nexus.messages WHERE index = $1 ORDER BY position")
        .bind(index)
        .fetch_all(conn)
        .await
}
