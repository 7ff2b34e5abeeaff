//! Limit on the processes and threads of a container, and on the cgroups that root in it makes, for which
//! `pct` has no option. It is written to the container's own cgroup once that exists: a raw `lxc.*` line in
//! its config would be another way into the host.

use std::{io, path::Path};

use proto::id::Vmid;

use super::{
    HostPaths,
    controller::{self, Hierarchy},
};
use crate::sys::read;

/// Name of the controller.
const CONTROLLER: &str = "pids";
/// File with the limit.
const FILE: &str = "pids.max";

/// File of cgroup2 with the limit on the cgroups below.
const CGROUPS_FILE: &str = "cgroup.max.descendants";
/// Most cgroups of a container. systemd makes some dozen, and Docker one for each container; the kernel has
/// numbers for 65535 with the controller `memory`, which all containers and the host share.
const CGROUPS_MAX: u32 = 1024;

/// Result of limiting a container's processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limited {
    /// The limit is in force.
    InForce,
    /// The kernel of this host has no controller for it.
    NoController,
}

/// Limits the processes and threads of a running container to `max`, and its cgroups. Writes nothing where
/// that is the limit already.
///
/// # Errors
/// When the host has the controller and the limit is not in force.
pub fn set(at: &HostPaths, vmid: Vmid, max: u32) -> io::Result<Limited> {
    // v1 has no such limit; there, an unprivileged container makes no cgroups.
    let cgroups = Hierarchy::V2(at.cgroup_root.clone()).of_container(vmid).join(CGROUPS_FILE);
    if cgroups.exists() {
        put(&cgroups, CGROUPS_MAX)?;
    }
    let Some(hierarchy) = hierarchy(at) else {
        return Ok(Limited::NoController);
    };
    let file = hierarchy.of_container(vmid).join(FILE);
    hierarchy.enable(CONTROLLER, &file);
    put(&file, max)?;
    Ok(Limited::InForce)
}

/// Finds the hierarchy that limits processes; `None` where the kernel of this host has none.
pub(super) fn hierarchy(at: &HostPaths) -> Option<Hierarchy> {
    Hierarchy::find(at, CONTROLLER, CONTROLLER)
}

fn put(file: &Path, max: u32) -> io::Result<()> {
    let text = max.to_string();
    if read::text(file, read::SMALL).trim() == text {
        return Ok(());
    }
    controller::write(file, &text)
}

/// True when the kernel of this host has the controller.
pub fn can_limit(at: &HostPaths) -> bool {
    hierarchy(at).is_some()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Directories stand for cgroups; the kernel would create their files.
    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, HostPaths) {
        let dir = tempfile::tempdir().expect("tempdir");
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().expect("a directory")).expect("mkdir");
            fs::write(path, text).expect("written");
        }
        let at = HostPaths { cgroup_root: dir.path().join("cg"), ..HostPaths::default() };
        (dir, at)
    }

    fn text(dir: &tempfile::TempDir, path: &str) -> String {
        fs::read_to_string(dir.path().join(path)).expect("read")
    }

    fn vmid() -> Vmid {
        Vmid::try_from(100).expect("in range")
    }

    #[test]
    fn outer_cgroup_is_limited_on_v2() {
        let (dir, at) = host(&[
            ("cg/cgroup.controllers", "cpu memory pids\n"),
            ("cg/lxc/100/pids.max", "max"),
            ("cg/lxc/100/ns/pids.max", "max"),
            ("cg/lxc/100/cgroup.max.descendants", "max"),
            ("cg/lxc/101/pids.max", "max"),
        ]);
        assert_eq!(set(&at, vmid(), 4096).expect("set"), Limited::InForce);
        // A file keeps the end of a longer text; the kernel's does not.
        assert_eq!(text(&dir, "cg/lxc/100/pids.max"), "4096");
        assert_eq!(text(&dir, "cg/lxc/100/ns/pids.max"), "max");
        assert_eq!(text(&dir, "cg/lxc/100/cgroup.max.descendants"), "1024");
        assert_eq!(text(&dir, "cg/lxc/101/pids.max"), "max");
    }

    #[test]
    fn controller_is_enabled_on_the_way_down() {
        let (dir, at) = host(&[
            ("cg/cgroup.controllers", "pids\n"),
            ("cg/cgroup.subtree_control", ""),
            ("cg/lxc/cgroup.subtree_control", ""),
            ("cg/lxc/100/cgroup.procs", ""),
        ]);
        // The kernel would create the file now.
        let error = set(&at, vmid(), 4096).expect_err("there is no file");
        assert!(error.to_string().contains("lxc/100/pids.max"), "{error}");
        assert!(!dir.path().join("cg/lxc/100/pids.max").exists(), "no cgroup file is created");
        assert_eq!(text(&dir, "cg/cgroup.subtree_control"), "+pids");
        assert_eq!(text(&dir, "cg/lxc/cgroup.subtree_control"), "+pids");
    }

    #[test]
    fn v1_hierarchy_is_used_where_there_is_one() {
        let v1 = [("cg/pids/cgroup.procs", ""), ("cg/pids/lxc/100/pids.max", "max")];
        let (dir, at) = host(&v1);
        assert_eq!(set(&at, vmid(), 4096).expect("set"), Limited::InForce);
        assert_eq!(text(&dir, "cg/pids/lxc/100/pids.max"), "4096");
    }

    #[test]
    fn v1_hierarchy_elsewhere_goes_before_v2_without_the_controller() {
        let (dir, at) = host(&[
            ("cg/cgroup.controllers", "cpu memory\n"),
            ("cg/lxc/100/cgroup.procs", ""),
            ("v1/pids/cgroup.procs", ""),
            ("v1/pids/lxc/100/pids.max", "max"),
        ]);
        assert_eq!(set(&at, vmid(), 4096).expect("nothing to do"), Limited::NoController);
        let at = HostPaths { cgroup_v1: Some(dir.path().join("v1")), ..at };
        assert_eq!(set(&at, vmid(), 4096).expect("set"), Limited::InForce);
        assert_eq!(text(&dir, "v1/pids/lxc/100/pids.max"), "4096");
    }

    #[test]
    fn stopped_container_is_an_error_where_there_is_a_controller() {
        let (_dir, at) = host(&[("cg/cgroup.controllers", "pids\n")]);
        assert_eq!(set(&at, vmid(), 4096).expect_err("no cgroup").kind(), io::ErrorKind::NotFound);
    }
}
