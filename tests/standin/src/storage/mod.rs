//! Storages: the entries of `storage.cfg`, and volumes as subvolumes of a btrfs pool.

pub(crate) mod pool;
pub(crate) mod volume;

use std::fs;
use std::path::PathBuf;

use crate::ctx::Ctx;
use crate::failure::{Failure, Result};

/// An entry of `storage.cfg`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Storage {
    pub(crate) name: String,
    pub(crate) kind: String,
    properties: Vec<(String, String)>,
}

impl Storage {
    fn get(&self, key: &str) -> Option<&str> {
        self.properties.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    fn is_disabled(&self) -> bool {
        self.properties.iter().any(|(k, v)| k == "disable" && v != "0")
    }

    fn is_here(&self, node: &str) -> bool {
        self.get("nodes").is_none_or(|nodes| nodes.split(',').any(|n| n.trim() == node))
    }

    /// Returns the directory of the volumes: the mount point of the dataset.
    pub(crate) fn dir(&self, ctx: &Ctx) -> PathBuf {
        match self.get("mountpoint").or(self.get("path")) {
            Some(path) => PathBuf::from(path),
            None => match self.get("pool") {
                None | Some("rpool/data") => ctx.roots.pool.clone(),
                // Another pool is beside the first one, so that a test can have two.
                Some(pool) => {
                    let name = pool.rsplit('/').next().unwrap_or(pool);
                    ctx.roots.pool.with_file_name(name)
                }
            },
        }
    }
}

/// Returns all entries, in the order of the file.
pub(crate) fn all(ctx: &Ctx) -> Vec<Storage> {
    let text = fs::read_to_string(ctx.roots.etc_pve.join("storage.cfg")).unwrap_or_default();
    parse(&text)
}

fn parse(text: &str) -> Vec<Storage> {
    let mut storages: Vec<Storage> = Vec::new();
    for line in text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')) {
        if line.starts_with([' ', '\t']) {
            let (key, value) =
                line.trim().split_once(char::is_whitespace).unwrap_or((line.trim(), "1"));
            if let Some(storage) = storages.last_mut() {
                storage.properties.push((key.to_owned(), value.trim().to_owned()));
            }
        } else if let Some((kind, name)) = line.split_once(':') {
            let (kind, name) = (kind.trim().to_owned(), name.trim().to_owned());
            storages.push(Storage { name, kind, properties: Vec::new() });
        }
    }
    storages
}

/// Returns a storage by name, whatever its state.
pub(crate) fn find(ctx: &Ctx, name: &str) -> Result<Storage> {
    let found = all(ctx).into_iter().find(|storage| storage.name == name);
    found.ok_or_else(|| Failure::new(format!("storage '{name}' does not exist")))
}

/// Returns a storage that can be used on this node now.
pub(crate) fn usable(ctx: &Ctx, name: &str) -> Result<Storage> {
    let storage = find(ctx, name)?;
    if storage.is_disabled() {
        return Err(Failure::new(format!("storage '{name}' is disabled")));
    }
    if !storage.is_here(&ctx.node) {
        let node = &ctx.node;
        return Err(Failure::new(format!("storage '{name}' is not available on node '{node}'")));
    }
    if !storage.dir(ctx).is_dir() {
        let dir = storage.dir(ctx);
        let text = format!(
            "unable to activate storage '{name}' - directory is expected to be a mount point but \
             is not mounted: '{}'",
            dir.display()
        );
        return Err(Failure::new(text));
    }
    Ok(storage)
}

/// Returns whether a storage is enabled here, for `pvesm status`.
pub(crate) fn is_enabled(ctx: &Ctx, storage: &Storage) -> bool {
    !storage.is_disabled() && storage.is_here(&ctx.node)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storage_cfg_is_parsed() {
        let text = "dir: local\n\tpath /var/lib/vz\n\tcontent iso\n\nzfspool: local-zfs\n\
            \tpool rpool/data\n\tcontent rootdir,images\n\tsparse\n\tdisable\n";
        let storages = parse(text);
        assert_eq!(storages.len(), 2);
        assert_eq!(storages[1].kind, "zfspool");
        assert_eq!(storages[1].get("content"), Some("rootdir,images"));
        assert!(storages[1].is_disabled() && !storages[0].is_disabled());
    }
}
