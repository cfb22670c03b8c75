//! What etcd's clients send, and what of the room that is.
//!
//! As its gateway reads them: fields in either spelling, what is not known is passed over, what is left out is zero.

use std::collections::{HashMap, HashSet};

use serde::Deserialize;
use uuid::Uuid;

use crate::kernel::web::gateway::{Bytes, Grpc, INVALID, Int, OUT_OF_RANGE, Word};

use crate::state::leases::{TTL, chosen};
use crate::state::range::{By, Range};
use crate::state::span::Span;
use crate::state::txn::{Branches, Compare, Delete, Lease, Op, Operand, Put, Relation, Target, Txn};

/// Longest key that can be written or asked for, bytes.
pub(super) const KEY_MOST: usize = 1024;
/// Largest value, bytes.
const VALUE_MOST: usize = 1024 * 1024;
/// Conditions, and operations of a branch, at most.
const OPS_MOST: usize = 128;
/// Conditions and operations of all branches, of transactions inside as well, at most.
const ALL_MOST: usize = 1024;
/// Keys in an answer at most; whoever wants more asks with a limit.
pub(super) const KEYS_MOST: i64 = 100_000;
/// What has no type of its own.
pub(super) const PLAIN: &str = "application/octet-stream";

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RangeRequest {
    key: Bytes,
    #[serde(alias = "rangeEnd")]
    range_end: Bytes,
    limit: Int,
    revision: Int,
    #[serde(alias = "sortOrder")]
    sort_order: Word,
    #[serde(alias = "sortTarget")]
    sort_target: Word,
    pub serializable: bool,
    #[serde(alias = "keysOnly")]
    keys_only: bool,
    #[serde(alias = "countOnly")]
    count_only: bool,
    #[serde(alias = "minModRevision")]
    min_mod_revision: Int,
    #[serde(alias = "maxModRevision")]
    max_mod_revision: Int,
    #[serde(alias = "minCreateRevision")]
    min_create_revision: Int,
    #[serde(alias = "maxCreateRevision")]
    max_create_revision: Int,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct PutRequest {
    pub key: Bytes,
    pub value: Bytes,
    pub lease: Int,
    #[serde(alias = "prevKv")]
    prev_kv: bool,
    #[serde(alias = "ignoreValue")]
    ignore_value: bool,
    #[serde(alias = "ignoreLease")]
    ignore_lease: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct DeleteRangeRequest {
    key: Bytes,
    #[serde(alias = "rangeEnd")]
    range_end: Bytes,
    #[serde(alias = "prevKv")]
    prev_kv: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CompareRequest {
    result: Word,
    target: Word,
    key: Bytes,
    #[serde(alias = "rangeEnd")]
    range_end: Bytes,
    version: Int,
    #[serde(alias = "createRevision")]
    create_revision: Int,
    #[serde(alias = "modRevision")]
    mod_revision: Int,
    value: Bytes,
    lease: Int,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RequestOp {
    #[serde(alias = "requestRange")]
    request_range: Option<RangeRequest>,
    #[serde(alias = "requestPut")]
    request_put: Option<PutRequest>,
    #[serde(alias = "requestDeleteRange")]
    request_delete_range: Option<DeleteRangeRequest>,
    #[serde(alias = "requestTxn")]
    request_txn: Option<Box<TxnRequest>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct TxnRequest {
    compare: Vec<CompareRequest>,
    success: Vec<RequestOp>,
    failure: Vec<RequestOp>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct CompactionRequest {
    pub revision: Int,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct LeaseRequest {
    #[serde(rename = "ID")]
    pub id: Int,
    #[serde(rename = "TTL")]
    ttl: Int,
    pub keys: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct WatchRequest {
    #[serde(alias = "createRequest")]
    pub create_request: Option<WatchCreateRequest>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct WatchCreateRequest {
    key: Bytes,
    #[serde(alias = "rangeEnd")]
    range_end: Bytes,
    #[serde(alias = "startRevision")]
    pub start_revision: Int,
    #[serde(alias = "progressNotify")]
    pub progress_notify: bool,
    pub filters: Vec<Word>,
    #[serde(alias = "prevKv")]
    pub prev_kv: bool,
    #[serde(alias = "watchId")]
    pub watch_id: Int,
}

fn invalid(text: &str) -> Grpc {
    Grpc::new(INVALID, text)
}

/// A key, or those up to an end: none is the key alone, a zero byte is no end.
fn span(Bytes(key): &Bytes, Bytes(end): &Bytes) -> Result<Span, Grpc> {
    if key.is_empty() {
        return Err(invalid("etcdserver: key is not provided"));
    }
    if key.len() > KEY_MOST || end.len() > KEY_MOST + 1 {
        return Err(Grpc::new(INVALID, format!("etcdserver: key is too long, {KEY_MOST} bytes are the most")));
    }
    Ok(match end.as_slice() {
        [] => Span::one(key.clone()),
        [0] => Span { from: key.clone(), end: None },
        end => Span { from: key.clone(), end: Some(end.to_vec()) },
    })
}

/// A bound that is left out, or zero, is none.
fn bounds(least: Int, most: Int) -> (i64, i64) {
    (least.0.max(0), if most.0 == 0 { i64::MAX } else { most.0 })
}

impl RangeRequest {
    pub fn check(&self) -> Result<Range, Grpc> {
        let order = self.sort_order.of(&["NONE", "ASCEND", "DESCEND"])?;
        let by = match self.sort_target.of(&["KEY", "VERSION", "CREATE", "MOD", "VALUE"])? {
            0 => By::Key,
            1 => By::Version,
            2 => By::Created,
            3 => By::Index,
            _ => By::Value,
        };
        Ok(Range {
            at: Some(self.revision.0).filter(|at| *at > 0),
            // One that only counts gives none.
            limit: match self.limit.0 {
                _ if self.count_only => 0,
                limit if limit > 0 => limit.min(KEYS_MOST + 1),
                _ => KEYS_MOST + 1,
            },
            values: !self.keys_only && !self.count_only,
            counted: true,
            by,
            descending: order == 2,
            changed: bounds(self.min_mod_revision, self.max_mod_revision),
            created: bounds(self.min_create_revision, self.max_create_revision),
            ..Range::of(span(&self.key, &self.range_end)?)
        })
    }
}

/// The leases of these numbers. One that is not there is looked for in vain when it comes to it.
pub(super) type Leases = HashMap<i64, Uuid>;

impl PutRequest {
    /// Whether it can do without knowing what was there.
    pub fn plain(&self) -> bool {
        !(self.prev_kv || self.ignore_value || self.ignore_lease)
    }

    pub fn check(self, leases: &Leases) -> Result<Put, Grpc> {
        span(&self.key, &Bytes::default())?;
        if self.ignore_value && !self.value.0.is_empty() {
            return Err(invalid("etcdserver: value is provided"));
        }
        if self.ignore_lease && self.lease.0 != 0 {
            return Err(invalid("etcdserver: lease is provided"));
        }
        if self.value.0.len() > VALUE_MOST {
            return Err(invalid("etcdserver: request is too large"));
        }
        let number = Some(self.lease.0).filter(|n| *n != 0);
        let lease = number.map(|n| leases.get(&n).copied().unwrap_or_else(|| chosen(n)));
        Ok(Put {
            key: self.key.0,
            value: (!self.ignore_value).then(|| (self.value.0, PLAIN.to_owned())),
            lease: if self.ignore_lease { Lease::Same } else { Lease::On(lease) },
            before: self.prev_kv,
        })
    }
}

impl DeleteRangeRequest {
    pub fn check(&self) -> Result<Delete, Grpc> {
        Ok(Delete { keys: span(&self.key, &self.range_end)?, before: self.prev_kv })
    }
}

impl CompareRequest {
    fn check(self) -> Result<Compare, Grpc> {
        let relation = match self.result.of(&["EQUAL", "GREATER", "LESS", "NOT_EQUAL"])? {
            0 => Relation::Eq,
            1 => Relation::Gt,
            2 => Relation::Lt,
            _ => Relation::Ne,
        };
        let (target, operand) = match self.target.of(&["VERSION", "CREATE", "MOD", "VALUE", "LEASE"])? {
            0 => (Target::Version, Operand::Number(self.version.0)),
            1 => (Target::CreatedIndex, Operand::Number(self.create_revision.0)),
            2 => (Target::Index, Operand::Number(self.mod_revision.0)),
            3 => (Target::Value, Operand::Bytes(self.value.0)),
            _ => (Target::Lease, Operand::Number(self.lease.0)),
        };
        Ok(Compare { keys: span(&self.key, &self.range_end)?, target, relation, operand })
    }
}

impl RequestOp {
    fn check(self, leases: &Leases) -> Result<Op, Grpc> {
        match self {
            Self { request_put: Some(put), .. } => put.check(leases).map(Op::Put),
            Self { request_delete_range: Some(delete), .. } => delete.check().map(Op::Delete),
            Self { request_range: Some(range), .. } => range.check().map(Op::Get),
            Self { request_txn: Some(txn), .. } => Ok(Op::Txn(Box::new(txn.branches(leases)?))),
            _ => Err(invalid("etcdserver: key not found")),
        }
    }
}

/// What a branch puts and deletes, in transactions inside as well.
#[derive(Default)]
struct Changed<'a> {
    puts: HashSet<&'a [u8]>,
    deletes: Vec<&'a Span>,
}

impl<'a> Changed<'a> {
    /// What a branch puts is neither put twice nor deleted, but by the two branches of one transaction inside.
    fn by(branch: &'a [Op]) -> Result<Self, Grpc> {
        let mut all = Self::default();
        all.deletes.extend(branch.iter().filter_map(|op| if let Op::Delete(d) = op { Some(&d.keys) } else { None }));
        for op in branch {
            let Op::Txn(inner) = op else { continue };
            let (then, otherwise) = (Self::by(&inner.then)?, Self::by(&inner.otherwise)?);
            // etcd lets one inside delete what one before it put. Here a key has one state at an index.
            let gone = |key: &&[u8]| then.deletes.iter().chain(&otherwise.deletes).any(|keys| keys.contains(key));
            if all.puts.iter().any(gone) {
                return Err(duplicate());
            }
            for key in &then.puts {
                all.put(key)?;
            }
            for key in otherwise.puts.difference(&then.puts) {
                all.put(key)?;
            }
            all.deletes.extend(then.deletes.into_iter().chain(otherwise.deletes));
        }
        for op in branch {
            if let Op::Put(put) = op {
                all.put(&put.key)?;
            }
        }
        Ok(all)
    }

    fn put(&mut self, key: &'a [u8]) -> Result<(), Grpc> {
        if self.deletes.iter().any(|keys| keys.contains(key)) || !self.puts.insert(key) {
            return Err(duplicate());
        }
        Ok(())
    }
}

fn duplicate() -> Grpc {
    invalid("etcdserver: duplicate key given in txn request")
}

impl TxnRequest {
    fn ops(&self) -> impl Iterator<Item = &RequestOp> {
        self.success.iter().chain(&self.failure)
    }

    /// The numbers of the leases it names.
    pub fn numbers(&self) -> Vec<i64> {
        let of = |op: &RequestOp| match op {
            RequestOp { request_put: Some(put), .. } => vec![put.lease.0],
            RequestOp { request_txn: Some(txn), .. } => txn.numbers(),
            _ => Vec::new(),
        };
        self.ops().flat_map(of).filter(|n| *n != 0).collect()
    }

    /// How many conditions and operations there are in all.
    fn weight(&self) -> usize {
        let ops = self.ops().map(|op| 1 + op.request_txn.as_ref().map_or(0, |txn| txn.weight()));
        self.compare.len() + ops.sum::<usize>()
    }

    pub fn check(self, leases: &Leases) -> Result<Txn, Grpc> {
        if self.weight() > ALL_MOST {
            return Err(too_many());
        }
        let what = self.branches(leases)?;
        Changed::by(&what.then)?;
        Changed::by(&what.otherwise)?;
        Ok(Txn::new(what, super::tell))
    }

    fn branches(self, leases: &Leases) -> Result<Branches, Grpc> {
        if [self.compare.len(), self.success.len(), self.failure.len()].into_iter().any(|n| n > OPS_MOST) {
            return Err(too_many());
        }
        let compares = self.compare.into_iter().map(CompareRequest::check).collect::<Result<_, _>>()?;
        let branch = |ops: Vec<RequestOp>| ops.into_iter().map(|op| op.check(leases)).collect::<Result<Vec<Op>, _>>();
        Ok(Branches { compares, then: branch(self.success)?, otherwise: branch(self.failure)? })
    }
}

fn too_many() -> Grpc {
    invalid("etcdserver: too many operations in txn request")
}

impl LeaseRequest {
    /// Its time to live in milliseconds: the shortest there is if it asks for less, as etcd does.
    pub fn ttl_ms(&self) -> Result<i64, Grpc> {
        let (least, most) = (*TTL.start() as i64, *TTL.end() as i64);
        if self.ttl.0 > most {
            return Err(Grpc::new(OUT_OF_RANGE, "etcdserver: too large lease TTL"));
        }
        Ok(self.ttl.0.max(least) * 1000)
    }
}

impl WatchCreateRequest {
    /// What it watches; `None` if that is nothing. Without a key it is the least there is.
    pub fn span(&self) -> Result<Option<Span>, Grpc> {
        let least = Bytes(vec![0]);
        let key = if self.key.0.is_empty() { &least } else { &self.key };
        let span = span(key, &self.range_end)?;
        Ok(Some(span).filter(|s| s.end.as_ref().is_none_or(|end| *end > s.from)))
    }
}
