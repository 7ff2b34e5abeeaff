-- Label of the user of the token that asked for the creation; may be empty.
ALTER TABLE sandboxes ADD COLUMN user TEXT NOT NULL DEFAULT '';

-- Limits of teams that differ from the configuration's.
CREATE TABLE teams (
    name   TEXT NOT NULL PRIMARY KEY,
    -- The limits that are set, as words: sandboxes=10 creates=10/hour.
    limits TEXT NOT NULL
) STRICT;
