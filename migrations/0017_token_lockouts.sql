-- Clients that failed too often to prove who they are, from the block of addresses they failed from, until then.
CREATE TABLE token.lockouts (
    client_id text COLLATE "C" NOT NULL,
    block     text COLLATE "C" NOT NULL,
    until     timestamptz      NOT NULL,
    PRIMARY KEY (client_id, block)
);
