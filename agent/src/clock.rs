//! The wall clock, passed in: a simulation brings its own. Waiting goes by tokio's time.

use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::sys::read;

/// How long after a boot the wall clock may still be wrong: a node without a battery asks the
/// network for the time first.
const GRACE: Duration = Duration::from_secs(5 * 60);

/// Says what time it is, and nothing else.
pub trait Clock: Send + Sync + std::fmt::Debug {
    /// Milliseconds since 1970.
    fn now_ms(&self) -> u64;

    /// Now, by both clocks. One that never jumps has no need of a second.
    fn moment(&self) -> Moment {
        Moment { wall_ms: self.now_ms(), boot: "-".into(), up_ms: self.now_ms() }
    }
}

/// A moment by the wall clock, and by the clock that only goes forward from the boot of the host.
/// Between two of one boot the second decides, so that a wall clock that jumps changes nothing;
/// across a boot there is only the wall clock.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// Milliseconds since 1970; 0: nobody knows.
    pub wall_ms: u64,
    /// Boot that `up_ms` is of.
    pub boot: String,
    /// Milliseconds since that boot, with those that the host slept.
    pub up_ms: u64,
}

impl Moment {
    /// So much later.
    #[must_use]
    pub fn after(&self, time: Duration) -> Self {
        let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Self {
            wall_ms: self.wall_ms.saturating_add(ms),
            boot: self.boot.clone(),
            up_ms: self.up_ms.saturating_add(ms),
        }
    }

    /// How long ago it was at `now`: nothing when it lies ahead, or when it cannot be said yet.
    pub fn ago(&self, now: &Self) -> Duration {
        let ms = if self.boot == now.boot {
            now.up_ms.saturating_sub(self.up_ms)
        } else if self.wall_ms == 0 || Duration::from_millis(now.up_ms) < GRACE {
            0
        } else {
            now.wall_ms.saturating_sub(self.wall_ms)
        };
        Duration::from_millis(ms)
    }

    /// The same moment by the clocks of another host, which show `there` when those of this one show
    /// `here`: as long ago, or as far ahead. What only the wall clock knows is of no boot there, either.
    #[must_use]
    pub fn elsewhere(&self, here: &Self, there: &Self) -> Self {
        if *self == Self::default() {
            return Self::default();
        }
        let one_boot = self.boot == here.boot;
        let clocks = if one_boot { (self.up_ms, here.up_ms) } else { (self.wall_ms, here.wall_ms) };
        let moved = |now: u64| now.saturating_add(clocks.0).saturating_sub(clocks.1);
        let boot = if one_boot { there.boot.clone() } else { String::new() };
        Self { wall_ms: moved(there.wall_ms), boot, up_ms: moved(there.up_ms) }
    }

    /// True when it is there or past.
    pub fn reached(&self, now: &Self) -> bool {
        if self.boot == now.boot {
            return self.up_ms <= now.up_ms;
        }
        Duration::from_millis(now.up_ms) >= GRACE && self.wall_ms <= now.wall_ms
    }
}

/// Where the kernel names the boot.
pub const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The host's clock.
#[derive(Debug, Clone)]
pub struct SystemClock {
    boot: String,
}

impl SystemClock {
    /// With the name of the boot that stands in this file; `BOOT_ID` on a real host.
    pub fn new(boot_id: &Path) -> Self {
        Self { boot: read::text(boot_id, read::SMALL).trim().to_owned() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new(Path::new(BOOT_ID))
    }
}

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "the one place that asks the host for the time")]
    fn now_ms(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    fn moment(&self) -> Moment {
        let up = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
        let up = up.map(Duration::from).unwrap_or_default();
        Moment {
            wall_ms: self.now_ms(),
            boot: self.boot.clone(),
            up_ms: u64::try_from(up.as_millis()).unwrap_or(u64::MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(wall_s: u64, boot: &str, up_s: u64) -> Moment {
        Moment { wall_ms: wall_s * 1000, boot: boot.into(), up_ms: up_s * 1000 }
    }

    #[test]
    fn within_a_boot_a_jump_of_the_wall_clock_changes_nothing() {
        let then = at(10_000, "a", 100).after(Duration::from_secs(60));
        for wall_s in [0, 6_400, 10_060, 13_600] {
            assert!(!then.reached(&at(wall_s, "a", 159)), "{wall_s}");
            assert!(then.reached(&at(wall_s, "a", 160)), "{wall_s}");
            assert_eq!(then.ago(&at(wall_s, "a", 163)), Duration::from_secs(3));
        }
        assert_eq!(then.ago(&at(13_600, "a", 100)), Duration::ZERO, "it lies ahead");
    }

    #[test]
    fn across_a_boot_the_wall_clock_decides_once_it_can_be_trusted() {
        let then = at(10_060, "a", 160);
        assert!(!then.reached(&at(20_000, "b", 299)), "it may not have been set yet");
        assert!(then.reached(&at(20_000, "b", 300)));
        assert!(!then.reached(&at(10_059, "b", 300)));
        assert_eq!(then.ago(&at(10_070, "b", 300)), Duration::from_secs(10));
        assert_eq!(then.ago(&at(10_070, "b", 1)), Duration::ZERO);
        assert_eq!(Moment::default().ago(&at(10_070, "b", 300)), Duration::ZERO, "unknown");
    }

    #[test]
    fn on_another_host_it_is_as_long_ago_or_as_far_ahead() {
        let (here, there) = (at(10_060, "a", 160), at(99, "x", 5000));
        let second = Duration::from_secs(1);
        let past = at(10_000, "a", 100).elsewhere(&here, &there);
        assert_eq!(past.ago(&there), 60 * second);
        assert_eq!(past.ago(&at(0, "x", 5001)), 61 * second, "whatever its wall clock says");
        let ahead = here.after(7 * second).elsewhere(&here, &there);
        assert_eq!(
            (ahead.reached(&at(0, "x", 5006)), ahead.reached(&at(0, "x", 5007))),
            (false, true)
        );
        let before_a_boot = at(10_000, "b", 9).elsewhere(&here, &there);
        assert!(before_a_boot.boot.is_empty(), "known by the wall clock alone");
        assert_eq!(before_a_boot.ago(&there), 60 * second);
        assert_eq!(Moment::default().elsewhere(&here, &there), Moment::default(), "nobody knows");
    }

    #[test]
    fn the_host_has_both_clocks() {
        let clock = SystemClock::default();
        let now = clock.moment();
        assert!(now.wall_ms > 0 && now.up_ms > 0 && now.boot.len() == 36, "{now:?}");
        assert!(now.reached(&clock.moment()));
    }
}
