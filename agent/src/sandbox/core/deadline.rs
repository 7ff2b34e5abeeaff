//! Remaining time of an operation, and delays between tries.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

use proto::{Reason, id::SandboxId};
use tokio::time::Instant;

use crate::sandbox::{Error, Result};

/// Limits the time of one step to the rest of the operation's time, and to `at_most`.
pub(crate) fn left(deadline: Instant, at_most: Duration) -> Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(Error::new(Reason::PctFailed, "the operation took too long as a whole"));
    }
    Ok(left.min(at_most))
}

/// Computes a delay of `base` to twice that. It differs by sandbox and try, and is the same in each
/// simulation.
pub(crate) fn jitter(base: Duration, id: &SandboxId, tries: u32) -> Duration {
    let mut hasher = DefaultHasher::new();
    (id, tries).hash(&mut hasher);
    let percent = u32::try_from(hasher.finish() % 100).unwrap_or_default();
    base + base * percent / 100
}
