//! `pct template`. If the work fails, the exit code is 0, as with the real `pct`.

use super::{Entry, Work, in_worker};
use crate::args::{Kind, Spec};
use crate::cluster;
use crate::ctx::Ctx;
use crate::failure::{Failure, Result};
use crate::locks;
use crate::lxc::state;
use crate::storage::pool;
use crate::storage::volume::{MountPoint, Volume};

pub(super) const ENTRY: Entry = Entry {
    spec: Spec {
        name: "template",
        positional: &[("vmid", Kind::Vmid)],
        extra: false,
        options: &[],
        usage: "<vmid>",
    },
    run: |ctx, args| {
        let vmid = args.vmid(0);
        let conf = cluster::load(ctx, vmid)?;
        cluster::check_lock(&conf)?;
        if conf.main.flag("template") {
            return Err(Failure::new("you can't convert a template to a template"));
        }
        if state::is_running(ctx, vmid) {
            let text = "you can't convert a CT to template if the CT is running";
            return Err(Failure::new(text));
        }
        in_worker(ctx, "vztemplate", vmid, Work::Template { vmid }).map_err(exit_zero)
    },
};

/// Sets the exit code to 0, for commands that do so after a failure of their work.
pub(super) fn exit_zero(failure: Failure) -> Failure {
    let code = if failure.forced { failure.code } else { 0 };
    Failure { code, ..failure }
}

pub(super) fn work(ctx: &Ctx, vmid: u32) -> Result {
    let _held = locks::config(ctx, vmid)?;
    let mut conf = cluster::load(ctx, vmid)?;
    if let Some((_, value)) = conf.main.numbered("mp").next() {
        let source = MountPoint::parse(value).source;
        return Err(Failure::new(format!("Template feature is not available for '{source}'")));
    }
    let line = conf.main.get("rootfs").unwrap_or("").to_owned();
    let point = MountPoint::parse(&line);
    let volume = Volume::parse(&point.source)?;
    let base = ctx.step("volume", || pool::make_base(ctx, &volume))?;
    conf.main.set("rootfs", point.on(&base));
    conf.main.set("template", "1");
    ctx.step("write", || cluster::save(ctx, vmid, &conf))?;
    crate::lxc::config::write(ctx, vmid, &conf.main)
}
