-- Revision up to which events are not kept any more: of all shares of the log ('', those that were too old), of one
-- team, and of the nodes ('-': no team has that name).
CREATE TABLE events_gone (
    share    TEXT    NOT NULL PRIMARY KEY,
    revision INTEGER NOT NULL
) STRICT;
INSERT INTO events_gone VALUES ('', coalesce(
    (SELECT min(revision) - 1 FROM events),
    (SELECT seq FROM sqlite_sequence WHERE name = 'events'),
    0));
-- So that the oldest events of the nodes are found without reading the log.
CREATE INDEX events_of_nodes ON events (team) WHERE team IS NULL;
