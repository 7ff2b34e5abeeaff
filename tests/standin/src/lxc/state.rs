//! State of a container: whether it runs, and the pid of its init.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::ctx::Ctx;
use crate::failure::{Failure, Result};
use crate::run::{PATH, output};
use crate::signals::{Woken, wait};

/// Interval of polling for a state that is not announced.
const LOOK: Duration = Duration::from_millis(5);

/// Prepares an LXC program for a container, with the right container directory.
pub(crate) fn program(ctx: &Ctx, name: &str, vmid: u32) -> Command {
    let mut command = Command::new(name);
    command.env("PATH", PATH).env_remove(crate::task::JOB).env_remove(crate::task::NAME);
    if ctx.roots.lxc_dir != Path::new("/var/lib/lxc") {
        command.arg("-P").arg(&ctx.roots.lxc_dir);
    }
    command.arg("-n").arg(vmid.to_string());
    command
}

fn command_socket(ctx: &Ctx, vmid: u32) -> String {
    format!("@{}/{vmid}/command", ctx.roots.lxc_dir.display())
}

/// Returns whether the container's monitor listens, which is the check of the real `pct`.
pub(crate) fn is_running(ctx: &Ctx, vmid: u32) -> bool {
    let name = command_socket(ctx, vmid);
    sockets().lines().any(|line| line.ends_with(&name))
}

/// Reads the list of unix sockets, for several checks at once.
pub(crate) fn sockets() -> String {
    fs::read_to_string("/proc/net/unix").unwrap_or_default()
}

/// Returns whether the container's monitor is in a list of sockets.
pub(crate) fn is_listed(ctx: &Ctx, sockets: &str, vmid: u32) -> bool {
    let name = command_socket(ctx, vmid);
    sockets.lines().any(|line| line.ends_with(&name))
}

/// Returns the pid of a running container's init.
pub(crate) fn init_pid(ctx: &Ctx, vmid: u32) -> Result<Option<u32>> {
    let mut command = program(ctx, "lxc-info", vmid);
    let said = output(ctx, command.args(["-p", "-H"]), Duration::from_secs(10))?;
    Ok(String::from_utf8_lossy(&said.stdout).trim().parse().ok())
}

/// Waits until the monitor has ended and cleaned up; returns false after the limit.
pub(crate) fn wait_stopped(ctx: &Ctx, vmid: u32, limit: Duration) -> Result<bool> {
    let deadline = Instant::now() + limit;
    while is_running(ctx, vmid) {
        if Instant::now() >= deadline {
            return Ok(false);
        }
        nap(ctx, LOOK)?;
    }
    Ok(true)
}

/// Sleeps, unless a signal comes.
pub(crate) fn nap(ctx: &Ctx, time: Duration) -> Result {
    match wait(ctx.signals(), &[], Some(Instant::now() + time)) {
        Woken::Timeout | Woken::Ready(_) => Ok(()),
        Woken::Signal => Err(Failure::interrupt("received interrupt")),
    }
}

/// Returns the cgroup of a container.
pub(crate) fn cgroup(ctx: &Ctx, vmid: u32) -> PathBuf {
    ctx.roots.cgroup.join("lxc").join(vmid.to_string())
}

/// Returns whether the outer cgroup is frozen; a snapshot hangs in this state.
pub(crate) fn is_frozen(ctx: &Ctx, vmid: u32) -> bool {
    let events = fs::read_to_string(cgroup(ctx, vmid).join("cgroup.events")).unwrap_or_default();
    events.lines().any(|line| line == "frozen 1")
}

fn hung_marker(ctx: &Ctx, vmid: u32) -> PathBuf {
    ctx.roots.control_dir.join("monitor-hung").join(vmid.to_string())
}

/// Hangs the monitor of a frozen container, as a snapshot does: the caller, and every later request
/// to that monitor, waits until somebody thaws the cgroup.
pub(crate) fn hang_monitor(ctx: &Ctx, vmid: u32) -> Result {
    let marker = hung_marker(ctx, vmid);
    if let Some(dir) = marker.parent() {
        fs::create_dir_all(dir).map_err(|e| Failure::io("create", dir, &e))?;
    }
    fs::write(&marker, "").map_err(|e| Failure::io("write", &marker, &e))?;
    wait_for_monitor(ctx, vmid)
}

/// Waits while the container's monitor hangs.
pub(crate) fn wait_for_monitor(ctx: &Ctx, vmid: u32) -> Result {
    let marker = hung_marker(ctx, vmid);
    while marker.exists() && is_frozen(ctx, vmid) {
        nap(ctx, LOOK * 10)?;
    }
    crate::failure::ignore(fs::remove_file(marker));
    Ok(())
}
