//! Stopping a sandbox: its disk is kept, its memory is not.

use proto::{name::Team, sandbox::v1::Sandbox};

use super::{Error, Sandboxes, WAIT};

impl Sandboxes {
    /// Stops it. A stopped one stays as it is; one that takes long is STOPPING.
    ///
    /// # Errors
    /// When there is none, it is being created or deleted, or its node does not do it.
    pub async fn stop(&self, team: &Team, id: &str) -> Result<Sandbox, Error> {
        self.may_change()?;
        let (entry, node) = self.on_node(team, id)?;
        let epoch = self.nodes.epoch.get();
        match node.client.stop(epoch, &entry.id, WAIT).await {
            Ok(sandbox) => Ok(self.changed(&entry, &node, sandbox)),
            Err(error) => Err(self.of_node(&node, error)),
        }
    }
}
