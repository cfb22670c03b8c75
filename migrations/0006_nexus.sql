-- Nexus: which services there are, and messages between them.
CREATE SCHEMA nexus;

-- Instances of services. One that is silent for its time to live goes by an entry.
CREATE TABLE nexus.instances (
    service       text COLLATE "C",
    id            text COLLATE "C",
    instance      bytea NOT NULL,            -- as registered: canonical JSON
    ttl_ms        int8  NOT NULL,
    passing       bool  NOT NULL,
    why           text  NOT NULL,            -- why it is as it is
    created_index int8  NOT NULL,
    index         int8  NOT NULL,            -- of the last change anyone can see
    beat          int8  NOT NULL,            -- of the last sign of life
    checked       bool  NOT NULL,            -- it has checks of its own
    PRIMARY KEY (service, id)
) WITH (fillfactor = 70);

-- What happened to instances, for watches that resume.
CREATE TABLE nexus.changes (
    index    int8 NOT NULL,
    service  text COLLATE "C" NOT NULL,
    id       text COLLATE "C" NOT NULL,
    event    text NOT NULL,                  -- register, deregister, expire, status
    instance bytea NOT NULL,                 -- the instance after it, as it is shown
    PRIMARY KEY (service, index, id)
);

CREATE TABLE nexus.topics (
    name          text COLLATE "C" PRIMARY KEY,
    retention_ms  int8 NOT NULL,
    created_index int8 NOT NULL,
    index         int8 NOT NULL
);

-- Messages as they were published: CloudEvents, bytes.
CREATE TABLE nexus.messages (
    topic      text COLLATE "C" NOT NULL,
    index      int8  NOT NULL,
    position   int8  NOT NULL,               -- among the messages of one entry
    id         uuid  NOT NULL,
    dedupe     bytea NOT NULL,               -- digest of source and id
    event      bytea NOT NULL,
    time_ms    int8  NOT NULL,
    deliver_ms int8  NOT NULL,               -- not before this time
    PRIMARY KEY (topic, index, position)
);
CREATE UNIQUE INDEX messages_dedupe ON nexus.messages (topic, dedupe);
CREATE INDEX messages_time ON nexus.messages (topic, time_ms);

-- A group of consumers: what it was given up to (index, position), the rest is in deliveries.
CREATE TABLE nexus.groups (
    topic         text COLLATE "C" NOT NULL REFERENCES nexus.topics ON DELETE CASCADE,
    name          text COLLATE "C" NOT NULL,
    max_attempts  int8 NOT NULL,
    ack_wait_ms   int8 NOT NULL,
    backoff_ms    int8 NOT NULL,
    dead_letter   text COLLATE "C",
    at_index      int8 NOT NULL,
    at_position   int8 NOT NULL,
    created_index int8 NOT NULL,
    index         int8 NOT NULL,
    PRIMARY KEY (topic, name)
) WITH (fillfactor = 50);

-- Messages that a group was given and has not acknowledged, or that wait for their time.
CREATE TABLE nexus.deliveries (
    topic    text COLLATE "C" NOT NULL,
    "group"  text COLLATE "C" NOT NULL,
    index    int8 NOT NULL,
    position int8 NOT NULL,
    id       uuid NOT NULL,                  -- the message's
    attempt  int8 NOT NULL,                  -- 0: not given to anyone yet
    due_ms   int8 NOT NULL,                  -- when it may be given again
    holder   text,                           -- who has it
    dead     bool NOT NULL DEFAULT false,    -- out of attempts, and no topic for dead letters
    PRIMARY KEY (topic, "group", index, position),
    FOREIGN KEY (topic, "group") REFERENCES nexus.groups ON DELETE CASCADE
) WITH (fillfactor = 70);
CREATE INDEX deliveries_due ON nexus.deliveries (topic, "group", due_ms) WHERE NOT dead;
CREATE INDEX deliveries_id ON nexus.deliveries (topic, "group", id);
