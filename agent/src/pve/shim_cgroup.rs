//! The cgroup of a sandbox's shim, `pve-sandbox/VMID`: beside the container's `lxc/VMID`, never
//! below it. The shim works for its sandbox, so it has limits, and its usage counts as the
//! sandbox's; but it must keep running when the sandbox is frozen or out of memory.
//!
//! The shim creates its cgroup, joins it, and removes it when it ends; that of a killed shim is
//! removed by the agent's `sweep`. On cgroup2, and on v1 where a controller has its own hierarchy.
//! `shim_io` limits its use of disks.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use proto::id::Vmid;
use serde::{Deserialize, Serialize};

use crate::sys::read;

/// Parent cgroup of all shims' cgroups.
pub(super) const DIR: &str = "pve-sandbox";
/// Cgroup for a shim that is about to end: a process cannot remove the cgroup that it is in.
const LEAVING: &str = "leaving";
/// Cgroup of everything else that the agent starts: `pct`, its workers, `nft`, tools of storages. They
/// outlive the agent, and what they use does not count as the agent's.
const WORK: &str = "workers";
/// Most processes and threads of all of that.
const WORK_PIDS_MAX: u32 = 8192;
/// Controllers that limit a shim or count its usage.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuacct", "memory", "pids", "blkio"];
/// Most processes and threads of a shim and of the `lxc-attach`es that it runs: some dozen are usual.
const PIDS_MAX: u32 = 1024;
/// Period of a quota of CPU time, microseconds: the kernel's default.
const PERIOD_US: u64 = 100_000;
/// Attempts to join a cgroup, which the agent's sweep may remove in between.
const TRIES: usize = 3;

/// Limits of a shim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// CPU limit, thousandths of a core; at least 10.
    pub cpu_millicores: u64,
    /// Memory limit, bytes.
    pub memory_bytes: u64,
}

/// Hierarchies that exist: cgroup2's, and those of v1 by their controllers.
fn hierarchies(root: &Path) -> Vec<PathBuf> {
    let v1 = CONTROLLERS.iter().map(|controller| root.join(controller));
    let all = std::iter::once(root.to_owned()).chain(v1);
    all.filter(|dir| dir.join("cgroup.procs").exists()).collect()
}

fn own(hierarchy: &Path, vmid: Vmid) -> PathBuf {
    hierarchy.join(DIR).join(vmid.to_string())
}

/// Moves this process into the cgroup of this container's shim, in every hierarchy that exists, and
/// sets the limits.
///
/// # Errors
/// When one hierarchy cannot be joined; the others are joined all the same. A limit that cannot be
/// set is logged.
pub fn join(root: &Path, vmid: Vmid, limits: Limits) -> io::Result<()> {
    let mut failed = None;
    for hierarchy in hierarchies(root) {
        let joined = (0..TRIES).map(|_| join_one(&hierarchy, vmid, limits));
        // Keeps the last error, for the case that no attempt succeeds.
        let mut last = None;
        for tried in joined {
            last = tried.err();
            if last.is_none() {
                break;
            }
        }
        failed = last.or(failed);
    }
    failed.map_or(Ok(()), Err)
}

fn join_one(hierarchy: &Path, vmid: Vmid, limits: Limits) -> io::Result<()> {
    let dir = own(hierarchy, vmid);
    fs::create_dir_all(&dir)?;
    enable(hierarchy);
    let quota_us = (limits.cpu_millicores.max(10) * PERIOD_US / 1000).to_string();
    let settings = [
        ("cpu.max", format!("{quota_us} {PERIOD_US}")),
        ("cpu.cfs_quota_us", quota_us),
        ("memory.max", limits.memory_bytes.to_string()),
        ("memory.limit_in_bytes", limits.memory_bytes.to_string()),
        ("pids.max", PIDS_MAX.to_string()),
    ];
    for (file, value) in settings {
        let path = dir.join(file);
        if path.exists()
            && let Err(error) = fs::write(&path, value)
        {
            tracing::warn!(path = %path.display(), %error, "could not set a limit of the shim");
        }
    }
    fs::write(dir.join("cgroup.procs"), "0")
}

/// Makes the cgroup of what the agent starts. Returns its `cgroup.procs` in each hierarchy where there is
/// one.
pub fn of_work(root: &Path) -> Vec<PathBuf> {
    let made = hierarchies(root).into_iter().filter_map(|hierarchy| {
        let dir = hierarchy.join(DIR).join(WORK);
        if let Err(error) = fs::create_dir_all(&dir) {
            tracing::warn!(path = %dir.display(), %error, "could not make the cgroup of pct: what it uses counts as the agent's");
            return None;
        }
        enable(&hierarchy);
        let limit = dir.join("pids.max");
        if limit.exists()
            && let Err(error) = fs::write(&limit, WORK_PIDS_MAX.to_string())
        {
            tracing::warn!(path = %limit.display(), %error, "could not limit the processes of pct");
        }
        Some(dir.join("cgroup.procs"))
    });
    made.collect()
}

/// Enables the controllers for the cgroups of shims; on v1 there is nothing to do.
fn enable(hierarchy: &Path) {
    for parent in [hierarchy.to_owned(), hierarchy.join(DIR)] {
        let file = parent.join("cgroup.subtree_control");
        // Enabled one by one: the kernel takes all of a write or none.
        for controller in ["+cpu", "+io", "+memory", "+pids"] {
            if file.exists()
                && let Err(error) = fs::write(&file, controller)
            {
                tracing::debug!(path = %file.display(), controller, %error, "could not enable a cgroup controller");
            }
        }
    }
}

/// Moves this process out of its cgroup and removes the cgroup, if it is empty then.
pub fn leave(root: &Path, vmid: Vmid) {
    for hierarchy in hierarchies(root) {
        let leaving = hierarchy.join(DIR).join(LEAVING);
        let left = fs::create_dir_all(&leaving)
            .and_then(|()| fs::write(leaving.join("cgroup.procs"), "0"))
            .and_then(|()| fs::remove_dir(own(&hierarchy, vmid)));
        if let Err(error) = left {
            tracing::debug!(%error, "could not remove the shim's cgroup; the agent will");
        }
    }
}

/// Moves a process that was started inside the container, but is still in the shim's cgroup, to the
/// container's: it must not be limited, or killed, in place of the shim. LXC moves the processes
/// that it attaches on cgroup2, and on v1 only where it manages the controller.
pub fn send_home(root: &Path, vmid: Vmid, pid: u32) {
    for hierarchy in hierarchies(root) {
        let listed = read::text(&own(&hierarchy, vmid).join("cgroup.procs"), read::LARGE);
        let pid = pid.to_string();
        if !listed.lines().any(|line| line == pid) {
            continue;
        }
        let outer = hierarchy.join("lxc").join(vmid.to_string());
        let homes = [outer.join("ns"), outer, hierarchy.clone()];
        let moved = homes.iter().any(|home| fs::write(home.join("cgroup.procs"), &pid).is_ok());
        if !moved {
            tracing::warn!(pid, hierarchy = %hierarchy.display(), "could not move a process out of its shim's cgroup");
        }
    }
}

/// Removes the empty cgroups of shims, whichever container they belong to. Returns the containers
/// whose cgroups are in use.
pub fn sweep(root: &Path) -> BTreeSet<Vmid> {
    let mut left = BTreeSet::new();
    for hierarchy in hierarchies(root) {
        for entry in fs::read_dir(hierarchy.join(DIR)).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.parse::<u32>().ok());
            let Some(vmid) = number.and_then(|number| Vmid::try_from(number).ok()) else {
                continue;
            };
            match fs::remove_dir(entry.path()) {
                Ok(()) => tracing::info!(%vmid, "removed the cgroup of an ended shim"),
                // The cgroup is not empty: most often its shim runs.
                Err(_) => drop(left.insert(vmid)),
            }
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { cpu_millicores: 500, memory_bytes: 1 << 20 };

    fn vmid(number: u32) -> Vmid {
        Vmid::try_from(number).expect("in range")
    }

    /// Directories stand for cgroups; the kernel would create their files.
    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("tempdir");
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().expect("a directory")).expect("mkdir");
            fs::write(path, text).expect("written");
        }
        dir
    }

    fn text(dir: &tempfile::TempDir, path: &str) -> String {
        fs::read_to_string(dir.path().join(path)).unwrap_or_default()
    }

    #[test]
    fn shim_joins_a_limited_cgroup_beside_its_container() {
        let dir = tree(&[
            ("cgroup.procs", ""),
            ("cgroup.subtree_control", ""),
            ("lxc/100/ns/cgroup.procs", ""),
            ("pve-sandbox/100/cpu.max", "max 100000"),
            ("pve-sandbox/100/memory.max", "max"),
            ("pve-sandbox/100/pids.max", "max"),
        ]);
        join(dir.path(), vmid(100), LIMITS).expect("joined");
        assert_eq!(text(&dir, "pve-sandbox/100/cgroup.procs"), "0");
        assert_eq!(text(&dir, "pve-sandbox/100/cpu.max"), "50000 100000");
        assert_eq!(text(&dir, "pve-sandbox/100/memory.max"), "1048576");
        assert_eq!(text(&dir, "pve-sandbox/100/pids.max"), "1024");
        assert_eq!(text(&dir, "lxc/100/ns/cgroup.procs"), "", "not below the container's");
        assert!(!dir.path().join("memory").exists());
    }

    #[test]
    fn shim_joins_every_v1_hierarchy() {
        let dir = tree(&[
            ("cpu/cgroup.procs", ""),
            ("memory/cgroup.procs", ""),
            ("pids/cgroup.procs", ""),
            ("pids/pve-sandbox/100/pids.max", "max"),
            ("cpu/pve-sandbox/100/cpu.cfs_quota_us", "-1"),
            ("memory/pve-sandbox/100/memory.limit_in_bytes", "-1"),
        ]);
        join(dir.path(), vmid(100), LIMITS).expect("joined");
        for controller in ["cpu", "memory", "pids"] {
            assert_eq!(text(&dir, &format!("{controller}/pve-sandbox/100/cgroup.procs")), "0");
        }
        assert_eq!(text(&dir, "cpu/pve-sandbox/100/cpu.cfs_quota_us"), "50000");
        assert_eq!(text(&dir, "memory/pve-sandbox/100/memory.limit_in_bytes"), "1048576");
        assert_eq!(text(&dir, "pids/pve-sandbox/100/pids.max"), "1024");
        assert!(!dir.path().join("pve-sandbox").exists(), "there is no cgroup2");
    }

    #[test]
    fn work_of_the_agent_has_a_cgroup_in_every_hierarchy() {
        let dir = tree(&[
            ("cgroup.procs", ""),
            ("cgroup.subtree_control", ""),
            ("pids/cgroup.procs", ""),
            ("pids/pve-sandbox/workers/pids.max", "max"),
        ]);
        let procs = of_work(dir.path());
        let expected =
            ["pve-sandbox/workers/cgroup.procs", "pids/pve-sandbox/workers/cgroup.procs"];
        assert_eq!(procs, expected.map(|path| dir.path().join(path)));
        assert_eq!(text(&dir, "pids/pve-sandbox/workers/pids.max"), "8192");
        assert_eq!(text(&dir, "cgroup.subtree_control"), "+pids");
        assert_eq!(sweep(dir.path()), BTreeSet::new());
        assert!(dir.path().join("pve-sandbox/workers").exists());
    }

    #[test]
    fn process_inside_is_moved_out_of_the_shim_cgroup() {
        let dir = tree(&[
            ("cgroup.procs", ""),
            ("memory/cgroup.procs", ""),
            ("pve-sandbox/100/cgroup.procs", "7\n"),
            ("memory/pve-sandbox/100/cgroup.procs", "7\n8\n"),
            ("lxc/100/ns/cgroup.procs", ""),
            ("memory/lxc/100/cgroup.procs", ""),
        ]);
        send_home(dir.path(), vmid(100), 8);
        assert_eq!(text(&dir, "memory/lxc/100/cgroup.procs"), "8");
        assert_eq!(text(&dir, "lxc/100/ns/cgroup.procs"), "", "there LXC has moved it");
    }

    #[test]
    fn empty_shim_cgroups_are_removed() {
        // A cgroup's own files do not prevent its removal; the test's cgroups have none.
        let dir = tree(&[
            ("cgroup.procs", ""),
            ("memory/cgroup.procs", ""),
            ("memory/pve-sandbox/102/child/x", ""),
        ]);
        for empty in ["pve-sandbox/100", "pve-sandbox/leaving", "memory/pve-sandbox/101"] {
            fs::create_dir_all(dir.path().join(empty)).expect("mkdir");
        }
        assert_eq!(sweep(dir.path()), BTreeSet::from([vmid(102)]));
        assert!(!dir.path().join("pve-sandbox/100").exists());
        assert!(!dir.path().join("memory/pve-sandbox/101").exists());
        assert!(dir.path().join("pve-sandbox/leaving").exists());
    }
}
