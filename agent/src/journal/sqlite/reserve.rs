//! Reserved space for writes that must succeed on a full disk: a deletion is recorded before it is
//! done. A file holds the space; it is removed when the disk is nearly full, and created again when
//! there is space.

use std::path::{Path, PathBuf};

use nix::{fcntl::posix_fallocate, sys::statvfs::statvfs};

use super::connection::private;
use crate::journal::{Error, Result};

/// Size of the file, bytes: enough for thousands of records and their write-ahead log.
const HELD: i64 = 8 << 20;
/// Free bytes below which the file is removed. A transaction of a whole batch is smaller.
const LOW: u64 = 2 << 20;
/// Free bytes from which the file is created again.
const ENOUGH: u64 = 8 * LOW;

/// Reserve file and its state.
#[derive(Debug)]
pub(super) struct Reserve {
    file: PathBuf,
    held: bool,
}

impl Reserve {
    /// Creates the reserve beside this journal, or keeps an existing one.
    pub(super) fn beside(journal: &Path) -> Self {
        let mut name = journal.as_os_str().to_owned();
        name.push(".reserve");
        let file = PathBuf::from(name);
        let held = file.exists();
        let mut reserve = Self { file, held };
        reserve.tend();
        reserve
    }

    /// Checks the free space, and removes or creates the file accordingly.
    pub(super) fn tend(&mut self) {
        let Some(free) = self.file.parent().and_then(free) else { return };
        if self.held && free < LOW {
            tracing::error!(free, "the journal's disk is full: only what frees room is recorded");
            drop(std::fs::remove_file(&self.file));
            self.held = false;
        } else if !self.held && free >= ENOUGH {
            match self.hold() {
                Ok(()) => self.held = true,
                Err(error) => {
                    tracing::warn!(%error, "could not reserve space on the journal's disk");
                    drop(std::fs::remove_file(&self.file));
                }
            }
        }
    }

    fn hold(&self) -> Result<()> {
        let file = private(&self.file)?;
        let full = |error: nix::Error| Error::Storage(error.to_string());
        posix_fallocate(&file, 0, HELD).map_err(full)?;
        Ok(())
    }

    /// True while there is space for new work; false while it is kept for ends.
    pub(super) fn held(&self) -> bool {
        self.held
    }
}

/// Bytes that this process may still write in `dir`.
fn free(dir: &Path) -> Option<u64> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    let found = statvfs(dir).ok()?;
    Some(found.blocks_available().saturating_mul(found.fragment_size()))
}
