//! `pct exec`: a check, then this process becomes `lxc-attach`. The caller's environment and open
//! files go in with it, and a killed caller leaves the command alive inside, as on the real one.

use std::os::unix::process::CommandExt as _;

use super::Entry;
use crate::args::{Args, Kind, Spec};
use crate::cluster;
use crate::ctx::Ctx;
use crate::failure::{Failure, Result};
use crate::lxc::state;

pub(super) const ENTRY: Entry = Entry {
    spec: Spec {
        name: "exec",
        positional: &[("vmid", Kind::Vmid)],
        extra: true,
        options: &[("keep-env", Kind::Bool)],
        usage: "<vmid> [<extra-args>] [OPTIONS]",
    },
    run,
};

fn run(ctx: &mut Ctx, args: &Args) -> Result {
    let vmid = args.vmid(0);
    if args.extra().is_empty() {
        let text = "missing command at /usr/share/perl5/PVE/CLI/pct.pm line 246.";
        return Err(Failure::new(text));
    }
    cluster::load(ctx, vmid)?;
    if !state::is_running(ctx, vmid) {
        return Err(Failure::new(format!("container '{vmid}' not running!")));
    }
    ctx.point("attach")?;
    let mut command = state::program(ctx, "lxc-attach", vmid);
    let keep = args.get("keep-env") != Some("0");
    command.arg(if keep { "--keep-env" } else { "--clear-env" }).arg("--").args(args.extra());
    let error = command.exec();
    Err(Failure::new(format!("exec failed: {error}")))
}
