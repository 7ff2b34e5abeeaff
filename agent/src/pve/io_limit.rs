//! Limit on a container's use of disks, for which `pct` has no option. It is written to the container's
//! own cgroup once that exists, for each disk under its volumes: `io.max` of cgroup2, or the files
//! `blkio.throttle.*` of v1.
//!
//! On v1 the kernel limits reads and direct writes; what is written through the page cache reaches the
//! disk in the name of the kernel. cgroup2 limits both.

use std::{collections::BTreeSet, io, path::Path};

use nix::errno::Errno;
use proto::id::Vmid;
use serde::{Deserialize, Serialize};

use super::{
    HostPaths,
    block_device::{Devices, KnownDevices},
    controller::{self, Hierarchy},
};
use crate::sys::read;

/// Name of the controller on v1, and on v2.
const CONTROLLER: [&str; 2] = ["blkio", "io"];
/// File of v2.
const FILE: &str = "io.max";
/// Words of v2 for the limits, in the order of `IoMax::all`.
const WORDS: [&str; 4] = ["rbps", "wbps", "riops", "wiops"];
/// Files of v1, in the same order.
const FILES: [&str; 4] = [
    "blkio.throttle.read_bps_device",
    "blkio.throttle.write_bps_device",
    "blkio.throttle.read_iops_device",
    "blkio.throttle.write_iops_device",
];

/// Most that a container may read and write, a second and a disk; `None`: no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoMax {
    /// Bytes read.
    pub read_bytes: Option<u64>,
    /// Bytes written.
    pub write_bytes: Option<u64>,
    /// Requests to read.
    pub reads: Option<u64>,
    /// Requests to write.
    pub writes: Option<u64>,
}

impl IoMax {
    fn all(self) -> [Option<u64>; 4] {
        [self.read_bytes, self.write_bytes, self.reads, self.writes]
    }

    /// True when nothing is limited.
    pub fn is_none(self) -> bool {
        self == Self::default()
    }
}

/// Result of limiting a container's use of disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IoLimited {
    /// The limits are in force for all its volumes that have a block device.
    InForce,
    /// The kernel of this host has no controller for it.
    NoController,
    /// Volumes are not limited, for these reasons; the others are.
    Partly(BTreeSet<String>),
}

/// Limits the use of disks of a running container. Writes nothing where these are the limits already, and
/// looks for its disks once a boot and a config.
///
/// # Errors
/// When the host can limit it and the limits are not in force.
pub fn set(at: &HostPaths, known: &KnownDevices, vmid: Vmid, max: IoMax) -> io::Result<IoLimited> {
    let [_, v2] = CONTROLLER;
    let Some(hierarchy) = hierarchy(at) else {
        return Ok(if max.is_none() { IoLimited::InForce } else { IoLimited::NoController });
    };
    let cgroup = hierarchy.of_container(vmid);
    let files: &[&str] = match hierarchy {
        Hierarchy::V1(_) => &FILES,
        Hierarchy::V2(_) => &[FILE],
    };
    let texts = || files.iter().map(|file| read::text(&cgroup.join(file), read::LARGE));
    if max.is_none() && texts().all(|text| text.trim().is_empty()) {
        return Ok(IoLimited::InForce);
    }
    hierarchy.enable(v2, &cgroup.join(FILE));
    let has_files = files.iter().all(|file| cgroup.join(file).exists());
    // Asked afterwards: the cgroup of a boot that failed may be removed just now.
    if !has_files && cgroup.is_dir() {
        // A kernel without CONFIG_BLK_DEV_THROTTLING has the controller, and none of its limits.
        return Ok(IoLimited::NoController);
    }
    let Devices { disks, mut without } = known.of_container(at, vmid)?;
    for disk in &disks {
        if !limit(&hierarchy, &cgroup, disk, max)? {
            without.insert(format!("the kernel does not limit the device {disk}"));
        }
    }
    Ok(if without.is_empty() || max.is_none() {
        IoLimited::InForce
    } else {
        IoLimited::Partly(without)
    })
}

/// Finds the hierarchy that limits the use of disks; `None` where the kernel of this host has none.
pub(super) fn hierarchy(at: &HostPaths) -> Option<Hierarchy> {
    let [v1, v2] = CONTROLLER;
    Hierarchy::find(at, v1, v2)
}

/// Limits the use of a disk in a cgroup. False when the kernel does not limit this device.
pub(super) fn limit(
    hierarchy: &Hierarchy,
    cgroup: &Path,
    disk: &str,
    max: IoMax,
) -> io::Result<bool> {
    let limited = match hierarchy {
        Hierarchy::V1(_) => limit_v1(cgroup, disk, max),
        Hierarchy::V2(_) => limit_v2(cgroup, disk, max),
    };
    match limited {
        Ok(()) => Ok(true),
        Err(error) if is_refusal(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// True when the kernel of this host has the controller.
pub fn can_limit(at: &HostPaths) -> bool {
    hierarchy(at).is_some()
}

/// True for the errors of a device that cannot be limited.
fn is_refusal(error: &io::Error) -> bool {
    let refusals = [Errno::ENODEV, Errno::ENXIO, Errno::EOPNOTSUPP, Errno::EINVAL];
    controller::errno(error).is_some_and(|number| refusals.contains(&Errno::from_raw(number)))
}

fn limit_v2(cgroup: &Path, disk: &str, max: IoMax) -> io::Result<()> {
    let file = cgroup.join(FILE);
    let text = read::text(&file, read::LARGE);
    let line = text.lines().find_map(|line| line.strip_prefix(disk)?.strip_prefix(' '));
    let is = |word: &str| {
        let mut words = line.unwrap_or_default().split_ascii_whitespace();
        words.find_map(|one| one.strip_prefix(word)?.strip_prefix('=')?.parse::<u64>().ok())
    };
    let wanted = WORDS.iter().zip(max.all());
    if wanted.clone().all(|(&word, max)| is(word) == max) {
        return Ok(());
    }
    let value = |max: Option<u64>| max.map_or_else(|| "max".to_owned(), |max| max.to_string());
    let words: Vec<_> = wanted.map(|(word, max)| format!("{word}={}", value(max))).collect();
    controller::write(&file, &format!("{disk} {}", words.join(" ")))
}

fn limit_v1(cgroup: &Path, disk: &str, max: IoMax) -> io::Result<()> {
    for (file, max) in FILES.iter().zip(max.all()) {
        let file = cgroup.join(file);
        let text = read::text(&file, read::LARGE);
        let line = text.lines().find_map(|line| line.strip_prefix(disk)?.strip_prefix(' '));
        if line.and_then(|value| value.trim().parse::<u64>().ok()) != max {
            // 0 removes the limit.
            controller::write(&file, &format!("{disk} {}", max.unwrap_or(0)))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs, io::ErrorKind};

    use super::*;
    use crate::pve::block_device::tests::add_disk;

    const MAX: IoMax =
        IoMax { read_bytes: Some(1000), write_bytes: None, reads: Some(50), writes: None };

    /// Fake host with a container 100 whose init is 42 and whose monitor is 41; directories stand for
    /// cgroups.
    struct Host {
        dir: tempfile::TempDir,
        at: HostPaths,
        known: KnownDevices,
    }

    impl Host {
        fn new(files: &[(&str, &str)], mounts: &str) -> Self {
            let dir = tempfile::tempdir().expect("tempdir");
            let at = HostPaths {
                cgroup_root: dir.path().join("cg"),
                proc: dir.path().join("proc"),
                sys: dir.path().join("sys"),
                root: dir.path().join("pve"),
                ..HostPaths::default()
            };
            let host = Self { dir, at, known: KnownDevices::default() };
            let stat = format!("42 (init) S 41 {}", "1 ".repeat(48));
            for (path, text) in [
                ("cg/lxc/100/ns/cgroup.procs", "42\n"),
                ("proc/42/status", "NSpid:\t42\t1\n"),
                ("proc/42/stat", &stat),
                ("proc/41/mountinfo", mounts),
            ] {
                host.write(path, text);
            }
            for (path, text) in files {
                host.write(path, text);
            }
            add_disk(&host.at.sys, ("loop3", "7:3"), None);
            host
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.dir.path().join(path);
            fs::create_dir_all(path.parent().expect("a directory")).expect("mkdir");
            fs::write(path, text).expect("written");
        }

        fn set(&self, max: IoMax) -> io::Result<IoLimited> {
            set(&self.at, &self.known, Vmid::try_from(100).expect("in range"), max)
        }

        fn text(&self, path: &str) -> String {
            fs::read_to_string(self.dir.path().join(path)).expect("read")
        }
    }

    const LOOP: &str = "3 1 7:3 / /var/lib/lxc/100/rootfs rw - ext4 /dev/loop3 rw\n";
    const ZFS: &str = "3 1 0:52 / /var/lib/lxc/100/rootfs rw - zfs rpool/data/x rw\n";

    #[test]
    fn outer_cgroup_is_limited_on_v2() {
        let files = [
            ("cg/cgroup.controllers", "cpu io memory\n"),
            ("cg/lxc/100/io.max", ""),
            ("cg/lxc/100/ns/io.max", ""),
        ];
        let host = Host::new(&files, LOOP);
        assert_eq!(host.set(MAX).expect("set"), IoLimited::InForce);
        let line = "7:3 rbps=1000 wbps=max riops=50 wiops=max";
        assert_eq!(host.text("cg/lxc/100/io.max"), line);
        assert_eq!(host.text("cg/lxc/100/ns/io.max"), "");
        // The kernel lists other devices, too, and an equal limit is not written again.
        let listed = format!("7:30 rbps=7\n{line}\n");
        host.write("cg/lxc/100/io.max", &listed);
        assert_eq!(host.set(MAX).expect("set"), IoLimited::InForce);
        assert_eq!(host.text("cg/lxc/100/io.max"), listed);
        // A limit that was taken out of the configuration ends.
        assert_eq!(host.set(IoMax::default()).expect("set"), IoLimited::InForce);
        assert!(host.text("cg/lxc/100/io.max").starts_with("7:3 rbps=max wbps=max"));
    }

    #[test]
    fn disks_are_looked_for_once_a_boot_and_a_config() {
        let files = [("cg/cgroup.controllers", "io\n"), ("cg/lxc/100/io.max", "")];
        let host = Host::new(&files, LOOP);
        host.write("pve/lxc/100.conf", "rootfs: a:100/disk,size=4G\n");
        add_disk(&host.at.sys, ("loop4", "7:4"), None);
        host.set(MAX).expect("set");
        // What is known is not looked for; a limit that somebody removed is put back all the same.
        let other = LOOP.replace("7:3", "7:4").replace("loop3", "loop4");
        host.write("proc/41/mountinfo", &other);
        host.write("cg/lxc/100/io.max", "");
        assert_eq!(host.set(MAX).expect("set"), IoLimited::InForce);
        assert!(host.text("cg/lxc/100/io.max").starts_with("7:3 "));
        // A resize, or a volume that an operator has added.
        host.write("pve/lxc/100.conf", "rootfs: a:100/disk,size=16G\n");
        host.set(MAX).expect("set");
        assert!(host.text("cg/lxc/100/io.max").starts_with("7:4 "));
        // Another boot: the process with this pid is another one.
        host.write("proc/41/mountinfo", LOOP);
        let stat = format!("42 (init) S 41 {}{}", "1 ".repeat(17), "9 ".repeat(31));
        host.write("proc/42/stat", &stat);
        host.set(MAX).expect("set");
        assert!(host.text("cg/lxc/100/io.max").starts_with("7:3 "));
        // None is known of a container that has ended.
        fs::remove_file(host.dir.path().join("proc/42/stat")).expect("removed");
        host.set(MAX).expect_err("it has ended");
    }

    #[test]
    fn v1_hierarchy_is_used_where_there_is_one() {
        let throttle = FILES.map(|file| format!("cg/blkio/lxc/100/{file}"));
        let mut files = vec![("cg/blkio/cgroup.procs", ""), ("cg/cgroup.controllers", "io\n")];
        files.extend(throttle.iter().map(|file| (file.as_str(), "")));
        let host = Host::new(&files, LOOP);
        assert_eq!(host.set(MAX).expect("set"), IoLimited::InForce);
        let texts = throttle.each_ref().map(|file| host.text(file));
        assert_eq!(texts, ["7:3 1000", "", "7:3 50", ""]);
        host.write(&throttle[0], "7:3 1000\n");
        assert_eq!(host.set(IoMax { read_bytes: None, ..MAX }).expect("set"), IoLimited::InForce);
        assert!(host.text(&throttle[0]).starts_with("7:3 0"), "0 removes it");
    }

    #[test]
    fn controller_that_is_missing_is_told_unless_nothing_is_limited() {
        let host = Host::new(&[("cg/cgroup.controllers", "cpu memory\n")], LOOP);
        assert_eq!(host.set(MAX).expect("nothing to do"), IoLimited::NoController);
        assert_eq!(host.set(IoMax::default()).expect("nothing to do"), IoLimited::InForce);
        // The controller is there, and the kernel was built without throttling.
        let host = Host::new(&[("cg/cgroup.controllers", "io\n")], LOOP);
        assert_eq!(host.set(MAX).expect("nothing to do"), IoLimited::NoController);
    }

    #[test]
    fn controller_is_enabled_on_the_way_down() {
        let files = [
            ("cg/cgroup.controllers", "io\n"),
            ("cg/cgroup.subtree_control", ""),
            ("cg/lxc/cgroup.subtree_control", ""),
        ];
        let host = Host::new(&files, LOOP);
        // The kernel would create the file now.
        assert_eq!(host.set(MAX).expect("no file"), IoLimited::NoController);
        assert_eq!(host.text("cg/cgroup.subtree_control"), "+io");
        assert_eq!(host.text("cg/lxc/cgroup.subtree_control"), "+io");
    }

    #[test]
    fn dataset_of_zfs_is_left_as_it_is() {
        let files = [("cg/cgroup.controllers", "io\n"), ("cg/lxc/100/io.max", "")];
        let host = Host::new(&files, ZFS);
        assert_eq!(host.set(MAX).expect("no device"), IoLimited::InForce);
        assert_eq!(host.text("cg/lxc/100/io.max"), "");
    }

    #[test]
    fn stopped_container_is_an_error_where_there_is_a_controller() {
        let host = Host::new(&[("cg/cgroup.controllers", "io\n")], LOOP);
        fs::remove_dir_all(host.dir.path().join("cg/lxc")).expect("removed");
        assert_eq!(host.set(MAX).expect_err("no cgroup").kind(), ErrorKind::NotFound);
    }

    #[test]
    fn kernel_that_refuses_a_device_is_told_and_other_errors_are_errors() {
        let error = |number: Errno| io::Error::from_raw_os_error(number as i32);
        assert!(is_refusal(&error(Errno::ENODEV)) && is_refusal(&error(Errno::EOPNOTSUPP)));
        assert!(!is_refusal(&error(Errno::EACCES)) && !is_refusal(&error(Errno::ENOENT)));
    }
}
