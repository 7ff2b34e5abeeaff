//! Pauses and resumes sandboxes: their memory is kept.

use proto::sandbox::v1::{EventKind, Sandbox};

use super::{Caller, Error, Sandboxes, WAIT};

/// Events that the log attributes to the caller: what does not freeze may be stopped instead.
const PAUSE: &[EventKind] = &[EventKind::Paused, EventKind::Stopped];
const RESUME: &[EventKind] = &[EventKind::Resumed];

impl Sandboxes {
    /// Pauses a sandbox. A paused one stays as it is.
    ///
    /// # Errors
    /// FREEZE_FAILED when a process in it does not freeze, unless `or_stop`; when there is none, it
    /// does not run, or its node does not do it.
    pub async fn pause(&self, caller: &Caller, id: &str, or_stop: bool) -> Result<Sandbox, Error> {
        self.may_change()?;
        let (entry, node) = self.on_node(&caller.team, id)?;
        self.wanted(caller, &entry, Some(EventKind::PauseAsked), PAUSE);
        let epoch = self.nodes.epoch.get();
        match node.client.pause(epoch, &entry.id, or_stop, WAIT).await {
            Ok(sandbox) => Ok(self.changed(&entry, &node, PAUSE, sandbox).await),
            Err(error) => Err(self.unchanged(&entry, &node, PAUSE, error).await),
        }
    }

    /// Resumes a sandbox. A running one stays as it is.
    ///
    /// # Errors
    /// When there is none, it is neither paused nor running, or its node does not do it.
    pub async fn thaw(&self, caller: &Caller, id: &str) -> Result<Sandbox, Error> {
        self.may_change()?;
        let (entry, node) = self.on_node(&caller.team, id)?;
        self.wanted(caller, &entry, Some(EventKind::ResumeAsked), RESUME);
        let epoch = self.nodes.epoch.get();
        match node.client.resume(epoch, &entry.id, WAIT).await {
            Ok(sandbox) => Ok(self.changed(&entry, &node, RESUME, sandbox).await),
            Err(error) => Err(self.unchanged(&entry, &node, RESUME, error).await),
        }
    }
}
