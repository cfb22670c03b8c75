//! Access tokens: RFC 9068 `at+jwt`, EdDSA. Signed by held keys; read strictly, as RFC 8725 asks.

use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::kernel::crypto::{self, Hash, SigningKey};

/// A token longer than this is not looked at.
const LONGEST: usize = 8192;
/// How far clocks of others may be apart, seconds.
pub const LEEWAY: i64 = 5;

/// What an access token says.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Claims {
    /// Who issued it.
    pub iss: String,
    /// The client.
    pub sub: String,
    /// For whom.
    pub aud: Audience,
    /// When it ends, seconds since 1970.
    pub exp: i64,
    /// When it was issued.
    pub iat: i64,
    /// Its id.
    pub jti: String,
    /// The client it was issued to.
    pub client_id: String,
    /// What it is good for.
    pub scope: String,
}

/// One audience, or several.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
#[serde(untagged)]
pub enum Audience {
    /// One.
    One(String),
    /// Several.
    Several(Vec<String>),
}

impl Audience {
    /// Of these; one stands alone.
    #[must_use]
    pub fn of(mut all: Vec<String>) -> Self {
        match (all.len(), all.pop()) {
            (1, Some(one)) => Self::One(one),
            (_, last) => {
                all.extend(last);
                Self::Several(all)
            }
        }
    }

    /// Whether it names `who`.
    #[must_use]
    pub fn names(&self, who: &str) -> bool {
        match self {
            Self::One(one) => one == who,
            Self::Several(all) => all.iter().any(|a| a == who),
        }
    }
}

/// A key that signs access tokens.
pub struct TokenKey {
    kid: String,
    key: SigningKey,
    header: String,
}

impl TokenKey {
    /// From a key pair; the key id is the thumbprint of the public key (RFC 7638).
    #[must_use]
    pub fn new(key: SigningKey) -> Self {
        let kid = thumbprint(&key.public());
        let header = crypto::base64url(json!({"alg": "EdDSA", "kid": kid, "typ": "at+jwt"}).to_string());
        Self { kid, key, header }
    }

    /// Its id.
    #[must_use]
    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// Its public half.
    #[must_use]
    pub fn public(&self) -> Hash {
        self.key.public()
    }

    /// For the JWKS.
    #[must_use]
    pub fn jwk(&self) -> Value {
        json!({"kty": "OKP", "crv": "Ed25519", "x": crypto::base64url(self.public()), "kid": self.kid, "use": "sig", "alg": "EdDSA"})
    }

    /// Signs.
    #[must_use]
    pub fn sign(&self, claims: &Claims) -> String {
        let body = crypto::base64url(serde_json::to_vec(claims).unwrap_or_default());
        let signed = format!("{}.{body}", self.header);
        let signature = crypto::base64url(self.key.sign(signed.as_bytes()));
        format!("{signed}.{signature}")
    }
}

/// RFC 7638, for an Ed25519 key.
fn thumbprint(public: &Hash) -> String {
    let members = format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{}"}}"#, crypto::base64url(public));
    crypto::base64url(crypto::sha256(members.as_bytes()))
}

/// The header of a token, if it is one that may be looked at: three canonical base64url parts, no member but these.
#[must_use]
pub fn header(token: &str) -> Option<Map<String, Value>> {
    if token.len() > LONGEST {
        return None;
    }
    let parts: Vec<&str> = token.split('.').collect();
    let [head, body, signature] = parts.as_slice() else { return None };
    // Canonical: no padding, no spare bits. Otherwise one token would have many spellings.
    let canonical = |p: &str| crypto::from_base64url(p).filter(|b| crypto::base64url(b) == p);
    let (header, _, _) = (canonical(head)?, canonical(body)?, canonical(signature)?);
    let header: Map<String, Value> = serde_json::from_slice(&header).ok()?;
    header.keys().all(|k| matches!(k.as_str(), "alg" | "typ" | "kid")).then_some(header)
}

/// Reads an access token of ours: header, key, signature, issuer, times. `now` is in seconds.
///
/// # Errors
/// With why it is refused, for the log and the metric; callers hear only that it is.
pub fn verify(token: &str, keys: &[(String, Hash)], issuer: &str, now: i64) -> Result<Claims, &'static str> {
    let header = header(token).ok_or("form")?;
    if header.get("typ").and_then(Value::as_str) != Some("at+jwt") {
        return Err("typ");
    }
    if header.get("alg").and_then(Value::as_str) != Some("EdDSA") {
        return Err("alg");
    }
    let kid = header.get("kid").and_then(Value::as_str).ok_or("kid")?;
    let (_, public) = keys.iter().find(|(k, _)| k == kid).ok_or("kid")?;
    let mut validation = Validation::new(Algorithm::EdDSA);
    // The crate reads the wall clock; times are checked below, on ours.
    validation.validate_exp = false;
    validation.validate_aud = false;
    validation.required_spec_claims.clear();
    let key = DecodingKey::from_ed_der(public);
    let claims = jsonwebtoken::decode::<Claims>(token, &key, &validation).map_err(|_| "signature")?.claims;
    if claims.iss != issuer {
        return Err("iss");
    }
    if claims.exp <= now {
        return Err("expired");
    }
    if claims.iat > now + LEEWAY {
        return Err("iat");
    }
    Ok(claims)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::jose;

    fn claims() -> Claims {
        Claims {
            iss: "http://i".into(),
            sub: "c".into(),
            aud: Audience::of(vec!["http://i".into()]),
            exp: 2000,
            iat: 1000,
            jti: "j".into(),
            client_id: "c".into(),
            scope: "state".into(),
        }
    }

    fn forge(key: &TokenKey, header: &Value, claims: &Value) -> String {
        let signed = format!("{}.{}", crypto::base64url(header.to_string()), crypto::base64url(claims.to_string()));
        format!("{signed}.{}", crypto::base64url(key.key.sign(signed.as_bytes())))
    }

    #[test]
    fn a_token_verifies_and_every_forgery_is_refused() {
        jose::install();
        let key = TokenKey::new(SigningKey::generate().unwrap().0);
        let keys = [(key.kid().to_owned(), key.public())];
        let good = key.sign(&claims());
        assert_eq!(verify(&good, &keys, "http://i", 1500).unwrap(), claims());
        let why = |token: &str, now| verify(token, &keys, "http://i", now).unwrap_err();
        assert_eq!(why(&good, 2000), "expired");
        assert_eq!(why(&good, 900), "iat");
        assert_eq!(verify(&good, &keys, "http://j", 1500).unwrap_err(), "iss");
        let body = serde_json::to_value(claims()).unwrap();
        let kid = key.kid();
        for (header, says) in [
            (json!({"alg": "none", "kid": kid, "typ": "at+jwt"}), "alg"),
            (json!({"alg": "NoNe", "kid": kid, "typ": "at+jwt"}), "alg"),
            (json!({"alg": "HS256", "kid": kid, "typ": "at+jwt"}), "alg"),
            (json!({"alg": "EdDSA", "kid": kid, "typ": "JWT"}), "typ"),
            (json!({"alg": "EdDSA", "kid": kid}), "typ"),
            (json!({"alg": "EdDSA", "kid": "../../etc/passwd", "typ": "at+jwt"}), "kid"),
            (json!({"alg": "EdDSA", "typ": "at+jwt"}), "kid"),
            (json!({"alg": "EdDSA", "kid": kid, "typ": "at+jwt", "jwk": key.jwk()}), "form"),
            (json!({"alg": "EdDSA", "kid": kid, "typ": "at+jwt", "jku": "http://evil"}), "form"),
            (json!({"alg": "EdDSA", "kid": kid, "typ": "at+jwt", "x5u": "http://evil"}), "form"),
            (json!({"alg": "EdDSA", "kid": kid, "typ": "at+jwt", "crit": ["exp"]}), "form"),
        ] {
            assert_eq!(why(&forge(&key, &header, &body), 1500), says, "{header}");
        }
        let other = TokenKey::new(SigningKey::generate().unwrap().0);
        let proper = json!({"alg": "EdDSA", "kid": kid, "typ": "at+jwt"});
        assert_eq!(why(&forge(&other, &proper, &body), 1500), "signature", "signed by a stranger");
        assert_eq!(why(&format!("{good}="), 1500), "form");
        assert_eq!(why(&format!("{good}.x"), 1500), "form");
        assert_eq!(why(&"a".repeat(9000), 1500), "form");
        let (head, _) = good.rsplit_once('.').unwrap();
        assert_eq!(why(&format!("{head}."), 1500), "signature", "an empty signature");
        assert_eq!(why(&format!("{head}.{}", crypto::base64url([0u8; 64])), 1500), "signature");
    }

    #[test]
    fn spare_bits_are_refused() {
        let key = TokenKey::new(SigningKey::generate().unwrap().0);
        let good = key.sign(&claims());
        let last = good.chars().last().unwrap();
        // 64 bytes leave 4 spare bits in the last character.
        let twin = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let at = twin.find(last).unwrap();
        let malleable = format!("{}{}", &good[..good.len() - 1], &twin[at + 1..at + 2]);
        assert!(header(&malleable).is_none());
    }
}
