-- Health: what is looked at, how it is, and what went wrong.
CREATE SCHEMA health;

CREATE TABLE health.checks (
    name          text COLLATE "C" PRIMARY KEY,
    spec          bytea NOT NULL,            -- as it was put: canonical JSON
    service       text COLLATE "C",
    status        text  NOT NULL,            -- unknown, passing, critical
    output        text  NOT NULL,            -- of the result that made it so
    since_ms      int8  NOT NULL,
    created_index int8  NOT NULL,
    spec_index    int8  NOT NULL,            -- when it was put; a result of an older one does not count
    index         int8  NOT NULL,            -- of the last change anyone can see
    beat          int8  NOT NULL             -- of the last report, for those that are reported
) WITH (fillfactor = 70);
CREATE INDEX checks_service ON health.checks (service, name);

CREATE TABLE health.incidents (
    id             uuid PRIMARY KEY,
    fingerprint    text NOT NULL,            -- what makes two the same
    severity       text NOT NULL,
    status         text NOT NULL,            -- open, acknowledged, resolved
    summary        text NOT NULL,
    service        text,
    opened_ms      int8 NOT NULL,
    opened_index   int8 NOT NULL,
    resolved_ms    int8,
    resolved_index int8
);
CREATE UNIQUE INDEX incidents_open ON health.incidents (fingerprint) WHERE status <> 'resolved';
CREATE INDEX incidents_opened ON health.incidents (opened_index, id);

CREATE TABLE health.incident_events (
    incident uuid NOT NULL REFERENCES health.incidents,
    index    int8 NOT NULL,
    ms       int8 NOT NULL,
    actor    text NOT NULL,
    kind     text NOT NULL,                  -- opened, again, acknowledged, comment, resolved
    note     text NOT NULL,
    PRIMARY KEY (incident, index)
);

-- Up to which index entries that carry a signal were taken in. One row.
CREATE TABLE health.followed (
    id int2 PRIMARY KEY CHECK (id = 1),
    at int8 NOT NULL
);
INSERT INTO health.followed (id, at) VALUES (1, -1);
