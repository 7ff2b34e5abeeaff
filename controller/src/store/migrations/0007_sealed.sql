-- From here on sandboxes.request and files.content are sealed (daemon::seal): they have environments and
-- files of callers.
CREATE TABLE sealed (
    one      INTEGER NOT NULL PRIMARY KEY CHECK (one = 1),
    -- 1: the file has no trace left of what was plain before.
    scrubbed INTEGER NOT NULL
) STRICT;
INSERT INTO sealed VALUES (1, 0);
