//! Every path on the machine that the stand-in uses, each with the real path as default.
//!
//! Tests build the whole tree in a temporary directory and set the environment; a lab node sets
//! nothing and uses PVE's own paths.

use std::env;
use std::path::{Path, PathBuf};

/// Directories that the stand-in reads and writes.
#[derive(Debug, Clone)]
pub struct Roots {
    /// `PCT_ETC_PVE`: the cluster file system.
    pub etc_pve: PathBuf,
    /// `PCT_LXC_DIR`: LXC's container directory.
    pub lxc_dir: PathBuf,
    /// `PCT_LOCK_DIR`: the flock files of configurations.
    pub lock_dir: PathBuf,
    /// `PCT_STORAGE_LOCK_DIR`: the flock files of storages.
    pub storage_lock_dir: PathBuf,
    /// `PCT_LOG_DIR`: task logs and their index.
    pub log_dir: PathBuf,
    /// `PCT_CONTROL_DIR`: fault plan, cost switch, markers.
    pub control_dir: PathBuf,
    /// `PCT_POOL`: directory of the pool `rpool/data`.
    pub pool: PathBuf,
    /// `PCT_RUN_PVE`: logs of failed container starts.
    pub run_pve: PathBuf,
    /// `PCT_SYS_NET`: the network interfaces, to check that a bridge exists.
    pub sys_net: PathBuf,
    /// `PCT_CGROUP`: the cgroup2 tree of the containers.
    pub cgroup: PathBuf,
    /// `PCT_LAB_CGROUP`: the machine's own v1 controllers, on a hybrid machine.
    pub lab_cgroup: PathBuf,
    /// `PCT_TEMPLATE_CACHE`: archives for `pct create`.
    pub template_cache: PathBuf,
}

impl Roots {
    /// Returns the paths from the environment, or the real ones.
    #[must_use]
    pub fn from_env() -> Self {
        let at = |name: &str, real: &str| {
            env::var_os(name).filter(|v| !v.is_empty()).map_or_else(|| real.into(), PathBuf::from)
        };
        Self {
            etc_pve: at("PCT_ETC_PVE", "/etc/pve"),
            lxc_dir: at("PCT_LXC_DIR", "/var/lib/lxc"),
            lock_dir: at("PCT_LOCK_DIR", "/run/lock/lxc"),
            storage_lock_dir: at("PCT_STORAGE_LOCK_DIR", "/var/lock/pve-manager"),
            log_dir: at("PCT_LOG_DIR", "/var/log/pve/tasks"),
            control_dir: at("PCT_CONTROL_DIR", "/run/pct-standin"),
            pool: at("PCT_POOL", "/rpool/data"),
            run_pve: at("PCT_RUN_PVE", "/run/pve"),
            sys_net: at("PCT_SYS_NET", "/sys/class/net"),
            cgroup: at("PCT_CGROUP", "/sys/fs/cgroup"),
            lab_cgroup: at("PCT_LAB_CGROUP", "/run/lab/cgroup"),
            template_cache: at("PCT_TEMPLATE_CACHE", "/var/lib/vz/template/cache"),
        }
    }

    /// Returns the tree below one directory, and the environment that makes a child use it.
    #[must_use]
    pub fn below(dir: &Path) -> (Self, Vec<(&'static str, PathBuf)>) {
        let roots = Self {
            etc_pve: dir.join("etc/pve"),
            lxc_dir: dir.join("var/lib/lxc"),
            lock_dir: dir.join("run/lock/lxc"),
            storage_lock_dir: dir.join("var/lock/pve-manager"),
            log_dir: dir.join("var/log/pve/tasks"),
            control_dir: dir.join("run/pct-standin"),
            pool: dir.join("rpool/data"),
            run_pve: dir.join("run/pve"),
            sys_net: dir.join("sys/class/net"),
            cgroup: PathBuf::from("/sys/fs/cgroup"),
            lab_cgroup: PathBuf::from("/run/lab/cgroup"),
            template_cache: dir.join("var/lib/vz/template/cache"),
        };
        let env = vec![
            ("PCT_ETC_PVE", roots.etc_pve.clone()),
            ("PCT_LXC_DIR", roots.lxc_dir.clone()),
            ("PCT_LOCK_DIR", roots.lock_dir.clone()),
            ("PCT_STORAGE_LOCK_DIR", roots.storage_lock_dir.clone()),
            ("PCT_LOG_DIR", roots.log_dir.clone()),
            ("PCT_CONTROL_DIR", roots.control_dir.clone()),
            ("PCT_POOL", roots.pool.clone()),
            ("PCT_RUN_PVE", roots.run_pve.clone()),
            ("PCT_SYS_NET", roots.sys_net.clone()),
            ("PCT_TEMPLATE_CACHE", roots.template_cache.clone()),
        ];
        (roots, env)
    }
}
