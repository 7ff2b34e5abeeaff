-- One row a creation: what was asked, where it was sent, how it ended, and what was last known of
-- the sandbox. The nodes' journals hold the truth about sandboxes; this is intent and memory.
CREATE TABLE sandboxes (
    id          TEXT    NOT NULL PRIMARY KEY,
    team        TEXT    NOT NULL,
    request_id  TEXT    NOT NULL,
    -- SHA-256 of the body, hex; empty in a row that was rebuilt from a node's inventory.
    digest      TEXT    NOT NULL,
    -- The body, protobuf; empty likewise.
    request     BLOB    NOT NULL,
    -- placing, done, failed
    state       TEXT    NOT NULL,
    -- Node that the current attempt was or is about to be sent to; NULL while it is in the queue.
    node        TEXT,
    attempt     INTEGER NOT NULL,
    -- JSON of the placement decision; empty when none was made.
    decision    TEXT    NOT NULL,
    -- 1: a deletion was asked for while it was being created.
    cancelled   INTEGER NOT NULL DEFAULT 0,
    -- 1: the request_id may be used again, because the creation ended with an error that says so.
    released    INTEGER NOT NULL DEFAULT 0,
    created_ms  INTEGER NOT NULL,
    -- 0 while it lives.
    ended_ms    INTEGER NOT NULL DEFAULT 0,
    -- What its node last said of it, protobuf; empty before that.
    last        BLOB    NOT NULL
) STRICT;
CREATE UNIQUE INDEX sandboxes_by_request ON sandboxes (team, request_id) WHERE released = 0;
CREATE INDEX sandboxes_by_end ON sandboxes (ended_ms) WHERE ended_ms > 0;

-- Attempts that the controller gave up on a node that did not answer. Delivered first thing when the
-- node is back.
CREATE TABLE cancels (
    node    TEXT    NOT NULL,
    id      TEXT    NOT NULL,
    attempt INTEGER NOT NULL,
    PRIMARY KEY (node, id)
) STRICT;

CREATE TABLE tokens (
    id         TEXT    NOT NULL PRIMARY KEY,
    -- SHA-256 of the secret.
    hash       BLOB    NOT NULL,
    team       TEXT    NOT NULL,
    -- Separated by spaces.
    scopes     TEXT    NOT NULL,
    created_ms INTEGER NOT NULL,
    -- 0 while it is good.
    revoked_ms INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE TABLE nodes (
    name    TEXT NOT NULL PRIMARY KEY,
    address TEXT NOT NULL
) STRICT;

CREATE TABLE epoch (
    one   INTEGER NOT NULL PRIMARY KEY CHECK (one = 1),
    value INTEGER NOT NULL
) STRICT;
INSERT INTO epoch VALUES (1, 0);
