-- Number of events of each share of the log, named as in events_gone, so that nobody counts a million rows. The
-- triggers keep it, whoever adds or removes events.
CREATE TABLE event_counts (
    share TEXT    NOT NULL PRIMARY KEY,
    count INTEGER NOT NULL
) STRICT;
INSERT INTO event_counts SELECT coalesce(team, '-'), count(*) FROM events GROUP BY team;
CREATE TRIGGER events_counted AFTER INSERT ON events BEGIN
    INSERT INTO event_counts VALUES (coalesce(NEW.team, '-'), 1)
    ON CONFLICT (share) DO UPDATE SET count = count + 1;
END;
CREATE TRIGGER events_uncounted AFTER DELETE ON events BEGIN
    UPDATE event_counts SET count = count - 1 WHERE share = coalesce(OLD.team, '-');
END;

-- So that a new token removes the old ones without reading those of all teams.
CREATE INDEX tokens_by_revocation ON tokens (revoked_ms) WHERE revoked_ms > 0;
CREATE INDEX tokens_by_expiry ON tokens (expires_ms) WHERE expires_ms > 0;
-- An SSH key goes with its token.
DELETE FROM ssh_keys WHERE token NOT IN (SELECT id FROM tokens);
CREATE TRIGGER ssh_keys_go AFTER DELETE ON tokens BEGIN
    DELETE FROM ssh_keys WHERE token = OLD.id;
END;
