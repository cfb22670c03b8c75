//! Entries that carry a signal, for who opens incidents of them.

use crate::kernel::Refusal;

use super::{Ledger, Signal, store};

/// Entries looked through for signals at a time, and signals taken at a time.
const SIGNALS_SPAN: i64 = 50_000;
const SIGNALS_MOST: i64 = 1000;

/// An entry that carries a signal.
pub struct Signalled {
    /// Its index.
    pub index: i64,
    /// The signal.
    pub signal: Signal,
    /// Its reason, or what it is about.
    pub summary: String,
}

/// What is read of such an entry's details.
#[derive(serde::Deserialize)]
struct Signalling {
    signal: Option<Signal>,
    reason: Option<String>,
    #[serde(default)]
    resource: String,
}

impl Ledger {
    /// Entries after `after` that carry a signal, at most a thousand: index, signal, what the entry says of it. And up to which
    /// index there are no others.
    ///
    /// # Errors
    /// 503 when the database is away.
    pub async fn signals(&self, after: i64) -> Result<(Vec<Signalled>, i64), Refusal> {
        let refusal = |e| self.0.shared.store.refusal(e);
        let to = self.index().min(after + SIGNALS_SPAN);
        let mut conn = self.0.shared.store.reader().acquire().await.map_err(refusal)?;
        let found = store::signals(&mut conn, after, to, SIGNALS_MOST).await.map_err(refusal)?;
        let full = found.len() as i64 == SIGNALS_MOST;
        let to = if full { found.last().map_or(to, |(index, _)| *index) } else { to };
        let read = |(index, details): (i64, Vec<u8>)| {
            let details: Signalling = serde_json::from_slice(&details).ok()?;
            let summary = details.reason.unwrap_or(details.resource);
            Some(Signalled { index, signal: details.signal?, summary })
        };
        Ok((found.into_iter().filter_map(read).collect(), to))
    }
}
