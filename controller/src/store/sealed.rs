//! What callers want kept to themselves, in the file: requests and files of creations are sealed with the
//! controller's key. Without it they are as unknown as those of a row that was rebuilt from a node.

use std::{io, path::Path};

use daemon::seal::{self, Db, Key, Origin};
use rusqlite::{Connection, Error::FromSqlConversionFailure, params, types::Type};

use super::{Error, Result};

/// Seals a value of the row with this id.
type Seal = fn(&Key, &str, &[u8]) -> rusqlite::Result<Vec<u8>>;

/// Schema version from which on requests and files are sealed.
pub(super) const SEALED_FROM: usize = 7;

/// Reads the key beside the database, or makes it.
pub(super) fn key_beside(database: &Path) -> Result<Key> {
    let path = database.with_file_name(seal::KEY_FILE);
    let failed = |error: io::Error| Error::Failed(format!("{}: {error}", path.display()));
    let (key, origin) = Key::at(&path).map_err(failed)?;
    let path = path.display();
    match origin {
        Origin::Found => {}
        Origin::Made => tracing::info!(%path, "made the key that seals requests and files"),
        Origin::Replaced => tracing::error!(
            %path,
            "the file held no key and was renamed to NAME.broken; made a new key"
        ),
    }
    Ok(key)
}

/// Seals the request of a creation; nothing stays nothing.
pub(super) fn seal_request(key: &Key, id: &str, request: &[u8]) -> rusqlite::Result<Vec<u8>> {
    if request.is_empty() {
        return Ok(Vec::new());
    }
    seal(key, &of_request(id), request)
}

/// Opens the request of a creation; empty when the key is another.
pub(super) fn open_request(key: &Key, id: &str, sealed: &[u8]) -> Vec<u8> {
    key.open(&of_request(id), sealed).unwrap_or_default()
}

/// Seals the files of a creation.
pub(super) fn seal_files(key: &Key, id: &str, files: &[u8]) -> rusqlite::Result<Vec<u8>> {
    seal(key, &of_files(id), files)
}

/// Opens the files of a creation.
pub(super) fn open_files(key: &Key, id: &str, sealed: &[u8]) -> rusqlite::Result<Vec<u8>> {
    key.open(&of_files(id), sealed).map_err(unsealed)
}

fn seal(key: &Key, place: &str, secret: &[u8]) -> rusqlite::Result<Vec<u8>> {
    key.seal(place, secret).map_err(unsealed)
}

fn unsealed(error: seal::Error) -> rusqlite::Error {
    FromSqlConversionFailure(0, Type::Blob, Box::new(error))
}

fn of_request(id: &str) -> String {
    format!("request of {id}")
}

fn of_files(id: &str) -> String {
    format!("files of {id}")
}

/// Seals what an earlier version has written plainly, in the transaction that changes the schema.
pub(super) fn seal_the_plain(db: &Db<'_>, version: usize) -> rusqlite::Result<()> {
    if version >= SEALED_FROM {
        return Ok(());
    }
    let all: [(&str, &str, Seal); 2] =
        [("sandboxes", "request", seal_request), ("files", "content", seal_files)];
    for (table, column, seal) in all {
        let mut ids = db.prepare(&format!("SELECT id FROM {table}"))?;
        let ids: Vec<String> = ids.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
        let (read, write) = (
            format!("SELECT {column} FROM {table} WHERE id = ?1"),
            format!("UPDATE {table} SET {column} = ?2 WHERE id = ?1"),
        );
        // One by one: together they may be large.
        for id in ids {
            let plain: Vec<u8> = db.prepare_cached(&read)?.query_row([&id], |row| row.get(0))?;
            let sealed = seal(db.key, &id, &plain)?;
            db.prepare_cached(&write)?.execute(params![id, sealed])?;
        }
    }
    // In a new file there was nothing.
    db.execute("UPDATE sealed SET scrubbed = ?1", [version == 0]).map(drop)
}

/// Removes from the file what was plain before. What keeps it from that is told, and the next start
/// tries again.
pub(super) fn scrub(db: &Connection) {
    let scrubbed = || {
        let done: bool = db.query_row("SELECT scrubbed FROM sealed", [], |row| row.get(0))?;
        if !done && seal::scrub(db)? {
            db.execute("UPDATE sealed SET scrubbed = 1", [])?;
        }
        Ok::<_, rusqlite::Error>(())
    };
    if let Err(error) = scrubbed() {
        tracing::warn!(%error, "the store may have traces of plain requests: the next start tries again");
    }
}

/// Logs when the key is not the one that sealed the newest creation.
pub(super) fn tell_lost(db: &Db<'_>) -> rusqlite::Result<()> {
    let sql =
        "SELECT id, request FROM sandboxes WHERE length(request) > 0 ORDER BY id DESC LIMIT 1";
    let mut newest = db.prepare(sql)?;
    let mut rows = newest.query([])?;
    if let Some(row) = rows.next()? {
        let (id, sealed): (String, Vec<u8>) = (row.get(0)?, row.get(1)?);
        if open_request(db.key, &id, &sealed).is_empty() {
            tracing::error!(
                "requests and files of creations cannot be read, because the key that sealed them is lost: creations under way are cancelled"
            );
        }
    }
    Ok(())
}
