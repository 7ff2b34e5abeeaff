//! Last bytes of an output, addressed by their offset in the whole output. They are in memory while
//! they are few, and in an unlinked file once they are many. Bytes in files count against a
//! [`Budget`].

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use nix::fcntl::{FallocateFlags, fallocate};
use tokio::sync::Notify;

/// Most bytes kept. More than can be in transit between the ring and its reader.
pub(super) const KEPT: u64 = 4 * 1024 * 1024;
/// Most bytes kept in memory; most commands write less.
const IN_MEMORY: usize = 16 * 1024;

/// Bytes in files that all rings of a shim use, and may use.
#[derive(Debug)]
pub(super) struct Budget {
    used: AtomicU64,
    limit: AtomicU64,
    over: Notify,
}

impl Budget {
    pub(super) fn new(limit: u64) -> Arc<Self> {
        let (used, limit) = (AtomicU64::new(0), AtomicU64::new(limit));
        Arc::new(Self { used, limit, over: Notify::new() })
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    pub(super) fn set_limit(&self, limit: u64) {
        self.limit.store(limit, Ordering::Relaxed);
        self.tell();
    }

    /// Waits until more bytes are used than allowed: a ring never waits for space, so another task
    /// must free some.
    pub(super) async fn over(&self) {
        self.over.notified().await;
    }

    fn take(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
        self.tell();
    }

    fn give(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    fn tell(&self) {
        if self.used() > self.limit() {
            self.over.notify_one();
        }
    }
}

#[derive(Debug)]
enum Store {
    /// Bytes from the ring's start on.
    Memory(Vec<u8>),
    /// Each byte at its offset modulo [`KEPT`].
    File(File),
}

#[derive(Debug)]
pub(super) struct Ring {
    store: Store,
    start: u64,
    end: u64,
    budget: Arc<Budget>,
}

impl Ring {
    pub(super) fn new(budget: Arc<Budget>) -> Self {
        Self { store: Store::Memory(Vec::new()), start: 0, end: 0, budget }
    }

    /// Returns the offset of the end: how many bytes were ever written.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Returns the offset of the first byte that is kept.
    pub(super) fn start(&self) -> u64 {
        self.start
    }

    /// Returns how many bytes of the budget this ring uses.
    pub(super) fn in_file(&self) -> u64 {
        match self.store {
            Store::Memory(_) => 0,
            Store::File(_) => self.end - self.start,
        }
    }

    /// Appends bytes, at most [`KEPT`]; the oldest are dropped for them. `dir` is where the file is
    /// created.
    pub(super) fn write(&mut self, bytes: &[u8], dir: &Path) -> io::Result<()> {
        let before = self.in_file();
        if let Store::Memory(kept) = &mut self.store {
            if kept.len() + bytes.len() <= IN_MEMORY {
                kept.extend_from_slice(bytes);
                self.end += bytes.len() as u64;
                return Ok(());
            }
            let file = nameless(dir)?;
            write_at(&file, self.start, kept)?;
            self.store = Store::File(file);
        }
        let Store::File(file) = &self.store else { return Ok(()) };
        write_at(file, self.end, bytes)?;
        self.end += bytes.len() as u64;
        self.start = self.start.max(self.end.saturating_sub(KEPT));
        self.budget.take(self.in_file() - before);
        Ok(())
    }

    /// Reads up to `max` bytes from an offset on, which must still be kept.
    pub(super) fn read(&self, from: u64, max: u64) -> io::Result<Bytes> {
        let from = from.max(self.start);
        let length = self.end.saturating_sub(from).min(max);
        let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
        match &self.store {
            Store::Memory(kept) => {
                let from = usize::try_from(from - self.start).unwrap_or(usize::MAX);
                let length = bytes.len();
                bytes.copy_from_slice(&kept[from..from + length]);
            }
            Store::File(file) => {
                for (at, part) in pieces(from, length) {
                    let from = usize::try_from(part.start).unwrap_or_default();
                    let to = usize::try_from(part.end).unwrap_or_default();
                    file.read_exact_at(&mut bytes[from..to], at)?;
                }
            }
        }
        Ok(bytes.into())
    }

    /// Drops all bytes in the file except the last `keep`, and the file if `keep` is 0.
    pub(super) fn trim(&mut self, keep: u64) {
        let before = self.in_file();
        let Store::File(file) = &self.store else { return };
        let start = self.start.max(self.end.saturating_sub(keep));
        if start == self.end {
            self.store = Store::Memory(Vec::new());
        } else {
            for (at, part) in pieces(self.start, start - self.start) {
                let flags =
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let offset = |at: u64| i64::try_from(at).unwrap_or(i64::MAX);
                let (at, length) = (offset(at), offset(part.end - part.start));
                // Where the file system does not support it, the bytes are overwritten later.
                if let Err(error) = fallocate(file, flags, at, length) {
                    tracing::debug!(%error, "disk space of old output could not be freed");
                }
            }
        }
        self.start = start;
        self.budget.give(before - self.in_file());
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.budget.give(self.in_file());
    }
}

fn write_at(file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    for (at, part) in pieces(offset, bytes.len() as u64) {
        let from = usize::try_from(part.start).unwrap_or_default();
        let to = usize::try_from(part.end).unwrap_or_default();
        file.write_all_at(&bytes[from..to], at)?;
    }
    Ok(())
}

/// Maps `length` bytes from an offset on to the file: at most two pieces.
fn pieces(offset: u64, length: u64) -> impl Iterator<Item = (u64, std::ops::Range<u64>)> {
    let at = offset % KEPT;
    let first = length.min(KEPT - at);
    [(at, 0..first), (0, first..length)].into_iter().filter(|(_, part)| !part.is_empty())
}

/// Creates an unlinked file, which disappears with this process, however it ends. Not every file
/// system has O_TMPFILE.
fn nameless(dir: &Path) -> io::Result<File> {
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    let path = dir.join(format!("{}-{serial}.output", std::process::id()));
    let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    std::fs::remove_file(path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn ring_returns_the_bytes_that_were_written(
            steps in prop::collection::vec((0usize..700_000, prop::option::of(0u64..2_000_000)), 1..24),
            asked in prop::collection::vec(any::<(u64, u32)>(), 8),
        ) {
            let dir = tempfile::tempdir().expect("tempdir");
            let budget = Budget::new(u64::MAX);
            let (mut ring, mut all) = (Ring::new(Arc::clone(&budget)), Vec::new());
            for (size, trim) in steps {
                let bytes: Vec<u8> = (all.len()..all.len() + size).map(|n| (n % 251) as u8).collect();
                ring.write(&bytes, dir.path()).expect("written");
                all.extend(bytes);
                if let Some(keep) = trim {
                    ring.trim(keep);
                    prop_assert!(ring.in_file() <= keep);
                }
                prop_assert_eq!(ring.end(), all.len() as u64);
                prop_assert!(ring.end() - ring.start() <= KEPT);
                prop_assert_eq!(budget.used(), ring.in_file());
            }
            for (from, max) in asked {
                let from = ring.start() + from % (ring.end() - ring.start() + 1);
                let read = ring.read(from, u64::from(max)).expect("read");
                let end = (from + u64::from(max)).min(ring.end());
                prop_assert!(read == all[from as usize..end as usize]);
            }
            drop(ring);
            prop_assert_eq!(budget.used(), 0);
        }
    }

    #[test]
    fn trimmed_bytes_free_their_disk_space() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().expect("tempdir");
        let mut ring = Ring::new(Budget::new(u64::MAX));
        // Beyond the ring's size, so that the file wraps around.
        for _ in 0..5 {
            ring.write(&vec![1; 1024 * 1024], dir.path()).expect("written");
        }
        let on_disk = |ring: &Ring| match &ring.store {
            Store::File(file) => file.metadata().expect("there").blocks() * 512,
            Store::Memory(_) => 0,
        };
        assert!(on_disk(&ring) >= KEPT);
        ring.trim(100_000);
        assert!(on_disk(&ring) <= 200_000, "{}", on_disk(&ring));
        ring.trim(0);
        assert_eq!((on_disk(&ring), ring.start()), (0, 5 * 1024 * 1024));
    }
}
