//! Receipts: C2SP tlog-proof, a text that anyone can check with the log's public key.

use crate::kernel::crypto::{self, Domain, Hash};
use crate::ledger::merkle;

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
        let checkpoint = Checkpoint::open(&self.checkpoint, key)?;
        let leaf = crypto::hash(Domain::Leaf, &[&self.extra]);
        if !merkle::verify_inclusion(&leaf, self.index, checkpoint.size, &self.path, &checkpoint.root) {
            return Err(format!(
                "entry {} is not in the checkpoint of size {}: the path does not lead to its root",
                self.index, checkpoint.size
            ));
        }
        Ok((&self.extra, checkpoint))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::crypto::SigningKey;

    #[test]
    fn a_receipt_verifies_offline_and_a_changed_one_does_not() {
        let (key, _) = SigningKey::generate().unwrap();
        let verifier = VerifierKey { name: "log".into(), public: key.public() };
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
}
