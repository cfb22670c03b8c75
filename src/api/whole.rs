//! Requests that are looked at whole before their handler sees them: those that are to be good once (`Idempotency-Key`), and those
//! that are proposed to others (`Sop-Propose: REASON`) or were approved by them (`Sop-Proposal: ID`). Beside them, the lock that a
//! change says to hold (`If-Fencing-Token`).

use std::sync::Arc;

use axum::extract::Request;
use axum::http::{HeaderMap, Method, header};
use uuid::Uuid;

use crate::kernel::web::{Caller, Idempotency, LARGE, Proposing, RequestInfo, Voiced, read_body};
use crate::kernel::{Refusal, crypto, ids};

/// What a request's header fields say of it as a whole.
pub(super) struct Whole {
    key: Option<String>,
    voiced: Option<Voiced>,
    fencing: Option<(String, i64)>,
}

impl Whole {
    /// Reads them.
    ///
    /// # Errors
    /// 400 when one cannot be read.
    pub fn of(request: &Request) -> Result<Self, Refusal> {
        let reads = matches!(*request.method(), Method::GET | Method::HEAD);
        let mine = request.uri().path().starts_with("/v1/");
        let key = if mine && request.method() == Method::POST { key(request.headers())? } else { None };
        let voiced = if mine && !reads { voiced(request.headers())? } else { None };
        let fencing = if reads || *request.method() == Method::OPTIONS { None } else { fencing(request.headers())? };
        Ok(Self { key, voiced, fencing })
    }

    /// The lock it says to hold, where no stored outcome has to be looked up first.
    pub fn fenced(&self) -> Option<&(String, i64)> {
        self.fencing.as_ref().filter(|_| self.key.is_none())
    }

    /// The request with its body read, if it has to be, and its caller, who knows of it.
    ///
    /// # Errors
    /// 413 past the limit.
    pub async fn read(
        self,
        request: Request,
        caller: Caller,
        info: &RequestInfo,
        limit: usize,
    ) -> Result<(Request, Caller), Refusal> {
        if self.key.is_none() && self.voiced.is_none() {
            let Some(fencing) = self.fencing else { return Ok((request, caller)) };
            let known = RequestInfo { fencing: Some(fencing), ..info.clone() };
            return Ok((request, caller.with_request(Arc::new(known))));
        }
        // Rare, and large: every request would have room for it.
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            // A document may be larger where the handler takes one: it looks for itself.
            let bytes = read_body(Request::from_parts(parts.clone(), body), limit.saturating_mul(LARGE)).await?;
            let mut known = info.clone();
            known.fencing = self.fencing;
            // What is proposed is not made: it must not stand as the outcome of the change.
            let proposed = matches!(self.voiced, Some(Voiced::Propose(_)));
            known.idempotency =
                self.key.filter(|_| !proposed).map(|key| idempotency(caller.actor(), info, &key, &bytes));
            known.proposing = self.voiced.map(|voiced| {
                let query = parts.uri.query().unwrap_or_default().to_owned();
                let content_type = parts.headers.get(header::CONTENT_TYPE).and_then(|t| t.to_str().ok());
                let content_type = content_type.unwrap_or_default().to_owned();
                let fields = fields(&parts.headers);
                let mut said = vec![&*info.method, &info.path, &query, &content_type];
                said.extend(fields.iter().flat_map(|(name, value)| [name.as_str(), value]));
                let body = crypto::base64(&bytes);
                said.push(&body);
                let digest = crypto::hash_tuple(said);
                Arc::new(Proposing { voiced, query, content_type, fields, body: bytes.clone(), digest })
            });
            let caller = caller.with_request(Arc::new(known));
            Ok((Request::from_parts(parts, bytes.into()), caller))
        })
        .await
    }
}

/// The header fields that say what a change is, in order.
fn fields(headers: &HeaderMap) -> Vec<(String, String)> {
    let says = |name: &str| {
        let whole = ["if-match", "if-none-match", "if-fencing-token", "content-encoding"].contains(&name);
        whole || name.starts_with("nexus-") || name.starts_with("ce-")
    };
    let said = headers.iter().filter(|(name, _)| says(name.as_str()));
    let mut fields: Vec<_> =
        said.map(|(n, v)| (n.as_str().to_owned(), String::from_utf8_lossy(v.as_bytes()).into_owned())).collect();
    fields.sort();
    fields
}

fn key(headers: &HeaderMap) -> Result<Option<String>, Refusal> {
    let Some(key) = headers.get("idempotency-key") else { return Ok(None) };
    let fits = |k: &&str| (1..=255).contains(&k.len()) && k.bytes().all(|b| (0x21..0x7f).contains(&b));
    let key = key.to_str().ok().filter(fits);
    key.map(|k| Some(k.to_owned()))
        .ok_or_else(|| Refusal::malformed("", "Idempotency-Key is 1 to 255 visible ASCII characters"))
}

fn voiced(headers: &HeaderMap) -> Result<Option<Voiced>, Refusal> {
    let (propose, proposal) = (headers.get("sop-propose"), headers.get("sop-proposal"));
    match (propose, proposal) {
        (None, None) => Ok(None),
        (Some(_), Some(_)) => Err(Refusal::malformed("", "send Sop-Propose or Sop-Proposal, not both")),
        (Some(reason), None) => {
            let reason = reason.to_str().ok().map(str::trim).filter(|r| r.len() <= 1000);
            let unfit = || Refusal::malformed("", "Sop-Propose is the reason, up to 1000 ASCII characters");
            Ok(Some(Voiced::Propose(reason.ok_or_else(unfit)?.to_owned())))
        }
        (None, Some(id)) => {
            let id = id.to_str().ok().and_then(|id| Uuid::parse_str(id.trim()).ok());
            let unfit = || Refusal::malformed("", "Sop-Proposal is the id of a proposal");
            Ok(Some(Voiced::Approved(id.ok_or_else(unfit)?)))
        }
    }
}

/// `If-Fencing-Token: LOCK=TOKEN`, of a change.
fn fencing(headers: &HeaderMap) -> Result<Option<(String, i64)>, Refusal> {
    let mut all = headers.get_all("if-fencing-token").iter();
    let Some(value) = all.next() else { return Ok(None) };
    let parts = value.to_str().ok().and_then(|v| v.trim().split_once('='));
    let token = parts.and_then(|(lock, token)| Some((lock, token.parse::<i64>().ok()?)));
    let token = token.filter(|(lock, _)| ids::name_fault(lock).is_none() && all.next().is_none());
    token.map(|(lock, token)| Some((lock.to_owned(), token))).ok_or_else(|| {
        Refusal::malformed("", "If-Fencing-Token is one LOCK=TOKEN: the name of a lock and a whole number")
    })
}

fn idempotency(actor: &str, info: &RequestInfo, key: &str, body: &[u8]) -> Idempotency {
    let mut scope = Vec::new();
    for part in [actor, &info.method, &info.path, key] {
        scope.extend_from_slice(&(part.len() as u64).to_be_bytes());
        scope.extend_from_slice(part.as_bytes());
    }
    Idempotency { key: crypto::sha256(&scope), fingerprint: crypto::sha256(body) }
}
