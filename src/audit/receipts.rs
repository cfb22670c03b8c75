//! Receipts and consistency: what a client keeps, and can check without us.

use std::sync::Arc;
use std::time::Duration;

use crate::kernel::crypto::{self, Hash};
use crate::kernel::web::{Ask, Caller};
use crate::kernel::{Refusal, problem};
use crate::ledger::entry::commitment;
use crate::ledger::{Entry, TX, merkle};

use crate::store::Store;

use super::events::Records;
use super::model::Stored;
use super::proof::{Proof, RecordExtra};
use super::{Audit, events, store, tree};

/// A consistency proof between two sizes, each with its root.
pub struct Consistency {
    /// The older.
    pub from: (u64, Hash),
    /// The newer.
    pub to: (u64, Hash),
    /// The hashes (RFC 9162, 2.1.4.1).
    pub proof: Vec<Hash>,
}

impl Audit {
    /// The receipt of an entry, in the checkpoint of `size` entries or in the newest. Waits for one that covers it.
    ///
    /// # Errors
    /// 404 beyond the head, 503 when no checkpoint covers it in time.
    pub async fn receipt(
        &self,
        caller: &Caller,
        index: i64,
        size: Option<u64>,
        wait: Duration,
    ) -> Result<Proof, Refusal> {
        self.ledger.permit(caller, &[Ask::new("audit:receipt", "Entry", index.to_string())]).await?;
        let mut proof = self.proof(index, size, wait).await?;
        let mut conn = self.connection().await?;
        let leaf = store::leaves(&mut conn, proof.index, proof.index + 1).await.map_err(|e| self.store.refusal(e))?;
        proof.extra = leaf.into_iter().next().ok_or_else(|| self.no_longer(index))?;
        Ok(proof)
    }

    /// The receipt of a record of an entry's segment; recorded, for it shows the record.
    ///
    /// # Errors
    /// As [`receipt`](Self::receipt); 404 for an entry without records, 410 when they are no longer kept.
    pub async fn record_receipt(
        &self,
        caller: &Caller,
        index: i64,
        position: usize,
        wait: Duration,
    ) -> Result<Proof, Refusal> {
        let (records, stored) = self.segment(caller, index).await?;
        let root = stored.segment.as_deref().unwrap_or_default();
        let kept = events::pick(&records, position, index, root)?;
        let mut proof = self.proof(index, None, wait).await?;
        let (Some(salt), Some(details)) = (&stored.salt, &stored.details) else { return Err(self.erased(index)) };
        let extra = RecordExtra {
            commitment: crypto::base64(commitment(salt, details)),
            entry: crypto::base64(&stored.leaf),
            path: kept.path.iter().map(crypto::base64).collect(),
            position: position as u64,
            record: crypto::base64(&kept.record),
            records: kept.records as u64,
        };
        proof.extra = serde_json::to_vec(&extra).map_err(Refusal::internal)?;
        Ok(proof)
    }

    /// The records of an entry, in order; recorded.
    ///
    /// # Errors
    /// 404 for an entry without records, 410 when they are no longer kept.
    pub async fn records(&self, caller: &Caller, index: i64) -> Result<Vec<Vec<u8>>, Refusal> {
        self.segment(caller, index).await.map(|(records, _)| records)
    }

    async fn segment(&self, caller: &Caller, index: i64) -> Result<(Vec<Vec<u8>>, Stored), Refusal> {
        let permit = self.ledger.permit(caller, &[Ask::new("audit:read", "Entry", index.to_string())]).await?;
        let mut conn = self.connection().await?;
        let found = store::entries(&mut conn, &[index]).await.map_err(|e| self.store.refusal(e))?.pop();
        drop(conn);
        let stored = found.ok_or_else(|| Refusal::not_found(format!("entry {index}")))?;
        if stored.segment.is_none() {
            return Err(Refusal::not_found(format!("record of entry {index}: it does not stand for a segment")));
        }
        let records = records_of(&self.store, &self.records, &stored).await?;
        if records.is_empty() {
            return Err(Refusal::new(&problem::GONE, format!("the records of entry {index} are no longer kept")));
        }
        let entry = Entry::ok("audit:read", format!("entry/{index}")).change("records", records.len());
        self.ledger.record(caller, permit, entry).await?;
        Ok((records, stored))
    }

    /// An inclusion proof without what it proves.
    async fn proof(&self, index: i64, size: Option<u64>, wait: Duration) -> Result<Proof, Refusal> {
        if index < 0 || index > self.ledger.index() {
            return Err(Refusal::not_found(format!("entry {index}")));
        }
        let at = u64::try_from(index).unwrap_or(0);
        let least = size.map_or(at, |s| s.saturating_sub(1).max(at));
        if i64::try_from(least).unwrap_or(i64::MAX) > self.ledger.index() {
            return Err(Refusal::not_found(format!("size {}: the log is not as long yet", least + 1)));
        }
        let covered = tokio::time::timeout(wait, self.covered(least)).await;
        let (newest, note) =
            covered.map_err(|_| Refusal::unavailable(format!("no checkpoint covers entry {least} yet")))??;
        let mut conn = self.connection().await?;
        let refusal = |e| self.store.refusal(e);
        let (size, checkpoint) = match size.filter(|s| *s != newest) {
            None => (newest, note),
            Some(size) if size <= at => {
                return Err(Refusal::malformed(
                    "?size",
                    format!("a log of {size} entries does not hold entry {index}"),
                ));
            }
            // Any size was the log's once: its root is in the tiles, and signing it says nothing new.
            Some(size) => {
                let root = tree::root(&mut conn, size).await.map_err(refusal)?;
                (size, self.keys.sign(size, root))
            }
        };
        let path = tree::path(&mut conn, merkle::inclusion(at, size)).await.map_err(refusal)?;
        Ok(Proof { extra: Vec::new(), index: at, path, checkpoint })
    }

    /// What shows that the log of `to` entries (the newest checkpoint, if not given) extends that of `from`.
    ///
    /// # Errors
    /// 400 when `from` is above `to`, 404 beyond the newest checkpoint.
    pub async fn consistency(&self, caller: &Caller, from: u64, to: Option<u64>) -> Result<Consistency, Refusal> {
        self.ledger.permit(caller, &[Ask::new("audit:receipt", "Entry", "")]).await?;
        let mut conn = self.connection().await?;
        let refusal = |e| self.store.refusal(e);
        let newest = store::checkpoint(&mut conn).await.map_err(refusal)?.map_or(0, |c| c.size);
        let to = to.unwrap_or(newest);
        if to > newest {
            return Err(Refusal::not_found(format!("checkpoint of {to} entries: the newest has {newest}")));
        }
        if from > to {
            return Err(Refusal::malformed("?from", format!("from ({from}) is above to ({to})")));
        }
        let proof = if from == 0 || from == to { Vec::new() } else { merkle::consistency(from, to) };
        Ok(Consistency {
            from: (from, tree::root(&mut conn, from).await.map_err(refusal)?),
            to: (to, tree::root(&mut conn, to).await.map_err(refusal)?),
            proof: tree::path(&mut conn, proof).await.map_err(refusal)?,
        })
    }

    fn no_longer(&self, index: i64) -> Refusal {
        Refusal::new(&problem::GONE, format!("entry {index} is in a part of the log that was taken away"))
    }

    fn erased(&self, index: i64) -> Refusal {
        Refusal::new(&problem::GONE, format!("the details of entry {index} were erased"))
    }
}

/// The records an entry stands for, from whichever room keeps them; none if they are no longer kept.
pub(super) async fn records_of(
    db: &Store,
    rooms: &[Arc<dyn Records>],
    stored: &Stored,
) -> Result<Vec<Vec<u8>>, Refusal> {
    let action = stored.found().action;
    // Records of a transaction are those of the events in it.
    if action == events::ACTION || action == TX {
        let mut conn = db.reader().acquire().await.map_err(|e| db.refusal(e))?;
        let packed = store::segments::records(&mut conn, stored.index).await.map_err(|e| db.refusal(e))?;
        // What cannot be taken apart is one record that is not what it was.
        return Ok(packed.map(|p| events::unpack(&p).unwrap_or_else(|| vec![p])).unwrap_or_default());
    }
    match rooms.iter().find(|r| r.action() == action) {
        Some(room) => room.of(stored.index).await,
        None => Ok(Vec::new()),
    }
}
