//! Finds the processes that listen on a TCP port.
//!
//! Caddy shares its ports (SO_REUSEPORT): another Caddy on the same port starts without an error, and gets a
//! part of the connections.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use crate::sys::{proc, read};

/// State of a socket that listens, as procfs has it.
const LISTENS: &str = "0A";

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
    let tables = ["net/tcp", "net/tcp6"].map(|table| read::text(&proc.join(table), read::LARGE));
    let sockets: BTreeSet<u64> = tables.iter().flat_map(|table| inodes(table, address)).collect();
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

/// Returns the inodes of the sockets of a table that listen on an address, or on its port of every address.
fn inodes(table: &str, address: SocketAddr) -> Vec<u64> {
    let (own, port) = (hexadecimal(address.ip()), format!("{:04X}", address.port()));
    let is_there = |local: &str| {
        local.split_once(':').is_some_and(|(ip, its_port)| {
            its_port == port && (ip == own || ip.bytes().all(|digit| digit == b'0'))
        })
    };
    let lines = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let listens = |words: &Vec<&str>| {
        words.get(3) == Some(&LISTENS) && words.get(1).is_some_and(|local| is_there(local))
    };
    lines.filter(listens).filter_map(|words| words.get(9)?.parse().ok()).collect()
}

/// Formats an address as procfs has it: words of 32 bits, each in the order of this machine.
fn hexadecimal(ip: IpAddr) -> String {
    let octets = match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let words = octets.chunks_exact(4).filter_map(|word| word.try_into().ok());
    words.map(|word| format!("{:08X}", u32::from_ne_bytes(word))).collect()
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
    fn only_listening_sockets_of_the_address_count() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
   0: 0100007F:2120 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0  0 11 1 0 100 0 0 10 0\n\
   1: 0100007F:2120 0100007F:9999 01 00000000:00000000 00:00000000 00000000  0  0 12 1 0 100 0 0 10 0\n\
   2: 0100007F:2121 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0  0 13 1 0 100 0 0 10 0\n\
   3: short\n\
   4: 0200007F:2120 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0  0 14 1 0 100 0 0 10 0\n\
   5: 00000000:2120 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0  0 15 1 0 100 0 0 10 0\n";
        let at = |text: &str| inodes(table, text.parse().expect("an address"));
        assert_eq!(at("127.0.0.1:8480"), [11, 15]);
        assert_eq!(at("127.0.0.2:8480"), [14, 15]);
        assert_eq!(at("127.0.0.1:8481"), [13]);
        assert_eq!(hexadecimal(IpAddr::from([127, 0, 0, 1])), "0100007F");
        let six = "00000000000000000000000001000000";
        assert_eq!(hexadecimal(IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])), six);
    }
}
