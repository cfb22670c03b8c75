//! Verification with nothing but the log's public key: everything is derived again from the leaves, in one pass, and the
//! first thing that is wrong is named.

use serde::Deserialize;

use crate::kernel::crypto::{self, Domain, Hash};
use crate::ledger::entry;
use crate::ledger::merkle::Frontier;

use super::note::Checkpoint;
use super::tiles::WIDTH;

/// What is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    /// A leaf is not what was hashed, or not of the form an entry has.
    #[error("entry {0}: {1}")]
    Entry(u64, String),
    /// The details do not fit the commitment in the leaf.
    #[error("details of entry {0}: they are not what the entry commits to")]
    Details(u64),
    /// An entry is missing.
    #[error("index {0}: the entry is missing")]
    Index(u64),
    /// A tile is not what the leaves give.
    #[error("tile {0}: its hashes are not those of the entries")]
    Tile(String),
    /// The leaves do not give the root that was signed.
    #[error("root: the {0} entries do not give the root of the checkpoint")]
    Root(u64),
    /// The checkpoint is not signed by the key, or is no checkpoint.
    #[error("signature: {0}")]
    Signature(String),
    /// The log is smaller than one that was seen before, or another one.
    #[error("shrunk: {0}")]
    Shrunk(String),
}

/// A leaf, as its canonical form has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Leaf<'a> {
    action: &'a str,
    body: &'a str,
    outcome: &'a str,
    room: &'a str,
    time: &'a str,
    v: u32,
}

/// Checks a log leaf by leaf.
pub struct Verifier {
    checkpoint: Checkpoint,
    seen: Option<Checkpoint>,
    frontier: Frontier,
    /// A leaf that does not hash to what its tile says: which of the two is wrong shows at the end.
    suspect: Option<(u64, String)>,
    last_time: String,
    known: u64,
    details: u64,
    denied: u64,
}

/// What a verified log holds.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Verified {
    /// Its name.
    pub origin: String,
    /// Entries it has.
    pub entries: u64,
    /// Entries that were checked before, and are bound by their root.
    pub known: u64,
    /// Details checked against their entries.
    pub details: u64,
    /// Entries that record a denial.
    pub denied: u64,
}

impl Verifier {
    /// For the log that this checkpoint (already opened with the key) is of. `seen` is one that was seen before.
    ///
    /// # Errors
    /// When the log has shrunk or is another.
    pub fn new(checkpoint: Checkpoint, seen: Option<Checkpoint>) -> Result<Self, Wrong> {
        if let Some(seen) = &seen {
            if seen.size > checkpoint.size {
                return Err(Wrong::Shrunk(format!(
                    "it had {} entries before and has {} now",
                    seen.size, checkpoint.size
                )));
            }
            if seen.size == checkpoint.size && seen.root != checkpoint.root {
                return Err(Wrong::Shrunk(format!("at {} entries it had another root before", seen.size)));
            }
        }
        Ok(Self {
            checkpoint,
            seen,
            frontier: Frontier::default(),
            suspect: None,
            last_time: String::new(),
            known: 0,
            details: 0,
            denied: 0,
        })
    }

    /// Goes on after a checkpoint that was verified before: `nodes` are the roots of the perfect subtrees of its size, as the
    /// log has them now. They give its root, or the log's past is another.
    ///
    /// # Errors
    /// When the log has shrunk or is another.
    pub fn resume(checkpoint: Checkpoint, seen: Checkpoint, nodes: Vec<Hash>) -> Result<Self, Wrong> {
        let mut verifier = Self::new(checkpoint, Some(seen.clone()))?;
        let frontier = Frontier::from_nodes(nodes, seen.size).filter(|f| f.root() == seen.root);
        verifier.frontier = frontier.ok_or_else(|| {
            Wrong::Shrunk(format!("at {} entries it had another root before: its past was changed", seen.size))
        })?;
        verifier.known = seen.size;
        Ok(verifier)
    }

    /// Where the next entry belongs.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.frontier.size()
    }

    /// Takes the leaves of an entry bundle. `tile` are the hashes of the level 0 tile beside it, `place` its name.
    ///
    /// # Errors
    /// With the first thing that is wrong.
    pub fn bundle(&mut self, mut bundle: &[u8], tile: &[Hash], place: &str) -> Result<(), Wrong> {
        // Of the tile that the last run ended in the middle of, what is known is passed by.
        let known = usize::try_from(self.next() % WIDTH).unwrap_or(0);
        let mut at = 0;
        while !bundle.is_empty() {
            let index = self.next();
            let cut = || Wrong::Entry(index, "the bundle ends in the middle of it".to_owned());
            let (length, rest) = bundle.split_at_checked(2).ok_or_else(cut)?;
            let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
            let (leaf, rest) = rest.split_at_checked(length).ok_or_else(cut)?;
            bundle = rest;
            if at < known {
                at += 1;
                continue;
            }
            let hash = self.leaf(leaf)?;
            if tile.get(at) != Some(&hash) && self.suspect.is_none() {
                self.suspect = Some((index, place.to_owned()));
            }
            at += 1;
        }
        Ok(())
    }

    fn leaf(&mut self, bytes: &[u8]) -> Result<Hash, Wrong> {
        let index = self.next();
        let wrong = |what: &str| Wrong::Entry(index, what.to_owned());
        let leaf: Leaf<'_> = serde_json::from_slice(bytes).map_err(|e| wrong(&format!("it is no entry: {e}")))?;
        // No member of a leaf has a character that JSON escapes, so the canonical form is plain text.
        let canonical = format!(
            r#"{{"action":"{}","body":"{}","outcome":"{}","room":"{}","time":"{}","v":{}}}"#,
            leaf.action, leaf.body, leaf.outcome, leaf.room, leaf.time, leaf.v
        );
        if canonical.as_bytes() != bytes {
            return Err(wrong("it is not in canonical form"));
        }
        if leaf.time < self.last_time.as_str() {
            return Err(wrong("it is earlier than the entry before it"));
        }
        self.last_time.clear();
        self.last_time.push_str(leaf.time);
        self.denied += u64::from(leaf.outcome == "denied");
        let hash = crypto::hash(Domain::Leaf, &[bytes]);
        self.frontier.push(hash);
        if let Some(seen) = &self.seen
            && seen.size == self.frontier.size()
            && seen.root != self.frontier.root()
        {
            return Err(Wrong::Shrunk(format!(
                "at {} entries it had another root before: its past was changed",
                seen.size
            )));
        }
        Ok(hash)
    }

    /// Checks an entry's details against its leaf.
    ///
    /// # Errors
    /// When they are not what the leaf commits to.
    pub fn details(
        &mut self,
        index: u64,
        leaf: &[u8],
        salt: &[u8],
        details: &[u8],
        segment: Option<&Hash>,
    ) -> Result<(), Wrong> {
        let commits: Option<Vec<u8>> =
            serde_json::from_slice::<Leaf<'_>>(leaf).ok().and_then(|l| crypto::from_base64(l.body));
        let body = entry::body(&entry::commitment(salt, details), segment);
        if commits.as_deref() != Some(&body[..]) {
            // An entry that was changed no longer commits to its details: then it is the entry that is wrong.
            return Err(match &self.suspect {
                Some((suspect, _)) if *suspect == index => changed(index),
                _ => Wrong::Details(index),
            });
        }
        self.details += 1;
        Ok(())
    }

    /// Everything was given: the root must be the one that was signed.
    ///
    /// # Errors
    /// With the first thing that is wrong.
    pub fn finish(self) -> Result<Verified, Wrong> {
        if self.frontier.size() < self.checkpoint.size {
            return Err(Wrong::Index(self.frontier.size()));
        }
        let holds = self.frontier.size() == self.checkpoint.size && self.frontier.root() == self.checkpoint.root;
        match (holds, self.suspect) {
            (true, None) => Ok(Verified {
                origin: self.checkpoint.origin,
                entries: self.frontier.size(),
                known: self.known,
                details: self.details,
                denied: self.denied,
            }),
            (true, Some((_, tile))) => Err(Wrong::Tile(tile)),
            (false, Some((index, _))) => {
                Err(Wrong::Entry(index, "it does not hash to what its tile says: it was changed".to_owned()))
            }
            (false, None) => Err(Wrong::Root(self.frontier.size())),
        }
    }
}

fn changed(index: u64) -> Wrong {
    Wrong::Entry(index, "it does not hash to what its tile says: it was changed".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Timestamp;
    use crate::kernel::web::Caller;
    use crate::ledger::{Entry, Sealed, merkle};

    fn log(n: i64) -> (Vec<Sealed>, Checkpoint) {
        let all: Vec<Sealed> = (0..n)
            .map(|i| {
                let time = Timestamp::from_millis(1_700_000_000_000 + i);
                Entry::ok("state:put", format!("key/{i}")).seal(&Caller::daemon("t"), time, [7; 32])
            })
            .collect();
        let hashes: Vec<Hash> = all.iter().map(|s| s.hash).collect();
        let checkpoint = Checkpoint { origin: "log".into(), size: n as u64, root: merkle::root(&hashes) };
        (all, checkpoint)
    }

    fn verify(
        all: &[Sealed],
        hashes: &[Hash],
        checkpoint: &Checkpoint,
        seen: Option<Checkpoint>,
    ) -> Result<Verified, Wrong> {
        let mut v = Verifier::new(checkpoint.clone(), seen)?;
        for (n, chunk) in all.chunks(256).enumerate() {
            let bundle: Vec<u8> = chunk
                .iter()
                .flat_map(|s| [&u16::try_from(s.leaf.len()).unwrap().to_be_bytes()[..], &s.leaf].concat())
                .collect();
            v.bundle(&bundle, &hashes[n * 256..(n * 256 + chunk.len()).min(hashes.len())], &format!("0/{n:03}"))?;
        }
        for (i, s) in all.iter().enumerate() {
            v.details(i as u64, &s.leaf, &s.salt, &s.details, None)?;
        }
        v.finish()
    }

    fn hashes(all: &[Sealed]) -> Vec<Hash> {
        all.iter().map(|s| s.hash).collect()
    }

    #[test]
    fn a_log_verifies_and_each_kind_of_change_is_named() {
        let (all, checkpoint) = log(600);
        let h = hashes(&all);
        let fine = verify(&all, &h, &checkpoint, None).unwrap();
        assert_eq!((fine.entries, fine.details, fine.denied), (600, 600, 0));

        let mut bad = all.clone();
        let at = bad[300].leaf.windows(3).position(|w| w == b"put").unwrap();
        bad[300].leaf[at] = b'c';
        assert!(matches!(verify(&bad, &h, &checkpoint, None), Err(Wrong::Entry(300, _))));

        let mut bad = all.clone();
        bad[7].leaf.push(b' ');
        assert!(matches!(verify(&bad, &h, &checkpoint, None), Err(Wrong::Entry(7, _))));

        let mut bad = all.clone();
        bad[9].salt[3] ^= 1;
        assert_eq!(verify(&bad, &h, &checkpoint, None).unwrap_err(), Wrong::Details(9));

        let mut tiles = h.clone();
        tiles[299][0] ^= 1;
        assert_eq!(verify(&all, &tiles, &checkpoint, None).unwrap_err(), Wrong::Tile("0/001".into()));

        assert_eq!(verify(&all[..599], &h[..599], &checkpoint, None).unwrap_err(), Wrong::Index(599));

        let mut bad = all.clone();
        bad.swap(100, 101);
        assert!(
            matches!(verify(&bad, &hashes(&bad), &checkpoint, None), Err(Wrong::Entry(101, _))),
            "time runs backwards"
        );

        let forged = Checkpoint { root: [1; 32], ..checkpoint.clone() };
        assert_eq!(verify(&all, &h, &forged, None).unwrap_err(), Wrong::Root(600));

        let larger = Checkpoint { size: 601, ..checkpoint.clone() };
        assert!(matches!(verify(&all, &h, &checkpoint, Some(larger)), Err(Wrong::Shrunk(_))));
        let past = Checkpoint { size: 400, root: merkle::root(&h[..400]), ..checkpoint.clone() };
        assert!(verify(&all, &h, &checkpoint, Some(past.clone())).is_ok());
        let other = Checkpoint { root: [2; 32], ..past };
        assert!(matches!(verify(&all, &h, &checkpoint, Some(other)), Err(Wrong::Shrunk(_))));
    }
}
