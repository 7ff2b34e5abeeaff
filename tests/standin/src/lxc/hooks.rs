//! Hooks that LXC runs while a container starts and after it has stopped.

use std::fs;
use std::process::ExitCode;

use super::{cgroup, guest};
use crate::cluster;
use crate::conf::{Conf, Warning};
use crate::cost::Part;
use crate::ctx::{Ctx, Subject};
use crate::failure::{Failure, Result, ignore};
use crate::roots::Roots;
use crate::storage::pool;
use crate::storage::volume::{MountPoint, Volume};

/// Sub-command that LXC's configuration names; not one of `pct`'s.
pub(crate) const COMMAND: &str = "standin-hook";

/// Runs `pct standin-hook HOOK VMID lxc ...`: LXC adds the container and the section.
pub(crate) fn main(argv: &[String]) -> ExitCode {
    let [hook, vmid, ..] = argv else { return ExitCode::from(2) };
    let Ok(vmid) = vmid.parse::<u32>() else { return ExitCode::from(2) };
    let subject = Subject { command: hook.clone(), vmid: Some(vmid), template: None };
    let ctx = Ctx::new(Roots::from_env(), cluster::node_name(), subject);
    match run(&ctx, hook, vmid) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            ignore(ctx.warn(&failure.message));
            ExitCode::from(failure.code)
        }
    }
}

fn run(ctx: &Ctx, hook: &str, vmid: u32) -> Result {
    // A container without a configuration on this node is not handled here.
    if !cluster::conf_path(ctx, vmid).exists() {
        return Ok(());
    }
    let conf = cluster::load_quiet(ctx, vmid)?;
    match hook {
        "pre-start" => {
            ctx.pay(Part::StartHooks);
            cluster::check_quorum(ctx)?;
            if std::env::var_os("PVE_SKIPLOCK").is_none() {
                cluster::check_lock(&conf)?;
            }
            pre_start(ctx, vmid, &conf.main)
        }
        "start-host" => {
            let pid = std::env::var("LXC_PID").ok().and_then(|p| p.parse().ok());
            if let Some(pid) = pid {
                cgroup::enter_v1(ctx, vmid, pid, &conf.main);
            }
            Ok(())
        }
        "post-stop" => {
            ctx.pay(Part::StopHook);
            cgroup::leave_v1(ctx, vmid);
            let marker = ctx.roots.control_dir.join("monitor-hung").join(vmid.to_string());
            ignore(fs::remove_file(marker));
            apply_pending(ctx, vmid, conf)
        }
        _ => Err(Failure::coded(2, "unknown hook")),
    }
}

/// Mounts the volume in the monitor's own mount namespace, so that the mount ends with the monitor.
fn pre_start(ctx: &Ctx, vmid: u32, conf: &crate::conf::Section) -> Result {
    let line = conf.get("rootfs").ok_or_else(|| Failure::new("missing 'rootfs' configuration"))?;
    let volume = Volume::parse(&MountPoint::parse(line).source)?;
    let path = pool::existing(ctx, &volume)?;
    guest::mount_rootfs(ctx, vmid, &path)?;
    guest::configure(&path, vmid, conf)
}

/// Applies the changes that waited for the stop, and drops lines that are no settings.
fn apply_pending(ctx: &Ctx, vmid: u32, mut conf: Conf) -> Result {
    let unknown = conf.warnings.iter().any(|w| matches!(w, Warning::Line(_)));
    if conf.apply_pending() || unknown {
        ignore(cluster::save(ctx, vmid, &conf));
    }
    Ok(())
}
