// openid-client registers clients, gets, exchanges, asks about and ends tokens; jose checks them by the daemon's key set.
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import * as jose from 'jose';
import * as oauth from 'openid-client';
import { Daemon } from './daemon.mjs';

const EXCHANGE = 'urn:ietf:params:oauth:grant-type:token-exchange';
const ACCESS_TOKEN = 'urn:ietf:params:oauth:token-type:access_token';
const SECRETS = {
  client_secret_basic: oauth.ClientSecretBasic,
  client_secret_post: oauth.ClientSecretPost,
};

let daemon;
const insecure = { algorithm: 'oauth2', execute: [oauth.allowInsecureRequests] };
before(async () => { daemon = await Daemon.start(); });
after(() => daemon?.stop());

function register(metadata = {}, authentication = undefined) {
  const wanted = { client_name: 'openid-client', scope: 'state audit:read', ...metadata };
  const options = { ...insecure, initialAccessToken: daemon.token };
  return oauth.dynamicClientRegistration(new URL(daemon.url), wanted, authentication, options);
}

function discover(client, authentication, url = daemon.url) {
  const { client_id, client_secret } = client.clientMetadata();
  return oauth.discovery(new URL(url), client_id, client_secret, authentication, insecure);
}

/** A client that signs its assertions. */
async function signing(alg, options = undefined, metadata = {}) {
  const { publicKey, privateKey } = await jose.generateKeyPair(alg);
  const jwks = { keys: [await jose.exportJWK(publicKey)] };
  const authentication = oauth.PrivateKeyJwt(privateKey, options);
  return register({ token_endpoint_auth_method: 'private_key_jwt', jwks, ...metadata }, authentication);
}

/** Whether the daemon takes it as a bearer token. */
async function works(token) {
  const { status } = await daemon.send('GET', '/v1/state/kv', token);
  assert.ok(status === 200 || status === 401, `${status}`);
  return status === 200;
}

const refused = (error, status = 400) => (thrown) => {
  assert.ok(thrown instanceof oauth.ResponseBodyError, `${thrown}`);
  assert.deepEqual([thrown.error, thrown.status], [error, status]);
  return true;
};

/** A wrong secret in the header is answered with the scheme to use. */
const challenged = (thrown) => {
  assert.ok(thrown instanceof oauth.WWWAuthenticateChallengeError, `${thrown}`);
  assert.equal(thrown.status, 401);
  assert.equal(thrown.cause[0].scheme, 'basic');
  return true;
};

async function usable(config) {
  const given = await oauth.clientCredentialsGrant(config);
  assert.deepEqual([given.token_type, given.scope], ['bearer', 'state audit:read']);
  assert.ok(given.expiresIn() > 0);
  assert.ok(await works(given.access_token));
  assert.equal((await oauth.tokenIntrospection(config, given.access_token)).active, true);
  await oauth.tokenRevocation(config, given.access_token, { token_type_hint: 'access_token' });
  assert.deepEqual(await oauth.tokenIntrospection(config, given.access_token), { active: false });
  assert.equal(await works(given.access_token), false);
}

describe('openid-client', () => {
  test('discovers the daemon', async () => {
    const server = (await discover(await register())).serverMetadata();
    assert.equal(server.issuer, daemon.url);
    assert.ok(server.grant_types_supported.includes(EXCHANGE));
  });

  for (const [method, by] of Object.entries(SECRETS)) {
    test(method, async () => {
      const client = await register({ token_endpoint_auth_method: method });
      await usable(await discover(client, by(client.clientMetadata().client_secret)));
    });

    test(`${method}, and a wrong secret`, async () => {
      const client = await register({ token_endpoint_auth_method: method });
      const config = await discover(client, by('wrong'));
      const wrong = method === 'client_secret_post' ? refused('invalid_client', 401) : challenged;
      await assert.rejects(oauth.clientCredentialsGrant(config), wrong);
      await assert.rejects(oauth.tokenIntrospection(config, daemon.token), wrong);
      await assert.rejects(oauth.tokenRevocation(config, daemon.token), wrong);
    });
  }

  for (const alg of ['ES256', 'RS256', 'PS256']) {
    test(`private_key_jwt, ${alg}`, async () => usable(await signing(alg)));
  }

  test('private_key_jwt, EdDSA', async () => {
    const named = { [oauth.modifyAssertion]: (header) => { header.alg = 'EdDSA'; } };
    await usable(await signing('EdDSA', named));
  });

  // The name of RFC 9864, which the library uses unless it is told another.
  test('private_key_jwt, Ed25519', async () => usable(await signing('Ed25519')));

  test('an assertion of another key', async () => {
    const { privateKey } = await jose.generateKeyPair('ES256');
    const config = await discover(await signing('ES256'), oauth.PrivateKeyJwt(privateKey));
    await assert.rejects(oauth.clientCredentialsGrant(config), refused('invalid_client', 401));
  });

  test('an assertion is good once', async () => {
    const config = await signing('ES256', { [oauth.modifyAssertion]: (_, claims) => { claims.jti = 'once'; } });
    await oauth.clientCredentialsGrant(config);
    await assert.rejects(oauth.clientCredentialsGrant(config), refused('invalid_client', 401));
  });

  test('fewer scopes but not more, and other audiences', async () => {
    const config = await register();
    const given = await oauth.clientCredentialsGrant(config, { scope: 'audit:read', resource: 'https://api.example/x' });
    const said = await oauth.tokenIntrospection(config, given.access_token);
    assert.deepEqual([said.scope, said.aud], ['audit:read', 'https://api.example/x']);
    await assert.rejects(oauth.clientCredentialsGrant(config, { scope: 'admin' }), refused('invalid_scope'));
    await assert.rejects(oauth.clientCredentialsGrant(config, { resource: 'no uri' }), refused('invalid_target'));
  });

  test('exchange', async () => {
    const first = await register();
    const config = await register({ grant_types: ['client_credentials', EXCHANGE] });
    const { access_token } = await oauth.clientCredentialsGrant(first);
    const form = { subject_token: access_token, subject_token_type: ACCESS_TOKEN };
    const exchange = (more, by = config) => oauth.genericGrantRequest(by, EXCHANGE, { ...form, ...more });

    const given = await exchange({ scope: 'state' });
    assert.deepEqual([given.issued_token_type, given.scope], [ACCESS_TOKEN, 'state']);
    const said = await oauth.tokenIntrospection(config, given.access_token);
    assert.deepEqual([said.sub, said.act.sub], [first, config].map((c) => c.clientMetadata().client_id));

    await assert.rejects(exchange({ scope: 'admin' }), refused('invalid_scope'));
    await assert.rejects(exchange({ subject_token: 'no token' }), refused('invalid_request'));
    await assert.rejects(exchange({}, first), refused('unauthorized_client'));

    await oauth.tokenRevocation(first, access_token);
    assert.deepEqual(await oauth.tokenIntrospection(config, given.access_token), { active: false });
  });
});

describe('jose', () => {
  const ALGS = { EdDSA: {}, ES256: { access_token_signed_response_alg: 'ES256' } };
  const keySet = (config) => jose.createRemoteJWKSet(new URL(config.serverMetadata().jwks_uri), { cooldownDuration: 0 });
  const checked = (token, keys, alg, audience = daemon.url) => jose.jwtVerify(token, keys, {
    issuer: daemon.url,
    audience,
    typ: 'at+jwt',
    algorithms: [alg],
    requiredClaims: ['sub', 'client_id', 'exp', 'iat', 'jti'],
  });

  for (const [alg, wanted] of Object.entries(ALGS)) {
    test(`${alg}, and what is forged`, async () => {
      const config = await register(wanted);
      const keys = keySet(config);
      const { access_token } = await oauth.clientCredentialsGrant(config);
      const { payload } = await checked(access_token, keys, alg);
      assert.equal(payload.client_id, config.clientMetadata().client_id);
      await assert.rejects(checked(access_token, keys, alg, 'https://api.example/x'), jose.errors.JWTClaimValidationFailed);

      const [header, , signature] = access_token.split('.');
      const wider = jose.base64url.encode(JSON.stringify({ ...payload, scope: 'admin' }));
      const forged = [header, wider, signature].join('.');
      await assert.rejects(checked(forged, keys, alg), jose.errors.JWSSignatureVerificationFailed);
      assert.deepEqual(await oauth.tokenIntrospection(config, forged), { active: false });
      assert.equal(await works(forged), false);
    });
  }

  test('keys replaced at once', async () => {
    const made = await Promise.all(Object.entries(ALGS).map(async ([alg, wanted]) => {
      const config = await register(wanted);
      return { alg, config, keys: keySet(config), old: (await oauth.clientCredentialsGrant(config)).access_token };
    }));
    for (const { alg, keys, old } of made) await checked(old, keys, alg);
    const { status } = await daemon.send('POST', '/v1/token/signing-keys/rotate?immediately=true');
    assert.equal(status, 201);
    await daemon.signIn();
    for (const { alg, config, keys, old } of made) {
      assert.deepEqual(await oauth.tokenIntrospection(config, old), { active: false });
      const { access_token } = await oauth.clientCredentialsGrant(config);
      await checked(access_token, keys, alg);
      await assert.rejects(checked(old, keys, alg), jose.errors.JWKSNoMatchingKey);
    }
  });
});
