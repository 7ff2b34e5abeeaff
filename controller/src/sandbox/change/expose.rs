//! Exposes and hides ports.

use proto::{
    Reason,
    name::ServiceName,
    sandbox::v1::{EventKind, HttpService, Sandbox},
    spec,
};

use super::Change;
use crate::{
    node::Client,
    sandbox::{Caller, Error, Result, Sandboxes},
};

const EXPOSE: Change = Change { asked: None, effects: &[EventKind::Exposed], is_bounded: true };
const HIDE: Change = Change { asked: None, effects: &[EventKind::Hidden], is_bounded: false };

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
    ) -> Result<(Sandbox, ServiceName)> {
        let (name, port) = spec::service(name, port)?;
        let service = name.clone();
        let expose = |client: Client, epoch, id| async move {
            client.expose(epoch, &id, &service, port).await
        };
        Ok((self.change(caller, id, EXPOSE, expose).await?, name))
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
    ) -> Result<(Sandbox, Vec<HttpService>)> {
        let name: ServiceName = name.parse()?;
        let mut closed = Vec::new();
        let (service, services) = (&name, &mut closed);
        let hide = |client: Client, epoch, id| async move {
            let (sandbox, hidden) = client.hide(epoch, &id, service).await?;
            *services = hidden;
            Ok(sandbox)
        };
        let hidden = self.change(caller, id, HIDE, hide).await;
        let sandbox =
            hidden.map_err(|error| match (error.reason, self.find(&caller.team, id)) {
                (Reason::ServiceNotFound, Ok(entry)) => {
                    Error::new(error.reason, format!("{} has no service {name}", entry.id))
                }
                (_, _) => error,
            })?;
        Ok((sandbox, closed))
    }
}
