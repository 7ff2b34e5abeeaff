//! The root of a node: an overlay on the machine's root, with all changes on the node's own disk.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::{chdir, chroot, fchdir, pivot_root};

use crate::cgroup::NodeCgroup;
use crate::disk::{POOL, UPPER, WORK};
use crate::layout::{Layout, NODE_LOGS, NodeId};
use crate::lxcfs;

/// Directories that the node does not share: the machine's content must not show through.
const OWN: [&str; 3] = ["var/lib/lxc", "var/lib/vz", "var/log/pve"];

/// Devices of a node: name, major, minor. They belong to the kernel; no disk is among them.
const DEVICES: [(&str, u64, u64); 9] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("kmsg", 1, 11),
    ("tty", 5, 0),
    ("fuse", 10, 229),
    ("net/tun", 10, 200),
];

/// Assembles the root and makes it this process's own. The caller must be in the node's own mount
/// namespace and cgroup namespace.
pub(super) fn enter(layout: &Layout, node: NodeId, cgroup: &NodeCgroup) -> Result<()> {
    // Mounts from here on must not be visible on the machine.
    let here = File::open("/")?;
    to_the_namespaces_root()?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).context("cannot go private")?;
    fchdir(here)?;
    chroot(".").context("cannot go back into the chroot")?;

    let root = layout.root(node);
    overlay(&root, &layout.disk(node))?;
    bind(&layout.disk(node).join(POOL), &root.join(POOL))?;
    for path in OWN {
        let own = layout.disk(node).join("own").join(path);
        fs::create_dir_all(&own)?;
        bind(&own, &root.join(path))?;
    }
    bind(&layout.pve(node), &root.join("etc/pve"))?;
    new(&root.join("proc"), "proc", None)?;
    new(&root.join("sys"), "sysfs", None)?;
    // Only v2, as on PVE, whatever the machine has; the namespace limits it to the node's part.
    new(&root.join("sys/fs/cgroup"), "cgroup2", None)?;
    new(&root.join("run"), "tmpfs", Some("mode=755"))?;
    new(&root.join("tmp"), "tmpfs", Some("mode=1777"))?;
    devices(&root.join("dev"))?;
    // For load reports: on a machine with v1 they read there what v2 does not have. The v1 part is
    // writable, so that limits can be set for containers.
    let cgroups = root.join("run/lab/cgroup");
    bind_read_only(&cgroup.v2, &cgroups.join("unified"))?;
    for (controller, dir) in &cgroup.v1 {
        bind(dir, &cgroups.join(controller))?;
    }
    // Only where the lab has it. LXC's hook looks for it there, as on PVE.
    let lxcfs = layout.lxcfs();
    if lxcfs.join("proc").is_dir() {
        bind(&lxcfs, &root.join(lxcfs::IN_NODE.trim_start_matches('/')))?;
    }
    let logs = layout.node_logs(node);
    fs::create_dir_all(&logs)?;
    bind(&logs, &root.join(NODE_LOGS.trim_start_matches('/')))?;

    let held = File::open(&root)?;
    to_the_namespaces_root()?;
    fchdir(held)?;
    // Stacks the old root on top of the new root's own directory and detaches it at once.
    pivot_root(".", ".").context("cannot change the root")?;
    umount2(".", MntFlags::MNT_DETACH).context("cannot let go of the machine's root")?;
    chdir("/").context("cannot enter the new root")
}

/// Leaves a chroot, if this is one. Its root is no mount, and only a mount can be made private or
/// be replaced; joining the own mount namespace again leads to its real root.
fn to_the_namespaces_root() -> Result<()> {
    let namespace = File::open("/proc/self/ns/mnt")?;
    setns(namespace, CloneFlags::CLONE_NEWNS).context("cannot leave the chroot")
}

fn overlay(root: &Path, disk: &Path) -> Result<()> {
    fs::create_dir_all(root)?;
    let (upper, work) = (disk.join(UPPER), disk.join(WORK));
    let options = format!("lowerdir=/,upperdir={},workdir={}", upper.display(), work.display());
    ensure!(
        !upper.to_string_lossy().contains([':', ',', '\\']),
        "the lab's directory must not have one of : , \\ in its name"
    );
    mount(Some("overlay"), root, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .context("cannot lay the node's changes over the machine's root")
}

fn devices(dev: &Path) -> Result<()> {
    new(dev, "tmpfs", Some("mode=755"))?;
    fs::create_dir(dev.join("net"))?;
    for (name, major, minor) in DEVICES {
        let mode = Mode::from_bits_truncate(0o666);
        mknod(&dev.join(name), SFlag::S_IFCHR, Mode::empty(), makedev(major, minor))
            .with_context(|| format!("cannot make /dev/{name}"))?;
        // Set separately, because the umask applies to mknod.
        fs::set_permissions(
            dev.join(name),
            std::os::unix::fs::PermissionsExt::from_mode(mode.bits()),
        )?;
    }
    new(&dev.join("pts"), "devpts", Some("newinstance,ptmxmode=0666,mode=620,gid=5"))?;
    new(&dev.join("shm"), "tmpfs", Some("mode=1777"))?;
    new(&dev.join("mqueue"), "mqueue", None)?;
    for (target, name) in [
        ("pts/ptmx", "ptmx"),
        ("/proc/self/fd", "fd"),
        ("/proc/self/fd/0", "stdin"),
        ("/proc/self/fd/1", "stdout"),
        ("/proc/self/fd/2", "stderr"),
    ] {
        symlink(target, dev.join(name))?;
    }
    File::create(dev.join("console")).context("cannot make /dev/console").map(drop)
}

fn new(at: &Path, fs_type: &str, options: Option<&str>) -> Result<()> {
    fs::create_dir_all(at)?;
    mount(Some(fs_type), at, Some(fs_type), MsFlags::empty(), options)
        .with_context(|| format!("cannot mount {fs_type} on {}", at.display()))
}

fn bind(from: &Path, at: &Path) -> Result<()> {
    fs::create_dir_all(at)?;
    mount(Some(from), at, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("cannot bind {} to {}", from.display(), at.display()))
}

fn bind_read_only(from: &Path, at: &Path) -> Result<()> {
    bind(from, at)?;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, at, None::<&str>, flags, None::<&str>)
        .with_context(|| format!("cannot make {} read-only", at.display()))
}
