//! Volumes of a pool: btrfs subvolumes, or plain directories where a test has no btrfs.
//!
//! Everything goes through the `btrfs` program, as real `pct` does for its btrfs storage, so that
//! the recorded messages appear by themselves and a test can slow a step with a wrapper.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::fs::statfs;

use super::volume::{MountPoint, Volume, owner_of};
use super::{Storage, usable};
use crate::cluster;
use crate::ctx::Ctx;
use crate::failure::{Failure, Result, ignore};
use crate::locks;
use crate::run::{self, PATH, run};

/// Longest run of a program; the copy of a template takes longest.
const LIMIT: Duration = Duration::from_secs(300);
const BTRFS_MAGIC: u64 = 0x9123_683E;

fn is_btrfs(dir: &Path) -> bool {
    statfs(dir).is_ok_and(|s| u64::try_from(s.f_type).is_ok_and(|t| t == BTRFS_MAGIC))
}

fn program(name: &str) -> Command {
    let mut command = Command::new(name);
    command.env("PATH", PATH).env("LC_ALL", "C");
    command
}

/// Returns the path of a volume.
pub(crate) fn path(ctx: &Ctx, storage: &Storage, name: &str) -> PathBuf {
    storage.dir(ctx).join(name)
}

/// Returns the path of a volume of a usable storage; fails if the volume does not exist.
pub(crate) fn existing(ctx: &Ctx, volume: &Volume) -> Result<PathBuf> {
    let storage = usable(ctx, &volume.storage)?;
    let path = path(ctx, &storage, &volume.name);
    if path.is_dir() {
        return Ok(path);
    }
    Err(Failure::new(format!("volume '{volume}' does not exist")))
}

/// Returns the first `STEM-ID-disk-N` whose number no volume of a container has.
fn free_name(ctx: &Ctx, storage: &Storage, stem: &str, vmid: u32) -> String {
    let is_free = |n: &u32| {
        let taken = |stem: &&str| path(ctx, storage, &format!("{stem}-{vmid}-disk-{n}")).exists();
        !["subvol", "basevol", "vm"].iter().any(taken)
    };
    (0..).find(is_free).map(|n| format!("{stem}-{vmid}-disk-{n}")).unwrap_or_default()
}

/// Creates a linked clone. The volume exists before it is recorded anywhere: a process that is
/// stopped in between leaves an orphan, as the real `pct` does.
pub(crate) fn clone(ctx: &Ctx, source: &Volume, vmid: u32) -> Result<Volume> {
    let storage = usable(ctx, &source.storage)?;
    let _held = locks::storage(ctx, &storage.name)?;
    let name = free_name(ctx, &storage, "subvol", vmid);
    let (from, to) = (path(ctx, &storage, &source.name), path(ctx, &storage, &name));
    note_base(ctx, &storage, &name, source.is_base().then_some(source.name.as_str()));
    snapshot(ctx, &from, &to, false)?;
    let base = source.is_base().then(|| source.name.clone());
    Ok(Volume { storage: storage.name, base, name })
}

fn snapshot(ctx: &Ctx, from: &Path, to: &Path, read_only: bool) -> Result {
    let told = format!("btrfs subvolume snapshot -- {} {}", from.display(), to.display());
    let done = ctx.step("volume", || {
        if is_btrfs(from) {
            let mut command = program("btrfs");
            command.args(["-q", "subvolume", "snapshot"]);
            if read_only {
                command.arg("-r");
            }
            run(ctx, command.arg("--").arg(from).arg(to), LIMIT).map(drop)
        } else {
            copy(ctx, from, to)
        }
    });
    done.map_err(|failure| {
        // Wherever in this step the signal came, the real `pct` names the command that it
        // interrupted.
        if failure.interrupted && !failure.message.contains("broken pipe") {
            return run::interrupted(&told);
        }
        Failure { message: failure.message.replace("btrfs -q ", "btrfs "), ..failure }
    })
}

fn copy(ctx: &Ctx, from: &Path, to: &Path) -> Result {
    let mut command = program("cp");
    run(ctx, command.args(["-a", "--reflink=auto", "--"]).arg(from).arg(to), LIMIT).map(drop)
}

/// Creates an empty volume for a container.
pub(crate) fn alloc(ctx: &Ctx, storage_name: &str, vmid: u32) -> Result<Volume> {
    alloc_as(ctx, storage_name, "subvol", vmid)
}

/// Creates an empty volume whose name begins with a stem.
pub(crate) fn alloc_as(ctx: &Ctx, storage_name: &str, stem: &str, vmid: u32) -> Result<Volume> {
    let storage = usable(ctx, storage_name)?;
    let _held = locks::storage(ctx, &storage.name)?;
    let name = free_name(ctx, &storage, stem, vmid);
    let to = path(ctx, &storage, &name);
    ctx.step("volume", || {
        if is_btrfs(&storage.dir(ctx)) {
            let mut command = program("btrfs");
            run(ctx, command.args(["-q", "subvolume", "create", "--"]).arg(&to), LIMIT).map(drop)
        } else {
            fs::create_dir(&to).map_err(|e| Failure::io("create", &to, &e))
        }
    })?;
    Ok(Volume { storage: storage.name, base: None, name })
}

/// Creates a volume with a copy of another volume's content.
pub(crate) fn full_copy(ctx: &Ctx, source: &Volume, storage: &str, vmid: u32) -> Result<Volume> {
    let from = existing(ctx, source)?;
    let made = alloc(ctx, storage, vmid)?;
    let storage = usable(ctx, &made.storage)?;
    let to = path(ctx, &storage, &made.name);
    let mut command = program("cp");
    command.args(["-a", "--reflink=auto", "--"]).arg(from.join(".")).arg(to.join("."));
    match run(ctx, &mut command, LIMIT) {
        Ok(_) => Ok(made),
        Err(failure) => {
            ignore(free(ctx, &made));
            Err(failure)
        }
    }
}

/// Removes a volume.
pub(crate) fn free(ctx: &Ctx, volume: &Volume) -> Result {
    let storage = usable(ctx, &volume.storage)?;
    let _held = locks::storage(ctx, &storage.name)?;
    let used = |name: &String| base_of(ctx, &storage, name).as_deref() == Some(&volume.name);
    if volume.is_base() && names(ctx, &storage).iter().any(used) {
        return Err(Failure::new(format!(
            "base volume '{volume}' is still in use by linked clones"
        )));
    }
    delete(ctx, &path(ctx, &storage, &volume.name))?;
    ignore(fs::remove_file(base_note(ctx, &storage, &volume.name)));
    Ok(())
}

/// Removes a volume or a snapshot by its path.
pub(crate) fn delete(ctx: &Ctx, path: &Path) -> Result {
    if is_btrfs(path.parent().unwrap_or(path)) {
        let mut command = program("btrfs");
        let deleted =
            run(ctx, command.args(["-q", "subvolume", "delete", "--"]).arg(path), LIMIT).map(drop);
        return deleted
            .map_err(|f| Failure { message: f.message.replace("btrfs -q ", "btrfs "), ..f });
    }
    if !path.exists() {
        let text = "failed: ERROR: Could not statfs: No such file or directory";
        let path = path.display();
        return Err(Failure::new(format!("command 'btrfs subvolume delete -- {path}' {text}")));
    }
    fs::remove_dir_all(path).map_err(|e| Failure::io("delete", path, &e))
}

/// Turns a container's volume into a template's volume.
pub(crate) fn make_base(ctx: &Ctx, volume: &Volume) -> Result<Volume> {
    let storage = usable(ctx, &volume.storage)?;
    let _held = locks::storage(ctx, &storage.name)?;
    let name = volume.name.replacen("subvol-", "basevol-", 1);
    let (from, to) = (path(ctx, &storage, &volume.name), path(ctx, &storage, &name));
    fs::rename(&from, &to).map_err(|e| Failure::io("rename", &from, &e))?;
    Ok(Volume { storage: storage.name, base: None, name })
}

/// Creates a read-only copy of a volume beside it, under a snapshot's name.
pub(crate) fn take_snapshot(ctx: &Ctx, volume: &Volume, name: &str) -> Result {
    let storage = usable(ctx, &volume.storage)?;
    let _held = locks::storage(ctx, &storage.name)?;
    let from = path(ctx, &storage, &volume.name);
    snapshot(ctx, &from, &snapshot_path(ctx, &storage, volume, name), true)
}

/// Resets a volume to one of its snapshots.
pub(crate) fn roll_back(ctx: &Ctx, volume: &Volume, name: &str) -> Result {
    let storage = usable(ctx, &volume.storage)?;
    let _held = locks::storage(ctx, &storage.name)?;
    let at = path(ctx, &storage, &volume.name);
    let kept = snapshot_path(ctx, &storage, volume, name);
    if !kept.is_dir() {
        return Err(Failure::new(format!("can't roll back, snapshot '{name}' is not there")));
    }
    delete(ctx, &at)?;
    snapshot(ctx, &kept, &at, false)
}

/// Removes a snapshot of a volume; a missing one counts as removed.
pub(crate) fn drop_snapshot(ctx: &Ctx, volume: &Volume, name: &str) -> Result {
    let storage = usable(ctx, &volume.storage)?;
    let _held = locks::storage(ctx, &storage.name)?;
    let kept = snapshot_path(ctx, &storage, volume, name);
    if kept.is_dir() { delete(ctx, &kept) } else { Ok(()) }
}

fn snapshot_path(ctx: &Ctx, storage: &Storage, volume: &Volume, name: &str) -> PathBuf {
    path(ctx, storage, &format!("{}@{name}", volume.name))
}

/// Returns a snapshot as the source of a linked clone.
pub(crate) fn snapshot_volume(volume: &Volume, name: &str) -> Volume {
    Volume { base: None, name: format!("{}@{name}", volume.name), ..volume.clone() }
}

/// Returns the names of the volumes in a storage.
pub(crate) fn names(ctx: &Ctx, storage: &Storage) -> Vec<String> {
    let Ok(entries) = fs::read_dir(storage.dir(ctx)) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| owner_of(name).is_some())
        .collect();
    names.sort_by_key(|name| (owner_of(name), name.clone()));
    names
}

pub(crate) fn volumes(ctx: &Ctx, storage: &Storage) -> Vec<Volume> {
    let volume = |name: String| Volume {
        storage: storage.name.clone(),
        base: base_of(ctx, storage, &name),
        name,
    };
    names(ctx, storage).into_iter().map(volume).collect()
}

/// Returns the requested size of a volume, as its owner's or its base's configuration states it.
pub(crate) fn size_bytes(ctx: &Ctx, volume: &Volume) -> u64 {
    let says = |vmid: Option<u32>| {
        let conf = cluster::load_quiet(ctx, vmid?).ok()?;
        let size = MountPoint::parse(conf.main.get("rootfs")?).size_bytes();
        (size > 0).then_some(size)
    };
    let base_owner = volume.base.as_deref().and_then(owner_of);
    says(volume.owner()).or_else(|| says(base_owner)).unwrap_or(0)
}

/// Returns the file that records the origin of a clone: ZFS knows it, btrfs does not.
fn base_note(ctx: &Ctx, storage: &Storage, name: &str) -> PathBuf {
    storage.dir(ctx).join(".origin").join(name)
}

fn note_base(ctx: &Ctx, storage: &Storage, name: &str, base: Option<&str>) {
    let note = base_note(ctx, storage, name);
    if let (Some(dir), Some(base)) = (note.parent(), base) {
        ignore(fs::create_dir_all(dir));
        ignore(fs::write(&note, base));
    }
}

fn base_of(ctx: &Ctx, storage: &Storage, name: &str) -> Option<String> {
    fs::read_to_string(base_note(ctx, storage, name)).ok()
}
