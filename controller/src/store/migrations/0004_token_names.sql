-- Tokens have a name, a user, an expiry and a last use.
ALTER TABLE tokens ADD COLUMN name TEXT NOT NULL DEFAULT '';
-- Label of the person or program that it was made for; may be empty.
ALTER TABLE tokens ADD COLUMN user TEXT NOT NULL DEFAULT '';
-- 0 when it never expires.
ALTER TABLE tokens ADD COLUMN expires_ms INTEGER NOT NULL DEFAULT 0;
-- At most a minute old; 0 before the first use.
ALTER TABLE tokens ADD COLUMN used_ms INTEGER NOT NULL DEFAULT 0;
UPDATE tokens SET name = id;
CREATE INDEX tokens_by_name ON tokens (team, name);
CREATE INDEX tokens_by_issue ON tokens (created_ms, id);
