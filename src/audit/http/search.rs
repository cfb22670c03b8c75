//! Entries by what is known of them: pages, counts, and as they come.

use std::convert::Infallible;

use axum::extract::State as Room;
use axum::http::HeaderMap;
use axum::response::sse::{Event as Sse, Sse as SseResponse};
use axum::response::{IntoResponse, Response};
use futures_util::stream as streams;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::audit::model::Filter;
use crate::audit::search::tokens;
use crate::audit::{Audit, Tail, Told};
use crate::kernel::web::{Answer, Caller, Query, cursor, last_event_id, page_limit, problem_document};
use crate::kernel::{Refusal, Timestamp};

/// A query string of what is known of entries, and of more. `deny_unknown_fields` and `flatten` do not go together.
macro_rules! query {
    ($name:ident { $($(#[$meta:meta])* $field:ident: $type:ty,)* }) => {
        #[derive(Deserialize, utoipa::IntoParams)]
        #[serde(deny_unknown_fields)]
        #[into_params(parameter_in = Query)]
        pub(in crate::audit) struct $name {
            /// Who did it
            #[serde(default)]
            actor: Option<String>,
            /// `state`, `token`, ...
            #[serde(default)]
            room: Option<String>,
            /// `state:put`
            #[serde(default)]
            action: Option<String>,
            /// Beginning of the resource: `key/arp/`
            #[serde(default)]
            resource: Option<String>,
            /// `ok`, `denied` or `failed`
            #[serde(default)]
            outcome: Option<String>,
            /// The request it came with
            #[serde(default)]
            request_id: Option<String>,
            /// The trace it belongs to
            #[serde(default)]
            trace_id: Option<String>,
            /// Words that its details have: all of them, whole, in any case
            #[serde(default)]
            text: Option<String>,
            /// Not before (RFC 3339)
            #[serde(default)]
            since: Option<String>,
            /// Before (RFC 3339)
            #[serde(default)]
            until: Option<String>,
            $($(#[$meta])* #[serde(default)] $field: $type,)*
        }

        impl $name {
            fn known(&self) -> Known<'_> {
                Known {
                    actor: &self.actor, room: &self.room, action: &self.action, resource: &self.resource,
                    outcome: &self.outcome, request_id: &self.request_id, trace_id: &self.trace_id,
                    text: &self.text, since: &self.since, until: &self.until, at: "?",
                }
            }
        }
    };
}

query!(ListQuery {
    /// A saved search; what else is given narrows it
    search: Option<String>,
    /// `desc` (the default, newest first) or `asc`
    order: Option<String>,
    /// 1-1000, default 100
    limit: Option<i64>,
    /// `next` of the page before
    after: Option<String>,
});
query!(FacetQuery {});
query!(StreamQuery {
    /// Entries after this index; without it, from now on. `Last-Event-ID` counts as this
    after: Option<i64>,
});

/// What is known of entries, as somebody wrote it.
pub(super) struct Known<'a> {
    pub actor: &'a Option<String>,
    pub room: &'a Option<String>,
    pub action: &'a Option<String>,
    pub resource: &'a Option<String>,
    pub outcome: &'a Option<String>,
    pub request_id: &'a Option<String>,
    pub trace_id: &'a Option<String>,
    pub text: &'a Option<String>,
    pub since: &'a Option<String>,
    pub until: &'a Option<String>,
    /// What stands before a name where a fault is pointed at.
    pub at: &'a str,
}

impl Known<'_> {
    pub fn filter(&self) -> Result<Filter, Refusal> {
        let pointer = |name: &str| format!("{}{name}", self.at);
        let time = |name: &str, text: &Option<String>| match text {
            None => Ok(None),
            Some(t) => Timestamp::parse(t)
                .map(Some)
                .ok_or_else(|| Refusal::malformed(pointer(name), format!("{name} is an RFC 3339 time"))),
        };
        let given = [
            self.actor,
            self.room,
            self.action,
            self.resource,
            self.outcome,
            self.request_id,
            self.trace_id,
            self.text,
        ];
        if given.iter().any(|v| v.as_ref().is_some_and(|v| v.contains('\0') || v.len() > 2048)) {
            return Err(Refusal::malformed(self.at, "a value has at most 2048 bytes and no NUL"));
        }
        if self.outcome.as_deref().is_some_and(|o| !matches!(o, "ok" | "denied" | "failed")) {
            return Err(Refusal::malformed(pointer("outcome"), "outcome is ok, denied or failed"));
        }
        let words: Vec<String> = self.text.iter().flat_map(|t| tokens::words(t)).collect();
        if self.text.is_some() && words.is_empty() {
            return Err(Refusal::malformed(pointer("text"), "there is no word in it"));
        }
        Ok(Filter {
            actor: self.actor.clone(),
            room: self.room.clone(),
            action: self.action.clone(),
            resource: self.resource.clone(),
            outcome: self.outcome.clone(),
            request_id: self.request_id.clone(),
            trace_id: self.trace_id.clone(),
            words,
            since: time("since", self.since)?,
            until: time("until", self.until)?,
            ascending: false,
        })
    }
}

#[derive(Serialize, Deserialize)]
struct Cursor {
    upto: i64,
    last: i64,
}

/// A page of entries. It may hold fewer than `limit`, even none, and still have a `next`: looking took long
#[derive(Serialize, utoipa::ToSchema)]
pub(super) struct Entries {
    items: Vec<Map<String, Value>>,
    next: Option<String>,
    indexed_to: i64,
}

/// List entries; all pages are of the first one's moment
#[utoipa::path(get, path = "/v1/audit/entries", tag = "audit", params(ListQuery), responses((status = 200, body = Entries)))]
pub(super) async fn list(
    Room(audit): Room<Audit>,
    caller: Caller,
    Query(q): Query<ListQuery>,
) -> Result<Answer<Entries>, Refusal> {
    let limit = page_limit(q.limit)?;
    let ascending = match q.order.as_deref() {
        None | Some("desc") => false,
        Some("asc") => true,
        Some(_) => return Err(Refusal::malformed("?order", "order is asc or desc")),
    };
    let from: Option<Cursor> = q.after.as_deref().map(cursor::decode).transpose()?;
    let mut filter = Filter { ascending, ..q.known().filter()? };
    if let Some(name) = &q.search {
        filter = filter.narrowing(audit.saved(&caller, name).await?.0.filter()?);
    }
    let page = audit.list(&caller, &filter, from.as_ref().map(|c| c.upto), from.map(|c| c.last), limit).await?;
    let upto = page.upto;
    let next = page.next.map(|last| cursor::encode(&Cursor { upto, last }));
    let indexed_to = audit.indexed_to();
    let items = page.entries.iter().map(|e| e.shown(indexed_to)).collect();
    Ok(Answer::ok(Entries { items, next, indexed_to }).at(upto))
}

#[derive(Serialize, utoipa::ToSchema)]
struct Count {
    value: String,
    count: i64,
}

/// How many entries there are of each kind
#[derive(Serialize, utoipa::ToSchema)]
pub(super) struct Facets {
    /// How many fit
    entries: i64,
    /// The oldest index that was looked at
    from: i64,
    /// Whether all were looked at before time ran out
    complete: bool,
    /// `actor`, `room`, `action`, `outcome`: the most frequent values, a hundred at most
    #[schema(value_type = Object)]
    facets: Map<String, Value>,
}

/// Count entries by actor, room, action and outcome
#[utoipa::path(get, path = "/v1/audit/facets", tag = "audit", params(FacetQuery), responses((status = 200, body = Facets)))]
pub(super) async fn facets(
    Room(audit): Room<Audit>,
    caller: Caller,
    Query(q): Query<FacetQuery>,
) -> Result<Answer<Facets>, Refusal> {
    let counted = audit.facets(&caller, &q.known().filter()?).await?;
    let shown = |values: Vec<(String, i64)>| {
        let counts: Vec<Count> = values.into_iter().map(|(value, count)| Count { value, count }).collect();
        json!(counts)
    };
    let facets = counted.facets.into_iter().map(|(name, values)| (name.to_owned(), shown(values))).collect();
    let (from, complete, entries) = (counted.from, counted.complete, counted.entries);
    Ok(Answer::ok(Facets { entries, from, complete, facets }).at(counted.upto))
}

/// Entries as they come (server-sent events): `event: entry` with the list's item, `event: bookmark` at least every 10 s
#[utoipa::path(get, path = "/v1/audit/stream", tag = "audit",
    params(StreamQuery, ("Last-Event-ID" = Option<i64>, Header, description = "Go on after this index")),
    responses((status = 200, content_type = "text/event-stream", body = String), (status = 504, description = "`after` was not reached in time")))]
pub(super) async fn stream(
    Room(audit): Room<Audit>,
    caller: Caller,
    Query(q): Query<StreamQuery>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let last = last_event_id(&headers)?;
    let tail = audit.tail(&caller, q.known().filter()?, last.or(q.after)).await?;
    let events = streams::unfold((tail, audit), |(mut tail, audit): (Tail, Audit)| async move {
        let event = match tail.next().await? {
            Told::Entry(entry) => Sse::default()
                .event("entry")
                .id(entry.index.to_string())
                .data(Value::Object(entry.shown(audit.indexed_to())).to_string()),
            Told::Bookmark(index) => {
                Sse::default().event("bookmark").id(index.to_string()).data(json!({"index": index}).to_string())
            }
            Told::End(refusal) => Sse::default().event("error").data(problem_document(&refusal, None).to_string()),
        };
        Some((Ok::<_, Infallible>(event), (tail, audit)))
    });
    Ok(SseResponse::new(events).into_response())
}
