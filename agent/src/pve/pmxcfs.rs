//! Names in pmxcfs, PVE's cluster file system.

use std::path::{Path, PathBuf};

use proto::{id::Vmid, name::NodeName};

/// Mount point of pmxcfs on every node of PVE.
pub const ROOT: &str = "/etc/pve";
/// File under the root that lists the nodes and names this one.
pub const MEMBERS: &str = ".members";
/// File under the root that lists the guests of all nodes.
pub const GUESTS: &str = ".vmlist";
/// File under the root that defines the storages.
pub const STORAGES: &str = "storage.cfg";

/// File under the root with the firewall of the cluster.
pub const FIREWALL: &str = "firewall/cluster.fw";

/// Path under the root of the firewall of one node.
pub fn host_firewall(node: &NodeName) -> PathBuf {
    Path::new("nodes").join(node.as_str()).join("host.fw")
}

/// Directory under the root with the configs of a node's containers.
pub fn configs(node: &NodeName) -> PathBuf {
    Path::new("nodes").join(node.as_str()).join("lxc")
}

/// Path under the root of a container's config.
pub fn config(node: &NodeName, vmid: Vmid) -> PathBuf {
    configs(node).join(format!("{vmid}.conf"))
}
