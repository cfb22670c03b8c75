//! Decisions that were answered while the store was away: kept on this daemon's disk before the answer, and put into the record
//! once the store is back.
//!
//! Only what policies marked `@stale_ok("15m")` determine is answered so, and only as long as what this daemon knows is not older
//! than that. A frame is a length, a digest and the record; one that is torn was never answered. Whatever may already be in the
//! record (an answer of the store that was lost, a crash after the commit) is looked up by its id and not recorded twice.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde_json::Value;
use uuid::Uuid;

use crate::kernel::supervisor::TaskError;
use crate::kernel::web::Caller;
use crate::kernel::{Refusal, crypto};

use super::Governance;
use super::decisions::{self, Keep, Record};
use super::store::decisions as rows;

/// Records put into one segment.
const SEGMENT: usize = 1000;
/// Bytes of a record's digest that a frame carries.
const DIGEST: usize = 8;

/// The file that is written.
const OPEN: &str = "decisions";
/// The one that is being put into the record.
const CLOSED: &str = "decisions.closed";

/// What waits on disk.
pub(super) struct Spool {
    dir: PathBuf,
    limit: u64,
    open: Mutex<Option<(File, u64)>>,
}

impl Spool {
    /// In `DATA/spool`, of at most so many bytes.
    pub fn new(data: &Path, limit: u64) -> Self {
        Self { dir: data.join("spool"), limit, open: Mutex::default() }
    }

    /// Keeps records; durable on return.
    ///
    /// # Errors
    /// 503 when the disk does not take them, or there are too many.
    pub fn keep(&self, records: &[&Record]) -> Result<(), Refusal> {
        let mut framed = Vec::new();
        for record in records {
            framed.extend_from_slice(&u32::try_from(record.bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
            framed.extend_from_slice(&crypto::sha256(&record.bytes)[..DIGEST]);
            framed.extend_from_slice(&record.bytes);
        }
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let unavailable = |e: &dyn std::fmt::Display| {
            Refusal::unavailable(format!("the store is away, and decisions cannot be kept on this disk: {e}"))
        };
        if open.is_none() {
            *open = Some(self.make().map_err(|e| unavailable(&e))?);
        }
        let Some((file, size)) = open.as_mut() else { return Err(unavailable(&"it does not open")) };
        if *size + framed.len() as u64 > self.limit {
            return Err(unavailable(&"governance.spool_mb is used up"));
        }
        if let Err(e) = file.write_all(&framed).and_then(|()| file.sync_data()) {
            // What is behind a torn frame would not be found again: the next goes into another file, once this was read.
            let _ = file.set_len(*size);
            return Err(unavailable(&e));
        }
        *size += framed.len() as u64;
        Ok(())
    }

    fn make(&self) -> std::io::Result<(File, u64)> {
        fs::create_dir_all(&self.dir)?;
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(self.dir.join(OPEN))?;
        File::open(&self.dir)?.sync_all()?;
        let size = file.metadata()?.len();
        Ok((file, size))
    }

    /// Whether anything waits.
    pub fn waits(&self) -> bool {
        let there = |name: &str| fs::metadata(self.dir.join(name)).is_ok_and(|m| m.len() > 0);
        there(CLOSED) || there(OPEN)
    }

    /// What waits: of the file that was closed before, or else of the one that is written, which is closed now.
    fn take(&self) -> std::io::Result<Vec<Record>> {
        let closed = self.dir.join(CLOSED);
        if !closed.exists() {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            fs::rename(self.dir.join(OPEN), &closed)?;
            *open = None;
        }
        let mut bytes = Vec::new();
        File::open(&closed)?.read_to_end(&mut bytes)?;
        Ok(unframe(&bytes))
    }

    /// All that was taken is in the record.
    fn done(&self) -> std::io::Result<()> {
        fs::remove_file(self.dir.join(CLOSED))?;
        File::open(&self.dir)?.sync_all()
    }
}

/// The records of a file, as far as it is whole.
fn unframe(mut bytes: &[u8]) -> Vec<Record> {
    let mut records = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<4>() {
        let Some((digest, rest)) = rest.split_first_chunk::<DIGEST>() else { break };
        let Some((record, rest)) = rest.split_at_checked(u32::from_be_bytes(*length) as usize) else { break };
        if crypto::sha256(record)[..DIGEST] != digest[..] {
            break;
        }
        records.extend(read(record));
        bytes = rest;
    }
    records
}

fn read(bytes: &[u8]) -> Option<Record> {
    let value: Value = serde_json::from_slice(bytes).ok()?;
    let id = Uuid::parse_str(value["id"].as_str()?).ok()?;
    Some(Record { id, decision: value["decision"].as_bool()?, bytes: bytes.to_vec() })
}

impl Governance {
    /// Puts into the record what was decided while the store was away.
    pub(super) async fn reconcile(&self) -> Result<(), TaskError> {
        if !self.spool.waits() {
            self.rules.metrics.spooled.set(0);
            return Ok(());
        }
        // Nothing is closed before the store is known to be back.
        self.ledger.fence().await?;
        let waiting = self.spool.take()?;
        self.rules.metrics.spooled.set(i64::try_from(waiting.len()).unwrap_or(i64::MAX));
        for part in waiting.chunks(SEGMENT) {
            let mut missing = Vec::with_capacity(part.len());
            for record in part {
                if !self.is_recorded(record.id).await? {
                    missing.push(record.clone());
                }
            }
            if !missing.is_empty() {
                let done = self.ledger.write(&Caller::daemon("governance"), &[], Keep::late(&missing)).await?;
                tracing::info!(
                    index = done.index,
                    count = missing.len(),
                    "decisions made while the store was away are in the record"
                );
            }
        }
        self.spool.done()?;
        self.rules.metrics.spooled.set(0);
        Ok(())
    }

    async fn is_recorded(&self, id: Uuid) -> Result<bool, Refusal> {
        let mut conn = self.connection().await?;
        let around = rows::around(&mut conn, id).await.map_err(|e| self.store.refusal(e))?;
        let wanted = id.to_string();
        let has = |framed: &Vec<u8>| {
            let mut records = decisions::unframe(framed).into_iter();
            records.any(|r| read(r).is_some_and(|r| r.id.to_string() == wanted))
        };
        Ok(around.iter().any(|(_, framed)| has(framed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn record(n: u8) -> Record {
        let id = Uuid::from_bytes([n; 16]);
        let bytes = json!({"id": id.to_string(), "decision": n.is_multiple_of(2)}).to_string().into_bytes();
        Record { id, decision: n.is_multiple_of(2), bytes }
    }

    #[test]
    fn what_is_kept_is_found_again_and_a_torn_end_is_not() {
        let dir = std::env::temp_dir().join(format!("sop-spool-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        let spool = Spool::new(&dir, 1000);
        assert!(!spool.waits());
        spool.keep(&[&record(1), &record(2)]).unwrap();
        drop(spool);
        let file = dir.join("spool").join(OPEN);
        let whole = fs::read(&file).unwrap();
        fs::write(&file, [&whole[..], &whole[..whole.len() / 2 - 3]].concat()).unwrap();
        let spool = Spool::new(&dir, 1000);
        assert!(spool.waits());
        let ids: Vec<Uuid> = spool.take().unwrap().iter().map(|r| r.id).collect();
        assert_eq!(ids, [record(1).id, record(2).id]);
        spool.keep(&[&record(3)]).unwrap();
        assert_eq!(spool.take().unwrap().len(), 2, "what was closed first is not lost to what is new");
        spool.done().unwrap();
        assert_eq!(spool.take().unwrap()[0].id, record(3).id);
        spool.done().unwrap();
        assert!(!spool.waits());
        let full = spool.keep(&(0..20).map(|_| record(4)).collect::<Vec<_>>().iter().collect::<Vec<_>>());
        assert_eq!(full.unwrap_err().problem().status, 503);
        fs::remove_dir_all(&dir).unwrap();
    }
}
