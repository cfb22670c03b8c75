//! Which services there are, and messages between them.
//!
//! **Invariants.** An instance is listed from its registration until an entry ends it; silence ends it only after one daemon
//! watched the whole time to live pass on its own clock. A message that was acknowledged to its publisher is delivered to each
//! group at least once, and is never with two consumers of a group at once.
//!
//! **Not here.** Whether an instance is healthy is found out by `health`, which says so through [`Nexus::set_health`].
//!
//! **Why this way.** A group's cursor and deliveries are rows under the head's lock, not memory of one daemon: which daemon a
//! consumer asks does not matter, and the death of any loses nothing.

mod board;
pub mod http;
mod metrics;
pub mod model;
mod publish;
mod services;
mod store;
mod topics;
mod verbs;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::kernel::cloudevents::Event;
use crate::kernel::supervisor::{Supervisor, Task, TaskError};
use crate::kernel::web::{Ask, Caller, cursor};
use crate::kernel::{BoxFuture, Clock, Refusal, Timestamp, ids, problem};
use crate::ledger::{Committed, Ledger};
use crate::store::Store;

pub use board::Board;
pub use metrics::Metrics;
use model::{Beaten, Group, Instance, Message, Published, Registration, Service, Topic};
use services::{Beats, Registered};
use store::{services as service_rows, topics as topic_rows};
use topics::{Pull, Put, Say, Word};

/// What the room is made from.
pub struct Parts {
    /// Where it writes.
    pub ledger: Ledger,
    /// Where it reads.
    pub store: Store,
    /// Ids and durations.
    pub clock: Clock,
    /// The projection that wakes who waits.
    pub board: Arc<Board>,
    /// Where it counts.
    pub metrics: Metrics,
    /// How often messages past their retention are looked for.
    pub retention_interval: Duration,
}

/// The room. Cheap to clone.
#[derive(Clone)]
pub struct Nexus(Arc<Room>);

impl std::ops::Deref for Nexus {
    type Target = Room;

    fn deref(&self) -> &Room {
        &self.0
    }
}

/// What the room holds.
pub struct Room {
    ledger: Ledger,
    store: Store,
    clock: Clock,
    board: Arc<Board>,
    metrics: Metrics,
    beats: Beats,
}

/// The messages of batches, for who gives receipts of them.
#[must_use]
pub fn records(store: &Store) -> Arc<dyn crate::audit::Records> {
    Arc::new(publish::Messaged(store.clone()))
}

impl crate::token::Services for Nexus {
    fn provides<'a>(&'a self, client: &'a str, service: &'a str) -> BoxFuture<'a, Result<bool, Refusal>> {
        Box::pin(async move {
            let mut conn = self.connection().await?;
            service_rows::provides(&mut conn, Some(client), service).await.map_err(|e| self.store.refusal(e))
        })
    }

    fn registered<'a>(&'a self, service: &'a str) -> BoxFuture<'a, Result<bool, Refusal>> {
        Box::pin(async move {
            let mut conn = self.connection().await?;
            service_rows::provides(&mut conn, None, service).await.map_err(|e| self.store.refusal(e))
        })
    }
}

impl Nexus {
    /// Opens the room and starts its tasks.
    #[must_use]
    pub fn start(parts: Parts, tasks: &Supervisor) -> Self {
        let Parts { ledger, store, clock, board, metrics, retention_interval } = parts;
        let beats = Beats::start(ledger.clone(), metrics.clone(), tasks);
        services::expire(store.clone(), ledger.clone(), clock.clone(), metrics.clone(), tasks);
        let nexus = Self(Arc::new(Room { ledger, store, clock, board, metrics, beats }));
        let own = nexus.clone();
        tasks.start(Task::periodic("nexus/retention", retention_interval, move || {
            let own = own.clone();
            async move { own.retire().await }
        }));
        nexus
    }

    async fn connection(&self) -> Result<sqlx::pool::PoolConnection<sqlx::Postgres>, Refusal> {
        self.store.reader().acquire().await.map_err(|e| self.store.refusal(e))
    }

    async fn register(
        &self,
        caller: &Caller,
        service: String,
        id: String,
        registration: Registration,
    ) -> Result<Committed<Registered>, Refusal> {
        registration.check()?;
        let ask = Ask::new("nexus:register", "Service", service.clone());
        let done = self
            .ledger
            .write(caller, &[ask], services::Register { service, id, registration, owner: caller.actor().to_owned() })
            .await?;
        self.metrics.did("register", 1);
        Ok(done)
    }

    async fn heartbeat(&self, caller: &Caller, service: String, id: String) -> Result<(i64, Beaten), Refusal> {
        self.ledger.pass(caller, &[Ask::new("nexus:heartbeat", "Service", service.clone())]).await?;
        self.beats.give(caller, service, id).await
    }

    async fn deregister(&self, caller: &Caller, service: String, id: String) -> Result<Committed<Instance>, Refusal> {
        let ask = Ask::new("nexus:deregister", "Service", service.clone());
        let done = self.ledger.write(caller, &[ask], services::End { service, id, silent_since: None }).await?;
        self.metrics.did("deregister", 1);
        Ok(done)
    }

    /// Says how an instance is. It changes nothing, and writes nothing, if it is so already.
    ///
    /// # Errors
    /// 404 when there is no such instance.
    pub async fn set_health(&self, service: &str, id: &str, passing: bool, why: &str) -> Result<(), Refusal> {
        let set = services::SetHealth { service: service.into(), id: id.into(), passing, why: why.into() };
        match self.ledger.write(&Caller::daemon("health"), &[], set).await {
            Ok(_) => {
                self.metrics.did("status", 1);
                Ok(())
            }
            Err(r) if r.problem() == &problem::CONFLICT => Ok(()),
            Err(r) => Err(r),
        }
    }

    /// A service's instances, in order of their ids.
    ///
    /// # Errors
    /// 503 when the database is away.
    pub async fn instances(&self, service: &str) -> Result<Vec<Instance>, Refusal> {
        let mut conn = self.connection().await?;
        service_rows::of(&mut conn, service).await.map_err(|e| self.store.refusal(e))
    }

    /// Instances with checks of their own, for whoever runs them.
    ///
    /// # Errors
    /// 503 when the database is away.
    pub async fn checked(&self) -> Result<Vec<Instance>, Refusal> {
        let mut conn = self.connection().await?;
        service_rows::checked(&mut conn).await.map_err(|e| self.store.refusal(e))
    }

    async fn service(&self, caller: &Caller, service: &str) -> Result<Vec<Instance>, Refusal> {
        self.ledger.permit(caller, &[Ask::new("nexus:service-read", "Service", service)]).await?;
        let all = self.instances(service).await?;
        if all.is_empty() {
            return Err(Refusal::not_found(format!("service {service}: no instance is registered")));
        }
        Ok(all)
    }

    async fn list_services(
        &self,
        caller: &Caller,
        after: Option<&str>,
        limit: usize,
    ) -> Result<(Vec<Service>, Option<String>), Refusal> {
        self.ledger.permit(caller, &[Ask::new("nexus:service-read", "Service", "")]).await?;
        let after: String = after.map(cursor::decode).transpose()?.unwrap_or_default();
        let mut conn = self.connection().await?;
        let all = service_rows::list(&mut conn, &after, limit as i64 + 1).await.map_err(|e| self.store.refusal(e))?;
        Ok(page(all, limit, |s| s.name.clone()))
    }

    async fn put_topic(&self, caller: &Caller, name: String, retention: f64) -> Result<Committed<Put<Topic>>, Refusal> {
        let ask = Ask::new("nexus:topic-put", "Topic", name.clone());
        let done = self.ledger.write(caller, &[ask], topics::PutTopic { name, retention }).await?;
        self.metrics.did("topic", 1);
        Ok(done)
    }

    async fn drop_topic(&self, caller: &Caller, name: String) -> Result<Committed<Topic>, Refusal> {
        let ask = Ask::new("nexus:topic-delete", "Topic", name.clone());
        let done = self.ledger.write(caller, &[ask], topics::DropTopic(name)).await?;
        self.metrics.did("topic", 1);
        Ok(done)
    }

    async fn topic(&self, caller: &Caller, name: &str) -> Result<Topic, Refusal> {
        self.ledger.permit(caller, &[Ask::new("nexus:topic-read", "Topic", name)]).await?;
        let mut conn = self.connection().await?;
        let found = topic_rows::topic_of(&mut conn, name).await.map_err(|e| self.store.refusal(e))?;
        found.ok_or_else(|| Refusal::not_found(format!("topic {name}")))
    }

    async fn list_topics(
        &self,
        caller: &Caller,
        after: Option<&str>,
        limit: usize,
    ) -> Result<(Vec<Topic>, Option<String>), Refusal> {
        self.ledger.permit(caller, &[Ask::new("nexus:topic-read", "Topic", "")]).await?;
        let after: String = after.map(cursor::decode).transpose()?.unwrap_or_default();
        let mut conn = self.connection().await?;
        let all = topic_rows::topics(&mut conn, &after, limit as i64 + 1).await.map_err(|e| self.store.refusal(e))?;
        Ok(page(all, limit, |t| t.name.clone()))
    }

    async fn put_group(&self, caller: &Caller, group: Group) -> Result<Committed<Put<Group>>, Refusal> {
        let mut asks = vec![Ask::new("nexus:group-put", "Topic", group.topic.clone())];
        // Who sends dead messages to a topic publishes there.
        asks.extend(group.dead_letter.iter().map(|to| Ask::new("nexus:publish", "Topic", to.clone())));
        let done = self.ledger.write(caller, &asks, topics::PutGroup(group)).await?;
        self.metrics.did("group", 1);
        Ok(done)
    }

    async fn drop_group(&self, caller: &Caller, topic: String, group: String) -> Result<Committed<()>, Refusal> {
        let ask = Ask::new("nexus:group-delete", "Topic", topic.clone());
        let done = self.ledger.write(caller, &[ask], topics::DropGroup { topic, group }).await?;
        self.metrics.did("group", 1);
        Ok(done)
    }

    async fn groups(
        &self,
        caller: &Caller,
        topic: &str,
        only: Option<&str>,
        after: Option<&str>,
        limit: usize,
    ) -> Result<(Vec<Group>, Option<String>), Refusal> {
        self.ledger.permit(caller, &[Ask::new("nexus:topic-read", "Topic", topic)]).await?;
        let after: String = after.map(cursor::decode).transpose()?.unwrap_or_default();
        let mut conn = self.connection().await?;
        let limit_more = limit as i64 + 1;
        let found = topic_rows::groups(&mut conn, topic, only, &after, limit_more).await;
        Ok(page(found.map_err(|e| self.store.refusal(e))?, limit, |g| g.name.clone()))
    }

    async fn publish(
        &self,
        caller: &Caller,
        topic: String,
        event: Event,
        delay_ms: i64,
    ) -> Result<Committed<Published>, Refusal> {
        let ask = Ask::new("nexus:publish", "Topic", topic.clone());
        let id = ids::new_id(self.clock.now());
        let done = self.ledger.write(caller, &[ask], publish::Publish { topic, id, event, delay_ms }).await?;
        self.metrics.messages(if done.value.duplicate { "duplicate" } else { "published" }, 1);
        Ok(done)
    }

    async fn publish_all(
        &self,
        caller: &Caller,
        topic: String,
        events: Vec<Event>,
        delay_ms: i64,
    ) -> Result<Committed<Vec<Published>>, Refusal> {
        let ask = Ask::new("nexus:publish", "Topic", topic.clone());
        let events = events.into_iter().map(|e| (ids::new_id(self.clock.now()), e)).collect();
        let done = self.ledger.write(caller, &[ask], publish::PublishAll { topic, events, delay_ms }).await?;
        let duplicates = done.value.iter().filter(|p| p.duplicate).count();
        self.metrics.messages("duplicate", duplicates);
        self.metrics.messages("published", done.value.len() - duplicates);
        Ok(done)
    }

    /// Gives a consumer up to `max` messages; waits for the first for `wait`.
    async fn pull(
        &self,
        caller: &Caller,
        topic: &str,
        group: &str,
        max: i64,
        wait: Duration,
    ) -> Result<(i64, Vec<Message>), Refusal> {
        let ask = [Ask::new("nexus:pull", "Topic", topic)];
        self.ledger.permit(caller, &ask).await?;
        let until = self.clock.elapsed() + wait;
        let closing = self.ledger.closing();
        // Heard before the rows are looked at, so that nothing that comes in between is missed.
        let mut news = self.board.topic(topic);
        loop {
            news.mark_unchanged();
            let index = self.ledger.index();
            let next = self.next_due(topic, group).await?;
            if next == Some(Duration::ZERO) {
                let (topic, group, consumer) = (topic.to_owned(), group.to_owned(), caller.actor().to_owned());
                match self.ledger.write(caller, &ask, Pull { topic, group, max, consumer }).await {
                    // What was new waits for its time, or is dead: what comes next must be looked for anew.
                    Ok(done) if done.value.messages.is_empty() => {
                        self.metrics.messages("dead", done.value.dead);
                        continue;
                    }
                    Ok(done) => {
                        self.metrics.messages("delivered", done.value.messages.len());
                        self.metrics.messages("redelivered", done.value.again);
                        self.metrics.messages("dead", done.value.dead);
                        return Ok((done.index, done.value.messages));
                    }
                    // Another consumer was quicker.
                    Err(r) if r.problem() == &problem::NOT_FOUND => {}
                    Err(r) => return Err(r),
                }
            }
            let left = until.saturating_sub(self.clock.elapsed());
            if left.is_zero() {
                return Ok((index, Vec::new()));
            }
            let nap = next.unwrap_or(left).max(Duration::from_millis(5)).min(left);
            // Whether it is time or news: look again.
            tokio::select! {
                () = closing.cancelled() => return Ok((index, Vec::new())),
                _ = news.changed() => {}
                () = tokio::time::sleep(nap) => {}
            }
        }
    }

    /// How long until a group has something to give: zero if now, `None` if nothing is known to come.
    async fn next_due(&self, topic: &str, group: &str) -> Result<Option<Duration>, Refusal> {
        let mut conn = self.connection().await?;
        let waiting = topic_rows::waiting(&mut conn, topic, group).await.map_err(|e| self.store.refusal(e))?;
        let (due, fresh) = waiting.ok_or_else(|| topics::no_group(topic, group))?;
        if fresh {
            return Ok(Some(Duration::ZERO));
        }
        let now = self.clock.now();
        Ok(due.map(|due| Timestamp::from_millis(due).since(now)))
    }

    async fn say(
        &self,
        caller: &Caller,
        topic: String,
        group: String,
        ids: Vec<Uuid>,
        word: Word,
    ) -> Result<(i64, Vec<Uuid>), Refusal> {
        let ask = Ask::new("nexus:ack", "Topic", topic.clone());
        let say = Say { topic, group, ids, consumer: caller.actor().to_owned(), word };
        let done = match self.ledger.write(caller, &[ask], say).await {
            Ok(done) => done,
            // None of them is the caller's: nothing changed, and nothing is recorded.
            Err(r) if r.problem() == &problem::CONFLICT => return Ok((self.ledger.index(), Vec::new())),
            Err(r) => return Err(r),
        };
        match word {
            Word::Ack => self.metrics.messages("acked", done.value.len()),
            Word::Nack => self.metrics.messages("nacked", done.value.len()),
            Word::Extend => {}
        }
        Ok((done.index, done.value))
    }

    /// Drops what is past its topic's retention. On several daemons at once it does no harm: each step is a command.
    async fn retire(&self) -> Result<(), TaskError> {
        let mut after = String::new();
        loop {
            let topics = {
                let mut conn = self.store.reader().acquire().await?;
                topic_rows::topics(&mut conn, &after, 1000).await?
            };
            let Some(last) = topics.last() else { return Ok(()) };
            after.clone_from(&last.name);
            for topic in topics {
                let retention = Duration::from_secs_f64(topic.retention);
                let before = self.clock.now().millis() - i64::try_from(retention.as_millis()).unwrap_or(i64::MAX);
                let before = Timestamp::from_millis(before);
                let expired = {
                    let mut conn = self.store.reader().acquire().await?;
                    topic_rows::expired(&mut conn, &topic.name, before, topics::STEP).await?
                };
                if expired.is_none() {
                    continue;
                }
                let retire = || topics::Retire { topic: topic.name.clone(), before };
                while let Ok(done) = self.ledger.write(&Caller::daemon("nexus"), &[], retire()).await {
                    self.metrics.messages("retired", usize::try_from(done.value).unwrap_or(0));
                }
            }
        }
    }
}

/// Cuts a page off what was read, one more than it holds; where the next begins.
fn page<T>(mut all: Vec<T>, limit: usize, name: impl Fn(&T) -> String) -> (Vec<T>, Option<String>) {
    let more = all.len() > limit;
    all.truncate(limit);
    let next = all.last().filter(|_| more).map(|last| cursor::encode(&name(last)));
    (all, next)
}
