//! A node's disk: a sparse btrfs image on a loop device, for its root's changes and its volumes.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::image::Image;
use crate::lab::Node;
use crate::layout::{Layout, NodeId};
use crate::mounts;
use crate::run::{run, run_command};

/// Mapping of the containers' ids, as on PVE.
const ID_MAP: &str = "b:0:100000:65536";
const SHIFT: u32 = 100_000;
const UNTAR: &str = "tar --numeric-owner -xpf -";

/// Directory of the overlay's changes, below the disk.
pub const UPPER: &str = "root/upper";
/// Work directory of the overlay, below the disk.
pub const WORK: &str = "root/work";
/// Directory that becomes /rpool in the node.
pub const POOL: &str = "rpool";

/// Creates the image if it is missing, and mounts it.
pub fn ensure_mounted(layout: &Layout, node: NodeId, gib: u64) -> Result<()> {
    let (image, at) = (layout.disk_image(node), layout.disk(node));
    fs::create_dir_all(&at)?;
    if mounts::here()?.iter().any(|mount| mount.at == at) {
        return Ok(());
    }
    if !image.exists() {
        // Under another name until it is complete: a half-made image must not be used.
        let new = image.with_extension("new");
        File::create(&new)?.set_len(gib << 30).context("cannot make the disk image")?;
        let new_path = new.as_os_str();
        run(
            "mkfs.btrfs",
            ["-q".as_ref(), "-f".as_ref(), "-L".as_ref(), node.name().as_ref(), new_path],
        )?;
        fs::rename(&new, &image)?;
    }
    // The loop device disappears with its last mount.
    let options = "loop,noatime,discard=async";
    run("mount", ["-o".as_ref(), options.as_ref(), image.as_os_str(), at.as_os_str()])?;
    // The overlay needs both of its directories in one subvolume: no rename crosses two.
    for subvolume in ["root", POOL] {
        subvolume_ensure(&at.join(subvolume))?;
    }
    for dir in [UPPER, WORK, "rpool/data"] {
        fs::create_dir_all(at.join(dir))?;
    }
    Ok(())
}

/// Returns the path of a volume such as `basevol-9000-disk-0`, on the machine.
pub fn volume(layout: &Layout, node: NodeId, name: &str) -> PathBuf {
    layout.disk(node).join(POOL).join("data").join(name)
}

/// Unpacks a template on a running node into a new, read-only volume whose owners are shifted as
/// those of an unprivileged container are. A volume with the same stamp is kept; one with another
/// stamp is replaced, which does not affect its clones.
pub fn unpack(layout: &Layout, node: &Node, image: &Image, name: &str) -> Result<()> {
    let stamp = fs::read_to_string(layout.template_stamp(image)).context("there is no template")?;
    let volume = volume(layout, node.id(), name);
    let stamp_file = layout.disk(node.id()).join(format!("{name}.stamp"));
    if volume.exists() && fs::read_to_string(&stamp_file).is_ok_and(|old| old == stamp) {
        return Ok(());
    }
    let new = volume.with_file_name(format!("{name}.new"));
    subvolume_remove(&new)?;
    subvolume_ensure(&new)?;
    std::os::unix::fs::chown(&new, Some(SHIFT), Some(SHIFT))?;
    // In a user namespace, so that the kernel also shifts set-uid bits and file capabilities;
    // inside the node, because a chroot may not create a user namespace.
    let at = format!("/{POOL}/data/{name}.new");
    let line = format!("cd {at} && exec lxc-usernsexec -m {ID_MAP} -- {UNTAR}");
    let status = node
        .command(["/bin/sh", "-c", &line])
        .stdin(File::open(layout.template_tar(image))?)
        .stdout(Stdio::null())
        .status()
        .context("cannot unpack the template")?;
    ensure!(status.success(), "the template could not be unpacked ({status})");
    let mut read_only = Command::new("btrfs");
    read_only.args(["property", "set", "-ts"]).arg(&new).args(["ro", "true"]);
    run_command(&mut read_only)?;
    subvolume_remove(&volume)?;
    fs::rename(&new, &volume).context("cannot name the volume")?;
    fs::write(&stamp_file, stamp).context("cannot write the volume's stamp")
}

fn subvolume_remove(path: &Path) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let words = ["-q".as_ref(), "subvolume".as_ref(), "delete".as_ref(), path.as_os_str()];
    run("btrfs", words).map(drop)
}

fn subvolume_ensure(path: &Path) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    let words = ["-q".as_ref(), "subvolume".as_ref(), "create".as_ref(), path.as_os_str()];
    run("btrfs", words).map(drop)
}
