//! Names under which commands were run, for the whole life of a sandbox: a command that was asked
//! for by name is run once. A name is on the disk before its command is started, and is given back
//! there when it is certain that nothing was run.
//!
//! One line a name, `digest name`; a later line `- name` gives it back. A version that does not know
//! the second form takes such a name for used by another command, and runs nothing.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use crate::sys::read;

/// Names that a sandbox may use up.
const MAX: usize = 100_000;
/// Twice the size of a file with so many: a line is a digest of 64 characters and a name of 64.
const BYTES_MAX: u64 = 32 * 1024 * 1024;
/// Lines that say nothing any more, beyond which the file is written anew.
const DEAD_MAX: usize = 256;
/// Stands for the digest in a line that gives a name back.
const GIVEN_BACK: &str = "-";

/// See the module.
#[derive(Debug)]
pub(super) struct Ids {
    path: PathBuf,
    file: File,
    digests: HashMap<String, String>,
    /// Lines of the file that stand for no name: those that give one back, and those given back.
    dead: usize,
}

impl Ids {
    /// Reads what is there.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).append(true).create(true).open(path)?;
        let bytes = read::whole(path, BYTES_MAX)?;
        // What a crash cut short or garbled names no command that was ever started.
        let text = String::from_utf8_lossy(&bytes);
        let (mut digests, mut lines) = (HashMap::new(), 0);
        for (digest, id) in text.lines().filter_map(|line| line.split_once(' ')) {
            lines += 1;
            if digest == GIVEN_BACK {
                digests.remove(id);
            } else {
                digests.insert(id.to_owned(), digest.to_owned());
            }
        }
        let dead = lines - digests.len();
        Ok(Self { path: path.to_owned(), file, digests, dead })
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
    ///
    /// # Errors
    /// When the disk does not take it. Then the name is free.
    pub(super) fn take(&mut self, id: &str, digest: &str) -> io::Result<()> {
        let _lock = self.lock()?;
        if let Err(error) = self.append(digest, id) {
            // Some of the line may be on the disk. If this is not, either, the disk takes nothing.
            self.append(GIVEN_BACK, id).ok();
            return Err(error);
        }
        self.digests.insert(id.to_owned(), digest.to_owned());
        Ok(())
    }

    /// Gives a name back whose command was certainly not run, durably.
    ///
    /// # Errors
    /// When the disk does not take it: this shim knows that the name is free, the next one will not.
    pub(super) fn give_back(&mut self, id: &str) -> io::Result<()> {
        self.digests.remove(id);
        let _lock = self.lock()?;
        self.append(GIVEN_BACK, id)?;
        self.dead += 2;
        if self.dead > DEAD_MAX { self.write_anew() } else { Ok(()) }
    }

    fn append(&mut self, digest: &str, id: &str) -> io::Result<()> {
        // The line end in front ends a line that a crash cut short.
        self.file.write_all(format!("\n{digest} {id}\n").as_bytes())?;
        self.file.sync_data()
    }

    /// Keeps others from writing for as long as the lock lives. A shim that is on its way out may
    /// still write beside its successor; what the other has written meanwhile is read.
    fn lock(&mut self) -> io::Result<File> {
        let lock = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(self.path.with_extension("ids-lock"))?;
        lock.lock()?;
        let current = std::fs::metadata(&self.path)?;
        if current.ino() != self.file.metadata()?.ino() {
            *self = Self::open(&self.path)?;
        }
        Ok(lock)
    }

    fn write_anew(&mut self) -> io::Result<()> {
        // What is in the file counts, not what this process remembers.
        let known = Self::open(&self.path)?;
        let lines = known.digests.iter().map(|(id, digest)| format!("{digest} {id}\n"));
        let draft = self.path.with_extension("ids-draft");
        let mut file = File::create(&draft)?;
        file.write_all(lines.collect::<String>().as_bytes())?;
        file.sync_data()?;
        std::fs::rename(&draft, &self.path)?;
        if let Some(dir) = self.path.parent() {
            File::open(dir)?.sync_all()?;
        }
        *self = Self::open(&self.path)?;
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

    #[test]
    fn a_name_that_was_given_back_is_free_after_a_restart_too() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("ids");
        let mut ids = Ids::open(&path).expect("opened");
        ids.take("a", "d1").expect("taken");
        ids.take("b", "d2").expect("taken");
        ids.give_back("a").expect("given back");
        assert_eq!((ids.digest("a"), ids.digest("b")), (None, Some("d2")));
        let mut again = Ids::open(&path).expect("opened");
        assert_eq!((again.digest("a"), again.digest("b")), (None, Some("d2")));
        again.take("a", "d3").expect("taken");
        assert_eq!(Ids::open(&path).expect("opened").digest("a"), Some("d3"));
    }

    #[test]
    fn refusals_without_end_do_not_fill_the_disk_and_lose_no_name() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("ids");
        let mut ids = Ids::open(&path).expect("opened");
        // One that is on its way out, and takes names beside it.
        let mut other = Ids::open(&path).expect("opened");
        ids.take("kept", "d").expect("taken");
        for n in 0..DEAD_MAX {
            ids.take("refused", "d").expect("taken");
            ids.give_back("refused").expect("given back");
            if n % 100 == 0 {
                other.take(&format!("other-{n}"), "d").expect("taken");
            }
        }
        assert!(std::fs::metadata(&path).expect("there").len() < 20_000);
        let again = Ids::open(&path).expect("opened");
        for name in ["kept", "other-0", "other-100", "other-200"] {
            assert_eq!(again.digest(name), Some("d"), "{name}");
        }
        assert_eq!(again.digest("refused"), None);
    }
}
