-- What this daemon has seen of the logs it is a witness for. Not a change of this log: two that watch each other would
-- otherwise feed each other forever.
CREATE TABLE audit.witnessed (
    origin text COLLATE "C" PRIMARY KEY,
    size   int8        NOT NULL,
    root   bytea       NOT NULL,
    time   timestamptz NOT NULL
);

-- The newest checkpoint of this log that witnesses have signed, with their lines. One row.
CREATE TABLE audit.cosigned (
    id   int2 PRIMARY KEY CHECK (id = 1),
    size int8        NOT NULL,
    note bytea       NOT NULL,
    time timestamptz NOT NULL
);
