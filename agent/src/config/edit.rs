//! Changes settings in the configuration file. What the operator has written stays, comments included.

use std::{fs, io, path::Path};

use daemon::{
    replace::{Access, replace},
    text,
};
use toml_edit::{DocumentMut, Item, Table};

/// Sets values, each by its table and its key; returns what was done, for people.
///
/// # Errors
/// When the file cannot be read or written.
pub fn set(path: &Path, wanted: Vec<(&str, &str, Item)>) -> io::Result<Vec<String>> {
    let before = text::read_if_there(path)?.unwrap_or_default();
    let mut document: DocumentMut = before.parse().map_err(io::Error::other)?;
    let mut done = Vec::new();
    for (table, key, item) in wanted {
        let in_file = document.entry(table).or_insert_with(|| Item::Table(Table::new()));
        let Some(in_file) = in_file.as_table_like_mut() else { continue };
        let shown = item.to_string();
        in_file.insert(key, item);
        done.push(format!("set {table}.{key} = {} in {}", shown.trim(), path.display()));
    }
    let after = document.to_string();
    if after != before || !path.exists() {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        replace(path, after.as_bytes(), Access { mode: 0o644, group: None })?;
    }
    Ok(done)
}
