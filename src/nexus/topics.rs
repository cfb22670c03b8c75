//! Topics and groups: made and ended, pulled from, acknowledged.
//!
//! A group was given every message up to its cursor; those it has not acknowledged, or that wait for their time, are deliveries.
//! All of it changes under the head's lock, so no message is with two consumers at once, whichever daemons they ask.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::kernel::cloudevents::Event;
use crate::kernel::{Refusal, Timestamp, problem};
use crate::ledger::{Command, Entry, Failure, Touch, Tx};

use super::board::{GROUP, MESSAGE};
use super::model::{Group, Message, Published, Topic};
use super::publish;
use super::store::topics::{self as store, Cursor, Delivery, Found, Kept};

pub(super) fn no_group(topic: &str, group: &str) -> Refusal {
    Refusal::not_found(format!("group {group} of topic {topic}: make it first"))
}

/// Makes or changes a topic.
pub(super) struct PutTopic {
    pub name: String,
    pub retention: f64,
}

/// What was put, and whether it is new.
#[derive(Serialize, Deserialize)]
pub struct Put<T> {
    /// Whether it was not there before.
    pub new: bool,
    /// As it is now.
    pub value: T,
}

impl Command for PutTopic {
    type Out = Put<Topic>;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Put<Topic>, Entry), Failure> {
        let was = store::topic_of(tx.read(), &self.name).await?;
        let index = tx.index();
        let created_index = was.as_ref().map_or(index, |w| w.created_index);
        let topic = Topic { name: self.name.clone(), retention: self.retention, index, created_index };
        store::put_topic(tx.write(), &topic).await?;
        let mut entry = Entry::ok("nexus:topic-put", format!("topic/{}", self.name))
            .change("retention_ms", (self.retention * 1000.0) as i64);
        if was.is_none() {
            // Whoever knew that there is no such topic knows it no more.
            entry = entry.touch(publish::all_of(&self.name));
        }
        Ok((Put { new: was.is_none(), value: topic }, entry))
    }
}

/// Ends a topic, its messages and its groups.
pub(super) struct DropTopic(pub String);

impl Command for DropTopic {
    type Out = Topic;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Topic, Entry), Failure> {
        let was = store::topic_of(tx.read(), &self.0).await?;
        let was = was.ok_or_else(|| Refusal::not_found(format!("topic {}", self.0)))?;
        store::drop_topic(tx.write(), &self.0).await?;
        let entry = Entry::ok("nexus:topic-delete", format!("topic/{}", self.0)).touch(publish::all_of(&self.0));
        Ok((was, entry))
    }
}

/// Makes or changes a group.
pub(super) struct PutGroup(pub Group);

impl Command for PutGroup {
    type Out = Put<Group>;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Put<Group>, Entry), Failure> {
        let mut group = self.0.clone();
        for topic in [Some(&group.topic), group.dead_letter.as_ref()].into_iter().flatten() {
            if store::topic_of(tx.read(), topic).await?.is_none() {
                return Err(Refusal::not_found(format!("topic {topic}: make it first")).into());
            }
        }
        let was = store::groups(tx.read(), &group.topic, Some(&group.name), "", 1).await?.pop();
        group.index = tx.index();
        group.created_index = was.as_ref().map_or(group.index, |w| w.created_index);
        (group.outstanding, group.dead) = was.as_ref().map_or((0, 0), |w| (w.outstanding, w.dead));
        store::put_group(tx.write(), &group).await?;
        let entry = Entry::ok("nexus:group-put", format!("topic/{}/{}", group.topic, group.name))
            .change("max_attempts", group.max_attempts)
            .change("ack_wait_ms", (group.ack_wait * 1000.0) as i64);
        Ok((Put { new: was.is_none(), value: group }, entry))
    }
}

/// Ends a group.
pub(super) struct DropGroup {
    pub topic: String,
    pub group: String,
}

impl Command for DropGroup {
    type Out = ();

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<((), Entry), Failure> {
        if store::cursor(tx.read(), &self.topic, &self.group).await?.is_none() {
            return Err(no_group(&self.topic, &self.group).into());
        }
        store::drop_group(tx.write(), &self.topic, &self.group).await?;
        Ok(((), Entry::ok("nexus:group-delete", format!("topic/{}/{}", self.topic, self.group))))
    }
}

/// Gives a consumer what is due.
pub(super) struct Pull {
    pub topic: String,
    pub group: String,
    pub max: i64,
    pub consumer: String,
}

/// What a pull came to.
#[derive(Serialize, Deserialize)]
pub(super) struct Pulled {
    pub messages: Vec<Message>,
    /// Given not for the first time.
    pub again: usize,
    /// Out of attempts.
    pub dead: usize,
}

/// What a pull does, decided before anything is written.
#[derive(Default)]
struct Plan {
    given: Vec<Found>,
    later: Vec<Found>,
    dead: Vec<Found>,
    /// Up to where the group has been given everything.
    cursor: Option<(i64, i64)>,
}

impl Pull {
    async fn plan(&self, tx: &mut Tx<'_>, cursor: &Cursor) -> Result<Plan, Failure> {
        let (now, mut plan) = (tx.now(), Plan::default());
        for found in store::due(tx.read(), &self.topic, &self.group, now, self.max).await? {
            if found.attempt >= cursor.max_attempts { plan.dead.push(found) } else { plan.given.push(found) }
        }
        let mut after = (cursor.index, cursor.position);
        while (plan.given.len() as i64) < self.max {
            let room = self.max - plan.given.len() as i64;
            let fresh = store::fresh(tx.read(), &self.topic, after, room).await?;
            let Some(last) = fresh.last() else { break };
            after = (last.index, last.position);
            plan.cursor = Some(after);
            for found in fresh {
                if found.deliver_ms <= now.millis() { plan.given.push(found) } else { plan.later.push(found) }
            }
        }
        Ok(plan)
    }

    /// Puts dead messages into the topic for dead letters, each under a new id; its dedupe is its own.
    async fn bury(&self, tx: &mut Tx<'_>, to: &str, dead: &[Found]) -> Result<Vec<Touch>, Failure> {
        let (index, now) = (tx.index(), tx.now());
        let mut kept = Vec::new();
        for (position, found) in dead.iter().enumerate() {
            let origin = format!("{}/{}/{}", self.topic, self.group, found.id);
            let dedupe = crate::kernel::crypto::sha256(origin.as_bytes());
            let published =
                Published { index, position: position as i64, id: crate::kernel::ids::new_id(now), duplicate: false };
            let event = Event::kept(found.event.clone(), dedupe);
            kept.push(Kept { topic: to.to_owned(), published, event, time: now, deliver: now });
        }
        store::keep(tx.write(), &kept).await?;
        Ok(kept.iter().map(|k| Touch::key(MESSAGE, publish::key(to, &k.event.dedupe))).collect())
    }
}

impl Command for Pull {
    type Out = Pulled;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Pulled, Entry), Failure> {
        let cursor = store::cursor(tx.read(), &self.topic, &self.group).await?;
        let cursor = cursor.ok_or_else(|| no_group(&self.topic, &self.group))?;
        let plan = self.plan(tx, &cursor).await?;
        if plan.given.is_empty() && plan.dead.is_empty() && plan.cursor.is_none() {
            return Err(nothing());
        }
        let now = tx.now().millis();
        let delivery = |f: &Found, attempt: i64, due_ms: i64, dead: bool| Delivery {
            index: f.index,
            position: f.position,
            id: f.id,
            attempt,
            due_ms,
            holder: (attempt > f.attempt).then_some(self.consumer.as_str()),
            dead,
        };
        let mut rows: Vec<Delivery<'_>> =
            plan.given.iter().map(|f| delivery(f, f.attempt + 1, now + cursor.ack_wait_ms, false)).collect();
        rows.extend(plan.later.iter().map(|f| delivery(f, 0, f.deliver_ms, false)));
        let mut entry = Entry::ok("nexus:pull", format!("topic/{}/{}", self.topic, self.group))
            .change("given", plan.given.len())
            .change("dead", plan.dead.len());
        match &cursor.dead_letter {
            Some(to) if !plan.dead.is_empty() && store::topic_of(tx.read(), to).await?.is_some() => {
                for touch in self.bury(tx, to, &plan.dead).await? {
                    entry = entry.touch(touch);
                }
                let ids: Vec<Uuid> = plan.dead.iter().map(|f| f.id).collect();
                store::drop_deliveries(tx.write(), &self.topic, &self.group, &ids).await?;
            }
            _ => rows.extend(plan.dead.iter().map(|f| delivery(f, f.attempt, now, true))),
        }
        store::put_deliveries(tx.write(), &self.topic, &self.group, &rows).await?;
        if let Some(to) = plan.cursor {
            store::move_cursor(tx.write(), &self.topic, &self.group, to).await?;
        }
        let again = plan.given.iter().filter(|f| f.attempt > 0).count();
        let dead = plan.dead.len();
        let messages = plan.given.into_iter().map(message).collect::<Result<_, _>>()?;
        Ok((Pulled { messages, again, dead }, entry))
    }
}

/// There is nothing to give; not an answer anyone sees.
fn nothing() -> Failure {
    Refusal::not_found("message").into()
}

fn message(f: Found) -> Result<Message, Refusal> {
    let text = String::from_utf8(f.event).map_err(Refusal::internal)?;
    let event = RawValue::from_string(text).map_err(Refusal::internal)?;
    Ok(Message { id: f.id, index: f.index, position: f.position, attempt: f.attempt + 1, event })
}

/// What a consumer says of messages it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// Done.
    Ack,
    /// Not done: later again.
    Nack,
    /// Not done yet: not again for a whole `ack_wait`.
    Extend,
}

/// Acknowledges, refuses or extends.
pub(super) struct Say {
    pub topic: String,
    pub group: String,
    pub ids: Vec<Uuid>,
    pub consumer: String,
    pub word: Word,
}

/// Longest wait of a refused message.
const BACKOFF_MOST: i64 = 300_000;

impl Command for Say {
    type Out = Vec<Uuid>;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Vec<Uuid>, Entry), Failure> {
        let cursor = store::cursor(tx.read(), &self.topic, &self.group).await?;
        let cursor = cursor.ok_or_else(|| no_group(&self.topic, &self.group))?;
        let held = store::held(tx.read(), &self.topic, &self.group, &self.consumer, &self.ids).await?;
        let ours: Vec<Uuid> = held.iter().map(|(_, _, id, _)| *id).collect();
        let now = tx.now().millis();
        let action = match self.word {
            Word::Ack => "nexus:ack",
            Word::Nack => "nexus:nack",
            Word::Extend => "nexus:extend",
        };
        if ours.is_empty() {
            return Err(Refusal::new(&problem::CONFLICT, "none of these messages is with the caller").into());
        }
        if self.word == Word::Ack {
            store::drop_deliveries(tx.write(), &self.topic, &self.group, &ours).await?;
        } else {
            let wait = |attempt: i64| match self.word {
                Word::Extend => cursor.ack_wait_ms,
                _ => (cursor.backoff_ms << (attempt - 1).clamp(0, 16)).min(BACKOFF_MOST.max(cursor.backoff_ms)),
            };
            let holder = (self.word == Word::Extend).then_some(self.consumer.as_str());
            let again = |(index, position, id, attempt): &(i64, i64, Uuid, i64)| Delivery {
                index: *index,
                position: *position,
                id: *id,
                attempt: *attempt,
                due_ms: now + wait(*attempt),
                holder,
                dead: false,
            };
            let rows: Vec<Delivery<'_>> = held.iter().map(again).collect();
            store::put_deliveries(tx.write(), &self.topic, &self.group, &rows).await?;
        }
        let entry = Entry::ok(action, format!("topic/{}/{}", self.topic, self.group))
            .change("messages", ours.iter().map(Uuid::to_string).collect::<Vec<_>>())
            .touch(Touch::key(GROUP, self.topic.as_bytes()));
        Ok((ours, entry))
    }
}

/// Drops messages that are past their topic's retention.
pub(super) struct Retire {
    pub topic: String,
    pub before: Timestamp,
}

/// Messages dropped in one step at most.
pub(super) const STEP: i64 = 1000;

impl Command for Retire {
    type Out = u64;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(u64, Entry), Failure> {
        let to = store::expired(tx.read(), &self.topic, self.before, STEP).await?.ok_or_else(nothing)?;
        let gone = store::retire(tx.write(), &self.topic, to, self.before).await?;
        let entry = Entry::ok("nexus:retire", format!("topic/{}", self.topic))
            .change("messages", gone)
            .change("up_to_index", to.0)
            .touch(publish::all_of(&self.topic));
        Ok((gone, entry))
    }
}
