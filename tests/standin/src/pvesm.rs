//! `pvesm`: the sub-commands that show a storage, and some that an operator uses.

use std::fs;

use rustix::fs::statvfs;

use crate::cluster;
use crate::ctx::Ctx;
use crate::failure::{Failure, Result};
use crate::storage::volume::Volume;
use crate::storage::{self, Storage, pool};

/// Runs `pvesm ARGS`.
pub(crate) fn main(ctx: &Ctx, argv: &[String]) -> Result {
    let words: Vec<&str> = argv.iter().map(String::as_str).collect();
    match words.as_slice() {
        [] => Err(Failure::new("ERROR: no command specified")),
        ["status"] => status(ctx),
        ["list", name] => list(ctx, name),
        ["list", name, "--vmid", vmid] => list_of(ctx, name, vmid.parse().ok()),
        ["alloc", storage, vmid, "", _size] => alloc(ctx, storage, vmid),
        ["free", volume] => free(ctx, volume),
        ["path", volume] => path(ctx, volume),
        [other, ..] => Err(Failure::new(format!(
            "'pvesm {other}' in this form is not modelled by the stand-in"
        ))),
    }
}

fn status(ctx: &Ctx) -> Result {
    let mut storages = storage::all(ctx);
    storages.sort_by(|a, b| a.name.cmp(&b.name));
    let width = storages.iter().map(|s| s.name.len()).max().unwrap_or(0) + 1;
    let heading = format!(
        "{:<width$} {:>10} {:>10} {:>15} {:>15} {:>15} {:>8}",
        "Name", "Type", "Status", "Total (KiB)", "Used (KiB)", "Available (KiB)", "%"
    );
    ctx.say(&heading)?;
    for storage in &storages {
        let (state, [total, used, free]) = usage(ctx, storage)?;
        let percent = if total == 0 { 0.0 } else { used as f64 * 100.0 / total as f64 };
        let (name, kind) = (&storage.name, &storage.kind);
        ctx.say(&format!(
            "{name:<width$} {kind:>10} {state:>10} {total:>15} {used:>15} {free:>15} {percent:>7.2}%"
        ))?;
    }
    Ok(())
}

fn usage(ctx: &Ctx, storage: &Storage) -> Result<(&'static str, [u64; 3])> {
    if !storage::is_enabled(ctx, storage) {
        return Ok(("disabled", [0; 3]));
    }
    if let Err(failure) = storage::usable(ctx, &storage.name) {
        ctx.warn(&failure.message)?;
        return Ok(("inactive", [0; 3]));
    }
    let Ok(stat) = statvfs(storage.dir(ctx)) else { return Ok(("inactive", [0; 3])) };
    let kib = |blocks: u64| blocks.saturating_mul(stat.f_frsize) / 1024;
    let used = kib(stat.f_blocks.saturating_sub(stat.f_bfree));
    Ok(("active", [kib(stat.f_blocks), used, kib(stat.f_bavail)]))
}

fn list(ctx: &Ctx, name: &str) -> Result {
    list_of(ctx, name, None)
}

fn list_of(ctx: &Ctx, name: &str, only: Option<u32>) -> Result {
    let storage = storage::usable(ctx, name)?;
    let volumes = pool::volumes(ctx, &storage);
    let volumes: Vec<Volume> =
        volumes.into_iter().filter(|v| only.is_none_or(|vmid| v.owner() == Some(vmid))).collect();
    let width = volumes.iter().map(|v| v.to_string().len()).max().unwrap_or(0).max(5);
    let row = |id: &str, format: &str, kind: &str, size: &str, vmid: &str| {
        ctx.say(&format!("{id:<width$} {format:<7} {kind:<9} {size:>10} {vmid}"))
    };
    row("Volid", "Format", "Type", "Size", "VMID")?;
    for volume in &volumes {
        let vmid = volume.owner().unwrap_or(0);
        // A volume whose container does not exist is not listed as a container's.
        let kind = if cluster::check_unused(ctx, vmid).is_err() { "rootdir" } else { "images" };
        let size = pool::size_bytes(ctx, volume).to_string();
        row(&volume.to_string(), "subvol", kind, &size, &vmid.to_string())?;
    }
    Ok(())
}

/// Allocates a volume. The size is not stored: nothing here has a quota.
fn alloc(ctx: &Ctx, storage: &str, vmid: &str) -> Result {
    let unfit = || Failure::coded(2, "400 Parameter verification failed.\nvmid: invalid format");
    let volume = pool::alloc_as(ctx, storage, "vm", vmid.parse().map_err(|_| unfit())?)?;
    ctx.say(&format!("successfully created '{volume}'"))
}

fn free(ctx: &Ctx, text: &str) -> Result {
    let volume = Volume::parse(text)?;
    pool::free(ctx, &volume)?;
    ctx.say(&format!("Removed volume '{volume}'"))
}

fn path(ctx: &Ctx, text: &str) -> Result {
    let volume = Volume::parse(text)?;
    let path = pool::existing(ctx, &volume)?;
    let path = fs::canonicalize(&path).unwrap_or(path);
    ctx.say(&path.display().to_string())
}
