//! Connections that are logged in, counted by team. One team never takes all places.

use std::{collections::BTreeMap, sync::Arc};

use daemon::sync::Mutex;
use proto::name::Team;

/// Connections that are logged in. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct Capacity {
    max: usize,
    taken: Arc<Mutex<BTreeMap<Team, usize>>>,
}

/// Place of one connection, until it is dropped.
#[derive(Debug)]
pub(super) struct CountGuard {
    all: Capacity,
    team: Team,
}

impl Capacity {
    /// Creates places for `max` connections; a team may have half of them.
    pub(super) fn new(max: usize) -> Self {
        Self { max, taken: Arc::default() }
    }

    /// Takes a place. `None`: the team, or all teams together, have too many.
    pub(super) fn take(&self, team: &Team) -> Option<CountGuard> {
        let mut taken = self.taken.lock();
        let own = taken.get(team).copied().unwrap_or_default();
        if own >= self.max.div_ceil(2) || taken.values().sum::<usize>() >= self.max {
            return None;
        }
        taken.insert(team.clone(), own + 1);
        Some(CountGuard { all: self.clone(), team: team.clone() })
    }
}

impl Drop for CountGuard {
    fn drop(&mut self) {
        let mut taken = self.all.taken.lock();
        let left = taken.get(&self.team).map_or(0, |own| own.saturating_sub(1));
        match left {
            0 => drop(taken.remove(&self.team)),
            left => drop(taken.insert(self.team.clone(), left)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn team_takes_half_of_the_places_and_gives_them_back() {
        let capacity = Capacity::new(4);
        let [red, blue] = ["red", "blue"].map(|name| name.parse().expect("a team"));
        let own: Vec<_> = std::iter::from_fn(|| capacity.take(&red)).collect();
        assert_eq!(own.len(), 2);
        let others: Vec<_> = std::iter::from_fn(|| capacity.take(&blue)).collect();
        assert_eq!(others.len(), 2);
        drop((own, others));
        assert!(capacity.taken.lock().is_empty());
        assert!(capacity.take(&red).is_some());
    }
}
