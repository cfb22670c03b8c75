-- Audit: what is derived from the ledger so that others can check it.
CREATE SCHEMA audit;

-- Full tiles (C2SP tlog-tiles): 256 hashes each. Level 0 holds leaf hashes. Partial tiles are made when asked for.
CREATE TABLE audit.tiles (
    level  int2  NOT NULL,
    n      int8  NOT NULL,
    hashes bytea NOT NULL CHECK (length(hashes) = 8192),
    PRIMARY KEY (level, n)
);

-- The newest signed checkpoint. One row; it never shrinks.
CREATE TABLE audit.checkpoint (
    id    int2 PRIMARY KEY CHECK (id = 1),
    size  int8        NOT NULL,
    root  bytea       NOT NULL,
    note  bytea       NOT NULL,
    time  timestamptz NOT NULL
);

-- The log's signing keys: the seed sealed under the master key.
CREATE TABLE audit.log_keys (
    id      int4 GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name    text        NOT NULL,            -- the log's origin
    public  bytea       NOT NULL,
    sealed  bytea       NOT NULL,
    time    timestamptz NOT NULL
);
