//! Limits of concurrent calls, counted per team once the caller is known. A team may have a limit of
//! its own for streams.
//!
//! Two limits apply to a team: its own, and one that all teams share. Below [`FLOOR`] only its own
//! counts, so that no number of other teams can shut a team out. Unary calls and streams are
//! counted separately: a team whose streams are all taken can still ask, stop and delete.

use std::{collections::HashMap, sync::Arc};

use daemon::sync::Mutex;
use proto::{limits::Limit, name::Team};

use super::scope::Shape;
use crate::config::ApiLimits;

/// Concurrent calls of each shape that a team may always have, whatever other teams do.
const FLOOR: usize = 32;

/// Limits of one shape of calls.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    /// Most calls of all teams, without the first [`FLOOR`] of each.
    all: usize,
    /// Most calls of one team.
    team: usize,
}

/// Calls of one shape that are under way.
#[derive(Debug, Default)]
struct Used {
    teams: HashMap<Team, usize>,
    /// Calls that count towards the shared limit: those above the floor of their team.
    shared: usize,
}

/// Limit that is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Full {
    /// The team's own, with its value.
    Team(usize),
    /// The one of all teams.
    All,
}

impl Used {
    fn take(&mut self, bounds: Bounds, team: &Team) -> Result<(), Full> {
        let own = self.teams.get(team).copied().unwrap_or_default();
        if own >= bounds.team {
            return Err(Full::Team(bounds.team));
        }
        if own >= FLOOR {
            if self.shared >= bounds.all {
                return Err(Full::All);
            }
            self.shared += 1;
        }
        // Two look-ups instead of cloning the name for each call.
        match self.teams.get_mut(team) {
            Some(own) => *own += 1,
            None => drop(self.teams.insert(team.clone(), 1)),
        }
        Ok(())
    }

    /// Releases a call. What is shared depends on the floor alone: the limit of the team may have
    /// changed meanwhile.
    fn release(&mut self, team: &Team) {
        let Some(own) = self.teams.get_mut(team) else { return };
        *own -= 1;
        let own = *own;
        if own >= FLOOR {
            self.shared -= 1;
        }
        if own == 0 {
            self.teams.remove(team);
        }
    }
}

/// Limits and calls of one shape.
#[derive(Debug)]
struct Counter {
    bounds: Bounds,
    used: Mutex<Used>,
}

impl Counter {
    fn new(all: usize, team: usize) -> Arc<Self> {
        Arc::new(Self { bounds: Bounds { all, team }, used: Mutex::default() })
    }
}

/// Permits of the calls of all teams.
#[derive(Debug, Clone)]
pub(crate) struct Permits {
    unary: Arc<Counter>,
    streams: Arc<Counter>,
}

/// Permit of one call, released when it is dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    counter: Arc<Counter>,
    team: Team,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.counter.used.lock().release(&self.team);
    }
}

impl Permits {
    pub(super) fn new(limits: &ApiLimits) -> Self {
        Self {
            unary: Counter::new(limits.calls_max, limits.team_calls()),
            streams: Counter::new(limits.streams_max, limits.team_streams()),
        }
    }

    /// Takes a permit for a call of this team, which may have a limit of its own. Never waits.
    pub(super) fn take(
        &self,
        team: &Team,
        shape: Shape,
        own: Option<Limit<u64>>,
    ) -> Result<Permit, Full> {
        let counter = match shape {
            Shape::Unary => &self.unary,
            Shape::Stream => &self.streams,
        };
        let mut bounds = counter.bounds;
        if let Some(own) = own {
            let max = own.max().map(|max| usize::try_from(max).unwrap_or(usize::MAX));
            bounds.team = max.unwrap_or(usize::MAX);
        }
        counter.used.lock().take(bounds, team)?;
        Ok(Permit { counter: Arc::clone(counter), team: team.clone() })
    }

    /// Takes a permit for a stream of this team, which may have a limit of its own. `None`: it has as many as
    /// it may, or all teams together have.
    pub(crate) fn take_stream(&self, team: &Team, own: Option<Limit<u64>>) -> Option<Permit> {
        self.take(team, Shape::Stream, own).ok()
    }

    /// Returns the number of open streams of a team.
    pub(super) fn streams(&self, team: &Team) -> u64 {
        let used = self.streams.used.lock();
        used.teams.get(team).copied().unwrap_or_default() as u64
    }

    /// Returns the most streams of a team that has no limit of its own.
    pub(super) fn streams_max(&self) -> u64 {
        self.streams.bounds.team as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn team(name: &str) -> Team {
        name.parse().expect("a team")
    }

    fn limits(calls_max: usize, team_calls_max: usize) -> ApiLimits {
        ApiLimits {
            calls_max,
            team_calls_max: Some(team_calls_max),
            streams_max: calls_max,
            team_streams_max: Some(team_calls_max),
            ..ApiLimits::default()
        }
    }

    fn fill(permits: &Permits, name: &str, shape: Shape) -> (Vec<Permit>, Full) {
        let mut held = Vec::new();
        loop {
            match permits.take(&team(name), shape, None) {
                Ok(permit) => held.push(permit),
                Err(full) => return (held, full),
            }
        }
    }

    #[test]
    fn team_gets_no_more_than_its_share() {
        let permits = Permits::new(&limits(1000, 100));
        let (held, full) = fill(&permits, "red", Shape::Unary);
        assert_eq!((held.len(), full), (100, Full::Team(100)));
        let (blue, _) = fill(&permits, "blue", Shape::Unary);
        assert_eq!(blue.len(), 100);
        drop(held);
        assert_eq!(fill(&permits, "red", Shape::Unary).0.len(), 100, "all were given back");
    }

    #[test]
    fn streams_and_unary_calls_leave_room_for_each_other() {
        let permits = Permits::new(&limits(1000, 100));
        for (first, second) in [(Shape::Stream, Shape::Unary), (Shape::Unary, Shape::Stream)] {
            let (_held, _) = fill(&permits, "red", first);
            assert!(permits.take(&team("red"), second, None).is_ok(), "{second:?}");
        }
    }

    #[test]
    fn every_team_keeps_its_floor_beside_greedy_teams() {
        let permits = Permits::new(&limits(200, 150));
        let crowd: Vec<_> =
            (0..20).map(|n| fill(&permits, &format!("t{n}"), Shape::Stream)).collect();
        assert!(crowd.iter().any(|(_, full)| *full == Full::All), "the shared bound is reached");
        let (late, full) = fill(&permits, "late", Shape::Stream);
        assert_eq!((late.len(), full), (FLOOR, Full::All));
        drop(crowd);
        assert_eq!(fill(&permits, "late", Shape::Stream).0.len(), 150 - FLOOR);
        drop(late);
        assert_eq!(permits.streams.used.lock().shared, 0);
        assert!(
            permits.streams.used.lock().teams.is_empty(),
            "nothing is kept of teams without calls"
        );
    }

    #[test]
    fn bound_below_the_floor_holds() {
        let permits = Permits::new(&limits(10, 2));
        assert_eq!(fill(&permits, "red", Shape::Unary).0.len(), 2);
    }

    #[test]
    fn limit_of_a_team_replaces_the_one_of_the_configuration() {
        let permits = Permits::new(&limits(1000, 100));
        let fill = |own: Option<Limit<u64>>| {
            let take = || permits.take(&team("red"), Shape::Stream, own).ok();
            std::iter::from_fn(take).collect::<Vec<_>>()
        };
        let three = fill(Some(Limit::Max(3)));
        assert_eq!((three.len(), permits.streams(&team("red"))), (3, 3));
        assert_eq!(permits.streams(&team("blue")), 0);
        let more = fill(Some(Limit::Max(150)));
        assert_eq!(more.len(), 147, "more than the configuration has");
        assert!(fill(None).is_empty(), "lowered: it counts from the next stream on");
        drop((three, more));
        let used = permits.streams.used.lock();
        assert_eq!((used.shared, used.teams.len()), (0, 0));
        drop(used);
        assert_eq!(fill(Some(Limit::Unlimited)).len(), 1000 + FLOOR, "all that there is");
    }
}
