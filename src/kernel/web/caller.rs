//! Who is asking, for what, and how it is decided: the vocabulary between the layers of a request and the rooms.

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::MatchedPath;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use smallvec::SmallVec;
use uuid::Uuid;

use crate::kernel::{BoxFuture, Refusal};
use crate::telemetry;

/// What of a request goes into the record.
#[derive(Clone, Debug, Default)]
pub struct RequestInfo {
    /// Echoed or made; `X-Request-ID`.
    pub id: String,
    /// W3C trace id, if the caller sent a `traceparent`.
    pub trace_id: Option<String>,
    /// Upper-case method.
    pub method: Cow<'static, str>,
    /// Path without query.
    pub path: String,
    /// The route it took, if there is one: what is counted and logged names its template.
    pub route: Option<MatchedPath>,
    /// Who is on the other end of the connection; `None` on a unix socket.
    pub peer: Option<IpAddr>,
    /// From the `Idempotency-Key` header of a request that takes one.
    pub idempotency: Option<Idempotency>,
    /// From `Sop-Propose` or `Sop-Proposal`, with what of the request is proposed.
    pub proposing: Option<Arc<Proposing>>,
    /// From `If-Fencing-Token`: lock name and token.
    pub fencing: Option<(String, i64)>,
}

impl RequestInfo {
    /// The template of its route.
    #[must_use]
    pub fn route(&self) -> &str {
        self.route.as_ref().map_or("unmatched", MatchedPath::as_str)
    }
}

impl telemetry::Request for RequestInfo {
    fn about(&self) -> telemetry::About<'_> {
        telemetry::About { id: &self.id, method: &self.method, route: self.route(), trace: self.trace_id.as_deref() }
    }
}

/// The block an address is of: a /24 of IPv4, a /48 of IPv6, `unix` for a socket.
#[must_use]
pub fn block(peer: Option<IpAddr>) -> String {
    match peer.map(|p| p.to_canonical()) {
        None => "unix".to_owned(),
        Some(IpAddr::V4(a)) => {
            let [a, b, c, _] = a.octets();
            format!("{a}.{b}.{c}.0/24")
        }
        Some(IpAddr::V6(a)) => {
            let [a, b, c, ..] = a.segments();
            format!("{a:x}:{b:x}:{c:x}::/48")
        }
    }
}

/// An `Idempotency-Key` in its scope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Idempotency {
    /// Digest of principal, method, path and key.
    pub key: [u8; 32],
    /// Digest of the body.
    pub fingerprint: [u8; 32],
}

/// Whether a request is proposed to others, or was approved by them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Voiced {
    /// It is not made but proposed, for this reason.
    Propose(String),
    /// It was approved, by this proposal.
    Approved(Uuid),
}

/// A request that is proposed, or was.
#[derive(Clone, Debug)]
pub struct Proposing {
    /// Which of the two.
    pub voiced: Voiced,
    /// The query, as it was sent.
    pub query: String,
    /// The media type.
    pub content_type: String,
    /// Other header fields that say what is to be done: `if-match`, `nexus-delay`, `ce-id`, ...
    pub fields: Vec<(String, String)>,
    /// The whole body.
    pub body: Bytes,
    /// Digest of method, path, query, media type, these fields and body: what is approved is this and nothing else.
    pub digest: [u8; 32],
}

/// A Cedar entity's name: type and id.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct EntityName {
    /// `Sop::Client`, `user`, `Todo::Item`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Any string of 1-512 bytes.
    pub id: String,
}

/// One question to the policy: may the caller do `action` to `resource`?
#[derive(Clone, Debug)]
pub struct Ask {
    /// `state:put`: room and verb, the id of a `Sop::Action`.
    pub action: &'static str,
    /// Type under `Sop::`: `Key`, `Topic`, `Bundle`, ...
    pub kind: &'static str,
    /// The resource's name; of a list, watch or delete by prefix, the prefix.
    pub name: String,
    /// What else policies may look at.
    pub context: Map<String, Value>,
}

impl Ask {
    /// A question without context.
    pub fn new(action: &'static str, kind: &'static str, name: impl Into<String>) -> Self {
        Self { action, kind, name: name.into(), context: Map::new() }
    }

    /// Adds to the context.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.context.insert(name.to_owned(), value.into());
        self
    }

    /// As entries name a resource: `key/arp/plan/1`.
    #[must_use]
    pub fn resource(&self) -> String {
        format!("{}/{}", self.kind.to_ascii_lowercase(), self.name)
    }
}

/// Digests of what a decision rests on: the policy, the caller's client, its token, the entities that were looked at.
/// The ledger refuses a permit when one of them has changed after [`Permit::at`] (rule 10 of the ledger).
pub type Depends = SmallVec<[u64; 8]>;

/// The answer to all asks of a request together.
#[derive(Clone, Debug)]
pub struct Permit {
    /// All of them allowed.
    pub allowed: bool,
    /// The index at which authentication and decision hold.
    pub at: i64,
    /// What they rest on.
    pub depends: Depends,
    /// Goes into the entry: `{id, at, bundle, policies}`. `None` for the daemon's own work.
    pub decision: Option<Decision>,
    /// The ask that was denied, by position.
    pub denied: Option<usize>,
    /// What a denial is answered with, where others can lift it.
    pub waits: Option<Refusal>,
    /// The proposal by which others approved it: used up in the commit.
    pub proposal: Option<Uuid>,
}

impl Permit {
    /// For what was decided elsewhere, or needs no decision.
    #[must_use]
    pub fn granted() -> Self {
        Self {
            allowed: true,
            at: i64::MAX,
            depends: Depends::new(),
            decision: None,
            denied: None,
            waits: None,
            proposal: None,
        }
    }
}

/// What the record keeps of a decision.
#[derive(Clone, Debug)]
pub struct Decision {
    /// Its id, by which it can be found and explained.
    pub id: Uuid,
    /// The index it was decided at.
    pub at: i64,
    /// Which bundles were active: their ids.
    pub bundle: Arc<[String]>,
    /// The policies that determined it.
    pub policies: Arc<[String]>,
    /// `state:put`.
    pub action: &'static str,
    /// The resource asked for (the one denied, else the first).
    pub resource: EntityName,
    /// Who asked, as which principal, with what scopes and by which request: the context it was decided in.
    pub caller: Caller,
    /// What else policies could look at.
    pub context: Map<String, Value>,
}

/// Decides for a caller. The api hands one in with every request; the daemon's own work has none.
pub trait Authority: Send + Sync {
    /// Checks that the caller's credential still holds and decides all asks, at the newest index this daemon reflects.
    ///
    /// # Errors
    /// 401 when the credential no longer holds; 503 when nothing can be decided now.
    fn decide<'a>(&'a self, caller: &'a Caller, asks: &'a [Ask]) -> BoxFuture<'a, Result<Permit, Refusal>>;
}

/// An authenticated caller of one request, or the daemon itself. Cheap to clone.
#[derive(Clone)]
pub struct Caller(Arc<Inner>);

struct Inner {
    identity: Arc<Identity>,
    request: Arc<RequestInfo>,
    authority: Option<Arc<dyn Authority>>,
}

/// Who a caller is, whatever it asks for. All requests with one token share it.
#[derive(Clone, Debug)]
pub struct Identity {
    /// As the record names it: the client's id, or `daemon:<task>`.
    pub actor: Arc<str>,
    /// As policies see it.
    pub principal: EntityName,
    /// The scopes of its token.
    pub scopes: Vec<String>,
    /// What it showed.
    pub credential: Option<Credential>,
    /// Who acts for it, the last first: a token that was exchanged passed through them.
    pub via: Vec<String>,
}

/// What a caller showed, as far as it matters after it was checked.
#[derive(Clone, Debug)]
pub struct Credential {
    /// The token's `jti`, then those of the tokens it was exchanged for.
    pub tokens: Vec<String>,
    /// The key that signed it.
    pub key: String,
    /// The client it was issued to, and its subject.
    pub clients: Vec<String>,
    /// When it ends, seconds since 1970.
    pub expires: i64,
    /// When it was issued, milliseconds since 1970.
    pub issued: i64,
    /// The index its issue was decided at.
    pub index: i64,
    /// What its validity rests on.
    pub depends: Depends,
}

impl Caller {
    /// A caller whom `authority` decides for.
    #[must_use]
    pub fn new(identity: Arc<Identity>, request: Arc<RequestInfo>, authority: Arc<dyn Authority>) -> Self {
        Self(Arc::new(Inner { identity, request, authority: Some(authority) }))
    }

    /// The daemon itself, for work nobody asked for by a request. It is not subject to policy.
    #[must_use]
    pub fn daemon(task: &str) -> Self {
        let principal = EntityName { kind: "Sop::Daemon".to_owned(), id: task.to_owned() };
        let actor = format!("daemon:{task}").into();
        let identity = Identity { actor, principal, scopes: Vec::new(), credential: None, via: Vec::new() };
        Self(Arc::new(Inner { identity: Arc::new(identity), request: Arc::default(), authority: None }))
    }

    /// A caller whom something other than a policy vouches for: a client that has just proven who it is.
    #[must_use]
    pub fn vouched(principal: EntityName, request: Arc<RequestInfo>) -> Self {
        let actor = principal.id.as_str().into();
        let identity = Identity { actor, principal, scopes: Vec::new(), credential: None, via: Vec::new() };
        Self(Arc::new(Inner { identity: Arc::new(identity), request, authority: None }))
    }

    /// The same caller, with more known of the request.
    #[must_use]
    pub fn with_request(&self, request: Arc<RequestInfo>) -> Self {
        let (identity, authority) = (self.0.identity.clone(), self.0.authority.clone());
        Self(Arc::new(Inner { identity, request, authority }))
    }

    /// The same caller, whose request says nothing of proposals: what it asks for besides is not itself proposed.
    #[must_use]
    pub fn unvoiced(&self) -> Self {
        self.with_request(Arc::new(RequestInfo { proposing: None, idempotency: None, ..self.request().clone() }))
    }

    /// As the record names it: the client's id, or `daemon:<task>`.
    #[must_use]
    pub fn actor(&self) -> &str {
        &self.0.identity.actor
    }

    /// As policies see it.
    #[must_use]
    pub fn principal(&self) -> &EntityName {
        &self.0.identity.principal
    }

    /// Who it is, shared.
    #[must_use]
    pub fn identity(&self) -> &Arc<Identity> {
        &self.0.identity
    }

    /// Who acts for it, the last first.
    #[must_use]
    pub fn via(&self) -> &[String] {
        &self.0.identity.via
    }

    /// The scopes of its token.
    #[must_use]
    pub fn scopes(&self) -> &[String] {
        &self.0.identity.scopes
    }

    /// What it showed.
    #[must_use]
    pub fn credential(&self) -> Option<&Credential> {
        self.0.identity.credential.as_ref()
    }

    /// The request it came with.
    #[must_use]
    pub fn request(&self) -> &RequestInfo {
        &self.0.request
    }

    /// Decides `asks`; the daemon itself may always.
    ///
    /// # Errors
    /// As [`Authority::decide`].
    pub async fn decide(&self, asks: &[Ask]) -> Result<Permit, Refusal> {
        match &self.0.authority {
            Some(authority) => authority.decide(self, asks).await,
            None => Ok(Permit::granted()),
        }
    }
}

impl std::fmt::Debug for Caller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Caller({})", self.actor())
    }
}
