-- Governance: what policies know about the world, and what was decided.
CREATE SCHEMA governance;

-- Entities of policies: attributes and parents as Cedar's JSON has them. Kept as bytes, for jsonb cannot hold every string.
CREATE TABLE governance.entities (
    type    text COLLATE "C" NOT NULL,
    id      text COLLATE "C" NOT NULL,
    attrs   bytea NOT NULL,
    parents bytea NOT NULL,
    index   int8  NOT NULL,
    PRIMARY KEY (type, id)
);

-- Decisions by AuthZEN: the records that segments commit to.
CREATE TABLE governance.decisions (
    id       uuid  PRIMARY KEY,
    index    int8  NOT NULL,                 -- the segment's entry
    position int4  NOT NULL,                 -- the record's place in it
    record   bytea NOT NULL,                 -- canonical JSON, as it was hashed
    decision bool  NOT NULL,
    time     timestamptz NOT NULL
);
CREATE INDEX decisions_place ON governance.decisions (index, position);
