//! The runner: one daemon at a time looks, counts what it sees, and says when something is no longer as it was.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};

use crate::kernel::probe::{Probe, Prober};
use crate::kernel::supervisor::{Stop, Supervisor, Task, TaskError, detach};
use crate::kernel::web::Caller;
use crate::kernel::{Refusal, problem};

use super::model::{Check, Kind, Status};
use super::{Health, checks, store};

/// How often it is looked whether something is due.
const TICK: Duration = Duration::from_millis(250);
/// How long the claim lasts without renewal.
const CLAIM: Duration = Duration::from_secs(3);

/// What is looked at.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum What {
    Check(String),
    /// Service, instance, and which of its checks.
    Instance(String, String, usize),
}

/// What this daemon has seen of it since it began to look.
struct Seen {
    probe: Probe,
    /// Which revision of a check.
    revision: i64,
    due: Duration,
    good: i64,
    bad: i64,
    in_flight: bool,
    /// As `rise` and `fall` have it.
    state: Option<bool>,
}

/// `None`: this daemon stood still while it looked, which says nothing about what it looked at.
type Looked = (What, i64, Option<Result<String, String>>);

/// Who has not looked for so long has not watched the time pass: it was frozen, and reports could not reach it either.
const GAP: Duration = Duration::from_secs(2);

/// The memory of one term: begun anew whenever the claim is taken.
struct Runner {
    health: Health,
    prober: Prober,
    room: Arc<Semaphore>,
    tell: mpsc::Sender<Looked>,
    seen: HashMap<What, Seen>,
    /// Last report of each ttl check, and since when it stands still.
    reports: HashMap<String, (i64, Duration)>,
    checks: HashMap<String, Check>,
    looked: Duration,
}

/// Starts it.
pub(super) fn start(health: &Health, prober: Prober, probes: usize, tasks: &Supervisor) {
    let health = health.clone();
    tasks.start(Task::restarting("health/runner", move |stop| {
        let (health, prober) = (health.clone(), prober.clone());
        async move { run(health, prober, probes, stop).await }
    }));
}

async fn run(health: Health, prober: Prober, probes: usize, stop: Stop) -> Result<(), TaskError> {
    let mut claim = health.ledger.claim("health/runner", CLAIM);
    let (tell, mut told) = mpsc::channel(1024);
    let mut runner = Runner {
        health,
        prober,
        room: Arc::new(Semaphore::new(probes)),
        tell,
        seen: HashMap::new(),
        reports: HashMap::new(),
        checks: HashMap::new(),
        looked: Duration::ZERO,
    };
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut mine = false;
    loop {
        tokio::select! {
            () = stop.cancelled() => {
                claim.release().await;
                return Ok(());
            }
            _ = tick.tick() => {
                mine = claim.held().await?;
                if mine {
                    runner.look().await?;
                } else {
                    // What is seen while another looks does not count: a new term counts from nothing.
                    runner.seen.clear();
                    runner.reports.clear();
                }
            }
            looked = told.recv() => if let Some(looked) = looked && mine {
                runner.take(looked).await?;
            },
        }
    }
}

impl Runner {
    /// Reads what is to be looked at, and starts what is due.
    async fn look(&mut self) -> Result<(), TaskError> {
        let refused = |r: Refusal| TaskError::from(r.detail().to_owned());
        let all = {
            let mut conn = self.health.store.reader().acquire().await?;
            store::list(&mut conn, None, None, "", 100_000).await?
        };
        let instances = self.health.nexus.checked().await.map_err(refused)?;
        let now = self.health.clock.elapsed();
        if now.saturating_sub(std::mem::replace(&mut self.looked, now)) > GAP {
            self.reports.clear();
        }
        let mut wanted: HashMap<What, (Probe, i64)> = HashMap::new();
        self.checks.clear();
        for check in all {
            if let Some(probe) = check.spec.probe() {
                wanted.insert(What::Check(check.name.clone()), (probe, check.spec_index));
            }
            self.checks.insert(check.name.clone(), check);
        }
        for instance in instances {
            for (n, probe) in instance.registration.checks.into_iter().enumerate() {
                wanted.insert(What::Instance(instance.service.clone(), instance.id.clone(), n), (probe, 0));
            }
        }
        self.seen.retain(|what, seen| {
            wanted.get(what).is_some_and(|(probe, revision)| *probe == seen.probe && *revision == seen.revision)
        });
        for (what, (probe, revision)) in wanted {
            self.seen.entry(what).or_insert_with(|| {
                // The first look is soon; from then on each keeps its own time.
                Seen { probe, revision, due: now, good: 0, bad: 0, in_flight: false, state: None }
            });
        }
        self.start_due(now);
        self.silent(now).await
    }

    fn start_due(&mut self, now: Duration) {
        for (what, seen) in &mut self.seen {
            if seen.due > now || seen.in_flight {
                continue;
            }
            let Ok(permit) = self.room.clone().try_acquire_owned() else { return };
            seen.in_flight = true;
            // Missed looks are not made up for.
            seen.due = (seen.due + seen.probe.interval()).max(now + seen.probe.interval() / 2);
            let (what, probe, revision) = (what.clone(), seen.probe.clone(), seen.revision);
            let (prober, tell, clock) = (self.prober.clone(), self.tell.clone(), self.health.clock.clone());
            detach(async move {
                let began = clock.elapsed();
                let result = prober.look(&probe).await;
                drop(permit);
                let most = Duration::try_from_secs_f64(probe.timeout).unwrap_or_default() + GAP;
                let result = (clock.elapsed().saturating_sub(began) <= most).then_some(result);
                let _ = tell.send((what, revision, result)).await;
            });
        }
    }

    /// Ttl checks that nobody reported for their whole interval, as this daemon watched it pass.
    async fn silent(&mut self, now: Duration) -> Result<(), TaskError> {
        let mut kept = HashMap::new();
        for check in self.checks.values().filter(|c| c.spec.kind == Kind::Ttl) {
            let since = match self.reports.get(&check.name) {
                Some((beat, since)) if *beat == check.beat => *since,
                _ => now,
            };
            kept.insert(check.name.clone(), (check.beat, since));
            let interval = Duration::try_from_secs_f64(check.spec.interval).unwrap_or(Duration::from_secs(10));
            if now.saturating_sub(since) > interval && check.status != Status::Critical {
                let output = format!("no report for {} ms", interval.as_millis());
                self.say(check.name.clone(), check.spec_index, Some(check.beat), Status::Critical, output).await?;
            }
        }
        self.reports = kept;
        Ok(())
    }

    /// Takes a result in.
    async fn take(&mut self, (what, revision, result): Looked) -> Result<(), TaskError> {
        let Some(seen) = self.seen.get_mut(&what).filter(|s| s.revision == revision) else { return Ok(()) };
        seen.in_flight = false;
        let Some(result) = result else { return Ok(()) };
        self.health.metrics.probed(result.is_ok());
        (seen.good, seen.bad) = if result.is_ok() { (seen.good + 1, 0) } else { (0, seen.bad + 1) };
        let state = if seen.good >= seen.probe.rise {
            Some(true)
        } else if seen.bad >= seen.probe.fall {
            Some(false)
        } else {
            return Ok(());
        };
        seen.state = state;
        let output = result.unwrap_or_else(|wrong| wrong);
        let passing = state == Some(true);
        match what {
            What::Check(name) => {
                let status = if passing { Status::Passing } else { Status::Critical };
                if self.checks.get(&name).is_some_and(|c| c.status == status) {
                    return Ok(());
                }
                self.say(name, revision, None, status, output).await
            }
            What::Instance(service, id, _) => self.instance(service, id, &output).await,
        }
    }

    /// An instance is fit if none of its checks says otherwise.
    async fn instance(&self, service: String, id: String, output: &str) -> Result<(), TaskError> {
        let of = |what: &What| matches!(what, What::Instance(s, i, _) if *s == service && *i == id);
        let states: Vec<Option<bool>> = self.seen.iter().filter(|(w, _)| of(w)).map(|(_, s)| s.state).collect();
        let passing = if states.contains(&Some(false)) {
            false
        } else if states.iter().all(|s| *s == Some(true)) {
            true
        } else {
            return Ok(());
        };
        match self.health.nexus.set_health(&service, &id, passing, output).await {
            Err(r) if r.problem() != &problem::NOT_FOUND => Err(r.detail().to_owned().into()),
            _ => Ok(()),
        }
    }

    async fn say(
        &self,
        name: String,
        spec_index: i64,
        silent_since: Option<i64>,
        status: Status,
        output: String,
    ) -> Result<(), TaskError> {
        let actor = "daemon:health".to_owned();
        let set = checks::SetStatus { name, spec_index: Some(spec_index), silent_since, status, output, actor };
        match self.health.ledger.write(&Caller::daemon("health"), &[], set).await {
            Ok(_) => {
                self.health.metrics.changed(status);
                Ok(())
            }
            // It was changed or removed, or it reported, while it was looked at.
            Err(r) if r.problem() == &problem::CONFLICT || r.problem() == &problem::NOT_FOUND => Ok(()),
            Err(r) => Err(r.detail().to_owned().into()),
        }
    }
}
