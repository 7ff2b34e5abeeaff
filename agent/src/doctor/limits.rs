//! Judges what keeps a sandbox from using up what all share: processes, disks, connections. Pure.

use daemon::doctor::Check;

use super::facts::Node;
use crate::config::Config;

/// Storages whose volumes have no block device.
const WITHOUT_DEVICES: &str = "zfspool";

pub(super) fn check(config: &Config, node: &Node) -> Vec<Check> {
    let limits = &config.limits;
    let io =
        [limits.io_read_mibps, limits.io_write_mibps, limits.io_read_iops, limits.io_write_iops];
    let limits_io = io.iter().any(|limit| *limit > 0);
    let mut found = Vec::new();
    if !node.limits.processes {
        found.push(controller("pids", "the processes of sandboxes are not limited"));
    }
    if limits_io && !node.limits.io {
        found.push(controller("io", "reads and writes of sandboxes are not limited"));
    }
    if config.isolation.enabled && node.limits.connections == Some(false) {
        let what = "the kernel cannot count connections (nft_connlimit): sandboxes are not kept from filling \
                    the node's table of connections";
        found.push(Check::warning("limits", "limits.connections", what, "modprobe nft_connlimit"));
    }
    let unlimited = node
        .storages
        .iter()
        .filter(|storage| storage.has_template && storage.kind.as_deref() == Some(WITHOUT_DEVICES));
    if limits_io && node.limits.io {
        found.extend(unlimited.map(|storage| {
            Check::warning(
                "limits",
                format!("storage {}", storage.name),
                "ZFS has no block devices that the kernel could limit: reads and writes of sandboxes are not limited",
                "put the template on another type of storage; or set the four limits.io_* to 0 in agent.toml",
            )
        }));
    }
    if found.is_empty() {
        let what = "what sandboxes use of the kernel and the disks is limited as agent.toml says";
        found.push(Check::ok("limits", "", what));
    }
    found
}

fn controller(name: &str, what: &str) -> Check {
    Check::warning(
        "limits",
        format!("cgroup controller {name}"),
        format!("not there: {what}"),
        "take cgroup_disable= and systemd.unified_cgroup_hierarchy= out of the kernel's command line \
         (/proc/cmdline), and reboot",
    )
}
