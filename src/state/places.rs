//! Places in the queues of locks, as the requests that wait on this daemon share them.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use crate::kernel::supervisor;
use crate::kernel::web::Caller;
use crate::kernel::{Refusal, problem};

use super::State;
use super::locks::{Release, Which};

/// A lock, and the lease it is waited for by.
type Spot = (String, Uuid);

/// Requests that wait here by one lease for one lock: what they call themselves, and how many they are.
#[derive(Default)]
pub(super) struct Places(Mutex<HashMap<Spot, (Uuid, usize)>>);

impl Places {
    fn all(&self) -> MutexGuard<'_, HashMap<Spot, (Uuid, usize)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(&self, spot: &Spot) -> Uuid {
        let mut all = self.all();
        let (asker, waiting) = all.entry(spot.clone()).or_insert_with(|| (Uuid::new_v4(), 0));
        *waiting += 1;
        *asker
    }

    /// One goes; whether it was the last, who gives the place up. Who asks after that is another asker.
    fn leave(&self, spot: &Spot, asker: Uuid) -> bool {
        let mut all = self.all();
        let Some((_, waiting)) = all.get_mut(spot).filter(|(a, _)| *a == asker) else { return false };
        *waiting -= 1;
        let last = *waiting == 0;
        if last {
            all.remove(spot);
        }
        last
    }

    /// One was told that it holds the lock: none of the others may take that back.
    fn told(&self, spot: &Spot, asker: Uuid) {
        let mut all = self.all();
        if all.get(spot).is_some_and(|(a, _)| *a == asker) {
            all.remove(spot);
        }
    }
}

/// What one has to do with its place.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stake {
    /// It is one of those who wait.
    Shared,
    /// It was the last of them, and has not given the place up yet.
    Last,
    /// Nothing any more.
    None,
}

/// A request's place in a queue. When it is dropped before it is settled, the caller has gone: the last gives the place up.
pub(super) struct Place {
    state: State,
    owner: String,
    spot: Spot,
    asker: Uuid,
    stake: Stake,
}

impl Place {
    pub fn take(state: &State, name: &str, lease: Uuid, owner: &str) -> Self {
        let spot = (name.to_owned(), lease);
        let asker = state.places.join(&spot);
        state.metrics.waiting.inc();
        Self { state: state.clone(), owner: owner.to_owned(), spot, asker, stake: Stake::Shared }
    }

    pub fn asker(&self) -> Uuid {
        self.asker
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
            let last = self.state.places.leave(&self.spot, self.asker);
            self.stake = if last { Stake::Last } else { Stake::None };
        }
        self.stake == Stake::Last
    }

    /// Waits no more. False: it came to be held at the last moment.
    pub async fn withdraw(&mut self) -> Result<bool, Refusal> {
        if self.parts() {
            let release = self.release(Which::Place(self.asker));
            match self.state.ledger.write(&Caller::daemon("state"), &[], release).await {
                Err(r) if r.problem() == &problem::CONFLICT => return Ok(false),
                // Others have it, on another daemon, or it is gone.
                Err(r) if r.problem() == &problem::NOT_FOUND => {}
                Err(r) => return Err(r),
                Ok(_) => {}
            }
            self.stake = Stake::None;
        }
        Ok(true)
    }

    fn release(&self, which: Which) -> Release {
        Release { name: self.spot.0.clone(), owner: self.owner.clone(), lease: self.spot.1, which }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.state.metrics.waiting.dec();
        if self.parts() {
            // If it holds the lock by now, nobody will hear of it.
            let (state, release) = (self.state.clone(), self.release(Which::Asked(self.asker)));
            supervisor::detach(async move { state.ledger.write(&Caller::daemon("state"), &[], release).await.is_ok() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_gives_a_place_up_and_nobody_takes_back_what_one_was_told() {
        let places = Places::default();
        let spot = ("l".to_owned(), Uuid::new_v4());
        let one = places.join(&spot);
        assert_eq!(places.join(&spot), one);
        assert!(!places.leave(&spot, one));
        assert!(places.leave(&spot, one));
        let two = places.join(&spot);
        assert_ne!(two, one, "who comes after the last is another");
        assert!(!places.leave(&spot, one), "who has gone has no say");
        assert_eq!(places.join(&spot), two);
        places.told(&spot, two);
        assert!(!places.leave(&spot, two));
        assert!(places.all().is_empty());
    }
}
