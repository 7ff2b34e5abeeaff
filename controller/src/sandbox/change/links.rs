//! Makes credentials for open ports, and makes those of a port void. The sandbox's node signs and checks them:
//! no controller can, and none is needed for that.

use std::sync::Arc;

use proto::{
    agent::v1 as agent,
    duration,
    id::{Invalid, SandboxId},
    name::Port,
    sandbox::v1::{AccessKind, CreateAccessLinkRequest, RevokeAccessRequest, Sandbox},
};

use super::Change;
use crate::{
    node::SandboxCalls,
    sandbox::{Caller, Result, Sandboxes},
};

const LINK: Change = Change { asked: None, effects: &[], is_bounded: true };
const REVOKE: Change = Change { asked: None, effects: &[], is_bounded: false };

impl Sandboxes {
    /// Makes a credential for an open port, in the name of the caller's user. Returns the sandbox, and what its
    /// node answered.
    ///
    /// # Errors
    /// When there is no such service, it takes no such credential, or the sandbox's node does not do it.
    pub async fn create_access_link(
        self: &Arc<Self>,
        caller: &Caller,
        request: &CreateAccessLinkRequest,
    ) -> Result<(Sandbox, agent::CreateAccessLinkResponse)> {
        AccessKind::try_from(request.kind)
            .map_err(|_| Invalid::new("kind", "must be LINK or TOKEN"))?;
        duration::check("ttl", request.ttl)?;
        self.check_guards(caller, &request.id)?;
        let (service, kind, ttl) = (request.service.clone(), request.kind, request.ttl);
        let user = caller.user.as_ref().map(ToString::to_string).unwrap_or_default();
        let link = move |calls: SandboxCalls, epoch, id: SandboxId| async move {
            let id = id.to_string();
            let wanted = agent::CreateAccessLinkRequest { epoch, id, service, kind, ttl, user };
            calls.create_access_link(wanted).await
        };
        self.change_with(caller, &request.id, LINK, link).await
    }

    /// Makes all credentials of a port void and cuts its connections. Returns the sandbox and the port.
    ///
    /// # Errors
    /// When there is no such service, or the sandbox's node does not do it.
    pub async fn revoke_access(
        self: &Arc<Self>,
        caller: &Caller,
        request: &RevokeAccessRequest,
    ) -> Result<(Sandbox, Port)> {
        self.check_guards(caller, &request.id)?;
        let service = request.service.clone();
        let revoke = move |calls: SandboxCalls, epoch, id| async move {
            calls.revoke_access(epoch, &id, service).await
        };
        let (sandbox, port) = self.change_with(caller, &request.id, REVOKE, revoke).await?;
        Ok((sandbox, Port::try_from(port)?))
    }
}
