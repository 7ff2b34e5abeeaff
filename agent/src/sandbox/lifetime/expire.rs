//! Finds out which sandboxes have an action due, and carries it out. `expiry` decides.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use proto::{Cause, id::SandboxId, lifetime::Action};

use super::expiry::{Due, due};
use crate::{
    clock::Moment,
    journal::Record,
    sandbox::{Error, Sandboxes},
};

impl Sandboxes {
    /// Lists the lifetime actions that are due, for sandboxes that no operation works on.
    pub fn due(&self) -> Vec<(Arc<Record>, Due)> {
        let (busy, live) = (self.busy(), self.live());
        self.activity.keep(&live.iter().map(|record| record.id).collect::<BTreeSet<_>>());
        let now = self.clock.moment();
        let idle = live.into_iter().filter(|record| !busy.contains(&record.id));
        idle.filter_map(|record| self.due_for(&record, &now).map(|due| (record, due))).collect()
    }

    fn due_for(&self, record: &Record, now: &Moment) -> Option<Due> {
        due(record, now, self.activity.unused(&record.id), &self.options.lifetimes)
    }

    /// Returns the time since the last use that was recorded.
    pub(in crate::sandbox) fn unused(&self, id: &SandboxId) -> Duration {
        self.activity.unused(id)
    }

    /// Records that the sandbox is in use now.
    pub fn used(&self, id: &SandboxId) {
        self.activity.used(id, Duration::ZERO);
    }

    /// Records that the sandbox was in use this long ago.
    pub(in crate::sandbox) fn used_before(&self, id: &SandboxId, ago: Duration) {
        self.activity.used(id, ago);
    }

    /// Carries out a due action, unless it is no longer due when its turn comes.
    ///
    /// # Errors
    /// As pause, stop and delete.
    pub async fn expire(
        self: &Arc<Self>,
        id: &SandboxId,
        due: Due,
        wait: Duration,
    ) -> Result<Arc<Record>, Error> {
        match due.action {
            Action::Pause => self.pause_because(id, false, due.cause, wait).await,
            Action::Stop => self.stop_because(id, due.cause, None, wait).await,
            Action::Delete => self.delete_because(id, due.cause, wait).await,
        }
    }

    /// True when an action is no longer due: the sandbox was extended, or used, meanwhile.
    pub(in crate::sandbox) fn no_longer_due(&self, record: &Record, cause: Cause) -> bool {
        cause != Cause::ASKED
            && self.due_for(record, &self.clock.moment()).is_none_or(|due| due.cause != cause)
    }
}
