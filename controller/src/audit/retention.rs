//! Segments of the audit log, and which of them are removed. Pure.

use std::path::{Path, PathBuf};

use super::Options;

/// File of consecutive lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    /// Number of its first line.
    pub(super) first: u64,
    /// Time of its first line, milliseconds since 1970; 0 without one.
    pub(super) first_ms: u64,
    /// Time of its last line.
    pub(super) last_ms: u64,
    /// Synced bytes.
    pub(super) bytes: u64,
}

impl Segment {
    /// Creates one that begins with this line.
    pub(super) fn empty(first: u64) -> Self {
        Self { first, first_ms: 0, last_ms: 0, bytes: 0 }
    }

    /// Returns the name of its file.
    pub(super) fn name(&self) -> String {
        format!("audit-{:020}.jsonl", self.first)
    }

    /// Returns the path of its file.
    pub(super) fn path(&self, dir: &Path) -> PathBuf {
        dir.join(self.name())
    }
}

/// Returns how many of the oldest segments are removed. The last one is written to and stays.
pub(super) fn expired(segments: &[Segment], now_ms: u64, options: &Options) -> usize {
    let Some((_current, ended)) = segments.split_last() else { return 0 };
    let keep_ms = daemon::clock::millis(options.keep);
    let old = |segment: &Segment| segment.last_ms.saturating_add(keep_ms) < now_ms;
    let by_age = ended.iter().take_while(|segment| old(segment)).count();
    let mut bytes: u64 = segments.iter().map(|segment| segment.bytes).sum();
    let mut by_size = 0;
    for segment in ended {
        if bytes <= options.bytes_max {
            break;
        }
        bytes -= segment.bytes;
        by_size += 1;
    }
    by_age.max(by_size)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn segment(last_ms: u64, bytes: u64) -> Segment {
        Segment { first: 1, first_ms: 0, last_ms, bytes }
    }

    fn options(keep_ms: u64, bytes_max: u64) -> Options {
        Options { keep: Duration::from_millis(keep_ms), bytes_max, ..Options::default() }
    }

    #[test]
    fn old_segments_go_and_then_the_oldest_of_too_many() {
        let segments = [segment(10, 5), segment(20, 5), segment(30, 5), segment(40, 5)];
        assert_eq!(expired(&segments, 50, &options(100, 100)), 0);
        assert_eq!(expired(&segments, 125, &options(100, 100)), 2);
        assert_eq!(expired(&segments, 999, &options(100, 100)), 3, "the last one stays");
        assert_eq!(expired(&segments, 50, &options(100, 11)), 2);
        assert_eq!(expired(&segments, 50, &options(100, 0)), 3, "the last one stays");
        assert_eq!(expired(&[], 50, &options(0, 0)), 0);
    }

    proptest! {
        #[test]
        fn young_entries_within_the_size_are_never_removed(
            ages in prop::collection::vec(0_u64..200, 0..20),
            bytes_max in 0_u64..100,
        ) {
            let mut ages = ages;
            ages.sort_unstable();
            let segments: Vec<_> = ages.iter().map(|age| segment(*age, 7)).collect();
            let removed = expired(&segments, 200, &options(100, bytes_max));
            prop_assert!(removed < segments.len().max(1));
            if let Some(last) = removed.checked_sub(1) {
                let bytes: u64 = segments[last..].iter().map(|segment| segment.bytes).sum();
                prop_assert!(segments[last].last_ms < 100 || bytes > bytes_max);
            }
        }
    }
}
