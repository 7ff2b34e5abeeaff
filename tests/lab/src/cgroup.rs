//! Cgroups of the nodes on the machine's own hierarchies (v1, v2 or both): a CPU quota and a memory
//! limit. A node sees only its own part of them.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::mount::{MsFlags, mount};

use crate::layout::{CGROUP, Layout, NodeId};
use crate::mounts::{self, Mount};
use crate::process::wait_until;
use crate::settings::Limits;

/// v1 controllers under which each node is placed.
const V1: [&str; 6] = ["blkio", "cpu", "cpuacct", "cpuset", "memory", "pids"];
/// v2 controllers that containers get, where v2 has them.
const V2: [&str; 5] = ["cpu", "cpuset", "memory", "io", "pids"];
const PERIOD_US: u64 = 100_000;
/// Share of the machine's CPUs that the lab has beside any other program: it stands for several machines, each with CPUs
/// of its own.
const LAB_WEIGHT: u32 = 400;
/// Longest wait for the kernel to release an ended process.
const EMPTY_WITHIN: Duration = Duration::from_secs(20);

/// Mount points of the machine's cgroup hierarchies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchies {
    /// Mount point of v2.
    pub v2: PathBuf,
    /// Mount points of v1 by controller; empty on a machine that has only v2.
    pub v1: BTreeMap<String, PathBuf>,
}

impl Hierarchies {
    /// Finds the mounted hierarchies.
    pub fn open() -> Result<Hierarchies> {
        let mounted = mounts::here()?;
        let v2 = find_v2(&mounted).context("cgroup v2 is not mounted, nor is the lab up")?;
        Ok(Hierarchies { v2, v1: find_v1(&mounted) })
    }

    /// Finds the hierarchies and mounts missing ones below the lab's directory: a chroot has none.
    /// Two processes must not call this at the same time.
    pub fn ensure(layout: &Layout) -> Result<Hierarchies> {
        let mounted = mounts::here()?;
        if find_v2(&mounted).is_none() {
            mount_own(layout, "unified", "cgroup2", None)?;
        }
        let v1 = find_v1(&mounted);
        let text = fs::read_to_string("/proc/self/cgroup")?;
        for controllers in v1_hierarchies(&text) {
            let mut names = controllers.split(',').filter(|name| V1.contains(name));
            if names.any(|name| !v1.contains_key(name)) {
                mount_own(layout, controllers, "cgroup", Some(controllers))?;
            }
        }
        Hierarchies::open()
    }

    /// Returns the cgroups of a node.
    pub fn node(&self, node: NodeId) -> NodeCgroup {
        let own = |root: &PathBuf| root.join(CGROUP).join(node.name());
        let v1 = self.v1.iter().map(|(name, root)| (name.clone(), own(root))).collect();
        NodeCgroup { v2: own(&self.v2), v1 }
    }

    /// Returns the cgroup of the whole lab in the hierarchy that shares out the CPUs.
    pub fn cpu(&self) -> PathBuf {
        self.v1.get("cpu").unwrap_or(&self.v2).join(CGROUP)
    }

    /// Removes the lab's cgroups from all hierarchies.
    pub fn remove(&self) -> Result<()> {
        let roots: Vec<&PathBuf> = std::iter::once(&self.v2).chain(self.v1.values()).collect();
        for root in roots {
            remove_tree(&root.join(CGROUP))?;
        }
        Ok(())
    }
}

/// Cgroups of one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeCgroup {
    /// Directory in v2; the node sees it as its root.
    pub v2: PathBuf,
    /// Directories in v1 by controller.
    pub v1: BTreeMap<String, PathBuf>,
}

impl NodeCgroup {
    /// Recreates the cgroups and sets the limits. Returns messages about limits that could not
    /// be set.
    pub fn prepare(&self, limits: &Limits) -> Result<Vec<String>> {
        self.remove()?;
        let mut missed = Vec::new();
        let lab = self.v2.parent().context("a cgroup has a parent")?;
        for dir in [lab.parent().unwrap_or(lab), lab] {
            fs::create_dir_all(dir)?;
            enable_v2(dir);
        }
        for dir in std::iter::once(&self.v2).chain(self.v1.values()) {
            fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        if let Some(dir) = self.v1.get("cpuset") {
            // A new one takes no process before it has CPUs and memory nodes.
            for dir in [dir.parent().unwrap_or(dir), dir] {
                inherit(dir, "cpuset.cpus")?;
                inherit(dir, "cpuset.mems")?;
            }
        }
        let cpu = self.v1.get("cpu").unwrap_or(&self.v2);
        if let Err(error) = set_cpu_weight(cpu.parent().unwrap_or(lab), LAB_WEIGHT) {
            missed.push(format!("{error:#}"));
        }
        let quota_us = u64::from(limits.cpu_percent) * PERIOD_US / 100;
        let bytes = limits.memory_mib * 1024 * 1024;
        let mut set = |file: PathBuf, value: String| {
            if let Err(error) = fs::write(&file, &value) {
                missed.push(format!("{} = {value}: {error}", file.display()));
            }
        };
        match self.v1.get("cpu") {
            Some(dir) => {
                set(dir.join("cpu.cfs_period_us"), PERIOD_US.to_string());
                set(dir.join("cpu.cfs_quota_us"), quota_us.to_string());
            }
            None => set(self.v2.join("cpu.max"), format!("{quota_us} {PERIOD_US}")),
        }
        match self.v1.get("memory") {
            Some(dir) => set(dir.join("memory.limit_in_bytes"), bytes.to_string()),
            None => set(self.v2.join("memory.max"), bytes.to_string()),
        }
        Ok(missed)
    }

    /// Moves this process into the cgroups. In v2 it joins the child `leaf`, because a cgroup with
    /// children cannot hold processes.
    pub fn join(&self, leaf: &str) -> Result<()> {
        let v2 = self.v2.join(leaf);
        fs::create_dir_all(&v2)?;
        for dir in std::iter::once(&v2).chain(self.v1.values()) {
            let file = dir.join("cgroup.procs");
            fs::write(&file, "0").with_context(|| format!("cannot join {}", dir.display()))?;
        }
        Ok(())
    }

    /// Returns true while a process lives in the cgroups.
    pub fn populated(&self) -> bool {
        let text = fs::read_to_string(self.v2.join("cgroup.events")).unwrap_or_default();
        text.lines().any(|line| line == "populated 1")
    }

    /// Kills every process in the cgroups, including those that left the node's init.
    pub fn kill(&self) -> Result<()> {
        if self.populated() {
            // cgroup.kill is missing before Linux 5.14; the end of the node's init does the same.
            drop(fs::write(self.v2.join("cgroup.kill"), "1"));
        }
        self.wait_empty()
    }

    /// Waits until no process is left. A process that stays was not started by this lab.
    pub fn wait_empty(&self) -> Result<()> {
        wait_until(EMPTY_WITHIN, || !self.populated()).with_context(|| {
            let dir = self.v2.display();
            format!("processes are left in {dir}: is another lab up, in a chroot maybe?")
        })
    }

    /// Removes the cgroups; no process may be left in them.
    pub fn remove(&self) -> Result<()> {
        std::iter::once(&self.v2).chain(self.v1.values()).try_for_each(|dir| remove_tree(dir))
    }
}

/// Enables every available controller for the children of a v2 cgroup.
pub fn enable_v2(dir: &Path) {
    for controller in V2 {
        let control = fs::OpenOptions::new().write(true).open(dir.join("cgroup.subtree_control"));
        // A missing controller is on v1, or the machine's own cgroup withholds it.
        drop(control.and_then(|mut file| file.write_all(format!("+{controller}").as_bytes())));
    }
}

/// Sets a cgroup's share of the CPUs, as `CPUWeight=` of a unit does: 1 to 10000, and 100 for all that say nothing.
/// Where the CPUs are shared out by neither version, nothing is set.
pub fn set_cpu_weight(dir: &Path, weight: u32) -> Result<()> {
    // 1024 in v1 is 100 in v2.
    let in_v1 = u64::from(weight) * 1024 / 100;
    for (file, value) in [("cpu.weight", u64::from(weight)), ("cpu.shares", in_v1)] {
        let file = dir.join(file);
        if file.exists() {
            fs::write(&file, value.to_string())
                .with_context(|| format!("cannot set {}", file.display()))?;
        }
    }
    Ok(())
}

/// Gives a v1 cgroup the value of its parent.
fn inherit(dir: &Path, file: &str) -> Result<()> {
    let parent = dir.parent().context("a cgroup has a parent")?;
    let value = fs::read(parent.join(file))?;
    fs::write(dir.join(file), value)
        .with_context(|| format!("cannot set {file} of {}", dir.display()))
}

fn find_v2(mounted: &[Mount]) -> Option<PathBuf> {
    let v2 = mounted.iter().filter(|m| m.fs_type == "cgroup2");
    v2.min_by_key(|m| m.at.components().count()).map(|m| m.at.clone())
}

fn find_v1(mounted: &[Mount]) -> BTreeMap<String, PathBuf> {
    let mut found = BTreeMap::new();
    for mount in mounted.iter().filter(|m| m.fs_type == "cgroup") {
        for option in mount.super_options.iter().filter(|o| V1.contains(&o.as_str())) {
            found.entry(option.clone()).or_insert_with(|| mount.at.clone());
        }
    }
    found
}

/// Returns the controllers of each v1 hierarchy, as /proc/self/cgroup names them.
fn v1_hierarchies(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .filter_map(|line| line.split(':').nth(1))
        .filter(|controllers| !controllers.is_empty() && !controllers.starts_with("name="))
}

fn mount_own(layout: &Layout, name: &str, fs_type: &str, options: Option<&str>) -> Result<()> {
    let at = layout.cgroups().join(name);
    fs::create_dir_all(&at)?;
    mount(Some("none"), &at, Some(fs_type), MsFlags::empty(), options)
        .with_context(|| format!("cannot mount the cgroups of {name}"))
}

fn remove_tree(dir: &Path) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).context(format!("cannot read {}", dir.display())),
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    // The kernel releases an ended process slightly after it leaves the list.
    let mut last = None;
    wait_until(EMPTY_WITHIN, || match fs::remove_dir(dir) {
        Ok(()) => true,
        Err(error) if error.kind() == ErrorKind::NotFound => true,
        Err(error) => {
            last = Some(error);
            false
        }
    })
    .with_context(|| format!("cannot remove {}: {last:?}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weight_is_set_in_the_version_that_shares_out_the_cpus() {
        let dir = tempfile::tempdir().expect("tempdir");
        set_cpu_weight(dir.path(), 1000).expect("nothing to set");
        assert_eq!(fs::read_dir(dir.path()).expect("listed").count(), 0);
        for (file, value) in [("cpu.shares", "10240"), ("cpu.weight", "1000")] {
            let file = dir.path().join(file);
            fs::write(&file, "").expect("a file of the kernel's");
            set_cpu_weight(dir.path(), 1000).expect("set");
            assert_eq!(fs::read_to_string(&file).expect("read"), value);
            fs::remove_file(&file).expect("removed");
        }
    }

    #[test]
    fn hierarchies_of_a_hybrid_machine_are_found() {
        let text = "\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw";
        let mounted = mounts::parse(text);
        assert_eq!(find_v2(&mounted), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        let v1 = find_v1(&mounted);
        assert_eq!(v1["cpu"], v1["cpuacct"]);
        assert_eq!(v1["memory"], Path::new("/sys/fs/cgroup/memory"));
    }

    #[test]
    fn v1_hierarchies_are_parsed_from_proc() {
        let text = "9:name=systemd:/\n4:memory:/x\n1:cpu,cpuacct:/\n0::/\n";
        assert_eq!(v1_hierarchies(text).collect::<Vec<_>>(), ["memory", "cpu,cpuacct"]);
    }
}
