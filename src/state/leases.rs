//! Leases: granted, renewed, ended by an entry that takes along what hangs on them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, mpsc, oneshot};
use uuid::Uuid;

use crate::audit::Records;
use crate::kernel::supervisor::{Supervisor, Task, TaskError};
use crate::kernel::web::Caller;
use crate::kernel::{BoxFuture, Clock, Refusal, problem};
use crate::ledger::entry::canonical;
use crate::ledger::{Command, Entry, Failure, Ledger, Touch, Tx, Vigil, segment};
use crate::store::Store;

use super::kv::KEY;
use super::locks;
use super::metrics::Metrics;
use super::store::leases::{self as rows, Row};

/// Keys that are named one by one to those who hold something of them; if more go, all are forgotten.
const NAMED: usize = 1000;
/// Keys that go in one statement.
const STEP: i64 = 5_000;

/// Shortest and longest time to live, seconds.
pub(super) const TTL: std::ops::RangeInclusive<f64> = 1.0..=86_400.0;

/// A lease
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub(super) struct Lease {
    /// Names it
    pub id: Uuid,
    /// Seconds it lives without a renewal
    pub ttl: f64,
    /// The index of its grant
    pub granted_index: i64,
}

pub(super) fn absent(id: Uuid) -> Refusal {
    Refusal::not_found(format!("lease {id} of yours: it ended, or was granted to another"))
}

/// What a lease whose number its client chose begins with; the others are UUIDv7.
const CHOSEN: [u8; 6] = *b"etcd\0\0";
/// The bits of a UUID after its variant.
const LOW: u64 = (1 << 62) - 1;

/// The number of a lease, for who has numbers where we have ids: of one that was granted by number that, of any other its random
/// bits. A lease that ended has it too, so history can tell what a key hung on.
#[must_use]
pub(super) fn number(id: Uuid) -> i64 {
    let (high, low) = id.as_u64_pair();
    let top = if id.as_bytes().starts_with(&CHOSEN) { (high & 3) << 62 } else { 0 };
    (top | (low & LOW)).cast_signed()
}

/// The lease that is granted by a number.
#[must_use]
pub(super) fn chosen(number: i64) -> Uuid {
    let n = number.cast_unsigned();
    let mut high = [0; 8];
    high[..6].copy_from_slice(&CHOSEN);
    // Version 8 of RFC 9562: what is in it is our own affair.
    let (high, low) = (u64::from_be_bytes(high) | 0x8000 | (n >> 62), (1 << 63) | (n & LOW));
    Uuid::from_u64_pair(high, low)
}

pub(super) fn seconds(ms: i64) -> f64 {
    ms as f64 / 1000.0
}

/// Grants a lease.
pub(super) struct Grant {
    pub id: Uuid,
    /// Whether the client chose its number: then it may be taken.
    pub chosen: bool,
    pub owner: String,
    pub ttl_ms: i64,
}

impl Command for Grant {
    type Out = Lease;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Lease, Entry), Failure> {
        let (id, ttl_ms, index) = (self.id, self.ttl_ms, tx.index());
        if self.chosen && !rows::numbered(tx.read(), &[number(id)]).await?.is_empty() {
            return Err(Refusal::new(&problem::CONFLICT, "etcdserver: lease already exists").into());
        }
        let row = Row {
            id,
            owner: self.owner.clone(),
            ttl_ms,
            granted_index: index,
            beat: index,
            renewed: tx.now(),
            lock: None,
        };
        rows::grant(tx.write(), &row).await?;
        let entry = Entry::ok("state:lease-grant", format!("lease/{id}")).change("ttl_ms", ttl_ms);
        Ok((Lease { id, ttl: seconds(ttl_ms), granted_index: index }, entry))
    }
}

/// What the end of a lease answers
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = EndedLease)]
pub(super) struct Ended {
    /// The lease
    pub id: Uuid,
    /// How many keys went with it
    pub keys: usize,
    /// Locks that it held or waited for
    pub locks: Vec<String>,
}

/// Ends a lease, and all that hangs on it.
pub(super) struct End {
    pub id: Uuid,
    /// The sign of life it was last seen at, if its silence ends it.
    pub silent_since: Option<i64>,
}

impl Command for End {
    type Out = Ended;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Ended, Entry), Failure> {
        let id = self.id;
        let lease = rows::one(tx.read(), id).await?.ok_or_else(|| Refusal::not_found(format!("lease {id}")))?;
        let action = match self.silent_since {
            None => "state:lease-revoke",
            Some(seen) if seen == lease.beat => "state:lease-expire",
            Some(_) => return Err(Refusal::new(&problem::CONFLICT, "the lease was renewed").into()),
        };
        let (ended, mut entry) = end(tx, &lease, Entry::ok(action, format!("lease/{id}"))).await?;
        if self.silent_since.is_some() {
            entry = entry.reason(format!("it was not renewed for {} ms", lease.ttl_ms));
        }
        Ok((ended, entry))
    }
}

/// Ends a lease in somebody's entry: its keys go, its locks pass to who waits.
pub(super) async fn end(tx: &mut Tx<'_>, lease: &Row, entry: Entry) -> Result<(Ended, Entry), Failure> {
    let index = tx.index();
    let mut keys = Vec::new();
    loop {
        let gone = rows::drop_keys(tx.write(), lease.id, index, STEP).await?;
        let last = (gone.len() as i64) < STEP;
        keys.extend(gone);
        if last {
            break;
        }
    }
    let mut entry = entry.change("owner", lease.owner.clone());
    let (locks, said) = locks::lease_ended(tx, lease.id, entry).await?;
    entry = said;
    rows::remove(tx.write(), lease.id).await?;
    if !keys.is_empty() {
        entry = entry.change("keys", keys.len());
    }
    let ended = Ended { id: lease.id, keys: keys.len(), locks };
    entry = if keys.len() > NAMED {
        entry.touch(Touch::all(KEY))
    } else {
        keys.into_iter().fold(entry, |e, key| e.touch(Touch::key(KEY, key)))
    };
    Ok((ended, entry))
}

/// How long a renewal waits for others to share its entry: less than a quarter of the smallest time to live.
const GATHER: Duration = Duration::from_millis(100);
/// Renewals in one entry at most.
const SHARED: usize = 1000;
/// Requests to renew that may wait.
const QUEUE: usize = 16_384;

/// Leases that were renewed, with their time to live in milliseconds; and the index.
pub(super) type Answered = (i64, Vec<(Uuid, i64)>);

/// A request to renew; it hears which of its leases there were, and the index.
struct Renewal {
    ids: Vec<Uuid>,
    owner: String,
    request: String,
    tell: oneshot::Sender<Result<Answered, Refusal>>,
}

/// Gathers renewals. They change nothing anyone can see, so those that come together share an entry (rule 18); each is
/// answered once that is durable.
#[derive(Clone)]
pub(super) struct Renewals(mpsc::Sender<Renewal>);

impl Renewals {
    pub fn start(ledger: Ledger, metrics: Metrics, tasks: &Supervisor) -> Self {
        let (send, receive) = mpsc::channel::<Renewal>(QUEUE);
        let receive = Arc::new(Mutex::new(receive));
        tasks.start(Task::restarting("state/renewals", move |stop| {
            let (receive, ledger, metrics) = (receive.clone(), ledger.clone(), metrics.clone());
            async move {
                let mut receive = receive.lock().await;
                loop {
                    let first = tokio::select! {
                        () = stop.cancelled() => return Ok(()),
                        first = receive.recv() => first,
                    };
                    let Some(first) = first else {
                        stop.cancelled().await;
                        return Ok(());
                    };
                    tokio::time::sleep(GATHER).await;
                    let (mut count, mut together) = (first.ids.len(), vec![first]);
                    while count < SHARED
                        && let Ok(next) = receive.try_recv()
                    {
                        count += next.ids.len();
                        together.push(next);
                    }
                    flush(&ledger, &metrics, together).await;
                }
            }
        }));
        Self(send)
    }

    /// Renews; which of them there were, with their time to live in milliseconds.
    pub async fn give(&self, caller: &Caller, ids: Vec<Uuid>) -> Result<Answered, Refusal> {
        let (tell, told) = oneshot::channel();
        let (owner, request) = (caller.actor().to_owned(), caller.request().id.clone());
        let renewal = Renewal { ids, owner, request, tell };
        self.0.try_send(renewal).map_err(|_| Refusal::new(&problem::OVERLOADED, "too many renewals wait"))?;
        told.await.map_err(|_| Refusal::unavailable("the daemon is stopping"))?
    }
}

async fn flush(ledger: &Ledger, metrics: &Metrics, together: Vec<Renewal>) {
    let wanted = together.iter().flat_map(|r| r.ids.iter().map(|id| (*id, r.owner.clone(), r.request.clone())));
    let done = ledger.write(&Caller::daemon("state"), &[], Renew(wanted.collect())).await;
    let found: HashMap<(Uuid, &str), i64> = match &done {
        Ok(done) => done.value.iter().map(|(id, owner, ttl)| ((*id, owner.as_str()), *ttl)).collect(),
        Err(_) => HashMap::new(),
    };
    metrics.counted("lease-renew", found.len());
    for renewal in together {
        let answer = match &done {
            Err(r) => Err(r.clone()),
            Ok(done) => {
                let ttl = |id: &Uuid| found.get(&(*id, renewal.owner.as_str())).map(|ttl| (*id, *ttl));
                Ok((done.index, renewal.ids.iter().filter_map(ttl).collect()))
            }
        };
        let _ = renewal.tell.send(answer);
    }
}

/// Lease, owner and request of each.
pub(super) struct Renew(Vec<(Uuid, String, String)>);

impl Renew {
    /// Of these leases of the caller's.
    pub fn of(caller: &Caller, ids: Vec<Uuid>) -> Self {
        let (owner, request) = (caller.actor(), &caller.request().id);
        Self(ids.into_iter().map(|id| (id, owner.to_owned(), request.clone())).collect())
    }
}

impl Command for Renew {
    type Out = Vec<(Uuid, String, i64)>;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Self::Out, Entry), Failure> {
        let ids: Vec<Uuid> = self.0.iter().map(|r| r.0).collect();
        let owners: Vec<&str> = self.0.iter().map(|r| r.1.as_str()).collect();
        let (index, now) = (tx.index(), tx.now());
        let found: HashMap<Uuid, (String, i64)> = rows::renew(tx.write(), index, now, &ids, &owners).await?;
        if found.is_empty() {
            return Ok((Vec::new(), Entry::nothing()));
        }
        let mut renewed: Vec<_> =
            self.0.iter().filter(|(id, owner, _)| found.get(id).is_some_and(|(of, _)| of == owner)).collect();
        renewed.sort();
        renewed.dedup_by_key(|r| r.0);
        let record = |(id, owner, request): &&(Uuid, String, String)| {
            canonical(&serde_json::json!({"actor": owner, "lease": id.to_string(), "request_id": request}))
        };
        let records: Vec<Vec<u8>> = renewed.iter().map(record).collect();
        rows::keep_records(tx.write(), index, &records).await?;
        let out = renewed.iter().map(|(id, owner, _)| (*id, owner.clone(), found[id].1)).collect();
        let entry = Entry::ok("state:lease-renew", "leases").segment(segment::over(records.iter().map(Vec::as_slice)));
        Ok((out, entry))
    }
}

/// The records of renewals, for who gives receipts of them.
pub(super) struct Renewed(pub Store);

impl Records for Renewed {
    fn action(&self) -> &'static str {
        "state:lease-renew"
    }

    fn of(&self, index: i64) -> BoxFuture<'_, Result<Vec<Vec<u8>>, Refusal>> {
        Box::pin(async move {
            let mut conn = self.0.reader().acquire().await.map_err(|e| self.0.refusal(e))?;
            rows::records(&mut conn, index).await.map_err(|e| self.0.refusal(e))
        })
    }
}

/// How often it is looked whether leases ran out.
const LOOK: Duration = Duration::from_millis(500);

/// Ends leases that were not renewed for their whole time, as this daemon watched it pass on its own clock.
pub(super) fn expire(store: Store, ledger: Ledger, clock: Clock, metrics: Metrics, tasks: &Supervisor) {
    tasks.start(Task::restarting("state/leases", move |stop| {
        let (store, ledger, clock, metrics) = (store.clone(), ledger.clone(), clock.clone(), metrics.clone());
        async move {
            let mut vigil = Vigil::new(&ledger, clock, "state/leases");
            loop {
                tokio::select! {
                    () = stop.cancelled() => {
                        vigil.release().await;
                        return Ok(());
                    }
                    () = tokio::time::sleep(LOOK) => {}
                }
                look(&store, &ledger, &metrics, &mut vigil).await?;
            }
        }
    }));
}

async fn look(store: &Store, ledger: &Ledger, metrics: &Metrics, vigil: &mut Vigil<Uuid>) -> Result<(), TaskError> {
    let signs = {
        let mut conn = store.reader().acquire().await?;
        rows::signs(&mut conn).await?
    };
    metrics.leases.set(i64::try_from(signs.len()).unwrap_or(i64::MAX));
    // Nobody need watch over nothing.
    if signs.is_empty() || !vigil.watches().await? {
        return Ok(());
    }
    for (id, beat) in vigil.silent(signs) {
        match ledger.write(&Caller::daemon("state"), &[], End { id, silent_since: Some(beat) }).await {
            Ok(_) => metrics.count("lease-expire"),
            Err(r) if r.problem() == &problem::CONFLICT || r.problem() == &problem::NOT_FOUND => {}
            Err(r) => return Err(r.detail().to_owned().into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_lease_of_a_chosen_number_has_that_number(n in any::<i64>()) {
            let id = chosen(n);
            prop_assert_eq!(number(id), n);
            prop_assert_eq!((id.get_version_num(), id.get_variant()), (8, uuid::Variant::RFC4122));
        }
    }
}
