//! Limits of a container: in its own cgroup2 if that has the controllers, otherwise in the
//! machine's cgroup v1 hierarchies that a lab node sees beside it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::conf::Section;
use crate::ctx::Ctx;
use crate::failure::{Result, ignore};
use crate::roots::Roots;

const PERIOD_US: u64 = 100_000;
const MIB: u64 = 1 << 20;

/// Limits that a configuration sets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Limits {
    pub(crate) memory_bytes: u64,
    pub(crate) swap_bytes: u64,
    pub(crate) quota_us: Option<u64>,
    pub(crate) shares: Option<u64>,
}

impl Limits {
    pub(crate) fn of(conf: &Section, cpus: usize) -> Self {
        let limit = conf.get("cpulimit").and_then(|v| v.parse::<f64>().ok()).filter(|v| *v > 0.0);
        // PVE pins `cores` to CPUs, as `cpus_of` does. Without the controller for it, a quota of the same size
        // bounds the sum the same way.
        let cores = conf.number("cores").filter(|c| usize::try_from(*c).is_ok_and(|c| c < cpus));
        let quota = limit.map(|l| l * 100_000.0).or_else(|| cores.map(|c| c as f64 * 100_000.0));
        Self {
            memory_bytes: conf.number("memory").unwrap_or(512) * MIB,
            swap_bytes: conf.number("swap").unwrap_or(512) * MIB,
            // The value is between 1 ms and 8192 CPUs.
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bounded")]
            quota_us: quota.map(|q| q.clamp(1000.0, 8192.0 * 100_000.0) as u64),
            shares: conf.number("cpuunits"),
        }
    }
}

/// Returns the number of CPUs of the machine.
pub(crate) fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Returns whether the cgroup2 tree has a controller.
pub(crate) fn has_controller(ctx: &Ctx, name: &str) -> bool {
    let text = fs::read_to_string(ctx.roots.cgroup.join("cgroup.controllers")).unwrap_or_default();
    text.split_whitespace().any(|c| c == name)
}

/// Returns the CPUs that a container runs on: as many of the node's as it has cores. Containers begin at
/// different CPUs, by their ids; PVE would move them later by their load. None without the controller.
fn cpus_of(ctx: &Ctx, vmid: u32, conf: &Section) -> Option<String> {
    let v2 = ctx.roots.cgroup.join("cpuset.cpus.effective");
    let v1 = ctx.roots.lab_cgroup.join("cpuset/cpuset.cpus");
    let node = [v2, v1].iter().find_map(|file| fs::read_to_string(file).ok())?;
    let node = cpu_list(&node)?;
    let cores = conf.number("cores").and_then(|cores| usize::try_from(cores).ok());
    let own = node.iter().cycle().skip(usize::try_from(vmid).unwrap_or(0) % node.len());
    let mut own: Vec<u32> =
        own.take(cores.unwrap_or(node.len()).clamp(1, node.len())).copied().collect();
    own.sort_unstable();
    Some(own.iter().map(u32::to_string).collect::<Vec<_>>().join(","))
}

/// Parses a list of CPUs such as `0-2,5`; none if it is empty or not one.
fn cpu_list(text: &str) -> Option<Vec<u32>> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        cpus.extend(first.parse::<u32>().ok()?..=last.parse().ok()?);
    }
    (!cpus.is_empty()).then_some(cpus)
}

/// Returns the lines for the container's LXC configuration; none without controllers.
pub(crate) fn lxc_lines(ctx: &Ctx, vmid: u32, conf: &Section) -> Vec<(String, String)> {
    let limits = Limits::of(conf, cpus());
    let mut lines = Vec::new();
    let mut add = |key: &str, value: String| lines.push((format!("lxc.cgroup2.{key}"), value));
    if has_controller(ctx, "memory") {
        add("memory.max", limits.memory_bytes.to_string());
        add("memory.swap.max", limits.swap_bytes.to_string());
    }
    if has_controller(ctx, "cpu") {
        let quota = limits.quota_us.map_or("max".to_owned(), |q| q.to_string());
        add("cpu.max", format!("{quota} {PERIOD_US}"));
        add("cpu.weight", limits.shares.unwrap_or(100).clamp(1, 10_000).to_string());
    }
    if let Some(cpus) = cpus_of(ctx, vmid, conf).filter(|_| has_controller(ctx, "cpuset")) {
        add("cpuset.cpus", cpus);
    }
    lines
}

/// v1 controllers under which containers are placed.
pub(crate) const V1: [&str; 6] = ["memory", "cpu", "cpuacct", "pids", "blkio", "cpuset"];

/// Returns a container's cgroup under a v1 controller; none if the machine does not have it.
pub(crate) fn leg(roots: &Roots, controller: &str, vmid: u32) -> Option<PathBuf> {
    let root = roots.lab_cgroup.join(controller);
    root.join("cgroup.procs").exists().then(|| root.join("lxc").join(vmid.to_string()))
}

/// Moves a process under the machine's v1 controllers, with the limits of its container. Settings
/// that are missing or not writable stay as they are.
pub(crate) fn enter_v1(ctx: &Ctx, vmid: u32, pid: u32, conf: &Section) {
    for controller in V1 {
        let Some(dir) = leg(&ctx.roots, controller, vmid) else { continue };
        ignore(fs::create_dir_all(&dir));
        if controller == "cpuset" {
            // A new one takes no process before it has CPUs and memory nodes.
            pin_v1(ctx, vmid, conf);
        }
        if fs::write(dir.join("cgroup.procs"), pid.to_string()).is_err() {
            // Nothing else can join it either.
            ignore(fs::remove_dir(&dir));
        }
    }
    limit_v1(ctx, vmid, conf);
}

fn limit_v1(ctx: &Ctx, vmid: u32, conf: &Section) {
    let limits = Limits::of(conf, cpus());
    if let Some(dir) = leg(&ctx.roots, "memory", vmid) {
        let both = limits.memory_bytes.saturating_add(limits.swap_bytes);
        // To grow, the sum must be raised first; to shrink, it must be lowered last.
        for _ in 0..2 {
            put(&dir, "memory.memsw.limit_in_bytes", both);
            put(&dir, "memory.limit_in_bytes", limits.memory_bytes);
        }
    }
    if let Some(dir) = leg(&ctx.roots, "cpu", vmid) {
        put(&dir, "cpu.cfs_period_us", PERIOD_US);
        match limits.quota_us {
            Some(quota) => put(&dir, "cpu.cfs_quota_us", quota),
            None => ignore(fs::write(dir.join("cpu.cfs_quota_us"), "-1")),
        }
        // A weight of 100 equals 1024 shares.
        let shares = limits.shares.unwrap_or(100).saturating_mul(1024) / 100;
        put(&dir, "cpu.shares", shares.clamp(2, 262_144));
    }
}

fn pin_v1(ctx: &Ctx, vmid: u32, conf: &Section) {
    let Some(dir) = leg(&ctx.roots, "cpuset", vmid) else { return };
    let Some(cpus) = cpus_of(ctx, vmid, conf) else { return };
    let node = ctx.roots.lab_cgroup.join("cpuset");
    // The parent of all containers is new, too, at the first of them.
    let all = node.join("lxc");
    for (file, own) in [("cpuset.cpus", Some(cpus)), ("cpuset.mems", None)] {
        let nodes = fs::read_to_string(node.join(file)).unwrap_or_default();
        ignore(fs::write(all.join(file), &nodes));
        ignore(fs::write(dir.join(file), own.unwrap_or(nodes)));
    }
}

fn put(dir: &Path, file: &str, value: u64) {
    let path = dir.join(file);
    if path.exists() {
        ignore(fs::write(path, value.to_string()));
    }
}

/// Applies new limits to a running container.
pub(crate) fn relimit(ctx: &Ctx, vmid: u32, conf: &Section) {
    limit_v1(ctx, vmid, conf);
    pin_v1(ctx, vmid, conf);
    let dir = super::state::cgroup(ctx, vmid);
    for (key, value) in lxc_lines(ctx, vmid, conf) {
        if let Some(file) = key.strip_prefix("lxc.cgroup2.") {
            ignore(fs::write(dir.join(file), value));
        }
    }
}

/// Removes cgroups that a killed monitor left of a stopped container; LXC refuses to start while
/// they exist. On real nodes systemd removes them with the unit.
pub(crate) fn sweep(ctx: &Ctx, vmid: u32) -> Result {
    let deadline = Instant::now() + Duration::from_secs(5);
    for parent in ["lxc", "lxc.monitor"] {
        let dir = ctx.roots.cgroup.join(parent).join(vmid.to_string());
        while dir.is_dir() && Instant::now() < deadline {
            ignore(fs::write(dir.join("cgroup.kill"), "1"));
            remove_tree(&dir);
            if dir.is_dir() {
                super::state::nap(ctx, Duration::from_millis(10))?;
            }
        }
    }
    Ok(())
}

/// Removes a cgroup after its children; the kernel allows no other order.
fn remove_tree(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    ignore(fs::remove_dir(dir));
}

/// Removes the v1 directories of a stopped container. A directory with a process cannot be removed,
/// so an `lxc-attach` that still runs is moved to the node's cgroup.
pub(crate) fn leave_v1(ctx: &Ctx, vmid: u32) {
    for controller in V1 {
        let Some(dir) = leg(&ctx.roots, controller, vmid) else { continue };
        let left = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        for pid in left.lines() {
            ignore(fs::write(ctx.roots.lab_cgroup.join(controller).join("cgroup.procs"), pid));
        }
        ignore(fs::remove_dir(dir));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conf::Conf;

    #[test]
    fn lists_of_cpus_are_parsed() {
        assert_eq!(cpu_list("0-2,5\n"), Some(vec![0, 1, 2, 5]));
        assert_eq!(cpu_list("3"), Some(vec![3]));
        assert_eq!(cpu_list("\n"), None);
    }

    #[test]
    fn limits_are_read_from_the_configuration() {
        let of = |text: &str| Limits::of(&Conf::parse(text).main, 4);
        let plain = of("memory: 512\nswap: 0\n");
        assert_eq!((plain.memory_bytes, plain.swap_bytes), (512 << 20, 0));
        assert_eq!(plain.quota_us, None);
        assert_eq!(of("cpulimit: 1.5\ncores: 3\n").quota_us, Some(150_000));
        assert_eq!(of("cores: 2\n").quota_us, Some(200_000));
        assert_eq!(of("cores: 4\n").quota_us, None);
    }
}
