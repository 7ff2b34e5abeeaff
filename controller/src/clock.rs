//! Wall clock and randomness as traits, so that a simulation on paused time with a seed can be
//! repeated. Durations are measured with `tokio::time`; this clock only stamps records. Where a record is removed for
//! its age, `Ages` decides whether the wall clock can be believed.

use std::time::Duration;

/// Wall-clock time.
pub trait Clock: Send + Sync + std::fmt::Debug {
    /// Returns milliseconds since 1970.
    fn now_ms(&self) -> u64;
}

/// Randomness for ids and jitter. Secrets (keys, tokens) never come from here.
pub trait Random: Send + Sync + std::fmt::Debug {
    /// Fills `bytes`.
    fn fill(&self, bytes: &mut [u8]);
}

/// The wall clock of the machine.
#[derive(Debug)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the machine's clock")]
    fn now_ms(&self) -> u64 {
        daemon::clock::now_ms()
    }
}

/// The random generator of the operating system.
#[derive(Debug)]
pub struct SystemRandom;

impl Random for SystemRandom {
    fn fill(&self, bytes: &mut [u8]) {
        getrandom::fill(bytes).expect("the kernel gives random bytes");
    }
}

/// Time of a look: by the clock on the wall, and since some beginning, which no clock changes. Milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Time since 1970.
    pub wall_ms: u64,
    /// Time since the beginning.
    pub run_ms: u64,
}

const DAY_MS: u64 = 24 * 3600 * 1000;
/// Time after which a wall clock that went ahead, and was not set back, is right.
const CONFIRMED_MS: u64 = 7 * DAY_MS;

/// Decides whether ages by the wall clock are true. One that is wrong by more than a retention would have all records
/// removed, so one that went ahead counts only when it has stayed there for a week.
#[derive(Debug)]
pub struct Ages {
    /// Last time that was right.
    right: Now,
    /// Time since which the clock is ahead, since the beginning.
    ahead_since: Option<u64>,
    /// How far the wall clock may get ahead of what has passed.
    slack_ms: u64,
}

impl Ages {
    /// Begins to judge the clock. Before that, only the times of records tell how it went; they come newest first. `jump`:
    /// the time between two of them from which on the clock is doubtful, at most the shortest retention.
    pub fn new(
        records: impl IntoIterator<Item = u64>,
        now: Now,
        slack: Duration,
        jump: Duration,
    ) -> Self {
        let wall_ms = before_jump(records, now.wall_ms, daemon::clock::millis(jump));
        let slack_ms = daemon::clock::millis(slack);
        Self { right: Now { wall_ms, ..now }, ahead_since: None, slack_ms }
    }

    /// Returns true when the clock was not right at the last look.
    pub fn are_doubtful(&self) -> bool {
        self.ahead_since.is_some()
    }

    /// Returns the time by what has passed since the clock was right.
    pub fn expected_ms(&self, now: Now) -> u64 {
        self.right.wall_ms.saturating_add(now.run_ms.saturating_sub(self.right.run_ms))
    }

    /// Returns whether the clock is right now.
    pub fn are_true(&mut self, now: Now) -> bool {
        let is_ahead = now.wall_ms > self.expected_ms(now).saturating_add(self.slack_ms);
        let since = *self.ahead_since.get_or_insert(now.run_ms);
        let are_true = !is_ahead || now.run_ms.saturating_sub(since) >= CONFIRMED_MS;
        if are_true {
            (self.right, self.ahead_since) = (now, None);
        }
        are_true
    }
}

/// Returns the time before the newest jump ahead in these records, if that is less than a week ago; otherwise the present
/// one. Records with a time in the future tell nothing: the clock has been set back since.
fn before_jump(records: impl IntoIterator<Item = u64>, now_ms: u64, jump_ms: u64) -> u64 {
    let mut later = now_ms;
    for time in records.into_iter().filter(|time| *time <= now_ms) {
        if later.saturating_sub(time) > jump_ms {
            return time;
        }
        if now_ms.saturating_sub(time) >= CONFIRMED_MS {
            break;
        }
        later = time;
    }
    now_ms
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_may_get_ahead_by_the_slack_between_two_looks() {
        let hour = |hours: u64| hours * 3600 * 1000;
        let now = |wall: u64, run: u64| Now { wall_ms: hour(wall), run_ms: hour(run) };
        let mut ages =
            Ages::new([], now(1000, 0), Duration::from_hours(1), Duration::from_hours(72));
        assert!(ages.are_true(now(1002, 1)));
        assert!(!ages.are_doubtful() && !ages.are_true(now(1005, 2)) && ages.are_doubtful());
        assert_eq!(ages.expected_ms(now(1005, 2)), hour(1003));
        assert_eq!(ages.expected_ms(now(1006, 3)), hour(1004));
        assert!(ages.are_true(now(1004, 3)) && !ages.are_doubtful(), "it was set back");
        assert_eq!(ages.expected_ms(now(1004, 3)), hour(1004));
    }
}
