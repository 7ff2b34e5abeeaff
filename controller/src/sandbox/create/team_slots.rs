//! Slots of creations that the teams share, so that one team with many creations leaves slots for the others.

use std::sync::Arc;

use daemon::{shares::Shares, sync::Mutex};
use proto::name::Team;

/// A number of slots. A team gets a share of them, as in `Shares`.
#[derive(Debug, Clone)]
pub(in crate::sandbox) struct TeamSlots(Arc<Mutex<Shares<Team>>>);

/// Slot of a team, given back when it is dropped.
#[derive(Debug)]
pub(super) struct TeamSlot {
    slots: TeamSlots,
    team: Team,
}

impl TeamSlots {
    /// Creates `slots` free slots.
    pub(in crate::sandbox) fn new(slots: usize) -> Self {
        Self(Arc::new(Mutex::new(Shares::new(slots))))
    }

    /// Takes a slot; `None` when the team holds its share already.
    pub(super) fn take(&self, team: &Team) -> Option<TeamSlot> {
        self.0.lock().take(team).then(|| TeamSlot { slots: self.clone(), team: team.clone() })
    }
}

impl Drop for TeamSlot {
    fn drop(&mut self) {
        self.slots.0.lock().release(&self.team);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_is_free_again_when_it_is_dropped() {
        let (slots, red) = (TeamSlots::new(4), "red".parse().expect("a team"));
        let take = || slots.take(&red);
        let held: Vec<_> = std::iter::from_fn(take).collect();
        assert_eq!(held.len(), 2);
        assert!(slots.take(&"blue".parse().expect("a team")).is_some(), "another team's");
        drop(held);
        assert!(slots.take(&red).is_some());
    }
}
