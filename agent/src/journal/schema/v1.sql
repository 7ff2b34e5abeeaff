CREATE TABLE meta (
  key   TEXT PRIMARY KEY,
  value ANY NOT NULL
) STRICT, WITHOUT ROWID;

-- `body` is the record; the columns beside it are copies that SQL looks for.
CREATE TABLE records (
  id         TEXT PRIMARY KEY,
  vmid       INTEGER NOT NULL,
  lease      INTEGER,
  team       TEXT NOT NULL,
  request_id TEXT NOT NULL,
  ended      INTEGER NOT NULL,
  ended_ms   INTEGER NOT NULL,
  revision   INTEGER NOT NULL,
  body       TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE UNIQUE INDEX records_revision ON records (revision);
CREATE INDEX records_vmid ON records (vmid);
CREATE UNIQUE INDEX records_live_vmid ON records (vmid) WHERE ended = 0;
CREATE UNIQUE INDEX records_live_lease ON records (lease) WHERE ended = 0 AND lease IS NOT NULL;
CREATE UNIQUE INDEX records_live_request ON records (team, request_id) WHERE ended = 0;

-- Addresses that rest after use.
CREATE TABLE resting (
  ip       INTEGER PRIMARY KEY,
  until_ms INTEGER NOT NULL
) STRICT;

-- Attempts that were called off, known here or not.
CREATE TABLE cancelled (
  id      TEXT PRIMARY KEY,
  attempt INTEGER NOT NULL,
  at_ms   INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
