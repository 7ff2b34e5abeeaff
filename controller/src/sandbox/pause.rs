//! Freezing a sandbox and thawing it again: its memory is kept.

use proto::{name::Team, sandbox::v1::Sandbox};

use super::{Error, Sandboxes, WAIT};

impl Sandboxes {
    /// Freezes it. A paused one stays as it is.
    ///
    /// # Errors
    /// FREEZE_FAILED when something in it does not freeze, unless it was to be stopped then; when
    /// there is none, it does not run, or its node does not do it.
    pub async fn pause(&self, team: &Team, id: &str, or_stop: bool) -> Result<Sandbox, Error> {
        self.may_change()?;
        let (entry, node) = self.on_node(team, id)?;
        let epoch = self.nodes.epoch.get();
        match node.client.pause(epoch, &entry.id, or_stop, WAIT).await {
            Ok(sandbox) => Ok(self.changed(&entry, &node, sandbox)),
            Err(error) => Err(self.of_node(&node, error)),
        }
    }

    /// Thaws it. A running one stays as it is.
    ///
    /// # Errors
    /// When there is none, it is neither paused nor running, or its node does not do it.
    pub async fn thaw(&self, team: &Team, id: &str) -> Result<Sandbox, Error> {
        self.may_change()?;
        let (entry, node) = self.on_node(team, id)?;
        let epoch = self.nodes.epoch.get();
        match node.client.resume(epoch, &entry.id, WAIT).await {
            Ok(sandbox) => Ok(self.changed(&entry, &node, sandbox)),
            Err(error) => Err(self.of_node(&node, error)),
        }
    }
}
