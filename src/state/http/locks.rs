//! The routes of locks and elections. An election is a lock whose holder says something.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State as Room;
use axum::response::sse::{Event as Sse, Sse as SseResponse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::kernel::web::{Answer, Ask, Caller, Json, Name, Path, Preconditions, Query, problem_document};
use crate::kernel::{Refusal, ids};

use crate::state::State;
use crate::state::election::{Heard, Observed};
use crate::state::locks::{Held, Hold, Released, Terms, Waiter, said};
use crate::state::waiting::Wish;

use super::leases::ttl_ms;
use super::untagged;

/// Longest wait for a lock, seconds.
const WAIT: std::ops::RangeInclusive<f64> = 0.0..=60.0;
/// What a leader says at most, bytes.
const SAID: usize = 16 * 1024;

pub(super) fn routes() -> OpenApiRouter<State> {
    OpenApiRouter::new()
        .routes(routes!(acquire, read, release))
        .routes(routes!(campaign))
        .routes(routes!(resign))
        .routes(routes!(observe, observe_by_post))
        .routes(routes!(election))
}

/// How a lock is held
#[derive(Clone, Copy, Default, PartialEq, Eq, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = LockMode)]
enum Mode {
    /// Alone, or with as many others as `limit` says
    #[default]
    Write,
    /// With all others who read
    Read,
}

/// How a lock is wanted
#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = LockRequest)]
struct LockRequest {
    /// Seconds its lease lives without a renewal, 1-86,400; not wanted with `lease`
    #[serde(default)]
    ttl: Option<f64>,
    /// Seconds to wait for it, 0-60
    #[serde(default)]
    wait: f64,
    /// Hold it by this lease of yours; without it, it gets one of its own, which ends with it
    #[serde(default)]
    lease: Option<Uuid>,
    #[serde(default)]
    mode: Mode,
    /// How many may hold it at once, 1-1,000; the same for all who hold it or wait
    #[serde(default)]
    limit: Option<i64>,
}

/// How a candidate stands
#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Candidacy)]
struct Candidacy {
    /// What it says when it leads: any JSON, at most 16 KiB
    #[schema(value_type = Value)]
    value: Value,
    /// Seconds its lease lives without a renewal, 1-86,400; not wanted with `lease`
    #[serde(default)]
    ttl: Option<f64>,
    /// Seconds to wait for the office, 0-60
    #[serde(default)]
    wait: f64,
    /// Stand by this lease of yours; a leader says something else by standing again
    #[serde(default)]
    lease: Option<Uuid>,
}

fn wish(name: String, ttl: Option<f64>, wait: f64, lease: Option<Uuid>, terms: Terms) -> Result<Wish, Refusal> {
    if !WAIT.contains(&wait) {
        return Err(Refusal::malformed("/wait", "wait is from 0 to 60 seconds"));
    }
    let ttl_ms = match (ttl, lease) {
        (Some(ttl), None) => ttl_ms(ttl)?,
        (None, Some(_)) => 0,
        (None, None) => return Err(Refusal::malformed("/ttl", "ttl is wanted, or a lease")),
        (Some(_), Some(_)) => return Err(Refusal::malformed("/ttl", "a lease has its ttl: send one of them")),
    };
    Ok(Wish { name, ttl_ms, lease, terms, value: None, wait: Duration::from_secs_f64(wait) })
}

/// Acquire a lock; answers its fencing token
#[utoipa::path(post, path = "/v1/state/locks/{*name}", tag = "state", request_body = LockRequest,
    params(("name" = String, Path, description = "The lock, a name")),
    responses((status = 200, body = Held), (status = 409, description = "Another holds it: `holder`, `fencing_token`, `holders`, `waiting`")))]
async fn acquire(
    Room(state): Room<State>,
    caller: Caller,
    Name(name): Name,
    Json(request): Json<LockRequest>,
) -> Result<Answer<Held>, Refusal> {
    let slots = request.limit.unwrap_or(1);
    if !(1..=1000).contains(&slots) {
        return Err(Refusal::malformed("/limit", "limit is from 1 to 1000"));
    }
    let read = request.mode == Mode::Read;
    if read && request.limit.is_some() {
        return Err(Refusal::malformed("/limit", "those who read are not counted: no limit with mode read"));
    }
    let wish = wish(name, request.ttl, request.wait, request.lease, Terms { read, slots })?;
    let (index, held) = state.acquire(&caller, wish).await?;
    Ok(Answer::ok(held).at(index))
}

/// Who holds a lock, or waits for it
#[derive(Serialize, utoipa::ToSchema)]
struct Party {
    /// The client
    holder: String,
    /// Of who holds it
    #[serde(skip_serializing_if = "Option::is_none")]
    fencing_token: Option<i64>,
    /// Of who waits: the index at which it asked
    #[serde(skip_serializing_if = "Option::is_none")]
    since_index: Option<i64>,
    mode: &'static str,
    /// What a leader says, or would
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Value)]
    value: Option<Value>,
}

impl Party {
    fn holding(h: &Hold) -> Self {
        let (fencing_token, value) = (Some(h.token), said(h.value.as_ref()));
        Self { holder: h.owner.clone(), fencing_token, since_index: None, mode: h.terms.mode(), value }
    }

    fn waiting(w: &Waiter) -> Self {
        let (since_index, value) = (Some(w.place), said(w.value.as_ref()));
        Self { holder: w.owner.clone(), fencing_token: None, since_index, mode: w.terms.mode(), value }
    }
}

/// How a lock, or an election, stands
#[derive(Serialize, utoipa::ToSchema)]
#[schema(as = LockStanding)]
struct Standing {
    name: String,
    /// The newest holder; null if nobody holds it
    holder: Option<String>,
    fencing_token: Option<i64>,
    /// What the leader says
    #[schema(value_type = Value)]
    value: Option<Value>,
    /// How many may hold it at once, while somebody does
    limit: Option<i64>,
    holders: Vec<Party>,
    /// In the order in which they get it
    queue: Vec<Party>,
}

async fn standing(state: &State, caller: &Caller, name: String) -> Result<Answer<Standing>, Refusal> {
    state.ledger.permit(caller, &[Ask::new("state:lock-read", "Lock", name.clone())]).await?;
    let (holds, queue) = state.lock_stands(&name).await?;
    let newest = holds.last();
    Ok(Answer::ok(Standing {
        name,
        holder: newest.map(|h| h.owner.clone()),
        fencing_token: newest.map(|h| h.token),
        value: newest.and_then(|h| said(h.value.as_ref())),
        limit: newest.map(|h| h.terms.slots),
        holders: holds.iter().map(Party::holding).collect(),
        queue: queue.iter().map(Party::waiting).collect(),
    }))
}

/// Who holds a lock, and who waits for it
#[utoipa::path(get, path = "/v1/state/locks/{*name}", tag = "state", params(("name" = String, Path, description = "The lock, a name")),
    responses((status = 200, body = Standing)))]
async fn read(Room(state): Room<State>, caller: Caller, Name(name): Name) -> Result<Answer<Standing>, Refusal> {
    standing(&state, &caller, name).await
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct By {
    /// The lease it is held by, or waited with
    lease: Uuid,
}

/// Let go of a lock: it passes to who waits for it. A lease that was made for it ends
#[utoipa::path(delete, path = "/v1/state/locks/{*name}", tag = "state",
    params(("name" = String, Path, description = "The lock, a name"), By),
    responses((status = 200, body = Released), (status = 404, description = "That lease of yours does not hold it")))]
async fn release(
    Room(state): Room<State>,
    caller: Caller,
    Name(name): Name,
    Query(by): Query<By>,
    conditions: Preconditions,
) -> Result<Answer<Released>, Refusal> {
    untagged(&conditions)?;
    let done = state.release(&caller, name, by.lease).await?;
    Ok(Answer::ok(done.value).at(done.index))
}

fn named(name: String) -> Result<String, Refusal> {
    match ids::name_fault(&name) {
        None => Ok(name),
        Some(fault) => Err(Refusal::malformed("", fault)),
    }
}

/// Who leads, and who would
#[utoipa::path(get, path = "/v1/state/elections/{name}", tag = "state", params(("name" = String, Path, description = "The election, a name; `/` as `%2F`")),
    responses((status = 200, body = Standing)))]
async fn election(
    Room(state): Room<State>,
    caller: Caller,
    Path(name): Path<String>,
) -> Result<Answer<Standing>, Refusal> {
    standing(&state, &caller, named(name)?).await
}

/// Stand for an office; answers once it is won
#[utoipa::path(post, path = "/v1/state/elections/{name}/campaign", tag = "state", request_body = Candidacy,
    params(("name" = String, Path, description = "The election, a name; `/` as `%2F`")),
    responses((status = 200, body = Held), (status = 409, description = "Another leads: `holder`, `fencing_token`")))]
async fn campaign(
    Room(state): Room<State>,
    caller: Caller,
    Path(name): Path<String>,
    Json(request): Json<Candidacy>,
) -> Result<Answer<Held>, Refusal> {
    let terms = Terms { read: false, slots: 1 };
    let mut wish = wish(named(name)?, request.ttl, request.wait, request.lease, terms)?;
    let value = serde_json::to_vec(&request.value).map_err(Refusal::internal)?;
    if value.len() > SAID {
        return Err(Refusal::malformed("/value", format!("at most {SAID} bytes of JSON")));
    }
    wish.value = Some(value);
    let (index, held) = state.acquire(&caller, wish).await?;
    Ok(Answer::ok(held).at(index))
}

/// Whose candidacy, or office
#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Resignation)]
struct Resignation {
    lease: Uuid,
}

/// Give an office up, or a candidacy
#[utoipa::path(post, path = "/v1/state/elections/{name}/resign", tag = "state", request_body = Resignation,
    params(("name" = String, Path, description = "The election, a name; `/` as `%2F`")),
    responses((status = 200, body = Released), (status = 404, description = "That lease of yours does not lead")))]
async fn resign(
    Room(state): Room<State>,
    caller: Caller,
    Path(name): Path<String>,
    Json(request): Json<Resignation>,
) -> Result<Answer<Released>, Refusal> {
    let done = state.release(&caller, named(name)?, request.lease).await?;
    Ok(Answer::ok(done.value).at(done.index))
}

/// Hear who leads, now and whenever that changes, as server-sent events
#[utoipa::path(get, path = "/v1/state/elections/{name}/observe", tag = "state",
    params(("name" = String, Path, description = "The election, a name; `/` as `%2F`")),
    responses((status = 200, description = "`leader` and `bookmark` events", content_type = "text/event-stream", body = String)))]
async fn observe(Room(state): Room<State>, caller: Caller, Path(name): Path<String>) -> Result<Response, Refusal> {
    let observed = state.observe(&caller, named(name)?).await?;
    let events = stream::unfold(observed, |mut observed: Observed| async move {
        let event = match observed.next().await? {
            Heard::Leader(hold) => {
                let data = json!({
                    "holder": hold.as_ref().map(|h| &h.owner), "fencing_token": hold.as_ref().map(|h| h.token),
                    "value": hold.as_ref().and_then(|h| said(h.value.as_ref())),
                });
                Sse::default().event("leader").data(data.to_string())
            }
            Heard::Bookmark(index) => {
                Sse::default().event("bookmark").id(index.to_string()).data(json!({"index": index}).to_string())
            }
            Heard::End(refusal) => Sse::default().event("error").data(problem_document(&refusal, None).to_string()),
        };
        Some((Ok::<_, Infallible>(event), observed))
    });
    Ok(SseResponse::new(events).into_response())
}

/// The same, for who asks by POST
#[utoipa::path(post, path = "/v1/state/elections/{name}/observe", tag = "state",
    params(("name" = String, Path, description = "The election, a name; `/` as `%2F`")),
    responses((status = 200, description = "`leader` and `bookmark` events", content_type = "text/event-stream", body = String)))]
async fn observe_by_post(room: Room<State>, caller: Caller, name: Path<String>) -> Result<Response, Refusal> {
    observe(room, caller, name).await
}
