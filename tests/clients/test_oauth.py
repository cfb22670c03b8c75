"""Authlib gets, exchanges, asks about and ends tokens; PyJWT checks them by the daemon's key set."""

import base64
import json
import time
import unittest

import jwt
from authlib.integrations.base_client import OAuthError
from authlib.integrations.requests_client import OAuth2Session
from authlib.oauth2.rfc7523 import PrivateKeyJWT
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from joserfc.jwk import ECKey, OKPKey, RSAKey

from daemon import Daemon

EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"
KEYS = {
    "EdDSA": lambda: OKPKey.generate_key("Ed25519"),
    "ES256": lambda: ECKey.generate_key("P-256"),
    "RS256": lambda: RSAKey.generate_key(2048),
    "PS256": lambda: RSAKey.generate_key(2048),
}


class WithDaemon(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = Daemon()
        cls.server = cls.discovered(cls.daemon.url)

    @classmethod
    def tearDownClass(cls):
        cls.daemon.stop()

    @staticmethod
    def discovered(url):
        with OAuth2Session() as session:
            answer = session.get(f"{url}/.well-known/oauth-authorization-server", withhold_token=True)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def register(self, **metadata):
        body = json.dumps({"client_name": "authlib", "scope": "state audit:read", **metadata}).encode()
        status, _, body = self.daemon.send("POST", "/oauth2/register", {"content-type": "application/json"}, body)
        self.assertEqual(status, 201, body)
        return json.loads(body)

    def session(self, client, **more):
        method = client["token_endpoint_auth_method"]
        session = OAuth2Session(
            client["client_id"],
            client["client_secret"],
            token_endpoint_auth_method=method,
            revocation_endpoint_auth_method=method,
            **{"token_endpoint": self.server["token_endpoint"], **more},
        )
        self.addCleanup(session.close)
        return session

    def signing(self, alg, claims=None, headers=None, server=None, **metadata):
        """A session of a client that signs its assertions."""
        key = KEYS[alg]()
        jwks = {"keys": [key.as_dict(private=False)]}
        client = self.register(token_endpoint_auth_method="private_key_jwt", jwks=jwks, **metadata)
        self.assertNotIn("client_secret", client)
        endpoint = (server or self.server)["token_endpoint"]
        session = self.session({**client, "client_secret": key}, token_endpoint=endpoint)
        session.register_client_auth_method(PrivateKeyJWT(endpoint, claims, headers, alg))
        return session

    def introspected(self, session, token):
        answer = session.introspect_token(self.server["introspection_endpoint"], token=token)
        self.assertEqual(answer.status_code, 200, answer.text)
        return answer.json()

    def works(self, token):
        """Whether the daemon takes it as a bearer token."""
        with OAuth2Session(token={"access_token": token, "token_type": "Bearer"}) as session:
            status = session.get(f"{self.daemon.url}/v1/state/kv").status_code
        self.assertIn(status, (200, 401))
        return status == 200

    def refused(self, error, ask, *args, **more):
        with self.assertRaises(OAuthError) as refused:
            ask(*args, **more)
        self.assertEqual(refused.exception.error, error, refused.exception)


class Authlib(WithDaemon):
    def test_a_secret_in_the_header_or_in_the_form(self):
        for method in ("client_secret_basic", "client_secret_post"):
            with self.subTest(method):
                session = self.session(self.register(token_endpoint_auth_method=method))
                token = session.fetch_token()
                self.assertEqual((token["token_type"], token["scope"]), ("Bearer", "state audit:read"))
                self.assertGreater(token["expires_in"], 0)
                self.assertEqual(session.get(f"{self.daemon.url}/v1/state/kv").status_code, 200)

    def test_a_signed_assertion(self):
        for alg in KEYS:
            with self.subTest(alg):
                session = self.signing(alg)
                token = session.fetch_token()["access_token"]
                self.assertTrue(self.works(token))
                self.assertTrue(self.introspected(session, token)["active"])
                answer = session.revoke_token(self.server["revocation_endpoint"], token=token)
                self.assertEqual(answer.status_code, 200, answer.text)
                self.assertFalse(self.introspected(session, token)["active"])

    def test_an_assertion_is_good_once(self):
        session = self.signing("EdDSA", claims={"jti": "once"})
        session.fetch_token()
        self.refused("invalid_client", session.fetch_token)

    def test_an_assertion_of_another_key(self):
        session = self.signing("ES256")
        session.client_secret = ECKey.generate_key("P-256")
        self.refused("invalid_client", session.fetch_token)

    def test_fewer_scopes_but_not_more(self):
        session = self.session(self.register(), scope="audit:read")
        token = session.fetch_token()
        self.assertEqual(token["scope"], "audit:read")
        self.assertEqual(self.introspected(session, token["access_token"])["scope"], "audit:read")
        self.refused("invalid_scope", session.fetch_token, scope="state admin")

    def test_another_audience(self):
        session = self.session(self.register())
        token = session.fetch_token(resource="https://api.example/x")["access_token"]
        self.assertEqual(self.introspected(session, token)["aud"], "https://api.example/x")
        self.assertFalse(self.works(token))
        self.refused("invalid_target", session.fetch_token, resource="no uri")

    def test_a_wrong_secret(self):
        for method in ("client_secret_basic", "client_secret_post"):
            client = self.register(token_endpoint_auth_method=method)
            for wrong in ({"client_secret": "wrong"}, {"client_id": "nobody"}):
                with self.subTest(method, **wrong):
                    session = self.session({**client, **wrong})
                    self.refused("invalid_client", session.fetch_token)
                    url = self.server["introspection_endpoint"]
                    answer = session.introspect_token(url, token=self.daemon.token)
                    self.assertEqual((answer.status_code, answer.json()["error"]), (401, "invalid_client"))

    def test_a_grant_nobody_has(self):
        session = self.session(self.register())
        self.refused("unsupported_grant_type", session.fetch_token, grant_type="password", username="a", password="b")

    def test_introspect_and_revoke(self):
        for method in ("client_secret_basic", "client_secret_post"):
            with self.subTest(method):
                client = self.register(token_endpoint_auth_method=method)
                session = self.session(client)
                token = session.fetch_token()["access_token"]
                other = self.session(self.register())
                said = self.introspected(session, token)
                self.assertEqual(
                    (said["active"], said["client_id"], said["sub"], said["iss"], said["token_type"]),
                    (True, client["client_id"], client["client_id"], self.server["issuer"], "Bearer"),
                )
                self.assertEqual(self.introspected(other, token), {"active": False})
                url = self.server["revocation_endpoint"]
                answer = other.revoke_token(url, token=token)
                self.assertEqual((answer.status_code, answer.json()["error"]), (400, "unauthorized_client"))
                self.assertTrue(self.introspected(session, token)["active"])
                for _ in range(2):
                    answer = session.revoke_token(url, token=token, token_type_hint="access_token")
                    self.assertEqual(answer.status_code, 200, answer.text)
                    self.assertEqual(self.introspected(session, token), {"active": False})
                self.assertFalse(self.works(token))
                self.assertEqual(session.revoke_token(url, token="no token").status_code, 200)

    def test_exchange(self):
        subject, actor = self.register(), self.register(grant_types=["client_credentials", EXCHANGE])
        first = self.session(subject)
        token = first.fetch_token()["access_token"]
        session = self.session(actor)

        def exchange(session=session, **more):
            form = {"subject_token": token, "subject_token_type": ACCESS_TOKEN, **more}
            return session.fetch_token(grant_type=EXCHANGE, **form)

        given = exchange(scope="state")
        self.assertEqual((given["issued_token_type"], given["scope"]), (ACCESS_TOKEN, "state"))
        said = self.introspected(session, given["access_token"])
        self.assertEqual((said["sub"], said["client_id"]), (subject["client_id"], actor["client_id"]))
        self.assertEqual(said["act"], {"sub": actor["client_id"]})
        self.assertTrue(self.works(given["access_token"]))

        self.refused("invalid_scope", exchange, scope="admin")
        self.refused("invalid_request", exchange, subject_token="no token")
        self.refused("invalid_request", exchange, subject_token_type="urn:ietf:params:oauth:token-type:saml2")
        self.refused("unauthorized_client", exchange, session=first)

        first.revoke_token(self.server["revocation_endpoint"], token=token)
        self.assertEqual(self.introspected(session, given["access_token"]), {"active": False})
        self.refused("invalid_request", exchange)

    def test_exchange_with_an_actor(self):
        for_whom = self.session(self.register()).fetch_token()["access_token"]
        actor = self.register()
        session = self.signing("ES256", grant_types=[EXCHANGE])
        given = session.fetch_token(
            grant_type=EXCHANGE,
            subject_token=for_whom,
            subject_token_type=ACCESS_TOKEN,
            actor_token=self.session(actor).fetch_token()["access_token"],
            actor_token_type=ACCESS_TOKEN,
            audience=actor["client_id"],
        )
        said = self.introspected(session, given["access_token"])
        self.assertEqual((said["act"]["sub"], said["aud"]), (actor["client_id"],) * 2)


class Assertions(WithDaemon):
    """What RFC 7515, 7519 and 7523 let a client sign."""

    def test_where_the_metadata_says_the_token_endpoint_is(self):
        # RFC 7523, 3: the URL of the token endpoint may be the audience. By another name of the daemon it is another URL.
        server = self.discovered(self.daemon.url.replace("127.0.0.1", "localhost"))
        self.assertIn("localhost", server["token_endpoint"])
        self.signing("ES256", server=server).fetch_token()

    def test_a_clock_that_is_ahead(self):
        # Authlib's assertions are good for an hour, here from four seconds from now on.
        claims = {}
        session = self.signing("ES256", claims=claims)
        now = int(time.time()) + 4
        claims.update(iat=now, exp=now + 3600)
        session.fetch_token()

    def test_fractions_of_seconds(self):
        # RFC 7519, 2: a NumericDate may have them.
        self.signing("ES256", claims={"exp": time.time() + 60.5}).fetch_token()

    def test_headers_that_are_not_understood(self):
        # RFC 7515, 4: they are ignored unless `crit` lists them.
        self.signing("ES256", headers={"x5t#S256": "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"}).fetch_token()

    def test_once_wherever_it_is_used(self):
        session = self.signing("ES256", claims={"jti": "once"})
        token = session.fetch_token()["access_token"]
        answer = session.revoke_token(self.server["revocation_endpoint"], token=token)
        self.assertEqual(answer.status_code, 401)


class Checked(WithDaemon):
    """Tokens, by PyJWT."""

    def setUp(self):
        self.keys = jwt.PyJWKClient(self.server["jwks_uri"], cooldown_duration=0)

    def claims(self, token, alg):
        key = self.keys.get_signing_key_from_jwt(token)
        self.assertEqual((key.algorithm_name, key.public_key_use), (alg, "sig"))
        read = jwt.decode_complete(
            token,
            key,
            algorithms=[alg],
            audience=self.server["issuer"],
            issuer=self.server["issuer"],
            options={"require": ["iss", "exp", "aud", "sub", "client_id", "iat", "jti"], "strict_aud": True},
        )
        self.assertEqual((read["header"]["alg"], read["header"]["typ"]), (alg, "at+jwt"))
        return read["payload"]

    def test_both_algorithms(self):
        for alg, wanted in (("EdDSA", {}), ("ES256", {"access_token_signed_response_alg": "ES256"})):
            with self.subTest(alg):
                client = self.register(**wanted)
                token = self.session(client).fetch_token()
                claims = self.claims(token["access_token"], alg)
                self.assertEqual((claims["sub"], claims["client_id"]), (client["client_id"],) * 2)
                self.assertEqual((claims["scope"], claims["exp"] - claims["iat"]), (token["scope"], token["expires_in"]))

    def test_for_whom(self):
        token = self.session(self.register()).fetch_token(resource="https://api.example/x")["access_token"]
        self.assertRaises(jwt.InvalidAudienceError, self.claims, token, "EdDSA")
        key = self.keys.get_signing_key_from_jwt(token)
        jwt.decode(token, key, algorithms=["EdDSA"], audience="https://api.example/x")

    def test_forged(self):
        session = self.session(self.register())
        token = session.fetch_token()["access_token"]
        header, body, signature = token.split(".")
        claims = {**self.claims(token, "EdDSA"), "scope": "admin"}
        wider = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
        named = {"typ": "at+jwt", "kid": jwt.get_unverified_header(token)["kid"]}
        forged = {
            "other claims": f"{header}.{wider}.{signature}",
            "other signature": f"{header}.{body}.{'A' * len(signature)}",
            "another key": jwt.encode(claims, Ed25519PrivateKey.generate(), "EdDSA", named),
            "no signature": jwt.encode(claims, None, "none", named),
        }
        for how, token in forged.items():
            with self.subTest(how):
                self.assertRaises(jwt.InvalidTokenError, self.claims, token, "EdDSA")
                self.assertEqual(self.introspected(session, token), {"active": False})
                self.assertFalse(self.works(token))

    def test_keys_replaced_at_once(self):
        sessions = {
            "EdDSA": self.session(self.register()),
            "ES256": self.session(self.register(access_token_signed_response_alg="ES256")),
        }
        old = {alg: session.fetch_token()["access_token"] for alg, session in sessions.items()}
        for alg, token in old.items():
            self.claims(token, alg)
        status, _, body = self.daemon.send("POST", "/v1/token/signing-keys/rotate?immediately=true")
        self.assertEqual(status, 201, body)
        self.addCleanup(self.daemon.sign_in)
        for alg, session in sessions.items():
            with self.subTest(alg):
                self.assertEqual(self.introspected(session, old[alg]), {"active": False})
                self.assertFalse(self.works(old[alg]))
                new = session.fetch_token()["access_token"]
                self.claims(new, alg)
                self.assertTrue(self.introspected(session, new)["active"])
                self.keys.get_jwk_set(refresh=True)
                self.assertRaises(jwt.PyJWKClientError, self.claims, old[alg], alg)


if __name__ == "__main__":
    unittest.main()
