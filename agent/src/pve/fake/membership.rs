//! How a node stands to its cluster, and what is known of its containers while it cannot be asked.

use proto::{
    id::{SandboxId, Vmid},
    name::NodeName,
};

use super::{FakeCluster, FakePve, Op};
use crate::pve::{Error, known::Init};

/// How a node stands to its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Membership {
    /// A member, as corosync says.
    Member,
    /// A member whose pmxcfs was started while corosync is down: its `.members` is that of a node
    /// in no cluster.
    Unheard,
    /// In no cluster.
    Alone,
}

impl FakeCluster {
    /// Says how a node stands to its cluster.
    pub fn set_membership(&self, node: &NodeName, cluster: Membership) {
        if let Some(node) = self.0.world().nodes.get_mut(node) {
            node.cluster = cluster;
        }
    }

    /// Gives a node another number in its cluster.
    pub fn renumber(&self, node: &NodeName, number: u32) {
        if let Some(node) = self.0.world().nodes.get_mut(node) {
            node.number = number;
        }
    }
}

impl FakePve {
    /// The init that runs, as `/proc` would show it.
    pub(super) fn init(&self, vmid: Vmid) -> Option<Init> {
        let world = self.shared.world();
        let pid = world.container(&self.node, vmid)?.pid?;
        Some(Init { pid, start: 0 })
    }

    /// `Ok` while /etc/pve can be read, or where the container is known to be this owner's without.
    pub(super) fn check_known(&self, op: Op, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        let known = || self.known.mark(vmid, self.init(vmid));
        if self.pmxcfs() || known().is_some_and(|mark| mark.sandbox_id == *owner) {
            return Ok(());
        }
        Err(Self::read_error(op.name(), vmid))
    }
}
