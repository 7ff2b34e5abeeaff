//! The clocks of a host: a wall clock, which may be wrong and may jump, and a clock that counts
//! from the host's boot and only moves forward.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use agent::clock::Moment;
use tokio::time::Instant;

/// Uptime of hosts at the beginning of a story.
const UP: Duration = Duration::from_secs(24 * 3600);

/// Clock of a host; clones share their state.
#[derive(Debug, Clone)]
pub(crate) struct SimClock {
    begun: Instant,
    hands: Arc<Mutex<Hands>>,
    /// Whether the host has only the wall clock.
    wall_alone: bool,
}

#[derive(Debug)]
struct Hands {
    off_ms: i64,
    boot: u64,
    up_since: Instant,
    up_before: Duration,
}

impl SimClock {
    /// Creates a clock whose wall time is off by `off_ms`.
    pub(crate) fn new(off_ms: i64, wall_alone: bool) -> Self {
        let begun = Instant::now();
        let hands = Hands { off_ms, boot: 1, up_since: begun, up_before: UP };
        Self { begun, hands: Arc::new(Mutex::new(hands)), wall_alone }
    }

    fn hands(&self) -> MutexGuard<'_, Hands> {
        self.hands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the wall clock forward or back.
    pub(crate) fn jump(&self, ms: i64) {
        self.hands().off_ms += ms;
    }

    /// Records a boot of the host.
    pub(crate) fn boot(&self) {
        let mut hands = self.hands();
        hands.boot += 1;
        (hands.up_since, hands.up_before) = (Instant::now(), Duration::ZERO);
    }

    fn now(&self) -> u64 {
        let since = u64::try_from(self.begun.elapsed().as_millis()).expect("a short story");
        (1_700_000_000_000 + since).saturating_add_signed(self.hands().off_ms)
    }
}

impl controller::clock::Clock for SimClock {
    fn now_ms(&self) -> u64 {
        self.now()
    }
}

impl agent::clock::Clock for SimClock {
    fn now_ms(&self) -> u64 {
        self.now()
    }

    fn moment(&self) -> Moment {
        let wall_ms = self.now();
        if self.wall_alone {
            return Moment { wall_ms, boot: "-".into(), up_ms: wall_ms };
        }
        let hands = self.hands();
        let up = hands.up_before + hands.up_since.elapsed();
        let up_ms = u64::try_from(up.as_millis()).expect("a short story");
        Moment { wall_ms, boot: format!("b{}", hands.boot), up_ms }
    }
}
