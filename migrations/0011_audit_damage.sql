-- What the self-audit found wrong. Written outside the ledger, which does not write once something is here: any daemon stops
-- writing that finds a row that was not accepted, until `sop audit resume` says in the record what is accepted, and why.
CREATE TABLE audit.damage (
    what     text COLLATE "C" PRIMARY KEY,   -- what is wrong, naming the index
    index    int8,                           -- the entry, if it is one
    time     timestamptz NOT NULL,           -- when it was found
    accepted int8                            -- the entry that says that writing goes on although
);
