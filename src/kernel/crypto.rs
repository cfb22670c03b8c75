//! The few cryptographic operations of the house, over `ring`; no other file names it.
//!
//! Every hash over data has a domain prefix of its own, so that no two kinds of thing can share a digest:
//! `0x00` leaf and `0x01` node (RFC 6962), `0x02` record of a segment, `0x03` salted commitment, `0x04` body of a segment entry.

use std::cell::RefCell;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::rand::SecureRandom as _;
use ring::signature::KeyPair as _;
use ring::{aead, digest, rand, signature};

use super::{Refusal, Secret};

/// A SHA-256 digest.
pub type Hash = [u8; 32];

/// What a digest is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Domain {
    /// A leaf of the log (RFC 6962).
    Leaf = 0,
    /// An inner node (RFC 6962).
    Node = 1,
    /// A record of a segment.
    Record = 2,
    /// The salted commitment to an entry's details.
    Commitment = 3,
    /// The body of a segment's entry: root of its records and commitment to its details.
    Segment = 4,
    /// Several texts as one, each with its length before it.
    Tuple = 5,
}

/// SHA-256 over a domain prefix and the parts.
#[must_use]
pub fn hash(domain: Domain, parts: &[&[u8]]) -> Hash {
    let mut c = digest::Context::new(&digest::SHA256);
    c.update(&[domain as u8]);
    for p in parts {
        c.update(p);
    }
    to_hash(c.finish().as_ref())
}

/// SHA-256 over several texts, so that no two lists of texts give the same.
#[must_use]
pub fn hash_tuple<'a>(parts: impl IntoIterator<Item = &'a str>) -> Hash {
    let mut c = digest::Context::new(&digest::SHA256);
    c.update(&[Domain::Tuple as u8]);
    for p in parts {
        c.update(&(p.len() as u64).to_be_bytes());
        c.update(p.as_bytes());
    }
    to_hash(c.finish().as_ref())
}

/// Plain SHA-256, for fingerprints that a standard defines without a prefix.
#[must_use]
pub fn sha256(data: &[u8]) -> Hash {
    to_hash(digest::digest(&digest::SHA256, data).as_ref())
}

fn to_hash(d: &[u8]) -> Hash {
    let mut h = [0; 32];
    h.copy_from_slice(d);
    h
}

/// `N` random bytes from the operating system.
///
/// # Errors
/// When the operating system has none to give.
pub fn random<const N: usize>() -> Result<[u8; N], Refusal> {
    let drawn = DRAWN.with_borrow_mut(|drawn| drawn.take::<N>());
    drawn.ok_or_else(|| Refusal::internal("no random bytes"))
}

thread_local! {
    static DRAWN: RefCell<Drawn> = const { RefCell::new(Drawn { bytes: [0; 1024], left: 0 }) };
}

/// Random bytes of the operating system, drawn for several uses at once: asking for each alone was noticed under load.
struct Drawn {
    bytes: [u8; 1024],
    left: usize,
}

impl Drawn {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut taken = [0; N];
        if N > self.bytes.len() {
            rand::SystemRandom::new().fill(&mut taken).ok()?;
            return Some(taken);
        }
        if self.left < N {
            rand::SystemRandom::new().fill(&mut self.bytes).ok()?;
            self.left = self.bytes.len();
        }
        let from = &mut self.bytes[self.left - N..self.left];
        taken.copy_from_slice(from);
        // What was given away is kept nowhere else.
        from.fill(0);
        self.left -= N;
        Some(taken)
    }
}

/// Compares without telling by its duration where two secrets differ.
#[must_use]
pub fn same(a: &[u8], b: &[u8]) -> bool {
    // Comparing digests makes the duration independent of the contents and of the lengths.
    let (a, b) = (sha256(a), sha256(b));
    a.iter().zip(b).fold(0u8, |d, (x, y)| d | (x ^ y)) == 0
}

/// Base64 with padding, as JSON bodies carry bytes.
#[must_use]
pub fn base64(data: impl AsRef<[u8]>) -> String {
    STANDARD.encode(data)
}

/// Reads base64 with padding.
#[must_use]
pub fn from_base64(text: &str) -> Option<Vec<u8>> {
    STANDARD.decode(text).ok()
}

/// Base64url without padding, as JOSE writes it.
#[must_use]
pub fn base64url(data: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(data)
}

/// Reads base64url without padding; refuses what is not canonical.
#[must_use]
pub fn from_base64url(text: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text).ok()
}

/// An Ed25519 key that signs.
pub struct SigningKey {
    pair: signature::Ed25519KeyPair,
}

impl SigningKey {
    /// A new key; the second value is its 32-byte seed, to be sealed and kept.
    ///
    /// # Errors
    /// When the operating system has no random bytes.
    pub fn generate() -> Result<(Self, Secret<[u8; 32]>), Refusal> {
        let seed = random::<32>()?;
        Ok((Self::from_seed(&seed)?, Secret::new(seed)))
    }

    /// From a kept seed.
    ///
    /// # Errors
    /// When the seed is not 32 bytes.
    pub fn from_seed(seed: &[u8]) -> Result<Self, Refusal> {
        let pair = signature::Ed25519KeyPair::from_seed_unchecked(seed)
            .map_err(|_| Refusal::internal("not an Ed25519 seed"))?;
        Ok(Self { pair })
    }

    /// The public key.
    #[must_use]
    pub fn public(&self) -> Hash {
        to_hash(self.pair.public_key().as_ref())
    }

    /// Signs.
    #[must_use]
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        let mut s = [0; 64];
        s.copy_from_slice(self.pair.sign(message).as_ref());
        s
    }
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SigningKey({})", base64url(self.public()))
    }
}

/// A key over P-256 that signs with SHA-256.
pub struct EcdsaKey {
    pair: signature::EcdsaKeyPair,
}

impl EcdsaKey {
    /// A new key as PKCS#8, to be sealed and kept.
    ///
    /// # Errors
    /// When the operating system has no random bytes.
    pub fn generate() -> Result<Secret<Vec<u8>>, Refusal> {
        let made = signature::EcdsaKeyPair::generate_pkcs8(
            &signature::ECDSA_P256_SHA256_FIXED_SIGNING,
            &ring::rand::SystemRandom::new(),
        );
        Ok(Secret::new(made.map_err(|_| Refusal::internal("no random bytes"))?.as_ref().to_vec()))
    }

    /// From what was kept.
    ///
    /// # Errors
    /// When it is no such key.
    pub fn open(pkcs8: &[u8]) -> Result<Self, Refusal> {
        let pair = signature::EcdsaKeyPair::from_pkcs8(
            &signature::ECDSA_P256_SHA256_FIXED_SIGNING,
            pkcs8,
            &ring::rand::SystemRandom::new(),
        );
        Ok(Self { pair: pair.map_err(|_| Refusal::internal("not a P-256 key"))? })
    }

    /// The public point, uncompressed.
    #[must_use]
    pub fn public(&self) -> [u8; 65] {
        let mut point = [0; 65];
        point.copy_from_slice(self.pair.public_key().as_ref());
        point
    }

    /// Signs: r and s, 32 bytes each.
    ///
    /// # Errors
    /// When the operating system has no random bytes.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Refusal> {
        let signed = self.pair.sign(&ring::rand::SystemRandom::new(), message);
        Ok(signed.map_err(|_| Refusal::internal("no random bytes"))?.as_ref().to_vec())
    }
}

/// Checks an Ed25519 signature.
#[must_use]
pub fn verify_ed25519(public: &[u8], message: &[u8], sig: &[u8]) -> bool {
    signature::UnparsedPublicKey::new(&signature::ED25519, public).verify(message, sig).is_ok()
}

/// The key under which the daemon's own secrets are kept: AES-256-GCM, a random nonce a message, the purpose as associated data.
pub struct MasterKey {
    key: aead::LessSafeKey,
    check: Hash,
}

impl MasterKey {
    /// From 32 bytes.
    ///
    /// # Errors
    /// When there are not exactly 32.
    pub fn new(bytes: &[u8]) -> Result<Self, Refusal> {
        let key = aead::UnboundKey::new(&aead::AES_256_GCM, bytes)
            .map_err(|_| Refusal::internal("a master key has 32 bytes"))?;
        // The check value reveals nothing of the key and lets a daemon see at start that it has the wrong one.
        let tag = ring::hmac::sign(&ring::hmac::Key::new(ring::hmac::HMAC_SHA256, bytes), b"sop master key check v1");
        Ok(Self { key: aead::LessSafeKey::new(key), check: to_hash(tag.as_ref()) })
    }

    /// A value that tells this key from any other without revealing it.
    #[must_use]
    pub fn check_value(&self) -> Hash {
        self.check
    }

    /// Seals `plain` for `purpose`: nonce, ciphertext, tag.
    ///
    /// # Errors
    /// When the operating system has no random bytes.
    pub fn seal(&self, purpose: &str, plain: &[u8]) -> Result<Vec<u8>, Refusal> {
        let nonce = random::<12>()?;
        let mut body = plain.to_vec();
        self.key
            .seal_in_place_append_tag(
                aead::Nonce::assume_unique_for_key(nonce),
                aead::Aad::from(purpose.as_bytes()),
                &mut body,
            )
            .map_err(|_| Refusal::internal("sealing failed"))?;
        let mut out = Vec::with_capacity(12 + body.len());
        out.extend_from_slice(&nonce);
        out.append(&mut body);
        Ok(out)
    }

    /// Opens what [`seal`](Self::seal) made for the same purpose; `None` if it was not.
    #[must_use]
    pub fn open(&self, purpose: &str, sealed: &[u8]) -> Option<Vec<u8>> {
        let (nonce, body) = sealed.split_at_checked(12)?;
        let nonce = aead::Nonce::try_assume_unique_for_key(nonce).ok()?;
        let mut body = body.to_vec();
        let len = self.key.open_in_place(nonce, aead::Aad::from(purpose.as_bytes()), &mut body).ok()?.len();
        body.truncate(len);
        Some(body)
    }
}

impl std::fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MasterKey(***)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealed_opens_only_for_its_purpose_and_key() {
        let a = MasterKey::new(&[1; 32]).unwrap();
        let b = MasterKey::new(&[2; 32]).unwrap();
        let sealed = a.seal("x", b"hello").unwrap();
        assert_eq!(a.open("x", &sealed).unwrap(), b"hello");
        assert_eq!(a.open("y", &sealed), None);
        assert_eq!(b.open("x", &sealed), None);
        assert_eq!(a.open("x", &sealed[..11]), None);
        assert_ne!(a.check_value(), b.check_value());
        assert_ne!(sealed, a.seal("x", b"hello").unwrap(), "a fresh nonce each time");
    }

    #[test]
    fn signatures_verify() {
        let (key, seed) = SigningKey::generate().unwrap();
        let sig = key.sign(b"m");
        assert!(verify_ed25519(&key.public(), b"m", &sig));
        assert!(!verify_ed25519(&key.public(), b"n", &sig));
        assert_eq!(SigningKey::from_seed(seed.expose()).unwrap().public(), key.public());
    }

    #[test]
    fn domains_do_not_collide() {
        assert_ne!(hash(Domain::Leaf, &[b"a"]), hash(Domain::Node, &[b"a"]));
        assert_eq!(hash(Domain::Leaf, &[b"a", b"b"]), hash(Domain::Leaf, &[b"ab"]));
    }

    #[test]
    fn same_is_equality() {
        assert!(same(b"abc", b"abc"));
        assert!(!same(b"abc", b"abd") && !same(b"abc", b"ab"));
    }
}
