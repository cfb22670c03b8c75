-- State: leases have numbers as well, for clients whose protocol has those (docs/state.md, etcd's gateway). A lease whose client did
-- not choose one has the last 62 bits of its id.
ALTER TABLE state.leases ADD COLUMN number int8;
UPDATE state.leases
    SET number = ('x' || right(replace(id::text, '-', ''), 16))::bit(64)::int8 & 4611686018427387903;
ALTER TABLE state.leases ALTER COLUMN number SET NOT NULL;
CREATE UNIQUE INDEX leases_number ON state.leases (number);
