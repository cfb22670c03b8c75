// npm's oidc-provider, in memory, as the peer of the token benchmarks: one client, client_credentials, tokens that are JWTs for
// the resource `urn:jwt` (signed with Ed25519) and opaque for `urn:opaque`. Introspection is for the opaque ones: the library
// introspects no JWTs. It prints where it listens, and ends when its standard input does.
import { generateKeyPairSync } from 'node:crypto';
import { createServer } from 'node:http';
import Provider from 'oidc-provider';

const { privateKey } = generateKeyPairSync('ed25519');
const jwk = { ...privateKey.export({ format: 'jwk' }), kid: 'bench', alg: 'EdDSA', use: 'sig' };

const server = createServer();
server.keepAliveTimeout = 60_000;
server.listen(0, '127.0.0.1', () => {
  const url = `http://127.0.0.1:${server.address().port}`;
  const provider = new Provider(url, {
    jwks: { keys: [jwk] },
    enabledJWA: { idTokenSigningAlgValues: ['EdDSA'], introspectionSigningAlgValues: ['EdDSA'] },
    clientDefaults: { id_token_signed_response_alg: 'EdDSA' },
    clients: [{
      client_id: 'bench',
      client_secret: 'bench-secret-bench-secret-bench-secret',
      grant_types: ['client_credentials'],
      response_types: [],
      redirect_uris: [],
      token_endpoint_auth_method: 'client_secret_post',
      scope: 'state',
    }],
    scopes: ['state'],
    ttl: { ClientCredentials: 900 },
    features: {
      devInteractions: { enabled: false },
      clientCredentials: { enabled: true },
      introspection: { enabled: true, allowedPolicy: () => true },
      resourceIndicators: {
        enabled: true,
        useGrantedResource: () => true,
        getResourceServerInfo: (_, resource) => ({
          scope: 'state',
          accessTokenTTL: 900,
          accessTokenFormat: resource === 'urn:jwt' ? 'jwt' : 'opaque',
          jwt: { sign: { alg: 'EdDSA' } },
        }),
      },
    },
  });
  server.on('request', provider.callback());
  console.log(`listening ${url}`);
});
const end = () => process.exit(0);
process.on('SIGTERM', end);
process.stdin.on('end', end).resume();
