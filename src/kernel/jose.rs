//! The signature back-end of `jsonwebtoken`, on `ring`: verification only. Tokens of ours are signed by held keys, which do not
//! parse a key for every token.

use std::fmt;

use jsonwebtoken::crypto::{CryptoProvider, JwtSigner, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::{Error, ErrorKind};
use jsonwebtoken::{Algorithm, DecodingKey, DecodingKeyKind, EncodingKey};
use ring::signature as s;

static PROVIDER: CryptoProvider =
    CryptoProvider { signer_factory, verifier_factory, key_utils: KeyUtils::new_unimplemented() };

/// Installs it. Must come before anything decodes a token; later calls change nothing.
pub fn install() {
    let _ = PROVIDER.install_default();
}

fn signer_factory(_: &Algorithm, _: &EncodingKey) -> Result<Box<dyn JwtSigner>, Error> {
    Err(ErrorKind::InvalidAlgorithm.into())
}

fn verifier_factory(algorithm: &Algorithm, key: &DecodingKey) -> Result<Box<dyn JwtVerifier>, Error> {
    match algorithm {
        Algorithm::EdDSA | Algorithm::ES256 | Algorithm::RS256 | Algorithm::PS256 => {
            Ok(Box::new(Verify { algorithm: *algorithm, key: key.clone() }))
        }
        _ => Err(ErrorKind::InvalidAlgorithm.into()),
    }
}

struct Verify {
    algorithm: Algorithm,
    key: DecodingKey,
}

impl fmt::Debug for Verify {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Verify({:?})", self.algorithm)
    }
}

impl signature::Verifier<Vec<u8>> for Verify {
    fn verify(&self, message: &[u8], sig: &Vec<u8>) -> Result<(), signature::Error> {
        let rsa = match self.algorithm {
            Algorithm::RS256 => Some(&s::RSA_PKCS1_2048_8192_SHA256),
            Algorithm::PS256 => Some(&s::RSA_PSS_2048_8192_SHA256),
            _ => None,
        };
        let good = match (rsa, self.key.kind()) {
            (Some(rsa), DecodingKeyKind::RsaModulusExponent { n, e }) => {
                s::RsaPublicKeyComponents { n, e }.verify(rsa, message, sig).is_ok()
            }
            (None, DecodingKeyKind::SecretOrDer(key)) if self.algorithm == Algorithm::EdDSA => {
                s::UnparsedPublicKey::new(&s::ED25519, key).verify(message, sig).is_ok()
            }
            (None, DecodingKeyKind::SecretOrDer(key)) if self.algorithm == Algorithm::ES256 => {
                s::UnparsedPublicKey::new(&s::ECDSA_P256_SHA256_FIXED, key).verify(message, sig).is_ok()
            }
            _ => false,
        };
        if good { Ok(()) } else { Err(signature::Error::new()) }
    }
}

impl JwtVerifier for Verify {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}
