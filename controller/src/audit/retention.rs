//! Segments of the audit log, and which of them are removed. Pure.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use super::Options;
use crate::clock::{Ages, Now};

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

/// Size beyond which also young entries go, in sizes of the log.
const FAR: u64 = 2;
/// How far the wall clock may get ahead of what has passed: a machine may be suspended.
const SLACK: Duration = Duration::from_hours(24);
/// Time between two entries from before the start that makes the clock doubtful: longer than a segment of a quiet controller.
const JUMP: Duration = Duration::from_hours(3 * 24);

/// Begins to judge the clock of a log that was opened. A segment of a quiet controller lasts for a day and until the next
/// entry.
pub(super) fn ages(segments: &[Segment], now: Now) -> Ages {
    let written = segments.iter().rev().filter(|segment| segment.bytes > 0);
    Ages::new(written.flat_map(|segment| [segment.last_ms, segment.first_ms]), now, SLACK, JUMP)
}

/// Returns how many of the oldest segments are too old.
pub(super) fn by_age(segments: &[Segment], now_ms: u64, options: &Options) -> usize {
    older(segments, now_ms, options.keep)
}

/// Returns how many of the oldest segments have the least age, and so may go for their size.
pub(super) fn ripe(segments: &[Segment], now_ms: u64, options: &Options) -> usize {
    older(segments, now_ms, options.least)
}

/// Returns how many of the oldest segments are older than this. One with a time in the future is as old as the next one
/// that has a time which can be true. The last one is written to, and is never old.
fn older(segments: &[Segment], now_ms: u64, age: Duration) -> usize {
    let Some((_current, ended)) = segments.split_last() else { return 0 };
    let keep_ms = daemon::clock::millis(age);
    let is_young = |segment: &Segment| {
        segment.last_ms <= now_ms && segment.last_ms.saturating_add(keep_ms) >= now_ms
    };
    let not_young = ended.iter().take_while(|segment| !is_young(segment)).count();
    let is_old = |segment: &Segment| segment.last_ms <= now_ms;
    ended[..not_young].iter().rposition(is_old).map_or(0, |last| last + 1)
}

/// Returns how many of the oldest segments are too many by their size, when the first `ripe` ones may go for it. The
/// others go only when the log is far too large, because no disk is endless. The last one is written to and stays.
pub(super) fn by_size(segments: &[Segment], ripe: usize, options: &Options) -> usize {
    let Some((_current, ended)) = segments.split_last() else { return 0 };
    let mut bytes: u64 = segments.iter().map(|segment| segment.bytes).sum();
    let far_too_large = options.bytes_max.saturating_mul(FAR);
    let mut many = 0;
    for (at, segment) in ended.iter().enumerate() {
        let max = if at < ripe { options.bytes_max } else { far_too_large };
        if bytes <= max {
            break;
        }
        bytes -= segment.bytes;
        many += 1;
    }
    many
}

/// Returns the bytes of the segments that may not go for their size.
pub(super) fn young_bytes(segments: &[Segment], ripe: usize) -> u64 {
    segments.iter().skip(ripe).map(|segment| segment.bytes).sum()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const DAY_MS: u64 = 24 * 3600 * 1000;

    fn segment(last_ms: u64, bytes: u64) -> Segment {
        Segment { first: 1, first_ms: last_ms, last_ms, bytes }
    }

    fn expired(segments: &[Segment], now_ms: u64, options: &Options) -> usize {
        let ripe = ripe(segments, now_ms, options);
        by_age(segments, now_ms, options).max(by_size(segments, ripe, options))
    }

    /// Options with a least age of one millisecond.
    fn options(keep_ms: u64, bytes_max: u64) -> Options {
        let (keep, least) = (Duration::from_millis(keep_ms), Duration::from_millis(1));
        Options { keep, least, bytes_max, ..Options::default() }
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

    #[test]
    fn segment_of_the_future_keeps_nothing_behind_it_and_is_kept_itself() {
        let options = options(100, u64::MAX);
        let future = 10_000;
        let of = |times: &[u64]| {
            let segments: Vec<_> = times.iter().map(|time| segment(*time, 5)).collect();
            by_age(&segments, 1000, &options)
        };
        assert_eq!(of(&[10, future, 20, 30, 990, 1000]), 4);
        assert_eq!(of(&[10, future, 990, 1000]), 1, "it may be as young as the next one");
        assert_eq!(of(&[future, future, 1000]), 0);
        assert_eq!(of(&[10, 990, 20, 1000]), 1, "what is young stays, and all after it");
    }

    #[test]
    fn young_entries_go_only_when_the_log_is_far_too_large() {
        let segments = [segment(10, 5), segment(20, 5), segment(30, 5), segment(40, 5)];
        let of = |bytes_max, least_ms| {
            let least = Duration::from_millis(least_ms);
            expired(&segments, 50, &Options { least, ..options(1000, bytes_max) })
        };
        assert_eq!((of(10, 25), of(5, 25)), (2, 2), "the third is too young");
        assert_eq!(of(4, 25), 3, "and goes where there are more than twice as many bytes");
        assert_eq!(of(10, 35), 1);
        assert_eq!((of(10, 1000), of(9, 1000), of(4, 1000)), (0, 1, 3));
        assert_eq!(of(0, 1000), 3, "the last one stays");
        let least = Duration::from_millis(25);
        let ripe = ripe(&segments, 50, &Options { least, ..options(9, 9) });
        assert_eq!((ripe, young_bytes(&segments, ripe)), (2, 10));
    }

    /// Judges times of the wall clock, in days, a day apart each.
    fn judged(first: &[Segment], days: &[u64]) -> Vec<bool> {
        let now = |(run, wall): (usize, &u64)| Now {
            wall_ms: wall * DAY_MS,
            run_ms: run as u64 * DAY_MS,
        };
        let mut ages = ages(first, now((0, &days[0])));
        days.iter().enumerate().map(now).map(|now| ages.are_true(now)).collect()
    }

    #[test]
    fn clock_that_steps_ahead_counts_after_a_week_or_once_it_is_back() {
        let at = |day: u64| segment(day * DAY_MS, 5);
        assert_eq!(judged(&[at(100)], &[100, 101, 102]), [true; 3]);
        // A day of suspend passes for a day that has passed.
        assert_eq!(judged(&[at(100)], &[100, 102, 103]), [true; 3]);
        let step = [100, 501, 502, 503, 504, 505, 506, 507, 508, 509];
        let mut expected = [false; 10];
        (expected[0], expected[8], expected[9]) = (true, true, true);
        assert_eq!(judged(&[at(100)], &step), expected);
        assert_eq!(judged(&[at(100)], &[100, 501, 102, 103]), [true, false, true, true]);
        assert_eq!(judged(&[at(100)], &[100, 1, 2]), [true; 3], "a step back makes nothing old");
    }

    #[test]
    fn clock_that_is_ahead_of_the_log_at_the_start_is_doubted() {
        let at = |day: u64| segment(day * DAY_MS, 5);
        assert_eq!(judged(&[], &[100]), [true], "no log: nothing is removed");
        assert_eq!(judged(&[at(98), at(100)], &[101]), [true]);
        assert_eq!(
            judged(&[at(90), at(100)], &[101]),
            [false],
            "nothing tells a quiet week from a step"
        );
        assert_eq!(judged(&[at(100)], &[501, 502]), [false, false]);
        assert_eq!(judged(&[at(100)], &[501, 102]), [false, true], "set right by NTP");
        // It was ahead already before the restart, and has written so.
        let stepped = [at(100), at(501), at(501)];
        assert_eq!(judged(&stepped, &[501, 502]), [false, false]);
        assert_eq!(judged(&stepped, &[102, 103]), [true; 2], "set right before a restart");
        // A week of entries since: it was the earlier clock that was wrong.
        let confirmed: Vec<_> = [100].into_iter().chain(501..=508).map(at).collect();
        assert_eq!(judged(&confirmed, &[508]), [true]);
        let jump_in_one = Segment { first_ms: 100 * DAY_MS, ..at(501) };
        assert_eq!(judged(&[jump_in_one], &[501]), [false]);
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
            let options = Options { least: Duration::from_millis(50), ..options(100, bytes_max) };
            let removed = expired(&segments, 200, &options);
            prop_assert!(removed < segments.len().max(1));
            if let Some(last) = removed.checked_sub(1) {
                let bytes: u64 = segments[last..].iter().map(|segment| segment.bytes).sum();
                let too_large = bytes > bytes_max && segments[last].last_ms < 150;
                let far_too_large = bytes > 2 * bytes_max;
                prop_assert!(segments[last].last_ms < 100 || too_large || far_too_large);
            }
            let left: u64 = segments[removed..].iter().map(|segment| segment.bytes).sum();
            prop_assert!(left <= 2 * bytes_max || segments.len() - removed <= 1, "the disk is bounded");
        }
    }
}
