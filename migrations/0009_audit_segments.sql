-- The records of segments that this room keeps (events of the protocols), one row an entry, in partitions as the entries are.
CREATE TABLE audit.segments (
    index   int8  NOT NULL PRIMARY KEY,
    records bytea NOT NULL                   -- each record with its length before it, 32 bits, big-endian
) PARTITION BY RANGE (index);
-- Records are short-lived in no cache and read seldom: compressing each on its way in would cost more than it saves.
ALTER TABLE audit.segments ALTER COLUMN records SET STORAGE EXTERNAL;

-- One partition for each that the entries have.
DO $$
DECLARE p record;
BEGIN
    FOR p IN SELECT c.relname, pg_get_expr(c.relpartbound, c.oid) AS bound FROM pg_inherits i
             JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = 'ledger.entries'::regclass LOOP
        EXECUTE format('CREATE TABLE audit.%I PARTITION OF audit.segments %s', replace(p.relname, 'entries_', 'segments_'), p.bound);
    END LOOP;
END $$;
