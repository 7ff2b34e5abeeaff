//! Requested lifetime rules of a sandbox: the checked form of the message `Lifetime`.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{duration, id::Invalid, sandbox::v1 as wire};

/// Longest time to live.
pub const TTL_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Shortest time without use that counts as idle.
pub const IDLE_MIN: Duration = Duration::from_secs(10);
/// Largest rate of CPU time that a rule may look for, percent of one core: 64 cores.
pub const IDLE_CPU_MAX: u32 = 6400;
/// Longest time that a sandbox gets to shut down by itself.
pub const GRACE_MAX: Duration = Duration::from_secs(600);

/// Reads the time that a sandbox gets to shut down by itself; `None` when the caller sets none.
///
/// # Errors
/// When it is negative or longer than [`GRACE_MAX`].
pub fn grace(asked: Option<prost_types::Duration>) -> Result<Option<Duration>, Invalid> {
    match duration::check("grace", asked)? {
        Some(grace) if grace > GRACE_MAX => Err(Invalid::new("grace", "must be at most 600 s")),
        asked => Ok(asked),
    }
}

/// Action on a sandbox that has expired or is idle.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Pauses the sandbox: nothing is lost.
    #[default]
    Pause,
    /// Stops the sandbox: its disk is kept.
    Stop,
    /// Deletes the sandbox.
    Delete,
}

impl From<Action> for wire::ExpiryAction {
    fn from(action: Action) -> Self {
        match action {
            Action::Pause => Self::Pause,
            Action::Stop => Self::Stop,
            Action::Delete => Self::Delete,
        }
    }
}

/// Requested changes of the rules; `None` leaves a rule as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LifetimePatch {
    /// Time to live; zero means for ever.
    pub ttl: Option<Duration>,
    /// Action when the time to live is over.
    pub ttl_action: Option<Action>,
    /// Time without use after which the sandbox is idle; zero means never.
    pub idle: Option<Duration>,
    /// Action when the sandbox is idle.
    pub idle_action: Option<Action>,
    /// CPU use beyond which the sandbox is not idle, percent of one core; zero: it is not looked at.
    pub idle_cpu: Option<u32>,
}

impl TryFrom<&wire::Lifetime> for LifetimePatch {
    type Error = Invalid;

    fn try_from(asked: &wire::Lifetime) -> Result<Self, Invalid> {
        let ttl = duration::check("lifetime.ttl", asked.ttl)?;
        if ttl.is_some_and(|ttl| ttl > TTL_MAX) {
            return Err(Invalid::new("lifetime.ttl", "must be at most 10 years; 0 is for ever"));
        }
        let idle = duration::check("lifetime.idle", asked.idle)?;
        if idle.is_some_and(|idle| !idle.is_zero() && !(IDLE_MIN..=TTL_MAX).contains(&idle)) {
            let rule = "must be 10 s to 10 years; 0 is never";
            return Err(Invalid::new("lifetime.idle", rule));
        }
        if asked.idle_cpu.is_some_and(|percent| percent > IDLE_CPU_MAX) {
            let rule = "must be at most 6400, percent of one core; 0 does not look at it";
            return Err(Invalid::new("lifetime.idle_cpu", rule));
        }
        Ok(Self {
            ttl,
            ttl_action: action(asked.ttl_action, "lifetime.ttl_action")?,
            idle,
            idle_action: action(asked.idle_action, "lifetime.idle_action")?,
            idle_cpu: asked.idle_cpu,
        })
    }
}

fn action(asked: i32, field: &'static str) -> Result<Option<Action>, Invalid> {
    match wire::ExpiryAction::try_from(asked) {
        Ok(wire::ExpiryAction::Unspecified) => Ok(None),
        Ok(wire::ExpiryAction::Pause) => Ok(Some(Action::Pause)),
        Ok(wire::ExpiryAction::Stop) => Ok(Some(Action::Stop)),
        Ok(wire::ExpiryAction::Delete) => Ok(Some(Action::Delete)),
        Err(_) => Err(Invalid::new(field, "must be PAUSE, STOP or DELETE")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: i64) -> Option<prost_types::Duration> {
        Some(prost_types::Duration { seconds, nanos: 0 })
    }

    #[test]
    fn unset_lifetime_fields_stay_unset() {
        assert_eq!(
            LifetimePatch::try_from(&wire::Lifetime::default()),
            Ok(LifetimePatch::default())
        );
        let asked = wire::Lifetime { ttl: seconds(0), idle: seconds(600), ..Default::default() };
        let patch = LifetimePatch::try_from(&asked).expect("valid");
        assert_eq!((patch.ttl, patch.ttl_action), (Some(Duration::ZERO), None));
        assert_eq!((patch.idle, patch.idle_cpu), (Some(Duration::from_secs(600)), None));
        let asked = wire::Lifetime { idle_cpu: Some(0), ..Default::default() };
        assert_eq!(LifetimePatch::try_from(&asked).expect("valid").idle_cpu, Some(0), "off");
    }

    #[test]
    fn lifetime_field_out_of_bounds_is_named() {
        let refused = |field: &str, asked: wire::Lifetime| {
            assert_eq!(LifetimePatch::try_from(&asked).expect_err(field).what, field);
        };
        refused("lifetime.ttl", wire::Lifetime { ttl: seconds(-1), ..Default::default() });
        refused("lifetime.ttl", wire::Lifetime { ttl: seconds(1 << 40), ..Default::default() });
        refused("lifetime.idle", wire::Lifetime { idle: seconds(9), ..Default::default() });
        refused("lifetime.ttl_action", wire::Lifetime { ttl_action: 9, ..Default::default() });
        refused("lifetime.idle_action", wire::Lifetime { idle_action: -1, ..Default::default() });
        refused("lifetime.idle_cpu", wire::Lifetime { idle_cpu: Some(6401), ..Default::default() });
    }
}
