//! Starting and stopping through LXC's own programs.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::{config, state};
use crate::ctx::Ctx;
use crate::failure::{Failure, Result, ignore};
use crate::run::{self, wait_child};
use crate::signals::Woken;

/// Longest start: the mount of a file system that was not cleanly unmounted may wait 44 s.
const START_LIMIT: Duration = Duration::from_secs(95);
/// Longest wait for a container's pid.
const PID_LIMIT: Duration = Duration::from_secs(10);
const STOP_LIMIT: Duration = Duration::from_secs(60);

fn log_path(ctx: &Ctx, vmid: u32) -> PathBuf {
    ctx.roots.run_pve.join(format!("ct-{vmid}.log"))
}

/// Starts a container and waits until it runs.
pub(crate) fn start(ctx: &Ctx, vmid: u32, skip_lock: bool) -> Result {
    let dir = &ctx.roots.run_pve;
    fs::create_dir_all(dir).map_err(|e| Failure::io("create", dir, &e))?;
    let log = log_path(ctx, vmid);
    ignore(fs::remove_file(&log));
    let mut command = state::program(ctx, "lxc-start", vmid);
    command.args(["-d", "-l", "INFO", "-o"]).arg(&log);
    if skip_lock {
        command.env("PVE_SKIPLOCK", "1");
    }
    let null = || run::null().map_or(Stdio::null(), Stdio::from);
    command.stdin(null()).stdout(null()).stderr(null());
    let failed = || Failure::new(format!("startup for container '{vmid}' failed"));
    let mut child = command.spawn().map_err(|_| failed())?;
    match wait_child(ctx, &mut child, START_LIMIT) {
        Ok(()) => {}
        Err(Woken::Signal) => return Err(run::interrupted(&format!("lxc-start -n {vmid}"))),
        Err(Woken::Timeout | Woken::Ready(_)) => return Err(failed()),
    }
    let well = child.wait().is_ok_and(|status| status.success());
    report(ctx, vmid, &log, well)?;
    if !well {
        // The monitor may still be cleaning up.
        ignore(state::wait_stopped(ctx, vmid, PID_LIMIT));
        return Err(failed());
    }
    has_pid(ctx, vmid)
}

/// Reports the errors of a start in the form of LXC's stderr: `function: line text`.
fn report(ctx: &Ctx, vmid: u32, log: &std::path::Path, well: bool) -> Result {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<String> = text.lines().filter_map(error_line).collect();
    let full: String = lines.iter().map(|line| format!("lxc-start: {vmid}: {line}\n")).collect();
    ignore(fs::write(ctx.roots.run_pve.join(format!("ct-{vmid}.stderr")), full));
    if !well {
        for line in &lines {
            ctx.say(line)?;
        }
    }
    Ok(())
}

/// Parses `lxc-start 302 TIME ERROR sync - ../src/lxc/sync.c:sync_wait:34 - text`.
fn error_line(line: &str) -> Option<String> {
    let (_, rest) = line.split_once(" ERROR ")?;
    let (_, rest) = rest.split_once(" - ")?;
    let (place, text) = rest.split_once(" - ")?;
    let mut parts = place.rsplit(':');
    let (number, function) = (parts.next()?, parts.next()?);
    Some(format!("{function}: {number} {text}"))
}

/// Waits for the container's pid. An init that ends at once leaves a container that never shows
/// one.
fn has_pid(ctx: &Ctx, vmid: u32) -> Result {
    let deadline = Instant::now() + PID_LIMIT;
    while Instant::now() < deadline {
        if state::is_running(ctx, vmid) && state::init_pid(ctx, vmid)?.is_some() {
            return Ok(());
        }
        state::nap(ctx, Duration::from_millis(100))?;
    }
    Err(Failure::new(format!("unable to get PID for CT {vmid} (not running?)")))
}

/// Kills a container and waits until its monitor has cleaned up.
pub(crate) fn kill(ctx: &Ctx, vmid: u32) -> Result {
    let mut command = state::program(ctx, "lxc-stop", vmid);
    let stopped = run::output(ctx, command.arg("--kill"), STOP_LIMIT);
    finish(ctx, vmid, stopped.map(|output| output.status.code()), "--kill")
}

/// Asks a container to end and, with `force`, kills it after the timeout.
pub(crate) fn shut_down(ctx: &Ctx, vmid: u32, timeout_s: u64, force: bool) -> Result {
    let mut command = state::program(ctx, "lxc-stop", vmid);
    if !force {
        command.arg("--nokill");
    }
    command.arg("--timeout").arg(timeout_s.to_string());
    let options = if force { "--timeout" } else { "--nokill --timeout" };
    // lxc-stop itself may wait for its timeout a second time.
    let limit = Duration::from_secs(timeout_s.saturating_mul(2) + 60);
    let stopped = run::output(ctx, &mut command, limit);
    finish(ctx, vmid, stopped.map(|o| o.status.code()), &format!("{options} {timeout_s}"))
}

fn finish(ctx: &Ctx, vmid: u32, stopped: Result<Option<i32>>, options: &str) -> Result {
    let told = format!("lxc-stop -n {vmid} {options}");
    match stopped {
        // 2: the container did not run any more.
        Ok(Some(0 | 2)) => {}
        Ok(code) => {
            let code = code.unwrap_or(255);
            ctx.say(&format!("command '{told}' failed: exit code {code}"))?;
            return Err(Failure::new("container did not stop"));
        }
        Err(failure) if failure.interrupted => {
            ctx.say(&format!("command '{told}' failed: received interrupt"))?;
            return Err(failure);
        }
        Err(failure) => return Err(failure),
    }
    if !state::wait_stopped(ctx, vmid, STOP_LIMIT)? {
        return Err(Failure::new("container did not stop"));
    }
    Ok(())
}

/// Removes a destroyed container's directory except for `passthrough` and the filter. A mount that
/// a killed clone left there stays.
pub(crate) fn tidy_dir(ctx: &Ctx, vmid: u32) {
    let dir = config::dir(ctx, vmid);
    ignore(fs::remove_file(dir.join("config")));
    ignore(fs::remove_dir(dir.join("rootfs")));
    ignore(fs::remove_file(log_path(ctx, vmid)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_lines_are_shown_as_on_stderr() {
        let line = "lxc-start 302 20261123150000.123 ERROR    sync - \
            ../src/lxc/sync.c:sync_wait:34 - An error occurred in another process";
        let told = error_line(line).unwrap();
        assert_eq!(told, "sync_wait: 34 An error occurred in another process");
        assert_eq!(error_line("lxc-start 302 2026 INFO     x - a.c:b:1 - y"), None);
    }
}
