//! Locks: held by a lease, passed on in order of asking, fenced by the index of their acquisition.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::kernel::{Refusal, problem};
use crate::ledger::{Command, Entry, Failure, Touch, Tx};

use super::leases::{self, Ended, seconds};
use super::store::leases::{self as lease_rows, Row};
use super::store::locks as rows;

/// The kind of touch of a lock: who holds it or waits for it has changed.
pub const LOCK: &str = "lock";
/// The kind of touch of a lease that waited for a lock: it holds the lock now, or waits no more.
pub const TURN: &str = "turn";
/// Who may wait for one lock at most.
const QUEUE: usize = 1000;

/// How a lock is shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Terms {
    /// With others who read.
    pub read: bool,
    /// With so many others, itself among them.
    pub slots: i64,
}

impl Terms {
    /// As the API has it.
    pub fn mode(self) -> &'static str {
        if self.read { "read" } else { "write" }
    }

    /// Whether these holders leave room.
    fn fits(self, holds: &[Hold]) -> bool {
        if self.read {
            holds.iter().all(|h| h.terms.read)
        } else {
            holds.iter().all(|h| !h.terms.read) && (holds.len() as i64) < self.slots
        }
    }
}

impl std::fmt::Display for Terms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self { read: true, .. } => f.write_str("reading"),
            Self { slots: 1, .. } => f.write_str("itself alone"),
            Self { slots, .. } => write!(f, "{slots} at once"),
        }
    }
}

/// One who holds a lock.
#[derive(Clone, Debug)]
pub(super) struct Hold {
    pub lease: Uuid,
    pub owner: String,
    pub token: i64,
    pub terms: Terms,
    pub value: Option<Vec<u8>>,
    pub ttl_ms: i64,
    /// Who waited for it, and gives it back should they go before they hear of it; `None`: nobody does.
    pub asker: Option<Uuid>,
}

/// One who waits for a lock.
#[derive(Clone, Debug)]
pub(super) struct Waiter {
    pub place: i64,
    pub lease: Uuid,
    pub owner: String,
    pub terms: Terms,
    pub value: Option<Vec<u8>>,
    /// Whose the place is.
    pub asker: Uuid,
}

/// A lock that is held, as its holder hears it
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = HeldLock)]
pub(super) struct Held {
    /// The lock
    pub name: String,
    /// The client that holds it
    pub holder: String,
    /// Goes into `If-Fencing-Token`; greater with each acquisition
    pub fencing_token: i64,
    /// The lease it is held by: renew it
    pub lease: Uuid,
    /// Seconds the lease lives without a renewal
    pub ttl: f64,
    /// What a leader says
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Object)]
    pub value: Option<Value>,
}

impl Held {
    pub fn new(name: &str, hold: &Hold) -> Self {
        Self {
            name: name.to_owned(),
            holder: hold.owner.clone(),
            fencing_token: hold.token,
            lease: hold.lease,
            ttl: seconds(hold.ttl_ms),
            value: said(hold.value.as_ref()),
        }
    }
}

/// What a leader says, as JSON.
pub(super) fn said(value: Option<&Vec<u8>>) -> Option<Value> {
    value.and_then(|bytes| serde_json::from_slice(bytes).ok())
}

/// The refusal of who cannot have it: who has it.
pub(super) fn taken(name: &str, holds: &[Hold], waiting: usize) -> Refusal {
    let detail = match newest(holds) {
        Some(h) => format!("lock {name} is held by {}; {waiting} wait for it", h.owner),
        None => format!("lock {name} is about to pass to who waits for it"),
    };
    refused(detail, holds, waiting)
}

fn newest(holds: &[Hold]) -> Option<&Hold> {
    holds.iter().max_by_key(|h| h.token)
}

/// A refusal for another reason, which says as well who has it.
pub(super) fn refused(detail: impl Into<String>, holds: &[Hold], waiting: usize) -> Refusal {
    let newest = newest(holds);
    let holder = |h: &Hold| json!({"holder": h.owner, "fencing_token": h.token, "mode": h.terms.mode()});
    let holders: Vec<Value> = holds.iter().map(holder).collect();
    Refusal::new(&problem::CONFLICT, detail)
        .with("holder", newest.map(|h| h.owner.clone()))
        .with("fencing_token", newest.map(|h| h.token))
        .with("holders", holders)
        .with("waiting", waiting)
}

/// Asks for a lock.
#[derive(Clone)]
pub(super) struct Acquire {
    pub name: String,
    pub owner: String,
    pub lease: Uuid,
    /// The lease is there already; otherwise one is granted, for so long, that ends with the lock.
    pub ttl_ms: Option<i64>,
    pub terms: Terms,
    pub value: Option<Vec<u8>>,
    /// Wait for it, as this asker.
    pub asker: Option<Uuid>,
    /// Only what is held or waited for by this lease already.
    pub resumes: bool,
}

/// What asking for a lock came to; `held` is missing of who waits.
#[derive(Serialize, Deserialize)]
pub(super) struct Asked {
    /// By which lease.
    #[serde(default)]
    pub lease: Option<Uuid>,
    pub held: Option<Held>,
    pub ttl_ms: i64,
}

impl Acquire {
    fn entry(&self, action: &'static str) -> Entry {
        let mut entry = Entry::ok(action, format!("lock/{}", self.name))
            .change("lease", self.lease.to_string())
            .touch(Touch::key(LOCK, self.name.as_bytes()));
        if self.terms.read {
            entry = entry.change("read", true);
        }
        if self.terms.slots > 1 {
            entry = entry.change("limit", self.terms.slots);
        }
        entry
    }

    /// The time to live of the lease it is to hang on.
    async fn lease(&self, tx: &mut Tx<'_>) -> Result<i64, Failure> {
        if let Some(ttl_ms) = self.ttl_ms {
            return Ok(ttl_ms);
        }
        let found = lease_rows::one(tx.read(), self.lease).await?.filter(|l| l.owner == self.owner);
        Ok(found.ok_or_else(|| leases::absent(self.lease))?.ttl_ms)
    }

    /// Grants the lease, if it is not there.
    async fn grant(&self, tx: &mut Tx<'_>) -> Result<(), sqlx::Error> {
        let Some(ttl_ms) = self.ttl_ms else { return Ok(()) };
        let (id, owner, index, renewed) = (self.lease, self.owner.clone(), tx.index(), tx.now());
        let lock = Some(self.name.clone());
        let row = Row { id, owner, ttl_ms, granted_index: index, beat: index, renewed, lock };
        lease_rows::grant(tx.write(), &row).await
    }

    /// A lease has one hold or place of a lock, on the terms it asked for; others are not to be had by asking once more.
    fn same(&self, terms: Terms, how: &str, holds: &[Hold], waiting: usize) -> Result<(), Refusal> {
        if terms == self.terms {
            return Ok(());
        }
        let (lease, name) = (self.lease, &self.name);
        let detail = format!("by lease {lease} lock {name} is {how} for {terms}; let go of it first");
        Err(refused(detail, holds, waiting).with("limit", terms.slots))
    }

    /// Whoever has it has it; a leader may say something else.
    async fn again(&self, tx: &mut Tx<'_>, mine: &Hold, ttl_ms: i64) -> Result<(Asked, Entry), Failure> {
        let hold = Hold { value: self.value.clone().or(mine.value.clone()), asker: None, ..mine.clone() };
        let asked = Asked { lease: Some(self.lease), held: Some(Held::new(&self.name, &hold)), ttl_ms };
        let says = hold.value != mine.value;
        // Who waited for it may have gone without hearing of it, and be about to give it back.
        if !says && (mine.asker.is_none() || mine.asker == self.asker) {
            return Ok((asked, Entry::nothing()));
        }
        rows::hold(tx.write(), &self.name, &hold).await?;
        Ok((asked, self.entry(if says { "state:lock-proclaim" } else { "state:lock-keep" })))
    }

    /// Whoever waits keeps the place; it is the last asker's, who may want to say something else as well.
    async fn wait_again(
        &self,
        tx: &mut Tx<'_>,
        mine: &Waiter,
        holds: &[Hold],
        waiting: usize,
        ttl_ms: i64,
    ) -> Result<(Asked, Entry), Failure> {
        let Some(asker) = self.asker else { return Err(taken(&self.name, holds, waiting).into()) };
        let asked = Asked { lease: Some(self.lease), held: None, ttl_ms };
        let value = self.value.clone().or(mine.value.clone());
        if mine.asker == asker && mine.value == value {
            return Ok((asked, Entry::nothing()));
        }
        let waiter = Waiter { asker, value, ..mine.clone() };
        rows::take_over(tx.write(), &self.name, &waiter).await?;
        Ok((asked, self.entry("state:lock-wait")))
    }
}

impl Command for Acquire {
    type Out = Asked;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Asked, Entry), Failure> {
        let holds = rows::holds(tx.read(), &self.name).await?;
        let queue = rows::queue(tx.read(), &self.name).await?;
        let own = |lease: Uuid, owner: &str| lease == self.lease && owner == self.owner;
        let (held, waits) =
            (holds.iter().find(|h| own(h.lease, &h.owner)), queue.iter().find(|w| own(w.lease, &w.owner)));
        if self.resumes && held.is_none() && waits.is_none() {
            let detail = "what was waited for under this idempotency key has ended; ask under another";
            return Err(refused(detail, &holds, queue.len()).into());
        }
        let ttl_ms = self.lease(tx).await?;
        if let Some(mine) = held {
            self.same(mine.terms, "held", &holds, queue.len())?;
            return self.again(tx, mine, ttl_ms).await;
        }
        if let Some(mine) = waits {
            self.same(mine.terms, "waited for", &holds, queue.len())?;
            return self.wait_again(tx, mine, &holds, queue.len(), ttl_ms).await;
        }
        let agreed = holds.iter().map(|h| h.terms).chain(queue.iter().map(|w| w.terms)).map(|t| t.slots).next();
        if let Some(slots) = agreed.filter(|slots| *slots != self.terms.slots) {
            let detail = format!("lock {} has a limit of {slots} while it is held or waited for", self.name);
            return Err(refused(detail, &holds, queue.len()).with("limit", slots).into());
        }
        let index = tx.index();
        let (lease, owner, terms, value) = (self.lease, self.owner.clone(), self.terms, self.value.clone());
        if queue.is_empty() && terms.fits(&holds) {
            self.grant(tx).await?;
            let hold = Hold { lease, owner, token: index, terms, value, ttl_ms, asker: None };
            rows::hold(tx.write(), &self.name, &hold).await?;
            let held = Some(Held::new(&self.name, &hold));
            return Ok((Asked { lease: Some(self.lease), held, ttl_ms }, self.entry("state:lock-acquire")));
        }
        let Some(asker) = self.asker.filter(|_| queue.len() < QUEUE) else {
            return Err(taken(&self.name, &holds, queue.len()).into());
        };
        self.grant(tx).await?;
        rows::enqueue(tx.write(), &self.name, &Waiter { place: index, lease, owner, terms, value, asker }).await?;
        Ok((Asked { lease: Some(self.lease), held: None, ttl_ms }, self.entry("state:lock-wait")))
    }
}

/// What letting go of a lock answers
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = ReleasedLock)]
pub(super) struct Released {
    /// The lock
    pub name: String,
    /// The token that is of no use any more; 0 of who only waited
    pub fencing_token: i64,
}

/// What is let go of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    /// Whatever there is.
    Any,
    /// What this asker waits for, or has been given and was not told of.
    Asked(Uuid),
    /// The place of this asker. What is held stays held.
    Place(Uuid),
}

impl Which {
    fn fits(self, asker: Option<Uuid>) -> bool {
        match self {
            Self::Any => true,
            Self::Asked(a) | Self::Place(a) => asker == Some(a),
        }
    }
}

/// Lets go of a lock, or of a place in its queue.
pub(super) struct Release {
    pub name: String,
    pub owner: String,
    pub lease: Uuid,
    pub which: Which,
}

impl Command for Release {
    type Out = Released;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Released, Entry), Failure> {
        let absent = || Refusal::not_found(format!("hold of lock {} by lease {}", self.name, self.lease));
        let holds = rows::holds(tx.read(), &self.name).await?;
        let hold = holds.iter().find(|h| h.lease == self.lease && h.owner == self.owner);
        if hold.is_some() && matches!(self.which, Which::Place(_)) {
            return Err(Refusal::new(&problem::CONFLICT, "it is held by now").into());
        }
        let queue = if hold.is_some() { Vec::new() } else { rows::queue(tx.read(), &self.name).await? };
        let waits = queue.iter().find(|w| w.lease == self.lease && w.owner == self.owner);
        let asker = hold.map(|h| h.asker).or(waits.map(|w| Some(w.asker)));
        if !asker.is_some_and(|asker| self.which.fits(asker)) {
            return Err(absent().into());
        }
        let released = Released { name: self.name.clone(), fencing_token: hold.map_or(0, |h| h.token) };
        let action = if hold.is_some() { "state:lock-release" } else { "state:lock-withdraw" };
        let entry = Entry::ok(action, format!("lock/{}", self.name)).change("lease", self.lease.to_string());
        let lease = lease_rows::one(tx.read(), self.lease).await?.ok_or_else(absent)?;
        // A lease that was made for the lock ends with it.
        if lease.lock.as_ref() == Some(&self.name) {
            let (_, entry): (Ended, Entry) = leases::end(tx, &lease, entry).await?;
            return Ok((released, entry));
        }
        match waits {
            Some(w) => rows::dequeue(tx.write(), &self.name, w.place).await?,
            None => rows::unhold(tx.write(), &self.name, self.lease).await?,
        }
        let passed = pass_on(tx, &self.name).await?;
        let entry = entry.touch(Touch::key(LOCK, self.name.as_bytes())).touch(turn(self.lease));
        Ok((released, passed.said(entry)))
    }
}

/// A lease ends: the locks it held or waited for, and to whom they passed.
pub(super) async fn lease_ended(tx: &mut Tx<'_>, lease: Uuid, entry: Entry) -> Result<(Vec<String>, Entry), Failure> {
    let names = rows::let_go(tx.write(), lease).await?;
    if names.is_empty() {
        return Ok((names, entry));
    }
    let mut passed = Passed::default();
    for name in &names {
        passed.0.extend(pass_on(tx, name).await?.0);
    }
    let entry = entry.change("locks", names.clone()).touch(turn(lease));
    let entry = names.iter().fold(entry, |e, name| e.touch(Touch::key(LOCK, name.as_bytes())));
    Ok((names, passed.said(entry)))
}

fn turn(lease: Uuid) -> Touch {
    Touch::key(TURN, lease.as_bytes())
}

/// To whom locks passed: owners and leases.
#[derive(Default)]
struct Passed(Vec<(String, Uuid)>);

impl Passed {
    /// Says so in the entry; each of them hears of it.
    fn said(self, entry: Entry) -> Entry {
        if self.0.is_empty() {
            return entry;
        }
        let (owners, leases): (Vec<String>, Vec<Uuid>) = self.0.into_iter().unzip();
        leases.into_iter().fold(entry.change("passed_to", owners), |e, lease| e.touch(turn(lease)))
    }
}

/// Gives a lock to those who wait for it, in order, as long as there is room; to whom.
async fn pass_on(tx: &mut Tx<'_>, name: &str) -> Result<Passed, Failure> {
    let (index, now) = (tx.index(), tx.now());
    let mut passed = Passed::default();
    let queue = rows::queue(tx.read(), name).await?;
    if queue.is_empty() {
        return Ok(passed);
    }
    let mut holds = rows::holds(tx.read(), name).await?;
    for waiter in queue {
        if !waiter.terms.fits(&holds) {
            break;
        }
        let Waiter { place, lease, owner, terms, value, asker } = waiter;
        rows::pass(tx.write(), name, place, index, now).await?;
        passed.0.push((owner.clone(), lease));
        holds.push(Hold { lease, owner, token: index, terms, value, ttl_ms: 0, asker: Some(asker) });
    }
    Ok(passed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(terms: &[(bool, i64)]) -> Vec<Hold> {
        let hold = |(read, slots): &(bool, i64)| Hold {
            lease: Uuid::nil(),
            owner: String::new(),
            token: 1,
            terms: Terms { read: *read, slots: *slots },
            value: None,
            ttl_ms: 0,
            asker: None,
        };
        terms.iter().map(hold).collect()
    }

    #[test]
    fn who_may_hold_together() {
        let fits = |read, slots, holds: &[(bool, i64)]| Terms { read, slots }.fits(&held(holds));
        assert!(fits(false, 1, &[]) && fits(true, 1, &[]) && fits(true, 1, &[(true, 1), (true, 1)]));
        assert!(!fits(false, 1, &[(false, 1)]) && !fits(true, 1, &[(false, 1)]) && !fits(false, 1, &[(true, 1)]));
        assert!(fits(false, 2, &[(false, 2)]) && !fits(false, 2, &[(false, 2), (false, 2)]));
    }
}
