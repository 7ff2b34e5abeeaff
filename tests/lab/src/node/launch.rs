//! Launches a node and stays until it ends, as the process on the machine that stands for it.
//! Killing this process is a power cut, because the node's init is bound to it.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use crate::cgroup::Hierarchies;
use crate::layout::{Layout, NodeId};
use crate::process::Proc;
use crate::settings::Settings;

/// Creates the node's cgroups, starts its init in a new pid namespace and waits for its end.
#[expect(unsafe_code, reason = "what a child does to itself before exec goes through pre_exec")]
pub fn launch(layout: &Layout, node: NodeId) -> Result<i32> {
    let settings = Settings::load(layout)?;
    let cgroup = Hierarchies::open()?.node(node);
    cgroup.wait_empty()?;
    for missed in cgroup.prepare(&settings.limits)? {
        eprintln!("{node}: a limit could not be set: {missed}");
    }
    // Only for children: the first one becomes the init of the new namespace.
    unshare(CloneFlags::CLONE_NEWPID).context("cannot make a pid namespace")?;
    let mut init = Command::new("/proc/self/exe");
    init.arg0("lab").arg("--lab-dir").arg(layout.dir()).arg("node-init").arg(node.name());
    // SAFETY: the only call in the child is a plain system call.
    unsafe { init.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?)) };
    let mut child = init.spawn().context("cannot start the node's init")?;
    let pid = child.id().cast_signed();
    let file = layout.node_pid(node);
    Proc::of(pid).context("the node's init ended at once")?.write(&file)?;
    let status = child.wait().context("cannot wait for the node's init")?;
    std::fs::remove_file(&file).context("cannot remove the pid file")?;
    eprintln!("{node}: its init ended ({status})");
    Ok(status.code().unwrap_or(1))
}
