//! `pct status`: running or stopped; a frozen container is running.

use std::fs;

use super::Entry;
use crate::args::{Args, Kind, Spec};
use crate::cluster;
use crate::conf::{Conf, Warning};
use crate::ctx::Ctx;
use crate::failure::Result;
use crate::lxc::{cgroup, state};
use crate::storage::volume::MountPoint;

pub(super) const ENTRY: Entry = Entry {
    spec: Spec {
        name: "status",
        positional: &[("vmid", Kind::Vmid)],
        extra: false,
        options: &[("verbose", Kind::Bool)],
        usage: "<vmid> [OPTIONS]",
    },
    run,
};

fn run(ctx: &mut Ctx, args: &Args) -> Result {
    let vmid = args.vmid(0);
    let conf = cluster::load(ctx, vmid)?;
    complain_about_memory(ctx, &conf)?;
    let running = state::is_running(ctx, vmid);
    if running {
        state::wait_for_monitor(ctx, vmid)?;
    }
    let status = if running { "running" } else { "stopped" };
    if !args.flag("verbose") {
        return ctx.say(&format!("status: {status}"));
    }
    for (key, value) in details(ctx, vmid, &conf, status, running) {
        ctx.say(&format!("{key}: {value}"))?;
    }
    Ok(())
}

/// Prints Perl's warning about a memory size that is no number.
pub(super) fn complain_about_memory(ctx: &Ctx, conf: &Conf) -> Result {
    let bad = |w: &&Warning| matches!(w, Warning::Value { key, .. } if key == "memory");
    if conf.warnings.iter().any(|w| bad(&w)) {
        let value = conf.main.get("memory").unwrap_or("");
        ctx.warn(&format!(
            "Argument \"{value}\" isn't numeric in multiplication (*) at \
             /usr/share/perl5/PVE/LXC.pm line 316."
        ))?;
    }
    Ok(())
}

fn details(
    ctx: &Ctx,
    vmid: u32,
    conf: &Conf,
    status: &str,
    running: bool,
) -> Vec<(&'static str, String)> {
    let main = &conf.main;
    let bytes = |key: &str| (main.number(key).unwrap_or(512) << 20).to_string();
    let disk = main.get("rootfs").map_or(0, |line| MountPoint::parse(line).size_bytes());
    let cpus = match main.get("cpulimit").or(main.get("cores")) {
        Some(cpus) => cpus.to_owned(),
        None => cgroup::cpus().to_string(),
    };
    let used = fs::read_to_string(state::cgroup(ctx, vmid).join("memory.current"));
    let fallback = format!("CT{vmid}");
    let name = main.get("hostname").unwrap_or(&fallback).to_owned();
    let zero = || "0".to_owned();
    let mut lines = vec![
        ("cpus", cpus),
        ("disk", zero()),
        ("diskread", zero()),
        ("diskwrite", zero()),
        ("maxdisk", disk.to_string()),
        ("maxmem", bytes("memory")),
        ("maxswap", bytes("swap")),
        ("mem", used.map_or_else(|_| zero(), |text| text.trim().to_owned())),
        ("name", name),
        ("netin", zero()),
        ("netout", zero()),
    ];
    if running {
        let pid = state::init_pid(ctx, vmid).ok().flatten();
        lines.extend(pid.map(|pid| ("pid", pid.to_string())));
    }
    lines.extend([
        ("status", status.to_owned()),
        ("swap", zero()),
        ("type", "lxc".to_owned()),
        ("uptime", zero()),
        ("vmid", vmid.to_string()),
    ]);
    lines
}
