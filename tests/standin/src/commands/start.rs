//! `pct start`.

use std::time::Duration;

use super::{Entry, Work, in_worker};
use crate::args::{Kind, Spec};
use crate::cluster;
use crate::conf::Section;
use crate::conf::net::Net;
use crate::cost::Part;
use crate::ctx::Ctx;
use crate::failure::{Failure, Result};
use crate::locks;
use crate::lxc::{cgroup, config, control, state};
use crate::storage::pool;
use crate::storage::volume::{MountPoint, Volume};

/// Time that the real `pct` waits for events of a monitor that sends none.
const MONITOR_LIMIT: Duration = Duration::from_secs(10);

pub(super) const ENTRY: Entry = Entry {
    spec: Spec {
        name: "start",
        positional: &[("vmid", Kind::Vmid)],
        extra: false,
        options: &[("debug", Kind::Bool), ("skiplock", Kind::Bool)],
        usage: "<vmid> [OPTIONS]",
    },
    run: |ctx, args| {
        let (vmid, skip_lock) = (args.vmid(0), args.flag("skiplock"));
        if args.flag("debug") {
            return Err(Failure::new("'pct start --debug' is not modelled by the stand-in"));
        }
        cluster::check_quorum(ctx)?;
        if state::is_running(ctx, vmid) {
            return Err(Failure::new(format!("CT {vmid} already running")));
        }
        in_worker(ctx, "vzstart", vmid, Work::Start { vmid, skip_lock })
    },
};

pub(super) fn work(ctx: &Ctx, vmid: u32, skip_lock: bool) -> Result {
    let _held = ctx.step("lock", || locks::config(ctx, vmid))?;
    let mut conf = cluster::load(ctx, vmid)?;
    if !skip_lock {
        cluster::check_lock(&conf)?;
    }
    if conf.main.flag("template") {
        return Err(Failure::new("you can't start a CT if it's a template"));
    }
    if state::is_running(ctx, vmid) {
        // Another process started it first; the events have passed.
        state::nap(ctx, MONITOR_LIMIT)?;
        return ctx.say("problem with monitor socket, but continuing anyway: got timeout\n");
    }
    ctx.pay(Part::Work("start"));
    check(ctx, &conf.main)?;
    if conf.apply_pending() {
        cluster::save(ctx, vmid, &conf)?;
    }
    ctx.step("write-config", || config::write(ctx, vmid, &conf.main))?;
    cgroup::sweep(ctx, vmid)?;
    ctx.step("lxc-start", || control::start(ctx, vmid, skip_lock))?;
    ctx.point("running")
}

/// Checks that the volume is on its storage and that the bridges exist.
fn check(ctx: &Ctx, conf: &Section) -> Result {
    let line = conf.get("rootfs").ok_or_else(|| Failure::new("missing 'rootfs' configuration"))?;
    let volume = Volume::parse(&MountPoint::parse(line).source)?;
    pool::existing(ctx, &volume)?;
    for (_, value) in conf.numbered("net") {
        check_bridge(ctx, &Net::parse(value))?;
    }
    Ok(())
}

/// Fails if this node does not have the bridge.
pub(super) fn check_bridge(ctx: &Ctx, net: &Net) -> Result {
    match net.get("bridge") {
        Some(bridge) if !ctx.roots.sys_net.join(bridge).exists() => {
            Err(Failure::coded(2, format!("bridge '{bridge}' does not exist")))
        }
        _ => Ok(()),
    }
}
