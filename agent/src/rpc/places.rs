//! Bounds the number of concurrent calls. Calls that need only the agent have their own slots: a
//! tenant can prolong calls about its sandbox, and these must not take slots from the others.

use std::sync::Arc;

use daemon::keyed_count::{Counted, KeyedCount};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Most concurrent calls that need only the agent.
const AGENT_MAX: usize = 256;
/// Most concurrent calls about sandboxes.
const SANDBOXES_MAX: usize = 1024;
/// Most concurrent calls about one sandbox.
pub(super) const SANDBOX_MAX: usize = 64;

/// Subject of a call, which decides whose slot it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum About<'a> {
    /// The agent alone.
    Agent,
    /// The sandbox with this id.
    Sandbox(&'a str),
    /// No single sandbox: the call reads many sandboxes, or turns a container into one.
    Many,
}

/// Slots for calls on one node.
#[derive(Debug, Clone)]
pub(super) struct Places {
    agent: Arc<Semaphore>,
    sandboxes: Arc<Semaphore>,
    /// Number of calls about each sandbox that has any.
    of: KeyedCount<String>,
}

/// Slot of a call, released on drop.
#[derive(Debug)]
pub(super) struct Place {
    _permit: OwnedSemaphorePermit,
    /// Share in the calls about this sandbox.
    _share: Option<Counted<String>>,
}

impl Places {
    pub(super) fn new() -> Self {
        Self {
            agent: Arc::new(Semaphore::new(AGENT_MAX)),
            sandboxes: Arc::new(Semaphore::new(SANDBOXES_MAX)),
            of: KeyedCount::default(),
        }
    }

    /// Takes a slot; `None` when there is none. Never waits.
    pub(super) fn take(&self, about: About<'_>) -> Option<Place> {
        let (semaphore, share) = match about {
            About::Agent => (&self.agent, None),
            About::Sandbox(id) => {
                (&self.sandboxes, Some(self.of.begin(id.to_owned(), SANDBOX_MAX)?))
            }
            About::Many => (&self.sandboxes, None),
        };
        let permit = Arc::clone(semaphore).try_acquire_owned().ok()?;
        Some(Place { _permit: permit, _share: share })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(places: &Places, about: About<'_>) -> Vec<Place> {
        std::iter::from_fn(|| places.take(about)).collect()
    }

    #[test]
    fn calls_about_one_sandbox_leave_room_for_other_calls() {
        let places = Places::new();
        let one = fill(&places, About::Sandbox("one"));
        assert_eq!(one.len(), SANDBOX_MAX);
        assert!(places.take(About::Sandbox("two")).is_some());
        let names: Vec<_> = (0..100).map(|n| n.to_string()).collect();
        let many: Vec<_> = names.iter().map(|n| fill(&places, About::Sandbox(n))).collect();
        assert!(places.take(About::Sandbox("late")).is_none(), "the node has its bound, too");
        assert_eq!(fill(&places, About::Agent).len(), AGENT_MAX);
        drop((one, many));
        assert_eq!(fill(&places, About::Sandbox("one")).len(), SANDBOX_MAX);
    }
}
