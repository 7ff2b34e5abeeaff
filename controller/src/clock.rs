//! Wall clock and randomness as traits, so that a simulation on paused time with a seed can be
//! repeated. Durations are measured with `tokio::time`; this clock only stamps records.

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
