//! Finds the processes that listen on a TCP port.
//!
//! Caddy shares its ports (SO_REUSEPORT): another Caddy on the same port starts without an error, and gets a
//! part of the connections.

use std::{collections::BTreeSet, fs, net::SocketAddr, path::Path};

use crate::sys::{proc, read, tcp_table};

/// Process that listens.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listener {
    /// Its pid.
    pub pid: u32,
    /// Command line.
    pub argv: Vec<String>,
}

/// Finds the host's processes that listen on this address, or on its port of every address. Empty for who may
/// not see the descriptors of other users' processes.
pub fn of(proc: &Path, address: SocketAddr) -> Vec<Listener> {
    let tables = ["net/tcp", "net/tcp6"].map(|table| proc.join(table));
    let listening = tables.iter().flat_map(|table| tcp_table::listening(table, read::LARGE));
    let there = listening.filter(|socket| is_at(socket.local_address, address));
    let sockets: BTreeSet<u64> = there.map(|socket| socket.inode).collect();
    if sockets.is_empty() {
        return Vec::new();
    }
    let holds = |process: &proc::Process| {
        let fds = fs::read_dir(proc.join(process.pid.to_string()).join("fd"));
        let links =
            fds.into_iter().flatten().flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
        let mut inodes = links.filter_map(|link| inode_of(link.to_str()?));
        inodes.any(|inode| sockets.contains(&inode))
    };
    let found = proc::host_processes(proc).into_iter().filter(holds);
    let mut all: Vec<_> = found.map(|p| Listener { pid: p.pid, argv: p.argv }).collect();
    all.sort();
    all
}

/// Returns true for a socket on an address, or on its port of every address.
fn is_at(local: SocketAddr, address: SocketAddr) -> bool {
    let ip = local.ip().to_canonical();
    local.port() == address.port() && (ip == address.ip().to_canonical() || ip.is_unspecified())
}

fn inode_of(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_that_listens_is_found() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
        let address = socket.local_addr().expect("an address");
        let found = of(Path::new("/proc"), address);
        assert_eq!(found.iter().map(|one| one.pid).collect::<Vec<_>>(), [std::process::id()]);
        drop(socket);
        assert_eq!(of(Path::new("/proc"), address), []);
    }

    #[test]
    fn only_sockets_of_the_address_or_of_all_addresses_count() {
        let at = |local: &str, address: &str| {
            is_at(local.parse().expect("an address"), address.parse().expect("an address"))
        };
        for local in ["127.0.0.1:8480", "[::ffff:127.0.0.1]:8480", "0.0.0.0:8480", "[::]:8480"] {
            assert!(at(local, "127.0.0.1:8480"), "{local}");
        }
        for local in ["127.0.0.2:8480", "127.0.0.1:8481", "0.0.0.0:8481", "[::1]:8480"] {
            assert!(!at(local, "127.0.0.1:8480"), "{local}");
        }
        assert!(at("[::1]:8480", "[::1]:8480"));
    }
}
