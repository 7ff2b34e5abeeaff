//! Opening the file: locking and schema.

use std::{
    fs::{File, OpenOptions, TryLockError},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use daemon::group_commit::{self, Failure};
use rusqlite::{Connection, OptionalExtension};

use crate::journal::{Error, Result};

/// Schema migrations, one per version. They only add: the previous version reads the file too.
const MIGRATIONS: &[&str] = &[include_str!("../schema/v1.sql")];

/// Pages in the write-ahead log at which it is copied into the file.
const LOG_PAGES: u32 = 1000;
/// Size of a connection's cache, negative for KiB. Small, because it is what grows in an agent that
/// runs for long: reads are answered by the index, and the kernel caches the file.
const CACHE: i64 = -256;

/// An open journal file.
pub(super) struct Opened {
    pub(super) id: String,
    pub(super) writer: Connection,
    pub(super) reader: Connection,
    /// Whether the file is new.
    pub(super) new: bool,
    /// Lock held while the journal is open: two writers would corrupt it.
    pub(super) lock: File,
}

pub(super) fn open(path: &Path) -> Result<Opened> {
    let lock = lock(path)?;
    let mut writer = group_commit::open(path, LOG_PAGES).map_err(failed)?;
    let new = migrate(&mut writer)?;
    let id = journal_id(&writer)?;
    let reader = look(path)?;
    for db in [&writer, &reader] {
        db.pragma_update(None, "cache_size", CACHE).map_err(storage)?;
    }
    Ok(Opened { id, writer, reader, new, lock })
}

/// Opens a read-only connection, whether or not another process has the journal open.
pub(super) fn look(path: &Path) -> Result<Connection> {
    group_commit::open_to_read(path).map_err(failed)
}

/// Converts a failure of the database.
pub(super) fn failed(failure: Failure) -> Error {
    Error::Storage(failure.to_string())
}

/// Converts any other failure of SQLite.
pub(super) fn storage(error: rusqlite::Error) -> Error {
    Error::Storage(error.to_string())
}

fn lock(path: &Path) -> Result<File> {
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

/// Opens a file beside the journal, readable by its owner only.
pub(super) fn private(path: &Path) -> Result<File> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| Error::Storage(format!("{}: {error}", path.display())))
}

/// Brings the file to the newest schema; true when it is a new file.
fn migrate(db: &mut Connection) -> Result<bool> {
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
    Ok(version == 0)
}

fn journal_id(db: &Connection) -> Result<String> {
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
