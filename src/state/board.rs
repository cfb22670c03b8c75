//! Who is to hear that a lock has changed hands, on this daemon.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;

use crate::ledger::{Touched, What};

use super::locks::LOCK;

/// Wakes whoever waits for a lock or watches its holder.
#[derive(Default)]
pub(super) struct Board(Mutex<HashMap<Vec<u8>, watch::Sender<()>>>);

impl Board {
    /// Hears of a lock's changes.
    pub fn hear(&self, name: &str) -> watch::Receiver<()> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(name.as_bytes().to_vec()).or_insert_with(|| watch::channel(()).0).subscribe()
    }

    /// Takes note of changes.
    pub fn changed(&self, touched: &[(i64, Touched)]) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever nobody hears any more goes.
        all.retain(|_, tell| tell.receiver_count() > 0);
        for (_, t) in touched.iter().filter(|(_, t)| t.kind == LOCK) {
            if let What::Key(name) = &t.what
                && let Some(tell) = all.get(name)
            {
                tell.send_replace(());
            }
        }
    }
}
