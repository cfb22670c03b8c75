//! Events, and the records of segments with their receipts.

use axum::extract::State as Room;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::audit::Audit;
use crate::kernel::cloudevents::{self, Brought, Event};
use crate::kernel::web::{Answer, Body, BodyLimit, Caller, Listing, Path, Query, inflate, page_limit};
use crate::kernel::{Fault, Refusal, crypto, problem};

use super::{receipt_wait, whole};

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct EventQuery {
    /// `true`: a batch with one bad event is refused whole
    #[serde(default)]
    atomic: bool,
}

/// What became of one event
#[derive(Serialize, utoipa::ToSchema)]
pub(super) struct Recorded {
    /// The entry it is a record of
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<i64>,
    /// Its place among the entry's records
    #[serde(skip_serializing_if = "Option::is_none")]
    position: Option<usize>,
    /// The event's own id
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    /// What is wrong with it; then it is not recorded
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<Object>)]
    errors: Vec<Fault>,
}

/// Record CloudEvents: one (structured or binary) or a batch, each judged by itself. Durable before it is answered
#[utoipa::path(post, path = "/v1/audit/events", tag = "audit", params(EventQuery),
    request_body(content = Object, content_type = "application/cloudevents+json"),
    responses((status = 201, body = Recorded, description = "For a batch: `{index, accepted, refused, items}`, an item for each event"),
              (status = 400, description = "No event of it can be recorded"), (status = 403), (status = 413), (status = 415)))]
pub(super) async fn keep(
    Room(audit): Room<Audit>,
    caller: Caller,
    Query(q): Query<EventQuery>,
    limit: Option<axum::Extension<BodyLimit>>,
    headers: HeaderMap,
    Body(body): Body,
) -> Result<Response, Refusal> {
    let body = inflate(&headers, body, limit.map_or(1024 * 1024, |l| l.0.0))?;
    match cloudevents::read(&headers, &body)? {
        Brought::One(event) => {
            let done = audit.keep(&caller, std::slice::from_ref(&event)).await?;
            let recorded =
                Recorded { index: Some(done.index), position: Some(0), id: Some(event.id), errors: Vec::new() };
            Ok(Answer::created(recorded).at(done.index).into_response())
        }
        Brought::Many(each) => batch(&audit, &caller, each, q.atomic).await,
    }
}

async fn batch(
    audit: &Audit,
    caller: &Caller,
    each: Vec<Result<Event, Refusal>>,
    atomic: bool,
) -> Result<Response, Refusal> {
    let faults: Vec<Fault> = each.iter().filter_map(|e| e.as_ref().err()).flat_map(|r| r.errors().to_vec()).collect();
    let refused = each.iter().filter(|e| e.is_err()).count();
    if refused == each.len() || (atomic && refused > 0) {
        let detail = format!("{refused} of {} events cannot be recorded; none was", each.len());
        return Err(Refusal::new(&problem::MALFORMED, detail).with_faults(faults));
    }
    let good: Vec<Event> = each.iter().filter_map(|e| e.as_ref().ok().cloned()).collect();
    let done = audit.keep(caller, &good).await?;
    let mut position = 0;
    let item = |read: Result<Event, Refusal>| match read {
        Ok(event) => {
            position += 1;
            let place = Some(position - 1);
            Recorded { index: Some(done.index), position: place, id: Some(event.id), errors: Vec::new() }
        }
        Err(r) => Recorded { index: None, position: None, id: None, errors: r.errors().to_vec() },
    };
    let items: Vec<Recorded> = each.into_iter().map(item).collect();
    let answer = json!({"index": done.index, "accepted": good.len(), "refused": refused, "items": items});
    Ok(Answer::created(answer).at(done.index).into_response())
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct PageQuery {
    /// 1-1000, default 100
    #[serde(default)]
    limit: Option<i64>,
    /// `next` of the page before
    #[serde(default)]
    after: Option<String>,
}

/// List the records of an entry that stands for a segment
#[utoipa::path(get, path = "/v1/audit/entries/{index}/records", tag = "audit",
    params(("index" = i64, Path, description = "The entry's index"), PageQuery),
    responses((status = 200, body = Listing<Object>), (status = 404), (status = 410, description = "They are no longer kept")))]
pub(super) async fn list(
    Room(audit): Room<Audit>,
    caller: Caller,
    Path(index): Path<String>,
    Query(q): Query<PageQuery>,
) -> Result<Answer<Listing<Map<String, Value>>>, Refusal> {
    let (index, limit) = (whole(&index)?, page_limit(q.limit)?);
    let after = q.after.map(|a| a.parse::<usize>().map(|n| n.saturating_add(1)));
    let from = after.transpose().map_err(|_| Refusal::malformed("?after", "after is `next` of the page before"))?;
    let from = from.unwrap_or(0);
    let records = audit.records(&caller, index).await?;
    let shown = |(position, record): (usize, &Vec<u8>)| {
        let mut m = Map::new();
        m.insert("position".into(), position.into());
        m.insert("record".into(), crypto::base64(record).into());
        if let Ok(content) = serde_json::from_slice::<Value>(record) {
            m.insert("content".into(), content);
        }
        m
    };
    let items: Vec<_> = records.iter().enumerate().skip(from).take(limit).map(shown).collect();
    let last = from + items.len();
    let next = (last < records.len() && !items.is_empty()).then(|| (last - 1).to_string());
    Ok(Answer::ok(Listing { items, next }))
}

/// The receipt of one record (C2SP tlog-proof of its entry); its extra line is JSON
/// `{commitment, entry, path, position, record, records}`
#[utoipa::path(get, path = "/v1/audit/entries/{index}/records/{position}/receipt", tag = "audit",
    params(("index" = i64, Path, description = "The entry's index"), ("position" = u64, Path, description = "Its place among the entry's records")),
    responses((status = 200, content_type = "text/plain", body = String), (status = 404), (status = 410, description = "They are no longer kept"),
              (status = 503, description = "No checkpoint covers it yet")))]
pub(super) async fn receipt(
    Room(audit): Room<Audit>,
    caller: Caller,
    Path((index, position)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let position = usize::try_from(whole(&position)?).map_err(|_| Refusal::not_found(format!("record {position}")))?;
    let proof = audit.record_receipt(&caller, whole(&index)?, position, receipt_wait(&headers)).await?;
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], proof.text()).into_response())
}
