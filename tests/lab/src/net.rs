//! The network: one namespace with a bridge that joins the nodes, and two links for each node.
//! Nothing of it is in the machine's own namespace.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns};

use crate::layout::{BRIDGE, HUB_IP, NETNS, NodeId};
use crate::run::{run, run_command, run_line};

/// Returns the file that names the namespace.
pub fn netns_file() -> PathBuf {
    Path::new("/run/netns").join(NETNS)
}

/// Recreates the namespace and its bridge. `ip netns` finds it by its name, but `ip netns add`
/// is not used because it would leave its own mount behind.
pub fn make() -> Result<()> {
    remove()?;
    let file = netns_file();
    fs::create_dir_all(file.parent().unwrap_or(Path::new("/")))?;
    File::create(&file).context("cannot name the network namespace")?;
    run("unshare", [format!("--net={}", file.display()).as_str(), "true"])?;
    for line in [
        "link set lo up".to_owned(),
        format!("link add {BRIDGE} type bridge"),
        format!("addr add {HUB_IP}/24 dev {BRIDGE}"),
        format!("link set {BRIDGE} up"),
    ] {
        ip_in_lab(&line)?;
    }
    Ok(())
}

/// Removes the namespace, or only its name if a reboot removed the namespace.
pub fn remove() -> Result<()> {
    let file = netns_file();
    if !file.exists() {
        return Ok(());
    }
    match umount2(&file, MntFlags::MNT_DETACH) {
        // A plain file that is left from before a reboot.
        Ok(()) | Err(Errno::EINVAL) => {}
        Err(errno) => return Err(errno).context("cannot let go of the network namespace"),
    }
    fs::remove_file(&file).context("cannot remove the network namespace")
}

/// Links the node's namespace, in which this process is, to the other nodes and creates the bridge
/// for its containers.
pub fn link_node(node: NodeId) -> Result<()> {
    let (name, number) = (node.name(), node.number());
    // The link of the node's last boot may disappear slightly later than the node.
    drop(ip_in_lab(&format!("link del {name}")));
    for line in [
        "link set lo up".to_owned(),
        format!(
            "link add eth0 address 02:99:00:00:00:{number:02x} type veth peer name {name} netns {NETNS}"
        ),
        format!("addr add {}/24 dev eth0", node.ip()),
        "link set eth0 up".to_owned(),
        format!("link add vmbr0 address 02:64:00:00:00:{number:02x} type bridge"),
        format!("addr add {}.1/24 dev vmbr0", node.containers_net()),
        "link set vmbr0 up".to_owned(),
        format!("route add default via {HUB_IP}"),
    ] {
        run_line(&format!("ip {line}"))?;
    }
    ip_in_lab(&format!("link set {name} master {BRIDGE} up"))?;
    fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("cannot switch forwarding on")
}

/// Runs `ip` in the lab's namespace. `ip -n` does not work in a chroot: it needs `/` to be a mount.
pub fn ip_in_lab(line: &str) -> Result<String> {
    run_in_lab("ip", line.split_ascii_whitespace())
}

/// Runs a program in the lab's namespace.
#[expect(unsafe_code, reason = "what a child does to itself before exec goes through pre_exec")]
pub fn run_in_lab<'a>(program: &str, args: impl IntoIterator<Item = &'a str>) -> Result<String> {
    let netns = File::open(netns_file()).context("the lab's network is not there")?;
    let mut command = Command::new(program);
    command.args(args);
    // SAFETY: the only call in the child is a plain system call on a descriptor opened before.
    unsafe { command.pre_exec(move || Ok(setns(&netns, CloneFlags::CLONE_NEWNET)?)) };
    run_command(&mut command)
}
