-- The search by blocks of 256 entries: one row a block with the set of all that its entries can be found by. A search reads
-- the rows of audit.search in the blocks that can hold what is looked for. Indexes over each entry would cost every entry more.
DROP INDEX audit.search_actor, audit.search_action, audit.search_resource;
ALTER TABLE audit.search ADD COLUMN trace_id text COLLATE "C";

CREATE TABLE audit.blocks (
    block  int8     PRIMARY KEY,             -- entries 256 * block to 256 * block + 255
    tokens tsvector NOT NULL                 -- see audit::search::tokens; '*' stands for anything
);
CREATE INDEX blocks_tokens ON audit.blocks USING gin (tokens) WITH (gin_pending_list_limit = 1024);

-- What is derived is derived again.
TRUNCATE audit.search;
UPDATE audit.indexed SET at = -1;
