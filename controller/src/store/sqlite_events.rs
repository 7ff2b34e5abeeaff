//! The event log in SQL.

use rusqlite::{Connection, Row, named_params};

use super::{
    events::{Event, EventPage, Filter, Why, kind_name, kind_named},
    rows::parsed,
    sqlite_retention::{gone, last},
};

const COLUMNS: &str = "revision, at_ms, sandbox, team, node, kind, actor, reason, detail, \
                       node_revision, once";
/// Conditions of the filters. Only a set one is in the text, so that the planner takes its index.
const BY_TEAM: &str = "AND team = :team";
const BY_SANDBOX: &str = "AND sandbox = :sandbox";
/// Condition of both. The `+` keeps the planner from the index of the team, which would have it read all events of a
/// team for those of one sandbox.
const BY_BOTH: &str = "AND +team = :team AND sandbox = :sandbox";

/// Appends events, except those whose deduplication key exists; returns the last revision.
pub(super) fn append(db: &Connection, events: &[Event]) -> rusqlite::Result<u64> {
    for event in events {
        // Checked here instead of by the index, so that no revision is used up.
        if let Some(once) = &event.once
            && db.prepare_cached("SELECT 1 FROM events WHERE once = ?1")?.exists([once])?
        {
            continue;
        }
        db.prepare_cached(
            "INSERT INTO events (at_ms, sandbox, team, node, kind, actor, reason, detail, \
             node_revision, once) VALUES (:at_ms, :sandbox, :team, :node, :kind, :actor, :reason, \
             :detail, :node_revision, :once)",
        )?
        .execute(named_params! {
            ":at_ms": event.at_ms,
            ":sandbox": event.sandbox.map(|id| id.to_string()),
            ":team": event.team.as_ref().map(|team| team.as_str()),
            ":node": event.node.as_ref().map(|node| node.as_str()),
            ":kind": kind_name(event.kind), ":actor": event.actor, ":reason": event.why.name(),
            ":detail": event.detail, ":node_revision": event.node_revision, ":once": event.once,
        })?;
    }
    last(db)
}

fn to_event(row: &Row<'_>) -> rusqlite::Result<(u64, Event)> {
    let some = |at| row.get::<_, Option<String>>(at).map(|text| text.is_some());
    let event = Event {
        at_ms: row.get(1)?,
        sandbox: some(2)?.then(|| parsed(row, 2)).transpose()?,
        team: some(3)?.then(|| parsed(row, 3)).transpose()?,
        node: some(4)?.then(|| parsed(row, 4)).transpose()?,
        kind: kind_named(&row.get::<_, String>(5)?),
        actor: row.get(6)?,
        why: Why::named(&row.get::<_, String>(7)?),
        detail: row.get(8)?,
        node_revision: row.get(9)?,
        once: row.get(10)?,
    };
    Ok((row.get(0)?, event))
}

/// Returns the condition of a filter, and the values of its named parameters.
fn condition(filter: &Filter) -> (&'static str, Vec<(&'static str, String)>) {
    let text = match (&filter.team, &filter.sandbox) {
        (Some(_), Some(_)) => BY_BOTH,
        (Some(_), None) => BY_TEAM,
        (None, Some(_)) => BY_SANDBOX,
        (None, None) => "",
    };
    let team = filter.team.as_ref().map(|team| (":team", team.to_string()));
    let sandbox = filter.sandbox.map(|sandbox| (":sandbox", sandbox.to_string()));
    (text, team.into_iter().chain(sandbox).collect())
}

/// Returns a page of the events after a revision.
pub(super) fn page(
    db: &Connection,
    after: u64,
    filter: &Filter,
    limit: u32,
) -> rusqlite::Result<EventPage> {
    // One view of the file for all three queries.
    let view = db.unchecked_transaction()?;
    let (gone, last) = (gone(&view, filter)?, last(&view)?);
    let (condition, values) = condition(filter);
    let sql = format!(
        "SELECT {COLUMNS} FROM events WHERE revision > :after {condition} \
         ORDER BY revision LIMIT :limit"
    );
    let mut params: Vec<(&str, &dyn rusqlite::ToSql)> =
        vec![(":after", &after), (":limit", &limit)];
    params.extend(values.iter().map(|(name, value)| (*name, value as &dyn rusqlite::ToSql)));
    let events = view
        .prepare_cached(&sql)?
        .query_map(params.as_slice(), to_event)?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    let whole = events.len() < limit as usize;
    let seen = match events.last() {
        Some((revision, _)) if !whole => *revision,
        Some(_) | None => last.max(after),
    };
    Ok(EventPage { events, gone, seen, whole })
}

/// Returns the revision before the last `count` events.
pub(super) fn before_last(db: &Connection, filter: &Filter, count: u32) -> rusqlite::Result<u64> {
    if count == 0 {
        return last(db);
    }
    let (condition, values) = condition(filter);
    let sql = format!(
        "SELECT min(revision) FROM (SELECT revision FROM events WHERE 1 {condition} \
         ORDER BY revision DESC LIMIT :count)"
    );
    let mut params: Vec<(&str, &dyn rusqlite::ToSql)> = vec![(":count", &count)];
    params.extend(values.iter().map(|(name, value)| (*name, value as &dyn rusqlite::ToSql)));
    let first: Option<u64> =
        db.prepare_cached(&sql)?.query_row(params.as_slice(), |row| row.get(0))?;
    first.map_or_else(|| last(db), |first| Ok(first.saturating_sub(1)))
}
