//! Queries of the kernel in another network namespace.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, UdpSocket},
    path::Path,
    thread,
};

use nix::sched::{CloneFlags, setns};

use super::sock_diag::{self, Connection};

/// True when `ip` is an address of an interface in the network namespace of a process. Asks for one
/// address, so the cost does not depend on what the namespace's owner puts into it.
///
/// # Errors
/// When the process has ended, or its namespace cannot be entered. Blocks as long as it takes to
/// start a thread.
pub fn has_address(proc: &Path, pid: u32, ip: Ipv4Addr) -> io::Result<bool> {
    inside(proc, pid, move || match UdpSocket::bind((ip, 0)) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => Ok(false),
        Err(error) => Err(error),
    })
}

/// Lists the established TCP connections of the network namespace of a process with other hosts.
///
/// # Errors
/// As `has_address`, and as `sock_diag::established`.
pub fn connections(proc: &Path, pid: u32) -> io::Result<Vec<Connection>> {
    inside(proc, pid, sock_diag::established)
}

/// Runs a query in the network namespace of a process.
fn inside<T: Send + 'static>(
    proc: &Path,
    pid: u32,
    query: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let namespace = File::open(proc.join(pid.to_string()).join("ns/net"))?;
    // The thread ends with the query: no other code may run in the namespace.
    let asked = thread::Builder::new().name("netns".to_owned()).spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        query()
    })?;
    asked.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace ended")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_the_namespace_are_found() {
        assert!(nix::unistd::geteuid().is_root(), "run this test as root: it enters a namespace");
        let (proc, pid) = (Path::new("/proc"), std::process::id());
        assert!(has_address(proc, pid, Ipv4Addr::LOCALHOST).expect("asked"));
        // TEST-NET-1 is assigned to no host.
        assert!(!has_address(proc, pid, Ipv4Addr::new(192, 0, 2, 77)).expect("asked"));
        assert!(has_address(proc, u32::MAX, Ipv4Addr::LOCALHOST).is_err(), "no such process");
    }
}
