//! A watch as etcd's gateway streams it: one JSON message a line, each by itself.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State as Room;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, Stream};
use serde_json::{Map, Value, json};

use crate::kernel::web::Caller;
use crate::kernel::web::gateway::{Grpc, INVALID, Live, Messages, UNIMPLEMENTED};
use crate::kernel::{Refusal, problem};

use super::messages::{WatchCreateRequest, WatchRequest};
use super::{base64, header as head, kv, set};
use crate::state::State;
use crate::state::hub::{Group, Selection};
use crate::state::model::Item;
use crate::state::span::Span;
use crate::state::store::ranges;
use crate::state::watch::{Event, Watch};

/// An answer in pieces.
pub(super) fn streamed(pieces: impl Stream<Item = Value> + Send + 'static) -> Response {
    use futures_util::StreamExt as _;
    let lines = pieces.map(|piece| Ok::<_, Infallible>(Bytes::from(format!("{piece}\n"))));
    let json = [(header::CONTENT_TYPE, "application/json")];
    let mut response = (json, Body::from_stream(lines)).into_response();
    response.extensions_mut().insert(Live);
    response
}

/// What a watch was asked for, and where it stands.
struct Told {
    state: State,
    span: Span,
    asked: WatchCreateRequest,
    puts: bool,
    deletes: bool,
    /// Whether nothing was told since the last bookmark.
    quiet: bool,
}

impl Told {
    fn message(&self, revision: i64, more: Value) -> Value {
        let mut m = Map::new();
        m.insert("header".into(), head(&self.state, revision));
        set(&mut m, "watch_id", self.asked.watch_id.0);
        if let Value::Object(more) = more {
            m.extend(more);
        }
        json!({"result": m})
    }

    /// What is said of an event, if anything.
    async fn say(&mut self, event: Event) -> Option<Value> {
        match event {
            Event::Changes(group) => match self.events(&group).await {
                Ok(events) if events.is_empty() => None,
                Ok(events) => {
                    self.quiet = false;
                    let index = group.first().map_or(0, |c| c.item.index);
                    Some(self.message(index, json!({"events": events})))
                }
                Err(refusal) => Some(self.ended(refusal)),
            },
            Event::Bookmark(index) => {
                let quiet = std::mem::replace(&mut self.quiet, true);
                (quiet && self.asked.progress_notify).then(|| self.message(index, Value::Null))
            }
            Event::End(refusal) => Some(self.ended(refusal)),
        }
    }

    async fn events(&self, group: &Group) -> Result<Vec<Value>, Refusal> {
        let wanted = |deleted: bool| if deleted { self.deletes } else { self.puts };
        let mine: Vec<_> = group
            .iter()
            .filter(|c| {
                self.span.contains(&c.item.key) && wanted(c.deleted) && c.item.index >= self.asked.start_revision.0
            })
            .map(AsRef::as_ref)
            .collect();
        let mut before: Vec<Item> = Vec::new();
        if self.asked.prev_kv && !mine.is_empty() {
            let mut conn = self.state.connection().await?;
            before = ranges::before(&mut conn, &mine).await.map_err(|e| self.state.store.refusal(e))?;
        }
        let event = |c: &&crate::state::model::Change| {
            let mut m = Map::new();
            if c.deleted {
                m.insert("type".into(), "DELETE".into());
                m.insert("kv".into(), json!({"key": base64(&c.item.key), "mod_revision": c.item.index.to_string()}));
            } else {
                m.insert("kv".into(), kv(&c.item));
            }
            if let Some(was) = before.iter().find(|b| b.key == c.item.key) {
                m.insert("prev_kv".into(), kv(was));
            }
            Value::Object(m)
        };
        Ok(mine.iter().map(event).collect())
    }

    /// Why there is no more.
    fn ended(&self, refusal: Refusal) -> Value {
        let canceled = [&problem::COMPACTED, &problem::DENIED, &problem::UNAUTHENTICATED];
        if !canceled.contains(&refusal.problem()) {
            return Grpc::from(refusal).in_stream();
        }
        let mut m = Map::new();
        m.insert("canceled".into(), true.into());
        match refusal.extra().get("before").and_then(Value::as_i64) {
            // The first revision that a watch can begin at.
            Some(mark) => set(&mut m, "compact_revision", mark + 1),
            None => drop(m.insert("cancel_reason".into(), Grpc::from(refusal).message().into())),
        }
        self.message(self.state.ledger.index(), Value::Object(m))
    }
}

/// Watches a key or keys in a row, in one stream that ends with the watch.
pub(super) async fn watch(
    Room(state): Room<State>,
    caller: Caller,
    Messages(all): Messages<WatchRequest>,
) -> Result<Response, Grpc> {
    if all.len() > 1 {
        return Err(Grpc::new(
            UNIMPLEMENTED,
            "etcdserver: one watch in a request; further ones by requests of their own",
        ));
    }
    let asked = all.into_iter().next().and_then(|m| m.create_request);
    let asked = asked.ok_or_else(|| Grpc::new(INVALID, "etcdserver: a create_request is wanted"))?;
    let (mut puts, mut deletes) = (true, true);
    for filter in &asked.filters {
        match filter.of(&["NOPUT", "NODELETE"])? {
            0 => puts = false,
            _ => deletes = false,
        }
    }
    let span = asked.span()?;
    let mut told = Told { state, span: Span::one([0]), asked, puts, deletes, quiet: false };
    let Some(span) = span else {
        let reason = "mvcc: watcher range is empty";
        told.asked.watch_id.0 = -1;
        let refused = json!({"created": true, "canceled": true, "cancel_reason": reason});
        let refused = told.message(told.state.ledger.index(), refused);
        return Ok(streamed(stream::iter([refused])));
    };
    told.span = span;
    let selection = match told.span.single() {
        Some(key) => Selection { keys: vec![key.to_vec()], prefixes: Vec::new() },
        // Beyond what is wanted of it, it is passed over.
        None => Selection { keys: Vec::new(), prefixes: vec![told.span.covering().to_vec()] },
    };
    let head = told.state.ledger.fence().await?;
    // What lies ahead is not waited for: what comes before it is passed over, too.
    let after = Some(told.asked.start_revision.0).filter(|start| *start > 0).map(|start| (start - 1).min(head));
    let created = json!({"created": true});
    let watch = match told.state.watch(&caller, selection, after, Duration::ZERO).await {
        Ok(watch) => watch,
        Err(refusal) if refusal.problem() == &problem::COMPACTED => {
            let both = [told.message(head, created), told.ended(refusal)];
            return Ok(streamed(stream::iter(both)));
        }
        Err(refusal) => return Err(refusal.into()),
    };
    // Between the last change of a key and the head there was none: the watch begins behind both.
    let created = told.message(watch.joined().max(head), created);
    Ok(streamed(messages(watch, told, created)))
}

fn messages(watch: Watch, told: Told, created: Value) -> impl Stream<Item = Value> + Send {
    stream::unfold((watch, told, Some(created)), |(mut watch, mut told, first)| async move {
        if let Some(first) = first {
            return Some((first, (watch, told, None)));
        }
        loop {
            if let Some(said) = told.say(watch.next().await?).await {
                return Some((said, (watch, told, None)));
            }
        }
    })
}
