//! Retention of the event log in SQL: what is too old, and what is more than the share of a team.

use proto::{name::Team, sandbox::v1::EventKind};
use rusqlite::{Connection, OptionalExtension, named_params, params};

use super::{
    HOUR_MS,
    events::{Filter, kind_named},
    rows::parsed,
};

/// Name in `events_gone` of what an earlier version has removed as too old, of any share.
const ALL: &str = "";
/// Name of the share of the nodes' events there.
const NODES: &str = "-";

fn name(share: Option<&Team>) -> &str {
    share.map_or(NODES, Team::as_str)
}

/// Returns the last revision ever assigned.
pub(super) fn last(db: &Connection) -> rusqlite::Result<u64> {
    db.prepare_cached("SELECT seq FROM sqlite_sequence WHERE name = 'events'")?
        .query_row([], |row| row.get(0))
        .optional()
        .map(Option::unwrap_or_default)
}

/// Returns the last revision at which a matching event may be no longer kept; 0: all are kept.
pub(super) fn gone(db: &Connection, filter: &Filter) -> rusqlite::Result<u64> {
    let Some(sandbox) = &filter.sandbox else {
        return gone_of(db, filter.team.as_ref().map(Team::as_str));
    };
    let sandbox = sandbox.to_string();
    let first: Option<(u64, String, Option<String>)> = db
        .prepare_cached(
            "SELECT revision, kind, team FROM events WHERE sandbox = ?1 ORDER BY revision LIMIT 1",
        )?
        .query_row([&sandbox], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .optional()?;
    // The events of a share go in their order, so all of a sandbox after its first one are kept.
    let before = match &first {
        Some((_, kind, _)) if kind_named(kind) == EventKind::CreateAsked => return Ok(0),
        Some((revision, ..)) => revision.saturating_sub(1),
        None => u64::MAX,
    };
    let owner: Option<String> = db
        .prepare_cached("SELECT team FROM sandboxes WHERE id = ?1")?
        .query_row([&sandbox], |row| row.get(0))
        .optional()?;
    let share = filter.team.as_ref().map(ToString::to_string);
    let share = share.or(owner).or(first.and_then(|(.., team)| team));
    Ok(gone_of(db, share.as_deref())?.min(before))
}

/// Returns the last revision that is no longer kept of a share; `None`: of any.
fn gone_of(db: &Connection, share: Option<&str>) -> rusqlite::Result<u64> {
    db.prepare_cached(
        "SELECT coalesce(max(revision), 0) FROM events_gone \
         WHERE share = :all OR share = :share OR :share IS NULL",
    )?
    .query_row(named_params! { ":all": ALL, ":share": share }, |row| row.get(0))
}

fn set_gone(db: &Connection, share: &str, revision: u64) -> rusqlite::Result<()> {
    db.prepare_cached(
        "INSERT INTO events_gone VALUES (?1, ?2) \
         ON CONFLICT (share) DO UPDATE SET revision = max(revision, excluded.revision)",
    )?
    .execute(params![share, revision])
    .map(drop)
}

/// Returns the hours of the newest events, the latest first.
pub(super) fn hours(db: &Connection, newest: u32) -> rusqlite::Result<Vec<u64>> {
    db.prepare_cached(
        "SELECT DISTINCT at_ms / ?1 AS hour FROM events \
         WHERE revision > (SELECT coalesce(max(revision), 0) FROM events) - ?2 ORDER BY hour DESC",
    )?
    .query_map(params![HOUR_MS, newest], |row| row.get(0))?
    .collect()
}

/// Removes the oldest events, at most `limit`: those before the first that is not older than
/// `before_ms`.
pub(super) fn prune(db: &Connection, before_ms: u64, limit: u32) -> rusqlite::Result<u64> {
    let young: Option<u64> = db
        .prepare_cached("SELECT revision FROM events WHERE at_ms >= ?1 ORDER BY revision LIMIT 1")?
        .query_row([before_ms], |row| row.get(0))
        .optional()?;
    let upto = match young {
        Some(young) => young.saturating_sub(1),
        None => last(db)?,
    };
    let removed: Option<u64> = db
        .prepare_cached(
            "SELECT max(revision) FROM \
             (SELECT revision FROM events WHERE revision <= ?1 ORDER BY revision LIMIT ?2)",
        )?
        .query_row(params![upto, limit], |row| row.get(0))?;
    let Some(removed) = removed else { return Ok(0) };
    let last_of = db
        .prepare_cached(
            "SELECT coalesce(team, ?2), max(revision) FROM events WHERE revision <= ?1 GROUP BY team",
        )?
        .query_map(params![removed, NODES], |row| Ok((row.get::<_, String>(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    for (share, revision) in last_of {
        set_gone(db, &share, revision)?;
    }
    let mut delete = db.prepare_cached("DELETE FROM events WHERE revision <= ?1")?;
    delete.execute([removed]).map(|count| count as u64)
}

/// Removes the `count` oldest events of a share.
pub(super) fn drop_oldest(
    db: &Connection,
    share: Option<&Team>,
    count: u32,
) -> rusqlite::Result<()> {
    // Two texts, so that each takes its index.
    let (find, delete) = match share {
        Some(_) => (
            "SELECT max(revision) FROM (SELECT revision FROM events \
             WHERE team = ?1 ORDER BY revision LIMIT ?2)",
            "DELETE FROM events WHERE team = ?1 AND revision <= ?2",
        ),
        None => (
            "SELECT max(revision) FROM (SELECT revision FROM events \
             WHERE team IS NULL AND ?1 = '-' ORDER BY revision LIMIT ?2)",
            "DELETE FROM events WHERE team IS NULL AND ?1 = '-' AND revision <= ?2",
        ),
    };
    let share = name(share);
    let removed: Option<u64> =
        db.prepare_cached(find)?.query_row(params![share, count], |row| row.get(0))?;
    let Some(removed) = removed else { return Ok(()) };
    set_gone(db, share, removed)?;
    db.prepare_cached(delete)?.execute(params![share, removed]).map(drop)
}

/// Returns the number of events of each share. Nothing is counted here: triggers keep the numbers.
pub(super) fn counts(db: &Connection) -> rusqlite::Result<Vec<(Option<Team>, u64)>> {
    db.prepare_cached(
        "SELECT share, count FROM event_counts WHERE count > 0 ORDER BY share = ?1, share",
    )?
    .query_map([NODES], |row| {
        let is_of_nodes = row.get::<_, String>(0)? == NODES;
        let team = (!is_of_nodes).then(|| parsed(row, 0)).transpose()?;
        Ok((team, row.get(1)?))
    })?
    .collect()
}

/// Returns the number of events of a team.
pub(super) fn count_of(db: &Connection, team: &Team) -> rusqlite::Result<u64> {
    db.prepare_cached("SELECT count FROM event_counts WHERE share = ?1")?
        .query_row([team.as_str()], |row| row.get(0))
        .optional()
        .map(Option::unwrap_or_default)
}
