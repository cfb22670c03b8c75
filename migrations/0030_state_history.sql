-- State: what changed at an index is read in the order of the key, a page at a time, however much one entry changed; and a key
-- may hang on a lease.
CREATE UNIQUE INDEX history_order ON state.history (index, key);
DROP INDEX state.history_index;

ALTER TABLE state.kv ADD COLUMN lease uuid;          -- the key goes when the lease ends
ALTER TABLE state.history ADD COLUMN lease uuid;
CREATE INDEX kv_lease ON state.kv (lease) WHERE lease IS NOT NULL;

-- How far rows that nobody may ask for any more were dropped, and when the mark was set.
ALTER TABLE state.compaction
    ADD COLUMN done_index int8  NOT NULL DEFAULT 0,
    ADD COLUMN done_key   bytea NOT NULL DEFAULT '';
