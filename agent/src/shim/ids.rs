//! Exec_ids under which commands were run, for the whole life of a sandbox: a command with an
//! exec_id from its caller is run once. An exec_id is on the disk before its command is started,
//! and is freed there when it is certain that nothing was run.
//!
//! The file has one line for each exec_id, `digest exec_id`; a later line `- exec_id` frees it. A
//! version that does not know the second form treats a freed exec_id as used by another command,
//! and runs nothing.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use daemon::replace::{Access, replace};

use crate::sys::read;

/// Most exec_ids that a sandbox may use.
const MAX: usize = 100_000;
/// Largest file, in bytes: twice the size with [`MAX`] exec_ids. A line is a digest of 64
/// characters and an exec_id of 64.
const BYTES_MAX: u64 = 32 * 1024 * 1024;
/// Most dead lines, beyond which the file is rewritten.
const DEAD_MAX: usize = 256;
/// Placeholder for the digest in a line that frees an exec_id.
const GIVEN_BACK: &str = "-";

#[derive(Debug)]
pub(super) struct Ids {
    path: PathBuf,
    file: File,
    /// Bytes of the file that `digests` knows.
    known: u64,
    digests: HashMap<String, String>,
    /// Lines of the file without effect: those that free an exec_id, and those that were freed.
    dead: usize,
}

impl Ids {
    /// Opens the file and reads the exec_ids in it.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).append(true).create(true).open(path)?;
        let bytes = read::whole(path, BYTES_MAX)?;
        // A line that a crash truncated or garbled names no command that was ever started.
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
        Ok(Self { path: path.to_owned(), file, known: bytes.len() as u64, digests, dead })
    }

    /// Returns the digest of the command that used this exec_id.
    pub(super) fn digest(&self, id: &str) -> Option<&str> {
        self.digests.get(id).map(String::as_str)
    }

    /// Returns true when no further exec_id can be used.
    pub(super) fn full(&self) -> bool {
        self.digests.len() >= MAX
    }

    /// Records an exec_id as used, durably.
    ///
    /// # Errors
    /// When the disk write fails. The exec_id is then free.
    pub(super) fn take(&mut self, id: &str, digest: &str) -> io::Result<()> {
        let _lock = self.lock()?;
        if self.digests.contains_key(id) {
            let why = "another shim of this sandbox has taken it meanwhile";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, why));
        }
        if let Err(error) = self.append(digest, id) {
            // Part of the line may be on the disk. If this write fails too, the disk accepts
            // nothing.
            self.append(GIVEN_BACK, id).ok();
            return Err(error);
        }
        self.digests.insert(id.to_owned(), digest.to_owned());
        Ok(())
    }

    /// Frees an exec_id whose command was certainly not run, durably.
    ///
    /// # Errors
    /// When the disk write fails: this shim knows that the exec_id is free, the next one will not.
    pub(super) fn release(&mut self, id: &str) -> io::Result<()> {
        let lock = self.lock();
        // After the lock, which may have read the file again.
        self.digests.remove(id);
        let _lock = lock?;
        self.append(GIVEN_BACK, id)?;
        self.dead += 2;
        if self.dead > DEAD_MAX { self.write_anew() } else { Ok(()) }
    }

    fn append(&mut self, digest: &str, id: &str) -> io::Result<()> {
        // The leading line end terminates a line that a crash cut short.
        let line = format!("\n{digest} {id}\n");
        self.file.write_all(line.as_bytes())?;
        self.known += line.len() as u64;
        self.file.sync_data()
    }

    /// Locks the file against other writers while the guard lives. A shim that is about to exit may
    /// still write beside its successor; what the other has written meanwhile is read.
    fn lock(&mut self) -> io::Result<File> {
        let lock = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(self.path.with_extension("ids-lock"))?;
        lock.lock()?;
        let current = std::fs::metadata(&self.path)?;
        if current.ino() != self.file.metadata()?.ino() || current.len() != self.known {
            *self = Self::open(&self.path)?;
        }
        Ok(lock)
    }

    fn write_anew(&mut self) -> io::Result<()> {
        // The content of the file counts, not what this process remembers.
        let known = Self::open(&self.path)?;
        let lines = known.digests.iter().map(|(id, digest)| format!("{digest} {id}\n"));
        replace(&self.path, lines.collect::<String>().as_bytes(), Access::PRIVATE)?;
        *self = Self::open(&self.path)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exec_ids_survive_a_reopen_and_a_torn_write() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("ids");
        let mut ids = Ids::open(&path).expect("opened");
        ids.take("build-1", "d1").expect("taken");
        ids.take("build-2", "d2").expect("taken");
        assert_eq!(ids.digest("build-1"), Some("d1"));
        // A crash in the middle of a third write.
        let mut torn = File::options().append(true).open(&path).expect("opened");
        torn.write_all(b"\n\xff\0d3bui").expect("written");
        let mut again = Ids::open(&path).expect("opened");
        again.take("build-4", "d4").expect("taken");
        let again = Ids::open(&path).expect("opened");
        assert_eq!(again.digest("build-4"), Some("d4"));
        assert_eq!((again.digest("build-2"), again.digest("build-3")), (Some("d2"), None));
    }

    #[test]
    fn freed_exec_id_stays_free_after_a_reopen() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("ids");
        let mut ids = Ids::open(&path).expect("opened");
        ids.take("a", "d1").expect("taken");
        ids.take("b", "d2").expect("taken");
        ids.release("a").expect("released");
        assert_eq!((ids.digest("a"), ids.digest("b")), (None, Some("d2")));
        let mut again = Ids::open(&path).expect("opened");
        assert_eq!((again.digest("a"), again.digest("b")), (None, Some("d2")));
        again.take("a", "d3").expect("taken");
        assert_eq!(Ids::open(&path).expect("opened").digest("a"), Some("d3"));
    }

    #[test]
    fn exec_id_taken_by_another_shim_cannot_be_taken() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("ids");
        let mut leaving = Ids::open(&path).expect("opened");
        let mut next = Ids::open(&path).expect("opened");
        leaving.take("build", "d1").expect("taken");
        let error = next.take("build", "d1").expect_err("it may run already");
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(next.digest("build"), Some("d1"));
        leaving.release("build").expect("released");
        next.take("build", "d2").expect("free again");
    }

    #[test]
    fn endless_refusals_neither_fill_the_disk_nor_lose_an_exec_id() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("ids");
        let mut ids = Ids::open(&path).expect("opened");
        // A shim that is about to exit and still records exec_ids.
        let mut other = Ids::open(&path).expect("opened");
        ids.take("kept", "d").expect("taken");
        for n in 0..DEAD_MAX {
            ids.take("refused", "d").expect("taken");
            ids.release("refused").expect("released");
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
