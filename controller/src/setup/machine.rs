//! Facts of the machine that `setup` finds out.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, Ipv6Addr},
    os::unix::fs::{MetadataExt as _, lchown},
    path::{Path, PathBuf},
};

use daemon::text;
use nix::{ifaddrs::getifaddrs, unistd};
use proto::name::NodeName;

use super::join_loop::Host;

/// Names of interfaces whose addresses no caller uses: bridges and ends of containers.
const INNER: &[&str] = &["docker", "br-", "veth", "fwbr", "fwpr", "fwln", "tap", "virbr", "lxcbr"];
/// Most files that are given to another user.
const FILES_MAX: usize = 10_000;
/// Membership of PVE's cluster file system, which names this node.
pub(super) const MEMBERS: &str = "/etc/pve/.members";

/// Returns what callers and nodes may reach this machine by: addresses first, then names.
pub(super) fn names() -> Vec<String> {
    let mut addresses: Vec<IpAddr> = addresses();
    addresses.sort_by_key(|address| (address.is_ipv6(), *address));
    let mut names: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    let host = unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    if let Some(host) = host.filter(|host| !host.is_empty() && host != "localhost") {
        let hosts = text::read(Path::new("/etc/hosts")).unwrap_or_default();
        names.extend(aliases(&hosts, &host));
    }
    names
}

fn addresses() -> Vec<IpAddr> {
    let found = getifaddrs().into_iter().flatten().filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        let address = v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))?;
        let inner = INNER.iter().any(|start| interface.interface_name.starts_with(start));
        (is_global(address) && !inner).then_some(address)
    });
    // One address may be on several interfaces.
    let found: BTreeSet<IpAddr> = found.collect();
    found.into_iter().collect()
}

fn is_global(address: IpAddr) -> bool {
    let local = |v6: Ipv6Addr| v6.is_unicast_link_local();
    match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local() && !v4.is_unspecified(),
        IpAddr::V6(v6) => !v6.is_loopback() && !local(v6) && !v6.is_unspecified(),
    }
}

/// Returns the names of a host in the form of /etc/hosts, the whole ones first; the host itself at least.
fn aliases(hosts: &str, host: &str) -> Vec<String> {
    let lines = hosts.lines().map(|line| line.split('#').next().unwrap_or_default());
    let names = lines.map(|line| line.split_whitespace().skip(1).collect::<Vec<_>>());
    let own = names.filter(|names| names.contains(&host)).flatten();
    let mut all: Vec<String> = own.map(str::to_owned).collect();
    all.push(host.to_owned());
    all.sort_by_key(|name| (!name.contains('.'), name.clone()));
    all.dedup();
    all
}

/// Returns a user's numbers, if there is one and this process may give files away.
pub(super) fn user(name: &str) -> io::Result<Option<(u32, u32)>> {
    if !unistd::Uid::effective().is_root() {
        return Ok(None);
    }
    let user = unistd::User::from_name(name)?;
    Ok(user.map(|user| (user.uid.as_raw(), user.gid.as_raw())))
}

/// Lists the files below a directory that belong to another user.
pub(super) fn foreign_files(dir: &Path, (uid, _): (u32, u32)) -> io::Result<Vec<PathBuf>> {
    let (mut foreign, mut next) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(path) = next.pop() {
        let about = match fs::symlink_metadata(&path) {
            Ok(about) => about,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if about.is_dir() {
            for entry in fs::read_dir(&path)?.take(FILES_MAX) {
                next.push(entry?.path());
            }
        }
        if about.uid() != uid {
            foreign.push(path);
        }
        if foreign.len() + next.len() > FILES_MAX {
            return Err(io::Error::other("too many files"));
        }
    }
    Ok(foreign)
}

/// Gives files to a user. Links are given themselves, never what they lead to.
pub(super) fn give(files: &[PathBuf], (uid, gid): (u32, u32)) -> io::Result<()> {
    files.iter().try_for_each(|path| lchown(path, Some(uid), Some(gid)))
}

/// Returns the name of this machine in PVE, by its `.members`; `None` when it is no node.
pub(super) fn pve_node(members: &Path) -> Option<NodeName> {
    let members = text::read(members).ok()?;
    let members: serde_json::Value = serde_json::from_str(&members).ok()?;
    members.get("nodename")?.as_str()?.parse().ok()
}

/// Returns the other nodes of this machine's cluster, with their addresses where PVE knows them.
pub(super) fn other_nodes(members: &Path) -> Vec<Host> {
    others(&text::read(members).unwrap_or_default())
}

/// Returns the nodes in `.members` but the one that it is of.
fn others(members: &str) -> Vec<Host> {
    let members: serde_json::Value = serde_json::from_str(members).unwrap_or_default();
    let own = members.get("nodename").and_then(|name| name.as_str());
    let all = members.get("nodelist").and_then(|list| list.as_object());
    let others = all.into_iter().flatten().filter(|(name, _)| Some(name.as_str()) != own);
    let host = |(name, about): (&String, &serde_json::Value)| {
        let address = about.get("ip").and_then(|ip| ip.as_str()).and_then(|ip| ip.parse().ok());
        Some(Host { node: name.parse().ok()?, address })
    };
    others.filter_map(host).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_host_are_those_of_its_line() {
        let hosts =
            "127.0.0.1 localhost\n10.0.0.1 pve1.lab.test pve1 # me\n10.0.0.2 pve2.lab.test pve2\n";
        assert_eq!(aliases(hosts, "pve1"), ["pve1.lab.test", "pve1"]);
        assert_eq!(aliases("", "pve1"), ["pve1"]);
    }

    #[test]
    fn other_nodes_are_those_of_the_cluster_without_this_one() {
        let members = r#"{"nodename": "pve1", "version": 4,
            "cluster": {"name": "c", "version": 2, "nodes": 3, "quorate": 1},
            "nodelist": {"pve1": {"id": 1, "online": 1, "ip": "10.0.0.1"},
                "pve2": {"id": 2, "online": 1, "ip": "10.0.0.2"},
                "pve3": {"id": 3, "online": 0}}}"#;
        let host = |node: &str, address: Option<&str>| Host {
            node: node.parse().expect("a name"),
            address: address.map(|address| address.parse().expect("an address")),
        };
        assert_eq!(others(members), [host("pve2", Some("10.0.0.2")), host("pve3", None)]);
        for alone in [r#"{"nodename": "pve1", "version": 0}"#, "", "[]"] {
            assert_eq!(others(alone), []);
        }
    }

    #[test]
    fn loopback_and_link_local_addresses_are_left_out() {
        let global = |text: &str| is_global(text.parse().expect("an address"));
        assert!(global("10.0.0.1") && global("2001:db8::1") && global("fd00::1"));
        for text in ["127.0.0.1", "169.254.1.1", "::1", "fe80::1", "0.0.0.0"] {
            assert!(!global(text), "{text}");
        }
    }
}
