-- A client's secret is replaced with an overlap: the one before it still proves who the client is until then.
ALTER TABLE token.clients
    ADD COLUMN previous       bytea,                      -- SHA-256 of the secret before
    ADD COLUMN previous_until timestamptz;
