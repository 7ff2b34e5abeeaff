//! Exposes and hides ports.

use proto::{
    Reason,
    name::ServiceName,
    sandbox::v1::{EventKind, ExposeHttpServiceRequest, HttpService, Sandbox},
    spec,
    visibility::Visibility,
};

use super::Change;
use crate::{
    node::{Client, Exposed},
    sandbox::{Caller, Error, Result, Sandboxes, exposure::can_guard},
};

const EXPOSE: Change = Change { asked: None, effects: &[EventKind::Exposed], is_bounded: true };
const HIDE: Change = Change { asked: None, effects: &[EventKind::Hidden], is_bounded: false };

impl Sandboxes {
    /// Exposes a port; returns the sandbox and the name of the service.
    ///
    /// # Errors
    /// When name, port or visibility are malformed, taken or not allowed, or the sandbox's node does not do it.
    pub async fn expose(
        &self,
        caller: &Caller,
        request: &ExposeHttpServiceRequest,
    ) -> Result<(Sandbox, ServiceName)> {
        let (name, port) = spec::service(&request.name, request.port)?;
        let wanted = Visibility::read(request.visibility, "visibility")?;
        let rules = &self.options.exposure;
        rules.check(port)?;
        let default = rules.default_of(port);
        if wanted.unwrap_or(default) != Visibility::Public {
            self.check_guards(caller, &request.id)?;
        }
        let service = Exposed { name: name.clone(), port, wanted, default };
        let expose =
            |client: Client, epoch, id| async move { client.expose(epoch, &id, &service).await };
        Ok((self.change(caller, &request.id, EXPOSE, expose).await?, name))
    }

    /// Checks that the sandbox's node knows of visibility.
    pub(super) fn check_guards(&self, caller: &Caller, id: &str) -> Result<()> {
        let entry = self.find(&caller.team, id)?;
        let node = entry.node.as_ref().and_then(|node| self.nodes.get(node));
        node.map_or(Ok(()), |node| can_guard(&node))
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
