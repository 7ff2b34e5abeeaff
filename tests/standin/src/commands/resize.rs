//! `pct resize`. If the work fails, the exit code is 0, as with the real `pct`; a smaller size is
//! refused before.

use super::template::exit_zero;
use super::{Entry, Work, in_worker};
use crate::args::{Args, Kind, Spec};
use crate::cluster;
use crate::conf::Conf;
use crate::conf::values::Complaint;
use crate::cost::Part;
use crate::ctx::Ctx;
use crate::failure::{Failure, Result};
use crate::locks;
use crate::lxc::state;
use crate::storage::pool;
use crate::storage::volume::{MountPoint, Volume};

const SPEC: Spec = Spec {
    name: "resize",
    positional: &[("vmid", Kind::Vmid), ("disk", Kind::Text), ("size", Kind::Text)],
    extra: false,
    options: &[],
    usage: "<vmid> <disk> <size> [OPTIONS]",
};

pub(super) const ENTRY: Entry = Entry { spec: SPEC, run };

fn run(ctx: &mut Ctx, args: &Args) -> Result {
    let vmid = args.vmid(0);
    let (disk, size) = (args.at(1), args.at(2));
    if disk != "rootfs" {
        return Err(Failure::new(format!(
            "'pct resize ID {disk}' is not modelled by the stand-in"
        )));
    }
    let unfit = || {
        let text = format!("value does not match the regex pattern - got '{size}'");
        SPEC.refuse(255, &[("size".to_owned(), Complaint::plain(text))].into())
    };
    let bytes =
        MountPoint::parse(&format!("x:y,size={}", size.trim_start_matches('+'))).size_bytes();
    if bytes == 0 {
        return Err(unfit());
    }
    let conf = cluster::load(ctx, vmid)?;
    cluster::check_lock(&conf)?;
    let now = root(&conf)?.size_bytes();
    let bytes = if size.starts_with('+') { now.saturating_add(bytes) } else { bytes };
    if bytes < now {
        return Err(Failure::new("unable to shrink disk size"));
    }
    in_worker(ctx, "resize", vmid, Work::Resize { vmid, bytes }).map_err(exit_zero)
}

fn root(conf: &Conf) -> Result<MountPoint> {
    let line =
        conf.main.get("rootfs").ok_or_else(|| Failure::new("disk 'rootfs' does not exist"))?;
    Ok(MountPoint::parse(line))
}

/// Changes only the size in the configuration: a subvolume here has no quota.
pub(super) fn work(ctx: &Ctx, vmid: u32, bytes: u64) -> Result {
    let _held = locks::config(ctx, vmid)?;
    let mut conf = cluster::load(ctx, vmid)?;
    cluster::check_lock(&conf)?;
    ctx.pay(Part::Work("resize"));
    let mut point = root(&conf)?;
    let volume = Volume::parse(&point.source)?;
    ctx.step("volume", || {
        pool::existing(ctx, &volume)?;
        // The kernel has a running container's file system mounted already, so nothing waits.
        if !state::is_running(ctx, vmid) {
            ctx.wait_for_mmp("e2fsck 1.47.2 (1-Jan-2025)")?;
            ctx.wait_for_mmp("resize2fs 1.47.2 (1-Jan-2025)")?;
        }
        Ok(())
    })?;
    point.set("size", &size(bytes));
    conf.main.set("rootfs", point.on(&volume));
    ctx.step("write", || cluster::save(ctx, vmid, &conf))
}

/// Formats a size as PVE writes it: in the largest unit that divides it.
fn size(bytes: u64) -> String {
    let units = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];
    let fits = units.iter().find(|(_, shift)| bytes.trailing_zeros() >= *shift);
    fits.map_or_else(|| bytes.to_string(), |(unit, shift)| format!("{}{unit}", bytes >> shift))
}
