//! `pct snapshot`, `rollback`, `delsnapshot`, `listsnapshot`.

use std::fs;

use super::{Entry, Work, in_worker, start};
use crate::args::{Kind, Spec};
use crate::cluster;
use crate::conf::Conf;
use crate::ctx::Ctx;
use crate::failure::{Failure, Result, ignore};
use crate::locks;
use crate::lxc::{control, state};
use crate::storage::pool;
use crate::storage::volume::{MountPoint, Volume};
use crate::task::upid::now;

const NAMED: &[(&str, Kind)] = &[("vmid", Kind::Vmid), ("snapname", Kind::Snapshot)];

pub(super) const TAKE: Entry = Entry {
    spec: Spec {
        name: "snapshot",
        positional: NAMED,
        extra: false,
        options: &[("description", Kind::Setting)],
        usage: "<vmid> <snapname> [OPTIONS]",
    },
    run: |ctx, args| {
        let (vmid, name) = (args.vmid(0), args.at(1).to_owned());
        cluster::load(ctx, vmid)?;
        let description = args.get("description").map(str::to_owned);
        in_worker(ctx, "vzsnapshot", vmid, Work::Snapshot { vmid, name, description })
    },
};

pub(super) const ROLLBACK: Entry = Entry {
    spec: Spec {
        name: "rollback",
        positional: NAMED,
        extra: false,
        options: &[("start", Kind::Bool)],
        usage: "<vmid> <snapname> [OPTIONS]",
    },
    run: |ctx, args| {
        let (vmid, name, start) = (args.vmid(0), args.at(1).to_owned(), args.flag("start"));
        cluster::load(ctx, vmid)?;
        in_worker(ctx, "vzrollback", vmid, Work::Rollback { vmid, name, start })
    },
};

pub(super) const DELETE: Entry = Entry {
    spec: Spec {
        name: "delsnapshot",
        positional: NAMED,
        extra: false,
        options: &[("force", Kind::Bool)],
        usage: "<vmid> <snapname> [OPTIONS]",
    },
    run: |ctx, args| {
        let (vmid, name) = (args.vmid(0), args.at(1).to_owned());
        cluster::load(ctx, vmid)?;
        in_worker(ctx, "vzdelsnapshot", vmid, Work::DeleteSnapshot { vmid, name })
    },
};

pub(super) const LIST: Entry = Entry {
    spec: Spec {
        name: "listsnapshot",
        positional: &[("vmid", Kind::Vmid)],
        extra: false,
        options: &[],
        usage: "<vmid>",
    },
    run: |ctx, args| list(ctx, &cluster::load(ctx, args.vmid(0))?),
};

fn volume(conf: &Conf) -> Result<Volume> {
    let line =
        conf.main.get("rootfs").ok_or_else(|| Failure::new("missing 'rootfs' configuration"))?;
    Volume::parse(&MountPoint::parse(line).source)
}

fn missing(name: &str) -> Failure {
    Failure::new(format!("snapshot '{name}' does not exist"))
}

pub(super) fn take(ctx: &Ctx, vmid: u32, name: &str, description: Option<&str>) -> Result {
    let volume = ctx.step("prepare", || prepare(ctx, vmid, name, description))?;
    let taken = freeze_around(ctx, vmid, || pool::take_snapshot(ctx, &volume, name));
    if let Err(failure) = taken {
        // An interrupted snapshot stays in the configuration, in the state of its preparation.
        ctx.undo(|| ignore(drop_lock(ctx, vmid, name, failure.interrupted)));
        return Err(failure);
    }
    let _held = locks::config(ctx, vmid)?;
    let mut conf = cluster::load_quiet(ctx, vmid)?;
    conf.main.keys.remove("lock");
    conf.main.set("parent", name);
    if let Some(section) = conf.snapshots.get_mut(name) {
        section.keys.remove("snapstate");
    }
    ctx.step("write", || cluster::save(ctx, vmid, &conf))
}

/// Writes the section and the lock, which stay in the configuration while the volume is copied.
fn prepare(ctx: &Ctx, vmid: u32, name: &str, description: Option<&str>) -> Result<Volume> {
    let _held = ctx.step("lock", || locks::config(ctx, vmid))?;
    let mut conf = cluster::load(ctx, vmid)?;
    if conf.main.flag("template") {
        return Err(Failure::new("you can't take a snapshot if it's a template"));
    }
    cluster::check_lock(&conf)?;
    if conf.snapshots.contains_key(name) {
        return Err(Failure::new(format!("snapshot name '{name}' already used")));
    }
    let volume = volume(&conf)?;
    let mut section = conf.main.clone();
    section.description = description.map(|text| format!("{text}\n"));
    section.set("snaptime", now().to_string());
    section.set("snapstate", "prepare");
    conf.snapshots.insert(name.to_owned(), section);
    conf.main.set("lock", "snapshot");
    cluster::save(ctx, vmid, &conf)?;
    Ok(volume)
}

fn drop_lock(ctx: &Ctx, vmid: u32, name: &str, keep_section: bool) -> Result {
    let _held = locks::config(ctx, vmid)?;
    let mut conf = cluster::load_quiet(ctx, vmid)?;
    if !ctx.leave_lock.get() {
        conf.main.keys.remove("lock");
    }
    if !keep_section {
        conf.snapshots.remove(name);
    }
    cluster::save(ctx, vmid, &conf)
}

/// Runs the snapshot as the monitor does, which freezes a running container meanwhile. If the
/// container was already frozen, the monitor waits for an event that never comes. If only its inner
/// cgroup was frozen, it is thawed after the snapshot.
fn freeze_around(ctx: &Ctx, vmid: u32, run: impl FnOnce() -> Result) -> Result {
    if !state::is_running(ctx, vmid) {
        return run();
    }
    if state::is_frozen(ctx, vmid) {
        let waited = state::hang_monitor(ctx, vmid);
        if let Err(failure) = waited {
            ctx.undo(|| ignore(ctx.say("received interrupt")));
            return Err(Failure { message: String::new(), ..failure });
        }
    }
    let done = run();
    ignore(fs::write(state::cgroup(ctx, vmid).join("ns/cgroup.freeze"), "0"));
    done
}

pub(super) fn roll_back(ctx: &Ctx, vmid: u32, name: &str, start: bool) -> Result {
    {
        let _held = ctx.step("lock", || locks::config(ctx, vmid))?;
        let conf = cluster::load(ctx, vmid)?;
        let section = conf.snapshots.get(name).cloned().ok_or_else(|| missing(name))?;
        cluster::check_lock(&conf)?;
        if state::is_running(ctx, vmid) {
            control::kill(ctx, vmid)?;
        }
        let volume = volume(&conf)?;
        pool::roll_back(ctx, &volume, name)?;
        let mut conf = Conf { main: section, ..conf };
        conf.main.keys.remove("snaptime");
        conf.main.set("parent", name);
        conf.main.description = None;
        cluster::save(ctx, vmid, &conf)?;
    }
    if start { start::work(ctx, vmid, false) } else { Ok(()) }
}

pub(super) fn delete(ctx: &Ctx, vmid: u32, name: &str) -> Result {
    let _held = ctx.step("lock", || locks::config(ctx, vmid))?;
    let mut conf = cluster::load(ctx, vmid)?;
    let section = conf.snapshots.get(name).cloned().ok_or_else(|| missing(name))?;
    cluster::check_lock(&conf)?;
    pool::drop_snapshot(ctx, &volume(&conf)?, name)?;
    conf.snapshots.remove(name);
    // Children of the removed snapshot get its parent.
    let Conf { main, snapshots, .. } = &mut conf;
    for child in std::iter::once(main).chain(snapshots.values_mut()) {
        if child.get("parent") == Some(name) {
            match section.get("parent") {
                Some(parent) => child.set("parent", parent),
                None => drop(child.keys.remove("parent")),
            }
        }
    }
    cluster::save(ctx, vmid, &conf)
}

fn list(ctx: &Ctx, conf: &Conf) -> Result {
    let mut depth = 0;
    let mut parent: Option<String> = None;
    // One line of descent; the real `pct` draws a tree.
    loop {
        let child = |(_, s): &(&String, &crate::conf::Section)| {
            s.get("parent").map(str::to_owned) == parent
        };
        let Some((name, section)) = conf.snapshots.iter().find(child) else { break };
        let time = section.number("snaptime").unwrap_or(0);
        let said = section.description.as_deref().unwrap_or("no-description").trim_end();
        line(ctx, depth, name, &utc(time), said)?;
        parent = Some(name.clone());
        depth += 1;
        if depth > conf.snapshots.len() {
            break;
        }
    }
    line(ctx, depth, "current", "", "You are here!")
}

fn line(ctx: &Ctx, depth: usize, name: &str, time: &str, said: &str) -> Result {
    let head = format!("{}`-> {name}", " ".repeat(depth));
    ctx.say(&format!("{head:<31} {time:<23} {said}"))
}

/// Formats a time of day in UTC, the time zone of the recorded machine.
fn utc(seconds: u64) -> String {
    let days = i64::try_from(seconds / 86_400).unwrap_or(0);
    let rest = seconds % 86_400;
    // Civil date from days since the epoch (Howard Hinnant's algorithm).
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + i64::from(month <= 2);
    let (h, m, s) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02} {h:02}:{m:02}:{s:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_formatted_as_recorded() {
        assert_eq!(utc(1_795_446_858), "2026-11-23 15:14:18");
        assert_eq!(utc(0), "1970-01-01 00:00:00");
    }
}
