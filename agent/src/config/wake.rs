//! `[ingress.wake]`: bounds of the requests that wait for their sandbox.

use serde::Deserialize;

use super::Sources;

/// Longest time that a request may be held, seconds: proxies in front give up after 100 s.
const HOLD_S_MAX: u64 = 90;
/// Most requests that may be held: the agent answers 4096 questions at a time, and others must not
/// wait with them.
const HELD_MAX: usize = 3000;

/// Bounds of the requests that wait for their sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Wake {
    /// Longest time that a request is held while its sandbox wakes or boots, seconds; at most 90.
    pub hold_s: u64,
    /// Time after which a person gets a page that waits instead, milliseconds.
    pub page_after_ms: u64,
    /// Most sandboxes of a team that requests wake a minute.
    pub team_wakes_per_min: u32,
    /// Most held requests of a team; each costs Caddy some 60 KB and two descriptors.
    pub team_held_max: usize,
    /// Most held requests of the node.
    pub held_max: usize,
    /// Time for which a wake that failed is not tried again, seconds.
    pub rest_s: u64,
    /// True when WebSockets, and other requests of pages that are open already, wake a sandbox too.
    pub followers: bool,
}

impl Default for Wake {
    fn default() -> Self {
        Self {
            hold_s: 20,
            page_after_ms: 1500,
            team_wakes_per_min: 60,
            team_held_max: 500,
            held_max: 2000,
            rest_s: 10,
            followers: false,
        }
    }
}

impl Wake {
    pub(super) fn check(&self, from: &mut Sources<'_>) {
        let held = (1..=HELD_MAX).contains(&self.held_max);
        for (holds, what, rule) in [
            (self.hold_s <= HOLD_S_MAX, "ingress.wake.hold_s", "must be 0 to 90"),
            (self.team_wakes_per_min > 0, "ingress.wake.team_wakes_per_min", "must be 1 or more"),
            (held, "ingress.wake.held_max", "must be 1 to 3000"),
            (
                (1..=self.held_max).contains(&self.team_held_max),
                "ingress.wake.team_held_max",
                "must be 1 or more, and not more than held_max",
            ),
            (self.rest_s <= 3600, "ingress.wake.rest_s", "must be 0 to 3600"),
        ] {
            from.must(holds, what, rule);
        }
    }
}
