//! Changes settings in the configuration file. What the operator has written stays, comments included.

use std::{fs, io, path::Path};

use daemon::{
    replace::{Access, replace},
    text,
};
use toml_edit::{DocumentMut, Item, Table, TableLike, Value};

/// Table of the settings above the first table.
pub const TOP: &str = "";

/// Sets values, each by its table and its key; returns what was done, for people. A value that takes the place of
/// another gets the comments of that.
///
/// # Errors
/// When the file cannot be read or written.
pub fn set(path: &Path, wanted: Vec<(&str, &str, Item)>) -> io::Result<Vec<String>> {
    let before = text::read_if_there(path)?.unwrap_or_default();
    let mut document: DocumentMut = before.parse().map_err(io::Error::other)?;
    let mut done = Vec::new();
    for (table, key, mut item) in wanted {
        let in_file: Option<&mut dyn TableLike> = match table {
            TOP => Some(document.as_table_mut()),
            _ => {
                let entry = document.entry(table);
                entry.or_insert_with(|| Item::Table(Table::new())).as_table_like_mut()
            }
        };
        let Some(in_file) = in_file else { continue };
        let plain = |value: &Value| value.clone().decorated("", "").to_string();
        let shown = item.as_value().map_or_else(|| item.to_string(), plain);
        match in_file.get_mut(key) {
            Some(before) => {
                if let (Some(now), Some(before)) = (item.as_value_mut(), before.as_value()) {
                    *now.decor_mut() = before.decor().clone();
                }
                *before = item;
            }
            None => drop(in_file.insert(key, item)),
        }
        let dot = if table == TOP { "" } else { "." };
        done.push(format!("set {table}{dot}{key} = {} in {}", shown.trim(), path.display()));
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

#[cfg(test)]
mod tests {
    use toml_edit::value;

    use super::*;

    #[test]
    fn value_takes_the_place_of_another_and_all_comments_stay() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("agent.toml");
        let before = "# mine\n[network]\n# above\npool = \"a\" # behind\n";
        fs::write(&path, before).expect("written");
        let done =
            set(&path, vec![("network", "pool", value("b")), ("ingress", "https", value(true))]);
        let done = done.expect("set");
        assert!(done[0].starts_with("set network.pool = \"b\" in "), "{done:?}");
        let after = fs::read_to_string(&path).expect("read");
        assert_eq!(after, before.replace("\"a\"", "\"b\"") + "\n[ingress]\nhttps = true\n");
        let done = set(&path, vec![(TOP, "listen", value("[::]:7445"))]).expect("set");
        assert!(done[0].starts_with("set listen = \"[::]:7445\" in "), "{done:?}");
        let now = fs::read_to_string(&path).expect("read");
        assert!(now.starts_with("listen = \"[::]:7445\"\n") && now.ends_with(&after), "{now}");
    }
}
