-- State: leases, which keys and locks hang on, and locks with their queues.
CREATE TABLE state.leases (
    id            uuid  PRIMARY KEY,
    owner         text  COLLATE "C" NOT NULL,   -- the client it was granted to
    ttl_ms        int8  NOT NULL,
    granted_index int8  NOT NULL,
    beat          int8  NOT NULL,               -- the entry that last gave it its whole time: of its grant, or of a renewal
    renewed       timestamptz NOT NULL,         -- of that entry
    lock          text  COLLATE "C"             -- the lock it was made for, and ends with
) WITH (fillfactor = 60);

-- The records of renewals that share an entry, in partitions as the entries are.
CREATE TABLE state.renewals (
    index   int8  NOT NULL PRIMARY KEY,
    records bytea[] NOT NULL                    -- canonical JSON, in order
) PARTITION BY RANGE (index);
DO $$
DECLARE p record;
BEGIN
    FOR p IN SELECT c.relname, pg_get_expr(c.relpartbound, c.oid) AS bound FROM pg_inherits i
             JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = 'ledger.entries'::regclass LOOP
        EXECUTE format('CREATE TABLE state.%I PARTITION OF state.renewals %s', replace(p.relname, 'entries_', 'renewals_'), p.bound);
    END LOOP;
END $$;

-- Who holds a lock. The token of a hold is the index of its acquisition.
CREATE TABLE state.holds (
    name  text  COLLATE "C" NOT NULL,
    lease uuid  NOT NULL,
    owner text  COLLATE "C" NOT NULL,
    token int8  NOT NULL,
    read  bool  NOT NULL,                       -- shared with other readers
    slots int8  NOT NULL,                       -- how many may hold it at once
    value bytea,                                -- what a leader says, JSON
    PRIMARY KEY (name, lease)
);
CREATE INDEX holds_lease ON state.holds (lease);

-- Who waits for it, in order of their places.
CREATE TABLE state.queue (
    name  text  COLLATE "C" NOT NULL,
    place int8  NOT NULL,                       -- the index at which it was asked for
    lease uuid  NOT NULL,
    owner text  COLLATE "C" NOT NULL,
    read  bool  NOT NULL,
    slots int8  NOT NULL,
    value bytea,
    PRIMARY KEY (name, place)
);
CREATE INDEX queue_lease ON state.queue (lease);
