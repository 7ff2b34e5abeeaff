//! Lifetime of sandboxes: changes its rules, and carries out what is due. `due` decides.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use proto::{
    Cause,
    id::SandboxId,
    lifetime::{Action, LifetimePatch},
};

use super::{
    Error, Sandboxes,
    expiry::{Due, due},
};
use crate::{clock::Moment, journal::Record};

impl Sandboxes {
    /// Changes the lifetime rules of a sandbox. A time to live counts from now.
    ///
    /// # Errors
    /// When there is no such sandbox.
    pub async fn set_lifetime(
        self: &Arc<Self>,
        id: &SandboxId,
        wish: LifetimePatch,
    ) -> Result<Arc<Record>, Error> {
        let now = self.clock.moment();
        self.amend_living(id, move |record| {
            record.lifetime = record.lifetime.clone().with(&wish, &now);
            Ok(())
        })
        .await
    }

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

    /// Records that the sandbox is in use now.
    pub fn used(&self, id: &SandboxId) {
        self.activity.used(id);
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
            Action::Stop => self.stop_because(id, due.cause, wait).await,
            Action::Delete => self.delete_because(id, due.cause, wait).await,
        }
    }

    /// True when an action is no longer due: the sandbox was extended, or used, meanwhile.
    pub(super) fn no_longer_due(&self, record: &Record, cause: Cause) -> bool {
        cause != Cause::ASKED
            && self.due_for(record, &self.clock.moment()).is_none_or(|due| due.cause != cause)
    }
}
