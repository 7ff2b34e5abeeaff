//! `pct create`, as far as the lab and tests need it: from an archive or a directory, with one root
//! volume and one address.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::start::check_bridge;
use super::{Entry, Work, in_worker};
use crate::args::{Args, Kind, Spec};
use crate::cluster;
use crate::conf::Conf;
use crate::conf::net::Net;
use crate::ctx::Ctx;
use crate::failure::{Failure, Result, ignore};
use crate::locks;
use crate::run::{PATH, run as run_program};
use crate::storage::pool;
use crate::storage::usable;

pub(super) const ENTRY: Entry = Entry {
    spec: Spec {
        name: "create",
        positional: &[("vmid", Kind::Vmid), ("ostemplate", Kind::Text)],
        extra: false,
        options: &[
            ("arch", Kind::Setting),
            ("cores", Kind::Setting),
            ("cpulimit", Kind::Setting),
            ("cpuunits", Kind::Setting),
            ("description", Kind::Setting),
            ("features", Kind::Setting),
            ("hostname", Kind::Setting),
            ("memory", Kind::Setting),
            ("nameserver", Kind::Setting),
            ("net[n]", Kind::Setting),
            ("onboot", Kind::Setting),
            ("ostype", Kind::Setting),
            ("rootfs", Kind::Text),
            ("searchdomain", Kind::Setting),
            ("swap", Kind::Setting),
            ("tags", Kind::Setting),
            ("unprivileged", Kind::Bool),
        ],
        usage: "<vmid> <ostemplate> [OPTIONS]",
    },
    run,
};

/// Plan of one new container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Plan {
    vmid: u32,
    /// Source: an archive or a directory.
    from: PathBuf,
    storage: String,
    size_gib: u64,
    settings: BTreeMap<String, String>,
    description: Option<String>,
}

fn run(ctx: &mut Ctx, args: &Args) -> Result {
    let vmid = args.vmid(0);
    cluster::check_quorum(ctx)?;
    cluster::check_unused(ctx, vmid).map_err(|f| Failure { code: 2, ..f })?;
    let plan = plan(ctx, args)?;
    for (_, value) in plan.settings.iter().filter(|(key, _)| key.starts_with("net")) {
        check_bridge(ctx, &Net::parse(value))?;
    }
    ctx.step("create-conf", || {
        let _held = locks::new_config(ctx, vmid)?;
        let mut bare = Conf::default();
        bare.main.set("lock", "create");
        cluster::create(ctx, vmid, &bare)
    })?;
    in_worker(ctx, "vzcreate", vmid, Work::Create(plan))
}

fn plan(ctx: &Ctx, args: &Args) -> Result<Plan> {
    let template = args.at(1);
    let from = match template.split_once(":vztmpl/") {
        Some((_, name)) if !name.contains('/') => ctx.roots.template_cache.join(name),
        _ if template.starts_with('/') => PathBuf::from(template),
        _ => return Err(Failure::coded(2, format!("unable to parse volume ID '{template}'"))),
    };
    if !from.exists() {
        return Err(Failure::coded(2, format!("volume '{template}' does not exist")));
    }
    let rootfs = args.get("rootfs").unwrap_or("local-zfs:4");
    let (storage, size) = rootfs.split_once(':').unwrap_or((rootfs, "4"));
    let size_gib = size.parse().map_err(|_| {
        Failure::new("'pct create --rootfs' takes only STORAGE:GIB in the stand-in")
    })?;
    let mut settings = args.options().clone();
    settings.retain(|key, _| key != "rootfs" && key != "description");
    for (key, value) in [
        ("arch", "amd64"),
        ("memory", "512"),
        ("ostype", "debian"),
        ("swap", "512"),
        ("unprivileged", "1"),
    ] {
        settings.entry(key.to_owned()).or_insert_with(|| value.to_owned());
    }
    let description = args.get("description").map(str::to_owned);
    let storage = storage.to_owned();
    Ok(Plan { vmid: args.vmid(0), from, storage, size_gib, settings, description })
}

pub(super) fn work(ctx: &Ctx, plan: &Plan) -> Result {
    let vmid = plan.vmid;
    let done = pool::alloc(ctx, &plan.storage, vmid).and_then(|volume| {
        let filled = fill(ctx, plan, &volume);
        if filled.is_err() {
            ctx.undo(|| ignore(pool::free(ctx, &volume)));
        }
        filled
    });
    done.map_err(|failure| {
        ctx.undo(|| ignore(cluster::remove(ctx, vmid)));
        if failure.forced {
            failure
        } else {
            failure.prefixed(&format!("unable to create CT {vmid} - "))
        }
    })
}

fn fill(ctx: &Ctx, plan: &Plan, volume: &crate::storage::volume::Volume) -> Result {
    let storage = usable(ctx, &volume.storage)?;
    let root = pool::path(ctx, &storage, &volume.name);
    ctx.step("extract", || extract(ctx, &plan.from, &root))?;
    let mut conf = Conf::default();
    conf.main.keys.extend(plan.settings.clone());
    conf.main.description.clone_from(&plan.description);
    conf.main.set("rootfs", format!("{volume},size={}G", plan.size_gib));
    let _held = locks::config(ctx, plan.vmid)?;
    ctx.step("write", || cluster::save(ctx, plan.vmid, &conf))
}

fn extract(ctx: &Ctx, from: &Path, root: &Path) -> Result {
    let limit = Duration::from_secs(300);
    let mut command;
    if from.is_dir() {
        command = Command::new("cp");
        command.args(["-a", "--reflink=auto", "--"]).arg(from.join(".")).arg(root.join("."));
    } else {
        ctx.say(&format!("extracting archive '{}'", from.display()))?;
        command = Command::new("tar");
        command.args(["--numeric-owner", "-xpf"]).arg(from).arg("-C").arg(root);
    }
    run_program(ctx, command.env("PATH", PATH), limit).map(drop)
}
