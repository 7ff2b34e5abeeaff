//! Cgroup controllers of this host, and the cgroup of a container under one of them: on cgroup2, or on
//! v1 where the controller has a hierarchy of its own.
//!
//! The outer cgroup of a container, `lxc/ID`, is meant. Root in the container manages what is below
//! `lxc/ID/ns` and cannot raise a limit of the outer one.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use proto::id::Vmid;

use super::HostPaths;
use crate::sys::read;

/// Hierarchy of cgroups that has a controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Hierarchy {
    /// Hierarchy of v1 that is the controller's own.
    V1(PathBuf),
    /// Cgroup2.
    V2(PathBuf),
}

impl Hierarchy {
    /// Finds the hierarchy of a controller, which may have another name on v1 than on v2; `None` where
    /// the kernel does not have the controller.
    pub(super) fn find(at: &HostPaths, v1: &str, v2: &str) -> Option<Self> {
        let roots = [at.cgroup_v1.as_ref(), Some(&at.cgroup_root)];
        let mut dirs = roots.into_iter().flatten().map(|root| root.join(v1));
        if let Some(dir) = dirs.find(|dir| dir.join("cgroup.procs").exists()) {
            return Some(Self::V1(dir));
        }
        let controllers = read::text(&at.cgroup_root.join("cgroup.controllers"), read::SMALL);
        let has = controllers.split_whitespace().any(|name| name == v2);
        has.then(|| Self::V2(at.cgroup_root.clone()))
    }

    /// Returns the top directory.
    pub(super) fn root(&self) -> &Path {
        match self {
            Self::V1(root) | Self::V2(root) => root,
        }
    }

    /// Returns the cgroup of a container.
    pub(super) fn of_container(&self, vmid: Vmid) -> PathBuf {
        self.below("lxc", vmid)
    }

    /// Returns the cgroup of this number below a directory.
    pub(super) fn below(&self, dir: &str, vmid: Vmid) -> PathBuf {
        self.root().join(dir).join(vmid.to_string())
    }

    /// Enables the controller for the containers where `file`, one of a container's, is missing: on
    /// cgroup2 a controller must be enabled on the way down.
    pub(super) fn enable(&self, controller: &str, file: &Path) {
        let Self::V2(root) = self else { return };
        if file.exists() {
            return;
        }
        for dir in [root.clone(), root.join("lxc")] {
            let control = dir.join("cgroup.subtree_control");
            if control.exists()
                && let Err(error) = write(&control, &format!("+{controller}"))
            {
                tracing::debug!(path = %control.display(), %error, "could not enable a cgroup controller");
            }
        }
    }
}

/// Writes an existing cgroup file; never creates one. The error names the file.
pub(super) fn write(path: &Path, text: &str) -> io::Result<()> {
    let written = fs::OpenOptions::new().write(true).open(path);
    let written = written.and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|error| io::Error::new(error.kind(), Unwritten(path.to_owned(), error)))
}

/// Error of a write, with its file.
#[derive(Debug, thiserror::Error)]
#[error("{}: {}", .0.display(), .1)]
struct Unwritten(PathBuf, #[source] io::Error);

/// Number of the system's error behind one of `write`.
pub(super) fn errno(error: &io::Error) -> Option<i32> {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<Unwritten>());
    inner.map_or_else(|| error.raw_os_error(), |Unwritten(_, error)| error.raw_os_error())
}
