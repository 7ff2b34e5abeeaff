//! `pct unlock`.

use super::Entry;
use crate::args::{Args, Kind, Spec};
use crate::cluster;
use crate::ctx::Ctx;
use crate::failure::{Failure, Result};
use crate::locks;

pub(super) const ENTRY: Entry = Entry {
    spec: Spec {
        name: "unlock",
        positional: &[("vmid", Kind::Vmid)],
        extra: false,
        options: &[],
        usage: "<vmid>",
    },
    run,
};

fn run(ctx: &mut Ctx, args: &Args) -> Result {
    let vmid = args.vmid(0);
    let _held = locks::config(ctx, vmid)?;
    let mut conf = cluster::load(ctx, vmid)?;
    if conf.main.keys.remove("lock").is_none() {
        return Err(Failure::new("no lock found trying to remove any lock"));
    }
    ctx.step("write", || cluster::save(ctx, vmid, &conf))
}
