//! `pct stop`, `shutdown`, `reboot`, and two that always fail: `suspend` and `resume`.

use super::{Entry, Work, in_worker, start};
use crate::args::{Args, Kind, Spec};
use crate::cluster;
use crate::cost::Part;
use crate::ctx::Ctx;
use crate::failure::{Failure, Result};
use crate::locks;
use crate::lxc::{control, state};

const VMID: &[(&str, Kind)] = &[("vmid", Kind::Vmid)];
/// Default timeout of a shutdown, in seconds.
const SHUTDOWN_S: u64 = 60;
/// Longest timeout that a caller may give, in seconds.
const LONGEST_S: u64 = 86_400;

pub(super) const STOP: Entry = Entry {
    spec: Spec {
        name: "stop",
        positional: VMID,
        extra: false,
        options: &[("overrule-shutdown", Kind::Bool), ("skiplock", Kind::Bool)],
        usage: "<vmid> [OPTIONS]",
    },
    run: |ctx, args| {
        let (vmid, skip_lock) = (args.vmid(0), args.flag("skiplock"));
        check_running(ctx, vmid, "CT")?;
        in_worker(ctx, "vzstop", vmid, Work::Stop { vmid, skip_lock })
    },
};

pub(super) const SHUTDOWN: Entry = Entry {
    spec: Spec {
        name: "shutdown",
        positional: VMID,
        extra: false,
        options: &[("forceStop", Kind::Bool), ("timeout", Kind::Whole(0, LONGEST_S))],
        usage: "<vmid> [OPTIONS]",
    },
    run: |ctx, args| {
        let vmid = args.vmid(0);
        check_running(ctx, vmid, "CT")?;
        let timeout_s = args.number("timeout").unwrap_or(SHUTDOWN_S);
        let force = args.flag("forceStop");
        in_worker(ctx, "vzshutdown", vmid, Work::Shutdown { vmid, timeout_s, force })
    },
};

pub(super) const REBOOT: Entry = Entry {
    spec: Spec {
        name: "reboot",
        positional: VMID,
        extra: false,
        options: &[("timeout", Kind::Whole(0, LONGEST_S))],
        usage: "<vmid> [OPTIONS]",
    },
    run: |ctx, args| {
        let vmid = args.vmid(0);
        check_running(ctx, vmid, "VM")?;
        let timeout_s = args.number("timeout").unwrap_or(SHUTDOWN_S);
        in_worker(ctx, "vzreboot", vmid, Work::Reboot { vmid, timeout_s })
    },
};

pub(super) const SUSPEND: Entry = Entry {
    spec: Spec { name: "suspend", positional: VMID, extra: false, options: &[], usage: "<vmid>" },
    run: |ctx, args| {
        let vmid = args.vmid(0);
        check_running(ctx, vmid, "CT")?;
        in_worker(ctx, "vzsuspend", vmid, Work::Suspend { vmid })
    },
};

pub(super) const RESUME: Entry = Entry {
    spec: Spec { name: "resume", positional: VMID, extra: false, options: &[], usage: "<vmid>" },
    run: |ctx, args: &Args| {
        let vmid = args.vmid(0);
        if state::is_running(ctx, vmid) {
            return Err(Failure::new(format!("CT {vmid} already running")));
        }
        in_worker(ctx, "vzresume", vmid, Work::Resume { vmid })
    },
};

/// Fails if the container does not run; one that does not exist does not run either.
fn check_running(ctx: &Ctx, vmid: u32, noun: &str) -> Result {
    if state::is_running(ctx, vmid) {
        return Ok(());
    }
    Err(Failure::new(format!("{noun} {vmid} not running")))
}

fn lock_and_check(ctx: &Ctx, vmid: u32, skip_lock: bool) -> Result<locks::Held> {
    let held = ctx.step("lock", || locks::config(ctx, vmid))?;
    let conf = cluster::load(ctx, vmid)?;
    if !skip_lock {
        cluster::check_lock(&conf)?;
    }
    Ok(held)
}

pub(super) fn stop(ctx: &Ctx, vmid: u32, skip_lock: bool) -> Result {
    let _held = lock_and_check(ctx, vmid, skip_lock)?;
    ctx.pay(Part::Work("stop"));
    state::wait_for_monitor(ctx, vmid)?;
    ctx.step("lxc-stop", || control::kill(ctx, vmid))?;
    ctx.point("stopped")
}

pub(super) fn shut_down(ctx: &Ctx, vmid: u32, timeout_s: u64, force: bool) -> Result {
    let _held = lock_and_check(ctx, vmid, false)?;
    ctx.pay(Part::Work("shutdown"));
    state::wait_for_monitor(ctx, vmid)?;
    ctx.step("lxc-stop", || control::shut_down(ctx, vmid, timeout_s, force))?;
    ctx.point("stopped")
}

pub(super) fn reboot(ctx: &Ctx, vmid: u32, timeout_s: u64) -> Result {
    shut_down(ctx, vmid, timeout_s, true)?;
    start::work(ctx, vmid, false)
}

pub(super) fn suspend(ctx: &Ctx, vmid: u32) -> Result {
    let _held = lock_and_check(ctx, vmid, false)?;
    Err(Failure::new("execing criu failed"))
}

pub(super) fn resume(ctx: &Ctx, vmid: u32) -> Result {
    let _held = lock_and_check(ctx, vmid, false)?;
    Err(Failure::new("execing criu failed"))
}
