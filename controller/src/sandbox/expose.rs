//! Opening and closing ports.

use proto::{
    name::{ServiceName, Team},
    reason,
    sandbox::v1::Sandbox,
    spec,
};

use super::{Error, Sandboxes};

impl Sandboxes {
    /// Opens a port; returns the sandbox and the name of the service.
    ///
    /// # Errors
    /// When name or port are malformed or taken, or the sandbox's node does not do it.
    pub async fn expose(
        &self,
        team: &Team,
        id: &str,
        name: &str,
        port: u32,
    ) -> Result<(Sandbox, ServiceName), Error> {
        let (name, port) = spec::service(name, port)?;
        self.may_change()?;
        let (entry, node) = self.on_node(team, id)?;
        let epoch = self.nodes.epoch.get();
        match node.client.expose(epoch, &entry.id, &name, port).await {
            Ok(sandbox) => Ok((self.changed(&entry, &node, sandbox), name)),
            Err(error) => Err(self.of_node(&node, error)),
        }
    }

    /// Closes a port, at once.
    ///
    /// # Errors
    /// When there is no such service, or the sandbox's node does not do it.
    pub async fn hide(&self, team: &Team, id: &str, name: &str) -> Result<Sandbox, Error> {
        let name: ServiceName = name.parse()?;
        self.may_change()?;
        let (entry, node) = self.on_node(team, id)?;
        let epoch = self.nodes.epoch.get();
        match node.client.hide(epoch, &entry.id, &name).await {
            Ok(sandbox) => Ok(self.changed(&entry, &node, sandbox)),
            Err(error) => {
                let error = self.of_node(&node, error);
                if error.reason == reason::SERVICE_NOT_FOUND {
                    let message = format!("{} has no service {name}", entry.id);
                    return Err(Error::new(reason::SERVICE_NOT_FOUND, message));
                }
                Err(error)
            }
        }
    }
}
