-- A sieve over each segment of decisions: a list reads the records of those only that can have what it asks for.
ALTER TABLE governance.segments ADD COLUMN sieve bytea;                 -- NULL or empty: none, and any may be in it
ALTER TABLE governance.segments ALTER COLUMN sieve SET STORAGE EXTERNAL; -- as good as random
