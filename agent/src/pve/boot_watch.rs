//! Notices boots of containers at once: LXC makes a container's cgroup anew at each, before its init runs.
//!
//! Watched are the directories that hold the containers' cgroups, and those above, where LXC makes them
//! with the first container. Nobody in a container reaches either.

use std::{collections::BTreeSet, ffi::OsStr, io, path::PathBuf};

use proto::id::Vmid;

use super::{HostPaths, cgroup, io_limit, process_limit};
use crate::sys::new_dirs::NewDirs;

/// Directory of the containers' cgroups, in each hierarchy.
const CONTAINERS: &str = "lxc";

/// Watch of the cgroups that have limits.
#[derive(Debug)]
pub(super) struct BootWatch {
    dirs: NewDirs,
    /// Top directories of the hierarchies.
    roots: BTreeSet<PathBuf>,
    /// Containers that have booted, and were not returned yet.
    booted: BTreeSet<Vmid>,
}

impl BootWatch {
    /// Watches for boots from now on.
    ///
    /// # Errors
    /// When the kernel has no watcher left, or there are no cgroups.
    pub(super) fn new(at: &HostPaths) -> io::Result<Self> {
        let of_controllers = [process_limit::hierarchy(at), io_limit::hierarchy(at)];
        let of_controllers = of_controllers.iter().flatten().map(|one| one.root().to_owned());
        let roots = of_controllers.chain([at.cgroup_root.clone()]).collect();
        let watch = Self { dirs: NewDirs::new()?, roots, booted: BTreeSet::new() };
        for root in &watch.roots {
            watch.dirs.watch(root)?;
        }
        watch.watch_containers()?;
        Ok(watch)
    }

    /// Waits for a boot. Returns a container whose cgroup was made; with v1, several are made in a boot.
    ///
    /// # Errors
    /// When boots can no longer be watched.
    pub(super) async fn next(&mut self) -> io::Result<Vmid> {
        loop {
            if let Some(vmid) = self.booted.pop_first() {
                return Ok(vmid);
            }
            let made = self.dirs.next().await?;
            self.booted.extend(made.names.iter().filter_map(|name| vmid(name)));
            let is_new = made.names.iter().any(|name| name == CONTAINERS);
            if is_new {
                self.watch_containers()?;
            }
            // What was made before the watch, or was not told: any of them.
            if is_new || made.is_incomplete {
                for root in &self.roots {
                    let all = root.join(CONTAINERS);
                    let found = cgroup::below(&all).filter_map(|dir| vmid(dir.file_name()?));
                    self.booted.extend(found);
                }
            }
        }
    }

    /// Watches the directories of the containers that there are; LXC makes one with its first container.
    fn watch_containers(&self) -> io::Result<()> {
        for root in &self.roots {
            match self.dirs.watch(&root.join(CONTAINERS)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }
}

fn vmid(name: &OsStr) -> Option<Vmid> {
    name.to_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path, time::Duration};

    use tokio::time::timeout;

    use super::*;

    fn make(dir: &Path) {
        fs::create_dir_all(dir).expect("made");
    }

    async fn boots(watch: &mut BootWatch, count: usize) -> Vec<u32> {
        let mut found = Vec::new();
        for _ in 0..count {
            let next = timeout(Duration::from_secs(30), watch.next()).await;
            found.push(next.expect("one boots").expect("told").get());
        }
        found
    }

    #[tokio::test]
    async fn every_boot_is_noticed_and_nothing_else() {
        let top = tempfile::tempdir().expect("tempdir");
        let root = top.path().join("cg");
        let at = HostPaths { cgroup_root: root.clone(), ..HostPaths::default() };
        BootWatch::new(&at).expect_err("there are no cgroups");
        make(&root);
        fs::write(root.join("cgroup.controllers"), "pids io\n").expect("written");
        let mut watch = BootWatch::new(&at).expect("watched");
        // The first container since the host's boot.
        make(&root.join("lxc/100"));
        assert_eq!(boots(&mut watch, 1).await, [100]);
        for other in ["lxc/monitor", "lxc/100/101", "lxc/0102", "system.slice"] {
            make(&root.join(other));
        }
        fs::write(root.join("lxc/103"), "").expect("written");
        fs::remove_dir_all(root.join("lxc/100")).expect("removed");
        make(&root.join("lxc/100"));
        assert_eq!(boots(&mut watch, 1).await, [100]);
        // LXC may remove the directory with the last container.
        fs::remove_dir_all(root.join("lxc")).expect("removed");
        make(&root.join("lxc/104"));
        assert_eq!(boots(&mut watch, 1).await, [104]);
    }

    #[tokio::test]
    async fn boots_are_noticed_in_the_hierarchies_of_v1_that_have_limits() {
        let top = tempfile::tempdir().expect("tempdir");
        let root = top.path().join("cg");
        let at = HostPaths { cgroup_root: root.clone(), ..HostPaths::default() };
        for controller in ["pids", "blkio", "memory"] {
            make(&root.join(controller).join("lxc"));
            fs::write(root.join(controller).join("cgroup.procs"), "").expect("written");
        }
        let mut watch = BootWatch::new(&at).expect("watched");
        make(&root.join("memory/lxc/100"));
        make(&root.join("blkio/lxc/101"));
        make(&root.join("pids/lxc/102"));
        assert_eq!(boots(&mut watch, 2).await, [101, 102]);
    }
}
