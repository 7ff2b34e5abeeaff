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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ingress::owner_resolver::Sources,
        sandbox::tests::{LONG, Node, id, order},
    };

    fn port(number: u32) -> Port {
        Port::try_from(number).expect("a port")
    }

    #[tokio::test(start_paused = true)]
    async fn port_is_in_the_table_before_its_caller_has_an_answer() {
        let node = Node::new().await;
        let dir = tempfile::tempdir().expect("a directory");
        let sources = Sources {
            root: dir.path().to_owned(),
            memory: dir.path().join("owners"),
            peer_port: 8481,
        };
        let clock = Arc::clone(&node.clock) as Arc<dyn crate::clock::Clock>;
        let pve = node.cluster.node(&node.name);
        let owners = Arc::new(Owners::new(pve, clock, sources));
        let routes = NodeRoutes::new(Arc::clone(&node.sandboxes), owners);
        let mut wanted = order(1);
        wanted.spec.services.insert("web".parse().expect("a name"), port(80));
        let made = node.sandboxes.create(wanted, LONG).await.expect("made");
        let find = |name| routes.local(name).expect("it is known");
        for name in [SandboxRef::Id(id(1)), SandboxRef::Vmid(made.vmid)] {
            let target = find(name);
            assert_eq!((target.state, target.team), (State::Running, made.team.clone()));
            assert!(target.ip.is_some() && target.ports.contains(&port(80)));
        }
        let api = "api".parse().expect("a name");
        node.sandboxes.expose(&id(1), api, port(81)).await.expect("exposed");
        assert!(find(SandboxRef::Id(id(1))).ports.contains(&port(81)));
        node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
        assert_eq!(find(SandboxRef::Id(id(1))).state, State::Paused { wakes: true });
        routes.wake(SandboxRef::Id(id(1))).await;
        assert_eq!(find(SandboxRef::Id(id(1))).state, State::Running, "when the wake is over");
        node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
        assert_eq!(find(SandboxRef::Id(id(1))).state, State::Gone);
    }
}
