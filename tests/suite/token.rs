//! Clients, access tokens and operation tokens over HTTP.

use futures_util::future::join_all;
use reqwest::{Method, Response};
use serde_json::{Value, json};
use sop::kernel::crypto::{SigningKey, base64url, from_base64url, verify_ed25519};

use crate::support::client::Client;
use crate::support::daemon::{Daemon, Launch};
use crate::support::postgres::{Database, database};
use crate::support::record;

async fn start() -> (Database, Daemon, Client) {
    let db = database().await;
    let daemon = Launch::on(db.url()).start().await;
    let client = Client::of(&daemon);
    (db, daemon, client)
}

async fn register(admin: &Client, wanted: Value) -> Value {
    let (status, made) = admin.json(Method::POST, "/oauth2/register", &wanted).await;
    assert_eq!(status, 201, "{made}");
    made
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_else(|| panic!("no {name} in {value}"))
}

async fn form(client: &Client, path: &str, pairs: &[(&str, &str)]) -> (u16, Value) {
    answer(client.bare(Method::POST, path).form(pairs).send().await.unwrap()).await
}

async fn answer(response: Response) -> (u16, Value) {
    (response.status().as_u16(), response.json().await.unwrap_or_default())
}

fn claims(token: &str) -> (Value, Value) {
    let part = |n: usize| serde_json::from_slice(&from_base64url(token.split('.').nth(n).unwrap()).unwrap()).unwrap();
    (part(0), part(1))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_gets_tokens_by_either_way_of_its_secret() {
    let (db, daemon, admin) = start().await;
    let made =
        register(&admin, json!({"client_name": "ARP", "scope": "state audit:read", "agent_type": "system"})).await;
    let (id, secret) = (text(&made, "client_id"), text(&made, "client_secret"));
    let grant = [("grant_type", "client_credentials")];
    let basic =
        admin.bare(Method::POST, "/oauth2/token").basic_auth(id, Some(secret)).form(&grant).send().await.unwrap();
    assert_eq!(basic.headers()["cache-control"], "no-store");
    let (status, one) = answer(basic).await;
    assert_eq!((status, text(&one, "token_type"), text(&one, "scope")), (200, "Bearer", "state audit:read"));
    let (status, two) =
        form(&admin, "/oauth2/token", &[grant[0], ("client_id", id), ("client_secret", secret), ("scope", "state")])
            .await;
    assert_eq!((status, text(&two, "scope")), (200, "state"));
    let (header, body) = claims(text(&two, "access_token"));
    assert_eq!((text(&header, "typ"), text(&header, "alg")), ("at+jwt", "EdDSA"));
    assert_eq!((text(&body, "sub"), text(&body, "client_id"), text(&body, "iss")), (id, id, daemon.url.as_str()));
    assert_eq!(body["exp"].as_i64().unwrap() - body["iat"].as_i64().unwrap(), two["expires_in"].as_i64().unwrap());
    // Anyone can check it with the published key.
    let (_, jwks) = answer(admin.bare(Method::GET, "/.well-known/jwks.json").send().await.unwrap()).await;
    let key = jwks["keys"].as_array().unwrap().iter().find(|k| k["kid"] == header["kid"]).unwrap();
    let (signed, signature) = text(&two, "access_token").rsplit_once('.').unwrap();
    assert!(verify_ed25519(
        &from_base64url(text(key, "x")).unwrap(),
        signed.as_bytes(),
        &from_base64url(signature).unwrap()
    ));
    let (_, meta) =
        answer(admin.bare(Method::GET, "/.well-known/oauth-authorization-server").send().await.unwrap()).await;
    assert_eq!((text(&meta, "issuer"), &meta["response_types_supported"]), (daemon.url.as_str(), &json!([])));
    let (_, page) = admin.get(&format!("/v1/audit/entries?action=token:issue&actor={id}")).await;
    assert_eq!(page["items"].as_array().unwrap().len(), 2, "each issue is in the record");
    assert!(!daemon.log().contains(secret) && !page.to_string().contains(secret));
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_proper_token_request_is_an_oauth_error() {
    let (db, _daemon, admin) = start().await;
    let made = register(&admin, json!({"scope": "state", "allowed_resources": ["https://api.example"]})).await;
    let (id, secret) = (text(&made, "client_id"), text(&made, "client_secret"));
    let who = [("client_id", id), ("client_secret", secret)];
    let all = |more: &[(&'static str, &'static str)]| [&who[..], more].concat();
    let grant = ("grant_type", "client_credentials");
    for (pairs, status, code) in [
        (all(&[]), 400, "invalid_request"),
        (all(&[("grant_type", "password")]), 400, "unsupported_grant_type"),
        (all(&[grant, grant]), 400, "invalid_request"),
        (all(&[grant, ("scope", "admin")]), 400, "invalid_scope"),
        (all(&[grant, ("scope", "a\tb")]), 400, "invalid_scope"),
        (all(&[grant, ("resource", "https://other.example")]), 400, "invalid_target"),
        (all(&[grant, ("resource", "https://api.example#x")]), 400, "invalid_target"),
        (vec![("client_id", id), ("client_secret", "wrong"), grant], 401, "invalid_client"),
        (vec![("client_id", "nobody"), ("client_secret", "wrong"), grant], 401, "invalid_client"),
        (vec![grant], 401, "invalid_client"),
    ] {
        let (got, body) = form(&admin, "/oauth2/token", &pairs).await;
        assert_eq!((got, text(&body, "error")), (status, code), "{pairs:?}");
    }
    let unknown = form(&admin, "/oauth2/token", &[("client_id", "nobody"), ("client_secret", "x"), grant]).await;
    let wrong = form(&admin, "/oauth2/token", &[("client_id", id), ("client_secret", "x"), grant]).await;
    assert_eq!(unknown, wrong, "no oracle");
    let twice = admin
        .bare(Method::POST, "/oauth2/token")
        .basic_auth(id, Some(secret))
        .form(&all(&[grant]))
        .send()
        .await
        .unwrap();
    assert_eq!(text(&answer(twice).await.1, "error"), "invalid_request");
    let json = admin
        .bare(Method::POST, "/oauth2/token")
        .json(&json!({"grant_type": "client_credentials"}))
        .send()
        .await
        .unwrap();
    assert_eq!(text(&answer(json).await.1, "error"), "invalid_request");
    let (status, for_api) = form(&admin, "/oauth2/token", &all(&[grant, ("resource", "https://api.example")])).await;
    assert_eq!((status, text(&claims(text(&for_api, "access_token")).1, "aud")), (200, "https://api.example"));
    let here =
        admin.bare(Method::GET, "/v1/state/kv").bearer_auth(text(&for_api, "access_token")).send().await.unwrap();
    assert_eq!(here.status(), 401, "a token for another audience is none for this daemon");
    record::check(&db).await;
}

fn assertion(key: &SigningKey, header: &Value, body: &Value) -> String {
    let signed = format!("{}.{}", base64url(header.to_string()), base64url(body.to_string()));
    format!("{signed}.{}", base64url(key.sign(signed.as_bytes())))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_assertion_proves_a_client_once() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let two = Launch::beside(&one, db.url()).start().await;
    let admin = Client::of(&one);
    let (key, _) = SigningKey::generate().unwrap();
    let jwk = json!({"kty": "OKP", "crv": "Ed25519", "x": base64url(key.public()), "kid": "k1"});
    let made = register(
        &admin,
        json!({"scope": "state", "token_endpoint_auth_method": "private_key_jwt", "jwks": {"keys": [jwk]}}),
    )
    .await;
    assert!(made.get("client_secret").is_none());
    let id = text(&made, "client_id");
    let now = sop::kernel::Clock::system().now().seconds();
    let body = |jti: &str| json!({"iss": id, "sub": id, "aud": one.url, "exp": now + 60, "iat": now, "jti": jti});
    let header = json!({"alg": "EdDSA", "kid": "k1"});
    let send = |client: Client, assertion: String| async move {
        let kind = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
        form(
            &client,
            "/oauth2/token",
            &[("grant_type", "client_credentials"), ("client_assertion_type", kind), ("client_assertion", &assertion)],
        )
        .await
    };
    let good = assertion(&key, &header, &body("1"));
    assert_eq!(send(admin.also_of(&one), good.clone()).await.0, 200);
    assert_eq!(send(admin.also_of(&one), good.clone()).await.0, 401, "used before");
    assert_eq!(send(admin.also_of(&two), good).await.0, 401, "used before, on another daemon");
    let both = assertion(&key, &header, &body("2"));
    let raced = join_all((0..8).map(|i| send(admin.also_of(if i % 2 == 0 { &one } else { &two }), both.clone()))).await;
    assert_eq!(raced.iter().filter(|r| r.0 == 200).count(), 1, "{raced:?}");
    let (stranger, _) = SigningKey::generate().unwrap();
    let with = |name: &str, value: Value| {
        let mut b = body("3");
        b[name] = value;
        b
    };
    for (why, forged) in [
        ("a stranger's key", assertion(&stranger, &header, &body("3"))),
        ("alg none", assertion(&key, &json!({"alg": "none"}), &body("3"))),
        ("HMAC", assertion(&key, &json!({"alg": "HS256", "kid": "k1"}), &body("3"))),
        ("another kid", assertion(&key, &json!({"alg": "EdDSA", "kid": "k2"}), &body("3"))),
        ("a key in the header", assertion(&key, &json!({"alg": "EdDSA", "jwk": {}}), &body("3"))),
        ("expired", assertion(&key, &header, &with("exp", json!(now - 1)))),
        ("good for years", assertion(&key, &header, &with("exp", json!(now + 100_000)))),
        ("not yet", assertion(&key, &header, &with("nbf", json!(now + 1000)))),
        ("for another", assertion(&key, &header, &with("aud", json!("https://other")))),
        ("another subject", assertion(&key, &header, &with("sub", json!("admin")))),
        ("no id", assertion(&key, &header, &with("jti", json!("")))),
    ] {
        assert_eq!(send(admin.also_of(&one), forged).await.0, 401, "{why}");
    }
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_is_managed_by_its_token_and_ends_with_its_tokens() {
    let (db, _daemon, admin) = start().await;
    let bare = admin.bare(Method::POST, "/oauth2/register").json(&json!({})).send().await.unwrap();
    assert_eq!(bare.status(), 401);
    let made = register(&admin, json!({"client_name": "x", "scope": "state"})).await;
    let (id, secret, manage) =
        (text(&made, "client_id"), text(&made, "client_secret"), text(&made, "registration_access_token"));
    let client = admin.with(id, secret);
    let token = client.token().await;
    let path = format!("/oauth2/register/{id}");
    let send = |method: Method, bearer: String, body: Option<Value>| {
        let request = admin.bare(method, &path).bearer_auth(bearer);
        async move { answer(body.map_or(request.try_clone().unwrap(), |b| request.json(&b)).send().await.unwrap()).await }
    };
    assert_eq!(send(Method::GET, manage.into(), None).await.1["client_name"], "x");
    assert_eq!(send(Method::GET, token.clone(), None).await.0, 200, "a client reads itself");
    assert_eq!(send(Method::GET, "guess".into(), None).await.0, 401);
    assert_eq!(
        send(Method::PUT, manage.into(), Some(json!({"client_name": "y", "scope": "state admin"}))).await.0,
        400,
        "no scopes for oneself"
    );
    let (status, changed) = send(Method::PUT, manage.into(), Some(json!({"client_name": "y", "scope": "state"}))).await;
    assert_eq!((status, text(&changed, "client_name")), (200, "y"));
    assert_eq!(client.json(Method::POST, "/oauth2/register", &json!({})).await.0, 403, "it may not register others");
    assert_eq!(send(Method::DELETE, manage.into(), None).await.0, 204);
    let after = admin.bare(Method::GET, "/v1/state/kv").bearer_auth(&token).send().await.unwrap();
    assert_eq!(after.status(), 401, "its tokens end with it");
    assert_eq!(send(Method::GET, manage.into(), None).await.0, 401);
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn introspection_tells_only_whom_it_concerns() {
    let (db, _daemon, admin) = start().await;
    let made = register(&admin, json!({"scope": "state"})).await;
    let other = register(&admin, json!({"scope": "state"})).await;
    let token = admin.with(text(&made, "client_id"), text(&made, "client_secret")).token().await;
    let ask = |who: Value, token: String| {
        let request = admin
            .bare(Method::POST, "/oauth2/introspect")
            .basic_auth(text(&who, "client_id"), Some(text(&who, "client_secret")));
        async move { answer(request.form(&[("token", token)]).send().await.unwrap()).await.1 }
    };
    let seen = ask(made.clone(), token.clone()).await;
    assert_eq!(
        (&seen["active"], text(&seen, "scope"), text(&seen, "client_id")),
        (&json!(true), "state", text(&made, "client_id"))
    );
    assert_eq!(ask(other.clone(), token.clone()).await, json!({"active": false}));
    assert_eq!(ask(made.clone(), "garbage".into()).await, json!({"active": false}));
    let revoke = |who: &Value| {
        let request = admin
            .bare(Method::POST, "/oauth2/revoke")
            .basic_auth(text(who, "client_id"), Some(text(who, "client_secret")));
        let token = token.clone();
        async move { answer(request.form(&[("token", token)]).send().await.unwrap()).await }
    };
    let (status, refused) = revoke(&other).await;
    assert_eq!((status, text(&refused, "error")), (400, "unauthorized_client"));
    assert_eq!(ask(made.clone(), token.clone()).await["active"], json!(true), "and nothing changed");
    assert_eq!(revoke(&made).await.0, 200);
    assert_eq!(revoke(&made).await.0, 200, "again is as good");
    assert_eq!(ask(made, token).await, json!({"active": false}));
    record::check(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_replaced_while_the_one_before_still_counts() {
    let db = database().await;
    let one = Launch::on(db.url()).start().await;
    let two = Launch::beside(&one, db.url()).start().await;
    let admin = Client::of(&one);
    let other = admin.also_of(&two);
    let made = register(&admin, json!({"client_name": "ARP", "scope": "state"})).await;
    let (id, first) = (text(&made, "client_id"), text(&made, "client_secret"));
    let enters = |secret: String| {
        let other = &other;
        async move {
            let pairs = [("grant_type", "client_credentials"), ("client_id", id), ("client_secret", secret.as_str())];
            form(other, "/oauth2/token", &pairs).await.0
        }
    };
    let path = format!("/oauth2/register/{id}/secret");
    // By the client itself, with its registration token; a stolen access token does not do.
    assert_eq!(admin.with(id, first).json(Method::POST, &path, &json!({})).await.0, 403);
    let own = other.bare(Method::POST, &path).bearer_auth(text(&made, "registration_access_token"));
    let (status, got) = answer(own.json(&json!({"overlap": 3})).send().await.unwrap()).await;
    assert_eq!(status, 201, "{got}");
    let second = text(&got, "client_secret").to_owned();
    assert_eq!((enters(first.into()).await, enters(second.clone()).await), (200, 200));
    crate::support::until("the overlap to end", || async { enters(first.into()).await == 401 }).await;
    assert_eq!(enters(second.clone()).await, 200);
    // By an administrator, at once; only the one before is kept, never the one before that.
    let (status, got) = admin.json(Method::POST, &path, &json!({"overlap": 0})).await;
    assert_eq!(status, 201);
    let third = text(&got, "client_secret").to_owned();
    assert_eq!((enters(first.into()).await, enters(second).await, enters(third).await), (401, 401, 200));
    let stranger = register(&admin, json!({"client_name": "x", "scope": "state"})).await;
    let stranger = admin.with(text(&stranger, "client_id"), text(&stranger, "client_secret"));
    assert_eq!(stranger.json(Method::POST, &path, &json!({})).await.0, 403);
    for (body, expected) in [(json!({"overlap": -1}), 400), (json!({"overlap": "1s"}), 400)] {
        assert_eq!(admin.json(Method::POST, &path, &body).await.0, expected, "{body}");
    }
    assert_eq!(admin.json(Method::POST, "/oauth2/register/nobody/secret", &json!({})).await.0, 404);
    let (_, page) = admin.get("/v1/audit/entries?action=token:secret-rotate&outcome=ok").await;
    assert_eq!(page["items"].as_array().unwrap().len(), 2);
    assert!(!page.to_string().contains(text(&got, "client_secret")), "no secret is in the record");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_fails_too_often_is_locked_out_on_every_daemon_until_released() {
    let db = database().await;
    let one = Launch::on(db.url()).env("SOP__TOKEN__LOCKOUT_FAILURES", "5").start().await;
    let two = Launch::beside(&one, db.url()).env("SOP__TOKEN__LOCKOUT_PERIOD", "3s").start().await;
    let admin = Client::of(&one);
    let other = admin.also_of(&two);
    let made = register(&admin, json!({"client_name": "ARP", "scope": "state"})).await;
    let (id, secret) = (text(&made, "client_id"), text(&made, "client_secret"));
    let at = |client: &Client, id: &str, secret: &str| {
        let (client, id, secret) = (client.clone_at_self(), id.to_owned(), secret.to_owned());
        async move {
            let pairs = [("grant_type", "client_credentials"), ("client_id", &*id), ("client_secret", &*secret)];
            form(&client, "/oauth2/token", &pairs).await
        }
    };
    for _ in 0..4 {
        assert_eq!(at(&admin, id, "wrong").await.0, 401);
    }
    assert_eq!(at(&admin, id, secret).await.0, 200, "four are borne");
    let wrong = at(&admin, id, "wrong").await;
    let locked = at(&other, id, secret).await;
    assert_eq!((locked.0, &locked.1), (401, &wrong.1), "the right secret, the same answer, on the other daemon");
    let introspect = [("client_id", id), ("client_secret", secret), ("token", "x")];
    assert_eq!(form(&other, "/oauth2/introspect", &introspect).await.0, 401);
    assert_eq!(admin.get("/v1/audit/facets").await.0, 200, "others are not disturbed");
    // What is not known cannot be locked out, and is answered alike.
    for _ in 0..6 {
        assert_eq!(at(&admin, "nobody", "wrong").await, wrong);
    }
    let (_, page) = admin.get("/v1/token/lockouts").await;
    let items = page["items"].as_array().unwrap();
    assert_eq!((items.len(), &items[0]["client_id"], &items[0]["block"]), (1, &json!(id), &json!("127.0.0.0/24")));
    crate::support::until("the incident", || async {
        admin.get("/v1/health/incidents").await.1.to_string().contains(&format!("token/lock-out/{id}"))
    })
    .await;
    let release = format!("/v1/token/lockouts/{id}");
    assert_eq!(other.json(Method::DELETE, &release, &json!({})).await.0, 204);
    assert_eq!(at(&admin, id, secret).await.0, 200, "let in again");
    assert_eq!(other.json(Method::DELETE, &release, &json!({})).await.0, 404);
    // And by time.
    for _ in 0..10 {
        assert_eq!(at(&other, id, "wrong").await.0, 401);
    }
    assert_eq!(at(&admin, id, secret).await.0, 401);
    crate::support::until("it to pass", || async { at(&admin, id, secret).await.0 == 200 }).await;
    record::check(&db).await;
}
