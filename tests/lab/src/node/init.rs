//! The init of a node, process 1 of its pid namespace: assembles the node step by step and then
//! keeps its services running.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::sethostname;

use super::root;
use crate::cgroup::{Hierarchies, enable_v2};
use crate::layout::{BOOT_ID, Layout, NODE_SERVICES, NODE_SOCKET, NodeId};
use crate::settings::Settings;
use crate::supervise::supervisor::{Place, Supervisor};
use crate::{lxcfs, net, way_out};

/// Path where the node sees its own cgroups.
const CGROUPS: &str = "/sys/fs/cgroup";
/// Path of its part of v1's `cpu`.
const CPU_V1: &str = "/run/lab/cgroup/cpu";

/// Assembles the node and runs its services. Returns when the services were told to end.
pub fn init(layout: &Layout, node: NodeId) -> Result<()> {
    let settings = Settings::load(layout)?;
    let cgroup = Hierarchies::open()?.node(node);
    // Connected now: the path does not exist after the change of the root.
    let ready = notify_socket()?;

    // The cgroups first: a new cgroup namespace takes the current ones as its root.
    cgroup.join("")?;
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWCGROUP,
    )
    .context("cannot make the node's namespaces")?;
    sethostname(node.name()).context("cannot set the host name")?;
    // Before the root changes: the link's other end is in a namespace named on the machine.
    net::link_node(node)?;
    if settings.way_out {
        way_out::open_node(node)?;
    }
    root::enter(layout, node, &cgroup)?;

    // Real nodes have their init there, and LXC uses it to find the root of the hierarchy.
    let scope = Path::new(CGROUPS).join("init.scope");
    fs::create_dir_all(&scope)?;
    fs::write(scope.join("cgroup.procs"), "0").context("cannot move into init.scope")?;
    enable_v2(Path::new(CGROUPS));
    let slice = Path::new(CGROUPS).join("system.slice");
    fs::create_dir_all(&slice)?;
    enable_v2(&slice);
    // Where the machine shares out its CPUs by v1, as `root::enter` has bound it.
    let v1 = Path::new(CPU_V1);
    let cpu_slice = if v1.is_dir() { v1.join("system.slice") } else { slice.clone() };

    files(node, &settings.node_ids())?;
    let place = Place {
        socket: PathBuf::from(NODE_SOCKET),
        services: PathBuf::from(NODE_SERVICES),
        slice: Some(slice),
        cpu_slice: Some(cpu_slice),
        bound: false,
    };
    let supervisor = Supervisor::start(place)?;
    if let Some(socket) = ready {
        socket.send(b"READY=1").context("cannot say that the node is up")?;
    }
    supervisor.run()
}

fn notify_socket() -> Result<Option<UnixDatagram>> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(None) };
    let socket = UnixDatagram::unbound()?;
    socket.connect(&path).with_context(|| format!("cannot connect to {}", path.display()))?;
    Ok(Some(socket))
}

/// Writes the files that differ on each node.
fn files(node: NodeId, all: &[NodeId]) -> Result<()> {
    let id = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    fs::write(BOOT_ID, id).context("cannot write the boot id")?;
    fs::write("/etc/hostname", format!("{node}\n"))?;
    let mut hosts = String::from("127.0.0.1 localhost\n::1 localhost\n");
    for other in all {
        hosts.push_str(&format!("{} {other}\n", other.ip()));
    }
    fs::write("/etc/hosts", hosts)?;
    lxcfs::configure_node()?;
    for dir in ["/run/lock/lxc", "/run/pve", "/var/log/pve/tasks", "/var/lib/lxc", "/var/lib/vz"] {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {dir}"))?;
    }
    Ok(())
}
