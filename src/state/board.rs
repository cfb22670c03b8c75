//! Who is to hear that a lock has changed hands, or that their turn has come, on this daemon.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;
use uuid::Uuid;

use crate::ledger::{Touch, What};

use super::locks::{LOCK, TURN};

/// Wakes whoever watches the holder of a lock, and of those who wait for it only the one who is meant.
#[derive(Default)]
pub(super) struct Board(Mutex<HashMap<Topic, watch::Sender<()>>>);

/// Kind and key of a touch.
type Topic = (&'static str, Vec<u8>);

impl Board {
    /// Hears of a lock's changes.
    pub fn lock(&self, name: &str) -> watch::Receiver<()> {
        self.hear((LOCK, name.as_bytes().to_vec()))
    }

    /// Hears of the turn of who waits by this lease.
    pub fn turn(&self, lease: Uuid) -> watch::Receiver<()> {
        self.hear((TURN, lease.as_bytes().to_vec()))
    }

    fn hear(&self, topic: Topic) -> watch::Receiver<()> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(topic).or_insert_with(|| watch::channel(()).0).subscribe()
    }

    /// Takes note of changes.
    pub fn changed(&self, touched: &[(i64, Touch)]) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever nobody hears any more goes.
        all.retain(|_, tell| tell.receiver_count() > 0);
        for (_, t) in touched {
            let Some(kind) = [LOCK, TURN].into_iter().find(|kind| t.kind == *kind) else { continue };
            if let What::Key(key) = &t.what
                && let Some(tell) = all.get(&(kind, key.clone()))
            {
                tell.send_replace(());
            }
        }
    }
}
