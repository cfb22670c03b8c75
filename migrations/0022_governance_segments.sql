-- Decisions by the segment: one row for all that share an entry, each record with its length before it. A decision is found by
-- its id because ids grow with time: `last` leads to the few segments it can be in.
CREATE TABLE governance.segments (
    index   int8  PRIMARY KEY,               -- the segment's entry
    count   int8  NOT NULL,
    first   uuid  NOT NULL,                  -- the smallest id in it
    last    uuid  NOT NULL,                  -- the greatest
    records bytea NOT NULL                   -- in order: length (int4, network order), canonical JSON
);
CREATE INDEX segments_last ON governance.segments (last);
INSERT INTO governance.segments
SELECT index, count(*), (array_agg(id ORDER BY id))[1], (array_agg(id ORDER BY id DESC))[1],
       string_agg(int4send(length(record)) || record, ''::bytea ORDER BY position)
FROM governance.decisions GROUP BY index;
DROP TABLE governance.decisions;
