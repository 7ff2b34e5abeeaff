//! Last use of each sandbox. In memory only: a restart of the agent counts as a use, so that a
//! sandbox whose uses were not seen meanwhile does not count as idle.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use proto::id::SandboxId;
use tokio::time::Instant;

#[derive(Debug)]
pub(super) struct Activity {
    begun: Instant,
    uses: Mutex<HashMap<SandboxId, Instant>>,
}

impl Activity {
    /// Begins with no uses: all are idle from now on.
    pub(super) fn new() -> Self {
        Self { begun: Instant::now(), uses: Mutex::default() }
    }

    pub(super) fn used(&self, id: &SandboxId) {
        self.uses().insert(*id, Instant::now());
    }

    /// Time since the last use.
    pub(super) fn unused(&self, id: &SandboxId) -> Duration {
        self.uses().get(id).unwrap_or(&self.begun).elapsed()
    }

    /// Forgets all other sandboxes.
    pub(super) fn keep(&self, live: &BTreeSet<SandboxId>) {
        self.uses().retain(|id, _| live.contains(id));
    }

    fn uses(&self) -> MutexGuard<'_, HashMap<SandboxId, Instant>> {
        self.uses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
