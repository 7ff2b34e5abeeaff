//! Secrets of sandboxes in the file: sealed with the node's key. An environment is beside an empty `env`, the
//! key for the credentials of its ports beside an `access` without one.
//!
//! A version that does not know of the seal reads such a record as one without an environment, and
//! keeps the sealed text. What such a version has written plainly is sealed at the next start.

use std::{collections::BTreeMap, path::Path};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use daemon::seal::{self, Key, Origin};
use proto::id::SandboxId;
use rusqlite::{Connection, OptionalExtension as _, params};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::connection::storage;
use crate::journal::{AccessKey, Error, Record, Result};

/// Field of a record with the sealed environment, base64.
const SEALED: &str = "sealed_env";
/// Field of a record with a plain environment: empty, but in records of earlier versions.
const PLAIN: &str = "env";
/// Field of a record with the sealed key of the credentials, base64.
const SEALED_KEY: &str = "sealed_access_key";
/// Bytes of such a key.
const KEY_BYTES: usize = 32;
/// Entry of `meta`: the file has no trace of a plain environment left.
const SCRUBBED: &str = "scrubbed";
/// Most sandboxes that a log line names.
const NAMED: usize = 50;

/// Reads the key beside the journal, or makes it.
pub(super) fn key_beside(journal: &Path) -> Result<Key> {
    let path = journal.with_file_name(seal::KEY_FILE);
    let failed = |error: std::io::Error| Error::Storage(format!("{}: {error}", path.display()));
    let (key, origin) = Key::at(&path).map_err(failed)?;
    let path = path.display();
    match origin {
        Origin::Found => {}
        Origin::Made => tracing::info!(%path, "made the key that seals environments"),
        Origin::Replaced => tracing::error!(
            %path,
            "the file held no key and was renamed to NAME.broken; made a new key"
        ),
    }
    Ok(key)
}

/// Returns the record's fields as the file has them.
pub(super) fn encode(key: &Key, record: &Record) -> Result<Map<String, Value>> {
    let Value::Object(mut body) = serde_json::to_value(record).map_err(json)? else {
        return Err(Error::Storage("a record is no object".into()));
    };
    seal(key, &record.id, &mut body)?;
    seal_access_key(key, record, &mut body)?;
    Ok(body)
}

/// Reads a record from the file.
pub(super) fn decode(key: &Key, body: &str) -> Result<Record> {
    /// The fields that a `Record` does not have.
    #[derive(Deserialize)]
    struct Beside {
        #[serde(default)]
        sealed_env: Option<String>,
        #[serde(default)]
        sealed_access_key: Option<String>,
    }
    let unread =
        |error: serde_json::Error| Error::Storage(format!("a record cannot be read: {error}"));
    let mut record: Record = serde_json::from_str(body).map_err(unread)?;
    let Beside { sealed_env, sealed_access_key } = serde_json::from_str(body).map_err(unread)?;
    // A key that cannot be opened is lost: its credentials are void, and the next one makes another key.
    let access_key = sealed_access_key.and_then(|sealed| open_access_key(key, &record.id, &sealed));
    record.access.key = access_key.or(record.access.key);
    if let Some(sealed) = sealed_env {
        let env = open(key, &record.id, &sealed);
        record.env_lost = env.is_none();
        record.env = env.unwrap_or_default().into();
    }
    Ok(record)
}

/// True for a field that a record takes from its version before, though it has none itself: fields of
/// a later version, and an environment that cannot be opened.
pub(super) fn is_inherited(record: &Record, field: &str) -> bool {
    match field {
        SEALED => record.env_lost,
        SEALED_KEY => false,
        _ => true,
    }
}

/// Moves the key of the credentials into its sealed field.
fn seal_access_key(key: &Key, record: &Record, body: &mut Map<String, Value>) -> Result<()> {
    if let Some(Value::Object(access)) = body.get_mut("access") {
        access.remove("key");
    }
    let Some(secret) = record.access.key else { return Ok(()) };
    let sealed = key.seal(&place_of_access_key(&record.id), &*secret);
    let sealed =
        sealed.map_err(|error| Error::Storage(format!("access key of {}: {error}", record.id)))?;
    body.insert(SEALED_KEY.to_owned(), STANDARD.encode(sealed).into());
    Ok(())
}

fn open_access_key(key: &Key, id: &SandboxId, sealed: &str) -> Option<AccessKey> {
    let sealed = STANDARD.decode(sealed).ok()?;
    let opened = key.open(&place_of_access_key(id), &sealed).ok()?;
    Some(AccessKey::new(<[u8; KEY_BYTES]>::try_from(opened).ok()?))
}

fn place_of_access_key(id: &SandboxId) -> String {
    format!("access key of {id}")
}

/// Moves a plain environment into the sealed field.
fn seal(key: &Key, id: &SandboxId, body: &mut Map<String, Value>) -> Result<()> {
    let plain = body.insert(PLAIN.to_owned(), Map::new().into());
    let plain = plain.filter(|env| env.as_object().is_some_and(|env| !env.is_empty()));
    let Some(plain) = plain else { return Ok(()) };
    let text = serde_json::to_vec(&plain).map_err(json)?;
    let sealed = key.seal(&place(id), &text);
    let sealed = sealed.map_err(|error| Error::Storage(format!("environment of {id}: {error}")))?;
    body.insert(SEALED.to_owned(), STANDARD.encode(sealed).into());
    Ok(())
}

fn open(key: &Key, id: &SandboxId, sealed: &str) -> Option<BTreeMap<String, String>> {
    let sealed = STANDARD.decode(sealed).ok()?;
    serde_json::from_slice(&key.open(&place(id), &sealed).ok()?).ok()
}

fn place(id: &SandboxId) -> String {
    format!("env of {id}")
}

/// Seals what an earlier version has written plainly, and removes every trace of it from the file. A
/// crash in between leaves work for the next start; so does a disk without room.
pub(super) fn seal_the_plain(db: &mut Connection, key: &Key, new: bool) -> Result<()> {
    if new {
        return mark_scrubbed(db).map_err(storage);
    }
    let transaction = db.transaction().map_err(storage)?;
    let plain: Vec<(String, String)> = transaction
        .prepare(
            "SELECT id, body FROM records WHERE coalesce(json_extract(body, '$.env'), '{}') <> '{}'",
        )
        .and_then(|mut sql| sql.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect())
        .map_err(storage)?;
    for (id, body) in &plain {
        let record = decode(key, body)?;
        let mut body: Map<String, Value> = serde_json::from_str(body).map_err(json)?;
        if record.phase.ended() {
            body.insert(PLAIN.to_owned(), Map::new().into());
        } else {
            seal(key, &record.id, &mut body)?;
        }
        transaction
            .execute(
                "UPDATE records SET body = ?2 WHERE id = ?1",
                params![id, Value::from(body).to_string()],
            )
            .map_err(storage)?;
    }
    if !plain.is_empty() {
        transaction.execute("DELETE FROM meta WHERE key = ?1", [SCRUBBED]).map_err(storage)?;
    }
    transaction.commit().map_err(storage)?;
    if !plain.is_empty() {
        tracing::info!(sandboxes = plain.len(), "sealed environments of an earlier version");
    }
    if let Err(error) = scrub(db) {
        tracing::warn!(%error, "the journal may have traces of plain environments: the next start tries again");
    }
    Ok(())
}

/// Removes deleted bytes from the file and from its log, once.
fn scrub(db: &Connection) -> rusqlite::Result<()> {
    let done: Option<i64> = db
        .query_row("SELECT value FROM meta WHERE key = ?1", [SCRUBBED], |row| row.get(0))
        .optional()?;
    if done.is_some() {
        return Ok(());
    }
    if seal::scrub(db)? {
        mark_scrubbed(db)?;
    }
    Ok(())
}

/// Records that the file has no trace of a plain environment.
fn mark_scrubbed(db: &Connection) -> rusqlite::Result<()> {
    db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?1, 1)", [SCRUBBED]).map(drop)
}

/// Logs the sandboxes whose environment cannot be read.
pub(super) fn tell_lost(records: &[Record]) {
    let lost = records.iter().filter(|record| record.env_lost && !record.phase.ended());
    let lost: Vec<_> = lost.map(|record| record.id.to_string()).collect();
    if !lost.is_empty() {
        let named = lost.iter().take(NAMED).cloned().collect::<Vec<_>>().join(" ");
        tracing::error!(
            number = lost.len(),
            sandboxes = named,
            "environments cannot be read, because the key that sealed them is lost: these sandboxes run on, and start no commands"
        );
    }
}

fn json(error: serde_json::Error) -> Error {
    Error::Storage(error.to_string())
}
