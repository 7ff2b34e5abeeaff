-- One-time tokens of nodes.
CREATE TABLE node_tokens (
    id         TEXT    NOT NULL PRIMARY KEY,
    -- SHA-256 of the secret.
    hash       BLOB    NOT NULL,
    node       TEXT    NOT NULL,
    created_ms INTEGER NOT NULL,
    expires_ms INTEGER NOT NULL,
    -- 0 while it is unused.
    used_ms    INTEGER NOT NULL DEFAULT 0,
    -- SHA-256 of the key that it was used for: the same key may use it again.
    key       BLOB    NOT NULL DEFAULT X''
) STRICT;

-- Nodes that joined, and nodes that were revoked.
CREATE TABLE enrolments (
    node        TEXT    NOT NULL PRIMARY KEY,
    -- Empty when the node was forgotten.
    address     TEXT    NOT NULL,
    -- Addresses of its sandboxes; empty likewise.
    pool        TEXT    NOT NULL,
    joined_ms   INTEGER NOT NULL,
    -- 0 while it is accepted.
    revoked_ms  INTEGER NOT NULL DEFAULT 0,
    -- 1: only certificates in the next table are accepted, because it was revoked once.
    only_listed INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE TABLE certificates (
    serial       TEXT    NOT NULL PRIMARY KEY,
    node         TEXT    NOT NULL,
    not_after_ms INTEGER NOT NULL
) STRICT;
CREATE INDEX certificates_by_node ON certificates (node);
