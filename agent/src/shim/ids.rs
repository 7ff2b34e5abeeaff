//! Names under which commands were run, for the whole life of a sandbox: a command that was asked
//! for by name is run once. A name is on the disk before its command is started.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Write},
    path::Path,
};

use crate::sys::read;

/// Names that a sandbox may use up.
const MAX: usize = 100_000;
/// Twice the size of a file with so many: a line is a digest of 64 characters and a name of 64.
const BYTES_MAX: u64 = 32 * 1024 * 1024;

/// See the module.
#[derive(Debug)]
pub(super) struct Ids {
    file: File,
    digests: HashMap<String, String>,
}

impl Ids {
    /// Reads what is there.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).append(true).create(true).open(path)?;
        let bytes = read::whole(path, BYTES_MAX)?;
        // What a crash cut short or garbled names no command that was ever started.
        let text = String::from_utf8_lossy(&bytes);
        let names = text.lines().filter_map(|line| line.split_once(' '));
        let digests = names.map(|(digest, id)| (id.to_owned(), digest.to_owned())).collect();
        Ok(Self { file, digests })
    }

    /// Digest of the command that this name was used for.
    pub(super) fn digest(&self, id: &str) -> Option<&str> {
        self.digests.get(id).map(String::as_str)
    }

    /// No further name is taken.
    pub(super) fn full(&self) -> bool {
        self.digests.len() >= MAX
    }

    /// Takes a name, durably.
    pub(super) fn take(&mut self, id: &str, digest: &str) -> io::Result<()> {
        // The line end in front ends a line that a crash cut short.
        self.file.write_all(format!("\n{digest} {id}\n").as_bytes())?;
        self.file.sync_data()?;
        self.digests.insert(id.to_owned(), digest.to_owned());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_outlive_the_process() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("ids");
        let mut ids = Ids::open(&path).expect("opened");
        ids.take("build-1", "d1").expect("taken");
        ids.take("build-2", "d2").expect("taken");
        assert_eq!(ids.digest("build-1"), Some("d1"));
        // A crash in the middle of a third.
        let mut torn = File::options().append(true).open(&path).expect("opened");
        torn.write_all(b"\n\xff\0d3bui").expect("written");
        let mut again = Ids::open(&path).expect("opened");
        again.take("build-4", "d4").expect("taken");
        let again = Ids::open(&path).expect("opened");
        assert_eq!(again.digest("build-4"), Some("d4"));
        assert_eq!((again.digest("build-2"), again.digest("build-3")), (Some("d2"), None));
    }
}
