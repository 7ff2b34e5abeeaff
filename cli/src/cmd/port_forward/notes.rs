//! Bound on the lines about connections that failed: programs in the sandbox can let any number fail.

use std::time::Duration;

use tokio::time::Instant;

/// Most lines in one period.
const LINES_MAX: u32 = 20;
/// Length of a period.
const PERIOD: Duration = Duration::from_secs(60);

/// Lines of the current period.
#[derive(Debug, Default)]
pub(super) struct Notes {
    began: Option<Instant>,
    lines: u32,
    omitted: u64,
}

impl Notes {
    /// Counts a failure. Returns how many were left out since the last line; `None`: this one is left out, too.
    pub(super) fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.began.is_none_or(|began| now.duration_since(began) >= PERIOD) {
            (self.began, self.lines) = (Some(now), 0);
        }
        if self.lines >= LINES_MAX {
            self.omitted = self.omitted.saturating_add(1);
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.omitted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_failures_of_a_minute_are_shown_and_the_rest_is_counted() {
        let (mut notes, now) = (Notes::default(), Instant::now());
        let shown = (0..1000).filter(|_| notes.admit(now).is_some()).count();
        assert_eq!(shown, 20);
        assert_eq!(notes.admit(now + PERIOD / 2), None);
        assert_eq!(notes.admit(now + PERIOD), Some(981), "the next line tells of the others");
        assert_eq!(notes.admit(now + PERIOD), Some(0));
    }
}
