//! Looks at the file of a store, also beside a running controller. Changes nothing.

use std::path::Path;

use daemon::group_commit;
use proto::scope::{Scope, Scopes};
use rusqlite::{Connection, named_params};

use super::{
    Result,
    sqlite::{MIGRATIONS, failed},
    sqlite_access::LIVING,
};

/// Most flaws of a damaged file that are told.
const FLAWS: u32 = 3;

/// Observations of a store's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Looked {
    /// Version of the schema in the file.
    pub version: usize,
    /// Version of the schema that this program writes.
    pub newest: usize,
    /// Damage that SQLite's own check has found.
    pub flaws: Vec<String>,
    /// Number of living tokens with the scope ADMIN; `None` for a schema of another version.
    pub operators: Option<usize>,
}

/// Looks at the file of a store.
///
/// # Errors
/// When it is not there, or no database.
pub fn look(path: &Path, now_ms: u64) -> Result<Looked> {
    let db = group_commit::open_to_read(path).map_err(failed)?;
    seen(&db, now_ms).map_err(failed)
}

fn seen(db: &Connection, now_ms: u64) -> rusqlite::Result<Looked> {
    let version: usize = db.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let mut check = db.prepare(&format!("PRAGMA quick_check({FLAWS})"))?;
    let flaws: Vec<String> = check.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
    let newest = MIGRATIONS.len();
    let operators = (version == newest).then(|| operators(db, now_ms)).transpose()?;
    let flaws = flaws.into_iter().filter(|flaw| flaw != "ok").collect();
    Ok(Looked { version, newest, flaws, operators })
}

fn operators(db: &Connection, now_ms: u64) -> rusqlite::Result<usize> {
    let mut living = db.prepare(&format!("SELECT scopes FROM tokens WHERE {LIVING}"))?;
    let scopes = living.query_map(named_params! { ":now_ms": now_ms }, |row| row.get(0))?;
    let scopes: Vec<String> = scopes.collect::<Result<_, _>>()?;
    Ok(scopes.iter().filter(|text| Scopes::stored(text).allow(Scope::Admin)).count())
}
