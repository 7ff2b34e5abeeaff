-- SSH keys of teams. Each has a token, whose hash is that of the key.
CREATE TABLE ssh_keys (
    token    TEXT NOT NULL PRIMARY KEY,
    -- Algorithm and key, as in a line of authorized_keys.
    key      TEXT NOT NULL,
    -- Public id of the token by which it was added.
    added_by TEXT NOT NULL
) STRICT;
-- So that a login finds the tokens of a key.
CREATE INDEX tokens_by_hash ON tokens (hash);
