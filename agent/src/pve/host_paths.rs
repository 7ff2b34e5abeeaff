//! Paths on the host, and the command lines that enter a container.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use proto::id::Vmid;
use serde::{Deserialize, Serialize};

use super::pmxcfs;

/// Paths on the host. The defaults are PVE's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HostPaths {
    /// Mount point of pmxcfs.
    pub root: PathBuf,
    /// Program that changes containers.
    pub pct: PathBuf,
    /// Program that changes volumes.
    pub pvesm: PathBuf,
    /// Program that enters containers; see `attach`.
    pub(super) lxc_attach: PathBuf,
    /// LXC's directory of containers, also part of the names of their sockets.
    pub lxc_dir: PathBuf,
    /// Directory of the locks that PVE's tools take on configs.
    pub lock_dir: PathBuf,
    /// Mount point of cgroup2.
    pub cgroup_root: PathBuf,
    /// Directory with v1's hierarchies, each under the name of its controller, where they are not in
    /// `cgroup_root`.
    pub cgroup_v1: Option<PathBuf>,
    /// Mount point of procfs.
    pub proc: PathBuf,
    /// Mount point of sysfs.
    pub sys: PathBuf,
}

/// Directory that LXC's programs use unless they are given another.
const LXC_DIR: &str = "/var/lib/lxc";

impl Default for HostPaths {
    fn default() -> Self {
        Self {
            root: pmxcfs::ROOT.into(),
            pct: "/usr/sbin/pct".into(),
            pvesm: "/usr/sbin/pvesm".into(),
            lxc_attach: "/usr/bin/lxc-attach".into(),
            lxc_dir: LXC_DIR.into(),
            lock_dir: "/run/lock/lxc".into(),
            cgroup_root: "/sys/fs/cgroup".into(),
            cgroup_v1: None,
            proc: "/proc".into(),
            sys: "/sys".into(),
        }
    }
}

impl HostPaths {
    /// Programs of PVE that the agent runs, each with the Debian package that has it.
    pub fn programs(&self) -> [(&Path, &'static str); 3] {
        [
            (&self.pct, "pve-container"),
            (&self.pvesm, "libpve-storage-perl"),
            (&self.lxc_attach, "lxc-pve"),
        ]
    }

    /// Command line of `lxc-attach`, as `pct exec` uses it; the program to start inside follows it.
    pub fn attach(&self, vmid: Vmid) -> Vec<OsString> {
        let mut argv = vec![self.lxc_attach.clone().into(), "-n".into(), vmid.to_string().into()];
        if self.lxc_dir.as_os_str() != LXC_DIR {
            argv.extend(["-P".into(), self.lxc_dir.clone().into()]);
        }
        argv.extend(["--clear-env".into(), "--".into()]);
        argv
    }

    /// Command line of `pct exec`; the program to start inside follows it.
    pub fn pct_exec(&self, vmid: Vmid) -> Vec<OsString> {
        let words = ["exec", &vmid.to_string(), "--keep-env", "0", "--"].map(OsString::from);
        std::iter::once(self.pct.clone().into()).chain(words).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lxc_is_told_a_directory_that_is_not_its_own() {
        let vmid = Vmid::try_from(100).expect("in range");
        let places = HostPaths::default();
        let argv = ["/usr/bin/lxc-attach", "-n", "100", "--clear-env", "--"];
        assert_eq!(places.attach(vmid), argv);
        let places = HostPaths { lxc_dir: "/srv/lxc".into(), ..places };
        let argv = ["/usr/bin/lxc-attach", "-n", "100", "-P", "/srv/lxc", "--clear-env", "--"];
        assert_eq!(places.attach(vmid), argv);
        let argv = ["/usr/sbin/pct", "exec", "100", "--keep-env", "0", "--"];
        assert_eq!(places.pct_exec(vmid), argv);
    }
}
