//! Access tokens: RFC 9068 `at+jwt`, read strictly, as RFC 8725 asks. What signs them is in `keys`.

use jsonwebtoken::{Algorithm, Validation};
use serde::{Deserialize, Serialize};

use crate::kernel::crypto;

use super::keys::{Alg, PublicKey};

/// A token longer than this is not looked at.
const LONGEST: usize = 8192;
/// None of ours is good for longer, seconds.
const LASTING: i64 = 86_400;
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
    /// Who acts for the subject, and who did before (RFC 8693, 4.1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub act: Option<Act>,
    /// The index its issue was decided at: which of its client's tokens still count is said by it.
    #[serde(default)]
    pub sop_index: i64,
    /// The tokens it was exchanged for, the first first: it ends with any of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub family: Vec<String>,
}

/// Who acts for somebody.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Act {
    /// A client.
    pub sub: String,
    /// Who it acts for in turn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub act: Option<Box<Act>>,
}

impl Act {
    /// All of them, who acts now first.
    pub fn chain(&self) -> impl Iterator<Item = &str> {
        std::iter::successors(Some(self), |a| a.act.as_deref()).map(|a| a.sub.as_str())
    }

    /// How many.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.chain().count()
    }
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

/// The header of a token of ours: these members, each once, and no other.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// What it is signed with.
    pub alg: String,
    /// Which kind of token it is.
    #[serde(default)]
    pub typ: Option<String>,
    /// Which key signed it.
    #[serde(default)]
    pub kid: Option<String>,
}

/// The header of a token of ours.
#[must_use]
pub fn header(token: &str) -> Option<Header> {
    serde_json::from_slice(&head(token)?).ok()
}

/// The text of the header of a token, if it is one that may be looked at: three canonical base64url parts.
#[must_use]
pub fn head(token: &str) -> Option<Vec<u8>> {
    if token.len() > LONGEST {
        return None;
    }
    let parts: Vec<&str> = token.split('.').collect();
    let [head, body, signature] = parts.as_slice() else { return None };
    // Canonical: no padding, no spare bits. Otherwise one token would have many spellings.
    let canonical = |p: &str| crypto::from_base64url(p).filter(|b| crypto::base64url(b) == p);
    let (head, _, _) = (canonical(head)?, canonical(body)?, canonical(signature)?);
    Some(head)
}

/// Reads an access token of ours: header, key, signature, issuer, times. `now` is in seconds.
///
/// # Errors
/// With why it is refused, for the log and the metric; callers hear only that it is.
pub fn verify<'a>(
    token: &str,
    keys: &'a [PublicKey],
    issuer: &str,
    now: i64,
) -> Result<(Claims, &'a PublicKey), &'static str> {
    let header = header(token).ok_or("form")?;
    if header.typ.as_deref() != Some("at+jwt") {
        return Err("typ");
    }
    let alg = Alg::parse(&header.alg).ok_or("alg")?;
    let kid = header.kid.ok_or("kid")?;
    let key = keys.iter().find(|k| k.kid == kid && k.counts(now)).ok_or("kid")?;
    // What a key signs with is said by the key, never by the token.
    if key.alg != alg {
        return Err("alg");
    }
    let mut validation = Validation::new(match key.alg {
        Alg::EdDSA => Algorithm::EdDSA,
        Alg::ES256 => Algorithm::ES256,
    });
    // The crate reads the wall clock; times are checked below, on ours.
    validation.validate_exp = false;
    validation.validate_aud = false;
    validation.required_spec_claims.clear();
    let claims = jsonwebtoken::decode::<Claims>(token, &key.key, &validation).map_err(|_| "signature")?.claims;
    if claims.iss != issuer {
        return Err("iss");
    }
    if claims.exp <= now {
        return Err("expired");
    }
    if claims.exp - claims.iat > LASTING {
        return Err("exp");
    }
    if claims.iat > now + LEEWAY {
        return Err("iat");
    }
    Ok((claims, key))
}

#[cfg(test)]
mod tests {
    use super::super::keys::TokenKey;
    use super::*;
    use crate::kernel::{Timestamp, jose};
    use serde_json::{Value, json};

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
            act: None,
            sop_index: 7,
            family: Vec::new(),
        }
    }

    fn forge(key: &TokenKey, header: &Value, claims: &Value) -> String {
        let signed = format!("{}.{}", crypto::base64url(header.to_string()), crypto::base64url(claims.to_string()));
        format!("{signed}.{}", crypto::base64url(key.signature(signed.as_bytes()).unwrap()))
    }

    #[test]
    fn a_token_verifies_and_every_forgery_is_refused() {
        jose::install();
        for alg in Alg::ALL {
            forgeries(alg);
        }
    }

    fn forgeries(alg: Alg) {
        let fresh = || TokenKey::generate(alg).unwrap().0;
        let key = fresh();
        let keys = [PublicKey::of(&key, None)];
        let good = key.sign(&claims()).unwrap();
        assert_eq!(verify(&good, &keys, "http://i", 1500).map_err(str::to_owned).map(|v| v.0), Ok(claims()));
        let why = |token: &str, now| verify(token, &keys, "http://i", now).map(|v| v.0).unwrap_err();
        assert_eq!(why(&good, 2000), "expired");
        assert_eq!(why(&good, 900), "iat");
        assert_eq!(verify(&good, &keys, "http://j", 1500).map(|v| v.0).unwrap_err(), "iss");
        let ended = [PublicKey::of(&key, Some(Timestamp::from_millis(1_500_900)))];
        assert!(verify(&good, &ended, "http://i", 1499).is_ok());
        assert_eq!(verify(&good, &ended, "http://i", 1500).map(|v| v.0).unwrap_err(), "kid", "its key has ended");
        let body = serde_json::to_value(claims()).unwrap();
        let kid = key.kid();
        let name = alg.as_str();
        for (header, says) in [
            (json!({"alg": "none", "kid": kid, "typ": "at+jwt"}), "alg"),
            (json!({"alg": "NoNe", "kid": kid, "typ": "at+jwt"}), "alg"),
            (json!({"alg": if alg == Alg::EdDSA { "ES256" } else { "EdDSA" }, "kid": kid, "typ": "at+jwt"}), "alg"),
            (json!({"alg": "HS256", "kid": kid, "typ": "at+jwt"}), "alg"),
            (json!({"alg": name, "kid": kid, "typ": "JWT"}), "typ"),
            (json!({"alg": name, "kid": kid}), "typ"),
            (json!({"alg": name, "kid": "../../etc/passwd", "typ": "at+jwt"}), "kid"),
            (json!({"alg": name, "typ": "at+jwt"}), "kid"),
            (json!({"alg": name, "kid": kid, "typ": "at+jwt", "jwk": key.jwk()}), "form"),
            (json!({"alg": name, "kid": kid, "typ": "at+jwt", "jku": "http://evil"}), "form"),
            (json!({"alg": name, "kid": kid, "typ": "at+jwt", "x5u": "http://evil"}), "form"),
            (json!({"alg": name, "kid": kid, "typ": "at+jwt", "crit": ["exp"]}), "form"),
        ] {
            assert_eq!(why(&forge(&key, &header, &body), 1500), says, "{header}");
        }
        let lasting = serde_json::to_value(Claims { exp: 1000 + LASTING + 1, ..claims() }).unwrap();
        assert_eq!(why(&forge(&key, &json!({"alg": name, "kid": kid, "typ": "at+jwt"}), &lasting), 1500), "exp");
        let twice = |head: String, body: String| {
            let signed = format!("{}.{}", crypto::base64url(head), crypto::base64url(body));
            format!("{signed}.{}", crypto::base64url(key.signature(signed.as_bytes()).unwrap()))
        };
        let head = format!(r#"{{"alg":"none","alg":"{name}","kid":"{kid}","typ":"at+jwt"}}"#);
        assert_eq!(why(&twice(head, body.to_string()), 1500), "form", "a header member twice");
        let head = format!(r#"{{"alg":"{name}","kid":"{kid}","typ":"at+jwt"}}"#);
        let double = format!(r#"{{"scope":"admin",{}"#, &body.to_string()[1..]);
        assert_eq!(why(&twice(head, double), 1500), "signature", "a claim twice: it is not read");
        let other = fresh();
        let proper = json!({"alg": name, "kid": kid, "typ": "at+jwt"});
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
        let good = TokenKey::generate(Alg::EdDSA).unwrap().0.sign(&claims()).unwrap();
        let last = good.chars().last().unwrap();
        // 64 bytes leave 4 spare bits in the last character.
        let twin = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let at = twin.find(last).unwrap();
        let malleable = format!("{}{}", &good[..good.len() - 1], &twin[at + 1..at + 2]);
        assert!(header(&malleable).is_none());
    }
}
