-- A client that is disabled proves nothing, and its tokens that were decided on before `void_index` count no more.
ALTER TABLE token.clients ADD COLUMN disabled bool NOT NULL DEFAULT false;
ALTER TABLE token.clients ADD COLUMN void_index int8 NOT NULL DEFAULT -1;

-- When a client was last seen. A statistic, to the nearest few seconds: no entry, and no part of the record.
CREATE TABLE token.last_use (
    client_id text COLLATE "C" PRIMARY KEY,
    time      timestamptz NOT NULL
) WITH (fillfactor = 70);
