//! SQL of the journal. Every function is one request and runs inside the caller's transaction.

use std::{collections::BTreeSet, net::Ipv4Addr};

use daemon::seal::Db;
use proto::{
    id::{SandboxId, Vmid},
    spec::Network,
};
use rusqlite::{Connection, OptionalExtension, Params, Row, params, types::FromSql};

use super::{connection::storage, sealed};
use crate::journal::{Error, Intent, Node, Pools, Record, Result, ring, scheduling};

/// Counters of `meta`; absent means 0.
pub(super) const REVISION: &str = "revision";
const HORIZON: &str = "horizon";
const EPOCH: &str = "epoch";
/// The operator's order for the node, JSON.
const SCHEDULING: &str = "intake";
/// Node that the journal belongs to, JSON.
const NODE: &str = "node";
const VMID_CURSOR: &str = "vmid_cursor";
const ADDRESS_CURSOR: &str = "address_cursor";

/// Writes an entry of `meta`.
const SET: &str = "INSERT OR REPLACE INTO meta (key, value) VALUES (?1, ?2)";

pub(super) fn begin(db: &Db<'_>, pools: &Pools, intent: &Intent, now_ms: u64) -> Result<Record> {
    let mut record = intent.record.clone();
    let before = get(db, &record.id)?;
    if let Some(before) = &before {
        // Only the tombstone of an earlier attempt may be replaced.
        if !before.phase.ended() || before.attempt >= record.attempt {
            return Err(Error::Conflict { id: record.id, expected: 0, found: before.revision });
        }
    }
    record.vmid = lease_vmid(db, pools, &intent.taken)?;
    if intent.lease_address {
        record.ip = Some(lease_address(db, pools, &intent.taken_ips, now_ms)?);
    }
    put(db, record)
}

pub(super) fn adopt(db: &Db<'_>, record: &Record) -> Result<Record> {
    if let Some(known) = get(db, &record.id)? {
        return Err(Error::Conflict { id: record.id, expected: 0, found: known.revision });
    }
    write_found(db, record)
}

pub(super) fn import(
    db: &Db<'_>,
    pools: &Pools,
    record: &Record,
    taken_ips: &BTreeSet<Ipv4Addr>,
    now_ms: u64,
) -> Result<Record> {
    if let Some(known) = get(db, &record.id)?.filter(|known| !known.gives_way_to(record)) {
        return Err(Error::Conflict { id: record.id, expected: 0, found: known.revision });
    }
    let mut record = record.clone();
    if record.network == Network::Static {
        record.ip = Some(lease_address(db, pools, taken_ips, now_ms)?);
    }
    write_found(db, &record)
}

/// Writes the record of a container that existed before it.
fn write_found(db: &Db<'_>, record: &Record) -> Result<Record> {
    let (team, request) = (record.team.to_string(), record.request_id.to_string());
    let known: Option<i64> = find(
        db,
        "SELECT revision FROM records WHERE ended = 0
         AND (vmid = ?1 OR lease = ?2 OR (team = ?3 AND request_id = ?4))",
        params![record.vmid.get(), lease_of(record), team, request],
    )?;
    match known {
        Some(found) => Err(Error::Conflict { id: record.id, expected: 0, found: uint(found) }),
        None => put(db, record.clone()),
    }
}

pub(super) fn next_vmid(
    db: &Db<'_>,
    pools: &Pools,
    record: &Record,
    taken: &BTreeSet<Vmid>,
) -> Result<Record> {
    at_revision(db, record)?;
    let mut taken = taken.clone();
    taken.insert(record.vmid);
    let mut record = record.clone();
    record.vmid = lease_vmid(db, pools, &taken)?;
    put(db, record)
}

pub(super) fn update(db: &Db<'_>, pools: &Pools, record: &Record) -> Result<Record> {
    let before = at_revision(db, record)?;
    if let (false, true, Some(lease)) =
        (before.phase.ended(), record.phase.ended(), lease_of(&before))
    {
        let until = record.ended_ms.saturating_add(pools.address_quarantine_ms);
        let sql = "INSERT OR REPLACE INTO resting (ip, until_ms) VALUES (?1, ?2)";
        execute(db, sql, params![lease, int(until)])?;
    }
    if let Some(ip) =
        record.lease().filter(|ip| !record.phase.ended() && before.lease() != Some(*ip))
    {
        let sql =
            "SELECT EXISTS (SELECT 1 FROM records WHERE lease = ?1 AND ended = 0 AND id <> ?2)";
        if value(db, sql, params![u32::from(ip), record.id.to_string()])? {
            return Err(Error::AddressTaken { ip });
        }
    }
    put(db, record.clone())
}

pub(super) fn forget(db: &Connection, before_ms: u64) -> Result<usize> {
    let before = int(before_ms);
    let sql = "SELECT max(revision) FROM records WHERE ended = 1 AND ended_ms < ?1";
    let last: Option<i64> = value(db, sql, [before])?;
    for sql in ["DELETE FROM cancelled WHERE at_ms < ?1", "DELETE FROM resting WHERE until_ms < ?1"]
    {
        execute(db, sql, [before])?;
    }
    let Some(last) = last else { return Ok(0) };
    let horizon = counter(db, HORIZON).map_err(storage)?.max(uint(last));
    set_counter(db, HORIZON, horizon)?;
    execute(db, "DELETE FROM records WHERE ended = 1 AND ended_ms < ?1", [before])
}

pub(super) fn get(db: &Db<'_>, id: &SandboxId) -> Result<Option<Record>> {
    body_of(db, id)?.map(|body| sealed::decode(db.key, &body)).transpose()
}

pub(super) fn all(db: &Db<'_>) -> Result<Vec<Record>> {
    let mut sql = db.prepare_cached("SELECT body FROM records ORDER BY id").map_err(storage)?;
    collect(db, sql.query_map([], body))
}

pub(super) fn has_live(db: &Connection) -> Result<bool> {
    value(db, "SELECT EXISTS (SELECT 1 FROM records WHERE ended = 0)", [])
}

pub(super) fn changed_since(db: &Db<'_>, revision: u64, limit: usize) -> Result<Vec<Record>> {
    let mut sql = db
        .prepare_cached("SELECT body FROM records WHERE revision > ?1 ORDER BY revision LIMIT ?2")
        .map_err(storage)?;
    collect(db, sql.query_map(params![int(revision), int(limit as u64)], body))
}

pub(super) fn revision(db: &Connection) -> Result<u64> {
    counter(db, REVISION).map_err(storage)
}

pub(super) fn horizon(db: &Connection) -> Result<u64> {
    counter(db, HORIZON).map_err(storage)
}

pub(super) fn epoch(db: &Connection, epoch: u64) -> Result<u64> {
    let highest = counter(db, EPOCH).map_err(storage)?;
    if epoch > highest {
        set_counter(db, EPOCH, epoch)?;
    }
    Ok(highest.max(epoch))
}

pub(super) fn scheduling(db: &Connection) -> Result<scheduling::Scheduling> {
    Ok(json(db, SCHEDULING)?.unwrap_or_default())
}

pub(super) fn set_scheduling(db: &Connection, order: &scheduling::Scheduling) -> Result<()> {
    set_json(db, SCHEDULING, order)
}

pub(super) fn node(db: &Connection) -> Result<Option<Node>> {
    json(db, NODE)
}

pub(super) fn set_node(db: &Connection, node: &Node) -> Result<()> {
    set_json(db, NODE, node)
}

/// Reads a row of `meta` that holds JSON.
fn json<T: serde::de::DeserializeOwned>(db: &Connection, key: &str) -> Result<Option<T>> {
    let text: Option<String> = find(db, "SELECT value FROM meta WHERE key = ?1", [key])?;
    let unread = |error: serde_json::Error| Error::Storage(format!("{key}: {error}"));
    text.map(|text| serde_json::from_str(&text).map_err(unread)).transpose()
}

fn set_json(db: &Connection, key: &str, value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string(value).map_err(|error| Error::Storage(error.to_string()))?;
    execute(db, SET, params![key, text]).map(drop)
}

pub(super) fn cancel(db: &Connection, id: &SandboxId, attempt: u32, now_ms: u64) -> Result<()> {
    execute(
        db,
        "INSERT INTO cancelled (id, attempt, at_ms) VALUES (?1, ?2, ?3)
         ON CONFLICT (id) DO UPDATE SET attempt = max(attempt, excluded.attempt),
                                        at_ms = excluded.at_ms",
        params![id.to_string(), attempt, int(now_ms)],
    )
    .map(drop)
}

pub(super) fn cancelled(db: &Connection, id: &SandboxId) -> Result<u32> {
    let found = find(db, "SELECT attempt FROM cancelled WHERE id = ?1", [id.to_string()])?;
    Ok(found.unwrap_or_default())
}

pub(super) fn room(db: &Connection, pools: &Pools, now_ms: u64) -> Result<(u32, u32)> {
    let (first, last) = (pools.vmids.0.get(), pools.vmids.1.get());
    let sql = "SELECT count(*) FROM records WHERE ended = 0 AND vmid BETWEEN ?1 AND ?2";
    let vmids: u32 = value(db, sql, [first, last])?;
    let (low, high) = (u32::from(pools.addresses.0), u32::from(pools.addresses.1));
    let addresses: u32 = value(
        db,
        "SELECT count(*) FROM (
           SELECT lease FROM records WHERE ended = 0 AND lease BETWEEN ?1 AND ?2
           UNION SELECT ip FROM resting WHERE until_ms > ?3 AND ip BETWEEN ?1 AND ?2)",
        params![low, high, int(now_ms)],
    )?;
    let free = |first: u32, last: u32, used| (last - first).saturating_add(1).saturating_sub(used);
    Ok((free(first, last, vmids), free(low, high, addresses)))
}

pub(super) fn counter(db: &Connection, key: &str) -> Result<u64, rusqlite::Error> {
    db.prepare_cached("SELECT value FROM meta WHERE key = ?1")?
        .query_row([key], |row| row.get::<_, i64>(0))
        .optional()
        .map(|value| value.map(uint).unwrap_or_default())
}

fn set_counter(db: &Connection, key: &str, value: u64) -> Result<()> {
    execute(db, SET, params![key, int(value)]).map(drop)
}

/// Leases the ring's next vmid, those of tombstones last: their URLs should answer 410 for long.
fn lease_vmid(db: &Connection, pools: &Pools, taken: &BTreeSet<Vmid>) -> Result<Vmid> {
    let range = (pools.vmids.0.get(), pools.vmids.1.get());
    let cursor = counter(db, VMID_CURSOR).map_err(storage)?;
    let is_taken = |number: u32| Vmid::try_from(number).is_ok_and(|vmid| taken.contains(&vmid));
    for sql in [
        "SELECT NOT EXISTS (SELECT 1 FROM records WHERE vmid = ?1)",
        "SELECT NOT EXISTS (SELECT 1 FROM records WHERE vmid = ?1 AND ended = 0)",
    ] {
        let mut sql = db.prepare_cached(sql).map_err(storage)?;
        let found = ring::next(range, u32::try_from(cursor).ok(), |number| {
            Ok(!is_taken(number)
                && sql.query_row([number], |row| row.get::<_, bool>(0)).map_err(storage)?)
        })?;
        if let Some(vmid) = found.and_then(|number| Vmid::try_from(number).ok()) {
            set_counter(db, VMID_CURSOR, vmid.get().into())?;
            return Ok(vmid);
        }
    }
    Err(Error::VmidsExhausted { first: pools.vmids.0, last: pools.vmids.1 })
}

fn lease_address(
    db: &Connection,
    pools: &Pools,
    taken: &BTreeSet<Ipv4Addr>,
    now_ms: u64,
) -> Result<Ipv4Addr> {
    let range = (u32::from(pools.addresses.0), u32::from(pools.addresses.1));
    let cursor = counter(db, ADDRESS_CURSOR).map_err(storage)?;
    let mut sql = db
        .prepare_cached(
            "SELECT NOT EXISTS (SELECT 1 FROM records WHERE lease = ?1 AND ended = 0)
                AND NOT EXISTS (SELECT 1 FROM resting WHERE ip = ?1 AND until_ms > ?2)",
        )
        .map_err(storage)?;
    let found = ring::next(range, u32::try_from(cursor).ok(), |number| {
        if taken.contains(&number.into()) {
            return Ok(false);
        }
        sql.query_row(params![number, int(now_ms)], |row| row.get::<_, bool>(0)).map_err(storage)
    })?;
    let address = found.ok_or(Error::AddressesExhausted)?;
    set_counter(db, ADDRESS_CURSOR, address.into())?;
    Ok(address.into())
}

fn at_revision(db: &Db<'_>, record: &Record) -> Result<Record> {
    let found = get(db, &record.id)?;
    match found {
        Some(found) if found.revision == record.revision => Ok(found),
        other => Err(Error::Conflict {
            id: record.id,
            expected: record.revision,
            found: other.map_or(0, |found| found.revision),
        }),
    }
}

fn put(db: &Db<'_>, mut record: Record) -> Result<Record> {
    let revision = revision(db)? + 1;
    set_counter(db, REVISION, revision)?;
    record.revision = revision;
    record.drop_secrets();
    let body = merged(db, &record)?;
    execute(
        db,
        "INSERT INTO records
           (id, vmid, lease, team, request_id, ended, ended_ms, revision, body)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
         ON CONFLICT (id) DO UPDATE SET
           vmid = excluded.vmid, lease = excluded.lease, team = excluded.team,
           request_id = excluded.request_id, ended = excluded.ended,
           ended_ms = excluded.ended_ms, revision = excluded.revision, body = excluded.body",
        params![
            record.id.to_string(),
            record.vmid.get(),
            lease_of(&record),
            record.team.as_str(),
            record.request_id.as_str(),
            record.phase.ended(),
            int(record.ended_ms),
            int(revision),
            body,
        ],
    )?;
    Ok(record)
}

/// Returns the record as JSON, with the fields of a later version that the file has: a downgrade
/// must not lose them.
fn merged(db: &Db<'_>, record: &Record) -> Result<String> {
    let before = body_of(db, &record.id)?;
    let mut body = sealed::encode(db.key, record)?;
    if let Some(before) = before {
        let before = serde_json::from_str::<serde_json::Map<_, _>>(&before)
            .map_err(|error| Error::Storage(error.to_string()))?;
        let same_attempt = before.get("attempt") == body.get("attempt");
        for (key, value) in before.into_iter().filter(|_| same_attempt) {
            if sealed::is_inherited(record, &key) {
                body.entry(key).or_insert(value);
            }
        }
    }
    Ok(serde_json::Value::from(body).to_string())
}

fn lease_of(record: &Record) -> Option<u32> {
    record.lease().map(u32::from)
}

fn body_of(db: &Connection, id: &SandboxId) -> Result<Option<String>> {
    find(db, "SELECT body FROM records WHERE id = ?1", [id.to_string()])
}

/// Executes a statement; returns the number of its rows.
fn execute(db: &Connection, sql: &str, params: impl Params) -> Result<usize> {
    db.prepare_cached(sql).and_then(|mut sql| sql.execute(params)).map_err(storage)
}

/// Reads the one value that a query gives.
fn value<T: FromSql>(db: &Connection, sql: &str, params: impl Params) -> Result<T> {
    find(db, sql, params)?.ok_or_else(|| storage(rusqlite::Error::QueryReturnedNoRows))
}

/// Reads the value that a query gives, if it gives one.
fn find<T: FromSql>(db: &Connection, sql: &str, params: impl Params) -> Result<Option<T>> {
    db.prepare_cached(sql)
        .and_then(|mut sql| sql.query_row(params, |row| row.get(0)).optional())
        .map_err(storage)
}

fn body(row: &Row<'_>) -> Result<String, rusqlite::Error> {
    row.get(0)
}

fn collect(
    db: &Db<'_>,
    rows: Result<impl Iterator<Item = Result<String, rusqlite::Error>>, rusqlite::Error>,
) -> Result<Vec<Record>> {
    rows.map_err(storage)?.map(|row| sealed::decode(db.key, &row.map_err(storage)?)).collect()
}

/// Converts to SQLite's signed integer. Times and counters stay below 2^63.
fn int(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn uint(value: i64) -> u64 {
    u64::try_from(value).unwrap_or_default()
}
