//! Limit on what a shim uses of the disk that the agent's own files are on: the outputs of commands, and the name of
//! each command, which must be on the disk before it is started. In the shim's own cgroup, by the files that limit
//! its sandbox (`io_limit`).

use std::{collections::BTreeSet, io::ErrorKind, path::Path};

use proto::id::Vmid;
use serde::{Deserialize, Serialize};

use super::{HostPaths, IoMax, block_device, io_limit, shim_cgroup};

/// Most writes of a shim, a second. Outputs need few, which are large; each name of a command is one that others who
/// write to the same file system wait for.
const WRITES_MAX: u64 = 500;

/// Limit of a shim, and the disks that it is for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimIo {
    max: IoMax,
    /// Numbers of the disks, `MAJOR:MINOR`.
    disks: BTreeSet<String>,
}

impl ShimIo {
    /// Makes the limit of all shims, which is that of a sandbox with fewer writes. `dir` is where they write. Logs
    /// when the kernel cannot limit that.
    pub fn new(at: &HostPaths, dir: &Path, sandbox: IoMax) -> Self {
        let writes = sandbox.writes.map_or(WRITES_MAX, |writes| writes.min(WRITES_MAX));
        let max = IoMax { writes: Some(writes), ..sandbox };
        if !io_limit::can_limit(at) {
            // Said of the sandboxes already.
            return Self::default();
        }
        let disks = block_device::of_directory(at, dir).unwrap_or_else(|error| {
            tracing::warn!(dir = %dir.display(), %error, "the disk of the shims' files was not found");
            BTreeSet::new()
        });
        if disks.is_empty() {
            tracing::warn!(
                dir = %dir.display(),
                "what shims write here is not limited: the file system has no block device that the kernel could limit"
            );
        }
        Self { max, disks }
    }

    /// Puts the limit in force for the shim of this container, which has joined its cgroup. What cannot be set is
    /// logged.
    pub fn set(&self, at: &HostPaths, vmid: Vmid) {
        let Some(hierarchy) = io_limit::hierarchy(at) else { return };
        let cgroup = hierarchy.below(shim_cgroup::DIR, vmid);
        for disk in &self.disks {
            match io_limit::limit(&hierarchy, &cgroup, disk, self.max) {
                Ok(true) => {}
                Ok(false) => {
                    tracing::warn!(disk, "the kernel does not limit what the shim writes here")
                }
                // As where the kernel has no such limit, which is said of the sandboxes.
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    tracing::debug!(disk, %error, "the shim's use of the disk was not limited");
                }
                Err(error) => {
                    tracing::warn!(disk, %error, "the shim's use of the disk was not limited")
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::pve::block_device::tests::add_disk;

    const SANDBOX: IoMax =
        IoMax { read_bytes: Some(1000), write_bytes: Some(2000), reads: None, writes: None };

    /// Fake host; directories stand for cgroups, and the state is on the disk 8:0.
    fn host(files: &[&str]) -> (tempfile::TempDir, HostPaths) {
        let dir = tempfile::tempdir().expect("tempdir");
        let at = HostPaths {
            cgroup_root: dir.path().join("cg"),
            proc: dir.path().join("proc"),
            sys: dir.path().join("sys"),
            ..HostPaths::default()
        };
        add_disk(&at.sys, ("sda", "8:0"), Some(("sda1", "8:1")));
        let mounts = ("proc/self/mountinfo", "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n");
        let controllers = ("cg/cgroup.controllers", "io memory\n");
        for (path, text) in files.iter().map(|path| (*path, "")).chain([mounts, controllers]) {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().expect("a directory")).expect("mkdir");
            fs::write(path, text).expect("written");
        }
        (dir, at)
    }

    fn text(dir: &tempfile::TempDir, path: &str) -> String {
        fs::read_to_string(dir.path().join(path)).expect("read")
    }

    fn vmid() -> Vmid {
        Vmid::try_from(100).expect("in range")
    }

    #[test]
    fn shim_is_limited_on_the_disk_of_the_agents_files() {
        let (dir, at) = host(&["cg/pve-sandbox/100/io.max", "cg/lxc/100/io.max"]);
        let io = ShimIo::new(&at, dir.path(), SANDBOX);
        io.set(&at, vmid());
        let line = "8:0 rbps=1000 wbps=2000 riops=max wiops=500";
        assert_eq!(text(&dir, "cg/pve-sandbox/100/io.max"), line);
        assert_eq!(text(&dir, "cg/lxc/100/io.max"), "", "the sandbox has its own");
        fs::write(dir.path().join("cg/pve-sandbox/100/io.max"), "").expect("written");
        let low = ShimIo::new(&at, dir.path(), IoMax { writes: Some(7), ..SANDBOX });
        low.set(&at, vmid());
        assert!(text(&dir, "cg/pve-sandbox/100/io.max").ends_with("wiops=7"));
    }

    #[test]
    fn shim_is_limited_by_the_files_of_v1_where_there_is_one() {
        let file = "cg/blkio/pve-sandbox/100/blkio.throttle.write_iops_device";
        let others = ["read_bps", "write_bps", "read_iops"]
            .map(|name| format!("cg/blkio/pve-sandbox/100/blkio.throttle.{name}_device"));
        let mut files = vec!["cg/blkio/cgroup.procs", file];
        files.extend(others.iter().map(String::as_str));
        let (dir, at) = host(&files);
        ShimIo::new(&at, dir.path(), SANDBOX).set(&at, vmid());
        assert_eq!(text(&dir, file), "8:0 500");
        assert_eq!(text(&dir, &others[1]), "8:0 2000");
    }

    #[test]
    fn shim_without_a_disk_or_a_cgroup_runs_without_the_limit() {
        let (dir, at) = host(&["cg/pve-sandbox/100/io.max"]);
        fs::write(at.proc.join("self/mountinfo"), "1 0 0:52 / / rw - zfs rpool/x rw\n")
            .expect("written");
        ShimIo::new(&at, dir.path(), SANDBOX).set(&at, vmid());
        assert_eq!(text(&dir, "cg/pve-sandbox/100/io.max"), "");
        let (dir, at) = host(&[]);
        ShimIo::new(&at, dir.path(), SANDBOX).set(&at, vmid());
        assert!(!dir.path().join("cg/pve-sandbox").exists(), "no file of a cgroup is made");
    }
}
