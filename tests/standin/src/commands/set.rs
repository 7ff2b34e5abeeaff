//! `pct set`.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use super::Entry;
use super::start::check_bridge;
use crate::args::{Args, Kind, Spec};
use crate::cluster;
use crate::conf::net::Net;
use crate::conf::values::{self, Complaint};
use crate::conf::{Conf, Section};
use crate::cost::Part;
use crate::ctx::Ctx;
use crate::failure::{Failure, Result};
use crate::locks;
use crate::lxc::{cgroup, config, live, state};
use crate::run::{PATH, run as run_program};
use crate::storage::volume::MountPoint;

pub(super) const ENTRY: Entry = Entry { spec: SPEC, run };

const SPEC: Spec = Spec {
    name: "set",
    positional: &[("vmid", Kind::Vmid)],
    extra: false,
    options: &[
        ("arch", Kind::Setting),
        ("cmode", Kind::Setting),
        ("console", Kind::Setting),
        ("cores", Kind::Setting),
        ("cpulimit", Kind::Setting),
        ("cpuunits", Kind::Setting),
        ("debug", Kind::Setting),
        ("delete", Kind::Text),
        ("description", Kind::Setting),
        ("digest", Kind::Text),
        ("entrypoint", Kind::Setting),
        ("features", Kind::Setting),
        ("hookscript", Kind::Text),
        ("hostname", Kind::Setting),
        ("lock", Kind::Setting),
        ("memory", Kind::Setting),
        ("mp[n]", Kind::Setting),
        ("nameserver", Kind::Setting),
        ("net[n]", Kind::Setting),
        ("onboot", Kind::Setting),
        ("ostype", Kind::Setting),
        ("protection", Kind::Setting),
        ("revert", Kind::Text),
        ("rootfs", Kind::Setting),
        ("searchdomain", Kind::Setting),
        ("startup", Kind::Setting),
        ("swap", Kind::Setting),
        ("tags", Kind::Setting),
        ("template", Kind::Setting),
        ("timezone", Kind::Setting),
        ("tty", Kind::Setting),
        ("unprivileged", Kind::Setting),
        ("unused[n]", Kind::Setting),
    ],
    usage: "<vmid> [OPTIONS]",
};

/// Settings that a running container takes over only at its next start.
const AT_NEXT_START: &[&str] =
    &["arch", "cmode", "console", "entrypoint", "features", "ostype", "rootfs", "timezone", "tty"];

fn run(ctx: &mut Ctx, args: &Args) -> Result {
    let vmid = args.vmid(0);
    if args.options().is_empty() {
        return Err(Failure::coded(2, "no options specified"));
    }
    if args.get("hookscript").is_some() {
        return Err(Failure::new("'pct set --hookscript' is not modelled by the stand-in"));
    }
    cluster::load(ctx, vmid)?;
    let change = Change::of(args)?;
    let _held = ctx.step("lock", || locks::config(ctx, vmid))?;
    let mut conf = cluster::load(ctx, vmid)?;
    cluster::check_lock(&conf)?;
    check_digest(ctx, vmid, args.get("digest"))?;
    ctx.pay(Part::Work("set"));
    change.check()?;
    let running = state::is_running(ctx, vmid);
    change.apply(ctx, &mut conf, running)?;
    ctx.step("write", || cluster::save(ctx, vmid, &conf))?;
    // Only now, as in the real `pct`: the configuration keeps a bridge that is then refused.
    for (_, value) in conf.main.numbered("net") {
        check_bridge(ctx, &Net::parse(value))?;
    }
    config::write(ctx, vmid, &conf.main)?;
    if running {
        change.apply_live(ctx, vmid, &conf.main)?;
    }
    Ok(())
}

fn list(text: Option<&str>) -> Vec<String> {
    let parts = text.unwrap_or("").split([',', ';', ' ']);
    parts.filter(|k| !k.is_empty()).map(str::to_owned).collect()
}

fn check_digest(ctx: &Ctx, vmid: u32, given: Option<&str>) -> Result {
    let Some(given) = given else { return Ok(()) };
    let mut command = Command::new("sha1sum");
    command.env("PATH", PATH).arg(cluster::conf_path(ctx, vmid));
    let sum = run_program(ctx, &mut command, Duration::from_secs(10))?;
    if sum.split(' ').next().is_some_and(|sum| sum.eq_ignore_ascii_case(given)) {
        return Ok(());
    }
    let text = "detected modified configuration - file changed by other user? Try again.";
    Err(Failure::new(text))
}

/// Changes that the command line asks for.
struct Change {
    set: BTreeMap<String, String>,
    delete: Vec<String>,
    revert: Vec<String>,
}

impl Change {
    fn of(args: &Args) -> Result<Self> {
        let meta = ["delete", "digest", "revert"];
        let set = args.options().iter().filter(|(k, _)| !meta.contains(&k.as_str()));
        let set = set.map(|(k, v)| (k.clone(), v.clone())).collect();
        let delete = list(args.get("delete"));
        for key in &delete {
            let known = *key == "description" || values::is_key(key);
            if !known || key == "delete" {
                let complaint = Complaint::plain(format!("unknown option '{key}'"));
                let complaints = BTreeMap::from([("delete".to_owned(), complaint)]);
                return Err(SPEC.refuse(255, &complaints));
            }
        }
        Ok(Self { set, delete, revert: list(args.get("revert")) })
    }

    /// Fails on settings that no container may have.
    fn check(&self) -> Result {
        if let Some(key) = ["unprivileged", "template"].iter().find(|k| self.set.contains_key(**k))
        {
            let text = format!("unable to modify read-only option: '{key}'");
            return Err(Failure::new(text));
        }
        for (key, value) in &self.set {
            if key.starts_with("mp") && !MountPoint::parse(value).is_bind() {
                let text = "'pct set --mpN STORAGE:SIZE' is not modelled by the stand-in";
                return Err(Failure::new(text));
            }
        }
        Ok(())
    }

    fn apply(&self, ctx: &Ctx, conf: &mut Conf, running: bool) -> Result {
        for key in &self.revert {
            if let Some(pending) = &mut conf.pending {
                pending.keys.remove(key);
                let left: Vec<String> =
                    list(pending.get("delete")).into_iter().filter(|k| k != key).collect();
                put_list(pending, &left);
            }
        }
        for key in &self.delete {
            self.delete(ctx, conf, key, running)?;
        }
        for (key, value) in &self.set {
            if key == "description" {
                conf.main.description = Some(value.clone());
            } else if running && AT_NEXT_START.contains(&key.as_str()) {
                conf.pending.get_or_insert_default().set(key, value.clone());
            } else {
                conf.main.set(key, value.clone());
            }
        }
        Ok(())
    }

    fn delete(&self, ctx: &Ctx, conf: &mut Conf, key: &str, running: bool) -> Result {
        if key == "description" {
            conf.main.description = None;
        } else if conf.main.get(key).is_none() {
            let text = format!("cannot delete '{key}' - not set in current configuration!");
            ctx.warn(&text)?;
        } else if running && AT_NEXT_START.contains(&key) {
            let pending = conf.pending.get_or_insert_default();
            let mut keys = list(pending.get("delete"));
            keys.push(key.to_owned());
            put_list(pending, &keys);
        } else {
            conf.main.keys.remove(key);
        }
        Ok(())
    }

    fn apply_live(&self, ctx: &Ctx, vmid: u32, conf: &Section) -> Result {
        let limits = ["memory", "swap", "cores", "cpulimit", "cpuunits"];
        let touched =
            |key: &&str| self.set.contains_key(*key) || self.delete.iter().any(|k| k == key);
        if limits.iter().any(touched) {
            cgroup::relimit(ctx, vmid, conf);
        }
        for (_, value) in self.set.iter().filter(|(key, _)| key.starts_with("net")) {
            live::change_net(ctx, vmid, &Net::parse(value))?;
        }
        Ok(())
    }
}

fn put_list(section: &mut Section, keys: &[String]) {
    if keys.is_empty() {
        section.keys.remove("delete");
    } else {
        section.set("delete", keys.join(","));
    }
}
