-- Searches that were saved, and the alerts on them.
CREATE TABLE audit.searches (
    name       text COLLATE "C" PRIMARY KEY,
    definition bytea NOT NULL,               -- JSON, as it was put
    index      int8  NOT NULL                -- the entry that put it
);

-- When an alert was raised last, for a group of entries of a search.
CREATE TABLE audit.alerts (
    name text COLLATE "C" NOT NULL,
    grp  text COLLATE "C" NOT NULL,
    time timestamptz      NOT NULL,
    PRIMARY KEY (name, grp)
);
