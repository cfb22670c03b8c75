-- Token: who callers are, and what they may do once.
CREATE SCHEMA token;

-- Registered clients. `client` is the registration as JSON; secrets are kept as digests only.
CREATE TABLE token.clients (
    client_id    text COLLATE "C" PRIMARY KEY,
    client       bytea NOT NULL,
    secret       bytea,                       -- SHA-256 of the client secret
    registration bytea NOT NULL,              -- SHA-256 of the registration access token
    index        int8  NOT NULL
);

-- Keys that sign access tokens; the seed is sealed under the master key.
CREATE TABLE token.signing_keys (
    kid    text COLLATE "C" PRIMARY KEY,
    public bytea NOT NULL,
    sealed bytea NOT NULL,
    index  int8  NOT NULL,
    time   timestamptz NOT NULL
);

-- Access tokens that ended before their time, until that time.
CREATE TABLE token.revocations (
    jti       text COLLATE "C" PRIMARY KEY,
    client_id text COLLATE "C" NOT NULL,
    expires   timestamptz NOT NULL,
    index     int8 NOT NULL
);
CREATE INDEX revocations_index ON token.revocations (index);
CREATE INDEX revocations_expires ON token.revocations (expires);

-- Client assertions (RFC 7523) that were used, until they expire.
CREATE TABLE token.assertions (
    digest  bytea PRIMARY KEY,                -- of client and jti
    expires timestamptz NOT NULL
);
CREATE INDEX assertions_expires ON token.assertions (expires);

-- Operation tokens: limited use, kept as a digest.
CREATE TABLE token.operations (
    id         uuid  PRIMARY KEY,
    digest     bytea NOT NULL UNIQUE,
    kind       text  NOT NULL,
    operation  text  NOT NULL,
    audience   text  NOT NULL,
    resource   text,
    subject    text,
    purpose    text,
    issuer     text  NOT NULL,
    max_uses   int8  NOT NULL CHECK (max_uses BETWEEN 1 AND 1000000),
    uses       int8  NOT NULL CHECK (uses BETWEEN 0 AND max_uses),
    status     text  NOT NULL,                -- active, completed, revoked; expiry follows from the time
    issued_at  timestamptz NOT NULL,
    expires_at timestamptz NOT NULL
) WITH (fillfactor = 70);
