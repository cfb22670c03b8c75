//! The layers around every request, in the order they act.

use std::borrow::Cow;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt as _;
use tower_http::compression::CompressionLayer;
use tower_http::compression::predicate::{DefaultPredicate, Predicate, SizeAbove};

use crate::kernel::quota::{self, Limit, Quotas};
use crate::kernel::web::gateway::{self, Grpc, Live};
use crate::kernel::web::{
    Away, BodyLimit, Caller, Nothing, Reason, RequestInfo, SOP_INDEX, pairs, parse_query, problem_response,
};
use crate::kernel::{Clock, Refusal, ids, problem};
use crate::ledger::Ledger;
use crate::telemetry;

use super::describe::Plain;
use super::metrics::Metrics;
use super::rate::{Rate, Who};
use super::refused::{Layer, Refused};
use super::serve::Peer;
use super::whole::Whole;
use super::{Authenticator, Limits, Parts};

/// Answers smaller than this are not worth the work, bytes.
const COMPRESS_ABOVE: u64 = 1024;

const REQUEST_ID: &str = "x-request-id";
/// On a stale read: seconds since this daemon last knew what is newest.
const SOP_STALENESS: HeaderName = HeaderName::from_static("sop-staleness");

pub(super) struct Shared {
    ledger: Ledger,
    authenticator: Arc<dyn Authenticator>,
    clock: Clock,
    limits: Limits,
    rate: Arc<Rate>,
    quotas: Quotas,
    in_flight: AtomicUsize,
    metrics: Metrics,
    public_entries: bool,
    plain: Plain,
    pub(super) refused: Refused,
}

impl Shared {
    pub fn new(parts: &Parts, plain: Plain) -> Result<Self, Refusal> {
        Ok(Self {
            ledger: parts.ledger.clone(),
            authenticator: parts.authenticator.clone(),
            clock: parts.clock.clone(),
            limits: parts.limits,
            rate: parts.rate.clone(),
            quotas: Quotas::new(parts.clock.clone()),
            in_flight: AtomicUsize::new(0),
            metrics: Metrics::new(&parts.registry).map_err(Refusal::internal)?,
            public_entries: parts.public_entries,
            plain,
            refused: parts.refused.clone(),
        })
    }
}

pub(super) fn around(router: Router, shared: Arc<Shared>) -> Router {
    router
        .fallback(|| async {
            Refusal::new(&problem::NOT_FOUND, "there is nothing under this path; /openapi.json lists what there is")
        })
        .method_not_allowed_fallback(|method: Method| async move {
            Refusal::new(&problem::METHOD_NOT_ALLOWED, format!("this path does not take {method}; see Allow"))
        })
        // Both as one, the outer one first: each layer of a router is a box and a clone of every request's way.
        .layer((compression(), middleware::from_fn_with_state(shared, edge)))
}

fn compression() -> CompressionLayer<impl Predicate> {
    CompressionLayer::new().compress_when(
        // What comes in pieces would wait for each other in a compressor.
        DefaultPredicate::new()
            .and(SizeAbove::new(COMPRESS_ABOVE))
            .and(|_: StatusCode, _: Version, _: &HeaderMap, said: &Extensions| said.get::<Live>().is_none()),
    )
}

/// Counts a request while it is answered.
struct InFlight<'a>(&'a Shared);

impl<'a> InFlight<'a> {
    fn enter(shared: &'a Shared) -> Result<Self, Refusal> {
        let before = shared.in_flight.fetch_add(1, Ordering::Relaxed);
        shared.metrics.in_flight.inc();
        let entered = Self(shared);
        if before >= shared.limits.concurrency {
            shared.metrics.limited.with_label_values(&["concurrency"]).inc();
            return Err(Refusal::new(&problem::OVERLOADED, "too many requests are being answered"));
        }
        Ok(entered)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.0.metrics.in_flight.dec();
    }
}

/// The outermost layer: names the request, lets it through, and sees to what every answer has.
async fn edge(State(shared): State<Arc<Shared>>, mut request: Request, next: Next) -> Response {
    let began = shared.clock.elapsed();
    let bare = !request.headers().contains_key(header::AUTHORIZATION);
    let method = request.method().clone();
    let info = Arc::new(RequestInfo {
        id: request_id(request.headers(), &shared.clock),
        trace_id: trace_id(request.headers()),
        method: verb(&method),
        path: request.uri().path().to_owned(),
        route: request.extensions().get::<MatchedPath>().cloned(),
        peer: request.extensions().get::<Peer>().and_then(|p| p.0),
        idempotency: None,
        proposing: None,
        fencing: None,
    });
    request.extensions_mut().insert(BodyLimit(shared.limits.body));
    let inner = telemetry::during(info.clone(), inside(&shared, request, next, info.clone()));
    let mut response = match AssertUnwindSafe(inner).catch_unwind().await {
        Ok(Ok(response)) => response,
        Ok(Err(refusal)) => refusal.into_response(),
        Err(panic) => {
            shared.metrics.panics.inc();
            let said = panic
                .downcast_ref::<&str>()
                .map(ToString::to_string)
                .or_else(|| panic.downcast_ref::<String>().cloned());
            Refusal::internal(format!("a handler panicked: {}", said.unwrap_or_default())).into_response()
        }
    };
    let oauth = response.extensions().get::<Reason>().map(|r| r.0);
    let mut reason = oauth.unwrap_or("any");
    if let Some(refusal) = response.extensions_mut().remove::<Refusal>() {
        reason = refusal.problem().slug;
        let allow = response.headers().get(header::ALLOW).cloned();
        response = refused(refusal, &info.path, bare);
        if let Some(allow) = allow {
            response.headers_mut().insert(header::ALLOW, allow);
        }
    }
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::try_from(&info.id) {
        headers.insert(REQUEST_ID, id);
    }
    if !headers.contains_key(&SOP_INDEX) {
        headers.insert(SOP_INDEX, shared.ledger.index().into());
    }
    let took = shared.clock.elapsed().saturating_sub(began);
    let status = response.status();
    if let Some(layer) = Layer::of(status, reason) {
        shared.refused.note(info.peer, layer, reason);
    }
    shared.metrics.timer(info.route()).observe(took.as_secs_f64());
    shared.metrics.requests.with_label_values(&[method.as_str(), info.route(), status.as_str()]).inc();
    let ms = took.as_secs_f64() * 1e3;
    telemetry::of(info.clone(), || tracing::debug!(status = status.as_u16(), ms, "{method} {}", info.path));
    response
}

/// A refusal in the words of who is spoken to; `bare`: the request brought no token.
fn refused(refusal: Refusal, path: &str, bare: bool) -> Response {
    if refusal.problem() == &problem::PROPOSED {
        return proposed(&refusal);
    }
    if !gateway::speaks(path) {
        return problem_response(&refusal, Some(path));
    }
    let nobody = bare && refusal.problem() == &problem::UNAUTHENTICATED;
    if nobody { Grpc::nobody(refusal) } else { Grpc::from(refusal) }.into_response()
}

/// A change that was proposed instead of made: 202 with the proposal.
fn proposed(refusal: &Refusal) -> Response {
    let mut response = problem_response(refusal, None);
    let proposal = refusal.extra().get("proposal").map(ToString::to_string).unwrap_or_default();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response.headers_mut().remove(header::CONTENT_LENGTH);
    *response.body_mut() = proposal.into();
    response
}

/// The layers that can refuse: how much at once, how often, what is newest, who it is.
async fn inside(
    shared: &Shared,
    mut request: Request,
    next: Next,
    info: Arc<RequestInfo>,
) -> Result<Response, Refusal> {
    let _in_flight = InFlight::enter(shared)?;
    let method = request.method().clone();
    let asked = Asked { method: &method, route: info.route() };
    if request.uri().path_and_query().map_or(0, |p| p.as_str().len()) > 8192 {
        return Err(Refusal::new(&problem::URI_TOO_LONG, "the request target has more than 8 KiB"));
    }
    request.extensions_mut().insert(info.clone());
    let mut wants = wants_caller(request.method(), request.uri().path(), shared.public_entries);
    // From elsewhere, what the daemon counts is for those it knows.
    if request.uri().path() == "/metrics" && info.peer.is_some_and(|p| !p.to_canonical().is_loopback()) {
        wants = Wants::Somebody;
    }
    if wants == Wants::Nobody {
        let fields = shared.admit(Who::Address(info.peer), &asked)?;
        return Ok(fields.on(next.run(request).await));
    }
    let query = request.uri().query().map(str::to_owned);
    let stale = min_index(shared, query.as_deref(), patience(request.headers())?).await?;
    // A question to the policy is a read too, although it is a POST.
    let reads = matches!(*request.method(), Method::GET | Method::HEAD) || request.uri().path().starts_with("/access/");
    if reads && !stale {
        // What is newest is looked up before the caller is looked at: a token revoked before this request must be known.
        if let Some(away) = shared.newest(request.uri().path()).await? {
            request.extensions_mut().insert(Away(away));
        }
    }
    let whole = Whole::of(&request)?;
    let authorization = request.headers().get(header::AUTHORIZATION).cloned();
    let mut authorization = authorization.as_ref().and_then(|a| a.to_str().ok()).map(Cow::Borrowed);
    // Clients of etcd send the token and nothing else.
    if gateway::speaks(request.uri().path()) {
        authorization = authorization.map(|a| if a.contains(' ') { a } else { format!("Bearer {a}").into() });
    }
    let caller = match shared.identify(authorization.as_deref(), &info, reads).await {
        Ok(caller) => caller,
        // Whether something else vouches for them is for the handler to see.
        Err(_) if wants == Wants::Perhaps => {
            let fields = shared.admit(Who::Address(info.peer), &asked)?;
            return Ok(fields.on(next.run(request).await));
        }
        Err(refusal) => {
            shared.admit(Who::Address(info.peer), &asked)?;
            return Err(refusal);
        }
    };
    let fields = shared.admit(Who::Client(caller.identity().actor.clone()), &asked)?;
    if let Some((lock, token)) = whole.fenced() {
        // Rare, and large: every request would have room for it.
        Box::pin(shared.ledger.fenced(lock, *token)).await?;
    }
    if query.is_some() && shared.plain.get(info.route()).is_some_and(|methods| methods.contains(&method)) {
        parse_query::<Nothing>(request.uri())?;
    }
    let (mut request, caller) = whole.read(request, caller, &info, shared.limits.body).await?;
    request.extensions_mut().insert(caller);
    let mut response = fields.on(next.run(request).await);
    if stale && let Ok(seconds) = HeaderValue::try_from(format!("{:.3}", shared.ledger.staleness().as_secs_f64())) {
        response.headers_mut().insert(SOP_STALENESS, seconds);
    }
    Ok(response)
}

/// How long the store may take to say what is newest before a question to the policy counts it as away.
const AWAY: Duration = Duration::from_secs(2);

impl Shared {
    /// Brings this daemon to what is newest. Where the store is away, a question to the policy goes on all the same: whether it
    /// may be answered from what is known is for the policy to say.
    async fn newest(&self, path: &str) -> Result<Option<Refusal>, Refusal> {
        if !path.starts_with("/access/v1/evaluation") {
            return self.ledger.fence().await.map(|_| None);
        }
        let late = |_| Refusal::unavailable("the database does not answer; nothing was decided");
        match tokio::time::timeout(AWAY, self.ledger.fence()).await.map_err(late).and_then(|fenced| fenced) {
            Ok(_) => Ok(None),
            Err(refusal) if refusal.problem() == &problem::UNAVAILABLE => Ok(Some(refusal)),
            Err(refusal) => Err(refusal),
        }
    }

    /// Counts a request against the limits of whoever sends it.
    fn admit(&self, who: Who, asked: &Asked<'_>) -> Result<Fields, Refusal> {
        let (rate, hourly) = match &who {
            Who::Client(client) => self.authenticator.allowance(client),
            Who::Address(_) => (0, 0),
        };
        let refuse = |limit: Limit| {
            self.metrics.limited.with_label_values(&[if limit.name == "requests" { "hour" } else { "rate" }]).inc();
            let window = if limit.window == 1 { "a second" } else { "an hour" };
            quota::exceeded(format!("more than {} requests {window}", limit.quota), &[limit])
        };
        let client = if let Who::Client(client) = &who { Some(client.clone()) } else { None };
        let mut limits = self.rate.check(who, rate, || format!("{} {}", asked.method, asked.route)).map_err(refuse)?;
        if let Some(client) = client {
            limits.extend(self.quotas.spend(&client, "requests", hourly, 1).map_err(refuse)?);
        }
        Ok(Fields::of(&limits))
    }

    /// Authenticates; a refusal leaves only after this daemon has seen what is newest (a client may just have been registered).
    async fn identify(
        &self,
        authorization: Option<&str>,
        info: &Arc<RequestInfo>,
        fenced: bool,
    ) -> Result<Caller, Refusal> {
        match self.authenticator.authenticate(authorization, info.clone()).await {
            Err(_) if !fenced && authorization.is_some() => {
                self.ledger.fence().await?;
                self.authenticator.authenticate(authorization, info.clone()).await
            }
            done => done,
        }
    }
}

/// The operation that is asked for.
struct Asked<'a> {
    method: &'a Method,
    route: &'a str,
}

/// The header fields about limits that an answer has.
struct Fields([Option<(HeaderName, HeaderValue)>; 2]);

impl Fields {
    fn of(limits: &[Limit]) -> Self {
        // Copied out of the `String`, which is longer than what it holds: taken over it would be shared, for one allocation more.
        let field = |(name, value): (&'static str, String)| {
            Some((HeaderName::from_static(name), HeaderValue::from_str(&value).ok()?))
        };
        Self(quota::fields(limits).map(field))
    }

    fn on(self, mut response: Response) -> Response {
        for (name, value) in self.0.into_iter().flatten() {
            response.headers_mut().entry(name).or_insert(value);
        }
        response
    }
}

/// Whom a path is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wants {
    /// Whoever; the handler sees to it.
    Nobody,
    /// A known caller, if there is one.
    Perhaps,
    /// A known caller.
    Somebody,
}

fn wants_caller(method: &Method, path: &str, public_entries: bool) -> Wants {
    if let Some(client) = path.strip_prefix("/oauth2/register") {
        // A registration is managed with its own token, too.
        return if method == Method::POST && client.len() < 2 { Wants::Somebody } else { Wants::Perhaps };
    }
    let entries = path.starts_with("/log/tile/entries") && !public_entries;
    // By these a client of etcd finds the daemon, and gets its token.
    let etcd = gateway::speaks(path) && !matches!(path, "/v3/auth/authenticate" | "/v3/cluster/member/list");
    if path.starts_with("/v1/") || path.starts_with("/access/") || entries || etcd {
        Wants::Somebody
    } else {
        Wants::Nobody
    }
}

/// Waits for `min_index`; answers whether the read is content with what this daemon knows.
async fn min_index(shared: &Shared, query: Option<&str>, patience: Duration) -> Result<bool, Refusal> {
    let Some(query) = query else { return Ok(false) };
    if !query.contains("min_index") && !query.contains("consistency") {
        return Ok(false);
    }
    let mut stale = false;
    for (name, value) in pairs(query)? {
        match name.as_str() {
            "min_index" => {
                let index =
                    value.parse().map_err(|_| Refusal::malformed("?min_index", "min_index is a whole number"))?;
                shared.ledger.reach(index, patience).await?;
            }
            "consistency" if value == "stale" => stale = true,
            "consistency" if value != "linearizable" => {
                return Err(Refusal::malformed("?consistency", "consistency is linearizable (the default) or stale"));
            }
            _ => {}
        }
    }
    Ok(stale)
}

/// `Sop-Timeout`, seconds; 5 without it.
fn patience(headers: &HeaderMap) -> Result<Duration, Refusal> {
    let Some(value) = headers.get("sop-timeout") else { return Ok(Duration::from_secs(5)) };
    let seconds = value.to_str().ok().and_then(|v| v.parse::<f64>().ok()).filter(|s| (0.0..=60.0).contains(s));
    seconds
        .map(Duration::from_secs_f64)
        .ok_or_else(|| Refusal::malformed("", "Sop-Timeout is a number of seconds from 0 to 60"))
}

/// The method's name; those that are known take no room.
fn verb(method: &Method) -> Cow<'static, str> {
    let known = ["GET", "PUT", "POST", "DELETE", "HEAD", "PATCH"];
    match known.into_iter().find(|verb| *verb == method.as_str()) {
        Some(verb) => verb.into(),
        None => method.as_str().to_owned().into(),
    }
}

fn request_id(headers: &HeaderMap, clock: &Clock) -> String {
    let given = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok());
    let fits = |id: &&str| (1..=128).contains(&id.len()) && id.bytes().all(|b| (0x20..0x7f).contains(&b));
    given.filter(fits).map_or_else(|| ids::new_id(clock.now()).to_string(), str::to_owned)
}

/// The trace id of a W3C `traceparent`.
fn trace_id(headers: &HeaderMap) -> Option<String> {
    let parent = headers.get("traceparent")?.to_str().ok()?;
    let id = parent.split('-').nth(1)?;
    let fits = id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()) && id.bytes().any(|b| b != b'0');
    fits.then(|| id.to_ascii_lowercase())
}
