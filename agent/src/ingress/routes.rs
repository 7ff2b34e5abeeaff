//! Route table of the node: the agent's sandboxes, and the owners of all others.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use proto::{
    host::{self, FullName},
    id::{SandboxId, SandboxRef, Vmid},
    name::Port,
};

use super::{OpenPort, Owner, Routes, State, Target, owner_resolver::OwnerResolver};
use crate::{
    journal::{GuardedPort, Phase, Record},
    name_directory::NameDirectory,
    sandbox::{Known, Sandboxes, Tombstone, Wake},
};

/// Routes by the sandboxes of this node, and by the owners and names of all others.
#[derive(Debug)]
pub struct NodeRoutes {
    sandboxes: Arc<Sandboxes>,
    owners: Arc<OwnerResolver>,
    names: Arc<NameDirectory>,
}

impl NodeRoutes {
    /// Combines the sandboxes of this node with the owners and the names of all others.
    pub fn new(
        sandboxes: Arc<Sandboxes>,
        owners: Arc<OwnerResolver>,
        names: Arc<NameDirectory>,
    ) -> Self {
        Self { sandboxes, owners, names }
    }
}

#[async_trait::async_trait]
impl Routes for NodeRoutes {
    fn local(&self, sandbox: SandboxRef) -> Option<Target> {
        Some(match self.sandboxes.known(&sandbox)? {
            Known::Live(record) => target(&record),
            // It lives on the node that took it over, or that node says when it was deleted.
            Known::Ended(Tombstone { moved: true, .. }) => return None,
            Known::Ended(Tombstone { id, vmid, team, .. }) => Target {
                id,
                vmid,
                team,
                name: None,
                state: State::Gone,
                ip: None,
                ports: Default::default(),
                main: None,
                key: None,
            },
        })
    }

    fn named(&self, name: &FullName) -> Option<SandboxId> {
        if !self.names.is_enabled() {
            return None;
        }
        // A record of this node is newer than what the controller told.
        self.sandboxes.named(name).or_else(|| self.names.find(name))
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
        name: record.name.as_ref().and_then(|name| FullName::new(&record.team, name)),
        state: match record.phase {
            Phase::Running => State::Running,
            Phase::Paused => State::Paused { wakes: record.wake_on.http },
            Phase::Creating | Phase::Starting => State::Booting,
            Phase::Stopping | Phase::Stopped => State::Stopped,
            Phase::Undoing | Phase::Failed | Phase::Deleting | Phase::Deleted => State::Gone,
        },
        ip: record.lease().map(IpAddr::V4),
        ports: ports(record),
        main: main_port(record),
        key: record.access.key,
    }
}

fn ports(record: &Record) -> BTreeMap<Port, OpenPort> {
    let public = record.services.values().map(|port| (*port, OpenPort::PUBLIC));
    let guarded = record.access.ports.iter().map(|(port, guarded)| {
        let GuardedPort { visibility, generation, names: _ } = guarded;
        (*port, OpenPort { visibility: *visibility, generation: *generation })
    });
    // A guarded port stays so, whatever an older version wrote beside it.
    public.chain(guarded).collect()
}

fn main_port(record: &Record) -> Option<Port> {
    let public = record.services.iter().map(|(name, port)| (name.as_str(), *port));
    let guarded = record
        .access
        .ports
        .iter()
        .flat_map(|(port, guarded)| guarded.names.iter().map(|name| (name.as_str(), *port)));
    // As in `Record::port_named`: of two with one name, the guarded port counts.
    host::main_port(guarded.chain(public))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use proto::{name::ServiceName, visibility::Visibility};

    use crate::{
        ingress::owner_resolver::Sources,
        name_directory::Update,
        sandbox::access::expose::Reach,
        sandbox::tests::{LONG, Node, id, order},
    };

    fn port(number: u32) -> Port {
        Port::try_from(number).expect("a port")
    }

    #[test]
    fn of_a_public_and_a_guarded_main_port_the_guarded_one_counts() {
        let name: ServiceName = "main".parse().expect("a name");
        let mut record = Record {
            services: [(name.clone(), port(81))].into(),
            ..crate::journal::conformance::record(1)
        };
        assert_eq!(main_port(&record), Some(port(81)));
        let names = [name.clone()].into();
        let guarded = GuardedPort { visibility: Visibility::Team, generation: 1, names };
        record.access.ports.insert(port(80), guarded);
        assert_eq!(main_port(&record), Some(port(80)));
        assert_eq!(main_port(&record), record.port_named(&name));
    }

    fn routes(node: &Node, dir: &Path) -> (NodeRoutes, Arc<NameDirectory>) {
        let sources = Sources { root: dir.to_owned(), memory: dir.join("owners"), peer_port: 8481 };
        let clock = Arc::clone(&node.clock) as Arc<dyn crate::clock::Clock>;
        let pve = node.cluster.node(&node.name);
        let owners = Arc::new(OwnerResolver::new(pve, clock, sources));
        let names = Arc::new(NameDirectory::load(dir.join("names")));
        (NodeRoutes::new(Arc::clone(&node.sandboxes), owners, Arc::clone(&names)), names)
    }

    /// The node that it left answered 410 for a sandbox that lives elsewhere.
    #[tokio::test(start_paused = true)]
    async fn sandbox_that_moved_away_is_looked_for_on_its_new_node() {
        let (node, dir) = (Node::new().await, tempfile::tempdir().expect("a directory"));
        let (routes, _names) = routes(&node, dir.path());
        let made = node.sandboxes.create(order(1), LONG).await.expect("made");
        node.sandboxes.stop(&id(1), LONG).await.expect("stopped");
        node.cluster.migrate(made.vmid, &node.other());
        node.sandboxes.forget_moved(&id(1), &node.other(), LONG).await.expect("forgotten");
        for name in [SandboxRef::Id(id(1)), SandboxRef::Vmid(made.vmid)] {
            assert_eq!(routes.local(name), None);
        }
        let owner = routes.owner(SandboxRef::Vmid(made.vmid)).await;
        assert!(matches!(owner, Owner::Peer(_)), "{owner:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn port_is_in_the_table_before_its_caller_has_an_answer() {
        let (node, dir) = (Node::new().await, tempfile::tempdir().expect("a directory"));
        let (routes, names) = routes(&node, dir.path());
        let mut wanted = order(1);
        wanted.spec.name = Some("box".parse().expect("a name"));
        wanted.spec.services.insert("web".parse().expect("a name"), port(80));
        let made = node.sandboxes.create(wanted, LONG).await.expect("made");
        let find = |name| routes.local(name).expect("it is known");
        for name in [SandboxRef::Id(id(1)), SandboxRef::Vmid(made.vmid)] {
            let target = find(name);
            assert_eq!((target.state, target.team), (State::Running, made.team.clone()));
            assert!(target.ip.is_some() && target.ports.contains_key(&port(80)));
        }
        let api = "api".parse().expect("a name");
        let reach = Reach { wanted: None, default: Visibility::Public };
        node.sandboxes.expose(&id(1), api, port(81), reach).await.expect("exposed");
        assert!(find(SandboxRef::Id(id(1))).ports.contains_key(&port(81)));
        assert_eq!(find(SandboxRef::Id(id(1))).main, None, "there are two");
        let named = |name: &str| routes.named(&name.parse().expect("a name"));
        let own = format!("box--{}", made.team);
        assert_eq!(named(&own), None, "names are not enabled");
        let elsewhere = "far--red".parse().expect("a name");
        let set = [(elsewhere, id(7))].into();
        names.apply(&Update { is_enabled: true, set, ..Update::default() }).expect("told");
        assert_eq!((named(&own), named("far--red")), (Some(id(1)), Some(id(7))));
        assert_eq!(find(SandboxRef::Id(id(1))).name, own.parse().ok());
        node.sandboxes.pause(&id(1), false, LONG).await.expect("paused");
        assert_eq!(find(SandboxRef::Id(id(1))).state, State::Paused { wakes: true });
        routes.wake(SandboxRef::Id(id(1))).await;
        assert_eq!(find(SandboxRef::Id(id(1))).state, State::Running, "when the wake is over");
        node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
        assert_eq!(find(SandboxRef::Id(id(1))).state, State::Gone);
    }
}
