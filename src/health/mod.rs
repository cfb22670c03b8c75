//! Is everything as it should be, and if not, since when and why.
//!
//! **Invariants.** A check's status, its incident and the entry of the change commit together. A check that is critical has an
//! open incident unless a person resolved it; there is one open incident for each thing that is wrong.
//!
//! **Not here.** How a look is taken (`kernel::probe`), which instances there are (`nexus`).
//!
//! **Why this way.** One daemon looks, on its own clock, and the others watch it live: a target is asked once an interval
//! however many daemons there are, and the death of one costs a few seconds, not a check.

mod checks;
pub mod http;
mod incidents;
mod metrics;
pub mod model;
mod reports;
mod runner;
mod store;

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::kernel::probe::Prober;
use crate::kernel::supervisor::{Supervisor, Task, TaskError};
use crate::kernel::web::{Ask, Caller, cursor};
use crate::kernel::{Clock, Refusal, problem};
use crate::ledger::{Committed, Ledger};
use crate::nexus::Nexus;
use crate::nexus::model::{Fitness, Instance};
use crate::store::Store;

pub use metrics::Metrics;
use model::{Check, Incident, Kind, Overall, Report, Spec, Status};
use reports::Reports;

/// What the room is made from.
pub struct Parts {
    /// Where it writes.
    pub ledger: Ledger,
    /// Where it reads.
    pub store: Store,
    /// Durations.
    pub clock: Clock,
    /// Whose instances it looks at.
    pub nexus: Nexus,
    /// Where it counts.
    pub metrics: Metrics,
    /// Looks at once at most.
    pub probes: usize,
}

/// The room. Cheap to clone.
#[derive(Clone)]
pub struct Health(Arc<Room>);

impl std::ops::Deref for Health {
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
    nexus: Nexus,
    metrics: Metrics,
    reports: Reports,
}

/// How often signals are looked for, and checks counted.
const FOLLOW: Duration = Duration::from_secs(1);

impl Health {
    /// Opens the room and starts its tasks.
    ///
    /// # Errors
    /// When no TLS can be set up for looking.
    pub fn start(parts: Parts, tasks: &Supervisor) -> Result<Self, String> {
        let Parts { ledger, store, clock, nexus, metrics, probes } = parts;
        let reports = Reports::start(ledger.clone(), tasks);
        let health = Self(Arc::new(Room { ledger, store, clock, nexus, metrics, reports }));
        runner::start(&health, Prober::new()?, probes, tasks);
        let own = health.clone();
        tasks.start(Task::periodic("health/signals", FOLLOW, move || {
            let own = own.clone();
            async move { own.follow().await }
        }));
        Ok(health)
    }

    async fn connection(&self) -> Result<sqlx::pool::PoolConnection<sqlx::Postgres>, Refusal> {
        self.store.reader().acquire().await.map_err(|e| self.store.refusal(e))
    }

    async fn put(&self, caller: &Caller, name: String, spec: Spec) -> Result<Committed<checks::Done>, Refusal> {
        spec.check()?;
        let ask = Ask::new("health:check-put", "Check", name.clone());
        self.ledger.write(caller, &[ask], checks::Put { name, spec }).await
    }

    async fn remove(&self, caller: &Caller, name: String) -> Result<Committed<Check>, Refusal> {
        let ask = Ask::new("health:check-delete", "Check", name.clone());
        let actor = caller.actor().to_owned();
        self.ledger.write(caller, &[ask], checks::Remove { name, actor }).await
    }

    async fn read(&self, caller: &Caller, name: &str) -> Result<Check, Refusal> {
        self.ledger.permit(caller, &[Ask::new("health:check-read", "Check", name)]).await?;
        self.one(name).await
    }

    async fn one(&self, name: &str) -> Result<Check, Refusal> {
        let mut conn = self.connection().await?;
        let found = store::one(&mut conn, name).await.map_err(|e| self.store.refusal(e))?;
        found.ok_or_else(|| checks::absent(name))
    }

    async fn list(
        &self,
        caller: &Caller,
        status: Option<Status>,
        service: Option<&str>,
        after: Option<&str>,
        limit: usize,
    ) -> Result<(Vec<Check>, Option<String>), Refusal> {
        self.ledger.permit(caller, &[Ask::new("health:check-read", "Check", "")]).await?;
        let after: String = after.map(cursor::decode).transpose()?.unwrap_or_default();
        let mut conn = self.connection().await?;
        let status = status.map(Status::as_str);
        let all = store::list(&mut conn, status, service, &after, limit as i64 + 1).await;
        let mut all = all.map_err(|e| self.store.refusal(e))?;
        let more = all.len() > limit;
        all.truncate(limit);
        let next = all.last().filter(|_| more).map(|c| cursor::encode(&c.name));
        Ok((all, next))
    }

    /// Takes a report of a ttl check: at once if it changes something, else with others.
    async fn report(&self, caller: &Caller, name: String, report: Report) -> Result<(i64, Check), Refusal> {
        if report.status == Status::Unknown {
            return Err(Refusal::malformed("/status", "passing or critical is reported"));
        }
        let ask = [Ask::new("health:report", "Check", name.clone())];
        self.ledger.permit(caller, &ask).await?;
        // What this daemon knows may be old: a report that changes something must not be taken for one that does not.
        self.ledger.fence().await?;
        let check = self.one(&name).await?;
        if check.spec.kind != Kind::Ttl {
            return Err(Refusal::new(&problem::CONFLICT, "only a ttl check is reported"));
        }
        self.metrics.reported(report.status);
        let output = report.output.unwrap_or_default();
        if check.status == report.status && (output.is_empty() || output == check.output) {
            let index = self.reports.give(caller, name).await?;
            return Ok((index, check));
        }
        let actor = caller.actor().to_owned();
        let (status, spec_index, silent_since) = (report.status, None, None);
        let set = checks::SetStatus { name, spec_index, silent_since, status, output, actor };
        let done = self.ledger.write(caller, &ask, set).await?;
        self.metrics.changed(status);
        Ok((done.index, done.value))
    }

    /// A service, as its checks and instances show it: as bad as the worst of them.
    async fn service(&self, caller: &Caller, service: &str) -> Result<Overall, Refusal> {
        self.ledger.permit(caller, &[Ask::new("health:service-read", "Service", service)]).await?;
        let checks = {
            let mut conn = self.connection().await?;
            store::list(&mut conn, None, Some(service), "", 10_000).await.map_err(|e| self.store.refusal(e))?
        };
        let instances = self.nexus.instances(service).await?;
        if checks.is_empty() && instances.is_empty() {
            return Err(Refusal::not_found(format!("service {service}: it has no check and no instance")));
        }
        Ok(rolled_up(service.to_owned(), checks, instances))
    }

    async fn say(
        &self,
        caller: &Caller,
        id: Uuid,
        word: incidents::Word,
        note: String,
    ) -> Result<Committed<Incident>, Refusal> {
        let (action, event) = match word {
            incidents::Word::Acknowledge => ("health:acknowledge", "acknowledged"),
            incidents::Word::Resolve => ("health:resolve", "resolved"),
            incidents::Word::Comment => ("health:comment", "comment"),
        };
        let ask = Ask::new(action, "Incident", id.to_string());
        let actor = caller.actor().to_owned();
        let done = self.ledger.write(caller, &[ask], incidents::Say { id, word, actor, note }).await?;
        self.metrics.incident(event);
        Ok(done)
    }

    async fn incident(&self, caller: &Caller, id: Uuid) -> Result<Incident, Refusal> {
        self.ledger.permit(caller, &[Ask::new("health:incident-read", "Incident", id.to_string())]).await?;
        let refusal = |e| self.store.refusal(e);
        let mut conn = self.connection().await?;
        let found = store::incident_of(&mut conn, id).await.map_err(refusal)?;
        let mut incident = found.ok_or_else(|| Refusal::not_found(format!("incident {id}")))?;
        incident.events = Some(store::events(&mut conn, id).await.map_err(refusal)?);
        Ok(incident)
    }

    async fn incidents(
        &self,
        caller: &Caller,
        status: Option<&str>,
        severity: Option<&str>,
        after: Option<&str>,
        limit: usize,
    ) -> Result<(Vec<Incident>, Option<String>), Refusal> {
        self.ledger.permit(caller, &[Ask::new("health:incident-read", "Incident", "")]).await?;
        let before = after.map(cursor::decode).transpose()?.unwrap_or((i64::MAX, Uuid::max()));
        let mut conn = self.connection().await?;
        let all = store::incidents(&mut conn, status, severity, before, limit as i64 + 1).await;
        let mut all = all.map_err(|e| self.store.refusal(e))?;
        let more = all.len() > limit;
        all.truncate(limit);
        let next = all.last().filter(|_| more).map(|i| cursor::encode(&(i.opened_index, i.id)));
        Ok((all, next))
    }

    /// Opens the incidents of entries that carry a signal. Several daemons may do so at once: each signal is taken in once.
    async fn follow(&self) -> Result<(), TaskError> {
        let refused = |r: Refusal| TaskError::from(r.detail().to_owned());
        loop {
            let (at, counts) = {
                let mut conn = self.store.reader().acquire().await?;
                (store::followed(&mut conn).await?, store::counts(&mut conn).await?)
            };
            self.metrics.counted(&counts);
            let (found, to) = self.ledger.signals(at).await.map_err(refused)?;
            for s in found {
                let (severity, fingerprint) = (s.signal.severity, s.signal.fingerprint);
                let taken = incidents::Taken { at: s.index, severity, fingerprint, summary: s.summary };
                match self.ledger.write(&Caller::daemon("health"), &[], taken).await {
                    Ok(_) => self.metrics.incident("signalled"),
                    Err(r) if r.problem() == &problem::CONFLICT => {}
                    Err(r) => return Err(refused(r)),
                }
            }
            let mut conn = self.store.reader().acquire().await?;
            store::follow(&mut conn, to).await?;
            if to >= self.ledger.index() {
                return Ok(());
            }
        }
    }
}

/// As bad as the worst of it, and why.
fn rolled_up(service: String, checks: Vec<Check>, instances: Vec<Instance>) -> Overall {
    let mut why: Vec<String> = Vec::new();
    for check in checks.iter().filter(|c| c.status == Status::Critical) {
        why.push(format!("check {} is critical since {}: {}", check.name, check.since, check.output));
    }
    let fit = instances.iter().filter(|i| i.status == Fitness::Passing).count();
    for instance in instances.iter().filter(|i| i.status == Fitness::Critical) {
        why.push(format!("instance {} is critical: {}", instance.id, instance.why));
    }
    let status = if checks.iter().any(|c| c.status == Status::Critical) || (fit == 0 && !instances.is_empty()) {
        "critical"
    } else if fit < instances.len() {
        "warning"
    } else if fit > 0 || checks.iter().any(|c| c.status == Status::Passing) {
        "passing"
    } else {
        why.push("nothing was seen of it yet".to_owned());
        "unknown"
    };
    Overall { service, status, why, checks, instances }
}
