//! The last bytes of an output, by their offset in all of it. In memory while they are few, in a
//! file without a name once they are many.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;

/// Bytes that are kept. More than all that can be on its way between here and whoever reads it.
pub(super) const KEPT: u64 = 4 * 1024 * 1024;
/// Bytes that stay in memory; most commands say less.
const IN_MEMORY: usize = 16 * 1024;

#[derive(Debug)]
enum Store {
    Memory(Vec<u8>),
    File(File),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Ring {
    store: Store,
    end: u64,
}

impl Ring {
    pub(super) fn new() -> Self {
        Self { store: Store::Memory(Vec::new()), end: 0 }
    }

    /// Bytes that were ever written.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Offset of the first byte that is still here.
    pub(super) fn start(&self) -> u64 {
        self.end.saturating_sub(KEPT)
    }

    /// Adds bytes, at most [`KEPT`]; the oldest are let go for them. `dir` is where the file is made.
    pub(super) fn write(&mut self, bytes: &[u8], dir: &Path) -> io::Result<()> {
        if let Store::Memory(kept) = &mut self.store {
            if kept.len() + bytes.len() <= IN_MEMORY {
                kept.extend_from_slice(bytes);
                self.end += bytes.len() as u64;
                return Ok(());
            }
            let file = nameless(dir)?;
            file.write_all_at(kept, 0)?;
            self.store = Store::File(file);
        }
        let Store::File(file) = &self.store else { return Ok(()) };
        for (at, part) in pieces(self.end, bytes.len() as u64) {
            let from = usize::try_from(part.start).unwrap_or_default();
            let to = usize::try_from(part.end).unwrap_or_default();
            file.write_all_at(&bytes[from..to], at)?;
        }
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// Up to `max` bytes from this offset on, which must be one that is still here.
    pub(super) fn read(&self, from: u64, max: u64) -> io::Result<Bytes> {
        let from = from.max(self.start());
        let length = self.end.saturating_sub(from).min(max);
        let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
        match &self.store {
            Store::Memory(kept) => {
                let from = usize::try_from(from).unwrap_or(usize::MAX);
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
}

/// Where `length` bytes from an offset on stand in the file: at most two pieces.
fn pieces(offset: u64, length: u64) -> impl Iterator<Item = (u64, std::ops::Range<u64>)> {
    let at = offset % KEPT;
    let first = length.min(KEPT - at);
    [(at, 0..first), (0, first..length)].into_iter().filter(|(_, part)| !part.is_empty())
}

/// Without a name, so that it goes with us, however we go. Not every file system has O_TMPFILE.
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
        fn what_is_kept_is_what_was_written(
            sizes in prop::collection::vec(0usize..700_000, 1..24),
            asked in prop::collection::vec(any::<(u64, u32)>(), 8),
        ) {
            let dir = tempfile::tempdir().expect("tempdir");
            let (mut ring, mut all) = (Ring::new(), Vec::new());
            for size in sizes {
                let bytes: Vec<u8> = (all.len()..all.len() + size).map(|n| (n % 251) as u8).collect();
                ring.write(&bytes, dir.path()).expect("written");
                all.extend(bytes);
                prop_assert_eq!(ring.end(), all.len() as u64);
                prop_assert!(ring.end() - ring.start() <= KEPT);
            }
            for (from, max) in asked {
                let from = ring.start() + from % (ring.end() - ring.start() + 1);
                let read = ring.read(from, u64::from(max)).expect("read");
                let end = (from + u64::from(max)).min(ring.end());
                prop_assert!(read == all[from as usize..end as usize]);
            }
        }
    }
}
