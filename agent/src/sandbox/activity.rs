//! When each sandbox was last used. In memory alone: a restart of the agent counts as a use, so that
//! one which was not seen meanwhile is not taken for idle.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use proto::id::SandboxId;
use tokio::time::Instant;

/// The last uses.
#[derive(Debug)]
pub(super) struct Activity {
    begun: Instant,
    uses: Mutex<HashMap<SandboxId, Instant>>,
}

impl Activity {
    /// From now on.
    pub(super) fn new() -> Self {
        Self { begun: Instant::now(), uses: Mutex::default() }
    }

    /// It is used now.
    pub(super) fn used(&self, id: &SandboxId) {
        self.uses().insert(*id, Instant::now());
    }

    /// How long it has not been used.
    pub(super) fn unused(&self, id: &SandboxId) -> Duration {
        self.uses().get(id).unwrap_or(&self.begun).elapsed()
    }

    /// Forgets all others.
    pub(super) fn keep(&self, live: &BTreeSet<SandboxId>) {
        self.uses().retain(|id, _| live.contains(id));
    }

    fn uses(&self) -> MutexGuard<'_, HashMap<SandboxId, Instant>> {
        self.uses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
