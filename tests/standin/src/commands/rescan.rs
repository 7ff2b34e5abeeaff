//! `pct rescan`: volumes that no configuration mentions become `unusedN` of their container.

use super::Entry;
use crate::args::{Args, Kind, Spec};
use crate::cluster;
use crate::conf::Conf;
use crate::ctx::Ctx;
use crate::failure::Result;
use crate::locks;
use crate::storage::volume::Volume;
use crate::storage::{self, pool};

pub(super) const ENTRY: Entry = Entry {
    spec: Spec {
        name: "rescan",
        positional: &[],
        extra: false,
        options: &[("dryrun", Kind::Bool), ("vmid", Kind::Vmid)],
        usage: " [OPTIONS]",
    },
    run,
};

fn run(ctx: &mut Ctx, args: &Args) -> Result {
    ctx.say("rescan volumes...")?;
    let only = args.number("vmid").and_then(|n| u32::try_from(n).ok());
    for vmid in cluster::own_vmids(ctx).into_iter().filter(|id| only.is_none_or(|o| o == *id)) {
        let _held = locks::config(ctx, vmid)?;
        let mut conf = cluster::load(ctx, vmid)?;
        let lost: Vec<Volume> = volumes_of(ctx, vmid).filter(|v| !mentions(&conf, v)).collect();
        for volume in &lost {
            let key = free_key(&conf);
            let text =
                format!("CT {vmid}: add unreferenced volume '{volume}' as '{key}' to config.");
            ctx.say(&text)?;
            conf.main.set(&key, volume.to_string());
        }
        if !lost.is_empty() && !args.flag("dryrun") {
            cluster::save(ctx, vmid, &conf)?;
        }
    }
    Ok(())
}

fn volumes_of(ctx: &Ctx, vmid: u32) -> impl Iterator<Item = Volume> {
    let storages = storage::all(ctx).into_iter().filter(|s| storage::is_enabled(ctx, s));
    storages.flat_map(|s| pool::volumes(ctx, &s)).filter(move |v| v.owner() == Some(vmid))
}

fn mentions(conf: &Conf, volume: &Volume) -> bool {
    let sections = std::iter::once(&conf.main).chain(conf.snapshots.values());
    sections.flat_map(|s| s.keys.values()).any(|value| value.contains(&volume.name))
}

fn free_key(conf: &Conf) -> String {
    let key = |n: u32| format!("unused{n}");
    (0..).map(key).find(|key| conf.main.get(key).is_none()).unwrap_or_default()
}
