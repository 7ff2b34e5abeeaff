//! Turns a container that pve-sandbox did not make into a sandbox.

use std::sync::Arc;

use futures_util::future::join_all;
use proto::{
    Reason,
    agent::v1::AdoptSandboxRequest,
    id::{Invalid, SandboxId, Vmid},
    name::Team,
    sandbox::v1::{self as wire, EventKind, Sandbox},
};

use crate::{
    node::{self, Node},
    sandbox::{Caller, Error, Result, Sandboxes, quota::can_keep_to},
};

impl Sandboxes {
    /// Adopts a container for a team. Also returns the volumes that a deletion will remove.
    ///
    /// # Errors
    /// When there is no such node or container, or it cannot be a sandbox.
    pub async fn adopt(
        self: &Arc<Self>,
        caller: &Caller,
        node: &str,
        (vmid, team): (u32, &str),
        dry_run: bool,
    ) -> Result<(Sandbox, Vec<String>)> {
        let (vmid, team) = (Vmid::try_from(vmid)?, team.parse::<Team>()?);
        if !dry_run {
            self.may_change()?;
        }
        let node = match node {
            "" => self.node_of(vmid, &team).await?,
            name => self.node(name)?,
        };
        let id = self.new_id(self.clock.now_ms());
        let order = self.order(id, vmid, &team, dry_run);
        if dry_run {
            let adopted = node.client.adopt(order).await;
            return adopted.map_err(|error| self.node_error(&node, error));
        }
        can_keep_to(&node, (&self.default_egress(&team)).into())?;
        let (this, caller) = (Arc::clone(self), caller.clone());
        let adopted = self.to_its_end(caller.permit.clone(), async move {
            this.operator_wants(&caller, EventKind::AdoptAsked, (id, team), &node);
            let adopted = node.client.adopt(order).await;
            let (sandbox, volumes) = adopted.map_err(|error| this.node_error(&node, error))?;
            this.nodes.apply(&node.name, sandbox.clone());
            this.log_flushed().await;
            Ok((this.view(&id).unwrap_or(sandbox), volumes))
        });
        adopted.await
    }

    /// Finds the node that has a container with this vmid.
    async fn node_of(&self, vmid: Vmid, team: &Team) -> Result<Arc<Node>> {
        let nodes = self.nodes.all();
        let up: Vec<_> = nodes.iter().filter(|node| node.down().is_none()).collect();
        let ask = |node: &&Arc<Node>| {
            let node = Arc::clone(node);
            let order = self.order(self.new_id(self.clock.now_ms()), vmid, team, true);
            async move { node.client.adopt(order).await }
        };
        let answers = join_all(up.iter().map(ask)).await;
        // A node that refuses for any other reason than SANDBOX_NOT_FOUND has the container.
        let has = |answer: &Result<_, node::Error>| match answer {
            Ok(_) => true,
            Err(error) => error.reason().is_some_and(|why| why != Reason::SandboxNotFound),
        };
        let mut having = up.iter().zip(&answers).filter(|(_, answer)| has(answer));
        match (having.next(), having.next()) {
            (Some((node, _)), None) => Ok(Arc::clone(node)),
            (Some((one, _)), Some((other, _))) => {
                let why = format!("{} and {} both have a container {vmid}", one.name, other.name);
                Err(Invalid::new("node", why).into())
            }
            (None, _) => {
                let why = format!("no node that answers has a container {vmid}");
                Err(Error::new(Reason::SandboxNotFound, why))
            }
        }
    }

    fn order(&self, id: SandboxId, vmid: Vmid, team: &Team, dry_run: bool) -> AdoptSandboxRequest {
        let egress = self.default_egress(team);
        AdoptSandboxRequest {
            epoch: self.nodes.epoch.get(),
            id: id.to_string(),
            vmid: vmid.get(),
            team: team.to_string(),
            dry_run,
            egress: wire::Egress::from(&egress).into(),
            egress_names: egress.names(),
        }
    }
}
