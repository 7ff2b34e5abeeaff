//! Bounds how often a line is logged that others can cause again and again.

use std::time::Duration;

use tokio::time::Instant;

use crate::sync::Mutex;

/// Shortest time between two lines of one kind.
const PAUSE: Duration = Duration::from_secs(60);

/// Kind of log line of which one is written a minute.
#[derive(Debug, Default)]
pub struct Seldom(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Time of the last line.
    last: Option<Instant>,
    /// Lines that were left out since then.
    left_out: u64,
}

impl Seldom {
    /// Creates a kind of which no line was written yet.
    pub const fn new() -> Self {
        Self(Mutex::new(State { last: None, left_out: 0 }))
    }

    /// Returns how many lines were left out since the last one, if this one is to be written.
    pub fn admit(&self) -> Option<u64> {
        let now = Instant::now();
        let mut state = self.0.lock();
        if state.last.is_some_and(|last| now.saturating_duration_since(last) < PAUSE) {
            state.left_out = state.left_out.saturating_add(1);
            return None;
        }
        state.last = Some(now);
        Some(std::mem::take(&mut state.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_line_a_minute_is_written_with_the_number_of_the_others() {
        let line = Seldom::new();
        assert_eq!(line.admit(), Some(0));
        assert_eq!((line.admit(), line.admit()), (None, None));
        tokio::time::advance(PAUSE).await;
        assert_eq!(line.admit(), Some(2));
        assert_eq!(line.admit(), None);
        tokio::time::advance(2 * PAUSE).await;
        assert_eq!((line.admit(), Seldom::default().admit()), (Some(1), Some(0)));
    }
}
