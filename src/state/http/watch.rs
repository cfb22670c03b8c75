//! The route of watches: as a stream of events, or polled.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{FromRequestParts, State as Room};
use axum::http::HeaderMap;
use axum::http::request::Parts;
use axum::response::sse::{Event as Sse, Sse as SseResponse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::{Map, Value, json};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::kernel::Refusal;
use crate::kernel::web::{Answer, Caller, last_event_id, pairs, problem_document};

use crate::state::State;
use crate::state::hub::Selection;
use crate::state::model::{Change, key_fault, prefix_fault, put_key};
use crate::state::watch::{Event, Watch};

/// Keys and prefixes in one watch at most.
const NAMED: usize = 64;

pub(super) fn routes() -> OpenApiRouter<State> {
    OpenApiRouter::new().routes(routes!(watch))
}

#[derive(Default, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
struct WatchQuery {
    /// Keys that begin so; may be repeated. Without any, and without `key`, all keys
    prefix: Vec<String>,
    /// This key; may be repeated. With the prefixes at most 64
    key: Vec<String>,
    /// Changes after this index; without it, from now on
    after: Option<i64>,
    /// Not a stream but one JSON answer, as soon as there is something to tell, or after so many seconds (0-60)
    wait: Option<f64>,
}

impl<S: Send + Sync> FromRequestParts<S> for WatchQuery {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        let mut query = Self::default();
        for (name, value) in pairs(parts.uri.query().unwrap_or_default())? {
            let twice = || Refusal::malformed(format!("?{name}"), format!("the parameter {name} is given twice"));
            match name.as_str() {
                "prefix" => query.prefix.push(value),
                "key" => query.key.push(value),
                "after" if query.after.is_some() => return Err(twice()),
                "after" => {
                    let index = value.parse().ok().filter(|i| *i >= 0);
                    query.after = Some(index.ok_or_else(|| Refusal::malformed("?after", "after is an index"))?);
                }
                "wait" if query.wait.is_some() => return Err(twice()),
                "wait" => {
                    let seconds = value.parse().ok().filter(|s| (0.0..=60.0).contains(s));
                    let fault = || Refusal::malformed("?wait", "wait is a number of seconds from 0 to 60");
                    query.wait = Some(seconds.ok_or_else(fault)?);
                }
                // Every read takes these, and a layer has.
                "min_index" | "consistency" => {}
                _ => return Err(Refusal::malformed(format!("?{name}"), format!("there is no parameter {name}"))),
            }
        }
        Ok(query)
    }
}

impl WatchQuery {
    fn selection(&self) -> Result<Selection, Refusal> {
        let fault = |name: &str, fault: Option<&'static str>| fault.map(|f| Refusal::malformed(format!("?{name}"), f));
        let wrong = self.key.iter().find_map(|k| fault("key", key_fault(k)));
        if let Some(wrong) = wrong.or_else(|| self.prefix.iter().find_map(|p| fault("prefix", prefix_fault(p)))) {
            return Err(wrong);
        }
        if self.key.len() + self.prefix.len() > NAMED {
            return Err(Refusal::malformed("?prefix", format!("a watch names at most {NAMED} keys and prefixes")));
        }
        let bytes = |all: &[String]| all.iter().map(|s| s.clone().into_bytes()).collect::<Vec<_>>();
        let (keys, mut prefixes) = (bytes(&self.key), bytes(&self.prefix));
        if keys.is_empty() && prefixes.is_empty() {
            prefixes.push(Vec::new());
        }
        Ok(Selection { keys, prefixes })
    }
}

/// Watch keys as server-sent events (`Last-Event-ID` counts as `after`), or poll for what has changed
#[utoipa::path(get, path = "/v1/state/watch", tag = "state", params(WatchQuery),
    responses((status = 200, content(
                  (String = "text/event-stream", example = "event: put\nid: 7\ndata: {}\n\n"),
                  (Object = "application/json"))),
              (status = 410, description = "What comes after that index was compacted")))]
async fn watch(
    Room(state): Room<State>,
    caller: Caller,
    query: WatchQuery,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let after = last_event_id(&headers)?.or(query.after);
    let watch = state.watch(&caller, query.selection()?, after, patience(&headers)).await?;
    if let Some(seconds) = query.wait {
        let (index, groups) = watch.poll(Duration::from_secs_f64(seconds)).await?;
        let items: Vec<Value> = groups.iter().flatten().map(|c| told(c)).collect();
        return Ok(Answer::ok(json!({"items": items, "index": index})).at(index).into_response());
    }
    // In a box: the stream would keep room for it twice.
    let events = stream::unfold(
        (Box::new(watch), Vec::new().into_iter()),
        |(mut watch, mut queued): (Box<Watch>, std::vec::IntoIter<Sse>)| async move {
            loop {
                if let Some(event) = queued.next() {
                    return Some((Ok::<_, Infallible>(event), (watch, queued)));
                }
                queued = sse(watch.next().await?).into_iter();
            }
        },
    );
    Ok(SseResponse::new(events).into_response())
}

fn name(change: &Change) -> &'static str {
    if change.deleted { "delete" } else { "put" }
}

/// The events of one index; only the last carries the id, so that nobody resumes between them.
fn sse(event: Event) -> Vec<Sse> {
    match event {
        Event::Changes(changes) => {
            let last = changes.len().saturating_sub(1);
            let event = |(i, change): (usize, &Arc<Change>)| {
                let event = Sse::default().event(name(change)).data(Value::Object(shown(change)).to_string());
                if i == last { event.id(change.item.index.to_string()) } else { event }
            };
            changes.iter().enumerate().map(event).collect()
        }
        Event::Bookmark(index) => {
            vec![Sse::default().event("bookmark").id(index.to_string()).data(json!({"index": index}).to_string())]
        }
        Event::End(refusal) => vec![Sse::default().event("error").data(problem_document(&refusal, None).to_string())],
    }
}

/// A change in a polled answer: as its event has it, with the event's name.
fn told(change: &Change) -> Value {
    let mut m = shown(change);
    m.insert("event".into(), name(change).into());
    Value::Object(m)
}

fn shown(change: &Change) -> Map<String, Value> {
    if !change.deleted {
        return change.item.to_json(true);
    }
    let mut m = Map::new();
    put_key(&mut m, &change.item.key);
    m.insert("index".into(), change.item.index.into());
    m.insert("previous_index".into(), change.previous.into());
    m
}

/// `Sop-Timeout`: how long an index that lies ahead is waited for. A layer has looked at its form.
fn patience(headers: &HeaderMap) -> Duration {
    let seconds = headers.get("sop-timeout").and_then(|v| v.to_str().ok()?.parse::<f64>().ok());
    Duration::try_from_secs_f64(seconds.unwrap_or(5.0).clamp(0.0, 60.0)).unwrap_or(Duration::from_secs(5))
}
