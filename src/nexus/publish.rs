//! Publishing: hot, because it is what others wait for.

use std::sync::Arc;

use sqlx::PgConnection;
use uuid::Uuid;

use crate::audit::Records;
use crate::kernel::cloudevents::Event;
use crate::kernel::{BoxFuture, Refusal, Timestamp};
use crate::ledger::hot::{self, At, Column, Decided, Fact, Hot, HotKey, Loaded, Row};
use crate::ledger::{Command, Entry, Failure, Touch, Tx, segment};

use crate::store::Store;

use super::board::MESSAGE;
use super::model::Published;
use super::store::topics::{self as store, Kept};

/// What a publish decides on; a topic that is not there has none.
struct Standing {
    /// The message of the same source and id, if there is one.
    first: Option<Published>,
}

/// Which fact: the topic, a zero byte (which no name has), the digest of source and id.
pub(super) fn key(topic: &str, dedupe: &[u8]) -> Vec<u8> {
    [topic.as_bytes(), &[0], dedupe].concat()
}

/// All facts of a topic.
pub(super) fn all_of(topic: &str) -> Touch {
    Touch::prefix(MESSAGE, key(topic, &[]))
}

fn no_topic(topic: &str) -> Refusal {
    Refusal::not_found(format!("topic {topic}: make it first"))
}

/// Publishes one message.
pub(super) struct Publish {
    pub topic: String,
    pub id: Uuid,
    pub event: Event,
    /// Not to be delivered for so long, milliseconds.
    pub delay_ms: i64,
}

impl Command for Publish {
    type Out = Published;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Published, Entry), Failure> {
        hot::alone(self, tx).await
    }

    fn hot(&self) -> Option<HotKey> {
        Some(HotKey { kind: &MESSAGES, key: key(&self.topic, &self.event.dedupe) })
    }

    fn decide(&mut self, fact: Option<&Fact>, at: At) -> Result<Decided<Published>, Refusal> {
        let standing: &Standing = fact.and_then(|f| f.downcast_ref()).ok_or_else(|| no_topic(&self.topic))?;
        let resource = format!("topic/{}", self.topic);
        if let Some(first) = standing.first {
            let entry = Entry::ok("nexus:publish", resource).change("duplicate_of", first.id.to_string());
            let after = Some(Arc::new(Standing { first: Some(first) }) as Fact);
            return Ok(Decided { value: Published { duplicate: true, ..first }, entry, after, row: None });
        }
        let published = Published { index: at.index, position: at.position, id: self.id, duplicate: false };
        let entry = Entry::ok("nexus:publish", resource)
            .change("message", self.id.to_string())
            .change("size", self.event.bytes.len())
            .touch(Touch::key(MESSAGE, key(&self.topic, &self.event.dedupe)));
        let kept = Kept {
            topic: self.topic.clone(),
            published,
            event: self.event.clone(),
            time: at.now,
            deliver: Timestamp::from_millis(at.now.millis() + self.delay_ms),
        };
        let after = Some(Arc::new(Standing { first: Some(published) }) as Fact);
        Ok(Decided { value: published, entry, after, row: Some(Box::new(kept)) })
    }
}

struct Messages;

static MESSAGES: Messages = Messages;

impl Hot for Messages {
    fn name(&self) -> &'static str {
        MESSAGE
    }

    fn parts(&self, _: &[Column]) -> &'static str {
        store::MESSAGES
    }

    fn columns(&self, rows: Vec<Row>) -> Vec<Column> {
        store::columns(rows.into_iter().filter_map(|r| r.downcast().ok()).map(|k| *k).collect())
    }

    fn load<'a>(&'a self, conn: &'a mut PgConnection, keys: &'a [Vec<u8>]) -> BoxFuture<'a, Loaded> {
        Box::pin(async move {
            let parts = keys.iter().filter_map(|k| {
                let zero = k.iter().position(|b| *b == 0)?;
                Some((std::str::from_utf8(&k[..zero]).ok()?, &k[zero + 1..]))
            });
            let (topics, dedupes): (Vec<&str>, Vec<&[u8]>) = parts.unzip();
            let found = store::standings(conn, &topics, &dedupes).await?;
            let fact = |(topic, dedupe, first): (String, Vec<u8>, Option<Published>)| {
                (key(&topic, &dedupe), Arc::new(Standing { first }) as Fact)
            };
            Ok(found.into_iter().map(fact).collect())
        })
    }
}

/// Publishes many as one entry: a segment with a record for each.
pub(super) struct PublishAll {
    pub topic: String,
    pub events: Vec<(Uuid, Event)>,
    pub delay_ms: i64,
}

impl Command for PublishAll {
    type Out = Vec<Published>;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Self::Out, Entry), Failure> {
        if store::topic_of(tx.read(), &self.topic).await?.is_none() {
            return Err(no_topic(&self.topic).into());
        }
        let (index, now) = (tx.index(), tx.now());
        let topics = vec![self.topic.as_str(); self.events.len()];
        let dedupes: Vec<&[u8]> = self.events.iter().map(|(_, e)| e.dedupe.as_slice()).collect();
        let mut firsts = std::collections::HashMap::new();
        for (_, dedupe, first) in store::standings(tx.read(), &topics, &dedupes).await? {
            if let Some(first) = first {
                firsts.insert(dedupe, first);
            }
        }
        let (mut answers, mut kept) = (Vec::new(), Vec::new());
        let mut entry = Entry::ok("nexus:publish", format!("topic/{}", self.topic));
        for (id, event) in &self.events {
            if let Some(first) = firsts.get(event.dedupe.as_slice()) {
                answers.push(Published { duplicate: true, ..*first });
                continue;
            }
            let published = Published { index, position: kept.len() as i64, id: *id, duplicate: false };
            firsts.insert(event.dedupe.to_vec(), published);
            entry = entry.touch(Touch::key(MESSAGE, key(&self.topic, &event.dedupe)));
            let deliver = Timestamp::from_millis(now.millis() + self.delay_ms);
            kept.push(Kept { topic: self.topic.clone(), published, event: event.clone(), time: now, deliver });
            answers.push(published);
        }
        if !kept.is_empty() {
            entry = entry.segment(segment::over(kept.iter().map(|k| k.event.bytes.as_slice())));
            store::keep(tx.write(), &kept).await?;
        }
        Ok((answers, entry))
    }
}

/// The messages of batches, for who gives receipts of them.
pub(super) struct Messaged(pub Store);

impl Records for Messaged {
    fn action(&self) -> &'static str {
        "nexus:publish"
    }

    fn of(&self, index: i64) -> BoxFuture<'_, Result<Vec<Vec<u8>>, Refusal>> {
        Box::pin(async move {
            let mut conn = self.0.reader().acquire().await.map_err(|e| self.0.refusal(e))?;
            store::records(&mut conn, index).await.map_err(|e| self.0.refusal(e))
        })
    }
}
