//! Waiting for a lock: a place in its queue that this daemon keeps alive, and gives up when the caller goes.

use std::time::Duration;

use sqlx::PgConnection;
use uuid::Uuid;

use crate::kernel::web::{Ask, Caller};
use crate::kernel::{BoxFuture, Refusal, ids, problem};
use crate::ledger::Committed;

use super::leases::{End, Ended, Grant, Lease, Renew, chosen, seconds};
use super::locks::{Acquire, Asked, Held, Hold, Release, Released, Terms, Waiter, Which, refused, taken};
use super::places::{Parted, Place};
use super::store::{leases as lease_rows, locks as rows};
use super::{State, model};

/// What is asked for.
pub(super) struct Wish {
    pub name: String,
    pub ttl_ms: i64,
    pub lease: Option<Uuid>,
    pub terms: Terms,
    pub value: Option<Vec<u8>>,
    pub wait: Duration,
}

impl Wish {
    /// By a lease that is there.
    fn by(&self, caller: &Caller, lease: Uuid) -> Acquire {
        let (name, owner) = (self.name.clone(), caller.actor().to_owned());
        let (terms, value) = (self.terms, self.value.clone());
        Acquire { name, owner, lease, ttl_ms: None, terms, value, asker: None, resumes: false }
    }
}

/// What asking came to.
enum Got {
    /// It is held.
    Held(i64, Held),
    /// It was asked for before, and was waited for.
    Replayed(Began),
}

/// A wait that began before.
struct Began {
    lease: Option<Uuid>,
    _place: Option<Place>,
}

impl State {
    /// Grants a lease; by a number, if its client has chosen one.
    pub(super) async fn grant(
        &self,
        caller: &Caller,
        ttl_ms: i64,
        number: Option<i64>,
    ) -> Result<Committed<Lease>, Refusal> {
        let ask = Ask::new("state:lease-grant", "Lease", "");
        let (id, owner) = (number.map_or_else(|| ids::new_id(self.clock.now()), chosen), caller.actor().to_owned());
        let done = self.ledger.write(caller, &[ask], Grant { id, chosen: number.is_some(), owner, ttl_ms }).await?;
        self.metrics.count("lease-grant");
        Ok(done)
    }

    /// Renews leases of the caller's; those that there were, with their time to live in milliseconds.
    pub(super) async fn renew(&self, caller: &Caller, ids: Vec<Uuid>) -> Result<(i64, Vec<(Uuid, i64)>), Refusal> {
        let asks: Vec<Ask> = ids.iter().map(|id| Ask::new("state:lease-renew", "Lease", id.to_string())).collect();
        if caller.request().idempotency.is_some() {
            // What is to be done once has an outcome of its own, and so an entry.
            let done = self.ledger.write(caller, &asks, Renew::of(caller, ids)).await?;
            self.metrics.counted("lease-renew", if done.replayed { 0 } else { done.value.len() });
            return Ok((done.index, done.value.into_iter().map(|(id, _, ttl)| (id, ttl)).collect()));
        }
        self.ledger.pass(caller, &asks).await?;
        self.renewals.give(caller, ids).await
    }

    pub(super) async fn revoke(&self, caller: &Caller, id: Uuid) -> Result<Committed<Ended>, Refusal> {
        // Whose it is does not change as long as it is there.
        let own = self.lease(id).await?.is_some_and(|l| l.owner == caller.actor());
        let ask = Ask::new("state:lease-revoke", "Lease", id.to_string()).with("own", own);
        let done = self.ledger.write(caller, &[ask], End { id, silent_since: None }).await?;
        self.metrics.count("lease-revoke");
        Ok(done)
    }

    pub(super) async fn lease(&self, id: Uuid) -> Result<Option<lease_rows::Row>, Refusal> {
        let mut conn = self.connection().await?;
        lease_rows::one(&mut conn, id).await.map_err(|e| self.store.refusal(e))
    }

    /// About how many seconds a lease has left.
    pub(super) fn remaining(&self, lease: &lease_rows::Row) -> f64 {
        let ttl = seconds(lease.ttl_ms);
        (ttl - self.clock.now().since(lease.renewed).as_secs_f64()).clamp(0.0, ttl)
    }

    /// Who holds a lock, and who waits for it.
    pub(super) async fn lock_stands(&self, name: &str) -> Result<(Vec<Hold>, Vec<Waiter>), Refusal> {
        let refusal = |e| self.store.refusal(e);
        let mut conn = self.connection().await?;
        // The queue first: whoever comes to hold it between the two is in both then, and not in neither.
        let mut queue = rows::queue(&mut conn, name).await.map_err(refusal)?;
        let holds = rows::holds(&mut conn, name).await.map_err(refusal)?;
        queue.retain(|w| !holds.iter().any(|h| h.lease == w.lease));
        Ok((holds, queue))
    }

    /// Acquires a lock, and waits for it as long as is wished; the answer and its index.
    pub(super) async fn acquire(&self, caller: &Caller, wish: Wish) -> Result<(i64, Held), Refusal> {
        let until = self.clock.elapsed() + wish.wait;
        let ask = [Ask::new("state:lock-acquire", "Lock", wish.name.clone())];
        let lease = wish.lease.unwrap_or_else(|| ids::new_id(self.clock.now()));
        let grant = wish.lease.is_none().then_some(wish.ttl_ms);
        let acquire = Acquire { ttl_ms: grant, ..wish.by(caller, lease) };
        let began = match self.ask(caller, &ask, &wish, acquire, until).await? {
            Got::Held(index, held) => return Ok((index, held)),
            Got::Replayed(began) => began,
        };
        // Somebody waited for this under the same idempotency key. What that has come to is found by its lease; it is not asked
        // for once more, for it may have been held and let go of.
        let resume = Acquire { resumes: true, ..wish.by(caller, began.lease.or(wish.lease).unwrap_or(lease)) };
        // What was approved for that request was approved for this.
        let approved = caller.request().proposing.is_some();
        let ask = if approved { &[] } else { &ask[..] };
        match self.ask(&caller.unvoiced(), ask, &wish, resume, until).await? {
            Got::Held(index, held) => Ok((index, held)),
            Got::Replayed(_) => Err(Refusal::internal("without a key nothing is replayed")),
        }
    }

    async fn ask(
        &self,
        caller: &Caller,
        asks: &[Ask],
        wish: &Wish,
        mut acquire: Acquire,
        until: Duration,
    ) -> Result<Got, Refusal> {
        let mut news = self.hub.locks.turn(acquire.lease);
        let mut place = (!wish.wait.is_zero()).then(|| Place::take(self, &wish.name, acquire.lease, &acquire.owner));
        acquire.asker = place.as_ref().map(Place::asker);
        let again = acquire.clone();
        let done = self.ledger.write(caller, asks, acquire).await.inspect_err(|refusal| {
            if refusal.problem().status < 429 {
                place.iter_mut().for_each(Place::refused);
            }
        })?;
        self.metrics.count("lock-acquire");
        let replayed = done.replayed;
        match (done.value, place) {
            (Asked { held: Some(held), .. }, mut place) => {
                place.iter_mut().for_each(if replayed { Place::refused } else { Place::won });
                Ok(Got::Held(done.index, held))
            }
            (Asked { ttl_ms, .. }, Some(mut place)) if !replayed => {
                place.waits();
                let (held, index) = self.wait(caller, &again, ttl_ms, until, &mut place, &mut news).await?;
                Ok(Got::Held(index, held))
            }
            // The share of the place is kept until what was begun is found.
            (Asked { lease, .. }, mut place) => {
                place.iter_mut().for_each(Place::refused);
                Ok(Got::Replayed(Began { lease, _place: place }))
            }
        }
    }

    async fn wait(
        &self,
        caller: &Caller,
        asked: &Acquire,
        ttl_ms: i64,
        until: Duration,
        place: &mut Place,
        news: &mut tokio::sync::watch::Receiver<()>,
    ) -> Result<(Held, i64), Refusal> {
        let (name, lease) = (asked.name.as_str(), asked.lease);
        let closing = self.ledger.closing();
        let pulse = Duration::from_millis(u64::try_from(ttl_ms / 3).unwrap_or(0));
        loop {
            news.mark_unchanged();
            let mut conn = self.connection().await?;
            let holds = rows::holds(&mut conn, name).await.map_err(|e| self.store.refusal(e))?;
            drop(conn);
            if let Some(mine) = holds.iter().find(|h| h.lease == lease) {
                if mine.asker.is_none_or(|asker| asker == place.asker()) {
                    place.won();
                    return Ok((Held::new(name, mine), mine.token.max(self.ledger.index())));
                }
                // Others who wait by this lease may be about to give it back: nobody is told of it before they cannot.
                let kept = Acquire { ttl_ms: None, resumes: false, ..asked.clone() };
                let done = self.ledger.write(&Caller::daemon("state"), &[], kept).await?;
                if let Some(held) = done.value.held {
                    place.won();
                    return Ok((held, done.index));
                }
                continue;
            }
            let (holds, queue) = self.lock_stands(name).await?;
            if holds.iter().any(|h| h.lease == lease) {
                continue;
            }
            if !queue.iter().any(|w| w.lease == lease) {
                place.lost();
                let why = match self.lease(lease).await? {
                    Some(_) => "its place in the queue was given up",
                    None => "the lease ended while it waited for the lock",
                };
                return Err(refused(why, &holds, queue.len()));
            }
            let left = until.saturating_sub(self.clock.elapsed());
            if left.is_zero() {
                match place.withdraw().await? {
                    Parted::Held => continue,
                    Parted::Left => return Err(taken(name, &holds, queue.len())),
                    Parted::Withdrawn => return Err(taken(name, &holds, queue.len().saturating_sub(1))),
                }
            }
            tokio::select! {
                () = closing.cancelled() => return Err(Refusal::unavailable("the daemon is stopping")),
                _ = news.changed() => {}
                // As long as its caller waits, so long the lease lives.
                () = tokio::time::sleep(pulse.min(left)) => {
                    self.renewals.give(caller, vec![lease]).await?;
                }
            }
        }
    }

    /// Lets go of a lock, or of a place in its queue.
    pub(super) async fn release(
        &self,
        caller: &Caller,
        name: String,
        lease: Uuid,
    ) -> Result<Committed<Released>, Refusal> {
        let ask = Ask::new("state:lock-release", "Lock", name.clone());
        let release = Release { name, owner: caller.actor().to_owned(), lease, which: Which::Any };
        let done = self.ledger.write(caller, &[ask], release).await?;
        self.metrics.count("lock-release");
        Ok(done)
    }
}

/// Whether a fencing token is that of a hold there is; checked in the transaction of the change it is sent with.
pub fn fenced<'a>(
    conn: &'a mut PgConnection,
    lock: &'a str,
    token: i64,
) -> BoxFuture<'a, Result<Option<Refusal>, sqlx::Error>> {
    Box::pin(async move {
        let (holds, newest) = rows::fenced(conn, lock, token).await?;
        Ok((!holds).then(|| {
            let detail = match newest {
                Some(newest) => format!("lock {lock} is held under token {newest}; {token} is of no use any more"),
                None => format!("nobody holds lock {lock}; token {token} is of no use"),
            };
            Refusal::new(&problem::PRECONDITION_FAILED, detail).with("lock", lock).with("fencing_token", newest)
        }))
    })
}

/// Names of the keys on a lease, as lists show them.
pub(super) fn named(keys: &[Vec<u8>]) -> Vec<serde_json::Value> {
    let shown = |key: &Vec<u8>| {
        let mut m = serde_json::Map::new();
        model::put_key(&mut m, key);
        m.into_iter().next().map(|(_, v)| v).unwrap_or_default()
    };
    keys.iter().map(shown).collect()
}
