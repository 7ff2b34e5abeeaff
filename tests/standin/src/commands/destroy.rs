//! `pct destroy`. The volumes are removed first and the configuration last; so a destroy without
//! quorum leaves a configuration without a volume.

use serde::{Deserialize, Serialize};

use super::{Entry, Work, in_worker};
use crate::args::{Args, Kind, Spec};
use crate::cluster;
use crate::conf::Conf;
use crate::cost::Part;
use crate::ctx::Ctx;
use crate::failure::{Failure, Result, ignore};
use crate::locks;
use crate::lxc::{control, state};
use crate::storage::volume::{MountPoint, Volume};
use crate::storage::{self, pool};

pub(super) const ENTRY: Entry = Entry {
    spec: Spec {
        name: "destroy",
        positional: &[("vmid", Kind::Vmid)],
        extra: false,
        options: &[
            ("destroy-unreferenced-disks", Kind::Bool),
            ("force", Kind::Bool),
            ("purge", Kind::Bool),
        ],
        usage: "<vmid> [OPTIONS]",
    },
    run,
};

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Plan {
    vmid: u32,
    force: bool,
    purge: bool,
    unreferenced: bool,
}

fn run(ctx: &mut Ctx, args: &Args) -> Result {
    let vmid = args.vmid(0);
    let plan = Plan {
        vmid,
        force: args.flag("force"),
        purge: args.flag("purge"),
        unreferenced: args.flag("destroy-unreferenced-disks"),
    };
    let conf = cluster::load(ctx, vmid)?;
    check(ctx, &plan, &conf)?;
    in_worker(ctx, "vzdestroy", vmid, Work::Destroy(plan))
}

fn check(ctx: &Ctx, plan: &Plan, conf: &Conf) -> Result {
    let vmid = plan.vmid;
    if conf.main.flag("protection") {
        return Err(Failure::new(format!("can't remove CT {vmid} - protection mode enabled")));
    }
    // The remnant of a destroy without quorum can be destroyed again.
    if conf.main.get("lock") != Some("destroyed") {
        cluster::check_lock(conf)?;
    }
    if !plan.force && state::is_running(ctx, vmid) {
        return Err(Failure::new(format!("unable to destroy CT {vmid} - container is running")));
    }
    Ok(())
}

pub(super) fn work(ctx: &Ctx, plan: &Plan) -> Result {
    let vmid = plan.vmid;
    let _held = ctx.step("lock", || locks::config(ctx, vmid))?;
    let conf = cluster::load_quiet(ctx, vmid)?;
    check(ctx, plan, &conf)?;
    ctx.pay(Part::Work("destroy"));
    if state::is_running(ctx, vmid) {
        ctx.say(&format!("forced to stop CT {vmid} before destroying!"))?;
        ctx.step("stop", || control::kill(ctx, vmid))?;
    }
    ctx.step("volume", || free_volumes(ctx, plan, &conf))?;
    control::tidy_dir(ctx, vmid);
    ctx.step("conf", || {
        let mut destroyed = Conf::default();
        destroyed.main.set("lock", "destroyed");
        cluster::save(ctx, vmid, &destroyed)?;
        if plan.purge {
            ctx.say(&format!("purging CT {vmid} from related configurations.."))?;
        }
        let firewall = ctx.roots.etc_pve.join("firewall").join(format!("{vmid}.fw"));
        ignore(std::fs::remove_file(firewall));
        cluster::remove(ctx, vmid)
    })
}

fn free_volumes(ctx: &Ctx, plan: &Plan, conf: &Conf) -> Result {
    let main = &conf.main;
    let lines = main.get("rootfs").into_iter();
    let lines = lines.chain(main.numbered("mp").map(|(_, v)| v));
    let lines = lines.chain(main.numbered("unused").map(|(_, v)| v));
    for point in lines.map(MountPoint::parse).filter(|point| !point.is_bind()) {
        let volume = Volume::parse(&point.source)?;
        for name in conf.snapshots.keys() {
            ignore(pool::drop_snapshot(ctx, &volume, name));
        }
        // A volume of another guest in this configuration must not be removed.
        if volume.owner() == Some(plan.vmid) {
            pool::free(ctx, &volume)?;
        }
    }
    if plan.unreferenced {
        free_unreferenced(ctx, plan.vmid)?;
    }
    Ok(())
}

fn free_unreferenced(ctx: &Ctx, vmid: u32) -> Result {
    for storage in storage::all(ctx).iter().filter(|s| storage::is_enabled(ctx, s)) {
        let volumes = pool::volumes(ctx, storage);
        for volume in volumes.iter().filter(|v| v.owner() == Some(vmid)) {
            pool::free(ctx, volume)?;
        }
    }
    Ok(())
}
