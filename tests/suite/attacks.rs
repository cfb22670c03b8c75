//! The attacks of RFC 8725 (JWT best practice) and RFC 9700 (OAuth security) that can be tried from outside, one test a kind. What
//! only a holder of the daemon's keys could try is tried in `src/token/jwt.rs`.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use reqwest::Method;
use serde_json::{Value, json};
use sop::kernel::crypto::{SigningKey, base64url, from_base64url};

use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::postgres::{Database, database};
use crate::support::record;

async fn start() -> (Database, Daemon, Client) {
    let db = database().await;
    let daemon = Launch::on(db.url()).env("SOP__TOKEN__LOCKOUT_FAILURES", "0").start().await;
    let client = Client::of(&daemon);
    (db, daemon, client)
}

fn now() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap()
}

fn part(token: &str, n: usize) -> Value {
    serde_json::from_slice(&from_base64url(token.split('.').nth(n).unwrap()).unwrap()).unwrap()
}

fn forged(header: &Value, body: &Value, sign: impl Fn(&[u8]) -> Vec<u8>) -> String {
    let signed = format!("{}.{}", base64url(header.to_string()), base64url(body.to_string()));
    format!("{signed}.{}", base64url(sign(signed.as_bytes())))
}

fn hmac_sha256(key: &[u8], message: &[u8]) -> Vec<u8> {
    ring::hmac::sign(&ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key), message).as_ref().to_vec()
}

/// What a daemon answers who brings this token: status, and the body without the id of the request.
async fn brought(at: &Client, token: &str) -> (u16, Value) {
    let answer = at.bare(Method::GET, "/v1/state/kv").bearer_auth(token).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap_or_default())
}

async fn jwks(at: &Client) -> Value {
    at.bare(Method::GET, "/.well-known/jwks.json").send().await.unwrap().json().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_forged_access_token_is_taken_and_all_are_answered_alike() {
    let (db, _daemon, admin) = start().await;
    let good = admin.token().await;
    assert_eq!(brought(&admin, &good).await.0, 200);
    let (header, body) = (part(&good, 0), part(&good, 1));
    let keys = jwks(&admin).await;
    let ours = keys["keys"].as_array().unwrap().iter().find(|k| k["kid"] == header["kid"]).unwrap().clone();
    let public = from_base64url(ours["x"].as_str().unwrap()).unwrap();
    let (mine, _) = SigningKey::generate().unwrap();
    let jwk = json!({"kty": "OKP", "crv": "Ed25519", "x": base64url(mine.public())});
    let with = |more: Value| {
        let mut h = header.clone();
        h.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        h
    };
    let by_me = |s: &[u8]| mine.sign(s).to_vec();
    let hmac = |key: Vec<u8>| move |s: &[u8]| hmac_sha256(&key, s);
    let es256 = keys["keys"].as_array().unwrap().iter().find(|k| k["alg"] == "ES256").unwrap().clone();
    let zero = |_: &[u8]| vec![0u8; 64];
    let none = |_: &[u8]| Vec::new();
    let (head, tail) = good.rsplit_once('.').unwrap();
    let signature = from_base64url(tail).unwrap();
    // Ed25519's other form of the same signature: S + L.
    let malleable = {
        let order: [u8; 32] = [
            0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7, 0xa2, 0xde, 0xf9, 0xde, 0x14, 0, 0, 0, 0,
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10,
        ];
        let (mut twin, mut carry) = (signature.clone(), 0u16);
        for i in 0..32 {
            let sum = u16::from(twin[32 + i]) + u16::from(order[i]) + carry;
            twin[32 + i] = (sum & 0xff) as u8;
            carry = sum >> 8;
        }
        format!("{head}.{}", base64url(twin))
    };
    let first = brought(&admin, "garbage").await;
    assert_eq!(first.0, 401);
    for (what, token) in [
        ("alg none", forged(&with(json!({"alg": "none"})), &body, none)),
        ("alg None", forged(&with(json!({"alg": "None"})), &body, none)),
        ("alg NONE, with a signature", forged(&with(json!({"alg": "NONE"})), &body, by_me)),
        ("alg empty", forged(&with(json!({"alg": ""})), &body, none)),
        ("HMAC with the public key", forged(&with(json!({"alg": "HS256"})), &body, hmac(public.clone()))),
        (
            "HMAC with the public key's text",
            forged(&with(json!({"alg": "HS256"})), &body, hmac(ours["x"].to_string().into_bytes())),
        ),
        ("HMAC with nothing", forged(&with(json!({"alg": "HS256"})), &body, hmac(Vec::new()))),
        ("another's key under our kid", forged(&header, &body, by_me)),
        ("a kid that is a path", forged(&with(json!({"kid": "../../../dev/null"})), &body, hmac(Vec::new()))),
        ("a kid that is SQL", forged(&with(json!({"kid": "' OR 1=1 --"})), &body, by_me)),
        ("its own key in jwk", forged(&with(json!({"jwk": jwk})), &body, by_me)),
        ("its key elsewhere, jku", forged(&with(json!({"jku": "http://127.0.0.1:1/jwks"})), &body, by_me)),
        ("its key elsewhere, x5u", forged(&with(json!({"x5u": "http://127.0.0.1:1/x5u"})), &body, by_me)),
        ("its certificate, x5c", forged(&with(json!({"x5c": ["MIIB"]})), &body, by_me)),
        ("crit", forged(&with(json!({"crit": ["exp"], "exp": 0})), &body, by_me)),
        ("psychic: r = s = 0", forged(&json!({"alg": "ES256", "kid": es256["kid"], "typ": "at+jwt"}), &body, zero)),
        (
            "ES256 without a signature",
            forged(&json!({"alg": "ES256", "kid": es256["kid"], "typ": "at+jwt"}), &body, none),
        ),
        ("an EdDSA key said to be ES256", forged(&with(json!({"alg": "ES256"})), &body, by_me)),
        ("typ JWT", forged(&with(json!({"typ": "JWT"})), &body, by_me)),
        ("S + L", malleable),
        ("padding", format!("{good}=")),
        ("a fourth part", format!("{good}.e30")),
        ("two parts", head.to_owned()),
        ("not base64url", good.replace('_', "/").replace('-', "+") + "+"),
        ("a byte more", format!("{head}.{}", base64url([&signature[..], &[0]].concat()))),
        ("oversized", format!("{good}{}", "A".repeat(10_000))),
        ("nested", base64url(&good)),
        ("a JWE", "eyJhbGciOiJkaXIiLCJlbmMiOiJBMTI4R0NNIn0..AAAA.AAAA.AAAA".to_owned()),
    ] {
        assert_eq!(brought(&admin, &token).await, first, "{what}");
    }
    assert_eq!(brought(&admin, &good).await.0, 200);
    record::check(&db).await;
}

struct Prover {
    key: SigningKey,
    id: String,
    aud: String,
}

impl Prover {
    async fn registered(admin: &Client, aud: &str) -> Self {
        let (key, _) = SigningKey::generate().unwrap();
        let jwk = json!({"kty": "OKP", "crv": "Ed25519", "x": base64url(key.public()), "kid": "k"});
        let wanted =
            json!({"scope": "state", "token_endpoint_auth_method": "private_key_jwt", "jwks": {"keys": [jwk]}});
        let (status, made) = admin.json(Method::POST, "/oauth2/register", &wanted).await;
        assert_eq!(status, 201, "{made}");
        Self { key, id: made["client_id"].as_str().unwrap().to_owned(), aud: aud.to_owned() }
    }

    fn claims(&self, more: Value) -> Value {
        let jti = uuid::Uuid::new_v4().to_string();
        let mut body = json!({"iss": self.id, "sub": self.id, "aud": self.aud, "exp": now() + 60, "jti": jti});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    }

    fn assertion(&self, body: &Value) -> String {
        forged(&json!({"alg": "EdDSA", "kid": "k"}), body, |s| self.key.sign(s).to_vec())
    }
}

async fn prove(at: &Client, assertion: &str) -> (u16, Value) {
    let pairs = [
        ("grant_type", "client_credentials"),
        ("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"),
        ("client_assertion", assertion),
    ];
    let answer = at.bare(Method::POST, "/oauth2/token").form(&pairs).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_improper_assertion_proves_a_client_and_all_are_answered_alike() {
    let (db, daemon, admin) = start().await;
    let a = Prover::registered(&admin, &daemon.url).await;
    let b = Prover::registered(&admin, &daemon.url).await;
    let first = prove(&admin, "garbage").await;
    assert_eq!((first.0, first.1["error"].as_str()), (401, Some("invalid_client")));
    let good = a.assertion(&a.claims(json!({})));
    assert_eq!(prove(&admin, &good).await.0, 200);
    assert_eq!(prove(&admin, &good).await, first, "replayed");
    let twice = |body: &Value, name: &str, value: &str| {
        let text = body.to_string();
        let text = format!("{{\"{name}\":{value},{}", &text[1..]);
        let signed = format!("{}.{}", base64url(json!({"alg": "EdDSA", "kid": "k"}).to_string()), base64url(text));
        format!("{signed}.{}", base64url(a.key.sign(signed.as_bytes())))
    };
    let header = |h: Value, sign: &dyn Fn(&[u8]) -> Vec<u8>| forged(&h, &a.claims(json!({})), sign);
    let by_a = |s: &[u8]| a.key.sign(s).to_vec();
    let without = |name: &str| {
        let mut body = a.claims(json!({}));
        body.as_object_mut().unwrap().remove(name);
        a.assertion(&body)
    };
    for (what, assertion) in [
        ("of another, by its own key", forged(&json!({"alg": "EdDSA", "kid": "k"}), &b.claims(json!({})), by_a)),
        ("iss and sub differ", a.assertion(&a.claims(json!({"sub": b.id})))),
        ("for another server", a.assertion(&a.claims(json!({"aud": "https://other.example"})))),
        (
            "for another server too, as text",
            a.assertion(&a.claims(json!({"aud": format!("{}, https://x", daemon.url)}))),
        ),
        ("expired", a.assertion(&a.claims(json!({"exp": now() - 1})))),
        ("far-future exp", a.assertion(&a.claims(json!({"exp": now() + 7200})))),
        ("exp beyond all numbers", a.assertion(&a.claims(json!({"exp": u64::MAX})))),
        ("exp is text", a.assertion(&a.claims(json!({"exp": "tomorrow"})))),
        ("future nbf", a.assertion(&a.claims(json!({"nbf": now() + 60})))),
        ("future iat", a.assertion(&a.claims(json!({"iat": now() + 60})))),
        ("without exp", without("exp")),
        ("without jti", without("jti")),
        ("without aud", without("aud")),
        ("without sub", without("sub")),
        ("empty jti", a.assertion(&a.claims(json!({"jti": ""})))),
        ("iss twice", twice(&a.claims(json!({})), "iss", &format!("\"{}\"", b.id))),
        ("exp twice", twice(&a.claims(json!({})), "exp", "1")),
        ("alg none", header(json!({"alg": "none", "kid": "k"}), &|_| Vec::new())),
        ("HMAC with the public key", header(json!({"alg": "HS256", "kid": "k"}), &|s| hmac_sha256(&a.key.public(), s))),
        ("RS256 over an Ed25519 key", header(json!({"alg": "RS256", "kid": "k"}), &by_a)),
        ("crit", header(json!({"alg": "EdDSA", "kid": "k", "crit": ["b64"], "b64": false}), &by_a)),
        ("an access token's typ", header(json!({"alg": "EdDSA", "kid": "k", "typ": "at+jwt"}), &by_a)),
        ("oversized", a.assertion(&a.claims(json!({"x": "x".repeat(10_000)})))),
        ("padding", format!("{}=", a.assertion(&a.claims(json!({}))))),
        ("an access token", admin.token().await),
    ] {
        assert_eq!(prove(&admin, &assertion).await, first, "{what}");
    }
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_kind_of_token_passes_for_another() {
    let (db, daemon, admin) = start().await;
    let a = Prover::registered(&admin, &daemon.url).await;
    let (_, made) = admin.json(Method::POST, "/oauth2/register", &json!({"scope": "state"})).await;
    let (_, operation) =
        admin.json(Method::POST, "/v1/token/operations", &json!({"kind": "test", "operation": "x"})).await;
    let text = |v: &Value, name: &str| v[name].as_str().unwrap().to_owned();
    let access = admin.with(&text(&made, "client_id"), &text(&made, "client_secret")).token().await;
    let registration = text(&made, "registration_access_token");
    // As a bearer of the API.
    for token in [
        a.assertion(&a.claims(json!({}))),
        text(&operation, "token"),
        registration.clone(),
        text(&made, "client_secret"),
    ] {
        assert_eq!(brought(&admin, &token).await.0, 401);
    }
    // An access token, and another client's registration token, as a registration token.
    let (_, other) = admin.json(Method::POST, "/oauth2/register", &json!({"scope": "state"})).await;
    let path = format!("/oauth2/register/{}", text(&other, "client_id"));
    for token in [access.clone(), registration.clone()] {
        let answer = admin.bare(Method::PUT, &path).bearer_auth(&token).json(&json!({"scope": "state"})).send().await;
        assert!(matches!(answer.unwrap().status().as_u16(), 401 | 403));
    }
    // Anything as an operation token.
    for token in [access.clone(), registration.clone(), text(&made, "client_secret"), text(&operation, "id")] {
        let body = json!({"token": token, "operation": "x"});
        assert_eq!(admin.json(Method::POST, "/v1/token/operations/use", &body).await.0, 404);
    }
    // Anything but an access token in an exchange, or to introspection.
    let grant = "urn:ietf:params:oauth:grant-type:token-exchange";
    let (_, acting) =
        admin.json(Method::POST, "/oauth2/register", &json!({"scope": "state", "grant_types": [grant]})).await;
    let form = |path: &'static str, pairs: Vec<(&'static str, String)>| {
        let request =
            admin.bare(Method::POST, path).basic_auth(text(&acting, "client_id"), Some(text(&acting, "client_secret")));
        async move { request.form(&pairs).send().await.unwrap().json::<Value>().await.unwrap() }
    };
    for token in [a.assertion(&a.claims(json!({}))), text(&operation, "token"), registration.clone()] {
        let pairs = vec![
            ("grant_type", grant.to_owned()),
            ("subject_token", token.clone()),
            ("subject_token_type", "urn:ietf:params:oauth:token-type:access_token".to_owned()),
        ];
        assert_eq!(form("/oauth2/token", pairs).await["error"], "invalid_request");
        assert_eq!(form("/oauth2/introspect", vec![("token", token)]).await, json!({"active": false}));
    }
    // A token in the address is none (RFC 9700, 2.6: it would be in every log on the way).
    let answer = admin.bare(Method::GET, &format!("/v1/state/kv?access_token={access}")).send().await.unwrap();
    assert_eq!(answer.status(), 401);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_client_and_a_wrong_secret_take_the_same_time() {
    let (db, _daemon, admin) = start().await;
    let (_, made) = admin.json(Method::POST, "/oauth2/register", &json!({"scope": "state"})).await;
    let known = made["client_id"].as_str().unwrap();
    let took = |id: String| {
        let request = admin.bare(Method::POST, "/oauth2/token");
        let form =
            [("grant_type", "client_credentials".to_owned()), ("client_id", id), ("client_secret", "wrong".into())];
        async move {
            let began = Instant::now();
            let answer = request.form(&form).send().await.unwrap();
            assert_eq!(answer.status(), 401);
            let _ = answer.bytes().await;
            began.elapsed()
        }
    };
    let unknown = "01a20d5d-0000-7000-8000-000000000000";
    // The lower quartile is what the work takes; the rest is the machine. Up to three tries, because it is a shared one.
    let mut ratios = Vec::new();
    for _ in 0..3 {
        let (mut a, mut b): (Vec<Duration>, Vec<Duration>) = (Vec::new(), Vec::new());
        for _ in 0..200 {
            a.push(took(known.to_owned()).await);
            b.push(took(unknown.to_owned()).await);
        }
        a.sort_unstable();
        b.sort_unstable();
        ratios.push(a[50].as_secs_f64() / b[50].as_secs_f64());
        if ratios.last().is_some_and(|r| (0.85..1.18).contains(r)) {
            break;
        }
    }
    assert!(ratios.last().is_some_and(|r| (0.85..1.18).contains(r)), "wrong secret to unknown client: {ratios:?}");
    record::check(&db).await;
}
