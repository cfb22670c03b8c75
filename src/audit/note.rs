//! Signed notes, checkpoints and verifier keys: C2SP signed-note and tlog-checkpoint, to the byte.

use crate::kernel::crypto::{self, Hash, SigningKey};

/// The algorithm byte of Ed25519.
const ED25519: u8 = 1;

/// A public key that checks a log's signatures: `<name>+<key id, hex>+<base64 of 0x01 and the key>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifierKey {
    /// The log's name, which is its origin.
    pub name: String,
    /// Ed25519.
    pub public: Hash,
}

impl VerifierKey {
    fn id(&self) -> [u8; 4] {
        let digest = crypto::sha256(&[self.name.as_bytes(), b"\n", &[ED25519], &self.public].concat());
        [digest[0], digest[1], digest[2], digest[3]]
    }

    /// Reads the text form.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        // Base64 may itself hold a `+`, a name may not.
        let mut parts = text.trim().splitn(3, '+');
        let (name, id, key) = (parts.next()?, parts.next()?, parts.next()?);
        let bytes = crypto::from_base64(key)?;
        let (algorithm, public) = bytes.split_first()?;
        let parsed = Self { name: name.to_owned(), public: public.try_into().ok()? };
        let hex: String = parsed.id().iter().map(|b| format!("{b:02x}")).collect();
        (*algorithm == ED25519 && hex == id && valid_name(name)).then_some(parsed)
    }
}

fn valid_name(name: &str) -> bool {
    !name.is_empty() && !name.contains('+') && !name.chars().any(char::is_whitespace)
}

impl std::fmt::Display for VerifierKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let id: String = self.id().iter().map(|b| format!("{b:02x}")).collect();
        write!(f, "{}+{id}+{}", self.name, crypto::base64([&[ED25519], self.public.as_slice()].concat()))
    }
}

/// What a log says of itself: its name, how many leaves, their root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The log's origin.
    pub origin: String,
    /// How many leaves.
    pub size: u64,
    /// Their root.
    pub root: Hash,
}

impl Checkpoint {
    /// The text that is signed.
    #[must_use]
    pub fn text(&self) -> String {
        format!("{}\n{}\n{}\n", self.origin, self.size, crypto::base64(self.root))
    }

    /// The signed note.
    #[must_use]
    pub fn sign(&self, key: &SigningKey) -> String {
        let text = self.text();
        let verifier = VerifierKey { name: self.origin.clone(), public: key.public() };
        let signature = key.sign(text.as_bytes());
        let blob = crypto::base64([&verifier.id(), signature.as_slice()].concat());
        format!("{text}\n\u{2014} {} {blob}\n", self.origin)
    }

    /// Reads a note and checks that `key` signed it. Signatures of others are left alone.
    ///
    /// # Errors
    /// With what is wrong.
    pub fn open(note: &str, key: &VerifierKey) -> Result<Self, String> {
        let at = note.rfind("\n\n").ok_or("a note has a text, an empty line and signatures")?;
        let (text, signatures) = (&note[..=at], &note[at + 2..]);
        let checkpoint = Self::parse(text).ok_or("the note's text is no checkpoint: origin, size, root, one a line")?;
        if checkpoint.origin != key.name {
            return Err(format!("the checkpoint is of {}, the key is of {}", checkpoint.origin, key.name));
        }
        for line in signatures.lines() {
            let Some((name, blob)) = line.strip_prefix("\u{2014} ").and_then(|l| l.split_once(' ')) else {
                return Err("a line under the note's text is no signature".to_owned());
            };
            let blob = crypto::from_base64(blob).unwrap_or_default();
            let ours = name == key.name && blob.get(..4) == Some(&key.id()[..]);
            if ours {
                let good = crypto::verify_ed25519(&key.public, text.as_bytes(), &blob[4..]);
                return if good {
                    Ok(checkpoint)
                } else {
                    Err("the signature of the checkpoint does not verify".to_owned())
                };
            }
        }
        Err(format!("the checkpoint is not signed by {key}"))
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let (origin, size, root) = (lines.next()?, lines.next()?, lines.next()?);
        let canonical = size == "0" || !size.starts_with('0');
        let root = crypto::from_base64(root)?.try_into().ok()?;
        Some(Self { origin: origin.to_owned(), size: size.parse().ok().filter(|_| canonical)?, root })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signed() -> (Checkpoint, SigningKey, VerifierKey) {
        let (key, _) = SigningKey::generate().unwrap();
        let checkpoint = Checkpoint { origin: "sop.example/log".into(), size: 109_482, root: [7; 32] };
        let verifier = VerifierKey { name: checkpoint.origin.clone(), public: key.public() };
        (checkpoint, key, verifier)
    }

    #[test]
    fn a_note_opens_with_its_key_and_no_other() {
        for _ in 0..64 {
            let (checkpoint, key, verifier) = signed();
            assert_eq!(VerifierKey::parse(&verifier.to_string()), Some(verifier.clone()), "{verifier}");
            let note = checkpoint.sign(&key);
            assert_eq!(Checkpoint::open(&note, &verifier).unwrap(), checkpoint);
            let cosigned = format!("{note}\u{2014} witness.example AAAAAAAA\n");
            assert_eq!(Checkpoint::open(&cosigned, &verifier).unwrap(), checkpoint);
            let (_, _, other) = signed();
            assert!(Checkpoint::open(&note, &other).unwrap_err().contains("not signed by"));
            let forged = note.replace("109482", "109483");
            assert!(Checkpoint::open(&forged, &verifier).unwrap_err().contains("does not verify"));
            assert!(Checkpoint::open(&checkpoint.text(), &verifier).is_err());
        }
    }

    #[test]
    fn a_known_verifier_key_reads() {
        // The example of the Go checksum database.
        let key = VerifierKey::parse("sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8").unwrap();
        assert_eq!(key.name, "sum.golang.org");
        assert_eq!(VerifierKey::parse("sum.golang.org+033de0af+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8"), None);
    }
}
