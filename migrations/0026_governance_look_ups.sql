-- Any decision is found by its id, however long its segment waited: a segment says which times its ids span (their first 48
-- bits, which grow with time), and the last four bytes of each, so that of the segments of a time hardly one is read in vain.
ALTER TABLE governance.segments
    ADD COLUMN span  int8range,              -- from the first id's time to the last's
    ADD COLUMN marks bytea;                  -- four bytes a record, in order; NULL: of a version that kept none
UPDATE governance.segments SET span = int8range(
    ('x' || substr(replace(first::text, '-', ''), 1, 12))::bit(48)::int8,
    ('x' || substr(replace(last::text, '-', ''), 1, 12))::bit(48)::int8, '[]');
ALTER TABLE governance.segments
    ALTER COLUMN span SET NOT NULL,
    ALTER COLUMN marks SET STORAGE EXTERNAL, -- they are random: not worth trying to compress
    DROP COLUMN first,
    DROP COLUMN last;
CREATE INDEX segments_span ON governance.segments USING gist (span);
