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
    of(records.into_iter().map(record).collect())
}

fn of(hashes: Vec<Hash>) -> Segment {
    Segment { root: merkle::root(&hashes), count: hashes.len(), hashes }
}

/// The segment over the records of both, one after the other.
#[must_use]
pub fn joined(first: Segment, second: &Segment) -> Segment {
    let mut hashes = first.hashes;
    hashes.extend_from_slice(&second.hashes);
    of(hashes)
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
    fn two_segments_become_the_one_over_all_their_records() {
        let (one, two) = (over([&b"a"[..]]), over([&b"b"[..], b"c"]));
        let all = over([&b"a"[..], b"b", b"c"]);
        let joined = joined(one, &two);
        assert_eq!((joined.root, joined.count), (all.root, 3));
    }

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
