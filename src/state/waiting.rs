//! Waiting for a lock: a place in its queue that this daemon keeps alive, and gives up when the caller goes.

use std::time::Duration;

use sqlx::PgConnection;
use uuid::Uuid;

use crate::kernel::web::{Ask, Caller};
use crate::kernel::{BoxFuture, Refusal, ids, problem};
use crate::ledger::Committed;

use super::leases::{End, Ended, Grant, Lease, Renew, chosen, seconds};
use super::locks::{Acquire, Asked, Held, Hold, Release, Released, Terms, Waiter, Which, refused, taken};
use super::places::Place;
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

/// What asking came to.
enum Got {
    /// It is held.
    Held(i64, Held),
    /// It was asked for before, by this lease, and was waited for.
    Replayed(Uuid),
}

/// What is waited for, and until when by the daemon's own clock.
struct Waiting<'a> {
    name: &'a str,
    lease: Uuid,
    ttl_ms: i64,
    until: Duration,
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
        let own = |lease: Uuid| (lease, wish.lease.is_none().then_some(wish.ttl_ms));
        let by = own(wish.lease.unwrap_or_else(|| ids::new_id(self.clock.now())));
        match self.ask(caller, &wish, by, until).await? {
            Got::Held(index, held) => Ok((index, held)),
            // Somebody waited for this once, under the same idempotency key, by this lease: it is what is held or waited for by
            // now. If it has ended, whoever waited has gone, and it is asked for anew; the next to ask finds it again.
            Got::Replayed(lease) => {
                let there = self.lease(lease).await?.is_some();
                let by = if there { (lease, None) } else { own(lease) };
                match self.ask(&caller.unvoiced(), &wish, by, until).await? {
                    Got::Held(index, held) => Ok((index, held)),
                    Got::Replayed(_) => Err(Refusal::internal("without a key nothing is replayed")),
                }
            }
        }
    }

    /// Asks once, by this lease, which is to be granted with a time to live if there is one given.
    async fn ask(
        &self,
        caller: &Caller,
        wish: &Wish,
        (lease, grant): (Uuid, Option<i64>),
        until: Duration,
    ) -> Result<Got, Refusal> {
        let ask = [Ask::new("state:lock-acquire", "Lock", wish.name.clone())];
        let mut news = self.hub.locks.turn(lease);
        // Taken before it is asked for: whoever goes while that is on its way gives it up as well.
        let mut place = (!wish.wait.is_zero()).then(|| Place::take(self, &wish.name, lease, caller.actor()));
        let acquire = Acquire {
            name: wish.name.clone(),
            owner: caller.actor().to_owned(),
            lease,
            ttl_ms: grant,
            terms: wish.terms,
            value: wish.value.clone(),
            asker: place.as_ref().map(Place::asker),
        };
        let done = self.ledger.write(caller, &ask, acquire).await?;
        self.metrics.count("lock-acquire");
        let Asked { lease: by, held, ttl_ms } = done.value;
        if let Some(held) = held {
            place.iter_mut().for_each(Place::won);
            return Ok(Got::Held(done.index, held));
        }
        let Some(mut place) = place.filter(|_| !done.replayed) else { return Ok(Got::Replayed(by)) };
        let waiting = Waiting { name: &wish.name, lease, ttl_ms, until };
        let got = self.wait(caller, &waiting, &mut place, &mut news).await;
        got.map(|(index, held)| Got::Held(index, held))
    }

    async fn wait(
        &self,
        caller: &Caller,
        waiting: &Waiting<'_>,
        place: &mut Place,
        news: &mut tokio::sync::watch::Receiver<()>,
    ) -> Result<(i64, Held), Refusal> {
        let Waiting { name, lease, ttl_ms, until } = *waiting;
        let closing = self.ledger.closing();
        let pulse = Duration::from_millis(u64::try_from(ttl_ms / 3).unwrap_or(0));
        loop {
            news.mark_unchanged();
            let mut conn = self.connection().await?;
            let holds = rows::holds(&mut conn, name).await.map_err(|e| self.store.refusal(e))?;
            drop(conn);
            if let Some(mine) = holds.iter().find(|h| h.lease == lease) {
                place.won();
                return Ok((mine.token.max(self.ledger.index()), Held::new(name, mine)));
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
                if place.withdraw().await? {
                    return Err(taken(name, &holds, queue.len().saturating_sub(1)));
                }
                continue;
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
