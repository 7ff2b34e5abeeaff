//! Pace of answers to callers without a valid token. One that calls again as soon as it is answered takes all the
//! time that there is, with few calls under way: a refusal costs about as much as a call, so no bound on
//! concurrent calls helps. When there are many, they wait a moment.

use std::time::Duration;

use daemon::sync::Mutex;
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep},
};

/// Refusals, of all connections together: a connection costs its peer nothing, and whoever is refused loses
/// nothing by a wait.
const REFUSALS: Rate =
    Rate { at_once: 100, every: Duration::from_millis(5), longest: Duration::from_secs(2) };
/// Calls that need no token, by connection: a load balancer checks our health on one of its own.
const OPEN_CALLS: Rate =
    Rate { at_once: 20, every: Duration::from_millis(50), longest: Duration::from_secs(1) };
/// Most calls that wait. Each keeps some KiB.
const WAITING_MAX: usize = 4096;

/// How often something may happen.
#[derive(Debug, Clone, Copy)]
struct Rate {
    /// Number that may happen at once after a pause.
    at_once: u32,
    /// Time between those after them.
    every: Duration,
    /// Longest wait: well within the deadline that a caller would set.
    longest: Duration,
}

/// Turns, one after another.
#[derive(Debug)]
struct Turns {
    rate: Rate,
    /// When the next one would be due if none came at once.
    next: Option<Instant>,
}

impl Turns {
    fn new(rate: Rate) -> Self {
        Self { rate, next: None }
    }

    /// Takes the next turn; returns how long it is away.
    fn take(&mut self, now: Instant) -> Duration {
        let Rate { at_once, every, longest } = self.rate;
        let due = self.next.map_or(now, |next| next.max(now));
        // Those that wait longest share the last moment, or the turns would be further and further away.
        self.next = Some((due + every).min(now + every * at_once + longest));
        due.saturating_duration_since(now + every * (at_once - 1)).min(longest)
    }
}

/// Pace of all connections, and the places of those that wait.
#[derive(Debug)]
pub(super) struct Pace {
    refusals: Mutex<Turns>,
    waiting: Semaphore,
}

/// Too many wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Crowded;

impl Default for Pace {
    fn default() -> Self {
        Self { refusals: Mutex::new(Turns::new(REFUSALS)), waiting: Semaphore::new(WAITING_MAX) }
    }
}

impl Pace {
    /// Waits until a refusal may be sent: not at all while there are few.
    ///
    /// # Errors
    /// When too many wait already.
    pub(super) async fn refusal(&self) -> Result<(), Crowded> {
        self.turn_of(&self.refusals).await
    }

    /// Waits until a call without a token may be handled: not at all while its connection has few.
    ///
    /// # Errors
    /// When too many wait already.
    pub(super) async fn open_call(&self, calls: &OpenCalls) -> Result<(), Crowded> {
        self.turn_of(&calls.0).await
    }

    async fn turn_of(&self, turns: &Mutex<Turns>) -> Result<(), Crowded> {
        let wait = turns.lock().take(Instant::now());
        if !wait.is_zero() {
            let _place = self.waiting.try_acquire().map_err(|_| Crowded)?;
            sleep(wait).await;
        }
        Ok(())
    }
}

/// Turns of the calls without a token on one connection.
#[derive(Debug)]
pub(super) struct OpenCalls(Mutex<Turns>);

impl Default for OpenCalls {
    fn default() -> Self {
        Self(Mutex::new(Turns::new(OPEN_CALLS)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::task::JoinSet;

    use super::*;

    #[test]
    fn some_come_at_once_and_the_others_one_after_another() {
        let Rate { at_once, every, longest } = REFUSALS;
        let (mut turns, start) = (Turns::new(REFUSALS), Instant::now());
        for number in 0..at_once {
            assert_eq!(turns.take(start), Duration::ZERO, "{number}");
        }
        for number in 1..=3 {
            assert_eq!(turns.take(start), every * number);
        }
        for _ in 0..10_000 {
            assert!(turns.take(start) <= longest);
        }
        assert_eq!(turns.take(start), longest, "none waits longer");
        let later = start + longest + every * at_once;
        for _ in 0..at_once {
            assert_eq!(turns.take(later), Duration::ZERO, "a pause is worth as many at once");
        }
        assert_eq!(turns.take(later), every);
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_calls_wait_than_there_are_places() {
        let (pace, calls) = (Arc::new(Pace::default()), Arc::new(OpenCalls::default()));
        for (is_open, rate) in [(false, REFUSALS), (true, OPEN_CALLS)] {
            let mut all = JoinSet::new();
            for _ in 0..WAITING_MAX * 2 {
                let (pace, calls) = (pace.clone(), calls.clone());
                all.spawn(async move {
                    if is_open { pace.open_call(&calls).await } else { pace.refusal().await }
                });
            }
            let crowded = all.join_all().await.into_iter().filter(Result::is_err).count();
            assert_eq!(crowded, WAITING_MAX - rate.at_once as usize);
            assert_eq!(pace.waiting.available_permits(), WAITING_MAX);
        }
    }
}
