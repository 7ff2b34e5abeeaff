//! Takes a lab away: what runs, what is mounted, the cgroups, the network. Also what a crash left.

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

/// How long the supervisor may take: its services have ten seconds each, at the same time.
const END_WITHIN: Duration = Duration::from_secs(15);
const KILL_WITHIN: Duration = Duration::from_secs(10);

/// Stops the lab and takes everything away but the cache and the logs; with `keep`, also what the
/// next one goes on from.
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

/// Removes what a lab that has ended would go on from: the nodes' disks and /etc/pve, and with them
/// the controller, which would look for sandboxes that are no more.
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

/// Only one of `up` and `down` at a time. The lock goes with the value.
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

/// Ends and removes everything that runs or is mounted, whoever left it. Disks stay.
pub fn clean(layout: &Layout) -> Result<()> {
    if let Some(supervisor) = Proc::from_file(&layout.host_pid()) {
        // It may hang or be half up; then it is killed, and what it started dies with it.
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
            // Somebody stands in it; it goes when they leave.
            Err(Errno::EBUSY) => umount2(&at, MntFlags::MNT_DETACH),
            done => done,
        };
        done.with_context(|| format!("cannot unmount {}", at.display()))?;
    }
    Ok(())
}
