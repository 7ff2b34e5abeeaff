//! Requested rules of a sandbox's lifetime: the checked form of `Lifetime`.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{id::Invalid, sandbox::v1 as wire};

/// Longest time to live.
pub const TTL_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Shortest time without use that counts as idle.
pub const IDLE_MIN: Duration = Duration::from_secs(10);

/// Action on a sandbox that has expired or is idle.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Pauses it: nothing is lost.
    #[default]
    Pause,
    /// Stops it: its disk is kept.
    Stop,
    /// Deletes it.
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

/// Requested changes of the rules; `None` for a rule that stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LifetimePatch {
    /// Time to live; zero: for ever.
    pub ttl: Option<Duration>,
    /// Action at expiry.
    pub ttl_action: Option<Action>,
    /// Time without use that counts as idle; zero: never.
    pub idle: Option<Duration>,
    /// Action when idle.
    pub idle_action: Option<Action>,
}

impl TryFrom<&wire::Lifetime> for LifetimePatch {
    type Error = Invalid;

    fn try_from(asked: &wire::Lifetime) -> Result<Self, Invalid> {
        let ttl = duration(asked.ttl, "lifetime.ttl")?;
        if ttl.is_some_and(|ttl| ttl > TTL_MAX) {
            return Err(Invalid::new("lifetime.ttl", "must be at most 10 years; 0 is for ever"));
        }
        let idle = duration(asked.idle, "lifetime.idle")?;
        if idle.is_some_and(|idle| !idle.is_zero() && !(IDLE_MIN..=TTL_MAX).contains(&idle)) {
            let rule = "must be 10 s to 10 years; 0 is never";
            return Err(Invalid::new("lifetime.idle", rule));
        }
        Ok(Self {
            ttl,
            ttl_action: action(asked.ttl_action, "lifetime.ttl_action")?,
            idle,
            idle_action: action(asked.idle_action, "lifetime.idle_action")?,
        })
    }
}

fn duration(
    asked: Option<prost_types::Duration>,
    field: &'static str,
) -> Result<Option<Duration>, Invalid> {
    let checked = asked.map(Duration::try_from).transpose();
    checked.map_err(|_| Invalid::new(field, "must not be negative"))
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
    fn what_is_not_asked_for_stays_open() {
        assert_eq!(
            LifetimePatch::try_from(&wire::Lifetime::default()),
            Ok(LifetimePatch::default())
        );
        let asked = wire::Lifetime { ttl: seconds(0), idle: seconds(600), ..Default::default() };
        let wish = LifetimePatch::try_from(&asked).expect("valid");
        assert_eq!((wish.ttl, wish.ttl_action), (Some(Duration::ZERO), None));
        assert_eq!(wish.idle, Some(Duration::from_secs(600)));
    }

    #[test]
    fn what_is_out_of_bounds_is_named() {
        let refused = |field: &str, asked: wire::Lifetime| {
            assert_eq!(LifetimePatch::try_from(&asked).expect_err(field).what, field);
        };
        refused("lifetime.ttl", wire::Lifetime { ttl: seconds(-1), ..Default::default() });
        refused("lifetime.ttl", wire::Lifetime { ttl: seconds(1 << 40), ..Default::default() });
        refused("lifetime.idle", wire::Lifetime { idle: seconds(9), ..Default::default() });
        refused("lifetime.ttl_action", wire::Lifetime { ttl_action: 9, ..Default::default() });
        refused("lifetime.idle_action", wire::Lifetime { idle_action: -1, ..Default::default() });
    }
}
