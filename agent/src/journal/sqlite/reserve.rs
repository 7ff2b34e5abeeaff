//! Room on the journal's disk for what must be possible when it is full: a deletion has to be
//! written down before it is done. A file holds the room; it is given up when the disk is nearly full,
//! and taken again when there is some.

use std::path::{Path, PathBuf};

use nix::{fcntl::posix_fallocate, sys::statvfs::statvfs};

use super::connection::private;
use crate::journal::Error;

/// What the file holds, bytes: thousands of records, and the write-ahead log of them.
const HELD: i64 = 8 << 20;
/// With less than this free the file goes. A transaction of a whole batch is smaller.
const LOW: u64 = 2 << 20;
/// With this much free the file is made again.
const ENOUGH: u64 = 8 * LOW;

/// The room.
#[derive(Debug)]
pub(super) struct Reserve {
    file: PathBuf,
    held: bool,
}

impl Reserve {
    /// Beside this journal. What is there already is kept.
    pub(super) fn beside(journal: &Path) -> Self {
        let mut name = journal.as_os_str().to_owned();
        name.push(".reserve");
        let file = PathBuf::from(name);
        let held = file.exists();
        let mut reserve = Self { file, held };
        reserve.tend();
        reserve
    }

    /// Looks at the disk, and gives the room up or takes it again.
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
                    tracing::warn!(%error, "no room could be kept on the journal's disk");
                    drop(std::fs::remove_file(&self.file));
                }
            }
        }
    }

    fn hold(&self) -> Result<(), Error> {
        let file = private(&self.file)?;
        let full = |error: nix::Error| Error::Storage(error.to_string());
        posix_fallocate(&file, 0, HELD).map_err(full)?;
        Ok(())
    }

    /// True while there is room for new work, and not only for ends.
    pub(super) fn held(&self) -> bool {
        self.held
    }
}

/// Bytes that we may still write there.
fn free(dir: &Path) -> Option<u64> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    let found = statvfs(dir).ok()?;
    Some(found.blocks_available().saturating_mul(found.fragment_size()))
}
