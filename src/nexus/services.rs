//! Instances of services: registered, alive as long as they beat, gone by an entry.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use tokio::sync::{Mutex, mpsc, oneshot};

use crate::kernel::supervisor::{Supervisor, Task, TaskError};
use crate::kernel::web::Caller;
use crate::kernel::{Clock, Refusal, problem};
use crate::ledger::{self, Command, Entry, Failure, Ledger, Touch, Tx, Vigil};
use crate::store::Store;

use super::board::SERVICE;
use super::metrics::Metrics;
use super::model::{Beaten, Fitness, Instance, Registration};
use super::store::services as store;

fn resource(service: &str, id: &str) -> String {
    format!("instance/{service}/{id}")
}

fn absent(service: &str, id: &str) -> Refusal {
    Refusal::not_found(format!("instance {id} of {service}: register it"))
}

/// Registers an instance, or registers it anew.
pub(super) struct Register {
    pub service: String,
    pub id: String,
    pub registration: Registration,
    /// The client that registers it.
    pub owner: String,
}

/// What registering answers.
#[derive(Serialize, Deserialize)]
pub struct Registered {
    /// Whether it was not there before.
    pub new: bool,
    /// As it is now.
    pub instance: Instance,
}

impl Register {
    /// What the instance will be, and the entry of it; nothing is written.
    pub async fn decided(&self, conn: &mut PgConnection, index: i64) -> Result<(Registered, Entry), sqlx::Error> {
        let was = store::one(conn, &self.service, &self.id).await?;
        let checks = &self.registration.checks;
        let same = was.as_ref().filter(|w| !checks.is_empty() && w.registration.checks == *checks);
        let instance = Instance {
            service: self.service.clone(),
            id: self.id.clone(),
            registration: self.registration.clone(),
            // One whose checks are the same is as fit as it was.
            status: same.map_or(Fitness::Passing, |w| w.status),
            why: same.map_or_else(|| "registered".to_owned(), |w| w.why.clone()),
            index,
            created_index: was.as_ref().map_or(index, |w| w.created_index),
        };
        let entry = Entry::ok("nexus:register", resource(&self.service, &self.id))
            .change("address", self.registration.address.clone())
            .change("ttl_ms", self.registration.ttl_ms())
            .touch(Touch::key(SERVICE, self.service.as_bytes()));
        Ok((Registered { new: was.is_none(), instance }, entry))
    }
}

impl Command for Register {
    type Out = Registered;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Registered, Entry), Failure> {
        let index = tx.index();
        let (registered, entry) = self.decided(tx.read(), index).await?;
        store::put(tx.write(), &registered.instance, &self.owner, "register").await?;
        Ok((registered, entry))
    }
}

/// Ends an instance: by who registered it, or because it was silent.
pub(super) struct End {
    pub service: String,
    pub id: String,
    /// The sign of life it was last seen at, if its silence ends it.
    pub silent_since: Option<i64>,
}

impl Command for End {
    type Out = Instance;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Instance, Entry), Failure> {
        let found = store::one(tx.read(), &self.service, &self.id).await?;
        let mut instance = found.ok_or_else(|| absent(&self.service, &self.id))?;
        let (action, event) = match self.silent_since {
            None => ("nexus:deregister", "deregister"),
            Some(seen) => {
                if store::beat_of(tx.read(), &self.service, &self.id).await? != Some(seen) {
                    return Err(Refusal::new(&problem::CONFLICT, "the instance gave a sign of life").into());
                }
                ("nexus:expire", "expire")
            }
        };
        let index = tx.index();
        instance.index = index;
        instance.status = Fitness::Critical;
        event.clone_into(&mut instance.why);
        store::remove(tx.write(), &instance, index, event).await?;
        let mut entry =
            Entry::ok(action, resource(&self.service, &self.id)).touch(Touch::key(SERVICE, self.service.as_bytes()));
        if self.silent_since.is_some() {
            entry = entry.reason(format!("no heartbeat for {} ms", instance.registration.ttl_ms()));
        }
        Ok((instance, entry))
    }
}

/// Says how an instance is; nothing is written if it is so already.
pub(super) struct SetHealth {
    pub service: String,
    pub id: String,
    pub passing: bool,
    pub why: String,
}

impl Command for SetHealth {
    type Out = Instance;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Instance, Entry), Failure> {
        let found = store::one(tx.read(), &self.service, &self.id).await?;
        let mut instance = found.ok_or_else(|| absent(&self.service, &self.id))?;
        let status = if self.passing { Fitness::Passing } else { Fitness::Critical };
        if instance.status == status {
            return Err(Refusal::new(&problem::CONFLICT, "the instance is like that already").into());
        }
        instance.status = status;
        instance.why.clone_from(&self.why);
        instance.index = tx.index();
        store::set_status(tx.write(), &instance).await?;
        let entry = Entry::ok("nexus:status", resource(&self.service, &self.id))
            .change("passing", self.passing)
            .reason(self.why.clone())
            .touch(Touch::key(SERVICE, self.service.as_bytes()));
        Ok((instance, entry))
    }
}

/// Longest time a heartbeat waits for others to share its entry.
const GATHER: Duration = Duration::from_millis(250);
/// Heartbeats in one entry at most.
const BEATS: usize = 1000;
/// Heartbeats that may wait.
const QUEUE: usize = 16_384;

struct Beat {
    service: String,
    id: String,
    actor: String,
    tell: oneshot::Sender<Result<(i64, Beaten), Refusal>>,
}

/// Gathers heartbeats. They change nothing anyone can see, so those that come together share an entry (rule 18); each is
/// answered once that is durable.
#[derive(Clone)]
pub(super) struct Beats(mpsc::Sender<Beat>);

impl Beats {
    pub fn start(ledger: Ledger, metrics: Metrics, tasks: &Supervisor) -> Self {
        let (send, receive) = mpsc::channel::<Beat>(QUEUE);
        let receive = Arc::new(Mutex::new(receive));
        tasks.start(Task::restarting("nexus/heartbeats", move |stop| {
            let (receive, ledger, metrics) = (receive.clone(), ledger.clone(), metrics.clone());
            async move {
                let mut receive = receive.lock().await;
                // A quarter of the smallest time to live seen; a shorter one may be first in line.
                let mut gather = GATHER;
                loop {
                    let mut beats = Vec::new();
                    tokio::select! {
                        () = stop.cancelled() => return Ok(()),
                        n = receive.recv_many(&mut beats, BEATS) => if n == 0 { stop.cancelled().await; return Ok(()) },
                    }
                    tokio::time::sleep(gather).await;
                    while beats.len() < BEATS
                        && let Ok(beat) = receive.try_recv()
                    {
                        beats.push(beat);
                    }
                    if let Some(ttl) = flush(&ledger, &metrics, beats).await {
                        gather = GATHER.min(ttl / 4);
                    }
                }
            }
        }));
        Self(send)
    }

    /// Gives a sign of life.
    pub async fn give(&self, caller: &Caller, service: String, id: String) -> Result<(i64, Beaten), Refusal> {
        let (tell, told) = oneshot::channel();
        let beat = Beat { service, id, actor: caller.actor().to_owned(), tell };
        self.0.try_send(beat).map_err(|_| Refusal::new(&problem::OVERLOADED, "too many heartbeats wait"))?;
        told.await.map_err(|_| Refusal::unavailable("the daemon is stopping"))?
    }
}

/// Writes heartbeats as one entry, and answers each; the smallest time to live among them.
async fn flush(ledger: &Ledger, metrics: &Metrics, beats: Vec<Beat>) -> Option<Duration> {
    let command = Beaters(beats.iter().map(|b| [b.service.clone(), b.id.clone(), b.actor.clone()]).collect());
    let done = ledger.write(&Caller::daemon("nexus"), &[], command).await;
    let found: HashMap<(&str, &str), i64> = match &done {
        Ok(done) => done.value.iter().map(|(s, i, ttl)| ((s.as_str(), i.as_str()), *ttl)).collect(),
        Err(_) => HashMap::new(),
    };
    metrics.did("heartbeat", found.len());
    let smallest = found.values().min().map(|ms| Duration::from_millis(u64::try_from(*ms).unwrap_or(0)));
    for beat in beats {
        let answer = match &done {
            // None of them is there: nothing was written.
            Err(r) if r.problem() == &problem::NOT_FOUND => Err(absent(&beat.service, &beat.id)),
            Err(r) => Err(r.clone()),
            Ok(done) => match found.get(&(beat.service.as_str(), beat.id.as_str())) {
                Some(ttl) => {
                    let ttl = *ttl as f64 / 1000.0;
                    Ok((done.index, Beaten { service: beat.service, id: beat.id, ttl }))
                }
                None => Err(absent(&beat.service, &beat.id)),
            },
        };
        let _ = beat.tell.send(answer);
    }
    smallest
}

/// Service, instance and actor of each.
struct Beaters(Vec<[String; 3]>);

impl Command for Beaters {
    type Out = Vec<(String, String, i64)>;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Self::Out, Entry), Failure> {
        let services: Vec<&str> = self.0.iter().map(|b| b[0].as_str()).collect();
        let ids: Vec<&str> = self.0.iter().map(|b| b[1].as_str()).collect();
        let index = tx.index();
        let mut there = false;
        for beat in &self.0 {
            there = there || store::beat_of(tx.read(), &beat[0], &beat[1]).await?.is_some();
        }
        if !there {
            return Err(Refusal::not_found("such instance").into());
        }
        let found = store::beat(tx.write(), index, &services, &ids).await?;
        let who = |b: &[String; 3]| format!("{}/{} by {}", b[0], b[1], b[2]);
        let beaten: Vec<String> = self.0.iter().map(who).collect();
        let entry = Entry::ok("nexus:heartbeat", "instances").change("heartbeats", beaten);
        Ok((found, entry))
    }
}

/// How often silence is looked for.
const LOOK: Duration = Duration::from_millis(500);

/// Ends instances that were silent for their whole time to live, as this daemon watched it pass on its own clock.
pub(super) fn expire(store: Store, ledger: Ledger, clock: Clock, metrics: Metrics, tasks: &Supervisor) {
    tasks.start(Task::restarting("nexus/expiry", move |stop| {
        let (store, ledger, clock, metrics) = (store.clone(), ledger.clone(), clock.clone(), metrics.clone());
        async move {
            let mut vigil = Vigil::new(&ledger, clock, "nexus/expiry");
            loop {
                tokio::select! {
                    () = stop.cancelled() => {
                        vigil.release().await;
                        return Ok(());
                    }
                    () = tokio::time::sleep(LOOK) => {}
                }
                if vigil.watches().await? {
                    look(&store, &ledger, &metrics, &mut vigil).await?;
                }
            }
        }
    }));
}

async fn look(
    store: &Store,
    ledger: &Ledger,
    metrics: &Metrics,
    vigil: &mut Vigil<(String, String)>,
) -> Result<(), TaskError> {
    let signs = {
        let mut conn = store.reader().acquire().await?;
        super::store::services::signs(&mut conn).await?
    };
    let sign = |s: store::Sign| {
        let ttl = Duration::from_millis(u64::try_from(s.ttl_ms).unwrap_or(0));
        ledger::Sign { of: (s.service, s.id), beat: s.beat, ttl }
    };
    for ((service, id), beat) in vigil.silent(signs.into_iter().map(sign)) {
        let end = End { service, id, silent_since: Some(beat) };
        match ledger.write(&Caller::daemon("nexus"), &[], end).await {
            Ok(_) => metrics.did("expire", 1),
            Err(r) if r.problem() == &problem::CONFLICT || r.problem() == &problem::NOT_FOUND => {}
            Err(r) => return Err(r.detail().to_owned().into()),
        }
    }
    Ok(())
}
