//! Opening the file: locking, permissions, sync mode, schema.

use std::{
    fs::{File, OpenOptions, TryLockError},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use rusqlite::{Connection, OpenFlags, OptionalExtension};

use crate::journal::Error;

/// Schema migrations, one per version. They only add: the previous version reads the file too.
const MIGRATIONS: &[&str] = &[include_str!("../schema/v1.sql")];

/// An open journal file.
pub(super) struct Opened {
    pub(super) id: String,
    pub(super) writer: Connection,
    pub(super) reader: Connection,
    /// Lock held while the journal is open: two writers would corrupt it.
    pub(super) lock: File,
}

pub(super) fn open(path: &Path) -> Result<Opened, Error> {
    let lock = lock(path)?;
    // The file holds the sandboxes' environment; SQLite gives its other files the same mode.
    private(path)?;
    let mut writer = connect(path)?;
    migrate(&mut writer)?;
    let id = journal_id(&writer)?;
    let reader = connect(path)?;
    reader.pragma_update(None, "query_only", true).map_err(storage)?;
    Ok(Opened { id, writer, reader, lock })
}

/// Opens a read-only connection, whether or not another process has the journal open.
pub(super) fn look(path: &Path) -> Result<Connection, Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(path, flags).map_err(storage)?;
    db.busy_timeout(std::time::Duration::from_secs(5)).map_err(storage)?;
    Ok(db)
}

/// Converts any other failure of SQLite.
pub(super) fn storage(error: rusqlite::Error) -> Error {
    Error::Storage(error.to_string())
}

fn lock(path: &Path) -> Result<File, Error> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let file = private(Path::new(&name))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            Err(Error::Storage(format!("{} is in use by another process", path.display())))
        }
        Err(TryLockError::Error(error)) => {
            Err(Error::Storage(format!("{}: {error}", path.display())))
        }
    }
}

pub(super) fn private(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| Error::Storage(format!("{}: {error}", path.display())))
}

fn connect(path: &Path) -> Result<Connection, Error> {
    let db = Connection::open(path).map_err(storage)?;
    db.busy_timeout(std::time::Duration::from_secs(5)).map_err(storage)?;
    db.pragma_update(None, "journal_mode", "wal").map_err(storage)?;
    db.pragma_update(None, "synchronous", "full").map_err(storage)?;
    // Size in KiB: the file of a node with thousands of sandboxes fits many times over.
    db.pragma_update(None, "cache_size", -1024).map_err(storage)?;
    let mode: String =
        db.pragma_query_value(None, "journal_mode", |row| row.get(0)).map_err(storage)?;
    if mode != "wal" {
        return Err(Error::Storage(format!("{}: no WAL on this file system", path.display())));
    }
    Ok(db)
}

fn migrate(db: &mut Connection) -> Result<(), Error> {
    let version: u16 =
        db.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(storage)?;
    let version = usize::from(version);
    if version > MIGRATIONS.len() + 1 {
        return Err(Error::Storage(format!(
            "the journal has schema {version}, this version knows up to {} and reads one more",
            MIGRATIONS.len()
        )));
    }
    for (step, sql) in MIGRATIONS.iter().enumerate().skip(version) {
        let transaction = db.transaction().map_err(storage)?;
        transaction.execute_batch(sql).map_err(storage)?;
        let version = u16::try_from(step + 1).unwrap_or(u16::MAX);
        transaction.pragma_update(None, "user_version", version).map_err(storage)?;
        transaction.commit().map_err(storage)?;
    }
    Ok(())
}

fn journal_id(db: &Connection) -> Result<String, Error> {
    let found = db
        .query_row("SELECT value FROM meta WHERE key = 'journal_id'", [], |row| row.get(0))
        .optional()
        .map_err(storage)?;
    if let Some(id) = found {
        return Ok(id);
    }
    let mut random = [0u8; 16];
    getrandom::fill(&mut random)
        .map_err(|error| Error::Storage(format!("no random numbers: {error}")))?;
    let id = format!("{:032x}", u128::from_be_bytes(random));
    db.execute("INSERT INTO meta (key, value) VALUES ('journal_id', ?1)", [&id])
        .map_err(storage)?;
    Ok(id)
}
