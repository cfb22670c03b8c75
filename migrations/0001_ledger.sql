-- The ledger: one head, one gap-free index, one leaf a change.
-- Columns of names are COLLATE "C"; bytes that others wrote are bytea; times are timestamptz with milliseconds.
CREATE SCHEMA ledger;

-- The fence. One row: whoever holds its lock, or finds it at the index it expects, may write.
CREATE TABLE ledger.head (
    id       int2 PRIMARY KEY CHECK (id = 1),
    index    int8        NOT NULL,           -- newest index; -1 before leaf 0
    root     bytea       NOT NULL,           -- RFC 6962 root over leaves 0..index
    frontier bytea       NOT NULL,           -- roots of the perfect subtrees, largest first, 32 bytes each
    time     timestamptz NOT NULL,           -- of the newest entry; the next is never earlier
    batch    uuid        NOT NULL            -- the turn that wrote it
) WITH (fillfactor = 20);

-- The leaves, exactly as hashed. No index but the primary key: what is searched is filled by followers.
CREATE TABLE ledger.entries (
    index       int8  NOT NULL PRIMARY KEY,
    leaf        bytea NOT NULL,              -- canonical JSON {action, body, outcome, room, time, v}
    hash        bytea NOT NULL,              -- SHA-256(0x00 || leaf)
    batch       uuid  NOT NULL,              -- to find out whether an unknown commit happened
    touched     bytea NOT NULL,              -- which facts it changed: see ledger::touch
    idempotency bytea                        -- digest of the Idempotency-Key that made it
) PARTITION BY RANGE (index);

-- What a leaf commits to by `body`: salt and details. Beside the leaf, so that it can be erased with the tree intact.
CREATE TABLE ledger.details (
    index   int8  NOT NULL PRIMARY KEY,
    salt    bytea,                           -- 32 random bytes; NULL once erased
    details bytea,                           -- canonical JSON; NULL once erased
    segment bytea                            -- root of the segment's records, if the entry stands for one
) PARTITION BY RANGE (index);

CREATE TABLE ledger.entries_0 PARTITION OF ledger.entries FOR VALUES FROM (0) TO (8388608);
CREATE TABLE ledger.details_0 PARTITION OF ledger.details FOR VALUES FROM (0) TO (8388608);

-- Outcomes by Idempotency-Key, sealed under the master key, dropped after a day.
CREATE TABLE ledger.outcomes (
    key         bytea       PRIMARY KEY,     -- digest of principal, method, path and key
    fingerprint bytea       NOT NULL,        -- digest of the body
    index       int8,                        -- the entry, if the command made one
    sealed      bytea       NOT NULL,
    time        timestamptz NOT NULL
);
CREATE INDEX outcomes_time ON ledger.outcomes (time);

-- Work that one daemon at a time does. A claim ends by an entry, made by whoever watched its whole time pass.
CREATE TABLE ledger.claims (
    name    text COLLATE "C" PRIMARY KEY,
    holder  text        NOT NULL,
    token   int8        NOT NULL,            -- index of the acquisition
    beats   int8        NOT NULL DEFAULT 0,  -- grows with each renewal; who waits watches it stand still
    ttl_ms  int8        NOT NULL,
    time    timestamptz NOT NULL
);

-- Facts about this database that are set once: issuer, log key, master key check value.
CREATE TABLE ledger.settings (
    name  text COLLATE "C" PRIMARY KEY,
    value bytea NOT NULL
);
