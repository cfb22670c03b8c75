-- Audit: what is derived from the ledger so that others can check it, and find in it.
CREATE SCHEMA audit;

-- Tiles (C2SP tlog-tiles): up to 256 hashes each. Level 0 holds leaf hashes and is kept only when full (the rest is in
-- ledger.entries); higher levels grow a hash at a time, and a shorter one is the beginning of a longer one.
CREATE TABLE audit.tiles (
    level  int2  NOT NULL,
    n      int8  NOT NULL,
    hashes bytea NOT NULL CHECK (length(hashes) BETWEEN 32 AND 8192 AND length(hashes) % 32 = 0),
    PRIMARY KEY (level, n)
);

-- The newest signed checkpoint. One row; it never shrinks.
CREATE TABLE audit.checkpoint (
    id   int2 PRIMARY KEY CHECK (id = 1),
    size int8        NOT NULL,
    root bytea       NOT NULL,
    note bytea       NOT NULL,
    time timestamptz NOT NULL
);

-- The log's signing keys: the seed sealed under the master key.
CREATE TABLE audit.log_keys (
    id     int4 GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name   text COLLATE "C" NOT NULL UNIQUE,   -- the log's origin
    public bytea       NOT NULL,
    sealed bytea       NOT NULL,
    time   timestamptz NOT NULL
);

-- What is searched, filled by a follower so that the write path carries none of it.
CREATE TABLE audit.search (
    index      int8 PRIMARY KEY,
    time       timestamptz NOT NULL,
    room       text COLLATE "C" NOT NULL,
    action     text COLLATE "C" NOT NULL,
    outcome    text COLLATE "C" NOT NULL,
    actor      text COLLATE "C" NOT NULL,
    resource   text COLLATE "C" NOT NULL,
    request_id text COLLATE "C"
);
CREATE INDEX search_actor ON audit.search (actor, index);
CREATE INDEX search_action ON audit.search (action, index);
CREATE INDEX search_resource ON audit.search (resource, index);
CREATE INDEX search_time ON audit.search (time);

-- How far the search has come. One row.
CREATE TABLE audit.indexed (
    id int2 PRIMARY KEY CHECK (id = 1),
    at int8 NOT NULL
);
INSERT INTO audit.indexed (id, at) VALUES (1, -1);
