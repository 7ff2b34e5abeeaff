//! Events that wake a paused sandbox.

use proto::{
    id::Invalid,
    sandbox::v1::{EventKind, Sandbox, WakeOn},
};

use super::{Caller, Error, Sandboxes};

/// Events that the log attributes to the caller.
const EFFECTS: &[EventKind] = &[EventKind::WakeOnSet];

impl Sandboxes {
    /// Sets the events that wake a sandbox.
    ///
    /// # Errors
    /// When `wake_on` is missing, there is no such sandbox, or its node does not do it.
    pub async fn set_wake_on(
        &self,
        caller: &Caller,
        id: &str,
        wake_on: Option<WakeOn>,
    ) -> Result<Sandbox, Error> {
        let wake_on = wake_on.ok_or_else(|| Invalid::new("wake_on", "must be given"))?;
        self.may_change()?;
        let (entry, node) = self.on_node(&caller.team, id)?;
        self.wanted(caller, &entry, None, EFFECTS);
        let epoch = self.nodes.epoch.get();
        match node.client.set_wake_on(epoch, &entry.id, wake_on).await {
            Ok(sandbox) => Ok(self.changed(&entry, &node, EFFECTS, sandbox).await),
            Err(error) => Err(self.unchanged(&entry, &node, EFFECTS, error).await),
        }
    }
}
