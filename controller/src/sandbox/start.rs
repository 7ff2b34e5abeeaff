//! Booting a stopped sandbox.

use proto::{name::Team, sandbox::v1::Sandbox};

use super::{Error, Sandboxes, WAIT};

impl Sandboxes {
    /// Boots it. A running one stays as it is; one that takes long is STARTING.
    ///
    /// # Errors
    /// When there is none, it is being created or deleted, or its node does not do it.
    pub async fn start(&self, team: &Team, id: &str) -> Result<Sandbox, Error> {
        self.may_change()?;
        let (entry, node) = self.on_node(team, id)?;
        let epoch = self.nodes.epoch.get();
        match node.client.start(epoch, &entry.id, WAIT).await {
            Ok(sandbox) => Ok(self.changed(&entry, &node, sandbox)),
            Err(error) => Err(self.of_node(&node, error)),
        }
    }
}
