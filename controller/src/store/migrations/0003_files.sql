-- Files that creations under way bring: kept until they are written in the sandbox.
CREATE TABLE files (
    id      TEXT NOT NULL PRIMARY KEY,
    team    TEXT NOT NULL,
    -- WriteFilesRequest, protobuf.
    content BLOB NOT NULL
) STRICT;
