//! When: the newest entry that is older than a moment, how long ago this daemon knew what is newest, whether a lock is held now.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::Deserialize;
use sqlx::PgConnection;

use crate::kernel::{Refusal, Timestamp};

use super::{Ledger, Shared, store};

#[derive(Deserialize)]
struct Leaf {
    time: Timestamp,
}

/// The newest entry of that time or earlier; `None` if there is none among those that are attached. An entry's time is never
/// earlier than that of the one before it, so a few looks find it.
///
/// # Errors
/// When the database cannot be read.
pub async fn newest_at(conn: &mut PgConnection, time: Timestamp) -> Result<Option<i64>, sqlx::Error> {
    let mut low = store::attached(conn).await?.start;
    let mut high = store::head_index(conn).await? + 1;
    let first = low;
    while low < high {
        let middle = low + (high - low) / 2;
        let leaf = store::leaf(conn, middle).await?;
        let leaf: Leaf = serde_json::from_slice(&leaf).map_err(|e| sqlx::Error::Decode(Box::new(e)))?;
        if leaf.time <= time { low = middle + 1 } else { high = middle }
    }
    Ok((low > first).then_some(low - 1))
}

impl Shared {
    /// This daemon has everything there was at this time of its clock: before it was looked, not after.
    pub(super) fn confirm(&self, at: Duration) {
        self.confirmed.fetch_max(u64::try_from(at.as_millis()).unwrap_or(u64::MAX), Ordering::AcqRel);
    }
}

impl Ledger {
    /// Whether a fencing token is good now. Each change that is sent with one is checked in its own commit; this is for those
    /// that share an entry with others.
    ///
    /// # Errors
    /// 412 when it is not.
    pub async fn fenced(&self, lock: &str, token: i64) -> Result<(), Refusal> {
        let shared = &self.0.shared;
        let mut conn = shared.store.reader().acquire().await.map_err(|e| shared.store.refusal(e))?;
        match (shared.means.fencing)(&mut conn, lock, token).await.map_err(|e| shared.store.refusal(e))? {
            None => Ok(()),
            Some(refusal) => {
                shared.means.fenced.inc();
                Err(refusal)
            }
        }
    }

    /// How long ago what this daemon knows was known to be the newest: what a stale read may lack is younger than that.
    #[must_use]
    pub fn staleness(&self) -> Duration {
        let then = Duration::from_millis(self.0.shared.confirmed.load(Ordering::Acquire));
        self.0.shared.clock.elapsed().saturating_sub(then)
    }
}
