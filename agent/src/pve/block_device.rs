//! Block devices under a running container's volumes, as the kernel limits the use of them: whole disks,
//! by the numbers that cgroup files name.
//!
//! The mounts are read in the namespace of LXC's monitor, the parent of the container's init, where PVE
//! mounted the volumes: root in the container can unmount or cover what its own namespace shows.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    time::SystemTime,
};

use daemon::sync::Mutex;
use proto::id::Vmid;

use super::{HostPaths, container};
use crate::sys::{proc, read};

/// File systems in memory, and those of the kernel's own: they use no disk.
const MEMORY: [&str; 9] =
    ["tmpfs", "proc", "sysfs", "devpts", "devtmpfs", "mqueue", "cgroup", "cgroup2", "fuse.lxcfs"];

/// Most containers whose devices are remembered; beyond that all are looked for again.
const KNOWN_MAX: usize = 4096;

/// Devices of a container's volumes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Devices {
    /// Numbers of the disks, `MAJOR:MINOR`.
    pub disks: BTreeSet<String>,
    /// Reasons why volumes have no disk of their own.
    pub without: BTreeSet<String>,
}

/// Devices of running containers, which are looked for once a boot and a config.
#[derive(Debug, Default)]
pub struct KnownDevices(Mutex<BTreeMap<Vmid, (Stamp, Devices)>>);

/// State of a container in which its devices stay the same: a volume is added or grows by a change of its
/// config, and mounted before its init starts.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    /// Pid and start time of its init.
    init: (u32, u64),
    /// Time of the last change of its config, and its length.
    config: Option<(SystemTime, u64)>,
}

impl Stamp {
    /// Returns the state of the container with this init; `None` when that has ended.
    fn of(at: &HostPaths, vmid: Vmid, init: u32) -> Option<Self> {
        let start = proc::kin(&at.proc, init)?.start;
        let config = fs::metadata(at.root.join("lxc").join(format!("{vmid}.conf"))).ok();
        let config = config.and_then(|about| Some((about.modified().ok()?, about.len())));
        Some(Self { init: (init, start), config })
    }
}

impl KnownDevices {
    /// Finds the devices of a container's volumes, or returns those that are known.
    ///
    /// # Errors
    /// When the container does not run, or its mounts cannot be read.
    pub fn of_container(&self, at: &HostPaths, vmid: Vmid) -> io::Result<Devices> {
        let known = self.0.lock().get(&vmid).cloned();
        if let Some((stamp, devices)) = known
            && Stamp::of(at, vmid, stamp.init.0).as_ref() == Some(&stamp)
        {
            return Ok(devices);
        }
        // Before the search: what changes meanwhile is looked for again.
        let init = init_of(at, vmid)?;
        let stamp = Stamp::of(at, vmid, init);
        let devices = of_init(at, vmid, init)?;
        let mut all = self.0.lock();
        all.remove(&vmid);
        if let Some(stamp) = stamp.filter(|_| devices.without.is_empty()) {
            if all.len() >= KNOWN_MAX {
                all.clear();
            }
            all.insert(vmid, (stamp, devices.clone()));
        }
        Ok(devices)
    }
}

/// Mount of a container's volume.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    /// Number of its device; the major number is 0 where it has none of its own.
    device: String,
    fs_type: String,
    /// Device that was mounted, if the file system has one.
    source: PathBuf,
}

fn missing(what: &str) -> io::Error {
    io::Error::new(ErrorKind::NotFound, what.to_owned())
}

fn init_of(at: &HostPaths, vmid: Vmid) -> io::Result<u32> {
    let init = container::init_pid(&at.proc, &at.cgroup_root, vmid);
    init.ok_or_else(|| missing("the container's init is not found"))
}

/// Finds the devices of the volumes of the container with this init.
fn of_init(at: &HostPaths, vmid: Vmid, init: u32) -> io::Result<Devices> {
    let monitor =
        proc::kin(&at.proc, init).ok_or_else(|| missing("the container has ended"))?.parent;
    let mounts = at.proc.join(monitor.to_string()).join("mountinfo");
    let text = read::whole_text(&mounts, read::LARGE)?;
    let root = at.lxc_dir.join(vmid.to_string()).join("rootfs");
    Ok(of_mounts(&at.sys, &below(&text, &root)))
}

/// Finds the disks under a directory of the host; none where its file system has no block device.
///
/// # Errors
/// When the directory or this process's mounts cannot be read.
pub fn of_directory(at: &HostPaths, dir: &Path) -> io::Result<BTreeSet<String>> {
    let dir = fs::canonicalize(dir)?;
    let text = read::whole_text(&at.proc.join("self/mountinfo"), read::LARGE)?;
    // The deepest one; of several at the same point, the last covers the others.
    let above = mounts(&text, |point| dir.starts_with(point)).into_iter();
    let mount = above.max_by_key(|(point, _)| point.components().count());
    let mount: Vec<_> = mount.into_iter().map(|(_, mount)| mount).collect();
    Ok(of_mounts(&at.sys, &mount).disks)
}

/// Parses the mounts at and below `root`. Pure.
fn below(text: &str, root: &Path) -> Vec<Mount> {
    let found = mounts(text, |point| point.starts_with(root));
    found.into_iter().map(|(_, mount)| mount).collect()
}

/// Parses the mounts whose points are wanted, with their points. Pure.
fn mounts(text: &str, is_wanted: impl Fn(&Path) -> bool) -> Vec<(PathBuf, Mount)> {
    let mount = |line: &str| {
        let (own, of_fs) = line.split_once(" - ")?;
        let mut own = own.split(' ').skip(2);
        let (device, point) = (own.next()?, own.nth(1)?);
        let mut of_fs = of_fs.split(' ');
        let (fs_type, source) = (of_fs.next()?, of_fs.next()?);
        let point = PathBuf::from(unescaped(point));
        let mount = || Mount {
            device: device.to_owned(),
            fs_type: fs_type.to_owned(),
            source: unescaped(source).into(),
        };
        is_wanted(&point).then(|| (point, mount()))
    };
    text.lines().filter_map(mount).collect()
}

/// Replaces the octal escapes of spaces, tabs, newlines and backslashes.
fn unescaped(text: &str) -> String {
    let pairs = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    pairs.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

fn of_mounts(sys: &Path, mounts: &[Mount]) -> Devices {
    let mut devices = Devices::default();
    if mounts.is_empty() {
        devices
            .without
            .insert("its volumes are not found among the mounts of this host".to_owned());
    }
    for mount in mounts.iter().filter(|mount| !MEMORY.contains(&mount.fs_type.as_str())) {
        let disks = match (mount.device.starts_with("0:"), mount.fs_type.as_str()) {
            (false, _) => disk(&sys.join("dev/block").join(&mount.device)).into_iter().collect(),
            (true, "btrfs") => of_btrfs(sys, &mount.source),
            // ZFS and NFS have none, so nothing can be limited. `doctor` says that of the storage.
            (true, _) => continue,
        };
        if disks.is_empty() {
            let kind = &mount.fs_type;
            devices
                .without
                .insert(format!("{kind} has no block device that the kernel could limit"));
        }
        devices.disks.extend(disks);
    }
    devices
}

/// Returns the disks of a btrfs, which spreads over several: the mount names one of them.
fn of_btrfs(sys: &Path, source: &Path) -> Vec<String> {
    // `/dev/mapper/GROUP-VOLUME` is a link to `dm-NUMBER`.
    let source = fs::canonicalize(source).unwrap_or_else(|_| source.to_owned());
    let Some(named) = source.file_name() else { return Vec::new() };
    let file_systems = fs::read_dir(sys.join("fs/btrfs")).into_iter().flatten().flatten();
    let members = file_systems.map(|entry| entry.path().join("devices"));
    let found = members.filter(|devices| devices.join(named).exists()).find_map(|devices| {
        let all = fs::read_dir(devices).ok()?.flatten();
        Some(all.filter_map(|entry| disk(&entry.path())).collect::<Vec<_>>())
    });
    found.unwrap_or_else(|| disk(&sys.join("class/block").join(named)).into_iter().collect())
}

/// Number of the disk of a device, whose directory in sysfs this is: the kernel limits no partition.
fn disk(entry: &Path) -> Option<String> {
    let dir = fs::canonicalize(entry).ok()?;
    let whole = if dir.join("partition").exists() { dir.parent()?.to_owned() } else { dir };
    let number = read::text(&whole.join("dev"), read::SMALL).trim().to_owned();
    (!number.is_empty()).then_some(number)
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Adds a disk to a fake sysfs, with one partition where that has a number.
    pub(in crate::pve) fn add_disk(
        sys: &Path,
        (name, number): (&str, &str),
        partition: Option<(&str, &str)>,
    ) {
        let own = sys.join("devices/virtual/block").join(name);
        let links = ["dev/block", "class/block"].map(|dir| sys.join(dir));
        let add = |dir: &Path, name: &str, number: &str| {
            fs::create_dir_all(dir).expect("mkdir");
            fs::write(dir.join("dev"), format!("{number}\n")).expect("written");
            for (links, name) in links.iter().zip([number, name]) {
                fs::create_dir_all(links).expect("mkdir");
                symlink(dir, links.join(name)).expect("a link");
            }
        };
        add(&own, name, number);
        if let Some((name, number)) = partition {
            let dir = own.join(name);
            add(&dir, name, number);
            fs::write(dir.join("partition"), "1\n").expect("written");
        }
    }

    fn found(sys: &Path, text: &str) -> (Vec<String>, usize) {
        let devices = of_mounts(sys, &below(text, Path::new("/var/lib/lxc/100/rootfs")));
        (devices.disks.into_iter().collect(), devices.without.len())
    }

    #[test]
    fn volumes_with_devices_of_their_own_are_limited_there() {
        let dir = tempfile::tempdir().expect("tempdir");
        add_disk(dir.path(), ("loop3", "7:3"), None);
        add_disk(dir.path(), ("dm-4", "253:4"), None);
        add_disk(dir.path(), ("sda", "8:0"), Some(("sda3", "8:3")));
        let text = "\
            1 0 8:1 / / rw - ext4 /dev/sda1 rw\n\
            2 1 7:9 / /var/lib/lxc/1001/rootfs rw - ext4 /dev/loop9 rw\n\
            3 1 7:3 / /var/lib/lxc/100/rootfs rw shared:1 master:2 - ext4 /dev/loop3 rw\n\
            4 3 253:4 / /var/lib/lxc/100/rootfs/mnt/with\\040space rw - ext4 /dev/mapper/x rw\n\
            5 3 8:3 /cache /var/lib/lxc/100/rootfs/cache ro - ext4 /dev/sda3 rw\n\
            6 3 0:5 / /var/lib/lxc/100/rootfs/dev rw - tmpfs none rw\n";
        let disks = ["253:4", "7:3", "8:0"].map(str::to_owned).to_vec();
        assert_eq!(found(dir.path(), text), (disks, 0), "a partition is limited by its disk");
    }

    #[test]
    fn btrfs_is_limited_on_all_its_disks() {
        let dir = tempfile::tempdir().expect("tempdir");
        let sys = dir.path();
        add_disk(sys, ("sda", "8:0"), Some(("sda3", "8:3")));
        add_disk(sys, ("sdb", "8:16"), None);
        add_disk(sys, ("loop0", "7:0"), None);
        let members = sys.join("fs/btrfs/5a0f/devices");
        fs::create_dir_all(&members).expect("mkdir");
        for name in ["sda3", "sdb"] {
            symlink(sys.join("class/block").join(name), members.join(name)).expect("a link");
        }
        let on = |source: &str| {
            found(sys, &format!("3 1 0:44 /v /var/lib/lxc/100/rootfs rw - btrfs {source} rw\n"))
        };
        assert_eq!(on("/dev/sda3"), (vec!["8:0".to_owned(), "8:16".to_owned()], 0));
        assert_eq!(on("/dev/loop0"), (vec!["7:0".to_owned()], 0), "its members are not listed");
        assert_eq!(on("/dev/gone").1, 1);
    }

    #[test]
    fn disk_under_a_directory_is_that_of_the_mount_it_is_on() {
        let dir = tempfile::tempdir().expect("tempdir");
        let at = HostPaths {
            proc: dir.path().join("proc"),
            sys: dir.path().join("sys"),
            ..HostPaths::default()
        };
        add_disk(&at.sys, ("sda", "8:0"), Some(("sda1", "8:1")));
        add_disk(&at.sys, ("dm-4", "253:4"), None);
        let state = dir.path().join("state");
        fs::create_dir_all(state.join("exec")).expect("mkdir");
        fs::create_dir_all(at.proc.join("self")).expect("mkdir");
        let disks = |own: &str| {
            let point = fs::canonicalize(&state).expect("a path");
            let text = format!(
                "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n\
                 2 1 8:1 / {0}x rw - ext4 /dev/sda1 rw\n{own} / {0} rw - {1} rw\n\
                 4 1 8:1 / {0}/other rw - ext4 /dev/sda1 rw\n",
                point.display(),
                if own.ends_with("0:52") { "zfs rpool/data" } else { "ext4 /dev/mapper/x" },
            );
            fs::write(at.proc.join("self/mountinfo"), text).expect("written");
            of_directory(&at, &state.join("exec")).expect("read").into_iter().collect::<Vec<_>>()
        };
        assert_eq!(disks("3 1 253:4"), ["253:4"]);
        assert_eq!(disks("3 1 8:1"), ["8:0"], "the whole disk");
        assert_eq!(disks("3 1 0:52"), [""; 0], "it has no block device");
    }

    #[test]
    fn volume_that_no_kernel_can_limit_is_left_to_doctor() {
        let dir = tempfile::tempdir().expect("tempdir");
        let text = "3 1 0:52 / /var/lib/lxc/100/rootfs rw - zfs rpool/data/subvol-100-disk-0 rw\n";
        let devices = of_mounts(dir.path(), &below(text, Path::new("/var/lib/lxc/100/rootfs")));
        assert_eq!(devices, Devices::default());
        assert_eq!(found(dir.path(), ""), (Vec::new(), 1), "no mount at all");
    }
}
