//! State of a running container, read from /proc and the cgroup tree: no fork, and no call to LXC's
//! monitor, which can hang.

use std::{
    collections::{BTreeSet, VecDeque},
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    libc::{SIGRTMAX, SIGRTMIN},
    sys::signal::Signal,
};
use procfs::{
    FromBufReadSI, current_system_info,
    net::{TcpNetEntries, TcpState},
};
use proto::{id::Vmid, name::Port};
use tokio::time::Instant;

use super::{
    cgroup::{below, pids_in},
    known::Init,
};
use crate::sys::{
    proc::{children, is_of_the_host, kin, namespace_pids, signal_masks},
    read, tcp_table,
};

/// Directories of a container's cgroup that are searched for its init at most; it is near the top. More than
/// root in the container can make (`process_limit`), so it cannot hide its init there.
const CGROUPS_MAX: usize = 2000;
/// Processes in a monitor's cgroup that are asked at most: it is the only one.
const MONITORS_MAX: usize = 4;
/// Longest search for a container's init.
const LOOK: Duration = Duration::from_secs(1);
/// Bytes read of a table of sockets at most, about 28,000 of them; with a longer table it is
/// unknown whether there is a connection.
const SOCKETS_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Bytes read of a table of sockets to find listeners, about 400 of them.
const LISTENERS_BYTES_MAX: u64 = 64 * 1024;

/// True when the container's monitor listens, which it does while the container runs. `pct` uses
/// the same check.
pub fn running(proc: &Path, lxc_dir: &Path, vmid: Vmid) -> bool {
    let socket = format!("@{}/{vmid}/command", lxc_dir.display());
    let sockets = read::text(&proc.join("net/unix"), read::LARGE);
    sockets.lines().any(|line| line.rsplit(' ').next() == Some(&socket))
}

/// True when the container may run: it has a cgroup.
pub fn has_cgroup(cgroup_root: &Path, vmid: Vmid) -> bool {
    cgroup(cgroup_root, vmid).exists()
}

fn cgroup(cgroup_root: &Path, vmid: Vmid) -> PathBuf {
    cgroup_root.join("lxc").join(vmid.to_string())
}

/// Pid of the container's init. `None` also when its monitor does not show it and a tenant's processes delay
/// the search beyond its limit.
pub fn init_pid(proc: &Path, cgroup_root: &Path, vmid: Vmid) -> Option<u32> {
    let top = cgroup(cgroup_root, vmid);
    if !top.exists() {
        return None;
    }
    child_of_monitor(proc, cgroup_root, vmid).or_else(|| found_among_all(proc, top))
}

/// Init as the child of LXC's monitor, whose cgroup nobody in the container reaches: however many processes a
/// tenant makes, that costs nothing.
fn child_of_monitor(proc: &Path, cgroup_root: &Path, vmid: Vmid) -> Option<u32> {
    let monitors = pids_in(&cgroup_root.join("lxc.monitor").join(vmid.to_string()));
    let mut all = monitors.into_iter().take(MONITORS_MAX).flat_map(|pid| children(proc, pid));
    // A hook that the monitor runs is one of the host's processes.
    all.find(|&pid| kin(proc, pid).is_some() && !is_of_the_host(proc, pid))
}

/// Init as the process in the container's cgroup that is number 1 one pid namespace down.
fn found_among_all(proc: &Path, top: PathBuf) -> Option<u32> {
    // systemd moves itself into `init.scope`; a plain init stays where it was put. Cgroups further
    // down belong to nested containers, whose inits are further down too.
    let inner = top.join("ns");
    let until = Instant::now() + LOOK;
    let mut dirs: VecDeque<_> = [inner.join("init.scope"), inner, top].into();
    let mut looked = 0;
    while let Some(dir) = dirs.pop_front() {
        for pid in pids_in(&dir) {
            if matches!(namespace_pids(proc, pid)[..], [_, 1]) {
                return Some(pid);
            }
            if Instant::now() >= until {
                return None;
            }
        }
        looked += 1;
        if looked >= CGROUPS_MAX {
            return None;
        }
        dirs.extend(below(&dir).take(CGROUPS_MAX - dirs.len().min(CGROUPS_MAX)));
    }
    None
}

/// Finds the container's init and its start time.
pub fn init(proc: &Path, cgroup_root: &Path, vmid: Vmid) -> Option<Init> {
    let pid = init_pid(proc, cgroup_root, vmid)?;
    Some(Init { pid, start: kin(proc, pid)?.start })
}

/// Number of the signal that shuts a container down, chosen as `lxc-stop` does: `configured`, the
/// value of `lxc.signal.halt`; else SIGRTMIN+3 for an init that blocks it, as systemd does; else
/// SIGPWR. `None` while the init does not take the signal: the kernel drops what an init does not
/// handle, and one that has just been started handles nothing yet.
pub fn halt_signal(proc: &Path, init: u32, configured: Option<&str>) -> Option<i32> {
    let masks = signal_masks(proc, init);
    let is_in = |mask: u64, number: i32| mask >> (number - 1) & 1 == 1;
    let systemd = SIGRTMIN() + 3;
    let number = match configured.and_then(signal_number) {
        Some(number) => number,
        None if is_in(masks.blocked, systemd) => systemd,
        None => Signal::SIGPWR as i32,
    };
    let taken = number == Signal::SIGKILL as i32 || is_in(masks.blocked | masks.caught, number);
    taken.then_some(number)
}

/// Reads a signal as LXC's configuration writes it: a number, a name, SIGRTMIN+n or SIGRTMAX-n.
fn signal_number(text: &str) -> Option<i32> {
    let number = if let Some(offset) = text.strip_prefix("SIGRTMIN+") {
        SIGRTMIN().checked_add(offset.parse().ok()?)?
    } else if let Some(offset) = text.strip_prefix("SIGRTMAX-") {
        SIGRTMAX().checked_sub(offset.parse().ok()?)?
    } else if text.starts_with("SIG") {
        text.parse::<Signal>().ok()? as i32
    } else {
        text.parse().ok()?
    };
    (1..=SIGRTMAX()).contains(&number).then_some(number)
}

/// True when an established TCP connection of this process's network namespace has its other end
/// elsewhere, or when that is unknown because the namespace has too many sockets.
pub fn connected(proc: &Path, pid: u32) -> bool {
    let net = proc.join(pid.to_string()).join("net");
    // The file does not exist without IPv6.
    let v6 = if net.join("tcp6").exists() { remote_in(&net.join("tcp6")) } else { Some(false) };
    remote_in(&net.join("tcp")).unwrap_or(true) || v6.unwrap_or(true)
}

/// Whether a table of sockets has a connection with another host; `None` when it is too long or no
/// such table.
fn remote_in(table: &Path) -> Option<bool> {
    let bytes = read::whole(table, SOCKETS_BYTES_MAX).ok()?;
    let sockets = TcpNetEntries::from_buf_read(&bytes[..], current_system_info()).ok()?;
    Some(sockets.0.iter().any(|socket| {
        let remote = socket.remote_address.ip().to_canonical();
        socket.state == TcpState::Established && !remote.is_loopback()
    }))
}

/// True when one of these addresses is the port of a loopback address.
pub fn on_loopback(listeners: &[SocketAddr], port: Port) -> bool {
    listeners
        .iter()
        .any(|local| local.port() == port.get() && local.ip().to_canonical().is_loopback())
}

/// Returns the addresses that TCP sockets of this process's network namespace listen on, by port. Those
/// of a namespace with very many are cut off.
pub fn listeners(proc: &Path, pid: u32) -> Vec<SocketAddr> {
    let net = proc.join(pid.to_string()).join("net");
    let mut found = BTreeSet::new();
    for table in ["tcp", "tcp6"] {
        let listening = tcp_table::listening(&net.join(table), LISTENERS_BYTES_MAX);
        let local = listening.iter().map(|socket| socket.local_address);
        found.extend(local.map(|local| (local.port(), local.ip())));
    }
    found.into_iter().map(|(port, ip)| SocketAddr::new(ip, port)).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::pve::cgroup::{PROCESSES_MAX, processes};

    #[test]
    fn connection_counts_if_its_peer_is_outside_the_container() {
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

    #[test]
    fn listener_on_a_loopback_address_is_found() {
        let on = |table: &str, local: &str, state: &str| {
            let dir = tempfile::tempdir().expect("tempdir");
            let row = format!(
                "head\n   0: {local}:1F92 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 1 1\n"
            );
            let row = if table == "tcp6" {
                row.replace("00000000:0000 ", "00000000000000000000000000000000:0000 ")
            } else {
                row
            };
            write(dir.path(), &format!("7/net/{table}"), &row);
            let port = |port: u32| Port::try_from(port).expect("a port");
            let listed = listeners(dir.path(), 7);
            assert!(!on_loopback(&listed, port(80)), "another port");
            assert_eq!(listed.len(), usize::from(state == "0A"), "{listed:?}");
            assert!(listed.iter().all(|at| at.port() == 8082), "{listed:?}");
            on_loopback(&listed, port(8082))
        };
        assert!(on("tcp", "0100007F", "0A"), "127.0.0.1");
        assert!(on("tcp6", "00000000000000000000000001000000", "0A"), "::1");
        assert!(!on("tcp", "00000000", "0A"), "0.0.0.0");
        assert!(!on("tcp", "0164640A", "0A"), "another address");
        assert!(!on("tcp", "0100007F", "01"), "connected, not listening");
        let nothing = tempfile::tempdir().expect("tempdir");
        assert_eq!(listeners(nothing.path(), 7), []);
    }

    #[test]
    fn reads_of_a_huge_container_are_bounded() {
        let root = tempfile::tempdir().expect("tempdir");
        let root = root.path();
        let pids: String = (1..200_000).map(|pid| format!("{pid}\n")).collect();
        write(root, "cg/lxc/1001/ns/cgroup.procs", &pids);
        for number in 0..1500 {
            write(root, &format!("cg/lxc/1001/ns/{number}/cgroup.procs"), &pids[..70_000]);
        }
        let found = processes(&root.join("cg"), vmid(1001));
        assert_eq!(found.len(), PROCESSES_MAX);
        // None of them is an init.
        assert_eq!(init_pid(&root.join("proc"), &root.join("cg"), vmid(1001)), None);
        // A number cut off by the bound is ignored.
        let padded = "0000001\n".repeat(65_535) + "1234567";
        write(root, "cg/lxc/1002/cgroup.procs", &padded);
        assert_eq!(processes(&root.join("cg"), vmid(1002)), [1]);
        // Without an end the table of sockets is not read either: the result is unknown.
        fs::create_dir_all(root.join("7/net")).expect("mkdir");
        let table = fs::File::create(root.join("7/net/tcp")).expect("made");
        table.set_len(1 << 40).expect("grown");
        assert!(connected(root, 7));
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
    fn halt_signal_is_one_that_the_init_takes() {
        let root = tempfile::tempdir().expect("tempdir");
        let root = root.path();
        let init = |pid: u32, blocked: u64, caught: u64| {
            let status = format!("Name:\tinit\nSigBlk:\t{blocked:016x}\nSigCgt:\t{caught:016x}\n");
            write(root, &format!("{pid}/status"), &status);
            pid
        };
        let bit = |number: i32| 1u64 << (number - 1);
        let systemd = SIGRTMIN() + 3;
        let of = |pid, configured| halt_signal(root, pid, configured);
        assert_eq!(of(init(1, bit(systemd), 0), None), Some(systemd));
        assert_eq!(of(init(2, 0, bit(30)), None), Some(30), "SIGPWR");
        assert_eq!(of(init(3, 0, 0), None), None, "it handles nothing yet");
        let trap = init(4, 0, bit(15) | bit(10));
        for (text, number) in [("SIGTERM", 15), ("15", 15), ("SIGUSR1", 10)] {
            assert_eq!(of(trap, Some(text)), Some(number), "{text}");
        }
        assert_eq!(of(init(5, bit(systemd), 0), Some("SIGRTMIN+3")), Some(systemd));
        assert_eq!(of(trap, Some("SIGHUP")), None, "it would be dropped");
        assert_eq!(of(init(6, bit(systemd), 0), Some("nonsense")), Some(systemd));
        assert_eq!(of(99, None), None, "it has ended");
    }

    #[test]
    fn running_container_and_its_init_are_found() {
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
        let pid = init_pid(&root.join("proc"), &root.join("cg"), vmid(1001));
        assert_eq!(pid, Some(72));
        assert_eq!(init_pid(&root.join("proc"), &root.join("cg"), vmid(1002)), None);
    }

    #[test]
    fn init_is_found_behind_its_monitor_however_many_processes_hide_it() {
        let root = tempfile::tempdir().expect("tempdir");
        let root = root.path();
        let put = |pid: &str, namespace: u32| {
            write(
                root,
                &format!("proc/{pid}/stat"),
                &format!("{pid} (x) S 41 {}", "1 ".repeat(48)),
            );
            fs::create_dir_all(root.join(format!("proc/{pid}/ns"))).expect("mkdir");
            let link = root.join(format!("proc/{pid}/ns/pid"));
            std::os::unix::fs::symlink(format!("pid:[{namespace}]"), link).expect("linked");
        };
        // A hook of the host beside the init, whose status has so many groups that its pids are not shown.
        for (pid, namespace) in [("self", 1), ("41", 1), ("43", 1), ("42", 2)] {
            put(pid, namespace);
        }
        write(root, "cg/lxc.monitor/1001/cgroup.procs", "41\n");
        write(root, "proc/41/task/41/children", "43 44 42 ");
        write(root, "cg/lxc/1001/ns/cgroup.procs", "70\n42\n");
        // It hangs for whoever reads it.
        fs::create_dir_all(root.join("proc/70")).expect("mkdir");
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
        nix::unistd::mkfifo(&root.join("proc/70/status"), mode).expect("made");
        let found = |id| init_pid(&root.join("proc"), &root.join("cg"), vmid(id));
        assert_eq!(found(1001), Some(42));
        write(root, "cg/lxc.monitor/1002/cgroup.procs", "41\n");
        assert_eq!(found(1002), None, "it has no cgroup, so it does not run");
    }
}
