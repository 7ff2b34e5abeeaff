-- What happened to sandboxes and nodes, in the order in which it was written. AUTOINCREMENT: a
-- revision is never used again, even when all rows were pruned.
CREATE TABLE events (
    revision      INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    at_ms         INTEGER NOT NULL,
    -- NULL for what is about a node.
    sandbox       TEXT,
    -- NULL likewise.
    team          TEXT,
    node          TEXT,
    -- Name of sandbox.v1.EventKind, without its prefix.
    kind          TEXT    NOT NULL,
    actor         TEXT    NOT NULL,
    reason        TEXT    NOT NULL,
    detail        TEXT    NOT NULL,
    node_revision INTEGER NOT NULL,
    -- What is said again under the same name is not written twice. NULL: it may come often.
    once          TEXT
) STRICT;
CREATE UNIQUE INDEX events_once ON events (once) WHERE once IS NOT NULL;
-- Each ends with the revision, so that a page of a team or a sandbox is one range.
CREATE INDEX events_by_team ON events (team) WHERE team IS NOT NULL;
CREATE INDEX events_by_sandbox ON events (sandbox) WHERE sandbox IS NOT NULL;
