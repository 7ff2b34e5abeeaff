//! Where the lab keeps what, and what its nodes are called.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The network namespace that joins the nodes.
pub const NETNS: &str = "pve-lab";
/// The bridge in it.
pub const BRIDGE: &str = "br-lab";
/// The address of the controller's side in it.
pub const HUB_IP: &str = "10.99.0.254";
/// The name under which cgroups of the lab stand on the machine.
pub const CGROUP: &str = "pve-lab";
/// The domain of the sandboxes' host names.
pub const DOMAIN: &str = "sandbox.localhost";
/// The most nodes that a lab has.
pub const NODES_MAX: u8 = 9;
/// Where the id of a node's boot stands: the kernel's own is the machine's.
pub const BOOT_ID: &str = "/run/lab/boot_id";
/// Where a node's supervisor listens, inside the node.
pub const NODE_SOCKET: &str = "/run/lab/init.sock";
/// Where a node keeps the list of its services.
pub const NODE_SERVICES: &str = "/etc/lab/services.toml";
/// Where a node's services log, inside the node.
pub const NODE_LOGS: &str = "/var/log/lab";

/// The number of a node, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeId(u8);

impl NodeId {
    /// The first `count` nodes.
    pub fn first(count: u8) -> Vec<NodeId> {
        (1..=count.min(NODES_MAX)).map(NodeId).collect()
    }

    /// The number.
    pub fn number(self) -> u8 {
        self.0
    }

    /// `node1`.
    pub fn name(self) -> String {
        format!("node{}", self.0)
    }

    /// Its address in the cluster's network.
    pub fn ip(self) -> String {
        format!("10.99.0.{}", self.0)
    }

    /// The first three parts of its containers' addresses.
    pub fn containers_net(self) -> String {
        format!("10.100.{}", self.0)
    }

    /// The number of its Debian template.
    pub fn template_vmid(self) -> u32 {
        8999 + u32::from(self.0)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node{}", self.0)
    }
}

impl FromStr for NodeId {
    type Err = String;

    fn from_str(text: &str) -> Result<NodeId, String> {
        text.strip_prefix("node")
            .unwrap_or(text)
            .parse()
            .ok()
            .filter(|number| (1..=NODES_MAX).contains(number))
            .map(NodeId)
            .ok_or_else(|| format!("{text} is no node: they are called node1, node2, ..."))
    }
}

/// The lab's directory and the places in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    dir: PathBuf,
}

impl Layout {
    /// The lab in `dir`, which must be absolute.
    pub fn new(dir: &Path) -> Layout {
        Layout { dir: dir.to_owned() }
    }

    /// The lab's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the lab was started with.
    pub fn settings(&self) -> PathBuf {
        self.dir.join("lab.toml")
    }

    /// Held while the lab goes up or down.
    pub fn lock(&self) -> PathBuf {
        self.dir.join("lock")
    }

    /// The lab's own copy of its binary: a rebuild must not pull it from under what runs.
    pub fn binary(&self) -> PathBuf {
        self.dir.join("bin/lab")
    }

    /// What outlives the lab: the template.
    pub fn cache(&self) -> PathBuf {
        self.dir.join("cache")
    }

    /// The template's files.
    pub fn template_tar(&self) -> PathBuf {
        self.cache().join("debian-template.tar")
    }

    /// Of which recipe the template was made.
    pub fn template_stamp(&self) -> PathBuf {
        self.cache().join("debian-template.stamp")
    }

    /// The logs of what runs on the machine; a node's are in a directory of its name below.
    pub fn logs(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// The logs of a node's services.
    pub fn node_logs(&self, node: NodeId) -> PathBuf {
        self.logs().join(node.name())
    }

    /// Sockets and pid files; empty when the lab is down.
    pub fn run(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// There once the lab has come up as a whole: one that broke on its way is started anew.
    pub fn complete(&self) -> PathBuf {
        self.run().join("complete")
    }

    /// Where the supervisor on the machine listens.
    pub fn host_socket(&self) -> PathBuf {
        self.run().join("host.sock")
    }

    /// The process of the supervisor on the machine.
    pub fn host_pid(&self) -> PathBuf {
        self.run().join("host.pid")
    }

    /// The services on the machine.
    pub fn host_services(&self) -> PathBuf {
        self.run().join("services.toml")
    }

    /// Where pmxcfs takes orders.
    pub fn pmxcfs_socket(&self) -> PathBuf {
        self.run().join("pmxcfs.sock")
    }

    /// The copy of /etc/pve on disk.
    pub fn pmxcfs_store(&self) -> PathBuf {
        self.dir.join("pmxcfs")
    }

    /// Where cgroup hierarchies are mounted that the machine has not mounted.
    pub fn cgroups(&self) -> PathBuf {
        self.dir.join("cgroup")
    }

    /// All nodes' directories.
    pub fn nodes(&self) -> PathBuf {
        self.dir.join("nodes")
    }

    /// A node's directory.
    pub fn node(&self, node: NodeId) -> PathBuf {
        self.nodes().join(node.name())
    }

    /// A node's disk, sparse.
    pub fn disk_image(&self, node: NodeId) -> PathBuf {
        self.node(node).join("disk.img")
    }

    /// Where that disk is mounted on the machine.
    pub fn disk(&self, node: NodeId) -> PathBuf {
        self.node(node).join("disk")
    }

    /// Where the node's root is put together before the node changes into it.
    pub fn root(&self, node: NodeId) -> PathBuf {
        self.node(node).join("root")
    }

    /// Where the node's /etc/pve is mounted on the machine.
    pub fn pve(&self, node: NodeId) -> PathBuf {
        self.node(node).join("pve")
    }

    /// The node's init.
    pub fn node_pid(&self, node: NodeId) -> PathBuf {
        self.run().join(format!("{node}.pid"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_nodes() {
        assert_eq!("node2".parse::<NodeId>(), Ok(NodeId(2)));
        assert_eq!("3".parse::<NodeId>(), Ok(NodeId(3)));
        for bad in ["node0", "node10", "pve1", "", "node", "node-1"] {
            assert!(bad.parse::<NodeId>().is_err(), "{bad}");
        }
        let node = NodeId::first(3)[2];
        assert_eq!((node.ip().as_str(), node.template_vmid()), ("10.99.0.3", 9002));
    }
}
