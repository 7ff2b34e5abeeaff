//! Takes a lab down: its processes, mounts, cgroups and network, also after a crash.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;

use crate::cgroup::Hierarchies;
use crate::layout::{Layout, NodeId};
use crate::process::Proc;
use crate::progress::{say, step};
use crate::supervise::Services;
use crate::{mounts, net, owner};

/// Longest wait for the supervisor to end: its services have ten seconds each, in parallel.
const END_WITHIN: Duration = Duration::from_secs(15);
const KILL_WITHIN: Duration = Duration::from_secs(10);

/// Stops the lab and removes everything except the cache and the logs. With `keep`, the state that
/// the next lab continues from stays, too.
pub fn down(layout: &Layout, keep: bool) -> Result<()> {
    if !layout.dir().exists() {
        say("there is no lab");
        return Ok(());
    }
    let _held = lock(layout)?;
    step("stopping the lab", |_| {
        clean(layout)?;
        if keep { Ok(()) } else { forget(layout) }
    })
}

/// Removes the state that an ended lab would continue from: the nodes' disks, /etc/pve, and the
/// controller's data, because the controller would look for sandboxes that no longer exist.
pub fn forget(layout: &Layout) -> Result<()> {
    let env = layout.dir().join("env");
    if env.exists() {
        fs::remove_file(&env).with_context(|| format!("cannot remove {}", env.display()))?;
    }
    let controller = layout.dir().join("controller");
    for dir in [layout.nodes(), layout.pmxcfs_store(), controller] {
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
    }
    Ok(())
}

/// Locks the lab, so that only one `up` or `down` runs at a time. Dropping the value unlocks it.
pub fn lock(layout: &Layout) -> Result<Flock<File>> {
    fs::create_dir_all(layout.dir())?;
    let file = File::create(layout.lock()).context("cannot make the lock file")?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(held) => Ok(held),
        Err((_, Errno::EWOULDBLOCK)) => {
            anyhow::bail!("the lab is on its way up or down already ({})", layout.dir().display())
        }
        Err((_, errno)) => Err(errno).context("cannot take the lock"),
    }
}

/// Ends every process and removes every mount of the lab, whoever left it. Disks stay.
pub fn clean(layout: &Layout) -> Result<()> {
    if let Some(supervisor) = Proc::from_file(&layout.host_pid()) {
        // The supervisor may hang or be half up; then it is killed, and its children die with it.
        let asked = Services::at(&layout.host_socket()).end();
        if asked.is_err() || supervisor.wait_gone(END_WITHIN).is_err() {
            supervisor.signal(Signal::SIGKILL)?;
            supervisor.wait_gone(KILL_WITHIN)?;
        }
    }
    for node in NodeId::first(crate::layout::NODES_MAX) {
        if let Some(init) = Proc::from_file(&layout.node_pid(node)) {
            init.signal(Signal::SIGKILL)?;
            init.wait_gone(KILL_WITHIN)?;
        }
    }
    // Another lab's cgroups and network have the same names.
    if owner::other(layout).is_none() {
        let hierarchies = Hierarchies::ensure(layout)?;
        for node in NodeId::first(crate::layout::NODES_MAX) {
            hierarchies.node(node).wait_empty()?;
        }
        hierarchies.remove()?;
        net::remove()?;
    }
    unmount_below(layout.dir())?;
    match fs::remove_dir_all(layout.run()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context("cannot remove the pid files")
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

fn unmount_below(dir: &Path) -> Result<()> {
    for at in mounts::below(&mounts::here()?, dir) {
        let done = match umount2(&at, MntFlags::empty()) {
            // Still in use; a detached mount disappears when its last user leaves.
            Err(Errno::EBUSY) => umount2(&at, MntFlags::MNT_DETACH),
            done => done,
        };
        done.with_context(|| format!("cannot unmount {}", at.display()))?;
    }
    Ok(())
}
