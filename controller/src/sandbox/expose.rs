//! Exposes and hides ports.

use proto::{
    Reason,
    name::ServiceName,
    sandbox::v1::{EventKind, HttpService, Sandbox},
    spec,
};

use super::{Caller, Error, Sandboxes};

/// Events that the log attributes to the caller.
const EFFECTS: &[EventKind] = &[EventKind::Exposed, EventKind::Hidden];

impl Sandboxes {
    /// Exposes a port; returns the sandbox and the name of the service.
    ///
    /// # Errors
    /// When name or port are malformed or taken, or the sandbox's node does not do it.
    pub async fn expose(
        &self,
        caller: &Caller,
        id: &str,
        name: &str,
        port: u32,
    ) -> Result<(Sandbox, ServiceName), Error> {
        let (name, port) = spec::service(name, port)?;
        self.may_change()?;
        let (entry, node) = self.on_node(&caller.team, id)?;
        self.wanted(caller, &entry, None, EFFECTS);
        let epoch = self.nodes.epoch.get();
        match node.client.expose(epoch, &entry.id, &name, port).await {
            Ok(sandbox) => Ok((self.changed(&entry, &node, EFFECTS, sandbox).await, name)),
            Err(error) => Err(self.unchanged(&entry, &node, EFFECTS, error).await),
        }
    }

    /// Closes a port, at once and under all names. Returns the sandbox and the closed services.
    ///
    /// # Errors
    /// When there is no such service, or the sandbox's node does not do it.
    pub async fn hide(
        &self,
        caller: &Caller,
        id: &str,
        name: &str,
    ) -> Result<(Sandbox, Vec<HttpService>), Error> {
        let name: ServiceName = name.parse()?;
        self.may_change()?;
        let (entry, node) = self.on_node(&caller.team, id)?;
        self.wanted(caller, &entry, None, EFFECTS);
        let epoch = self.nodes.epoch.get();
        match node.client.hide(epoch, &entry.id, &name).await {
            Ok((sandbox, closed)) => {
                Ok((self.changed(&entry, &node, EFFECTS, sandbox).await, closed))
            }
            Err(error) => {
                let error = self.unchanged(&entry, &node, EFFECTS, error).await;
                if error.reason == Reason::ServiceNotFound {
                    let message = format!("{} has no service {name}", entry.id);
                    return Err(Error::new(Reason::ServiceNotFound, message));
                }
                Err(error)
            }
        }
    }
}
