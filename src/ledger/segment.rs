//! Segments: many records under one entry, each with a receipt of its own. The tree over them has the shape of RFC 6962; its
//! leaves are `SHA-256(0x02 || record)`.

use crate::kernel::crypto::{self, Domain, Hash};

use super::entry::Segment;
use super::merkle;

/// The hash of a record.
#[must_use]
pub fn record(bytes: &[u8]) -> Hash {
    crypto::hash(Domain::Record, &[bytes])
}

/// The segment over these records, in order.
#[must_use]
pub fn over<'a>(records: impl IntoIterator<Item = &'a [u8]>) -> Segment {
    let hashes: Vec<Hash> = records.into_iter().map(record).collect();
    Segment { root: merkle::root(&hashes), count: hashes.len() }
}

/// The path from record `position` to the root of `hashes`.
#[must_use]
pub fn path(hashes: &[Hash], position: usize) -> Vec<Hash> {
    let at = |n: u64| usize::try_from(n).unwrap_or(usize::MAX).min(hashes.len());
    merkle::inclusion(position as u64, hashes.len() as u64)
        .into_iter()
        .map(|(start, end)| merkle::root(&hashes[at(start)..at(end)]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_record_of_a_segment_has_a_path_to_its_root() {
        for n in 1..20usize {
            let records: Vec<Vec<u8>> = (0..n).map(|i| format!("record {i}").into_bytes()).collect();
            let segment = over(records.iter().map(Vec::as_slice));
            let hashes: Vec<Hash> = records.iter().map(|r| record(r)).collect();
            for (i, hash) in hashes.iter().enumerate() {
                assert!(merkle::verify_inclusion(hash, i as u64, n as u64, &path(&hashes, i), &segment.root));
            }
        }
    }
}
