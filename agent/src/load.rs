//! Load of the host, and the share of the sandboxes in it. Read from /proc, or from the node's own
//! cgroup where the node is one of several on a machine. No process is started; roots are
//! parameters.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use proto::id::Vmid;
use serde::Deserialize;
use tokio::time::Instant;

use crate::{
    pve::cgroup,
    sys::{
        psi::{self, Stalled},
        read,
    },
};

/// Most bytes read of a kernel file. /proc/stat, the longest, grows with cores and interrupts.
const FILE_BYTES_MAX: u64 = 1024 * 1024;
/// Window of the exponential smoothing of the busy share.
const WINDOW: Duration = Duration::from_secs(10);
/// Longer window of the same.
const LONG_WINDOW: Duration = Duration::from_secs(60);

/// Cgroup that contains the whole node; empty on a real node. A machine with only cgroup2 has just
/// `unified`; on a hybrid one the controllers have trees of their own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cgroup {
    /// Path in cgroup2.
    pub unified: Option<PathBuf>,
    /// Path in the `cpu` controller: quota.
    pub cpu: Option<PathBuf>,
    /// Path in the `cpuacct` controller: CPU time.
    pub cpuacct: Option<PathBuf>,
    /// Path in the `memory` controller.
    pub memory: Option<PathBuf>,
}

/// Load of the host at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct HostLoad {
    /// Usable cores; a fraction under a quota.
    pub cores: f64,
    /// Share of the cores in use over the last 10 s, 0 to 1.
    pub cpu_busy: f64,
    /// Share of the cores in use over the last 60 s, 0 to 1.
    pub cpu_busy_60s: f64,
    /// Cores used by others than sandboxes, over the last 10 s; `None` when unknown.
    pub foreign_cores: Option<f64>,
    /// Memory used by others than sandboxes, in bytes; `None` when unknown.
    pub foreign_memory: Option<u64>,
    /// PSI `full avg10` of memory, percent.
    pub psi_memory_full: f64,
    /// PSI `full avg10` of io, percent.
    pub psi_io_full: f64,
    /// PSI `some avg10` of cpu, percent.
    pub psi_cpu: f64,
    /// PSI `some avg10` of memory, percent.
    pub psi_memory: f64,
    /// PSI `some avg10` of io, percent.
    pub psi_io: f64,
    /// Total memory, in bytes.
    pub memory_total: u64,
    /// Memory available for new work, in bytes.
    pub memory_available: u64,
}

/// CPU time at one moment.
#[derive(Debug, Clone, Copy)]
struct Mark {
    at: Instant,
    /// Core-seconds used since an arbitrary start.
    used: f64,
}

/// Sampler of the load, called about once a second.
#[derive(Debug)]
pub struct Sampler {
    proc: PathBuf,
    /// Root of the containers' cgroups.
    containers: PathBuf,
    cgroup: Cgroup,
    last: Option<Mark>,
    busy: f64,
    busy_60s: f64,
    /// CPU time of each sandbox at the last sample, in microseconds.
    sandboxes: BTreeMap<Vmid, u64>,
    /// Cores that the sandboxes use, smoothed.
    own: f64,
}

/// Usage of all sandboxes: CPU time since the last sample, and memory now.
#[derive(Debug, Clone, Copy, Default)]
struct Own {
    core_seconds: Option<f64>,
    memory: Option<u64>,
}

impl Sampler {
    /// Creates a sampler of this procfs, the containers' cgroups below that root and, if given, the
    /// node's own cgroup.
    pub fn new(proc: PathBuf, containers: PathBuf, cgroup: Cgroup) -> Self {
        Self {
            proc,
            containers,
            cgroup,
            last: None,
            busy: 0.0,
            busy_60s: 0.0,
            sandboxes: BTreeMap::new(),
            own: 0.0,
        }
    }

    /// Returns the current load; `sandboxes` are those that may be running.
    pub fn sample(&mut self, now: Instant, sandboxes: &[Vmid]) -> HostLoad {
        let cores = self.cores();
        let own = self.own(sandboxes);
        if let Some(used) = self.cpu_seconds() {
            self.smooth(Mark { at: now, used }, cores, own.core_seconds.unwrap_or(0.0));
        }
        let (memory_total, memory_available) = self.memory();
        let used = memory_total.saturating_sub(memory_available);
        HostLoad {
            cores,
            cpu_busy: self.busy,
            cpu_busy_60s: self.busy_60s,
            foreign_cores: own.core_seconds.map(|_| (self.busy * cores - self.own).max(0.0)),
            foreign_memory: own.memory.map(|own| used.saturating_sub(own)),
            psi_memory_full: self.pressure("memory", Stalled::Full),
            psi_io_full: self.pressure("io", Stalled::Full),
            psi_cpu: self.pressure("cpu", Stalled::Some),
            psi_memory: self.pressure("memory", Stalled::Some),
            psi_io: self.pressure("io", Stalled::Some),
            memory_total,
            memory_available,
        }
    }

    /// Sums the usage of the sandboxes. A value is `None` when the kernel does not count a running
    /// sandbox: then the share of others is unknown.
    fn own(&mut self, sandboxes: &[Vmid]) -> Own {
        let before = std::mem::take(&mut self.sandboxes);
        let mut own = Own { core_seconds: Some(0.0), memory: Some(0) };
        for vmid in sandboxes {
            let Some(share) = cgroup::share(&self.containers, *vmid) else { continue };
            own.core_seconds = own.core_seconds.zip(share.cpu_us).map(|(sum, cpu_us)| {
                // The usage of a new sandbox before it was first seen does not belong to this
                // second.
                let last = before.get(vmid).copied().unwrap_or(cpu_us);
                self.sandboxes.insert(*vmid, cpu_us);
                sum + Duration::from_micros(cpu_us.saturating_sub(last)).as_secs_f64()
            });
            own.memory = own.memory.zip(share.memory_bytes).map(|(sum, bytes)| sum + bytes);
        }
        own
    }

    fn smooth(&mut self, mark: Mark, cores: f64, own: f64) {
        let Some(last) = self.last.replace(mark) else { return };
        let passed = mark.at.saturating_duration_since(last.at);
        if passed.is_zero() {
            // Sampled twice at the same time: the next sample counts from the first.
            self.last = Some(last);
            return;
        }
        let share = ((mark.used - last.used) / (passed.as_secs_f64() * cores)).clamp(0.0, 1.0);
        let weight = |window: Duration| 1.0 - (-passed.as_secs_f64() / window.as_secs_f64()).exp();
        self.busy += (share - self.busy) * weight(WINDOW);
        self.busy_60s += (share - self.busy_60s) * weight(LONG_WINDOW);
        self.own += (own / passed.as_secs_f64() - self.own) * weight(WINDOW);
    }

    fn cores(&self) -> f64 {
        let host = cores_online(&read(&self.proc, "stat"));
        let quota = self.unified("cpu.max").and_then(|text| quota_v2(&text)).or_else(|| {
            let cpu = self.cgroup.cpu.as_deref()?;
            let number = |name| read(cpu, name).trim().parse::<f64>().ok();
            let quota = number("cpu.cfs_quota_us").filter(|quota| *quota > 0.0)?;
            Some(quota / number("cpu.cfs_period_us").filter(|period| *period > 0.0)?)
        });
        quota.map_or(host, |quota| quota.min(host))
    }

    fn cpu_seconds(&self) -> Option<f64> {
        let v2 = || field(&self.unified("cpu.stat")?, "usage_usec").map(|us| us / 1e6);
        let v1 = || {
            let text = read(self.cgroup.cpuacct.as_deref()?, "cpuacct.usage");
            text.trim().parse::<f64>().ok().map(|ns| ns / 1e9)
        };
        // On a hybrid machine the controller counts what its cgroup is charged for.
        v1().or_else(v2).or_else(|| busy_seconds(&read(&self.proc, "stat")))
    }

    /// Returns the total memory, and the memory available for new work.
    fn memory(&self) -> (u64, u64) {
        let info = read(&self.proc, "meminfo");
        let kib = |key| field(&info, key).map_or(0, bytes_of_kib);
        // ZFS releases its cache on demand, but the kernel does not count it as available.
        let arc = read(&self.proc, "spl/kstat/zfs/arcstats");
        let reclaimable = arcstat(&arc, "size").saturating_sub(arcstat(&arc, "c_min"));
        let total = kib("MemTotal:");
        let available = (kib("MemAvailable:") + reclaimable).min(total);
        match self.cgroup_memory().filter(|(limit, _)| *limit < total) {
            Some((limit, used)) => (limit, available.min(limit.saturating_sub(used))),
            None => (total, available),
        }
    }

    /// Returns the limit, and the memory that cannot be reclaimed.
    fn cgroup_memory(&self) -> Option<(u64, u64)> {
        let number = |text: String| text.trim().parse::<u64>().ok();
        let v2 = || {
            let limit = number(self.unified("memory.max")?)?;
            let stat = self.unified("memory.stat")?;
            let back = count(&stat, "inactive_file") + count(&stat, "slab_reclaimable");
            Some((limit, number(self.unified("memory.current")?)?.saturating_sub(back)))
        };
        let v1 = || {
            let memory = self.cgroup.memory.as_deref()?;
            let limit = number(read(memory, "memory.limit_in_bytes"))?;
            let back = count(&read(memory, "memory.stat"), "total_inactive_file");
            Some((limit, number(read(memory, "memory.usage_in_bytes"))?.saturating_sub(back)))
        };
        v2().or_else(v1)
    }

    fn pressure(&self, what: &str, stalled: Stalled) -> f64 {
        let of_node = self.unified(&format!("{what}.pressure"));
        let text = of_node.unwrap_or_else(|| read(&self.proc, &format!("pressure/{what}")));
        psi::avg10(&text, stalled)
    }

    /// Reads a file of the node's cgroup2; `None` if it is empty or missing.
    fn unified(&self, name: &str) -> Option<String> {
        let text = read(self.cgroup.unified.as_deref()?, name);
        (!text.is_empty()).then_some(text)
    }
}

fn read(dir: &Path, name: &str) -> String {
    read::text(&dir.join(name), FILE_BYTES_MAX)
}

/// Parses the line `key value`.
fn field(text: &str, key: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix([' ', '\t']));
    line?.split_ascii_whitespace().next()?.parse().ok()
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "checked to be a count"
)]
fn count(text: &str, key: &str) -> u64 {
    field(text, key).filter(|number| *number >= 0.0).map_or(0, |number| number as u64)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "checked to be a count"
)]
fn bytes_of_kib(kib: f64) -> u64 {
    if kib >= 0.0 { (kib * 1024.0) as u64 } else { 0 }
}

/// Parses the row `name type value`.
fn arcstat(text: &str, key: &str) -> u64 {
    let mut rows = text.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let row = rows.find(|row| row.first() == Some(&key));
    row.and_then(|row| row.get(2)?.parse().ok()).unwrap_or(0)
}

fn cores_online(stat: &str) -> f64 {
    let is_core = |line: &&str| {
        let name = line.split(' ').next().unwrap_or("");
        name.strip_prefix("cpu").is_some_and(|n| !n.is_empty() && n.parse::<u32>().is_ok())
    };
    let cores = u32::try_from(stat.lines().filter(is_core).count()).unwrap_or(u32::MAX);
    f64::from(cores.max(1))
}

/// Returns the core-seconds that were neither idle nor waiting for a disk; stolen ones count as
/// used.
fn busy_seconds(stat: &str) -> Option<f64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<f64> = line.split_ascii_whitespace().filter_map(|t| t.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guests' time is already in user.
    let [user, nice, system, _idle, _iowait, irq, softirq, steal, ..] = ticks[..] else {
        return None;
    };
    // The unit has been 1/100 s on every architecture that PVE runs on.
    Some((user + nice + system + irq + softirq + steal) / 100.0)
}

/// Parses `quota period`, or `max period`.
fn quota_v2(text: &str) -> Option<f64> {
    let mut words = text.split_ascii_whitespace();
    let quota: f64 = words.next()?.parse().ok()?;
    let period: f64 = words.next()?.parse().ok()?;
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new(files: &[(&str, &str)]) -> Self {
            let tree = Self(tempfile::tempdir().expect("tempdir"));
            files.iter().for_each(|(path, text)| tree.write(path, text));
            tree
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.path(path);
            fs::create_dir_all(path.parent().expect("below the root")).expect("mkdir");
            fs::write(path, text).expect("write");
        }

        fn path(&self, path: &str) -> PathBuf {
            self.0.path().join(path)
        }
    }

    const MEMINFO: &str = "MemTotal:        8000 kB\nMemFree: 1 kB\nMemAvailable:    4000 kB\n";
    const STAT: &str = "cpu  100 0 100 5000 700 0 0 0 0 0\ncpu0 1 1 1\ncpu1 1 1 1\nintr 5\n";
    const PSI: &str = "some avg10=12.50 avg60=1.26 avg300=6.18 total=1\nfull avg10=3.00 avg60=0\n";

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-6, "{a} is not {b}");
    }

    #[test]
    fn load_is_sampled_from_proc_and_smoothed() {
        let tree = Tree::new(&[
            ("stat", STAT),
            ("meminfo", MEMINFO),
            ("pressure/cpu", PSI),
            ("pressure/memory", PSI),
            ("spl/kstat/zfs/arcstats", "9 1 0x01\nname type data\nc_min 4 1024\nsize 4 1025024\n"),
        ]);
        let mut sampler =
            Sampler::new(tree.0.path().to_owned(), tree.path("cg"), Cgroup::default());
        let start = Instant::now();
        let load = sampler.sample(start, &[]);
        near(load.cores, 2.0);
        near(load.cpu_busy, 0.0);
        near(load.psi_cpu, 12.5);
        near(load.psi_io, 0.0);
        near(load.psi_memory, 12.5);
        near(load.psi_memory_full, 3.0);
        assert_eq!(load.memory_total, 8000 * 1024);
        assert_eq!(load.memory_available, 4000 * 1024 + 1024 * 1000);
        // One core-second per second on two cores, again and again.
        for second in 1..=60 {
            tree.write("stat", &STAT.replace("cpu  100", &format!("cpu  {}", 100 + 100 * second)));
            let load = sampler.sample(start + Duration::from_secs(second), &[]);
            if second == 1 {
                near(load.cpu_busy, 0.5 * (1.0 - (-0.1f64).exp()));
            }
        }
        assert!((sampler.busy - 0.5).abs() < 0.01, "{}", sampler.busy);
    }

    #[test]
    fn load_is_sampled_from_cgroups_of_a_hybrid_machine() {
        let tree = Tree::new(&[
            ("proc/stat", STAT),
            ("proc/meminfo", MEMINFO),
            ("proc/pressure/cpu", PSI),
            ("u/cpu.pressure", &PSI.replace("12.50", "1.00")),
            ("u/cpu.stat", "usage_usec 5\n"),
            ("cpu/cpu.cfs_quota_us", "150000\n"),
            ("cpu/cpu.cfs_period_us", "100000\n"),
            ("cpuacct/cpuacct.usage", "1000000000\n"),
            ("memory/memory.limit_in_bytes", "4096000\n"),
            ("memory/memory.usage_in_bytes", "3000000\n"),
            ("memory/memory.stat", "inactive_file 1\ntotal_inactive_file 1000000\n"),
        ]);
        let at = |name| Some(tree.path(name));
        let cgroup = Cgroup {
            unified: at("u"),
            cpu: at("cpu"),
            cpuacct: at("cpuacct"),
            memory: at("memory"),
        };
        let mut sampler = Sampler::new(tree.path("proc"), tree.path("cg"), cgroup);
        let start = Instant::now();
        let load = sampler.sample(start, &[]);
        near(load.cores, 1.5);
        near(load.psi_cpu, 1.0);
        assert_eq!((load.memory_total, load.memory_available), (4_096_000, 4_096_000 - 2_000_000));
        tree.write("cpuacct/cpuacct.usage", "16000000000\n");
        let load = sampler.sample(start + Duration::from_secs(10), &[]);
        near(load.cpu_busy, 1.0 - (-1.0f64).exp());
    }

    #[test]
    fn load_is_sampled_from_a_unified_cgroup() {
        let tree = Tree::new(&[
            ("proc/stat", STAT),
            ("proc/meminfo", MEMINFO),
            ("u/cpu.max", "max 100000\n"),
            ("u/cpu.stat", "usage_usec 1000000\n"),
            ("u/memory.max", "max\n"),
            ("u/memory.current", "3000000\n"),
            ("u/memory.stat", "anon 1\ninactive_file 1000000\nslab_reclaimable 500000\n"),
        ]);
        let cgroup = Cgroup { unified: Some(tree.path("u")), ..Cgroup::default() };
        let mut sampler = Sampler::new(tree.path("proc"), tree.path("cg"), cgroup);
        let load = sampler.sample(Instant::now(), &[]);
        near(load.cores, 2.0);
        assert_eq!((load.memory_total, load.memory_available), (8000 * 1024, 4000 * 1024));
        tree.write("u/cpu.max", "50000 100000\n");
        tree.write("u/memory.max", "4096000\n");
        let load = sampler.sample(Instant::now(), &[]);
        near(load.cores, 0.5);
        assert_eq!((load.memory_total, load.memory_available), (4_096_000, 4_096_000 - 1_500_000));
    }

    #[test]
    fn load_of_sandboxes_is_separated_from_foreign_load() {
        let tree = Tree::new(&[
            ("stat", STAT),
            ("meminfo", MEMINFO),
            ("cg/lxc/100/cpu.stat", "usage_usec 1000000\n"),
            ("cg/lxc/100/memory.current", "3000000\n"),
            ("cg/lxc/100/memory.stat", "anon 1\ninactive_file 1000000\n"),
        ]);
        let sandboxes = [100, 101].map(|number: u32| Vmid::try_from(number).expect("vmid"));
        let mut sampler =
            Sampler::new(tree.0.path().to_owned(), tree.path("cg"), Cgroup::default());
        let start = Instant::now();
        let mut load = sampler.sample(start, &sandboxes);
        assert_eq!(load.foreign_memory, Some(4000 * 1024 - 2_000_000));
        // Both cores are in use, a quarter of that by the sandbox.
        for second in 1..=100 {
            tree.write("stat", &STAT.replace("cpu  100", &format!("cpu  {}", 100 + 200 * second)));
            let used = 1_000_000 + second * 500_000;
            tree.write("cg/lxc/100/cpu.stat", &format!("usage_usec {used}\n"));
            load = sampler.sample(start + Duration::from_secs(second), &sandboxes);
        }
        assert!((load.foreign_cores.expect("told") - 1.5).abs() < 0.01, "{load:?}");
        // A sandbox runs and is not counted: what the others use becomes unknown.
        fs::remove_file(tree.path("cg/lxc/100/memory.current")).expect("removed");
        fs::remove_file(tree.path("cg/lxc/100/cpu.stat")).expect("removed");
        let load = sampler.sample(start + Duration::from_secs(101), &sandboxes);
        assert_eq!((load.foreign_cores, load.foreign_memory), (None, None));
    }

    #[test]
    fn sampling_without_readable_files_does_not_panic() {
        let mut sampler =
            Sampler::new("/nonexistent".into(), "/nonexistent".into(), Cgroup::default());
        let load = sampler.sample(Instant::now(), &[]);
        near(load.cores, 1.0);
        assert_eq!(load.memory_available, 0);
    }
}
