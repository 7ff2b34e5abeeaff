//! Wall clock, passed in as a parameter: a simulation brings its own. Waiting uses tokio's time.

use std::{path::Path, time::Duration};

use daemon::clock::millis;
use serde::{Deserialize, Serialize};

use crate::sys::read;

/// Time after a boot during which the wall clock may still be wrong: a node without a battery first
/// asks the network for the time.
const GRACE: Duration = Duration::from_secs(5 * 60);

/// Source of the current time.
pub trait Clock: Send + Sync + std::fmt::Debug {
    /// Returns the milliseconds since 1970.
    fn now_ms(&self) -> u64;

    /// Returns the current time on both clocks. A clock that never jumps does not need a second
    /// one.
    fn moment(&self) -> Moment {
        Moment { wall_ms: self.now_ms(), boot: "-".into(), up_ms: self.now_ms() }
    }
}

/// Point in time on the wall clock, and on the monotonic clock since the boot of the host. Between
/// two moments of one boot the monotonic clock decides, so that a jump of the wall clock changes
/// nothing; across a boot there is only the wall clock.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// Milliseconds since 1970; 0 means unknown.
    pub wall_ms: u64,
    /// Boot id that `up_ms` belongs to.
    pub boot: String,
    /// Milliseconds since that boot, time asleep included.
    pub up_ms: u64,
}

impl Moment {
    /// Returns the moment that is `time` later.
    #[must_use]
    pub fn after(&self, time: Duration) -> Self {
        let ms = millis(time);
        Self {
            wall_ms: self.wall_ms.saturating_add(ms),
            boot: self.boot.clone(),
            up_ms: self.up_ms.saturating_add(ms),
        }
    }

    /// Returns how long ago this was at `now`: zero when it lies ahead, or when that is not known
    /// yet.
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

    /// Returns the time from `now` until this moment; zero when it has passed, or belongs to another
    /// boot.
    pub fn left(&self, now: &Self) -> Duration {
        let ms = if self.boot == now.boot { self.up_ms.saturating_sub(now.up_ms) } else { 0 };
        Duration::from_millis(ms)
    }

    /// Converts to the clocks of another host, which show `there` when those of this host show
    /// `here`: the distance from now is kept. A moment known only by the wall clock belongs to no
    /// boot there either.
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

    /// Returns true when the moment has come or is past.
    pub fn reached(&self, now: &Self) -> bool {
        if self.boot == now.boot {
            return self.up_ms <= now.up_ms;
        }
        Duration::from_millis(now.up_ms) >= GRACE && self.wall_ms <= now.wall_ms
    }
}

/// File in which the kernel publishes the boot id.
pub const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Clock of the host.
#[derive(Debug, Clone)]
pub struct SystemClock {
    boot: String,
}

impl SystemClock {
    /// Reads the boot id from this file; `BOOT_ID` on a real host.
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
        daemon::clock::now_ms()
    }

    fn moment(&self) -> Moment {
        let up = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
        let up = up.map(Duration::from).unwrap_or_default();
        Moment { wall_ms: self.now_ms(), boot: self.boot.clone(), up_ms: millis(up) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(wall_s: u64, boot: &str, up_s: u64) -> Moment {
        Moment { wall_ms: wall_s * 1000, boot: boot.into(), up_ms: up_s * 1000 }
    }

    #[test]
    fn wall_clock_jump_within_a_boot_changes_nothing() {
        let then = at(10_000, "a", 100).after(Duration::from_secs(60));
        for wall_s in [0, 6_400, 10_060, 13_600] {
            assert!(!then.reached(&at(wall_s, "a", 159)), "{wall_s}");
            assert!(then.reached(&at(wall_s, "a", 160)), "{wall_s}");
            assert_eq!(then.ago(&at(wall_s, "a", 163)), Duration::from_secs(3));
        }
        assert_eq!(then.ago(&at(13_600, "a", 100)), Duration::ZERO, "it lies ahead");
    }

    #[test]
    fn wall_clock_decides_across_boots_once_it_is_trusted() {
        let then = at(10_060, "a", 160);
        assert!(!then.reached(&at(20_000, "b", 299)), "it may not have been set yet");
        assert!(then.reached(&at(20_000, "b", 300)));
        assert!(!then.reached(&at(10_059, "b", 300)));
        assert_eq!(then.ago(&at(10_070, "b", 300)), Duration::from_secs(10));
        assert_eq!(then.ago(&at(10_070, "b", 1)), Duration::ZERO);
        assert_eq!(Moment::default().ago(&at(10_070, "b", 300)), Duration::ZERO, "unknown");
    }

    #[test]
    fn moment_keeps_its_distance_on_another_host() {
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
    fn system_clock_has_wall_time_uptime_and_boot_id() {
        let clock = SystemClock::default();
        let now = clock.moment();
        assert!(now.wall_ms > 0 && now.up_ms > 0 && now.boot.len() == 36, "{now:?}");
        assert!(now.reached(&clock.moment()));
    }
}
