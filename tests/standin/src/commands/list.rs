//! `pct list`: this node's containers; prints nothing when there are none.

use super::Entry;
use super::status::complain_about_memory;
use crate::args::{Args, Spec};
use crate::cluster;
use crate::ctx::Ctx;
use crate::failure::Result;
use crate::lxc::state;

pub(super) const ENTRY: Entry = Entry {
    spec: Spec { name: "list", positional: &[], extra: false, options: &[], usage: "" },
    run,
};

fn run(ctx: &mut Ctx, _args: &Args) -> Result {
    let sockets = state::sockets();
    let mut lines = Vec::new();
    for vmid in cluster::own_vmids(ctx) {
        // The container may have been removed between the listing and the read.
        let Ok(conf) = cluster::load(ctx, vmid) else { continue };
        complain_about_memory(ctx, &conf)?;
        let running = state::is_listed(ctx, &sockets, vmid);
        if running {
            // One hanging monitor makes the node's whole list hang.
            state::wait_for_monitor(ctx, vmid)?;
        }
        let status = if running { "running" } else { "stopped" };
        let lock = conf.main.get("lock").unwrap_or("");
        let fallback = format!("CT{vmid}");
        let name = conf.main.get("hostname").unwrap_or(&fallback);
        lines.push(format!("{vmid:<10} {status:<10} {lock:<12} {name:<20}"));
    }
    if !lines.is_empty() {
        ctx.say(&format!("{:<10} {:<10} {:<12} {:<20}", "VMID", "Status", "Lock", "Name"))?;
    }
    lines.iter().try_for_each(|line| ctx.say(line))
}
