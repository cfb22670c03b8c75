//! A moment of patience before a turn.
//!
//! Callers who were answered together come back together, a few at a time. A turn that sets out with the first of them makes
//! the others wait for all of it: with eight callers, turns of one and of seven took each other's place, and everyone waited
//! for two. So a turn waits until as many have come as the last one took, and never longer than a part of a commit.

use std::time::Duration;

use tokio::sync::mpsc;

use crate::kernel::Clock;

/// At most.
const PATIENCE: Duration = Duration::from_micros(150);
/// So many turns of one in a row are those of somebody who writes alone.
const CALM: usize = 8;
/// Between two looks.
const PAUSE: Duration = Duration::from_micros(20);

/// How many to wait for.
#[derive(Default)]
pub(super) struct Gather {
    last: usize,
    /// How many turns in a row were of one.
    single: usize,
}

impl Gather {
    /// A turn took so many.
    pub fn took(&mut self, jobs: usize) {
        self.last = jobs;
        self.single = if jobs <= 1 { self.single.saturating_add(1) } else { 0 };
    }

    /// Whether somebody writes alone. One turn of one says little: several callers make such a turn too, when they are slow to
    /// come back, and who is then served on the spot keeps the others from gathering.
    pub fn calm(&self) -> bool {
        self.single >= CALM
    }

    /// Waits until as many wait as the last turn took. Whoever is alone waits for nobody. The thread is the writer's own, and
    /// the timers of the runtime are too coarse, so it is the thread that sleeps.
    pub fn wait<J>(&self, queue: &mpsc::Receiver<J>, clock: &Clock) {
        // One is already in hand.
        if queue.len() + 1 >= self.last {
            return;
        }
        let began = clock.elapsed();
        while queue.len() + 1 < self.last && clock.elapsed().saturating_sub(began) < PATIENCE {
            std::thread::sleep(PAUSE);
        }
    }
}
