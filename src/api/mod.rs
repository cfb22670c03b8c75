//! The daemon's front: the router, the layers every request passes, the daemon's own pages, and the accept loops.
//!
//! **Invariants.** Every answer has `X-Request-ID` and `Sop-Index`; every refusal under `/v1` is a problem document, whichever
//! layer made it. A request passes: limits, head check (reads), authentication, then its handler, which decides.
//!
//! **Not here.** What a route means: each room's `http.rs`. Who a bearer is and what they may: handed in by `boot`.
//!
//! **Why this way.** Everything is handed in ([`Parts`]), so the same front serves tests of one layer and the whole daemon.

mod daemon;
mod describe;
mod edge;
mod linger;
mod metrics;
mod quiet;
mod rate;
mod refused;
mod serve;
mod tls;
mod tx;
mod whole;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use utoipa::OpenApi as _;
use utoipa_axum::router::OpenApiRouter;

use crate::config::Server;
use crate::kernel::supervisor::Supervisor;
use crate::kernel::web::{Caller, RequestInfo};
use crate::kernel::{BoxFuture, Clock, Refusal};
use crate::ledger::Ledger;

pub use daemon::{Check, Readiness};
pub use rate::Rate;
pub use refused::Refused;
pub use serve::{Bound, Connection, Listener};
pub use tls::Certificates;

/// Says who a caller is.
pub trait Authenticator: Send + Sync {
    /// Authenticates a request by its `Authorization` header.
    fn authenticate<'a>(
        &'a self,
        authorization: Option<&'a str>,
        info: Arc<RequestInfo>,
    ) -> BoxFuture<'a, Result<Caller, Refusal>>;

    /// How many requests a client may send, in a second and in an hour; 0: as many as anyone, and as many as it likes.
    fn allowance(&self, client_id: &str) -> (u32, u32);
}

/// What the front is made from.
pub struct Parts {
    /// For the head check, `min_index` and `Sop-Index`.
    pub ledger: Ledger,
    /// Who callers are.
    pub authenticator: Arc<dyn Authenticator>,
    /// What must be so for the daemon to be ready.
    pub readiness: Readiness,
    /// Tasks, for `/readyz`.
    pub tasks: Supervisor,
    /// Metrics.
    pub registry: prometheus::Registry,
    /// Ids and durations.
    pub clock: Clock,
    /// Limits.
    pub limits: Limits,
    /// How often somebody may ask.
    pub rate: Arc<Rate>,
    /// What is refused.
    pub refused: Refused,
    /// Whether `/log/tile/entries` needs no token.
    pub public_entries: bool,
}

/// Limits of the front.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Largest body.
    pub body: usize,
    /// Requests in flight.
    pub concurrency: usize,
    /// A request must arrive whole within this.
    pub arrival: Duration,
    /// How often requests that were not authenticated become entries.
    pub refusals: Duration,
}

impl Limits {
    /// From the configuration.
    #[must_use]
    pub fn from(server: &Server) -> Self {
        Self {
            body: server.body_limit,
            concurrency: server.concurrency,
            arrival: server.request_timeout.get(),
            refusals: server.refusals_interval.get(),
        }
    }
}

#[derive(utoipa::OpenApi)]
#[openapi(info(
    title = "sop",
    description = "The System Operations Protocol of LOGOS: governance, audit, token, state, nexus and health in one daemon.",
    license(name = "Apache-2.0", identifier = "Apache-2.0")
))]
struct Document;

/// The pages of the daemon that show no one's data, for a listener of their own.
pub fn plain_pages(readiness: Readiness, tasks: Supervisor, registry: prometheus::Registry) -> Router {
    daemon::routes(readiness, tasks, registry).split_for_parts().0
}

/// Puts the rooms' routes, the daemon's own and the layers together. The routes feed the OpenAPI document by the same lines.
///
/// # Errors
/// When a metric is registered twice.
pub fn router(parts: Parts, rooms: OpenApiRouter) -> Result<Router, Refusal> {
    let own = daemon::routes(parts.readiness.clone(), parts.tasks.clone(), parts.registry.clone());
    let all = OpenApiRouter::with_openapi(Document::openapi()).merge(rooms).merge(own);
    let (router, mut document) = all.merge(tx::routes(parts.ledger.clone())).split_for_parts();
    let shared = Arc::new(edge::Shared::new(&parts, describe::plain(&document))?);
    parts.rate.start(&parts.tasks);
    shared.refused.start(&parts.ledger, parts.limits.refusals, &parts.tasks);
    tx::describe(&mut document, parts.ledger.verbs());
    describe::complete(&mut document);
    let router = router.merge(daemon::document(&document));
    Ok(edge::around(router, shared))
}
