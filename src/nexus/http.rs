//! The room's routes.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State as Room;
use axum::http::HeaderMap;
use axum::response::sse::{Event as Sse, Sse as SseResponse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::kernel::cloudevents::{self, Brought};
use crate::kernel::web::{
    Answer, Body, Caller, Json, Listing, Path, Query, faulty, last_event_id, page_limit, problem_document,
};
use crate::kernel::{Fault, Refusal, ids};

use super::Nexus;

use super::model::{
    Beaten, DELAY_MOST, Fitness, Group, GroupBody, Instance, Message, Published, Registration, Service, Topic,
    TopicBody,
};
use super::topics::Word;
use super::watch::{Event, Watch};

/// The routes of the room.
pub fn routes(nexus: Nexus) -> OpenApiRouter {
    OpenApiRouter::new()
        .routes(routes!(list_services))
        .routes(routes!(read_service))
        .routes(routes!(watch))
        .routes(routes!(register, deregister))
        .routes(routes!(heartbeat))
        .routes(routes!(list_topics))
        .routes(routes!(put_topic, read_topic, drop_topic))
        .routes(routes!(publish))
        .routes(routes!(list_groups))
        .routes(routes!(put_group, read_group, drop_group))
        .routes(routes!(pull))
        .routes(routes!(ack))
        .routes(routes!(nack))
        .routes(routes!(extend))
        .with_state(nexus)
}

/// Names out of a path; each must be one.
fn names<const N: usize>(all: [String; N]) -> Result<[String; N], Refusal> {
    match all.iter().find_map(|name| ids::name_fault(name)) {
        Some(fault) => Err(Refusal::malformed("", fault)),
        None => Ok(all),
    }
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// 1-1000, default 100
    #[serde(default)]
    limit: Option<i64>,
    /// `next` of the page before
    #[serde(default)]
    after: Option<String>,
}

/// List services
#[utoipa::path(get, path = "/v1/nexus/services", tag = "nexus", params(ListQuery), responses((status = 200, body = Listing<Service>)))]
async fn list_services(
    Room(nexus): Room<Nexus>,
    caller: Caller,
    Query(q): Query<ListQuery>,
) -> Result<Answer<Listing<Service>>, Refusal> {
    let (items, next) = nexus.list_services(&caller, q.after.as_deref(), page_limit(q.limit)?).await?;
    Ok(Answer::ok(Listing { items, next }))
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ServiceQuery {
    /// Only instances that are fit to be called
    #[serde(default)]
    healthy: bool,
}

#[derive(serde::Serialize, utoipa::ToSchema)]
struct ServiceShown {
    /// Its name
    service: String,
    /// In order of their ids
    instances: Vec<Instance>,
}

/// Read a service: its instances
#[utoipa::path(get, path = "/v1/nexus/services/{name}", tag = "nexus", params(("name" = String, Path, description = "The service"), ServiceQuery),
    responses((status = 200, body = ServiceShown), (status = 404, description = "No instance is registered")))]
async fn read_service(
    Room(nexus): Room<Nexus>,
    caller: Caller,
    Path(name): Path<String>,
    Query(q): Query<ServiceQuery>,
) -> Result<Answer<ServiceShown>, Refusal> {
    let [service] = names([name])?;
    let mut instances = nexus.service(&caller, &service).await?;
    instances.retain(|i| !q.healthy || i.status == Fitness::Passing);
    Ok(Answer::ok(ServiceShown { service, instances }))
}

/// Register an instance, or register it anew
#[utoipa::path(put, path = "/v1/nexus/services/{name}/instances/{id}", tag = "nexus", request_body = Registration,
    params(("name" = String, Path, description = "The service"), ("id" = String, Path, description = "The instance")),
    responses((status = 200, body = Instance), (status = 201, body = Instance, description = "It is new")))]
async fn register(
    Room(nexus): Room<Nexus>,
    caller: Caller,
    Path((name, id)): Path<(String, String)>,
    Json(body): Json<Registration>,
) -> Result<Answer<Instance>, Refusal> {
    let [name, id] = names([name, id])?;
    let done = nexus.register(&caller, name, id, body).await?;
    let instance = done.value.instance;
    Ok(if done.value.new { Answer::created(instance) } else { Answer::ok(instance) }.at(done.index))
}

/// Deregister an instance
#[utoipa::path(delete, path = "/v1/nexus/services/{name}/instances/{id}", tag = "nexus",
    params(("name" = String, Path, description = "The service"), ("id" = String, Path, description = "The instance")),
    responses((status = 200, body = Instance), (status = 404)))]
async fn deregister(
    Room(nexus): Room<Nexus>,
    caller: Caller,
    Path((name, id)): Path<(String, String)>,
) -> Result<Answer<Instance>, Refusal> {
    let [name, id] = names([name, id])?;
    let done = nexus.deregister(&caller, name, id).await?;
    Ok(Answer::ok(done.value).at(done.index))
}

/// Give a sign of life
#[utoipa::path(post, path = "/v1/nexus/services/{name}/instances/{id}/heartbeat", tag = "nexus",
    params(("name" = String, Path, description = "The service"), ("id" = String, Path, description = "The instance")),
    responses((status = 200, body = Beaten), (status = 404, description = "It has expired: register it anew")))]
async fn heartbeat(
    Room(nexus): Room<Nexus>,
    caller: Caller,
    Path((name, id)): Path<(String, String)>,
) -> Result<Answer<Beaten>, Refusal> {
    let [name, id] = names([name, id])?;
    let (index, beaten) = nexus.heartbeat(&caller, name, id).await?;
    Ok(Answer::ok(beaten).at(index))
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct WatchQuery {
    /// Changes after this index; without it, from now on
    #[serde(default)]
    after: Option<i64>,
}

/// Watch a service as server-sent events; `Last-Event-ID` counts as `after`
#[utoipa::path(get, path = "/v1/nexus/services/{name}/watch", tag = "nexus", params(("name" = String, Path, description = "The service"), WatchQuery),
    responses((status = 200, description = "`register`, `deregister`, `expire`, `status` and `bookmark` events", content_type = "text/event-stream", body = String)))]
async fn watch(
    Room(nexus): Room<Nexus>,
    caller: Caller,
    Path(name): Path<String>,
    Query(q): Query<WatchQuery>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let [name] = names([name])?;
    let last = last_event_id(&headers)?;
    let watch = nexus.watch(&caller, name, last.or(q.after), Duration::from_secs(5)).await?;
    let events = stream::unfold(watch, |mut watch: Watch| async move {
        let event = match watch.next().await? {
            Event::Change(index, event, instance) => Sse::default().event(event).id(index.to_string()).data(instance),
            Event::Bookmark(index) => {
                Sse::default().event("bookmark").id(index.to_string()).data(json!({"index": index}).to_string())
            }
            Event::End(refusal) => Sse::default().event("error").data(problem_document(&refusal, None).to_string()),
        };
        Some((Ok::<_, Infallible>(event), watch))
    });
    Ok(SseResponse::new(events).into_response())
}

/// List topics
#[utoipa::path(get, path = "/v1/nexus/topics", tag = "nexus", params(ListQuery), responses((status = 200, body = Listing<Topic>)))]
async fn list_topics(
    Room(nexus): Room<Nexus>,
    caller: Caller,
    Query(q): Query<ListQuery>,
) -> Result<Answer<Listing<Topic>>, Refusal> {
    let (items, next) = nexus.list_topics(&caller, q.after.as_deref(), page_limit(q.limit)?).await?;
    Ok(Answer::ok(Listing { items, next }))
}

/// Make a topic, or change it
#[utoipa::path(put, path = "/v1/nexus/topics/{name}", tag = "nexus", request_body = TopicBody, params(("name" = String, Path, description = "The topic")),
    responses((status = 200, body = Topic), (status = 201, body = Topic, description = "It is new")))]
async fn put_topic(
    Room(nexus): Room<Nexus>,
    caller: Caller,
    Path(name): Path<String>,
    Json(body): Json<TopicBody>,
) -> Result<Answer<Topic>, Refusal> {
    let [name] = names([name])?;
    if !(1.0..=31_536_000.0).contains(&body.retention) {
        return Err(Refusal::malformed("/retention", "retention is from 1 to 31536000 seconds"));
    }
    let done = nexus.put_topic(&caller, name, body.retention).await?;
    let topic = done.value.value;
    Ok(if done.value.new { Answer::created(topic) } else { Answer::ok(topic) }.at(done.index))
}

/// Read a topic
#[utoipa::path(get, path = "/v1/nexus/topics/{name}", tag = "nexus", params(("name" = String, Path, description = "The topic")), responses((status = 200, body = Topic), (status = 404)))]
async fn read_topic(
    Room(nexus): Room<Nexus>,
    caller: Caller,
    Path(name): Path<String>,
) -> Result<Answer<Topic>, Refusal> {
    let [name] = names([name])?;
    Ok(Answer::ok(nexus.topic(&caller, &name).await?))
}

/// End a topic, with its messages and groups
#[utoipa::path(delete, path = "/v1/nexus/topics/{name}", tag = "nexus", params(("name" = String, Path, description = "The topic")), responses((status = 200, body = Topic), (status = 404)))]
async fn drop_topic(
    Room(nexus): Room<Nexus>,
    caller: Caller,
    Path(name): Path<String>,
) -> Result<Answer<Topic>, Refusal> {
    let [name] = names([name])?;
    let done = nexus.drop_topic(&caller, name).await?;
    Ok(Answer::ok(done.value).at(done.index))
}

/// Publish CloudEvents: structured, binary, or a batch. One published before, by source and id, is answered with its first
#[utoipa::path(post, path = "/v1/nexus/topics/{name}/messages", tag = "nexus", params(("name" = String, Path, description = "The topic"),
        ("Nexus-Delay" = Option<f64>, Header, description = "Seconds before it is delivered")),
    request_body(content = Object, content_type = "application/cloudevents+json"),
    responses((status = 200, body = Published, description = "Published before"), (status = 201, body = Published), (status = 404), (status = 415)))]
async fn publish(
    Room(nexus): Room<Nexus>,
    caller: Caller,
    Path(name): Path<String>,
    headers: HeaderMap,
    Body(body): Body,
) -> Result<Response, Refusal> {
    let [name] = names([name])?;
    let delay = delay(&headers)?;
    match cloudevents::read(&headers, &body)? {
        Brought::One(event) => {
            let done = nexus.publish(&caller, name, event, delay).await?;
            let new = !done.value.duplicate;
            let answer = if new { Answer::created(done.value) } else { Answer::ok(done.value) };
            Ok(answer.at(done.index).into_response())
        }
        Brought::Many(events) => {
            let events = events.into_iter().collect::<Result<_, _>>()?;
            let done = nexus.publish_all(&caller, name, events, delay).await?;
            Ok(Answer::created(json!({"items": done.value})).at(done.index).into_response())
        }
    }
}

/// `Nexus-Delay`, in milliseconds.
fn delay(headers: &HeaderMap) -> Result<i64, Refusal> {
    let Some(value) = headers.get("nexus-delay") else { return Ok(0) };
    let seconds = value.to_str().ok().and_then(|v| v.parse::<f64>().ok()).filter(|s| (0.0..=DELAY_MOST).contains(s));
    seconds
        .map(|s| (s * 1000.0) as i64)
        .ok_or_else(|| Refusal::malformed("", "Nexus-Delay is a number of seconds from 0 to 2592000"))
}

/// List a topic's groups
#[utoipa::path(get, path = "/v1/nexus/topics/{name}/groups", tag = "nexus", params(("name" = String, Path, description = "The topic"), ListQuery), responses((status = 200, body = Listing<Group>)))]
async fn list_groups(
    Room(nexus): Room<Nexus>,
    caller: Caller,
    Path(name): Path<String>,
    Query(q): Query<ListQuery>,
) -> Result<Answer<Listing<Group>>, Refusal> {
    let [name] = names([name])?;
    let (items, next) = nexus.groups(&caller, &name, None, q.after.as_deref(), page_limit(q.limit)?).await?;
    Ok(Answer::ok(Listing { items, next }))
}

/// Make a group of consumers, or change it; it begins with the oldest message that is kept
#[utoipa::path(put, path = "/v1/nexus/topics/{name}/groups/{group}", tag = "nexus", request_body = GroupBody,
    params(("name" = String, Path, description = "The topic"), ("group" = String, Path, description = "The group")),
    responses((status = 200, body = Group), (status = 201, body = Group, description = "It is new"), (status = 404)))]
async fn put_group(
    Room(nexus): Room<Nexus>,
    caller: Caller,
    Path((name, group)): Path<(String, String)>,
    Json(body): Json<GroupBody>,
) -> Result<Answer<Group>, Refusal> {
    let [topic, name] = names([name, group])?;
    let group = Group {
        max_attempts: body.max_attempts.unwrap_or(5),
        ack_wait: body.ack_wait.unwrap_or(30.0),
        backoff: body.backoff.unwrap_or(1.0),
        dead_letter: body.dead_letter,
        topic,
        name,
        outstanding: 0,
        dead: 0,
        index: 0,
        created_index: 0,
    };
    let mut faults = Vec::new();
    if !(1..=1000).contains(&group.max_attempts) {
        faults.push(Fault::new("/max_attempts", "max_attempts is from 1 to 1000"));
    }
    if !(0.1..=43_200.0).contains(&group.ack_wait) {
        faults.push(Fault::new("/ack_wait", "ack_wait is from 0.1 to 43200 seconds"));
    }
    if !(0.0..=3600.0).contains(&group.backoff) {
        faults.push(Fault::new("/backoff", "backoff is from 0 to 3600 seconds"));
    }
    if let Some(to) = &group.dead_letter {
        let own = (*to == group.topic).then_some("dead messages go to another topic");
        if let Some(fault) = ids::name_fault(to).or(own) {
            faults.push(Fault::new("/dead_letter", fault));
        }
    }
    faulty(faults).map_or(Ok(()), Err)?;
    let done = nexus.put_group(&caller, group).await?;
    let group = done.value.value;
    Ok(if done.value.new { Answer::created(group) } else { Answer::ok(group) }.at(done.index))
}

/// Read a group
#[utoipa::path(get, path = "/v1/nexus/topics/{name}/groups/{group}", tag = "nexus",
    params(("name" = String, Path, description = "The topic"), ("group" = String, Path, description = "The group")),
    responses((status = 200, body = Group), (status = 404)))]
async fn read_group(
    Room(nexus): Room<Nexus>,
    caller: Caller,
    Path((name, group)): Path<(String, String)>,
) -> Result<Answer<Group>, Refusal> {
    let [topic, name] = names([name, group])?;
    let (found, _) = nexus.groups(&caller, &topic, Some(&name), None, 1).await?;
    found.into_iter().next().map(Answer::ok).ok_or_else(|| super::topics::no_group(&topic, &name))
}

/// End a group
#[utoipa::path(delete, path = "/v1/nexus/topics/{name}/groups/{group}", tag = "nexus",
    params(("name" = String, Path, description = "The topic"), ("group" = String, Path, description = "The group")),
    responses((status = 200, body = Object), (status = 404)))]
async fn drop_group(
    Room(nexus): Room<Nexus>,
    caller: Caller,
    Path((name, group)): Path<(String, String)>,
) -> Result<Answer<Value>, Refusal> {
    let [topic, group] = names([name, group])?;
    let done = nexus.drop_group(&caller, topic.clone(), group.clone()).await?;
    Ok(Answer::ok(json!({"topic": topic, "name": group})).at(done.index))
}

#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct PullBody {
    /// Messages at most, 1-1000; 1 without it
    #[serde(default)]
    max: Option<i64>,
    /// Seconds to wait for the first, 0-60; 0 without it
    #[serde(default)]
    wait: Option<f64>,
}

#[derive(serde::Serialize, utoipa::ToSchema)]
struct Pulled {
    /// Oldest first
    messages: Vec<Message>,
}

/// Pull messages for a group; each must be acknowledged within `ack_wait`, or it is delivered again
#[utoipa::path(post, path = "/v1/nexus/topics/{name}/groups/{group}/pull", tag = "nexus", request_body = PullBody,
    params(("name" = String, Path, description = "The topic"), ("group" = String, Path, description = "The group")),
    responses((status = 200, body = Pulled), (status = 404)))]
async fn pull(
    Room(nexus): Room<Nexus>,
    caller: Caller,
    Path((name, group)): Path<(String, String)>,
    Json(body): Json<PullBody>,
) -> Result<Answer<Pulled>, Refusal> {
    let [topic, group] = names([name, group])?;
    let (max, wait) = (body.max.unwrap_or(1), body.wait.unwrap_or(0.0));
    if !(1..=1000).contains(&max) {
        return Err(Refusal::malformed("/max", "max is from 1 to 1000"));
    }
    if !(0.0..=60.0).contains(&wait) {
        return Err(Refusal::malformed("/wait", "wait is from 0 to 60 seconds"));
    }
    let (index, messages) = nexus.pull(&caller, &topic, &group, max, Duration::from_secs_f64(wait)).await?;
    Ok(Answer::ok(Pulled { messages }).at(index))
}

#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct IdsBody {
    /// The messages, 1-1000
    ids: Vec<Uuid>,
}

async fn said(
    nexus: &Nexus,
    caller: &Caller,
    path: (String, String),
    body: IdsBody,
    word: Word,
) -> Result<(i64, Vec<Uuid>), Refusal> {
    let [topic, group] = names([path.0, path.1])?;
    if !(1..=1000).contains(&body.ids.len()) {
        return Err(Refusal::malformed("/ids", "1 to 1000 ids are wanted"));
    }
    nexus.say(caller, topic, group, body.ids, word).await
}

/// Acknowledge messages; the answer names those that were still the caller's
#[utoipa::path(post, path = "/v1/nexus/topics/{name}/groups/{group}/ack", tag = "nexus", request_body = IdsBody,
    params(("name" = String, Path, description = "The topic"), ("group" = String, Path, description = "The group")),
    responses((status = 200, body = Object), (status = 404)))]
async fn ack(
    Room(nexus): Room<Nexus>,
    caller: Caller,
    Path(path): Path<(String, String)>,
    Json(body): Json<IdsBody>,
) -> Result<Answer<Value>, Refusal> {
    let (index, ours) = said(&nexus, &caller, path, body, Word::Ack).await?;
    Ok(Answer::ok(json!({"acked": ours})).at(index))
}

/// Refuse messages: they are delivered again after the group's backoff
#[utoipa::path(post, path = "/v1/nexus/topics/{name}/groups/{group}/nack", tag = "nexus", request_body = IdsBody,
    params(("name" = String, Path, description = "The topic"), ("group" = String, Path, description = "The group")),
    responses((status = 200, body = Object), (status = 404)))]
async fn nack(
    Room(nexus): Room<Nexus>,
    caller: Caller,
    Path(path): Path<(String, String)>,
    Json(body): Json<IdsBody>,
) -> Result<Answer<Value>, Refusal> {
    let (index, ours) = said(&nexus, &caller, path, body, Word::Nack).await?;
    Ok(Answer::ok(json!({"nacked": ours})).at(index))
}

/// Keep messages for another `ack_wait`
#[utoipa::path(post, path = "/v1/nexus/topics/{name}/groups/{group}/extend", tag = "nexus", request_body = IdsBody,
    params(("name" = String, Path, description = "The topic"), ("group" = String, Path, description = "The group")),
    responses((status = 200, body = Object), (status = 404)))]
async fn extend(
    Room(nexus): Room<Nexus>,
    caller: Caller,
    Path(path): Path<(String, String)>,
    Json(body): Json<IdsBody>,
) -> Result<Answer<Value>, Refusal> {
    let (index, ours) = said(&nexus, &caller, path, body, Word::Extend).await?;
    Ok(Answer::ok(json!({"extended": ours})).at(index))
}
