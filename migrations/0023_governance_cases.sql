-- Policy tests: the cases beside a bundle, as JSON; null where it has none.
ALTER TABLE governance.bundles ADD COLUMN tests bytea;
