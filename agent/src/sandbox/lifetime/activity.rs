//! Last use of each sandbox. In memory only: a restart of the agent counts as a use, so that a
//! sandbox whose uses were not seen meanwhile does not count as idle.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use daemon::sync::Mutex;
use proto::id::SandboxId;
use tokio::time::Instant;

#[derive(Debug)]
pub(in crate::sandbox) struct Activity {
    begun: Instant,
    uses: Mutex<HashMap<SandboxId, Instant>>,
}

impl Activity {
    /// Begins with no uses: all are idle from now on.
    pub(in crate::sandbox) fn new() -> Self {
        Self { begun: Instant::now(), uses: Mutex::default() }
    }

    /// Records a use this long ago. An earlier use than the last one changes nothing.
    pub(in crate::sandbox) fn used(&self, id: &SandboxId, ago: Duration) {
        let at = Instant::now().checked_sub(ago).unwrap_or(self.begun);
        let mut uses = self.uses.lock();
        let last = uses.entry(*id).or_insert(at);
        *last = at.max(*last);
    }

    /// Time since the last use.
    pub(in crate::sandbox) fn unused(&self, id: &SandboxId) -> Duration {
        self.uses.lock().get(id).unwrap_or(&self.begun).elapsed()
    }

    /// Forgets all other sandboxes.
    pub(in crate::sandbox) fn keep(&self, live: &BTreeSet<SandboxId>) {
        self.uses.lock().retain(|id, _| live.contains(id));
    }
}
