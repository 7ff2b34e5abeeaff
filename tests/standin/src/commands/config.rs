//! `pct config` and `pct pending`.

use std::collections::BTreeMap;

use super::Entry;
use crate::args::{Args, Kind, Spec};
use crate::cluster;
use crate::conf::Warning;
use crate::conf::values::Complaint;
use crate::ctx::Ctx;
use crate::failure::{Failure, Result};

pub(super) const CONFIG: Entry = Entry { spec: SPEC, run: config };

const SPEC: Spec = Spec {
    name: "config",
    positional: &[("vmid", Kind::Vmid)],
    extra: false,
    options: &[("current", Kind::Bool), ("snapshot", Kind::Snapshot)],
    usage: "<vmid> [OPTIONS]",
};

pub(super) const PENDING: Entry = Entry {
    spec: Spec {
        name: "pending",
        positional: &[("vmid", Kind::Vmid)],
        extra: false,
        options: &[],
        usage: "<vmid>",
    },
    run: pending,
};

fn config(ctx: &mut Ctx, args: &Args) -> Result {
    let conf = cluster::load(ctx, args.vmid(0))?;
    let bad: BTreeMap<String, Complaint> = conf
        .warnings
        .iter()
        .filter_map(|warning| match warning {
            Warning::Line(_) => None,
            Warning::Value { key, complaint } => {
                let complaint = Complaint { text: complaint.clone(), blank_line: false };
                Some((key.clone(), complaint))
            }
        })
        .collect();
    if !bad.is_empty() {
        let failure = SPEC.refuse(255, &bad);
        let message = failure.message.replace("Parameter verification", "Result verification");
        return Err(Failure { message: message.replace("failed.\n", "failed\n"), ..failure });
    }
    let shown = match args.get("snapshot") {
        None if args.flag("current") => conf.main,
        None => conf.with_pending(),
        Some(name) => conf
            .snapshots
            .get(name)
            .cloned()
            .ok_or_else(|| Failure::new(format!("snapshot '{name}' does not exist")))?,
    };
    for (key, value) in shown.listing() {
        ctx.say(&format!("{key}: {value}"))?;
    }
    Ok(())
}

fn pending(ctx: &mut Ctx, args: &Args) -> Result {
    let conf = cluster::load(ctx, args.vmid(0))?;
    let deleted = conf.pending_deletes();
    let waiting = conf.pending.clone().unwrap_or_default();
    let mut lines: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (key, value) in conf.main.listing().into_iter().filter(|(k, _)| !k.starts_with("lxc.")) {
        let word = if deleted.contains(&key) { "del" } else { "cur" };
        lines.entry(key.clone()).or_default().push(format!("{word} {key}: {value}"));
    }
    for (key, value) in waiting.keys.iter().filter(|(k, _)| *k != "delete" && !deleted.contains(k))
    {
        lines.entry(key.clone()).or_default().push(format!("new {key}: {value}"));
    }
    for line in lines.values().flatten() {
        ctx.say(line)?;
    }
    Ok(())
}
