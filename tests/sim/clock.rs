//! The clocks of a host: one on the wall, which may be wrong and may jump, and one that counts from
//! the boot of the host and only goes forward.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use agent::clock::Moment;
use tokio::time::Instant;

/// How long hosts have been up when a story begins.
const UP: Duration = Duration::from_secs(24 * 3600);

/// Clones are the same clock.
#[derive(Debug, Clone)]
pub(crate) struct SimClock {
    begun: Instant,
    hands: Arc<Mutex<Hands>>,
    /// There is nothing but the wall.
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
    /// Off by so much.
    pub(crate) fn new(off_ms: i64, wall_alone: bool) -> Self {
        let begun = Instant::now();
        let hands = Hands { off_ms, boot: 1, up_since: begun, up_before: UP };
        Self { begun, hands: Arc::new(Mutex::new(hands)), wall_alone }
    }

    fn hands(&self) -> MutexGuard<'_, Hands> {
        self.hands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody sets the wall clock.
    pub(crate) fn jump(&self, ms: i64) {
        self.hands().off_ms += ms;
    }

    /// The host has booted.
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
