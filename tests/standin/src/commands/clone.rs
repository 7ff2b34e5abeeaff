//! `pct clone`, the parent's part: reserves the number, locks the source and writes the new
//! configuration; the worker creates the volume.

use super::clone_work::Plan;
use super::{Entry, Work, in_worker};
use crate::args::{Args, Kind, Spec};
use crate::cluster;
use crate::conf::net::Net;
use crate::conf::{Conf, Section};
use crate::ctx::Ctx;
use crate::failure::{Failure, Result, ignore};
use crate::locks;
use crate::lxc::state;
use crate::storage::volume::MountPoint;

pub(super) const ENTRY: Entry = Entry {
    spec: Spec {
        name: "clone",
        positional: &[("vmid", Kind::Vmid), ("newid", Kind::Vmid)],
        extra: false,
        options: &[
            ("bwlimit", Kind::Text),
            ("description", Kind::Setting),
            ("full", Kind::Bool),
            ("hostname", Kind::Setting),
            ("pool", Kind::Text),
            ("snapname", Kind::Snapshot),
            ("storage", Kind::Text),
            ("target", Kind::Text),
        ],
        usage: "<vmid> <newid> [OPTIONS]",
    },
    run,
};

/// Clones in the order of the real `pct`: reserves the number (a configuration with only `lock:
/// create`), then locks the source, then writes the new container's configuration.
fn run(ctx: &mut Ctx, args: &Args) -> Result {
    let (vmid, newid) = (args.vmid(0), args.vmid(1));
    cluster::check_quorum(ctx)?;
    check_target(ctx, args)?;
    let source = cluster::load(ctx, vmid)?;
    cluster::check_unused(ctx, newid)?;
    cluster::check_lock(&source)?;
    let plan = plan(ctx, args, &source)?;
    ctx.step("create-conf", || reserve(ctx, newid))?;
    let prepared = ctx
        .step("lock-source", || lock_source(ctx, vmid))
        .map_err(|failure| (failure, false))
        .and_then(|()| {
            let conf = new_conf(ctx, args, &source);
            ctx.step("write-conf", || write_conf(ctx, vmid, newid, &conf))
                .map_err(|failure| (failure, true))
        });
    if let Err((failure, locked)) = prepared {
        ignore(cluster::remove(ctx, newid));
        if locked {
            ignore(cluster::remove_lock(ctx, vmid, "disk"));
        }
        return Err(failure);
    }
    in_worker(ctx, "vzclone", vmid, Work::Clone(plan))
}

fn check_target(ctx: &Ctx, args: &Args) -> Result {
    if let Some(pool) = args.get("pool") {
        let text = format!("403 Permission check failed (pool '{pool}' does not exist)");
        return Err(Failure::coded(2, text));
    }
    match args.get("target") {
        Some(node) if node != ctx.node => {
            if ctx.roots.etc_pve.join("nodes").join(node).is_dir() {
                let text = "a clone to another node is not modelled by the stand-in";
                return Err(Failure::new(text));
            }
            Err(Failure::coded(2, format!("no such cluster node '{node}'")))
        }
        _ => Ok(()),
    }
}

/// Plans the worker's job; every refusal happens here, before anything is changed.
fn plan(ctx: &Ctx, args: &Args, source: &Conf) -> Result<Plan> {
    let (vmid, newid) = (args.vmid(0), args.vmid(1));
    let section = section(args, source)?;
    let is_template = section.flag("template");
    let full = args.get("full").map_or(!is_template, |full| full == "1");
    let snapshot = args.get("snapname").map(str::to_owned);
    if full && snapshot.is_none() && state::is_running(ctx, vmid) {
        let text = "Full clone of a running container is only possible from a snapshot";
        return Err(Failure::coded(2, text));
    }
    if !full && args.get("storage").is_some() {
        return Err(Failure::coded(2, "parameter 'storage' not allowed for linked clones"));
    }
    if let Some((name, value)) = section.numbered("mp").next() {
        let kind = if MountPoint::parse(value).is_bind() { "bind" } else { "volume" };
        let text = format!("unable to clone mountpoint '{name}' (type {kind})");
        return Err(Failure::coded(2, text));
    }
    let rootfs = section.get("rootfs").unwrap_or("").to_owned();
    let storage = args.get("storage").map(str::to_owned);
    Ok(Plan { vmid, newid, full, snapshot, rootfs, storage })
}

fn section<'a>(args: &Args, source: &'a Conf) -> Result<&'a Section> {
    match args.get("snapname") {
        None => Ok(&source.main),
        Some(name) => source
            .snapshots
            .get(name)
            .ok_or_else(|| Failure::coded(2, format!("snapshot '{name}' does not exist"))),
    }
}

fn reserve(ctx: &Ctx, newid: u32) -> Result {
    let _held = locks::new_config(ctx, newid)?;
    let mut bare = Conf::default();
    bare.main.set("lock", "create");
    cluster::create(ctx, newid, &bare)
}

/// Locks the source. A second clone of the same source finds the lock and fails without waiting.
fn lock_source(ctx: &Ctx, vmid: u32) -> Result {
    let _held = locks::config(ctx, vmid)?;
    let mut conf = cluster::load_quiet(ctx, vmid)?;
    cluster::check_lock(&conf)?;
    conf.main.set("lock", "disk");
    cluster::save(ctx, vmid, &conf)
}

fn write_conf(ctx: &Ctx, vmid: u32, newid: u32, conf: &Conf) -> Result {
    let _held = locks::config(ctx, newid)?;
    cluster::save(ctx, newid, conf)?;
    let firewall = |id: u32| ctx.roots.etc_pve.join("firewall").join(format!("{id}.fw"));
    if firewall(vmid).exists() {
        let copied = std::fs::copy(firewall(vmid), firewall(newid));
        copied.map_err(|e| Failure::io("copy", &firewall(vmid), &e))?;
    }
    Ok(())
}

/// Copies the configuration except for the keys that belong only to the source; each interface gets
/// a new hardware address. The volume is added later.
fn new_conf(_ctx: &Ctx, args: &Args, source: &Conf) -> Conf {
    let mut section = section(args, source).cloned().unwrap_or_default();
    let dropped = |key: &String| {
        ["lock", "parent", "rootfs", "snaptime", "template"].contains(&key.as_str())
            || key.starts_with("unused")
            || key.starts_with("mp")
    };
    section.keys.retain(|key, _| !dropped(key));
    let nets: Vec<(String, String)> =
        section.numbered("net").map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
    for (key, value) in nets {
        let mut net = Net::parse(&value);
        net.renew_hwaddr();
        section.set(&key, net.text());
    }
    if let Some(hostname) = args.get("hostname") {
        section.set("hostname", hostname);
    }
    if let Some(description) = args.get("description") {
        section.description = Some(description.to_owned());
    }
    section.set("lock", "create");
    Conf { main: section, ..Conf::default() }
}
