//! `pct clone`, the worker's part, with its undo.

use std::cell::RefCell;

use serde::{Deserialize, Serialize};

use crate::cluster;
use crate::cost::Part;
use crate::ctx::Ctx;
use crate::failure::{Result, ignore};
use crate::locks;
use crate::lxc::guest;
use crate::storage::pool;
use crate::storage::usable;
use crate::storage::volume::{MountPoint, Volume};

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) vmid: u32,
    pub(crate) newid: u32,
    pub(crate) full: bool,
    pub(crate) snapshot: Option<String>,
    /// `rootfs` line of the source.
    pub(crate) rootfs: String,
    pub(crate) storage: Option<String>,
}

pub(super) fn work(ctx: &Ctx, plan: &Plan) -> Result {
    // Volumes created and recorded so far; a volume in progress is in neither list nor
    // configuration.
    let made = RefCell::new(Vec::new());
    let done = make(ctx, plan, &made);
    match done {
        Ok(()) => ctx.step("unlock-source", || cluster::remove_lock(ctx, plan.vmid, "disk")),
        Err(failure) => {
            ctx.undo(|| undo(ctx, plan, &made.borrow()));
            Err(if failure.forced { failure } else { failure.prefixed("clone failed: ") })
        }
    }
}

fn undo(ctx: &Ctx, plan: &Plan, made: &[Volume]) {
    guest::unmount_rootfs(ctx, plan.newid);
    for volume in made {
        ignore(pool::free(ctx, volume));
    }
    ignore(cluster::remove(ctx, plan.newid));
    let firewall = ctx.roots.etc_pve.join("firewall").join(format!("{}.fw", plan.newid));
    ignore(std::fs::remove_file(firewall));
    ignore(cluster::remove_lock(ctx, plan.vmid, "disk"));
}

fn make(ctx: &Ctx, plan: &Plan, made: &RefCell<Vec<Volume>>) -> Result {
    let (vmid, newid) = (plan.vmid, plan.newid);
    ctx.say(&format!("creating a clone of container {vmid} with ID {newid}"))?;
    ctx.pay(Part::Work("clone"));
    if !plan.rootfs.is_empty() {
        let volume = clone_volume(ctx, plan)?;
        made.borrow_mut().push(volume.clone());
        ctx.step("write-rootfs", || write_rootfs(ctx, plan, &volume))?;
        ctx.step("mount", || dress(ctx, newid, &volume))?;
    }
    ctx.step("unlock-target", || cluster::remove_lock(ctx, newid, "create"))
}

fn clone_volume(ctx: &Ctx, plan: &Plan) -> Result<Volume> {
    let source = Volume::parse(&MountPoint::parse(&plan.rootfs).source)?;
    usable(ctx, &source.storage)?;
    let from = match &plan.snapshot {
        Some(name) => pool::snapshot_volume(&source, name),
        None => source.clone(),
    };
    if plan.full {
        ctx.say(&format!("create full clone of mountpoint rootfs ({source})"))?;
        let storage = plan.storage.as_deref().unwrap_or(&source.storage);
        pool::full_copy(ctx, &from, storage, plan.newid)
    } else {
        ctx.say(&format!("create linked clone of mount point rootfs ({source})"))?;
        pool::clone(ctx, &from, plan.newid)
    }
}

fn write_rootfs(ctx: &Ctx, plan: &Plan, volume: &Volume) -> Result {
    let _held = locks::config(ctx, plan.newid)?;
    let mut conf = cluster::load_quiet(ctx, plan.newid)?;
    conf.main.set("rootfs", MountPoint::parse(&plan.rootfs).on(volume));
    cluster::save(ctx, plan.newid, &conf)
}

/// Mounts the volume for a moment to remove the source's identity from it. If the process is killed
/// in this step, the mount stays.
fn dress(ctx: &Ctx, newid: u32, volume: &Volume) -> Result {
    let path = pool::existing(ctx, volume)?;
    let mounted = guest::mount_rootfs(ctx, newid, &path).is_ok();
    let done = ctx.point("mounted").and_then(|()| guest::forget_identity(&path));
    if mounted {
        guest::unmount_rootfs(ctx, newid);
    }
    done
}
