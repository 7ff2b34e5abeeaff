//! What wakes a paused sandbox.

use proto::{
    id::Invalid,
    name::Team,
    sandbox::v1::{Sandbox, WakeOn},
};

use super::{Error, Sandboxes};

impl Sandboxes {
    /// Says what wakes it, from now on.
    ///
    /// # Errors
    /// When nothing is said, there is no such sandbox, or its node does not do it.
    pub async fn set_wake_on(
        &self,
        team: &Team,
        id: &str,
        wake_on: Option<WakeOn>,
    ) -> Result<Sandbox, Error> {
        let wake_on = wake_on.ok_or_else(|| Invalid::new("wake_on", "must be given"))?;
        self.may_change()?;
        let (entry, node) = self.on_node(team, id)?;
        let epoch = self.nodes.epoch.get();
        match node.client.set_wake_on(epoch, &entry.id, wake_on).await {
            Ok(sandbox) => Ok(self.changed(&entry, &node, sandbox)),
            Err(error) => Err(self.of_node(&node, error)),
        }
    }
}
