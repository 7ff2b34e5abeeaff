//! A container's cgroups: freezing, thawing, and resource usage. Uses only files, on cgroup2, or on
//! v1 where a controller has a hierarchy of its own; no fork, and no call to LXC's monitor.
//!
//! Only the inner cgroup, `lxc/ID/ns`, is frozen: freezing the outer one would freeze the
//! container's monitor too, and every process that queries it would hang.

use std::{
    collections::{BTreeSet, VecDeque},
    fs, io,
    path::{Path, PathBuf},
};

use proto::id::Vmid;

use super::{Usage, shim_cgroup};
use crate::sys::{
    psi::{self, Stalled},
    read,
};

/// Bytes read of a cgroup's file at most: `memory.stat`, the longest, has two KiB a NUMA node.
const FILE_BYTES_MAX: u64 = 64 * 1024;
/// Directories of a container's cgroup that are searched for processes at most.
const ALL_CGROUPS_MAX: usize = 20_000;
/// Processes of a container that are examined at most.
pub(super) const PROCESSES_MAX: usize = 65_536;
/// Bytes of that many pids, of seven digits at most.
const PIDS_BYTES_MAX: u64 = 8 * 65_536;
/// Limits from here on mean "no limit": v1 says it by a number that no machine has.
const NO_LIMIT: u64 = 1 << 60;

/// Control of the freezer of one cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Freezer {
    /// Cgroup of v2.
    V2(PathBuf),
    /// Cgroup of v1's `freezer`.
    V1(PathBuf),
}

impl Freezer {
    /// Freezers of a container, the inner one first; none when it does not run. `root` is
    /// cgroup2's, or holds v1's hierarchies under the names of their controllers.
    pub fn of(root: &Path, vmid: Vmid) -> Vec<Self> {
        let id = vmid.to_string();
        let (v1, v2) = (root.join("freezer/lxc").join(&id), root.join("lxc").join(&id));
        let inner = |top: &Path| [top.join("ns"), top.to_owned()];
        let v1 = inner(&v1).into_iter().filter(|dir| dir.join("freezer.state").exists());
        let found: Vec<_> = v1.map(Self::V1).collect();
        if !found.is_empty() {
            return found;
        }
        let v2 = inner(&v2).into_iter().filter(|dir| dir.join("cgroup.freeze").exists());
        v2.map(Self::V2).collect()
    }

    /// Freezes or thaws. The kernel needs time to freeze: poll `frozen`.
    pub fn set(&self, frozen: bool) -> io::Result<()> {
        match self {
            Self::V2(dir) => write(&dir.join("cgroup.freeze"), if frozen { "1" } else { "0" }),
            Self::V1(dir) => {
                write(&dir.join("freezer.state"), if frozen { "FROZEN" } else { "THAWED" })
            }
        }
    }

    /// True when every task in the cgroup is frozen.
    pub fn frozen(&self) -> bool {
        match self {
            Self::V2(dir) => {
                let events = read(&dir.join("cgroup.events"));
                events.lines().any(|line| line == "frozen 1")
            }
            Self::V1(dir) => read(&dir.join("freezer.state")).trim() == "FROZEN",
        }
    }

    /// True when the cgroup is frozen or about to be.
    pub fn freezing(&self) -> bool {
        match self {
            Self::V2(dir) => self.frozen() || read(&dir.join("cgroup.freeze")).trim() == "1",
            Self::V1(dir) => read(&dir.join("freezer.state")).trim() != "THAWED",
        }
    }
}

/// Resource usage of a container, for the load calculation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// CPU time used so far, microseconds; `None` where the kernel does not count it.
    pub cpu_us: Option<u64>,
    /// Memory that cannot be reclaimed, bytes; `None` where the kernel does not count it.
    pub memory_bytes: Option<u64>,
}

/// Cgroups of a running container, or of its shim.
struct Trees<'a> {
    root: &'a Path,
    /// Path below the root of each hierarchy.
    path: PathBuf,
}

impl<'a> Trees<'a> {
    fn of(root: &'a Path, parent: &str, vmid: Vmid) -> Self {
        Self { root, path: Path::new(parent).join(vmid.to_string()) }
    }

    /// Finds the container's cgroups; `None` when there are none, because it does not run.
    fn of_container(root: &'a Path, vmid: Vmid) -> Option<Self> {
        let trees = Self::of(root, "lxc", vmid);
        (trees.v2().exists() || trees.v1("memory").exists()).then_some(trees)
    }

    fn v2(&self) -> PathBuf {
        self.root.join(&self.path)
    }

    /// Directory in the hierarchy of a v1 controller.
    fn v1(&self, controller: &str) -> PathBuf {
        self.root.join(controller).join(&self.path)
    }

    /// CPU time, microseconds.
    fn cpu_us(&self) -> Option<u64> {
        let v1 = || number(self.v1("cpuacct").join("cpuacct.usage")).map(|ns| ns / 1000);
        field(&read(&self.v2().join("cpu.stat")), "usage_usec").or_else(v1)
    }

    /// Memory in use and the part of it that can be reclaimed, bytes.
    fn memory(&self) -> Option<(u64, u64)> {
        let memory_of = |dir: PathBuf, in_use: &str, cache: &str| {
            let cache = field(&read(&dir.join("memory.stat")), cache).unwrap_or(0);
            Some((number(dir.join(in_use))?, cache))
        };
        memory_of(self.v2(), "memory.current", "inactive_file").or_else(|| {
            memory_of(self.v1("memory"), "memory.usage_in_bytes", "total_inactive_file")
        })
    }

    /// Memory that the kernel takes back when it is short, bytes: pages of files, used lately or not.
    fn reclaimable(&self) -> Option<u64> {
        let sum = |dir: PathBuf, fields: [&str; 2]| {
            let stat = read(&dir.join("memory.stat"));
            fields.into_iter().filter_map(|name| field(&stat, name)).reduce(|a, b| a + b)
        };
        sum(self.v2(), ["inactive_file", "active_file"])
            .or_else(|| sum(self.v1("memory"), ["total_inactive_file", "total_active_file"]))
    }

    /// CPU time and memory in use.
    fn share(&self) -> Share {
        let memory_bytes = self.memory().map(|(used, cache)| used.saturating_sub(cache));
        Share { cpu_us: self.cpu_us(), memory_bytes }
    }
}

/// Resource usage of a container's shim; nothing without a shim.
fn of_shim(root: &Path, vmid: Vmid) -> Share {
    Trees::of(root, shim_cgroup::DIR, vmid).share()
}

/// Pids in the container's cgroup and below, each once; at most 65536 of them.
pub fn processes(cgroup_root: &Path, vmid: Vmid) -> Vec<u32> {
    let mut dirs = VecDeque::from([cgroup_root.join("lxc").join(vmid.to_string())]);
    let (mut pids, mut looked) = (BTreeSet::new(), 0);
    while let Some(dir) = dirs.pop_front() {
        pids.extend(pids_in(&dir).into_iter().take(PROCESSES_MAX - pids.len()));
        looked += 1;
        if looked >= ALL_CGROUPS_MAX {
            break;
        }
        dirs.extend(below(&dir).take(ALL_CGROUPS_MAX - dirs.len().min(ALL_CGROUPS_MAX)));
    }
    // Processes of a pid namespace that is not visible here are listed as 0.
    pids.remove(&0);
    pids.into_iter().collect()
}

/// Pids in one cgroup, in the kernel's order, at most `PROCESSES_MAX`.
pub(super) fn pids_in(cgroup: &Path) -> Vec<u32> {
    let listed = read::text(&cgroup.join("cgroup.procs"), PIDS_BYTES_MAX);
    // Drops the last, incomplete line: a number cut off by the bound would be another process.
    let whole = listed.rfind('\n').map_or("", |end| &listed[..end]);
    whole.lines().filter_map(|line| line.parse().ok()).take(PROCESSES_MAX).collect()
}

/// Child cgroups of this one.
pub(super) fn below(cgroup: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(cgroup).into_iter().flatten().flatten();
    let is_dir = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    entries.filter(is_dir).map(|entry| entry.path())
}

/// True while the container's inner cgroup, or the outer one, is frozen.
pub fn frozen(cgroup_root: &Path, vmid: Vmid) -> bool {
    Freezer::of(cgroup_root, vmid).iter().any(Freezer::frozen)
}

fn number(path: PathBuf) -> Option<u64> {
    read(&path).trim().parse().ok()
}

/// A container's share of the load, its shim included, in few reads; `None` when it does not run.
pub fn share(root: &Path, vmid: Vmid) -> Option<Share> {
    let own = Trees::of_container(root, vmid)?.share();
    let shim = of_shim(root, vmid);
    Some(Share {
        cpu_us: own.cpu_us.map(|cpu_us| cpu_us + shim.cpu_us.unwrap_or(0)),
        memory_bytes: own.memory_bytes.map(|bytes| bytes + shim.memory_bytes.unwrap_or(0)),
    })
}

/// Resource usage of a container and its shim on the host; `None` when it has no cgroup, so does
/// not run.
pub fn usage(root: &Path, proc: &Path, vmid: Vmid) -> Option<Usage> {
    let trees = Trees::of_container(root, vmid)?;
    let (v2, memory) = (trees.v2(), trees.v1("memory"));
    let v1_memory = number(memory.join("memory.usage_in_bytes"));
    let memory_bytes = number(v2.join("memory.current")).or(v1_memory);
    let memory_max = number(v2.join("memory.max"))
        .or_else(|| number(memory.join("memory.limit_in_bytes")).filter(|max| *max < NO_LIMIT));
    let swap = number(v2.join("memory.swap.current")).or_else(|| {
        let both = number(memory.join("memory.memsw.usage_in_bytes"))?;
        Some(both.saturating_sub(v1_memory?))
    });
    let pids =
        number(v2.join("pids.current")).or_else(|| number(trees.v1("pids").join("pids.current")));
    // Without a controller for containers, the numbers come from the processes themselves.
    let processes = || processes(root, vmid);
    let shim = of_shim(root, vmid);
    let pressure =
        |what: &str| psi::avg10(&read(&v2.join(format!("{what}.pressure"))), Stalled::Some);
    Some(Usage {
        cpu_us: trees.cpu_us().unwrap_or(0) + shim.cpu_us.unwrap_or(0),
        at_ns: 0,
        memory_bytes: memory_bytes.unwrap_or_else(|| anonymous(proc, &processes()))
            + shim.memory_bytes.unwrap_or(0),
        reclaimable_bytes: trees.reclaimable().unwrap_or(0),
        memory_max_bytes: memory_max.unwrap_or(0),
        swap_bytes: swap.unwrap_or(0),
        pids: pids
            .and_then(|pids| u32::try_from(pids).ok())
            .unwrap_or_else(|| u32::try_from(processes().len()).unwrap_or(u32::MAX)),
        psi_cpu: pressure("cpu"),
        psi_memory: pressure("memory"),
        psi_io: pressure("io"),
        frozen: frozen(root, vmid),
    })
}

/// Asks the kernel to write `bytes` of a container's memory to swap; true when it did.
pub fn reclaim(root: &Path, vmid: Vmid, bytes: u64) -> bool {
    let file = root.join("lxc").join(vmid.to_string()).join("memory.reclaim");
    // The file does not exist where memory is v1's, or before Linux 5.19.
    file.exists() && write(&file, &bytes.to_string()).is_ok()
}

/// True when the host has swap: the first line of /proc/swaps is a heading.
pub fn has_swap(proc: &Path) -> bool {
    read(&proc.join("swaps")).lines().count() > 1
}

/// Anonymous memory of the processes, bytes. Not from their `status`, which a tenant can make long to write.
fn anonymous(proc: &Path, pids: &[u32]) -> u64 {
    let of = |pid: &u32| {
        let statm = read(&proc.join(pid.to_string()).join("statm"));
        let mut pages = statm.split_ascii_whitespace().skip(1).map(str::parse::<u64>);
        let (resident, of_files) = (pages.next()?.ok()?, pages.next()?.ok()?);
        Some(resident.saturating_sub(of_files))
    };
    pids.iter().filter_map(of).sum::<u64>().saturating_mul(procfs::page_size())
}

fn field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok())
}

fn read(path: &Path) -> String {
    read::text(path, FILE_BYTES_MAX)
}

/// Writes an existing cgroup file; never creates one.
fn write(path: &Path, text: &str) -> io::Result<()> {
    use io::Write as _;
    fs::OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vmid(number: u32) -> Vmid {
        Vmid::try_from(number).expect("in range")
    }

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("tempdir");
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().expect("a directory")).expect("mkdir");
            fs::write(path, text).expect("written");
        }
        dir
    }

    #[test]
    fn freezer_of_v2_is_the_inner_cgroup() {
        let dir = tree(&[
            ("lxc/100/cgroup.freeze", "0\n"),
            ("lxc/100/ns/cgroup.freeze", "0\n"),
            ("lxc/100/ns/cgroup.events", "populated 1\nfrozen 0\n"),
        ]);
        let root = dir.path();
        let [inner, _] = &Freezer::of(root, vmid(100))[..] else { panic!("two") };
        assert_eq!(*inner, Freezer::V2(root.join("lxc/100/ns")));
        inner.set(true).expect("written");
        assert_eq!(read(&root.join("lxc/100/cgroup.freeze")), "0\n", "the outer one is left alone");
        assert!(read(&root.join("lxc/100/ns/cgroup.freeze")).starts_with('1'));
        assert!(inner.freezing() && !inner.frozen(), "the kernel has the last word");
        fs::write(root.join("lxc/100/ns/cgroup.events"), "populated 1\nfrozen 1\n").expect("write");
        assert!(inner.frozen());
        assert_eq!(Freezer::of(root, vmid(101)), []);
    }

    #[test]
    fn freezer_of_v1_is_preferred_where_it_exists() {
        let dir = tree(&[
            ("freezer/lxc/100/ns/freezer.state", "THAWED\n"),
            ("lxc/100/ns/cgroup.freeze", "0\n"),
        ]);
        let root = dir.path();
        let [inner] = &Freezer::of(root, vmid(100))[..] else { panic!("one") };
        assert_eq!(*inner, Freezer::V1(root.join("freezer/lxc/100/ns")));
        let state = root.join("freezer/lxc/100/ns/freezer.state");
        fs::write(&state, "FREEZING\n").expect("write");
        assert!(inner.freezing() && !inner.frozen());
        fs::write(&state, "").expect("write");
        inner.set(true).expect("written");
        assert!(inner.frozen());
        fs::write(&state, "").expect("write");
        inner.set(false).expect("written");
        assert!(!inner.freezing());
    }

    #[test]
    fn missing_cgroup_file_is_not_created() {
        let dir = tree(&[("lxc/100/x", "")]);
        Freezer::V2(dir.path().join("lxc/100")).set(true).expect_err("there is no such file");
        assert!(!reclaim(dir.path(), vmid(100), 1));
        assert!(!dir.path().join("lxc/100/memory.reclaim").exists());
    }

    #[test]
    fn usage_on_v2_includes_the_shim() {
        let dir = tree(&[
            ("cg/lxc/100/cpu.stat", "usage_usec 1234567\nuser_usec 1\n"),
            ("cg/lxc/100/memory.current", "1048576\n"),
            ("cg/lxc/100/memory.max", "max\n"),
            ("cg/lxc/100/memory.swap.current", "4096\n"),
            ("cg/lxc/100/pids.current", "7\n"),
            ("cg/lxc/100/cpu.pressure", "some avg10=12.50 avg60=1.00 total=1\nfull avg10=9.0\n"),
            ("cg/lxc/100/ns/cgroup.freeze", "1\n"),
            ("cg/lxc/100/ns/cgroup.events", "frozen 1\n"),
            ("cg/pve-sandbox/100/cpu.stat", "usage_usec 1000000\n"),
            ("cg/pve-sandbox/100/memory.current", "4096\n"),
        ]);
        let root = dir.path().join("cg");
        let usage = usage(&root, dir.path(), vmid(100)).expect("it runs");
        assert_eq!(
            (usage.cpu_us, usage.pids, usage.frozen),
            (2_234_567, 7, true),
            "with its shim's"
        );
        assert_eq!((usage.memory_bytes, usage.memory_max_bytes), ((1 << 20) + 4096, 0));
        assert_eq!(share(&root, vmid(100)).and_then(|share| share.cpu_us), Some(2_234_567));
        assert_eq!((usage.swap_bytes, usage.psi_cpu, usage.psi_io), (4096, 12.5, 0.0));
        assert_eq!(super::usage(&root, dir.path(), vmid(101)), None);
    }

    #[test]
    fn shim_usage_is_counted_on_v1_and_v2() {
        let v2 = tree(&[
            ("cgroup.procs", ""),
            ("pve-sandbox/100/cpu.stat", "usage_usec 12\n"),
            ("pve-sandbox/100/memory.current", "1000\n"),
            ("pve-sandbox/100/memory.stat", "anon 1\ninactive_file 400\n"),
        ]);
        let in_use = Share { cpu_us: Some(12), memory_bytes: Some(600) };
        assert_eq!(of_shim(v2.path(), vmid(100)), in_use);
        let none = Share { cpu_us: None, memory_bytes: None };
        assert_eq!(of_shim(v2.path(), vmid(101)), none);
        let v1 = tree(&[
            ("cpuacct/pve-sandbox/100/cpuacct.usage", "12000\n"),
            ("memory/pve-sandbox/100/memory.usage_in_bytes", "1000\n"),
        ]);
        let in_use = Share { cpu_us: Some(12), memory_bytes: Some(1000) };
        assert_eq!(of_shim(v1.path(), vmid(100)), in_use);
    }

    #[test]
    fn usage_is_read_from_v1_or_counted_from_processes() {
        let dir = tree(&[
            ("cg/cpuacct/lxc/100/cpuacct.usage", "5000000\n"),
            ("cg/memory/lxc/100/memory.usage_in_bytes", "100\n"),
            ("cg/memory/lxc/100/memory.memsw.usage_in_bytes", "130\n"),
            ("cg/memory/lxc/100/memory.limit_in_bytes", "9223372036854771712\n"),
            ("cg/pids/lxc/100/pids.current", "3\n"),
            ("cg/lxc/101/ns/cgroup.procs", "7\n8\n"),
            // Pages: in all, resident, of files.
            ("proc/7/statm", "90 12 7 1 0 30 0\n"),
            // It has just ended.
            ("proc/8/statm", ""),
        ]);
        let (root, proc) = (dir.path().join("cg"), dir.path().join("proc"));
        let v1 = usage(&root, &proc, vmid(100)).expect("it runs");
        assert_eq!((v1.cpu_us, v1.memory_bytes, v1.swap_bytes, v1.pids), (5000, 100, 30, 3));
        assert_eq!(v1.memory_max_bytes, 0);
        let counted = usage(&root, &proc, vmid(101)).expect("it runs");
        assert_eq!((counted.pids, counted.memory_bytes), (2, 5 * procfs::page_size()));
    }

    #[test]
    fn swap_is_detected() {
        let heading = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";
        let none = tree(&[("swaps", heading)]);
        assert!(!has_swap(none.path()));
        let some = tree(&[("swaps", &format!("{heading}/dev/sda2 partition 1 0 -2\n"))]);
        assert!(has_swap(some.path()));
    }

    #[test]
    fn all_processes_of_one_container_and_no_others_are_found() {
        let tree = tempfile::tempdir().expect("tempdir");
        let root = tree.path();
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().expect("a directory")).expect("mkdir");
            fs::write(path, text).expect("written");
        };
        write("lxc/1001/cgroup.procs", "");
        write("lxc/1001/cgroup.events", "populated 1\nfrozen 0\n");
        write("lxc/1001/ns/cgroup.procs", "");
        write("lxc/1001/ns/cgroup.freeze", "1\n");
        write("lxc/1001/ns/cgroup.events", "populated 1\nfrozen 1\n");
        write("lxc/1001/ns/.lxc/cgroup.procs", "70\n0\n");
        write("lxc/1001/ns/system.slice/x.service/cgroup.procs", "71\n72\n70\n");
        write("lxc/1002/ns/cgroup.procs", "80\n");
        assert_eq!(processes(root, vmid(1001)), [70, 71, 72]);
        assert_eq!(processes(root, vmid(1003)), Vec::<u32>::new());
        assert!(frozen(root, vmid(1001)) && !frozen(root, vmid(1002)));
    }
}
