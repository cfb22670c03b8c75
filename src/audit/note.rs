//! Signed notes, checkpoints and verifier keys: C2SP signed-note and tlog-checkpoint, to the byte.

use crate::kernel::crypto::{self, Hash, SigningKey};

/// The algorithm byte of a log's Ed25519 key.
const ED25519: u8 = 1;
/// That of a witness: cosignature/v1 (C2SP tlog-cosignature).
const COSIGNATURE: u8 = 4;
/// The largest note that is read.
const LARGEST: usize = 65_536;

/// A public key that checks a log's signatures: `<name>+<key id, hex>+<base64 of 0x01 and the key>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifierKey {
    /// The log's name, which is its origin.
    pub name: String,
    /// Ed25519.
    pub public: Hash,
    /// Whether it is a witness's: then it signs that it saw a checkpoint, and when.
    pub witness: bool,
}

impl VerifierKey {
    /// A log's key.
    #[must_use]
    pub fn log(name: impl Into<String>, public: Hash) -> Self {
        Self { name: name.into(), public, witness: false }
    }

    /// A witness's key.
    #[must_use]
    pub fn witness(name: impl Into<String>, public: Hash) -> Self {
        Self { name: name.into(), public, witness: true }
    }

    fn algorithm(&self) -> u8 {
        if self.witness { COSIGNATURE } else { ED25519 }
    }

    fn id(&self) -> [u8; 4] {
        let digest = crypto::sha256(&[self.name.as_bytes(), b"\n", &[self.algorithm()], &self.public].concat());
        [digest[0], digest[1], digest[2], digest[3]]
    }

    /// The time (seconds) of this witness's cosignature under a note, if there is one that holds.
    #[must_use]
    pub fn cosigned(&self, note: &str) -> Option<u64> {
        let (text, signatures) = split(note)?;
        signatures.lines().find_map(|line| {
            let (name, blob) = signature(line)?;
            let (id, rest) = blob.split_first_chunk::<4>()?;
            let (seconds, signed) = rest.split_first_chunk::<8>()?;
            if name != self.name || *id != self.id() {
                return None;
            }
            let seconds = u64::from_be_bytes(*seconds);
            crypto::verify_ed25519(&self.public, seen(text, seconds).as_bytes(), signed).then_some(seconds)
        })
    }

    /// Reads the text form.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        // Base64 may itself hold a `+`, a name may not.
        let mut parts = text.trim().splitn(3, '+');
        let (name, id, key) = (parts.next()?, parts.next()?, parts.next()?);
        let bytes = crypto::from_base64(key)?;
        let (algorithm, public) = bytes.split_first()?;
        let witness = *algorithm == COSIGNATURE;
        let parsed = Self { name: name.to_owned(), public: public.try_into().ok()?, witness };
        let hex: String = parsed.id().iter().map(|b| format!("{b:02x}")).collect();
        (*algorithm == parsed.algorithm() && hex == id && valid_name(name)).then_some(parsed)
    }
}

/// The text of a note, with its last newline, and the lines of signatures.
fn split(note: &str) -> Option<(&str, &str)> {
    let at = note.rfind("\n\n").filter(|_| note.len() <= LARGEST && note.ends_with('\n'))?;
    Some((&note[..=at], &note[at + 2..]))
}

/// Name and blob of a signature's line.
fn signature(line: &str) -> Option<(&str, Vec<u8>)> {
    let (name, blob) = line.strip_prefix("\u{2014} ")?.split_once(' ')?;
    Some((name, crypto::from_base64(blob).filter(|b| b.len() > 4)?))
}

/// What a witness signs.
fn seen(text: &str, seconds: u64) -> String {
    format!("cosignature/v1\ntime {seconds}\n{text}")
}

/// A witness's line under a note: that it saw it, at this time (seconds).
#[must_use]
pub fn cosign(note: &str, name: &str, key: &SigningKey, seconds: u64) -> Option<String> {
    let (text, _) = split(note)?;
    let signed = key.sign(seen(text, seconds).as_bytes());
    let id = VerifierKey::witness(name, key.public()).id();
    let blob = [&id[..], &seconds.to_be_bytes(), signed.as_slice()].concat();
    Some(format!("\u{2014} {name} {}\n", crypto::base64(blob)))
}

fn valid_name(name: &str) -> bool {
    !name.is_empty() && !name.contains('+') && !name.chars().any(char::is_whitespace)
}

impl std::fmt::Display for VerifierKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let id: String = self.id().iter().map(|b| format!("{b:02x}")).collect();
        write!(f, "{}+{id}+{}", self.name, crypto::base64([&[self.algorithm()], self.public.as_slice()].concat()))
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
        self.sign_with(&[key])
    }

    /// The note with a signature of each key: two while a key is being replaced.
    #[must_use]
    pub fn sign_with(&self, keys: &[&SigningKey]) -> String {
        let text = self.text();
        let mut note = format!("{text}\n");
        for key in keys {
            let verifier = VerifierKey::log(&self.origin, key.public());
            let blob = crypto::base64([&verifier.id(), key.sign(text.as_bytes()).as_slice()].concat());
            note.push_str(&format!("\u{2014} {} {blob}\n", self.origin));
        }
        note
    }

    /// Reads a note and checks that `key` signed it. Signatures of others are left alone.
    ///
    /// # Errors
    /// With what is wrong.
    pub fn open(note: &str, key: &VerifierKey) -> Result<Self, String> {
        Self::open_any(note, std::slice::from_ref(key))
    }

    /// Reads a note and checks that one of `keys` signed it.
    ///
    /// # Errors
    /// With what is wrong.
    pub fn open_any(note: &str, keys: &[VerifierKey]) -> Result<Self, String> {
        let (text, signatures) = split(note).ok_or("a note has a text, an empty line and signatures")?;
        let checkpoint = Self::parse(text).ok_or("the note's text is no checkpoint: origin, size, root, one a line")?;
        if signatures.lines().any(|l| signature(l).is_none()) {
            return Err("a line under the note's text is no signature".to_owned());
        }
        let mut why = String::from("there is no key to check it with");
        for key in keys {
            if checkpoint.origin != key.name {
                why = format!("the checkpoint is of {}, the key is of {}", checkpoint.origin, key.name);
                continue;
            }
            let blobs = signatures.lines().filter_map(signature);
            let ours = blobs.filter(|(name, blob)| *name == key.name && blob[..4] == key.id()).map(|(_, b)| b).next();
            why = match ours {
                Some(blob) if crypto::verify_ed25519(&key.public, text.as_bytes(), &blob[4..]) => {
                    return Ok(checkpoint);
                }
                Some(_) => return Err("the signature of the checkpoint does not verify".to_owned()),
                None => format!("the checkpoint is not signed by {key}"),
            };
        }
        Err(why)
    }

    /// Reads what a note says of a log, whoever signed it.
    #[must_use]
    pub fn unverified(note: &str) -> Option<Self> {
        Self::parse(split(note)?.0)
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
        let verifier = VerifierKey::log(&checkpoint.origin, key.public());
        (checkpoint, key, verifier)
    }

    #[test]
    fn a_note_opens_with_its_key_and_no_other() {
        for _ in 0..64 {
            let (checkpoint, key, verifier) = signed();
            assert_eq!(VerifierKey::parse(&verifier.to_string()), Some(verifier.clone()), "{verifier}");
            let note = checkpoint.sign(&key);
            assert_eq!(Checkpoint::open(&note, &verifier).unwrap(), checkpoint);
            let (_, witness, _) = signed();
            let line = cosign(&note, "witness.example/w", &witness, 1_700_000_000).unwrap();
            let cosigned = format!("{note}{line}");
            let seer = VerifierKey::witness("witness.example/w", witness.public());
            assert_eq!(VerifierKey::parse(&seer.to_string()), Some(seer.clone()));
            assert_eq!(seer.cosigned(&cosigned), Some(1_700_000_000));
            assert_eq!(seer.cosigned(&note), None);
            assert_eq!(seer.cosigned(&cosigned.replace("109482", "109483")), None, "it saw another");
            assert_eq!(VerifierKey::log("witness.example/w", witness.public()).cosigned(&cosigned), None);
            let both = checkpoint.sign_with(&[&witness, &key]);
            assert_eq!(Checkpoint::open(&both, &verifier).unwrap(), checkpoint, "one of two signatures is enough");
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
