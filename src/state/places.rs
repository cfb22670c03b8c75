//! Places in the queues of locks, as the requests that wait on this daemon share them.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use uuid::Uuid;

use crate::kernel::supervisor;
use crate::kernel::web::Caller;
use crate::kernel::{Refusal, problem};

use super::State;
use super::locks::{Release, Which};

/// Before each attempt to give up the place of who has gone.
const ATTEMPTS: [Duration; 6] = [
    Duration::ZERO,
    Duration::from_millis(300),
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(10),
    Duration::from_secs(30),
];

/// A lock, the lease it is waited for by, and whose that is.
type Spot = (String, Uuid, String);

/// Requests of one client that wait here by one lease for one lock.
#[derive(Clone, Copy, Debug)]
struct Group {
    /// What they call themselves.
    asker: Uuid,
    /// How many they are.
    waiting: usize,
    /// Whether one of them has the place.
    placed: bool,
}

/// All of them.
#[derive(Default)]
pub(super) struct Places(Mutex<HashMap<Spot, Group>>);

impl Places {
    fn all(&self) -> MutexGuard<'_, HashMap<Spot, Group>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(&self, spot: &Spot) -> Uuid {
        let mut all = self.all();
        let new = || Group { asker: Uuid::new_v4(), waiting: 0, placed: false };
        let group = all.entry(spot.clone()).or_insert_with(new);
        group.waiting += 1;
        group.asker
    }

    fn placed(&self, spot: &Spot, asker: Uuid) {
        if let Some(group) = self.all().get_mut(spot).filter(|g| g.asker == asker) {
            group.placed = true;
        }
    }

    /// One goes. Of the last, whether they have a place to give up; who asks after that is another asker.
    fn leave(&self, spot: &Spot, asker: Uuid) -> Option<bool> {
        let mut all = self.all();
        let group = all.get_mut(spot).filter(|g| g.asker == asker)?;
        group.waiting -= 1;
        if group.waiting > 0 {
            return None;
        }
        all.remove(spot).map(|g| g.placed)
    }

    /// One was told that it holds the lock: none of the others may take that back.
    fn told(&self, spot: &Spot, asker: Uuid) {
        let mut all = self.all();
        if all.get(spot).is_some_and(|g| g.asker == asker) {
            all.remove(spot);
        }
    }
}

/// What one has to do with its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stake {
    /// It is one of those who wait.
    Shared,
    /// It was the last of them, and has not given the place up yet.
    Last,
    /// Nothing any more.
    None,
}

/// What became of who waits no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parted {
    /// The place is given up.
    Withdrawn,
    /// Others have it, here or on another daemon.
    Left,
    /// The lock came to be held at the last moment.
    Held,
}

/// A request's share of a place. When it is dropped before it is settled, the caller has gone: the last gives the place up.
pub(super) struct Place {
    state: State,
    spot: Spot,
    asker: Uuid,
    stake: Stake,
    /// What asking came to was heard.
    heard: bool,
    counted: bool,
}

impl Place {
    /// To be taken before it is asked for: who goes while that is on its way gives it up as well.
    pub fn take(state: &State, name: &str, lease: Uuid, owner: &str) -> Self {
        let spot = (name.to_owned(), lease, owner.to_owned());
        let asker = state.places.join(&spot);
        Self { state: state.clone(), spot, asker, stake: Stake::Shared, heard: false, counted: false }
    }

    pub fn asker(&self) -> Uuid {
        self.asker
    }

    /// It is in the queue, and waits.
    pub fn waits(&mut self) {
        self.state.places.placed(&self.spot, self.asker);
        self.state.metrics.waiting.inc();
        (self.heard, self.counted) = (true, true);
    }

    /// It was refused, or another request's outcome was told again: nothing came of it.
    pub fn refused(&mut self) {
        self.heard = true;
    }

    /// Its caller is told that it holds the lock.
    pub fn won(&mut self) {
        self.state.places.told(&self.spot, self.asker);
        self.stake = Stake::None;
    }

    /// There is no place any more.
    pub fn lost(&mut self) {
        self.state.places.leave(&self.spot, self.asker);
        self.stake = Stake::None;
    }

    /// Whether the place is to be given up, by who asks.
    fn parts(&mut self) -> bool {
        if self.stake == Stake::Shared {
            let placed = self.state.places.leave(&self.spot, self.asker);
            let last = placed.is_some_and(|placed| placed || !self.heard);
            self.stake = if last { Stake::Last } else { Stake::None };
        }
        self.stake == Stake::Last
    }

    /// Waits no more.
    pub async fn withdraw(&mut self) -> Result<Parted, Refusal> {
        if !self.parts() {
            return Ok(Parted::Left);
        }
        let release = self.release(Which::Place(self.asker));
        let parted = match self.state.ledger.write(&Caller::daemon("state"), &[], release).await {
            Ok(_) => Parted::Withdrawn,
            Err(r) if r.problem() == &problem::CONFLICT => return Ok(Parted::Held),
            Err(r) if r.problem() == &problem::NOT_FOUND => Parted::Left,
            Err(r) => return Err(r),
        };
        self.stake = Stake::None;
        Ok(parted)
    }

    fn release(&self, which: Which) -> Release {
        let (name, lease, owner) = self.spot.clone();
        Release { name, owner, lease, which }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.counted {
            self.state.metrics.waiting.dec();
        }
        if self.parts() {
            // If it holds the lock by now, nobody will hear of it.
            let (state, which, heard) = (self.state.clone(), Which::Asked(self.asker), self.heard);
            let (name, lease, owner) = self.spot.clone();
            supervisor::detach(async move {
                for (attempt, after) in ATTEMPTS.into_iter().enumerate() {
                    tokio::time::sleep(after).await;
                    let release = Release { name: name.clone(), owner: owner.clone(), lease, which };
                    match state.ledger.write(&Caller::daemon("state"), &[], release).await {
                        // The database, or the queue of changes, is away for a moment.
                        Err(r) if r.problem().status >= 429 => {}
                        // What was still on its way may come yet.
                        Err(r) if r.problem() == &problem::NOT_FOUND && !heard && attempt < 2 => {}
                        done => return done.is_ok(),
                    }
                }
                false
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_gives_a_place_up_and_nobody_takes_back_what_one_was_told() {
        let places = Places::default();
        let spot = ("l".to_owned(), Uuid::new_v4(), "c".to_owned());
        let one = places.join(&spot);
        assert_eq!(places.join(&spot), one);
        places.placed(&spot, one);
        assert_eq!(places.leave(&spot, one), None);
        assert_eq!(places.leave(&spot, one), Some(true));
        let two = places.join(&spot);
        assert_ne!(two, one, "who comes after the last is another");
        assert_eq!(places.leave(&spot, one), None, "who has gone has no say");
        let other = (spot.0.clone(), spot.1, "another".to_owned());
        assert_ne!(places.join(&other), two, "nor has another client");
        assert_eq!(places.leave(&other, two), None);
        assert_eq!(places.join(&spot), two);
        places.told(&spot, two);
        assert_eq!(places.leave(&spot, two), None);
        let three = places.join(&spot);
        assert_eq!(places.leave(&spot, three), Some(false), "nothing was placed");
    }
}
