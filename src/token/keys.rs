//! Keys that sign access tokens: announced in the JWKS before they sign, and kept there until the last token they signed ended.
//!
//! When a key signs and when it ends are instants in its row. Every daemon reads the same rows, and nothing happens between them:
//! a daemon whose clock is behind signs a little longer with the key before, which is still listed then.

use std::time::Duration;

use jsonwebtoken::DecodingKey;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::kernel::crypto::{self, EcdsaKey, SigningKey};
use crate::kernel::supervisor::{Supervisor, Task};
use crate::kernel::web::{Ask, Caller};
use crate::kernel::{Refusal, Secret, Timestamp, problem};
use crate::ledger::{AUTHZ, Command, Committed, Entry, Failure, Touch, Tx};

use super::jwt::Claims;
use super::snapshot::PURPOSE;
use super::{Token, store};

/// How long a key is listed beyond the life of its last token: clocks differ, and so do daemons' settings while they change.
const GRACE: Duration = Duration::from_secs(60);
/// How often it is looked whether a key is old enough to be replaced.
const LOOK: Duration = Duration::from_secs(60);

/// How a key signs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub enum Alg {
    /// Ed25519 (RFC 8037).
    #[default]
    EdDSA,
    /// ECDSA over P-256 with SHA-256 (RFC 7518).
    ES256,
}

impl Alg {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::EdDSA, Self::ES256];

    /// As it is written in a header.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::EdDSA => "EdDSA",
            Self::ES256 => "ES256",
        }
    }

    /// From a header.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|a| a.as_str() == text)
    }
}

enum Pair {
    Ed25519(SigningKey),
    P256(EcdsaKey),
}

/// A key that signs access tokens.
pub struct TokenKey {
    kid: String,
    pair: Pair,
    header: String,
}

impl TokenKey {
    /// A new one, and what it is kept as.
    ///
    /// # Errors
    /// When the operating system has no random bytes.
    pub fn generate(alg: Alg) -> Result<(Self, Secret<Vec<u8>>), Refusal> {
        let secret = match alg {
            Alg::EdDSA => SigningKey::generate()?.1.expose().to_vec(),
            Alg::ES256 => EcdsaKey::generate()?.expose().clone(),
        };
        Ok((Self::open(alg, &secret)?, Secret::new(secret)))
    }

    /// From what it was kept as. Its id is the thumbprint of the public key (RFC 7638).
    ///
    /// # Errors
    /// When it is no such key.
    pub fn open(alg: Alg, secret: &[u8]) -> Result<Self, Refusal> {
        let pair = match alg {
            Alg::EdDSA => Pair::Ed25519(SigningKey::from_seed(secret)?),
            Alg::ES256 => Pair::P256(EcdsaKey::open(secret)?),
        };
        let kid = crypto::base64url(crypto::sha256(required(&pair).as_bytes()));
        let header = crypto::base64url(json!({"alg": alg.as_str(), "kid": kid, "typ": "at+jwt"}).to_string());
        Ok(Self { kid, pair, header })
    }

    /// Its id.
    #[must_use]
    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// How it signs.
    #[must_use]
    pub fn alg(&self) -> Alg {
        match self.pair {
            Pair::Ed25519(_) => Alg::EdDSA,
            Pair::P256(_) => Alg::ES256,
        }
    }

    /// Its public half: 32 bytes, or a point of P-256 in 65.
    #[must_use]
    pub fn public(&self) -> Vec<u8> {
        match &self.pair {
            Pair::Ed25519(key) => key.public().to_vec(),
            Pair::P256(key) => key.public().to_vec(),
        }
    }

    /// For the JWKS.
    #[must_use]
    pub fn jwk(&self) -> Value {
        let mut jwk: Value = serde_json::from_str(&required(&self.pair)).unwrap_or_default();
        jwk["kid"] = self.kid.clone().into();
        jwk["use"] = "sig".into();
        jwk["alg"] = self.alg().as_str().into();
        jwk
    }

    /// Signs.
    ///
    /// # Errors
    /// When the operating system has no random bytes.
    pub fn sign(&self, claims: &Claims) -> Result<String, Refusal> {
        let body = crypto::base64url(serde_json::to_vec(claims).map_err(Refusal::internal)?);
        let signed = format!("{}.{body}", self.header);
        Ok(format!("{signed}.{}", crypto::base64url(self.signature(signed.as_bytes())?)))
    }

    pub(super) fn signature(&self, message: &[u8]) -> Result<Vec<u8>, Refusal> {
        Ok(match &self.pair {
            Pair::Ed25519(key) => key.sign(message).to_vec(),
            Pair::P256(key) => key.sign(message)?,
        })
    }
}

/// The members of a JWK that its thumbprint is made of, in their order (RFC 7638, 3.2; RFC 8037, 2).
fn required(pair: &Pair) -> String {
    match pair {
        Pair::Ed25519(key) => format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{}"}}"#, crypto::base64url(key.public())),
        Pair::P256(key) => {
            let point = key.public();
            let (x, y) = point[1..].split_at(32);
            format!(r#"{{"crv":"P-256","kty":"EC","x":"{}","y":"{}"}}"#, crypto::base64url(x), crypto::base64url(y))
        }
    }
}

/// What checks the tokens of a key.
pub struct PublicKey {
    /// Its id.
    pub kid: String,
    /// How it signs.
    pub alg: Alg,
    /// What it signed is refused from then on.
    pub ends: Option<Timestamp>,
    /// The key.
    pub key: DecodingKey,
}

impl PublicKey {
    /// Of a key that ends then.
    #[must_use]
    pub fn of(key: &TokenKey, ends: Option<Timestamp>) -> Self {
        let public = key.public();
        let decoding = match key.alg() {
            Alg::EdDSA => DecodingKey::from_ed_der(&public),
            Alg::ES256 => DecodingKey::from_ec_der(&public),
        };
        Self { kid: key.kid().to_owned(), alg: key.alg(), ends, key: decoding }
    }

    /// Whether what it signed counts at this second.
    #[must_use]
    pub fn counts(&self, now: i64) -> bool {
        self.ends.is_none_or(|t| t.seconds() > now)
    }
}

/// A key as it is shown.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = SigningKeyState)]
pub(super) struct Shown {
    /// Its id in the JWKS
    pub kid: String,
    /// How it signs
    pub alg: Alg,
    /// `pending`, `active` or `ending`
    pub status: String,
    /// It signs from then on
    #[schema(value_type = String)]
    pub active_at: Timestamp,
    /// What it signed is refused from then on
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub ends_at: Option<Timestamp>,
}

/// New keys.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = SigningKeysRotated)]
pub(super) struct Rotated {
    /// The new EdDSA key's id
    pub kid: String,
    /// They sign from then on
    #[schema(value_type = String)]
    pub active_at: Timestamp,
    /// All new keys
    pub keys: Vec<Fresh>,
}

/// A new key.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[schema(as = SigningKeyMade)]
pub(super) struct Fresh {
    /// Its id in the JWKS
    pub kid: String,
    /// How it signs
    pub alg: Alg,
}

impl Token {
    /// Makes the keys that are not there yet.
    pub(super) async fn first_keys(&self) -> Result<(), Refusal> {
        let now = self.clock.now();
        if Alg::ALL.iter().all(|alg| self.snapshot.signer(*alg, now).is_some()) {
            return Ok(());
        }
        self.replace(&Caller::daemon("token"), &[], Why::First).await.map(drop)
    }

    /// Looks from time to time whether a key is old enough to be replaced.
    pub(super) fn start_rotation(&self, every: Option<Duration>, tasks: &Supervisor) {
        let Some(every) = every else { return };
        let room = self.clone();
        tasks.start(Task::periodic("token/rotate-keys", LOOK.min(every), move || {
            let room = room.clone();
            async move {
                let now = room.clock.now();
                if room.snapshot.newest().is_none_or(|t| t.plus(every) > now) {
                    return Ok(());
                }
                room.replace(&Caller::daemon("token"), &[], Why::Due(every))
                    .await
                    .map(drop)
                    .map_err(|e| e.detail().to_owned().into())
            }
        }));
    }

    /// Replaces the signing keys: announced now, signing after the lead. `compromised`: at once, and what the old ones signed
    /// counts no more.
    pub(super) async fn rotate_keys(&self, caller: &Caller, compromised: bool) -> Result<Committed<Rotated>, Refusal> {
        let ask = Ask::new("token:keys-rotate", "SigningKey", "all");
        let why = if compromised { Why::Compromised } else { Why::Asked };
        let done = self.replace(caller, &[ask], why).await?;
        done.ok_or_else(|| Refusal::internal("what was asked for is always due"))
    }

    async fn replace(&self, caller: &Caller, asks: &[Ask], why: Why) -> Result<Option<Committed<Rotated>>, Refusal> {
        let mut made = Vec::new();
        for alg in Alg::ALL {
            let (key, secret) = TokenKey::generate(alg)?;
            let sealed = self.master.seal(PURPOSE, secret.expose())?;
            made.push(store::StoredKey {
                kid: key.kid().to_owned(),
                alg,
                public: key.public(),
                sealed,
                active_at: self.clock.now(),
                ends_at: None,
            });
        }
        let command = Rotate { made, why, lead: self.lead, keep: self.ttl + GRACE };
        let done = match self.ledger.write(caller, asks, command).await {
            Err(r) if r.problem() == &problem::CONFLICT => None,
            done => Some(done?),
        };
        self.ledger.fence().await?;
        Ok(done)
    }

    /// The keys that are listed, the newest first.
    pub(super) async fn signing_keys(&self, caller: &Caller) -> Result<Vec<Shown>, Refusal> {
        self.ledger.permit(caller, &[Ask::new("token:keys-read", "SigningKey", "all")]).await?;
        let now = self.clock.now();
        let signs = Alg::ALL.map(|alg| self.snapshot.signer(alg, now).map(|k| k.kid().to_owned()));
        let shown = self.snapshot.listed(now).into_iter().map(|k| {
            let status = if signs.iter().flatten().any(|kid| kid == k.key.kid()) {
                "active"
            } else if k.active_at > now {
                "pending"
            } else {
                "ending"
            };
            let (kid, alg) = (k.key.kid().to_owned(), k.key.alg());
            Shown { kid, alg, status: status.to_owned(), active_at: k.active_at, ends_at: k.ends_at }
        });
        Ok(shown.collect())
    }
}

/// Why keys are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// There is none of a kind.
    First,
    /// The newest is so old.
    Due(Duration),
    /// Somebody asked.
    Asked,
    /// Somebody else may have the old ones.
    Compromised,
}

struct Rotate {
    made: Vec<store::StoredKey>,
    why: Why,
    lead: Duration,
    keep: Duration,
}

impl Command for Rotate {
    type Out = Rotated;

    async fn apply(&mut self, tx: &mut Tx<'_>) -> Result<(Rotated, Entry), Failure> {
        let known = store::keys(tx.read()).await?;
        let (index, now) = (tx.index(), tx.now());
        let newest = |alg: Alg| known.iter().filter(|k| k.alg == alg && k.ends_at.is_none()).map(|k| k.active_at).max();
        // Another daemon may have been quicker.
        let due = |alg: Alg| match self.why {
            Why::First => newest(alg).is_none(),
            Why::Due(age) => newest(alg).is_some_and(|t| t.plus(age) <= now),
            Why::Asked | Why::Compromised => true,
        };
        let at_once = matches!(self.why, Why::First | Why::Compromised);
        let active_at = if at_once { now } else { now.plus(self.lead) };
        let mut keys = Vec::new();
        for made in self.made.iter().filter(|m| due(m.alg)) {
            let ends = if self.why == Why::Compromised { now } else { active_at.plus(self.keep) };
            store::end_keys(tx.write(), made.alg, ends, self.why == Why::Compromised).await?;
            store::put_key(tx.write(), &store::StoredKey { active_at, ..made.clone() }, index, now).await?;
            keys.push(Fresh { kid: made.kid.clone(), alg: made.alg });
        }
        let Some(first) = keys.first() else {
            return Err(Refusal::new(&problem::CONFLICT, "the signing keys are as they should be").into());
        };
        let action = if self.why == Why::First { "token:key-make" } else { "token:keys-rotate" };
        let mut entry = Entry::ok(action, format!("signingkey/{}", first.kid))
            .change("keys", keys.iter().map(|k| k.kid.clone()).collect::<Vec<_>>())
            .change("active_at", active_at.to_string())
            .touch(Touch::key(AUTHZ, "key"));
        if self.why == Why::Compromised {
            for old in &known {
                entry = entry.touch(Touch::key(AUTHZ, format!("key/{}", old.kid)));
            }
            entry = entry
                .reason("the old keys may be known to others: what they signed counts no more")
                .signal("critical", "token/signing-keys-compromised");
        }
        let kid = first.kid.clone();
        Ok((Rotated { kid, active_at, keys }, entry))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thumbprint_is_that_of_rfc_8037() {
        // RFC 8037, A.1 to A.3.
        let seed = crypto::from_base64url("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A").unwrap();
        let key = TokenKey::open(Alg::EdDSA, &seed).unwrap();
        assert_eq!(key.jwk()["x"], "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo");
        assert_eq!(key.kid(), "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
    }

    #[test]
    fn a_p256_key_is_kept_and_opened_again() {
        let (key, secret) = TokenKey::generate(Alg::ES256).unwrap();
        let again = TokenKey::open(Alg::ES256, secret.expose()).unwrap();
        assert_eq!((key.kid(), key.jwk()), (again.kid(), again.jwk()));
        assert_eq!(key.jwk()["kty"], "EC");
        assert_eq!(key.signature(b"m").unwrap().len(), 64);
        assert!(TokenKey::open(Alg::ES256, b"no key").is_err());
    }
}
