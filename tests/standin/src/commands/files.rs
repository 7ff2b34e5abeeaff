//! `pct push` and `pct pull`. If the work fails, the exit code is 0, as with the real `pct`.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use nix::unistd::{Gid as NixGid, Uid as NixUid, setfsgid, setfsuid};
use rustix::fs::{CWD, Gid, Mode, OFlags, ResolveFlags, Uid, fchown, openat, openat2};
use serde::{Deserialize, Serialize};

use super::template::exit_zero;
use super::{Entry, Work, in_worker};
use crate::args::{Args, Kind, Spec};
use crate::cluster;
use crate::ctx::Ctx;
use crate::failure::{Failure, Result, reason};
use crate::locks;
use crate::lxc::config::FIRST_ID;
use crate::lxc::state;

const OPTIONS: &[(&str, Kind)] =
    &[("group", Kind::Text), ("perms", Kind::Text), ("user", Kind::Text)];

pub(super) const PUSH: Entry = Entry {
    spec: Spec {
        name: "push",
        positional: &[("vmid", Kind::Vmid), ("file", Kind::Text), ("destination", Kind::Text)],
        extra: false,
        options: OPTIONS,
        usage: "<vmid> <file> <destination> [OPTIONS]",
    },
    run: |ctx, args| {
        let plan = plan(ctx, args, "push files to")?;
        in_worker(ctx, "push_file", plan.vmid, Work::Push(plan)).map_err(exit_zero)
    },
};

pub(super) const PULL: Entry = Entry {
    spec: Spec {
        name: "pull",
        positional: &[("vmid", Kind::Vmid), ("path", Kind::Text), ("destination", Kind::Text)],
        extra: false,
        options: OPTIONS,
        usage: "<vmid> <path> <destination> [OPTIONS]",
    },
    run: |ctx, args| {
        let plan = plan(ctx, args, "pull files from")?;
        in_worker(ctx, "pull_file", plan.vmid, Work::Pull(plan)).map_err(exit_zero)
    },
};

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) vmid: u32,
    from: PathBuf,
    to: PathBuf,
    user: u32,
    group: u32,
    mode: u32,
}

fn plan(ctx: &Ctx, args: &Args, doing: &str) -> Result<Plan> {
    let vmid = args.vmid(0);
    cluster::load(ctx, vmid)?;
    if !state::is_running(ctx, vmid) {
        return Err(Failure::new(format!("can only {doing} a running CT")));
    }
    let number = |name: &str| match args.get(name) {
        None => Ok(0),
        Some(text) => text
            .parse()
            .map_err(|_| Failure::new(format!("'--{name}' takes only a number in the stand-in"))),
    };
    let mode = u32::from_str_radix(args.get("perms").unwrap_or("644"), 8)
        .map_err(|_| Failure::coded(2, "--perms must be an octal mode"))?;
    let (from, to) = (PathBuf::from(args.at(1)), PathBuf::from(args.at(2)));
    Ok(Plan { vmid, from, to, user: number("user")?, group: number("group")?, mode })
}

pub(super) fn push(ctx: &Ctx, plan: &Plan) -> Result {
    let _held = locks::config(ctx, plan.vmid)?;
    let mut from = File::open(&plan.from)
        .map_err(|_| Failure::new(format!("failed to open {} for reading", plan.from.display())))?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
    let mut to = open_inside(ctx, plan, &plan.to, flags).map_err(|error| {
        let (path, why) = (plan.to.display(), reason(&error));
        Failure::new(format!("failed to create file: {path}: {why}"))
    })?;
    let fail = |error: io::Error| Failure::new(format!("failed to write file: {}", reason(&error)));
    ctx.step("copy", || io::copy(&mut from, &mut to).map(drop).map_err(fail))?;
    to.set_permissions(Permissions::from_mode(plan.mode)).map_err(fail)?;
    let id = |inside: u32| FIRST_ID + inside;
    let (user, group) = (Uid::from_raw(id(plan.user)), Gid::from_raw(id(plan.group)));
    fchown(&to, Some(user), Some(group)).map_err(|e| fail(e.into()))
}

pub(super) fn pull(ctx: &Ctx, plan: &Plan) -> Result {
    let _held = locks::config(ctx, plan.vmid)?;
    let mut from = open_inside(ctx, plan, &plan.from, OFlags::RDONLY)
        .map_err(|_| Failure::new(format!("failed to open {} for reading", plan.from.display())))?;
    let fail = |error: io::Error| {
        let (path, why) = (plan.to.display(), reason(&error));
        Failure::new(format!("failed to create file: {path}: {why}"))
    };
    let mut to = File::create(&plan.to).map_err(fail)?;
    ctx.step("copy", || io::copy(&mut from, &mut to).map(drop).map_err(fail))
}

/// Opens a path with the container's root as the root, as the container's own root user: the mount
/// has no mapping for host ids, so they could not own a new file.
fn open_inside(ctx: &Ctx, plan: &Plan, path: &PathBuf, flags: OFlags) -> io::Result<File> {
    let pid = state::init_pid(ctx, plan.vmid).ok().flatten();
    let pid = pid.ok_or_else(|| io::Error::other("not running"))?;
    let root =
        openat(CWD, format!("/proc/{pid}/root"), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let become_user = |id: u32| {
        setfsgid(NixGid::from_raw(id));
        setfsuid(NixUid::from_raw(id));
    };
    become_user(FIRST_ID);
    // openat2 refuses a mode if nothing is created.
    let new = flags.contains(OFlags::CREATE);
    let mode = if new { Mode::from_raw_mode(0o600) } else { Mode::empty() };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let opened = openat2(&root, path, flags | OFlags::CLOEXEC, mode, resolve);
    become_user(0);
    Ok(File::from(opened?))
}
