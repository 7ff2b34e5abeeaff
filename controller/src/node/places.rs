//! Places on the control connection to one node, for calls about sandboxes.
//!
//! A tenant can make such a call take long: a command that takes no stdin, a stop with a long grace. The connection
//! has a fixed number of streams, and further calls wait in the order in which they came. So these calls have fewer
//! places than there are streams, and each team has a share of them. Calls that need the agent alone, and those of
//! operators, take none: there is always a stream for them.
//!
//! Callers' calls, waiting creations and the controller's own calls have separate places: a team that has used up its
//! share of one kind must not hold up its own creations, nor what takes them back.

use std::time::Duration;

use daemon::{
    flow::AGENT_STREAMS_MAX,
    shares::{self, Place},
};
use proto::{Reason, name::Team};

use super::Error;

/// Most calls about sandboxes that callers have under way on one node.
const CALLERS_MAX: usize = 256;
/// Most creations that wait at one node for their sandbox.
const CREATIONS_MAX: usize = 64;
/// Most calls of one node by which the controller takes back, ends or closes something.
const OWN_MAX: usize = 64;
/// Streams of the connection that are left for all other calls.
const OTHERS: usize = 128;
/// Retry hint of a refusal.
const RETRY: Duration = Duration::from_secs(1);

const _: () = assert!(CALLERS_MAX + CREATIONS_MAX + OWN_MAX + OTHERS <= AGENT_STREAMS_MAX as usize);

/// Cause of a call about a sandbox, which decides whose places it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A caller of the team that owns the sandbox has asked for it.
    Caller,
    /// A creation of the team waits at the node for its sandbox.
    Creation,
    /// The controller takes back, ends or closes something of the team by itself.
    Controller,
}

/// Places of all teams.
#[derive(Debug, Clone)]
pub(super) struct Places {
    callers: shares::Places<Team>,
    creations: shares::Places<Team>,
    own: shares::Places<Team>,
}

impl Places {
    pub(super) fn new() -> Self {
        Self {
            callers: shares::Places::new(CALLERS_MAX),
            creations: shares::Places::new(CREATIONS_MAX),
            own: shares::Places::new(OWN_MAX),
        }
    }

    /// Takes a place for a call. Never waits.
    ///
    /// # Errors
    /// TOO_MANY_CALLS when the team already uses its share.
    pub(super) fn take(&self, origin: Origin, team: &Team) -> Result<Place<Team>, Error> {
        let (places, max) = match origin {
            Origin::Caller => (&self.callers, CALLERS_MAX),
            Origin::Creation => (&self.creations, CREATIONS_MAX),
            Origin::Controller => (&self.own, OWN_MAX),
        };
        places.take(team).ok_or_else(|| {
            let held = places.held(team);
            Error::Refused {
                reason: Reason::TooManyCalls,
                message: format!(
                    "team {team} has {held} of {max} calls under way there, which is its share now; \
                     try again when some have ended"
                ),
                retry_after: Some(RETRY),
                files_written: None,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn team(name: &str) -> Team {
        name.parse().expect("a team")
    }

    fn fill(places: &Places, origin: Origin, name: &str) -> Vec<Place<Team>> {
        std::iter::from_fn(|| places.take(origin, &team(name)).ok()).collect()
    }

    #[test]
    fn team_that_takes_all_it_can_leaves_places_for_others_and_for_the_controller() {
        let places = Places::new();
        let red = fill(&places, Origin::Caller, "red");
        assert_eq!(red.len(), CALLERS_MAX / 2);
        let refused = places.take(Origin::Caller, &team("red")).expect_err("its share");
        assert_eq!(refused.reason(), Some(Reason::TooManyCalls));
        let Error::Refused { retry_after, message, .. } = refused else { panic!("{refused:?}") };
        assert_eq!(retry_after, Some(RETRY));
        assert!(message.contains("team red has 128 of 256 calls"), "{message}");
        assert_eq!(fill(&places, Origin::Caller, "blue").len(), CALLERS_MAX / 4);
        let creations = fill(&places, Origin::Creation, "red");
        assert_eq!(creations.len(), CREATIONS_MAX / 2);
        assert_eq!(fill(&places, Origin::Controller, "red").len(), OWN_MAX / 2, "beside both");
        assert!(places.take(Origin::Controller, &team("blue")).is_ok());
        drop(red);
        assert_eq!(fill(&places, Origin::Caller, "red").len(), CALLERS_MAX / 2, "given back");
    }

    #[test]
    fn all_places_together_leave_streams_for_calls_that_need_the_agent_alone() {
        let places = Places::new();
        let mut held = Vec::new();
        for name in 0..1000 {
            for origin in [Origin::Caller, Origin::Creation, Origin::Controller] {
                held.extend(fill(&places, origin, &format!("t{name}")));
            }
        }
        assert_eq!(held.len(), CALLERS_MAX + CREATIONS_MAX + OWN_MAX);
        assert!(held.len() + OTHERS <= AGENT_STREAMS_MAX as usize);
    }
}
