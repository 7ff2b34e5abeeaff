//! Relation of a node to its cluster, and the owners known while pmxcfs cannot be read.

use proto::{
    id::{SandboxId, Vmid},
    name::NodeName,
};

use super::{FakeCluster, FakePve, Op};
use crate::pve::{Error, Init};

/// Relation of a node to its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Membership {
    /// Member, as corosync says.
    Member,
    /// Member whose pmxcfs was started while corosync was down: its `.members` is that of a node
    /// without a cluster.
    Unheard,
    /// Node without a cluster.
    Alone,
}

impl FakeCluster {
    /// Sets the relation of a node to its cluster.
    pub fn set_membership(&self, node: &NodeName, cluster: Membership) {
        if let Some(node) = self.0.world.lock().nodes.get_mut(node) {
            node.cluster = cluster;
        }
    }

    /// Changes a node's number in its cluster.
    pub fn renumber(&self, node: &NodeName, number: u32) {
        if let Some(node) = self.0.world.lock().nodes.get_mut(node) {
            node.number = number;
        }
    }
}

impl FakePve {
    /// Running init of a container, as `/proc` would show it.
    pub(super) fn init_of(&self, vmid: Vmid) -> Option<Init> {
        let world = self.shared.world.lock();
        let pid = world.container(&self.node, vmid)?.pid?;
        Some(init_with(pid))
    }

    /// `Ok` while /etc/pve can be read, or when the container is known to be this owner's.
    pub(super) fn check_known(&self, op: Op, vmid: Vmid, owner: &SandboxId) -> Result<(), Error> {
        let known = || self.known.mark(vmid, self.init_of(vmid));
        if self.pmxcfs() || known().is_some_and(|mark| mark.sandbox_id == *owner) {
            return Ok(());
        }
        Err(Self::read_error(op.operation(), Some(vmid)))
    }
}

/// Init with this pid. Each start of a container has another pid.
pub(super) fn init_with(pid: u32) -> Init {
    Init { pid, start: pid.into() }
}
