//! Receipts: C2SP tlog-proof, a text that anyone can check with the log's public key.

use serde::{Deserialize, Serialize};

use crate::kernel::crypto::{self, Domain, Hash};
use crate::ledger::{entry, merkle, segment};

use super::note::{Checkpoint, VerifierKey};

const FIRST: &str = "c2sp.org/tlog-proof@v1";

/// An entry's inclusion in a signed checkpoint. `extra` carries what the leaf hash is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof {
    /// Bytes that a verifier needs to make the leaf hash: for a receipt, the leaf itself.
    pub extra: Vec<u8>,
    /// The entry's index.
    pub index: u64,
    /// From the leaf's sibling up.
    pub path: Vec<Hash>,
    /// The signed note, as the log served it.
    pub checkpoint: String,
}

impl Proof {
    /// The text.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = format!("{FIRST}\nextra {}\nindex {}\n", crypto::base64(&self.extra), self.index);
        for hash in &self.path {
            out.push_str(&crypto::base64(hash));
            out.push('\n');
        }
        out.push('\n');
        out.push_str(&self.checkpoint);
        out
    }

    /// Reads the text.
    ///
    /// # Errors
    /// With what is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (head, checkpoint) = text.split_once("\n\n").ok_or("a proof has lines, an empty line and a checkpoint")?;
        let mut lines = head.lines().peekable();
        if lines.next() != Some(FIRST) {
            return Err(format!("a proof begins with {FIRST}"));
        }
        let extra = match lines.peek().and_then(|l| l.strip_prefix("extra ")) {
            Some(extra) => {
                lines.next();
                crypto::from_base64(extra).ok_or("the extra line is not base64")?
            }
            None => Vec::new(),
        };
        let index = lines
            .next()
            .and_then(|l| l.strip_prefix("index "))
            .and_then(|n| n.parse().ok())
            .ok_or("there is no index line")?;
        let hash =
            |l: &str| crypto::from_base64(l).and_then(|h| h.try_into().ok()).ok_or_else(|| format!("{l} is no hash"));
        Ok(Self {
            extra,
            index,
            path: lines.map(hash).collect::<Result<_, String>>()?,
            checkpoint: checkpoint.to_owned(),
        })
    }

    /// Checks it with nothing but the log's key; answers the leaf it proves and the checkpoint it is proven in.
    ///
    /// # Errors
    /// With the first thing that is wrong.
    pub fn verify(&self, key: &VerifierKey) -> Result<(&[u8], Checkpoint), String> {
        self.verify_any(std::slice::from_ref(key))
    }

    /// The same with several keys, one of which signed.
    ///
    /// # Errors
    /// With the first thing that is wrong.
    pub fn verify_any(&self, keys: &[VerifierKey]) -> Result<(&[u8], Checkpoint), String> {
        let checkpoint = Checkpoint::open_any(&self.checkpoint, keys)?;
        self.holds(&self.extra, &checkpoint)?;
        Ok((&self.extra, checkpoint))
    }

    /// Checks the receipt of a record with nothing but the log's key; answers the leaf, the record and the checkpoint.
    ///
    /// # Errors
    /// With the first thing that is wrong.
    pub fn verify_record(&self, keys: &[VerifierKey]) -> Result<(Vec<u8>, Vec<u8>, Checkpoint), String> {
        let checkpoint = Checkpoint::open_any(&self.checkpoint, keys)?;
        let extra = RecordExtra::parse(&self.extra).ok_or("the extra line is not that of a record")?;
        let (leaf, record) = extra.verify()?;
        self.holds(&leaf, &checkpoint)?;
        Ok((leaf, record, checkpoint))
    }

    fn holds(&self, leaf: &[u8], checkpoint: &Checkpoint) -> Result<(), String> {
        let leaf = crypto::hash(Domain::Leaf, &[leaf]);
        if !merkle::verify_inclusion(&leaf, self.index, checkpoint.size, &self.path, &checkpoint.root) {
            return Err(format!(
                "entry {} is not in the checkpoint of size {}: the path does not lead to its root",
                self.index, checkpoint.size
            ));
        }
        Ok(())
    }
}

/// What the extra line of a record's receipt carries, and how the record hangs together with its entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordExtra {
    /// Base64 of the digest over the entry's salt and details.
    pub commitment: String,
    /// Base64 of the entry's leaf.
    pub entry: String,
    /// Base64 of the hashes from the record's sibling up to the segment's root.
    pub path: Vec<String>,
    /// The record's place, from 0.
    pub position: u64,
    /// Base64 of the record.
    pub record: String,
    /// How many records the segment has.
    pub records: u64,
}

impl RecordExtra {
    /// Reads an extra line; `None` if it is not that of a record.
    #[must_use]
    pub fn parse(extra: &[u8]) -> Option<Self> {
        serde_json::from_slice(extra).ok()
    }

    /// Checks that the record is one of the entry's; answers the leaf and the record.
    ///
    /// # Errors
    /// With the first thing that is wrong.
    pub fn verify(&self) -> Result<(Vec<u8>, Vec<u8>), String> {
        let bytes = |name: &str, text: &str| crypto::from_base64(text).ok_or_else(|| format!("{name} is not base64"));
        let hash = |name: &str, text: &str| -> Result<Hash, String> {
            bytes(name, text)?.try_into().map_err(|_| format!("{name} is no hash"))
        };
        let (leaf, record) = (bytes("entry", &self.entry)?, bytes("record", &self.record)?);
        let path = self.path.iter().map(|p| hash("path", p)).collect::<Result<Vec<_>, _>>()?;
        let root = merkle::root_of(&segment::record(&record), self.position, self.records, &path)
            .ok_or("the path is not one of a segment of so many records")?;
        let body = entry::body(&hash("commitment", &self.commitment)?, Some(&root));
        let entry: serde_json::Value =
            serde_json::from_slice(&leaf).map_err(|e| format!("the entry is not JSON: {e}"))?;
        if entry["body"] != crypto::base64(body) {
            return Err(format!("record {} is not one of those the entry commits to", self.position));
        }
        Ok((leaf, record))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::crypto::SigningKey;

    #[test]
    fn a_receipt_verifies_offline_and_a_changed_one_does_not() {
        let (key, _) = SigningKey::generate().unwrap();
        let verifier = VerifierKey::log("log", key.public());
        let data = [b"one", b"two"];
        let leaves: Vec<Hash> = data.iter().map(|d| crypto::hash(Domain::Leaf, &[*d])).collect();
        let checkpoint = Checkpoint { origin: "log".into(), size: 2, root: merkle::root(&leaves) }.sign(&key);
        let proof = Proof { extra: b"one".to_vec(), index: 0, path: vec![leaves[1]], checkpoint };
        let back = Proof::parse(&proof.text()).unwrap();
        assert_eq!(back, proof);
        assert_eq!(back.verify(&verifier).unwrap().0, b"one");
        assert!(
            Proof { extra: b"owe".to_vec(), ..proof.clone() }.verify(&verifier).unwrap_err().contains("does not lead")
        );
        assert!(Proof { index: 1, ..proof.clone() }.verify(&verifier).is_err());
        assert!(Proof::parse(&proof.text().replace("index 0", "index x")).is_err());
    }
    #[test]
    fn a_record_hangs_together_with_its_entry_and_each_change_is_refused() {
        let records: Vec<Vec<u8>> = (0..7).map(|i| format!("record {i}").into_bytes()).collect();
        let hashes: Vec<Hash> = records.iter().map(|r| segment::record(r)).collect();
        let root = merkle::root(&hashes);
        let commitment = entry::commitment(&[1; 32], b"{}");
        let leaf = serde_json::json!({"body": crypto::base64(entry::body(&commitment, Some(&root)))}).to_string();
        let extra = RecordExtra {
            commitment: crypto::base64(commitment),
            entry: crypto::base64(&leaf),
            path: segment::path(&hashes, 4).iter().map(crypto::base64).collect(),
            position: 4,
            record: crypto::base64(&records[4]),
            records: 7,
        };
        assert_eq!(extra.verify().unwrap().1, records[4]);
        assert_eq!(RecordExtra::parse(&serde_json::to_vec(&extra).unwrap()), Some(extra.clone()));
        let other = crypto::base64([9; 32]);
        for bad in [
            RecordExtra { commitment: other.clone(), ..extra.clone() },
            RecordExtra { path: vec![other; extra.path.len()], ..extra.clone() },
            RecordExtra { path: Vec::new(), ..extra.clone() },
            RecordExtra { position: 5, ..extra.clone() },
            RecordExtra { position: 7, ..extra.clone() },
            RecordExtra { record: crypto::base64(&records[3]), ..extra.clone() },
            RecordExtra { records: 3, ..extra.clone() },
            RecordExtra { entry: crypto::base64("{}"), ..extra },
        ] {
            assert!(bad.verify().is_err(), "{bad:?}");
        }
    }
}
