//! The room as clients of etcd find it: the JSON of etcd's gRPC gateway (`/v3`), over the same keys, leases and watches.
//!
//! Nothing is done here that the room does not do: what is sent becomes a range, a transaction, a lease or a watch of the room's, is
//! decided on by the same questions, and is told in etcd's words. A revision is an index: it grows, with gaps.

mod messages;
mod watch;

use std::sync::Arc;

use axum::extract::State as Room;
use axum::http::{HeaderMap, header as names};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use futures_util::stream;
use serde_json::{Map, Value, json};
use utoipa_axum::router::OpenApiRouter;
use uuid::Uuid;

use crate::kernel::crypto::{self, base64};
use crate::kernel::web::gateway::{ETCD, EXHAUSTED, Grpc, Message, Messages, NOT_FOUND, OUT_OF_RANGE};
use crate::kernel::web::{Ask, Caller, SOP_INDEX};
use crate::kernel::{Refusal, problem};
use crate::ledger::Ledger;

use super::leases::{number, seconds};
use super::model::Item;
use super::range::{Found, Range};
use super::store::leases as lease_rows;
use super::txn::{Branches, Lease, Op, Outcome, Put, Told, Txn};
use super::{State, kv, store};

use messages::{
    CompactionRequest, DeleteRangeRequest, KEYS_MOST, LeaseRequest, Leases, PLAIN, PutRequest, RangeRequest, TxnRequest,
};

/// Keys shown with a lease, and leases in a list, at most.
const SHOWN: i64 = 100_000;

/// What a cluster of etcd has and we do not: a number, and the address of its one member.
#[derive(Clone)]
pub(super) struct Face {
    cluster: i64,
    url: Arc<str>,
}

impl Face {
    /// The number is the same on every daemon of a database.
    pub async fn settled(ledger: &Ledger, url: &str) -> Result<Self, Refusal> {
        let random = crypto::random::<8>().map_err(Refusal::internal)?;
        let kept = ledger.settle("state.cluster", &random).await?;
        let cluster = kept.try_into().map_or(1, |bytes| i64::from_be_bytes(bytes) & i64::MAX);
        Ok(Self { cluster, url: url.into() })
    }
}

/// The routes. They are another protocol's, and not in the OpenAPI document.
pub(super) fn routes() -> OpenApiRouter<State> {
    OpenApiRouter::new()
        .route("/v3/kv/range", post(range))
        .route("/v3/kv/put", post(put))
        .route("/v3/kv/deleterange", post(delete_range))
        .route("/v3/kv/txn", post(txn))
        .route("/v3/kv/compaction", post(compaction))
        .route("/v3/watch", post(watch::watch))
        .route("/v3/lease/grant", post(grant))
        .route("/v3/lease/keepalive", post(keep_alive))
        .route("/v3/lease/revoke", post(revoke))
        .route("/v3/kv/lease/revoke", post(revoke))
        .route("/v3/lease/timetolive", post(time_to_live))
        .route("/v3/kv/lease/timetolive", post(time_to_live))
        .route("/v3/lease/leases", post(leases))
        .route("/v3/kv/lease/leases", post(leases))
        .route("/v3/maintenance/status", post(status))
        .route("/v3/cluster/member/list", post(members))
}

/// Sets a number, unless it is zero: what is zero is left out.
fn set(m: &mut Map<String, Value>, name: &str, n: i64) {
    if n != 0 {
        m.insert(name.into(), n.to_string().into());
    }
}

fn header(state: &State, revision: i64) -> Value {
    let cluster = state.face.cluster.to_string();
    json!({"cluster_id": cluster, "member_id": cluster, "revision": revision.to_string(), "raft_term": "1"})
}

fn reply(state: &State, revision: i64, mut body: Map<String, Value>) -> Response {
    body.insert("header".into(), header(state, revision));
    let headers = [(names::CONTENT_TYPE, "application/json".to_owned()), (SOP_INDEX, revision.to_string())];
    (headers, Value::Object(body).to_string()).into_response()
}

fn kv(item: &Item) -> Value {
    let mut m = Map::new();
    m.insert("key".into(), base64(&item.key).into());
    set(&mut m, "create_revision", item.created_index);
    set(&mut m, "mod_revision", item.index);
    set(&mut m, "version", item.version);
    if !item.value.is_empty() {
        m.insert("value".into(), base64(&item.value).into());
    }
    set(&mut m, "lease", item.lease.map_or(0, number));
    Value::Object(m)
}

fn kvs(m: &mut Map<String, Value>, name: &str, items: &[Item]) {
    if !items.is_empty() {
        m.insert(name.into(), items.iter().map(kv).collect());
    }
}

fn ranged(range: &Range, found: &Found) -> Map<String, Value> {
    let mut m = Map::new();
    kvs(&mut m, "kvs", &found.items);
    if found.more && range.limit > 0 {
        m.insert("more".into(), true.into());
    }
    set(&mut m, "count", found.total);
    m
}

/// What an operation came to, as a transaction's answer has it.
fn tell(outcome: Outcome<'_>, index: i64) -> Told {
    let (name, mut m) = match outcome {
        Outcome::Put { before, .. } => {
            let m = before.map(|before| ("prev_kv".to_owned(), kv(before))).into_iter().collect();
            ("response_put", m)
        }
        Outcome::Delete { deleted, before, .. } => {
            let mut m = Map::new();
            set(&mut m, "deleted", deleted);
            kvs(&mut m, "prev_kvs", before);
            ("response_delete_range", m)
        }
        Outcome::Get { range, found } => ("response_range", ranged(range, found)),
        Outcome::Txn { succeeded, results } => {
            let mut m = answered(succeeded, results);
            m.insert("header".into(), json!({}));
            return Told::Other(json!({"response_txn": m}));
        }
    };
    m.insert("header".into(), json!({"revision": index.to_string()}));
    Told::Other(json!({name: m}))
}

/// The answer of a transaction.
fn answered(succeeded: bool, results: Vec<Told>) -> Map<String, Value> {
    let mut m = Map::new();
    if succeeded {
        m.insert("succeeded".into(), true.into());
    }
    if !results.is_empty() {
        m.insert("responses".into(), results.into_iter().map(Told::into_json).collect());
    }
    m
}

/// What is not there is a lease: there is nothing else that must be.
fn lease_fault(refusal: Refusal) -> Grpc {
    if refusal.problem() == &problem::NOT_FOUND {
        return Grpc::new(NOT_FOUND, "etcdserver: requested lease not found");
    }
    refusal.into()
}

impl State {
    /// The leases of these numbers.
    async fn numbered(&self, numbers: &[i64]) -> Result<Leases, Refusal> {
        if numbers.is_empty() {
            return Ok(Leases::new());
        }
        let mut conn = self.connection().await?;
        lease_rows::numbered(&mut conn, numbers).await.map_err(|e| self.store.refusal(e))
    }

    /// One operation as a transaction: the index, and its part of the answer.
    async fn alone(&self, caller: &Caller, op: Op) -> Result<(i64, Map<String, Value>), Refusal> {
        let what = Branches { compares: Vec::new(), then: vec![op], otherwise: Vec::new() };
        let (index, answered) = self.txn(caller, Txn::new(what, tell)).await?;
        let only = answered.results.into_iter().next().map(Told::into_json);
        let only = only.and_then(|r| r.as_object()?.values().next()?.as_object().cloned());
        Ok((index, only.unwrap_or_default()))
    }
}

async fn range(
    Room(state): Room<State>,
    caller: Caller,
    Message(asked): Message<RangeRequest>,
) -> Result<Response, Grpc> {
    let range = asked.check()?;
    if !asked.serializable {
        state.ledger.fence().await?;
    }
    let found = state.range(&caller, &range).await?;
    if found.cut || found.items.len() as i64 > KEYS_MOST {
        let most = store::PAGE_BYTES / (1024 * 1024);
        let text = format!("etcdserver: more than {KEYS_MOST} keys or {most} MiB of values; ask with a limit");
        return Err(Grpc::new(EXHAUSTED, text));
    }
    Ok(reply(&state, found.head, ranged(&range, &found)))
}

async fn put(Room(state): Room<State>, caller: Caller, Message(asked): Message<PutRequest>) -> Result<Response, Grpc> {
    let numbers: Vec<i64> = Some(asked.lease.0).filter(|n| *n != 0).into_iter().collect();
    let leases = state.numbered(&numbers).await?;
    let plain = asked.plain();
    match asked.check(&leases)? {
        Put { key, value: Some((value, _)), lease: Lease::On(lease), .. } if plain => {
            let put = kv::Put::of_bytes(key, value, PLAIN.to_owned()).leased(lease, caller.actor());
            let done = state.put(&caller, put).await.map_err(lease_fault)?;
            Ok(reply(&state, done.index, Map::new()))
        }
        put => {
            let (index, body) = state.alone(&caller, Op::Put(put)).await.map_err(lease_fault)?;
            Ok(reply(&state, index, body))
        }
    }
}

async fn delete_range(
    Room(state): Room<State>,
    caller: Caller,
    Message(asked): Message<DeleteRangeRequest>,
) -> Result<Response, Grpc> {
    let (index, body) = state.alone(&caller, Op::Delete(asked.check()?)).await?;
    Ok(reply(&state, index, body))
}

async fn txn(Room(state): Room<State>, caller: Caller, Message(asked): Message<TxnRequest>) -> Result<Response, Grpc> {
    let leases = state.numbered(&asked.numbers()).await?;
    let (index, answered) = state.txn(&caller, asked.check(&leases)?).await.map_err(lease_fault)?;
    Ok(reply(&state, index, self::answered(answered.succeeded, answered.results)))
}

async fn compaction(
    Room(state): Room<State>,
    caller: Caller,
    Message(asked): Message<CompactionRequest>,
) -> Result<Response, Grpc> {
    let done = state.compact(&caller, asked.revision.0).await.map_err(|refusal| {
        if refusal.problem() == &problem::CONFLICT {
            return Grpc::new(OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted");
        }
        refusal.into()
    })?;
    Ok(reply(&state, done.index, Map::new()))
}

async fn grant(
    Room(state): Room<State>,
    caller: Caller,
    Message(asked): Message<LeaseRequest>,
) -> Result<Response, Grpc> {
    let chosen = Some(asked.id.0).filter(|n| *n != 0);
    let done = state.grant(&caller, asked.ttl_ms()?, chosen).await?;
    let mut body = Map::new();
    set(&mut body, "ID", number(done.value.id));
    set(&mut body, "TTL", done.value.ttl as i64);
    Ok(reply(&state, done.index, body))
}

async fn keep_alive(
    Room(state): Room<State>,
    caller: Caller,
    Messages(all): Messages<LeaseRequest>,
) -> Result<Response, Grpc> {
    let numbers: Vec<i64> = all.iter().map(|m| m.id.0).collect();
    if numbers.len() > 1000 {
        return Err(Grpc::new(EXHAUSTED, "etcdserver: too many requests"));
    }
    state.ledger.fence().await?;
    let known = state.numbered(&numbers).await?;
    let ids: Vec<Uuid> = known.values().copied().collect();
    let (mut revision, mut renewed) = (state.ledger.index(), Vec::new());
    if !ids.is_empty() {
        (revision, renewed) = state.renew(&caller, ids).await?;
    }
    let told = numbers.into_iter().map(move |n| {
        let mut m = Map::new();
        m.insert("header".into(), header(&state, revision));
        set(&mut m, "ID", n);
        // Of one that ended, or is another's, it has none.
        let ttl = renewed.iter().find(|(id, _)| number(*id) == n).map_or(0, |(_, ttl)| *ttl);
        set(&mut m, "TTL", seconds(ttl) as i64);
        json!({"result": m})
    });
    Ok(watch::streamed(stream::iter(told.collect::<Vec<_>>())))
}

async fn revoke(
    Room(state): Room<State>,
    caller: Caller,
    Message(asked): Message<LeaseRequest>,
) -> Result<Response, Grpc> {
    let id = state.numbered(&[asked.id.0]).await?.get(&asked.id.0).copied();
    let id = id.unwrap_or_else(|| super::leases::chosen(asked.id.0));
    let done = state.revoke(&caller, id).await.map_err(lease_fault)?;
    Ok(reply(&state, done.index, Map::new()))
}

async fn time_to_live(
    Room(state): Room<State>,
    caller: Caller,
    Message(asked): Message<LeaseRequest>,
) -> Result<Response, Grpc> {
    let n = asked.id.0;
    let revision = state.ledger.fence().await?;
    let id = state.numbered(&[n]).await?.get(&n).copied();
    let named = id.unwrap_or_else(|| super::leases::chosen(n)).to_string();
    state.ledger.permit(&caller, &[Ask::new("state:lease-read", "Lease", named)]).await?;
    let lease = match id {
        Some(id) => state.lease(id).await?,
        None => None,
    };
    let mut body = Map::new();
    set(&mut body, "ID", n);
    let Some(lease) = lease else {
        set(&mut body, "TTL", -1);
        return Ok(reply(&state, revision, body));
    };
    set(&mut body, "TTL", state.remaining(&lease) as i64);
    set(&mut body, "grantedTTL", seconds(lease.ttl_ms) as i64);
    if asked.keys {
        let mut conn = state.connection().await?;
        let keys = lease_rows::keys(&mut conn, lease.id, SHOWN).await.map_err(|e| state.store.refusal(e))?;
        if !keys.is_empty() {
            body.insert("keys".into(), keys.iter().map(base64).collect());
        }
    }
    Ok(reply(&state, revision, body))
}

async fn leases(Room(state): Room<State>, caller: Caller) -> Result<Response, Grpc> {
    let revision = state.ledger.fence().await?;
    state.ledger.permit(&caller, &[Ask::new("state:lease-read", "Lease", "")]).await?;
    let mut conn = state.connection().await?;
    let found = lease_rows::list(&mut conn, None, SHOWN).await.map_err(|e| state.store.refusal(e))?;
    let mut body = Map::new();
    if !found.is_empty() {
        let shown = |lease: &lease_rows::Row| json!({"ID": number(lease.id).to_string()});
        body.insert("leases".into(), found.iter().map(shown).collect());
    }
    Ok(reply(&state, revision, body))
}

async fn status(Room(state): Room<State>, _: Caller) -> Result<Response, Grpc> {
    let revision = state.ledger.fence().await?;
    let mut conn = state.connection().await?;
    let size = store::size(&mut conn).await.map_err(|e| state.store.refusal(e))?;
    let mut body = Map::new();
    body.insert("version".into(), ETCD.into());
    body.insert("leader".into(), state.face.cluster.to_string().into());
    let numbers = [("dbSize", size), ("dbSizeInUse", size), ("raftTerm", 1)];
    for (name, n) in numbers.into_iter().chain([("raftIndex", revision), ("raftAppliedIndex", revision)]) {
        set(&mut body, name, n);
    }
    Ok(reply(&state, revision, body))
}

/// The one member that a client sees, under the address by which it came. Who it may be is not asked: clients ask for it before
/// they authenticate.
async fn members(Room(state): Room<State>, headers: HeaderMap) -> Response {
    let bound = state.face.url.as_ref();
    let scheme = bound.split_once("://").map_or("http", |(scheme, _)| scheme);
    let host = headers.get(names::HOST).and_then(|h| h.to_str().ok());
    let url = host.map_or_else(|| bound.to_owned(), |host| format!("{scheme}://{host}"));
    let member = json!({"ID": state.face.cluster.to_string(), "name": "sop", "peerURLs": [url], "clientURLs": [url]});
    let body = [("members".to_owned(), json!([member]))].into_iter().collect();
    reply(&state, state.ledger.index(), body)
}
