//! A bundle that decides for a part of the subjects, and stops by itself when it denies what the active bundle permits.
//!
//! Whether denials jump is not told by comparing two crowds: whatever the canary denies is put to the active bundle too, and
//! what that would have permitted is a *new denial*. Each daemon counts for itself, over a window of two halves.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::config::Governance as Settings;
use crate::kernel::crypto;
use crate::kernel::web::EntityName;

use super::engine::Force;

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub decisions: u64,
    pub new_denials: u64,
}

/// Two halves of a window: the one that is filled, and the one before.
#[derive(Debug, Default)]
struct Window {
    began: Duration,
    now: Tally,
    before: Tally,
}

impl Window {
    fn turn(&mut self, at: Duration, half: Duration) {
        let past = at.saturating_sub(self.began);
        if past < half {
            return;
        }
        self.before = if past < half * 2 { self.now } else { Tally::default() };
        (self.now, self.began) = (Tally::default(), at);
    }
}

/// A bundle that decides for a part of the subjects.
pub(super) struct Canary {
    pub force: Arc<Force>,
    pub bundle: String,
    /// Subjects of a hundred.
    pub percent: f64,
    /// New denials, of a hundred decisions, above which it stops.
    pub stop_at: f64,
    window: Mutex<Window>,
}

impl Canary {
    pub fn new(force: Arc<Force>, bundle: String, percent: f64, stop_at: f64) -> Self {
        Self { force, bundle, percent, stop_at, window: Mutex::default() }
    }

    /// Whether it decides for this subject: the same for it each time, on each daemon.
    pub fn takes(&self, subject: &EntityName) -> bool {
        // Who may do what in the daemon itself must not depend on a hash, nor on what nobody approved.
        if subject.kind.starts_with("Sop::") {
            return false;
        }
        let hash = crypto::hash_tuple([self.bundle.as_str(), &subject.kind, &subject.id]);
        let place = u64::from_be_bytes([hash[0], hash[1], hash[2], hash[3], hash[4], hash[5], hash[6], hash[7]]);
        ((place % 1_000_000) as f64) < self.percent * 10_000.0
    }

    /// It decided, at this time.
    pub fn note(&self, settings: &Settings, at: Duration, newly_denied: bool) {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        window.turn(at, settings.canary_window.get() / 2);
        window.now.decisions += 1;
        window.now.new_denials += u64::from(newly_denied);
    }

    /// What it came to within the window, if that is too much.
    pub fn jumped(&self, settings: &Settings, at: Duration) -> Option<Tally> {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        window.turn(at, settings.canary_window.get() / 2);
        let all = Tally {
            decisions: window.now.decisions + window.before.decisions,
            new_denials: window.now.new_denials + window.before.new_denials,
        };
        let enough = all.decisions >= u64::from(settings.canary_decisions);
        (enough && all.new_denials as f64 * 100.0 > self.stop_at * all.decisions as f64).then_some(all)
    }
}
