-- The search by shelves: a row for each 256 entries (a block) with all that filters and counts need of them, and a row for each 64
-- blocks (a shelf) that says which of them may hold a token. What is in no whole block yet is read from the ledger.
-- See audit::search::block, audit::search::shelf and docs/decisions/blocks.md.
DROP TABLE audit.search, audit.blocks;

CREATE TABLE audit.blocks (
    block   int8  PRIMARY KEY,               -- entries 256 * block to 256 * block + 255; none where none of them is there
    outline bytea NOT NULL,                  -- which kind of entry each is, JSON
    names   bytea NOT NULL                   -- resources, ids of requests and traces, JSON
);
ALTER TABLE audit.blocks ALTER COLUMN outline SET STORAGE EXTERNAL, ALTER COLUMN names SET STORAGE EXTERNAL;

CREATE TABLE audit.shelves (
    shelf int8  PRIMARY KEY,                 -- blocks 64 * shelf to 64 * shelf + 63
    lines bytea NOT NULL                     -- see audit::search::shelf; 512 bytes a line
);
ALTER TABLE audit.shelves ALTER COLUMN lines SET STORAGE EXTERNAL;

-- Tokens of the blocks whose shelf is not full.
CREATE TABLE audit.loose (
    block  int8  PRIMARY KEY,
    tokens bytea NOT NULL                    -- u32 each, least byte first, in order
);
ALTER TABLE audit.loose ALTER COLUMN tokens SET STORAGE EXTERNAL;

-- What is derived is derived again. `at` is the last entry of a whole block.
UPDATE audit.indexed SET at = -1;
