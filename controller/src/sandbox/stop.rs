//! Stops a sandbox: its disk is kept, its memory is not.

use proto::sandbox::v1::{EventKind, Sandbox};

use super::{Caller, Error, Sandboxes, WAIT};

/// Events that the log attributes to the caller.
const EFFECTS: &[EventKind] = &[EventKind::Stopped];

impl Sandboxes {
    /// Stops a sandbox. A stopped one stays as it is; one that takes long is STOPPING.
    ///
    /// # Errors
    /// When there is none, it is being created or deleted, or its node does not do it.
    pub async fn stop(&self, caller: &Caller, id: &str) -> Result<Sandbox, Error> {
        self.may_change()?;
        let (entry, node) = self.on_node(&caller.team, id)?;
        self.wanted(caller, &entry, Some(EventKind::StopAsked), EFFECTS);
        let epoch = self.nodes.epoch.get();
        match node.client.stop(epoch, &entry.id, WAIT).await {
            Ok(sandbox) => Ok(self.changed(&entry, &node, EFFECTS, sandbox).await),
            Err(error) => Err(self.unchanged(&entry, &node, EFFECTS, error).await),
        }
    }
}
