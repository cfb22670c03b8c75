//! Configuration becomes a running daemon: what starts in what order, and stops in the reverse.

mod apart;
mod checks;
mod files;

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use utoipa_axum::router::OpenApiRouter;

use crate::api::{self, Authenticator, Bound, Certificates, Connection, Limits, Rate, Refused};
use crate::audit::{self, Audit, Halt};
use crate::config::{Config, Loaded};
use crate::governance::{self, Governance, Rules};
use crate::health::{self, Health};
use crate::kernel::crypto::MasterKey;
use crate::kernel::supervisor::{Supervisor, Task};
use crate::kernel::web::{Ask, Authority, Caller, Permit, RequestInfo};
use crate::kernel::{BoxFuture, Clock, Refusal, jose, problem};
use crate::ledger::verbs::Verbs;
use crate::ledger::{self, Ledger};
use crate::nexus::{self, Board, Nexus};
use crate::state::{self, Hub, State};
use crate::store::{self, Store};
use crate::telemetry;
use crate::token::{self, Token};

pub use apart::{Recovered, Resumed, diagnose, recover, resume};

/// Tables that are partitioned by index as the entries are.
const PARTITIONED: &[&str] = &[audit::PARTITIONED, state::PARTITIONED];

/// How long one task may take to stop.
const STOP_EACH: Duration = Duration::from_secs(5);

/// Runs the daemon until a signal, or until a task that must not end has ended. `announce` hears the address once all is ready.
///
/// # Errors
/// With a sentence for the operator.
pub async fn serve(loaded: Loaded, announce: impl FnOnce(&str)) -> Result<(), String> {
    let config = &loaded.config;
    telemetry::start(&config.telemetry)?;
    let mut signals = Signals::new()?;
    let _folder = store::take_folder(&config.data.dir)?;
    let certificates = Certificates::load(&config.server)?;
    let bound = Bound::bind(&config.server.listen, certificates.clone()).await?;
    let metrics = match &config.server.metrics_listen {
        Some(listen) => Some(Bound::bind_plain(listen).await?),
        None => None,
    };
    let front = Front { bound, metrics, certificates };
    let store = Store::open(config).await?;
    // Whatever goes wrong from here on, the private cluster is stopped.
    let done = run(&loaded, &store, front, announce, &mut signals).await;
    store.stop().await;
    done
}

/// The sockets.
struct Front {
    bound: Bound,
    metrics: Option<Bound>,
    certificates: Option<Arc<Certificates>>,
}

/// How often it is looked whether the certificate's files changed.
const CERTIFICATES: Duration = Duration::from_secs(2);

/// What everything else stands on.
struct Ground<'a> {
    config: &'a Config,
    store: &'a Store,
    clock: Clock,
    tasks: Supervisor,
    registry: prometheus::Registry,
    master: Arc<MasterKey>,
    rate: Arc<Rate>,
    refused: Refused,
}

async fn run(
    loaded: &Loaded,
    store: &Store,
    front: Front,
    announce: impl FnOnce(&str),
    signals: &mut Signals,
) -> Result<(), String> {
    let config = &loaded.config;
    store.migrate().await?;
    let halt = audit::check_at_start(store, &config.data.dir).await?;
    jose::install();
    let ground = Ground::new(config, store)?;
    store.start_tasks(config, &ground.tasks, &ground.registry).map_err(|e| e.to_string())?;
    let started = ground.start(front, halt, announce).await;
    if started.is_err() {
        ground.tasks.stop(STOP_EACH).await;
        return started;
    }
    let failed = ground.tasks.failed();
    let ended = tokio::select! {
        () = signals.end(|| reload(loaded, &ground.rate)) => Ok(()),
        () = failed.cancelled() => Err("a task that the daemon cannot do without has ended; its log says why".to_owned()),
    };
    tracing::info!("stopping");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tokio::select! {
        () = ground.tasks.stop(config.server.drain.get() + STOP_EACH) => {}
        () = signals.end(|| {}) => tracing::warn!("a second signal: stopping at once"),
    }
    tracing::info!("stopped");
    ended
}

/// What the follower keeps current, and the rules that read it.
struct Views {
    entities: Arc<governance::Snapshot>,
    clients: Arc<token::Snapshot>,
    keys: Arc<Hub>,
    board: Arc<Board>,
    rules: Arc<Rules>,
}

fn said(refusal: Refusal) -> String {
    refusal.detail().to_owned()
}

impl<'a> Ground<'a> {
    fn new(config: &'a Config, store: &'a Store) -> Result<Self, String> {
        let clock = Clock::system();
        let tasks = Supervisor::new(clock.clone());
        let registry = telemetry::registry().map_err(|e| e.to_string())?;
        let (master, rate) = (Arc::new(files::master_key(config)?), Arc::new(Rate::new(&config.server)?));
        let refused = Refused::new(&registry).map_err(|e| e.to_string())?;
        Ok(Self { config, store, tasks, clock, registry, master, rate, refused })
    }

    fn views(&self) -> Result<Views, String> {
        let entities = Arc::new(governance::Snapshot::new(governance::Library::new()?));
        let rules =
            Arc::new(Rules::new(entities.clone(), self.clock.clone(), &self.registry, &self.config.governance)?);
        let clients = Arc::new(token::Snapshot::new(self.master.clone()));
        Ok(Views { entities, clients, keys: Arc::new(Hub::new()), board: Arc::default(), rules })
    }

    async fn start(&self, front: Front, halt: Option<Halt>, announce: impl FnOnce(&str)) -> Result<(), String> {
        let views = self.views()?;
        let ledger = self.ledger(&views).await?;
        if let Some(halt) = halt {
            ledger.halt(halt.problem, &halt.why);
        }
        let (gate, routes) = self.rooms(&ledger, views, &front.bound.url).await?;
        self.serve(&ledger, gate, routes, front, announce)
    }

    async fn ledger(&self, views: &Views) -> Result<Ledger, String> {
        let settings = &self.config.ledger;
        let parts = ledger::Parts {
            store: self.store.clone(),
            clock: self.clock.clone(),
            master: self.master.clone(),
            registry: self.registry.clone(),
            queue: settings.queue,
            batch: settings.batch,
            lock_wait: settings.lock_wait.get(),
            write_timeout: settings.write_timeout.get(),
            // Entities before clients: a client that is known has its entity.
            projections: vec![views.entities.clone(), views.clients.clone(), views.keys.clone(), views.board.clone()],
            fencing: state::fenced,
            partitioned: PARTITIONED,
            present: state::kind_of_keys(),
        };
        let ledger = Ledger::start(parts, &self.tasks).await.map_err(said)?;
        let check = self.master.check_value();
        if ledger.settle("master-key-check", &check).await.map_err(said)? != check {
            return Err("the master key is not the one this database was made with: its keys and stored outcomes would not open; give the right one (secrets.master_key_file, or the credential `master-key`)".to_owned());
        }
        Ok(ledger)
    }

    /// Opens the rooms, lowest first; answers the gate of every request and all routes.
    async fn rooms(&self, ledger: &Ledger, views: Views, url: &str) -> Result<(Arc<Gate>, OpenApiRouter), String> {
        let parts = audit::Parts {
            ledger: ledger.clone(),
            store: self.store.clone(),
            clock: self.clock.clone(),
            master: self.master.clone(),
            config: self.config,
            registry: &self.registry,
            records: vec![governance::records(self.store), state::records(self.store), nexus::records(self.store)],
        };
        let audit = Audit::start(parts, &self.tasks).await.map_err(said)?;
        let parts = governance::Parts {
            rules: views.rules.clone(),
            ledger: ledger.clone(),
            store: self.store.clone(),
            url,
            data: &self.config.data.dir,
        };
        let governance = Governance::start(parts, &self.tasks).await;
        let token = self.token(ledger, views.clients, url).await?;
        files::admin(&self.config.data.dir, url, &token).await?;
        let state = self.state(ledger, views.keys, url).await?;
        let parts = nexus::Parts {
            ledger: ledger.clone(),
            store: self.store.clone(),
            clock: self.clock.clone(),
            board: views.board,
            metrics: nexus::Metrics::new(&self.registry).map_err(|e| e.to_string())?,
            retention_interval: self.config.nexus.retention_interval.get(),
        };
        let nexus = Nexus::start(parts, &self.tasks);
        let served = Arc::new(nexus.clone());
        let parts = health::Parts {
            ledger: ledger.clone(),
            store: self.store.clone(),
            clock: self.clock.clone(),
            nexus: nexus.clone(),
            metrics: health::Metrics::new(&self.registry).map_err(|e| e.to_string())?,
            probes: self.config.health.probes,
        };
        let health = Health::start(parts, &self.tasks)?;
        let gate = Arc::new_cyclic(|own| Gate {
            token: token.clone(),
            rules: views.rules,
            governance: governance.clone(),
            ledger: ledger.clone(),
            own: own.clone(),
        });
        let authority: Weak<dyn Authority> = Arc::downgrade(&(gate.clone() as Arc<dyn Authority>));
        token.decided_by(authority);
        gate.rules.vouched_by(Arc::new(token.clone()));
        token.served_by(served);
        ledger.combines(Verbs::of([audit.verbs(), token.verbs(), state.verbs(), nexus.verbs()]));
        let routes = audit::http::routes(audit)
            .merge(governance::http::routes(governance))
            .merge(token::http::routes(token))
            .merge(state::http::routes(state))
            .merge(nexus::http::routes(nexus))
            .merge(health::http::routes(health));
        Ok((gate, routes))
    }

    async fn state(&self, ledger: &Ledger, hub: Arc<Hub>, url: &str) -> Result<State, String> {
        let parts = state::Parts {
            ledger: ledger.clone(),
            store: self.store.clone(),
            clock: self.clock.clone(),
            hub,
            metrics: state::Metrics::new(&self.registry).map_err(|e| e.to_string())?,
            history: self.config.state.history,
            url,
        };
        State::start(parts, &self.tasks).await.map_err(said)
    }

    async fn token(&self, ledger: &Ledger, clients: Arc<token::Snapshot>, url: &str) -> Result<Token, String> {
        let parts = token::Parts {
            ledger: ledger.clone(),
            store: self.store.clone(),
            clock: self.clock.clone(),
            snapshot: clients,
            master: self.master.clone(),
            config: self.config.token.clone(),
            url: url.to_owned(),
            registry: self.registry.clone(),
        };
        Token::start(parts, &self.tasks).await.map_err(said)
    }

    fn serve(
        &self,
        ledger: &Ledger,
        gate: Arc<Gate>,
        routes: OpenApiRouter,
        front: Front,
        announce: impl FnOnce(&str),
    ) -> Result<(), String> {
        let Front { bound, metrics, certificates } = front;
        let server = &self.config.server;
        let readiness = checks::readiness(self.store, ledger, &self.clock, certificates.clone());
        if let Some(metrics) = metrics {
            self.listen(
                "metrics",
                metrics,
                api::plain_pages(readiness.clone(), self.tasks.clone(), self.registry.clone()),
            );
        }
        if let Some(certificates) = certificates {
            self.tasks.start(Task::periodic("api/certificates", CERTIFICATES, move || {
                let certificates = certificates.clone();
                async move {
                    certificates.refresh();
                    Ok(())
                }
            }));
        }
        let parts = api::Parts {
            ledger: ledger.clone(),
            authenticator: gate,
            readiness,
            tasks: self.tasks.clone(),
            registry: self.registry.clone(),
            clock: self.clock.clone(),
            limits: Limits::from(server),
            rate: self.rate.clone(),
            refused: self.refused.clone(),
            public_entries: self.config.audit.public_entries,
        };
        let router = api::router(parts, routes).map_err(said)?;
        files::daemon(&self.config.data.dir, &bound.url)?;
        let url = bound.url.clone();
        self.listen("api", bound, router);
        // What is started last stops first: those who wait for news go, and the sockets are soon drained.
        let closing = ledger.closing();
        self.tasks.start(Task::restarting("api/waits", move |stop| {
            let closing = closing.clone();
            async move {
                stop.cancelled().await;
                closing.cancel();
                Ok(())
            }
        }));
        announce(&url);
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        self.watchdog();
        Ok(())
    }

    /// Serves a socket; the daemon does not go on without it.
    fn listen(&self, name: &'static str, bound: Bound, router: axum::Router) {
        let server = &self.config.server;
        let (arrival, body, drain) = (server.request_timeout.get(), server.body_limit, server.drain.get());
        let limits = Connection { arrival, body, refused: self.refused.clone() };
        let listener = Arc::new(tokio::sync::Mutex::new(Some(bound.listener)));
        self.tasks.start(Task::fatal(name, move |stop| {
            let (listener, router, limits) = (listener.clone(), router.clone(), limits.clone());
            async move {
                let taken = listener.lock().await.take();
                let listener = taken.ok_or("the sockets were closed")?;
                listener.serve(router, limits, drain, stop).await;
                Ok(())
            }
        }));
    }

    /// Tells systemd that the daemon is alive, twice in each of its intervals, if it asks for that: that this task gets its
    /// turn shows that the others do.
    fn watchdog(&self) {
        let Some(interval) = sd_notify::watchdog_enabled() else { return };
        self.tasks.start(Task::periodic("systemd/watchdog", interval / 2, || async {
            sd_notify::notify(&[sd_notify::NotifyState::Watchdog]).map_err(Into::into)
        }));
    }
}

/// Keys that a running daemon takes over.
const RELOADED: &[&str] = &["telemetry.filter", "server.rate", "server.operation_rates"];

/// Reads the configuration again and takes over what can be. The certificates' files are looked at by themselves.
fn reload(loaded: &Loaded, rate: &Rate) {
    let new = match loaded.again() {
        Ok(new) => new,
        Err(e) => return tracing::error!(error = %e, "the configuration was not reloaded: {e}"),
    };
    if let Err(e) = telemetry::refilter(&new.config.telemetry.filter) {
        return tracing::error!(error = %e, "the configuration was not reloaded: {e}");
    }
    if let Err(e) = rate.set(&new.config.server) {
        return tracing::error!(error = %e, "the configuration was not reloaded: {e}");
    }
    let (taken, waiting): (Vec<&str>, Vec<&str>) =
        loaded.changed(&new).into_iter().partition(|key| RELOADED.contains(key));
    tracing::info!("the configuration was reloaded; other than at the start: {}", listed(&taken));
    if !waiting.is_empty() {
        tracing::warn!("these wait for a restart: {}", listed(&waiting));
    }
}

fn listed(keys: &[&str]) -> String {
    if keys.is_empty() { "nothing".to_owned() } else { keys.join(", ") }
}

/// SIGTERM and SIGINT end the daemon, SIGHUP reloads its configuration.
struct Signals {
    term: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> Result<Self, String> {
        let on = |kind| signal(kind).map_err(|e| format!("signals cannot be listened for: {e}"));
        Ok(Self {
            term: on(SignalKind::terminate())?,
            interrupt: on(SignalKind::interrupt())?,
            hangup: on(SignalKind::hangup())?,
        })
    }

    async fn end(&mut self, reload: impl Fn()) {
        loop {
            tokio::select! {
                _ = self.term.recv() => return,
                _ = self.interrupt.recv() => return,
                _ = self.hangup.recv() => reload(),
            }
        }
    }
}

/// The gate of every request: who the bearer is (`token`), and what they may (`governance`).
struct Gate {
    token: Token,
    rules: Arc<Rules>,
    governance: Governance,
    ledger: Ledger,
    /// Handed to each caller, who asks again when something changed.
    own: Weak<Gate>,
}

impl Authenticator for Gate {
    fn authenticate<'a>(
        &'a self,
        authorization: Option<&'a str>,
        info: Arc<RequestInfo>,
    ) -> BoxFuture<'a, Result<Caller, Refusal>> {
        Box::pin(async move {
            let who = self.token.authenticate(authorization)?;
            let authority = self.own.upgrade().ok_or_else(|| Refusal::unavailable("the daemon is stopping"))?;
            Ok(Caller::new(who, info, authority))
        })
    }

    fn allowance(&self, client_id: &str) -> (u32, u32) {
        let allowance = self.token.allowance(client_id);
        (allowance.rate, allowance.requests)
    }
}

impl Authority for Gate {
    fn decide<'a>(&'a self, caller: &'a Caller, asks: &'a [Ask]) -> BoxFuture<'a, Result<Permit, Refusal>> {
        Box::pin(async move {
            // Before the projections are looked at: what changes after it makes the permit stale.
            let at = self.ledger.index();
            let credential = caller.credential().filter(|c| self.token.holds(c));
            let credential = credential.ok_or_else(|| {
                Refusal::new(&problem::UNAUTHENTICATED, "the bearer token is not valid any more")
                    .with_header("www-authenticate", "Bearer realm=\"sop\", error=\"invalid_token\"")
            })?;
            let mut permit = self.rules.decide(caller, asks, at)?;
            if !permit.allowed {
                // Rare, and large: every request would have room for it.
                permit = Box::pin(self.governance.four_eyes(caller, asks, permit, at)).await?;
            }
            permit.depends.extend(credential.depends.iter().copied());
            Ok(permit)
        })
    }
}
