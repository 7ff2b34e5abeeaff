//! Decides whether a sandbox does something that nobody reports: it moves bytes on TCP connections,
//! or uses CPU time. Pure.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

use crate::journal::Lifetime;

/// Longest time between two readings that are compared: rates are those of a minute.
const WINDOW: Duration = Duration::from_secs(60);
/// Shortest time between two readings: each costs two questions to the kernel.
const SHORTEST: Duration = Duration::from_secs(5);

/// Time between two readings of a sandbox with these rules.
pub(super) fn window(life: &Lifetime) -> Duration {
    (Duration::from_millis(life.idle_ms) / 2).clamp(SHORTEST, WINDOW)
}

/// State of a sandbox's counters at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Reading {
    /// Moment of the reading.
    pub(super) at: Instant,
    /// Bytes moved so far, by connection; `None` when that is unknown.
    pub(super) connections: Option<BTreeMap<u64, u64>>,
    /// CPU time used so far, microseconds; `None` when it is not looked at, or unknown.
    pub(super) cpu_us: Option<u64>,
}

/// Bounds beyond which a sandbox is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Thresholds {
    /// Bytes that a connection may move and still be silent; 0: an open connection is a use.
    pub(super) silent_bytes: u64,
    /// CPU use beyond which the sandbox is in use, percent of one core; 0: none.
    pub(super) cpu_percent: u32,
}

/// Sign that a sandbox is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sign {
    /// A connection moved bytes, or is open where that is enough.
    Connection,
    /// A connection may be open, and what it moves is unknown.
    Unknown,
    /// The sandbox used CPU time.
    Cpu,
}

/// Looks for a sign that the sandbox was in use between two readings; `before` is `None` at the first.
pub(super) fn sign(before: Option<&Reading>, now: &Reading, rules: Thresholds) -> Option<Sign> {
    let Some(connections) = &now.connections else { return Some(Sign::Unknown) };
    if rules.silent_bytes == 0 && !connections.is_empty() {
        return Some(Sign::Connection);
    }
    // Not read, for want of a place: it may be at work.
    if rules.cpu_percent > 0 && now.cpu_us.is_none() {
        return Some(Sign::Unknown);
    }
    let before = before?;
    // A connection that was not there before has moved all of its bytes since.
    let known = before.connections.as_ref();
    let loud = connections.iter().any(|(id, bytes)| {
        let moved_before = known.and_then(|known| known.get(id)).copied().unwrap_or(0);
        bytes.saturating_sub(moved_before) > rules.silent_bytes
    });
    if loud {
        return Some(Sign::Connection);
    }
    let used = now.cpu_us?.checked_sub(before.cpu_us?)?;
    let elapsed = now.at.duration_since(before.at).as_micros();
    let allowed = elapsed * u128::from(rules.cpu_percent) / 100;
    (rules.cpu_percent > 0 && elapsed > 0 && u128::from(used) > allowed).then_some(Sign::Cpu)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULES: Thresholds = Thresholds { silent_bytes: 1024, cpu_percent: 20 };

    fn reading(begun: Instant, at_s: u64, connections: &[(u64, u64)], cpu_ms: u64) -> Reading {
        Reading {
            at: begun + Duration::from_secs(at_s),
            connections: Some(connections.iter().copied().collect()),
            cpu_us: Some(cpu_ms * 1000),
        }
    }

    #[tokio::test]
    async fn signs_match_the_table() {
        let begun = Instant::now();
        let of = |before: &[(u64, u64)], now: &[(u64, u64)], cpu_ms: u64| {
            let before = reading(begun, 0, before, 1000);
            sign(Some(&before), &reading(begun, 60, now, 1000 + cpu_ms), RULES)
        };
        for (before, now, cpu_ms, expected, why) in [
            (&[][..], &[][..], 0, None, "nothing"),
            (&[(1, 5000)], &[(1, 5000)], 0, None, "open, and nothing moves"),
            (&[(1, 5000)], &[(1, 6024)], 0, None, "pings alone"),
            (&[(1, 5000)], &[(1, 6025)], 0, Some(Sign::Connection), "one byte more"),
            (&[(1, 0), (2, 0)], &[(1, 600), (2, 600)], 0, None, "each is silent by itself"),
            (&[], &[(7, 1024)], 0, None, "a new one that said little"),
            (&[], &[(7, 1025)], 0, Some(Sign::Connection), "a new one"),
            (&[(1, 9000)], &[(2, 100)], 0, None, "another with another count"),
            (&[(1, 9000)], &[], 0, None, "it has ended"),
            (&[], &[], 12_000, None, "a fifth of a core"),
            (&[], &[], 12_001, Some(Sign::Cpu), "more than a fifth"),
        ] {
            assert_eq!(of(before, now, cpu_ms), expected, "{why}");
        }
    }

    #[tokio::test]
    async fn first_reading_and_unknown_counters_are_told_apart() {
        let begun = Instant::now();
        let first = reading(begun, 0, &[(1, 99_999)], 99_999);
        assert_eq!(sign(None, &first, RULES), None, "nothing to compare with");
        let unknown = Reading { connections: None, ..first.clone() };
        assert_eq!(sign(None, &unknown, RULES), Some(Sign::Unknown));
        let no_cpu = Reading { cpu_us: None, ..reading(begun, 60, &[], 0) };
        assert_eq!(sign(Some(&first), &no_cpu, RULES), Some(Sign::Unknown), "it may be at work");
        let rebooted = reading(begun, 60, &[], 1);
        assert_eq!(sign(Some(&first), &rebooted, RULES), None, "its counter began anew");
        let off = Thresholds { cpu_percent: 0, ..RULES };
        let busy = reading(begun, 60, &[(1, 99_999)], 199_999);
        assert_eq!(sign(Some(&first), &busy, off), None, "it is not looked at");
        let any = Thresholds { silent_bytes: 0, ..RULES };
        assert_eq!(sign(None, &first, any), Some(Sign::Connection), "any open one counts");
    }

    #[test]
    fn window_is_half_the_idle_time_and_a_minute_at_most() {
        let of =
            |seconds: u64| window(&Lifetime { idle_ms: seconds * 1000, ..Lifetime::default() });
        assert_eq!(of(10), Duration::from_secs(5));
        assert_eq!(of(60), Duration::from_secs(30));
        assert_eq!(of(3600), WINDOW);
    }

    proptest! {
        /// More bytes and more CPU time never make a sandbox look less used.
        #[test]
        fn more_activity_never_hides_a_sign(
            before in 0u64..5000, moved in 0u64..5000, more in 0u64..5000, cpu in 0u64..60_000,
            seconds in 1u64..60,
        ) {
            let begun = Instant::now();
            let first = reading(begun, 0, &[(1, before)], 0);
            let now = |bytes| reading(begun, seconds, &[(1, before + bytes)], cpu);
            let (less, all) = (sign(Some(&first), &now(moved), RULES), sign(Some(&first), &now(moved + more), RULES));
            prop_assert!(less.is_none() || all.is_some());
        }
    }
}
