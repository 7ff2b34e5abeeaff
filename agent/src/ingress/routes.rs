//! Route table of the node: the agent's sandboxes, and the owners of all others.

use std::{net::IpAddr, sync::Arc};

use proto::{
    id::{SandboxId, SandboxRef, Vmid},
    name::Port,
};

use super::{Owner, Routes, State, Target, owner_resolver::Owners};
use crate::{
    journal::{Phase, Record},
    sandbox::{Known, Sandboxes, Tombstone, Wake},
};

#[derive(Debug)]
pub struct NodeRoutes {
    sandboxes: Arc<Sandboxes>,
    owners: Arc<Owners>,
}

impl NodeRoutes {
    /// Combines the sandboxes of this node with the owners of all others.
    pub fn new(sandboxes: Arc<Sandboxes>, owners: Arc<Owners>) -> Self {
        Self { sandboxes, owners }
    }
}

#[async_trait::async_trait]
impl Routes for NodeRoutes {
    fn local(&self, sandbox: SandboxRef) -> Option<Target> {
        Some(match self.sandboxes.known(&sandbox)? {
            Known::Live(record) => target(&record),
            Known::Ended(Tombstone { id, vmid, team, .. }) => {
                Target { id, vmid, team, state: State::Gone, ip: None, ports: Default::default() }
            }
        })
    }

    async fn owner(&self, sandbox: SandboxRef) -> Owner {
        self.owners.of(sandbox).await
    }

    fn used(&self, sandbox: &SandboxId) {
        self.sandboxes.used(sandbox);
    }

    async fn on_loopback(&self, vmid: Vmid, port: u16) -> bool {
        match Port::try_from(u32::from(port)) {
            Ok(port) => self.sandboxes.pve().listens_on_loopback(vmid, port).await,
            Err(_) => false,
        }
    }

    async fn wake(&self, sandbox: SandboxRef) {
        if let Err(error) = self.sandboxes.wake(&sandbox, Wake::Http).await {
            tracing::warn!(%sandbox, %error, "a request could not wake the sandbox");
        }
    }
}

fn target(record: &Record) -> Target {
    Target {
        id: record.id,
        vmid: record.vmid,
        team: record.team.clone(),
        state: match record.phase {
            Phase::Running => State::Running,
            Phase::Paused => State::Paused { wakes: record.wake_on.http },
            Phase::Creating | Phase::Starting => State::Booting,
            Phase::Stopping | Phase::Stopped => State::Stopped,
            Phase::Undoing | Phase::Failed | Phase::Deleting | Phase::Deleted => State::Gone,
        },
        ip: record.lease().map(IpAddr::V4),
        ports: record.services.values().copied().collect(),
    }
}
