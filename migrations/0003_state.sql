-- State: keys as they are, and every state they were in.
CREATE SCHEMA state;

CREATE TABLE state.kv (
    key           bytea PRIMARY KEY,
    index         int8  NOT NULL,            -- of the last change
    created_index int8  NOT NULL,
    version       int8  NOT NULL,            -- 1 when created, one more a change
    content_type  text  NOT NULL,
    value         bytea NOT NULL
) WITH (fillfactor = 60);

-- One row a change, tombstones included; never updated. The order of the key is the order of reading as of an index.
CREATE TABLE state.history (
    key           bytea NOT NULL,
    index         int8  NOT NULL,
    created_index int8  NOT NULL,
    version       int8  NOT NULL,            -- 0: deleted
    previous      int8  NOT NULL,            -- the index the key had before; 0: it was not there
    content_type  text  NOT NULL,
    value         bytea NOT NULL
);
CREATE UNIQUE INDEX history_key ON state.history (key, index DESC);
CREATE INDEX history_index ON state.history (index);

-- Below this index history is incomplete. One row.
CREATE TABLE state.compaction (
    id   int2 PRIMARY KEY CHECK (id = 1),
    mark int8 NOT NULL
);
INSERT INTO state.compaction (id, mark) VALUES (1, 0);
