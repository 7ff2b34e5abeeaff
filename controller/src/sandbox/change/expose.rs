//! Exposes and hides ports.

use proto::{
    Reason,
    id::SandboxId,
    name::ServiceName,
    sandbox::v1::{EventKind, ExposeHttpServiceRequest, HttpService, Sandbox},
    spec,
    visibility::Visibility,
};

use super::Change;
use crate::{
    node::{self, Client, Exposed},
    sandbox::{
        Caller, Error, Result, Sandboxes,
        exposure::{can_guard, is_too_open},
    },
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
        let is_guarded = wanted.unwrap_or(default) != Visibility::Public;
        if is_guarded {
            self.check_guards(caller, &request.id)?;
        }
        let service = Exposed { name: name.clone(), port, wanted, default };
        let expose = |client: Client, epoch: u64, id: SandboxId| async move {
            let sandbox = client.expose(epoch, &id, &service).await?;
            if is_guarded && is_too_open(&sandbox, port, wanted) {
                return Err(close_again(&client, epoch, &id, &service).await);
            }
            Ok(sandbox)
        };
        Ok((self.change(caller, &request.id, EXPOSE, expose).await?, name))
    }

    /// Checks that the sandbox can be changed, and that its node knows of visibility.
    pub(super) fn check_guards(&self, caller: &Caller, id: &str) -> Result<()> {
        self.may_change()?;
        let (_, node) = self.on_node(&caller.team, id)?;
        can_guard(&node)
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

/// Closes a port that its node has opened to everybody, though fewer were asked for: its agent was replaced by an
/// older one, and this was not noticed before. Returns the error of the call.
async fn close_again(
    client: &Client,
    epoch: u64,
    id: &SandboxId,
    service: &Exposed,
) -> node::Error {
    let Exposed { name, port, .. } = service;
    let now = match client.hide(epoch, id, name).await {
        Ok(_) => format!("port {port} is closed again"),
        Err(error) => {
            tracing::error!(sandbox = %id, %port, %error, "a port that is open to everybody was not closed");
            format!("port {port} may be open to everybody; hide {name} ({error})")
        }
    };
    node::Error::Refused {
        reason: Reason::VisibilityUnsupported,
        message: format!(
            "the agent is too old: every open port there is public; {now}. Upgrade the agent, or expose the \
             port as public"
        ),
        retry_after: None,
        files_written: None,
    }
}
