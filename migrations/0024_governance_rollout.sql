-- Rollout: bundles tried beside what is in force, and canaries that stop themselves.

-- The status a bundle goes back to when its trial ends: draft, validated or retired.
ALTER TABLE governance.bundles ADD COLUMN resting text NOT NULL DEFAULT 'draft';
UPDATE governance.bundles SET resting = 'retired' WHERE activated IS NOT NULL;

-- New denials, of a hundred decisions of the canary, above which it stops.
ALTER TABLE governance.in_force ADD COLUMN stop_at float8 NOT NULL DEFAULT 100;

-- Bundles in shadow: every decision recorded since is decided again, behind the commits, by one daemon at a time.
CREATE TABLE governance.shadows (
    bundle  text COLLATE "C" PRIMARY KEY,
    since   int8  NOT NULL,                  -- index at which it began
    until   int8,                            -- at which it ended
    reached int8  NOT NULL,                  -- all up to here was decided again
    read    int8  NOT NULL DEFAULT 0,
    skipped int8  NOT NULL DEFAULT 0,
    changed int8  NOT NULL DEFAULT 0,
    groups  bytea NOT NULL                   -- JSON: the differences counted by policy, subject and action
);

-- The first of the differences, whole.
CREATE TABLE governance.shadow_flips (
    bundle   text COLLATE "C" NOT NULL,
    index    int8  NOT NULL,
    position int8  NOT NULL,
    flip     bytea NOT NULL,                 -- JSON
    PRIMARY KEY (bundle, index, position)
);
