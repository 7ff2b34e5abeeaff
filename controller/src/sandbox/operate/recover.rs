//! Recovers a container that carries our mark and is in no journal: its node's journal was lost, or
//! an operator moved the container from another node.

use std::sync::Arc;

use proto::{
    id::{SandboxId, SandboxRef, Vmid},
    name::Team,
    sandbox::v1::{EventKind, Sandbox},
    spec::Egress,
};

use crate::{
    node::Node,
    sandbox::{Caller, Result, Sandboxes, quota::can_keep_to},
    store::Event,
};

impl Sandboxes {
    /// Recovers the container as the sandbox that it was. When another node still has the sandbox
    /// without its container, that node releases it first.
    ///
    /// # Errors
    /// When there is no such node, it or the other one does not answer, or one of them refuses.
    pub async fn recover(
        self: &Arc<Self>,
        caller: &Caller,
        node: &str,
        vmid: u32,
        dry_run: bool,
    ) -> Result<Sandbox> {
        let vmid = Vmid::try_from(vmid)?;
        if !dry_run {
            self.may_change()?;
        }
        let node = self.node(node)?;
        let epoch = self.nodes.epoch.get();
        let found = node.client.recover(epoch, (vmid.get(), None), true).await;
        let found = found.map_err(|error| self.node_error(&node, error))?;
        if dry_run {
            return Ok(found);
        }
        let (id, team): (SandboxId, Team) = (found.id.parse()?, found.team.parse()?);
        // A task of its own: what another node has released is recovered here.
        let (this, caller) = (Arc::clone(self), caller.clone());
        let recovered = self.to_its_end(caller.permit.clone(), async move {
            this.operator_wants(&caller, EventKind::RecoverAsked, (id, team.clone()), &node);
            let egress = this.egress_before(&id, &team);
            can_keep_to(&node, (&egress).into())?;
            this.release_elsewhere(&id, &node).await?;
            let recovered = node.client.recover(epoch, (vmid.get(), Some(&egress)), false).await;
            let sandbox = recovered.map_err(|error| this.node_error(&node, error))?;
            this.nodes.apply(&node.name, sandbox.clone());
            this.log_flushed().await;
            Ok(this.view(&id).unwrap_or(sandbox))
        });
        recovered.await
    }

    /// Returns what a sandbox reached when it was last seen; without that, what a new one would.
    /// A value of a later version reads as none.
    fn egress_before(&self, id: &SandboxId, team: &Team) -> Egress {
        let entry = self.nodes.cache.get(&SandboxRef::Id(*id));
        let known = entry.and_then(|entry| {
            let (value, names) = (entry.sandbox.egress, &entry.sandbox.egress_names);
            Egress::read(value, names, "egress").unwrap_or(Some(Egress::None))
        });
        known.unwrap_or_else(|| self.default_egress(team))
    }

    async fn release_elsewhere(&self, id: &SandboxId, node: &Node) -> Result<()> {
        let entry = self.nodes.cache.get(&SandboxRef::Id(*id));
        let elsewhere = entry.filter(|entry| !entry.ended() && !entry.lost);
        let Some(entry) = elsewhere.filter(|entry| entry.node.as_ref() != Some(&node.name)) else {
            return Ok(());
        };
        let before = self.reachable(&entry)?;
        let epoch = self.nodes.epoch.get();
        let released = before.client.release(epoch, id, None).await;
        let released = released.map_err(|error| self.node_error(&before, error))?;
        self.nodes.apply(&before.name, released);
        Ok(())
    }

    /// Logs an operator's request before it is carried out.
    pub(super) fn operator_wants(
        &self,
        caller: &Caller,
        kind: EventKind,
        (id, team): (SandboxId, Team),
        node: &Node,
    ) {
        self.log().append(Event {
            sandbox: Some(id),
            team: Some(team),
            node: Some(node.name.clone()),
            ..self.log().event(kind, &caller.token)
        });
    }
}
