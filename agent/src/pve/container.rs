//! What a container does right now, read from /proc and the cgroup tree: no fork, and no question
//! to LXC's monitor, which can hang.

use std::{
    collections::{BTreeSet, VecDeque},
    fs,
    net::Ipv4Addr,
    path::Path,
};

use procfs::{net::TcpState, process::Process};
use proto::id::Vmid;

use super::cgroup::Freezer;
use crate::sys::proc::namespace_pids;

/// More directories of a container's cgroup are not searched for its init, which is near the top.
const CGROUPS_MAX: usize = 1000;
/// More are not searched for its processes.
const ALL_CGROUPS_MAX: usize = 20_000;

/// True when the container's monitor listens, which it does while the container runs. `pct` itself
/// asks the same.
pub fn running(proc: &Path, lxc_dir: &Path, vmid: Vmid) -> bool {
    let socket = format!("@{}/{vmid}/command", lxc_dir.display());
    let sockets = fs::read_to_string(proc.join("net/unix")).unwrap_or_default();
    sockets.lines().any(|line| line.rsplit(' ').next() == Some(&socket))
}

/// The container's init: the process in its cgroup that is number 1 one pid namespace down.
pub fn init_pid(proc: &Path, cgroup_root: &Path, vmid: Vmid) -> Option<u32> {
    let top = cgroup_root.join("lxc").join(vmid.to_string());
    // systemd puts itself into `init.scope`; a plain init stays where it was put. Deeper ones are
    // of containers inside, whose inits are further down too.
    let inner = top.join("ns");
    let mut dirs: VecDeque<_> = [inner.join("init.scope"), inner, top].into();
    let mut looked = 0;
    while let Some(dir) = dirs.pop_front() {
        let pids = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        let mut pids = pids.lines().filter_map(|line| line.parse().ok());
        if let Some(pid) = pids.find(|&pid| matches!(namespace_pids(proc, pid)[..], [_, 1])) {
            return Some(pid);
        }
        looked += 1;
        if looked < CGROUPS_MAX
            && let Ok(entries) = fs::read_dir(&dir)
        {
            let is_dir = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
            dirs.extend(entries.flatten().filter(is_dir).map(|entry| entry.path()));
        }
    }
    None
}

/// Pids of all that is in the container's cgroup or below, each once.
pub fn processes(cgroup_root: &Path, vmid: Vmid) -> Vec<u32> {
    let mut dirs = VecDeque::from([cgroup_root.join("lxc").join(vmid.to_string())]);
    let (mut pids, mut looked) = (BTreeSet::new(), 0);
    while let Some(dir) = dirs.pop_front() {
        let listed = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        pids.extend(listed.lines().filter_map(|line| line.parse::<u32>().ok()));
        looked += 1;
        if looked < ALL_CGROUPS_MAX
            && let Ok(entries) = fs::read_dir(&dir)
        {
            let is_dir = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
            dirs.extend(entries.flatten().filter(is_dir).map(|entry| entry.path()));
        }
    }
    // A process of a namespace that this one cannot see is listed as 0.
    pids.remove(&0);
    pids.into_iter().collect()
}

/// True while the container's inner cgroup, or the whole of it, is frozen.
pub fn frozen(cgroup_root: &Path, vmid: Vmid) -> bool {
    Freezer::of(cgroup_root, vmid).iter().any(Freezer::frozen)
}

/// True when an established TCP connection of this process's network namespace has its other end
/// elsewhere, or when that cannot be told.
pub fn connected(proc: &Path, pid: u32) -> bool {
    let Ok(process) = Process::new_with_root(proc.join(pid.to_string())) else { return true };
    let Ok(tcp) = process.tcp() else { return true };
    // There is none without IPv6.
    let tcp6 = process.tcp6().unwrap_or_default();
    tcp.iter().chain(&tcp6).any(|socket| {
        let remote = socket.remote_address.ip().to_canonical();
        socket.state == TcpState::Established && !remote.is_loopback()
    })
}

/// Addresses in the network namespace of a process, but for loopback's.
pub fn addresses(proc: &Path, pid: u32) -> Vec<Ipv4Addr> {
    let path = proc.join(pid.to_string()).join("net/fib_trie");
    local_addresses(&fs::read_to_string(path).unwrap_or_default())
}

/// Addresses of this host in `fib_trie`: a leaf, and below it that it is local.
pub fn local_addresses(fib_trie: &str) -> Vec<Ipv4Addr> {
    let mut found = BTreeSet::new();
    let mut leaf = None;
    for line in fib_trie.lines().map(str::trim) {
        if let Some(address) = line.strip_prefix("|-- ") {
            leaf = address.parse::<Ipv4Addr>().ok();
        } else if line.starts_with("/32 host LOCAL") {
            found.extend(leaf.filter(|address| !address.is_loopback()));
        }
    }
    found.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIB: &str = "\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 10.100.1.0/24 2 0 2
        |-- 10.100.1.0
           /24 link UNICAST
Local:
  +-- 0.0.0.0/0 3 0 5
     +-- 10.100.1.0/24 2 0 2
        |-- 10.100.1.7
           /32 host LOCAL
        |-- 10.100.1.255
           /32 link BROADCAST
     +-- 127.0.0.0/8 2 0 2
        |-- 127.0.0.1
           /32 host LOCAL
";

    #[test]
    fn a_connection_counts_when_its_other_end_is_elsewhere() {
        let with = |table: &str, remote: &str, state: &str| {
            let dir = tempfile::tempdir().expect("tempdir");
            write(dir.path(), "7/net/tcp", "head\n");
            let local = "0764640A:1F40";
            let row = format!(
                "head\n   0: {local} {remote} {state} 00000000:00000000 00:00000000 00000000     0        0 1 1\n"
            );
            let row = if table == "tcp6" {
                row.replace(local, "0000000000000000FFFF00000764640A:1F40")
            } else {
                row
            };
            write(dir.path(), &format!("7/net/{table}"), &row);
            connected(dir.path(), 7)
        };
        assert!(with("tcp", "0164640A:C350", "01"), "established, from 10.100.100.1");
        assert!(!with("tcp", "0164640A:C350", "06"), "TIME_WAIT");
        assert!(!with("tcp", "00000000:0000", "0A"), "listening");
        assert!(!with("tcp", "0100007F:C350", "01"), "with itself");
        assert!(!with("tcp6", "00000000000000000000000001000000:0050", "01"));
        assert!(!with("tcp6", "0000000000000000FFFF00000100007F:0050", "01"));
        assert!(with("tcp6", "0000000000000000FFFF00000164640A:0050", "01"));
        assert!(with("tcp6", "B80D0120000000000000000001000000:0050", "01"));
        let nothing = tempfile::tempdir().expect("tempdir");
        assert!(connected(nothing.path(), 7), "nobody can tell");
    }

    fn vmid(number: u32) -> Vmid {
        Vmid::try_from(number).expect("in range")
    }

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().expect("below the root")).expect("mkdir");
        fs::write(path, text).expect("write");
    }

    #[test]
    fn a_running_container() {
        let root = tempfile::tempdir().expect("tempdir");
        let root = root.path();
        write(
            root,
            "proc/net/unix",
            "Num RefCount Protocol Flags Type St Inode Path\n\
             0000: 2 0 00010000 0001 01 12 @/var/lib/lxc/1001/command\n\
             0000: 2 0 00010000 0001 01 13 /run/x\n",
        );
        let runs = |id| running(&root.join("proc"), Path::new("/var/lib/lxc"), vmid(id));
        assert!(runs(1001) && !runs(100) && !runs(10011));
        write(root, "cg/lxc/1001/ns/cgroup.procs", "");
        write(root, "cg/lxc/1001/ns/init.scope/cgroup.procs", "");
        write(root, "cg/lxc/1001/ns/system.slice/x.service/cgroup.procs", "70\n71\n72\n");
        write(root, "proc/70/status", "Name:\tx\nNSpid:\t70\t12\n");
        write(root, "proc/71/status", "Name:\tnested init\nNSpid:\t71\t13\t1\n");
        write(root, "proc/72/status", "Name:\tinit\nNSpid:\t72\t1\n");
        write(root, "proc/72/net/fib_trie", FIB);
        let pid = init_pid(&root.join("proc"), &root.join("cg"), vmid(1001));
        assert_eq!(pid, Some(72));
        assert_eq!(init_pid(&root.join("proc"), &root.join("cg"), vmid(1002)), None);
        assert_eq!(addresses(&root.join("proc"), 72), [Ipv4Addr::new(10, 100, 1, 7)]);
        assert!(addresses(&root.join("proc"), 70).is_empty());
    }

    #[test]
    fn all_processes_of_a_container_are_found_and_no_other() {
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
