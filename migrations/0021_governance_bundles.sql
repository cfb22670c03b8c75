-- Bundles of policies, what was in force when, and the proposals that changes wait for.
CREATE TABLE governance.bundles (
    id        text COLLATE "C" PRIMARY KEY,
    scope     text  NOT NULL,                -- system or application
    policies  bytea NOT NULL,                -- as they were given: Cedar text, or Cedar's JSON
    schema    bytea,
    note      text  NOT NULL,
    author    text  NOT NULL,
    validated bool  NOT NULL,
    count     int4  NOT NULL,                -- of policies
    status    text  NOT NULL,                -- draft, shadow, canary, active or retired
    shipped   int4,                          -- the number of a shipped one; the highest rules until an operator's does
    created   int8  NOT NULL,                -- index
    time      timestamptz NOT NULL,
    index     int8  NOT NULL,                -- of its last change
    activated int8                           -- index at which it last came into force
);
CREATE INDEX bundles_created ON governance.bundles (created);

-- What is in force from an index on, whole, so that one row answers for any moment.
CREATE TABLE governance.in_force (
    index       int8 PRIMARY KEY,
    system      text NOT NULL,
    application text,
    canary      text,
    percent     float8 NOT NULL DEFAULT 0,
    cause       text NOT NULL,               -- the action that brought it
    actor       text NOT NULL,
    time        timestamptz NOT NULL
);

-- Changes that wait for somebody else's approval.
CREATE TABLE governance.proposals (
    id       uuid  PRIMARY KEY,
    kind     text  NOT NULL,                 -- bundle or entity
    action   text  NOT NULL,                 -- what is proposed: governance:activate
    target   text  NOT NULL,                 -- to what: the resource's name
    change   bytea NOT NULL,                 -- digest of what is to be done, so that nothing else is
    body     bytea,                          -- canonical JSON of it
    author   text  NOT NULL,
    authors  text[] NOT NULL,                -- who may not approve it: its author, and that of what it brings
    reason   text  NOT NULL,
    required int4  NOT NULL,
    role     text,                           -- whose approvals count
    outside  int4  NOT NULL DEFAULT 0,       -- of other teams than the author's
    status   text  NOT NULL,                 -- pending, approved, rejected, expired, withdrawn, applied
    override text,                           -- who did without the approvals
    reviewed text,                           -- who looked at that afterwards
    created  int8  NOT NULL,
    time     timestamptz NOT NULL,
    expires  timestamptz NOT NULL,
    index    int8  NOT NULL,
    applied  int8                            -- index of the change
);
CREATE INDEX proposals_created ON governance.proposals (created);
CREATE INDEX proposals_change ON governance.proposals (change) WHERE status = 'approved';
CREATE INDEX proposals_open ON governance.proposals (expires) WHERE status IN ('pending', 'approved');

CREATE TABLE governance.approvals (
    proposal uuid NOT NULL REFERENCES governance.proposals (id),
    approver text NOT NULL,
    approves bool NOT NULL,
    outside  bool NOT NULL,
    reason   text NOT NULL,
    index    int8 NOT NULL,
    time     timestamptz NOT NULL,
    PRIMARY KEY (proposal, approver)
);

-- Entities as they were: a decision is explained, and replayed, with those of its index. `attrs` is null where it was removed.
CREATE TABLE governance.entity_history (
    type    text COLLATE "C" NOT NULL,
    id      text COLLATE "C" NOT NULL,
    index   int8 NOT NULL,
    attrs   bytea,
    parents bytea,
    PRIMARY KEY (type, id, index)
);
CREATE INDEX entity_history_index ON governance.entity_history (index);
INSERT INTO governance.entity_history SELECT type, id, index, attrs, parents FROM governance.entities;
