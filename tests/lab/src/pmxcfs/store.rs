//! Keeps the tree on disk as plain files: people can read it and it survives the daemon. No fsync:
//! pmxcfs, too, may lose its last writes at a power cut.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context as _, Result};

use super::tree::{Change, Ino, ROOT, Tree};

/// Directory that mirrors the tree.
#[derive(Debug)]
pub(super) struct Store {
    root: PathBuf,
}

impl Store {
    /// Opens the directory and creates it if it is missing.
    pub(super) fn open(root: &Path) -> Result<Store> {
        fs::create_dir_all(root).with_context(|| format!("cannot make {}", root.display()))?;
        Ok(Store { root: root.to_owned() })
    }

    /// Reads the tree from disk.
    pub(super) fn load(&self) -> Result<Tree> {
        let mut tree = Tree::new(SystemTime::now());
        load_dir(&self.root, &mut tree, ROOT)
            .with_context(|| format!("cannot read {}", self.root.display()))?;
        tree.restart_counters();
        // The changes of the load are on disk already.
        drop(tree.take_changes());
        Ok(tree)
    }

    /// Writes the changes of an operation on the tree.
    pub(super) fn apply(&self, tree: &Tree, changes: Vec<Change>) -> io::Result<()> {
        for change in changes {
            match change {
                Change::Write(path) => {
                    let Ok(ino) = tree.at(&path) else { continue };
                    let (Ok(bytes), Ok(inode)) = (tree.file(ino), tree.get(ino)) else { continue };
                    let file = fs::File::create(self.root.join(&path))?;
                    io::Write::write_all(&mut &file, bytes)?;
                    file.set_modified(inode.mtime)?;
                }
                Change::Mkdir(path) => fs::create_dir(self.root.join(path))?,
                Change::Remove(path) => {
                    let path = self.root.join(path);
                    if path.is_dir() { fs::remove_dir(path)? } else { fs::remove_file(path)? }
                }
                Change::Rename(from, to) => {
                    fs::rename(self.root.join(from), self.root.join(to))?;
                }
            }
        }
        Ok(())
    }
}

fn load_dir(from: &Path, tree: &mut Tree, dir: Ino) -> Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let mtime = meta.modified()?;
        if meta.is_dir() {
            let ino = tree.mkdir(dir, &name, mtime)?;
            load_dir(&entry.path(), tree, ino)?;
        } else {
            let ino = tree.create(dir, &name, mtime)?;
            tree.write(ino, 0, &fs::read(entry.path())?, mtime)?;
        }
    }
    Ok(())
}
