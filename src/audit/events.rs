//! Events of the protocols: CloudEvents that the record keeps. What one request brings is one entry, over a segment of one
//! record for each event; it is durable before it is answered, and each record has a receipt of its own.

use serde::Serialize;
use sqlx::PgConnection;

use crate::kernel::cloudevents::Event;
use crate::kernel::web::{Ask, Caller};
use crate::kernel::{BoxFuture, Refusal, crypto};
use crate::ledger::hot::{At, Column, Decided, Fact, Hot, HotKey, Loaded, Row};
use crate::ledger::{Command, Committed, Entry, Failure, Segment, Tx, segment};

use super::Audit;
use super::store::segments as store;

/// The action under which events are recorded.
pub(super) const ACTION: &str = "audit:event";
/// Sources and types that an entry names; of more it says how many.
const NAMED: usize = 8;

/// What is kept of an event, and hashed: canonical JSON. The salt keeps its siblings' digests from being guessed when one
/// record is shown.
#[derive(Serialize)]
struct Record<'a> {
    actor: &'a str,
    /// As text: numbers of others need not survive being written again.
    event: &'a str,
    request_id: &'a str,
    salt: String,
}

/// Records, each with its length before it.
#[must_use]
pub(super) fn pack(records: &[Vec<u8>]) -> Vec<u8> {
    let mut out = Vec::with_capacity(records.iter().map(|r| r.len() + 4).sum());
    for record in records {
        out.extend_from_slice(&u32::try_from(record.len()).unwrap_or(u32::MAX).to_be_bytes());
        out.extend_from_slice(record);
    }
    out
}

/// The records that were packed; `None` if these are not such bytes.
#[must_use]
pub(super) fn unpack(mut bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut out = Vec::new();
    while !bytes.is_empty() {
        let (length, rest) = bytes.split_first_chunk::<4>()?;
        let (record, rest) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
        out.push(record.to_vec());
        bytes = rest;
    }
    Some(out)
}

impl Audit {
    /// Records events; each is decided by its source, all or none.
    ///
    /// # Errors
    /// 403 when one source is denied, 503 when the database is away.
    pub async fn keep(&self, caller: &Caller, events: &[Event]) -> Result<Committed<()>, Refusal> {
        let (asks, keep) = keeping(caller, events)?;
        let done = self.ledger.write(caller, &asks, keep).await?;
        self.metrics.events.inc_by(events.len() as u64);
        Ok(done)
    }
}

/// What keeping events asks, and the command.
pub(super) fn keeping(caller: &Caller, events: &[Event]) -> Result<(Vec<Ask>, Keep), Refusal> {
    let mut sources: Vec<&str> = events.iter().map(|e| e.source.as_str()).collect();
    sources.sort_unstable();
    sources.dedup();
    let asks: Vec<Ask> = sources.iter().map(|s| Ask::new(ACTION, "Event", *s)).collect();
    let actor = caller.actor();
    let record = |event: &Event| -> Result<Vec<u8>, Refusal> {
        let record = Record {
            actor,
            event: std::str::from_utf8(&event.bytes).map_err(Refusal::internal)?,
            request_id: &caller.request().id,
            salt: crypto::base64(crypto::random::<16>()?),
        };
        serde_json::to_vec(&record).map_err(Refusal::internal)
    };
    let records = events.iter().map(record).collect::<Result<Vec<_>, _>>()?;
    let segment = segment::over(records.iter().map(Vec::as_slice));
    let mut types: Vec<&str> = events.iter().map(|e| e.kind.as_str()).collect();
    types.sort_unstable();
    types.dedup();
    let resource = if let [one] = sources[..] { format!("event/{one}") } else { "event/".to_owned() };
    let entry =
        Entry::ok(ACTION, resource).change("sources", named(&sources)).change("types", named(&types)).segment(segment);
    Ok((asks, Keep { entry, records: pack(&records) }))
}

fn named(all: &[&str]) -> serde_json::Value {
    let more = (all.len() > NAMED).then(|| format!("and {} more", all.len() - NAMED));
    all.iter().take(NAMED).map(|s| (*s).to_owned()).chain(more).collect()
}

/// Keeps the records of one request. Hot: it decides on nothing.
pub(super) struct Keep {
    entry: Entry,
    records: Vec<u8>,
}

impl Command for Keep {
    type Out = ();

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<((), Entry), Failure> {
        let index = tx.index();
        store::keep(tx.write(), index, &self.records).await?;
        Ok(((), self.entry.clone()))
    }

    fn hot(&self) -> Option<HotKey> {
        Some(HotKey { kind: &SEGMENTS, key: Vec::new() })
    }

    fn decide(&mut self, _: Option<&Fact>, at: At) -> Result<Decided<()>, Refusal> {
        // Copied: a run that is rolled back decides again.
        let row: Row = Box::new((at.index, self.records.clone()));
        Ok(Decided { value: (), entry: self.entry.clone(), after: None, row: Some(row) })
    }
}

/// Records that commit with their entry.
struct Segments;

static SEGMENTS: Segments = Segments;

impl Hot for Segments {
    fn name(&self) -> &'static str {
        "audit-segment"
    }

    fn parts(&self, _: &[Column]) -> &'static str {
        store::SEGMENTS
    }

    fn columns(&self, rows: Vec<Row>) -> Vec<Column> {
        let mut entries: Vec<(i64, Vec<u8>)> = Vec::new();
        for (index, records) in rows.into_iter().filter_map(|r| r.downcast::<(i64, Vec<u8>)>().ok()).map(|r| *r) {
            match entries.last_mut() {
                // Of one transaction: records are packed one after the other.
                Some((last, kept)) if *last == index => kept.extend(records),
                _ => entries.push((index, records)),
            }
        }
        let (indexes, records) = entries.into_iter().unzip();
        vec![Column::Ints(indexes), Column::Bytes(records)]
    }

    fn load<'a>(&'a self, _: &'a mut PgConnection, _: &'a [Vec<u8>]) -> BoxFuture<'a, Loaded> {
        Box::pin(async { Ok(Vec::new()) })
    }
}

/// Where the records of a room's segments are: given at boot by the rooms above.
pub trait Records: Send + Sync {
    /// The action of the entries that stand for them.
    fn action(&self) -> &'static str;
    /// The records of entry `index`, in order; none if they are no longer kept.
    fn of(&self, index: i64) -> BoxFuture<'_, Result<Vec<Vec<u8>>, Refusal>>;
}

/// A record of a segment, with what proves that it belongs to it.
pub struct Kept {
    /// The exact bytes.
    pub record: Vec<u8>,
    /// From the record's sibling up to the segment's root.
    pub path: Vec<crypto::Hash>,
    /// How many records the segment has.
    pub records: usize,
}

/// Takes a record out of a segment, after the segment was held against the root its entry commits to.
///
/// # Errors
/// 404 beyond the last, 500 when the records are not those the entry commits to.
pub(super) fn pick(records: &[Vec<u8>], position: usize, index: i64, root: &[u8]) -> Result<Kept, Refusal> {
    let Segment { root: found, count, .. } = segment::over(records.iter().map(Vec::as_slice));
    if found != root {
        return Err(Refusal::internal(format!("the records of entry {index} are not those it commits to")));
    }
    let record = records.get(position).cloned();
    let record = record.ok_or_else(|| Refusal::not_found(format!("record {position} of entry {index}")))?;
    let hashes: Vec<crypto::Hash> = records.iter().map(|r| segment::record(r)).collect();
    Ok(Kept { record, path: segment::path(&hashes, position), records: count })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_comes_back_and_cut_bytes_do_not() {
        let records = vec![b"one".to_vec(), Vec::new(), vec![0; 300]];
        let packed = pack(&records);
        assert_eq!(unpack(&packed), Some(records));
        assert_eq!(unpack(&packed[..packed.len() - 1]), None);
        assert_eq!(unpack(&[0, 0]), None);
        assert_eq!(unpack(&[]), Some(Vec::new()));
    }

    #[test]
    fn a_record_is_picked_only_from_what_the_entry_commits_to() {
        let records: Vec<Vec<u8>> = (0..5).map(|i| format!("r{i}").into_bytes()).collect();
        let root = segment::over(records.iter().map(Vec::as_slice)).root;
        let kept = pick(&records, 3, 9, &root).unwrap();
        assert_eq!((kept.record.as_slice(), kept.records), (&b"r3"[..], 5));
        assert_eq!(pick(&records, 5, 9, &root).err().unwrap().problem().status, 404);
        let mut bad = records;
        bad[0][0] ^= 1;
        assert_eq!(pick(&bad, 3, 9, &root).err().unwrap().problem().status, 500);
    }
}
