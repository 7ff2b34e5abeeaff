//! Paths of the lab, and names and addresses of its nodes.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::image::Image;

/// Network namespace that joins the nodes.
pub const NETNS: &str = "pve-lab";
/// Bridge in that namespace.
pub const BRIDGE: &str = "br-lab";
/// Address of the controller's side in that namespace.
pub const HUB_IP: &str = "10.99.0.254";
/// Name of the lab's cgroups on the machine.
pub const CGROUP: &str = "pve-lab";
/// Domain of the sandboxes' host names.
pub const DOMAIN: &str = "sandbox.localhost";
/// Largest number of nodes in a lab.
pub const NODES_MAX: u8 = 9;
/// File with the id of a node's boot: the kernel's own boot id is the machine's.
pub const BOOT_ID: &str = "/run/lab/boot_id";
/// Socket of a node's supervisor, inside the node.
pub const NODE_SOCKET: &str = "/run/lab/init.sock";
/// File with the list of a node's services, inside the node.
pub const NODE_SERVICES: &str = "/etc/lab/services.toml";
/// Directory of the logs of a node's services, inside the node.
pub const NODE_LOGS: &str = "/var/log/lab";

/// Number of a node, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeId(u8);

impl NodeId {
    /// Returns the first `count` nodes.
    pub fn first(count: u8) -> Vec<NodeId> {
        (1..=count.min(NODES_MAX)).map(NodeId).collect()
    }

    pub fn number(self) -> u8 {
        self.0
    }

    /// Returns the name, such as `node1`.
    pub fn name(self) -> String {
        format!("node{}", self.0)
    }

    /// Returns the address in the cluster's network.
    pub fn ip(self) -> String {
        format!("10.99.0.{}", self.0)
    }

    /// Returns the first three parts of the addresses of the node's containers.
    pub fn containers_net(self) -> String {
        format!("10.100.{}", self.0)
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

/// Paths below the lab's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    dir: PathBuf,
}

impl Layout {
    /// Returns the layout of the lab in `dir`, which must be absolute.
    pub fn new(dir: &Path) -> Layout {
        Layout { dir: dir.to_owned() }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Settings with which the lab was started.
    pub fn settings(&self) -> PathBuf {
        self.dir.join("lab.toml")
    }

    /// Lock that is held while the lab goes up or down.
    pub fn lock(&self) -> PathBuf {
        self.dir.join("lock")
    }

    /// The lab's own copy of its binary: a rebuild must not replace a running program.
    pub fn binary(&self) -> PathBuf {
        self.dir.join("bin/lab")
    }

    /// Directory that outlives the lab; it holds the templates.
    pub fn cache(&self) -> PathBuf {
        self.dir.join("cache")
    }

    /// Archive of a template's files.
    pub fn template_tar(&self, image: &Image) -> PathBuf {
        self.cache().join(format!("template-{}.tar", image.name))
    }

    /// Hash of the recipe from which a template was built.
    pub fn template_stamp(&self, image: &Image) -> PathBuf {
        self.cache().join(format!("template-{}.stamp", image.name))
    }

    /// Logs of the services on the machine, with one directory below for each node.
    pub fn logs(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// Logs of a node's services.
    pub fn node_logs(&self, node: NodeId) -> PathBuf {
        self.logs().join(node.name())
    }

    /// Sockets and pid files; empty while the lab is down.
    pub fn run(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// Marker of a lab that has come up completely: without it, the lab is started again.
    pub fn complete(&self) -> PathBuf {
        self.run().join("complete")
    }

    /// Socket of the supervisor on the machine.
    pub fn host_socket(&self) -> PathBuf {
        self.run().join("host.sock")
    }

    /// Pid file of the supervisor on the machine.
    pub fn host_pid(&self) -> PathBuf {
        self.run().join("host.pid")
    }

    /// List of the services on the machine.
    pub fn host_services(&self) -> PathBuf {
        self.run().join("services.toml")
    }

    /// Control socket of pmxcfs.
    pub fn pmxcfs_socket(&self) -> PathBuf {
        self.run().join("pmxcfs.sock")
    }

    /// Copy of /etc/pve on disk.
    pub fn pmxcfs_store(&self) -> PathBuf {
        self.dir.join("pmxcfs")
    }

    /// Mount points of cgroup hierarchies that the machine has not mounted.
    pub fn cgroups(&self) -> PathBuf {
        self.dir.join("cgroup")
    }

    /// Mount point of the files of /proc that show a sandbox's own limits.
    pub fn lxcfs(&self) -> PathBuf {
        self.dir.join("lxcfs")
    }

    pub fn nodes(&self) -> PathBuf {
        self.dir.join("nodes")
    }

    pub fn node(&self, node: NodeId) -> PathBuf {
        self.nodes().join(node.name())
    }

    /// Sparse image of a node's disk.
    pub fn disk_image(&self, node: NodeId) -> PathBuf {
        self.node(node).join("disk.img")
    }

    /// Mount point of that disk on the machine.
    pub fn disk(&self, node: NodeId) -> PathBuf {
        self.node(node).join("disk")
    }

    /// Directory where the node's root is assembled before the node changes into it.
    pub fn root(&self, node: NodeId) -> PathBuf {
        self.node(node).join("root")
    }

    /// Mount point of the node's /etc/pve on the machine.
    pub fn pve(&self, node: NodeId) -> PathBuf {
        self.node(node).join("pve")
    }

    /// Pid file of the node's init.
    pub fn node_pid(&self, node: NodeId) -> PathBuf {
        self.run().join(format!("{node}.pid"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::MINIMAL;

    #[test]
    fn node_names_are_parsed() {
        assert_eq!("node2".parse::<NodeId>(), Ok(NodeId(2)));
        assert_eq!("3".parse::<NodeId>(), Ok(NodeId(3)));
        for bad in ["node0", "node10", "pve1", "", "node", "node-1"] {
            assert!(bad.parse::<NodeId>().is_err(), "{bad}");
        }
        let node = NodeId::first(3)[2];
        assert_eq!((node.ip().as_str(), MINIMAL.vmid(node)), ("10.99.0.3", 9002));
    }
}
