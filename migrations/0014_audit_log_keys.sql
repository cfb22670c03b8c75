-- The log's key can be replaced: the old one signs beside the new one until its time ends, and stays here to check what it signed.
ALTER TABLE audit.log_keys DROP CONSTRAINT log_keys_name_key;
ALTER TABLE audit.log_keys ADD COLUMN until timestamptz;   -- NULL: the key that signs
