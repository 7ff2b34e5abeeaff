//! /etc/pve as `pct` uses it: the node's name, the quorum, the holder of a VMID, configurations.
//!
//! On real nodes pmxcfs enforces the rules (one ID.conf in the whole cluster, no writes without
//! quorum). On a plain directory, in tests, this module enforces them.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::PathBuf;

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;

use crate::conf::Conf;
use crate::ctx::Ctx;
use crate::failure::{Failure, Result, ignore, reason};
use crate::roots::Roots;

/// Returns this node's name: the host's name without its domain.
pub(crate) fn node_name() -> String {
    let named = std::env::var("PCT_NODE").ok().filter(|n| !n.is_empty());
    let host = || nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned();
    let name = named.unwrap_or_else(host);
    name.split('.').next().unwrap_or_default().to_owned()
}

/// Returns whether the cluster file system runs; an empty /etc/pve means that pmxcfs is stopped.
pub(crate) fn is_up(roots: &Roots) -> bool {
    roots.etc_pve.join("nodes").is_dir()
}

fn dir(ctx: &Ctx) -> PathBuf {
    ctx.roots.etc_pve.join("nodes").join(&ctx.node).join("lxc")
}

/// Returns the path of a container's configuration on this node.
pub(crate) fn conf_path(ctx: &Ctx, vmid: u32) -> PathBuf {
    dir(ctx).join(format!("{vmid}.conf"))
}

/// Returns whether `.members` says that the cluster has no quorum.
fn inquorate(roots: &Roots) -> bool {
    let Ok(text) = fs::read_to_string(roots.etc_pve.join(".members")) else { return false };
    let Ok(members) = serde_json::from_str::<serde_json::Value>(&text) else { return false };
    members.pointer("/cluster/quorate").and_then(serde_json::Value::as_i64) == Some(0)
}

/// Fails if the cluster has no quorum.
pub(crate) fn check_quorum(ctx: &Ctx) -> Result {
    if inquorate(&ctx.roots) {
        return Err(Failure::new("cluster not ready - no quorum?"));
    }
    Ok(())
}

/// Returns the VMIDs with a configuration on this node, in order.
pub(crate) fn own_vmids(ctx: &Ctx) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(dir(ctx)) else { return Vec::new() };
    let vmid = |entry: io::Result<fs::DirEntry>| {
        entry.ok()?.file_name().to_str()?.strip_suffix(".conf")?.parse().ok()
    };
    let mut vmids: Vec<u32> = entries.filter_map(vmid).collect();
    vmids.sort_unstable();
    vmids
}

/// Returns the node whose directory holds a guest with this number, and the guest's kind.
fn holder(roots: &Roots, vmid: u32) -> Option<(String, &'static str)> {
    let nodes = fs::read_dir(roots.etc_pve.join("nodes")).ok()?;
    nodes.flatten().find_map(|node| {
        let has = |kind: &str| node.path().join(kind).join(format!("{vmid}.conf")).exists();
        let name = node.file_name().to_string_lossy().into_owned();
        has("lxc")
            .then(|| (name.clone(), "CT"))
            .or_else(|| has("qemu-server").then_some((name, "VM")))
    })
}

/// Fails if any guest in the cluster has the number.
pub(crate) fn check_unused(ctx: &Ctx, vmid: u32) -> Result {
    match holder(&ctx.roots, vmid) {
        None => Ok(()),
        Some((node, kind)) => {
            Err(Failure::new(format!("{kind} {vmid} already exists on node '{node}'")))
        }
    }
}

/// Reads a configuration without warnings about bad lines.
pub(crate) fn load_quiet(ctx: &Ctx, vmid: u32) -> Result<Conf> {
    match fs::read(conf_path(ctx, vmid)) {
        Ok(bytes) => Ok(Conf::parse(&String::from_utf8_lossy(&bytes))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let path = format!("nodes/{}/lxc/{vmid}.conf", ctx.node);
            // The exit code is ENOENT, the errno that is left over.
            Err(Failure::coded(2, format!("Configuration file '{path}' does not exist")))
        }
        Err(error) => Err(Failure::io("open file", &conf_path(ctx, vmid), &error)),
    }
}

/// Reads a configuration and prints warnings about bad lines on stderr.
pub(crate) fn load(ctx: &Ctx, vmid: u32) -> Result<Conf> {
    let conf = load_quiet(ctx, vmid)?;
    for warning in &conf.warnings {
        ctx.warn(&warning.text(vmid))?;
    }
    Ok(conf)
}

/// Fails if the container's configuration has a lock.
pub(crate) fn check_lock(conf: &Conf) -> Result {
    match conf.main.get("lock") {
        None => Ok(()),
        Some(lock) => Err(Failure::new(format!("CT is locked ({lock})"))),
    }
}

/// Replaces a configuration atomically: writes a file beside it, then renames it.
pub(crate) fn save(ctx: &Ctx, vmid: u32, conf: &Conf) -> Result {
    let tmp = write_beside(ctx, vmid, conf)?;
    fs::rename(&tmp, conf_path(ctx, vmid)).map_err(|error| rename_failed(ctx, vmid, &tmp, &error))
}

/// Writes the first version of a configuration. If two processes try, on any nodes, one wins.
pub(crate) fn create(ctx: &Ctx, vmid: u32, conf: &Conf) -> Result {
    // pmxcfs refuses a second ID.conf by itself; a plain directory needs this lock. A file system
    // without flock is pmxcfs or something like it.
    let root = File::open(&ctx.roots.etc_pve);
    if let Ok(root) = &root {
        ignore(flock(root, FlockOperation::LockExclusive));
    }
    check_unused(ctx, vmid)?;
    let tmp = write_beside(ctx, vmid, conf)?;
    let target = conf_path(ctx, vmid);
    let renamed = match renameat_with(CWD, &tmp, CWD, &target, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS) => fs::rename(&tmp, &target),
        other => other.map_err(io::Error::from),
    };
    renamed.map_err(|error| {
        let failure = rename_failed(ctx, vmid, &tmp, &error);
        if error.kind() == io::ErrorKind::AlreadyExists {
            return check_unused(ctx, vmid).err().unwrap_or(failure);
        }
        failure
    })
}

fn rename_failed(ctx: &Ctx, vmid: u32, tmp: &std::path::Path, error: &io::Error) -> Failure {
    ignore(fs::remove_file(tmp));
    let target = conf_path(ctx, vmid);
    let why = reason(error);
    Failure::coded(2, format!("close (rename) atomic file '{}' failed: {why}", target.display()))
}

fn write_beside(ctx: &Ctx, vmid: u32, conf: &Conf) -> Result<PathBuf> {
    let tmp = conf_path(ctx, vmid).with_extension(format!("conf.tmp.{}", std::process::id()));
    let denied = inquorate(&ctx.roots).then(|| io::Error::from_raw_os_error(13));
    let written = match denied {
        Some(error) => Err(error),
        None => File::create(&tmp).and_then(|mut file| file.write_all(conf.text().as_bytes())),
    };
    written.map_err(|error| {
        ignore(fs::remove_file(&tmp));
        let real = format!("{}", tmp.display());
        Failure::coded(2, format!("unable to open file '{real}' - {}", reason(&error)))
    })?;
    Ok(tmp)
}

/// Removes a configuration.
pub(crate) fn remove(ctx: &Ctx, vmid: u32) -> Result {
    let path = conf_path(ctx, vmid);
    if inquorate(&ctx.roots) {
        let error = io::Error::from_raw_os_error(13);
        return Err(Failure::io("unlink", &path, &error));
    }
    fs::remove_file(&path).map_err(|error| Failure::io("unlink", &path, &error))
}

/// Removes the lock from a configuration, under its flock.
pub(crate) fn remove_lock(ctx: &Ctx, vmid: u32, expected: &str) -> Result {
    let _held = crate::locks::config(ctx, vmid)?;
    let mut conf = load_quiet(ctx, vmid)?;
    match conf.main.get("lock") {
        Some(lock) if lock == expected => {}
        Some(lock) => {
            let text = format!("found lock '{lock}' trying to remove '{expected}' lock");
            return Err(Failure::new(text));
        }
        None => {
            return Err(Failure::new(format!("no lock found trying to remove '{expected}' lock")));
        }
    }
    if ctx.leave_lock.get() {
        return Ok(());
    }
    conf.main.keys.remove("lock");
    save(ctx, vmid, &conf)
}
