//! Facts of the machine that `setup` finds out.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    path::Path,
};

use daemon::text;
use nix::{ifaddrs::getifaddrs, unistd};
use proto::name::NodeName;

use super::join_loop::Host;
use crate::ca;

/// Names of interfaces whose addresses no caller uses: bridges and ends of containers.
const INNER: &[&str] = &["docker", "br-", "veth", "fwbr", "fwpr", "fwln", "tap", "virbr", "lxcbr"];
/// File of the sandboxes' bridge, which the agent writes.
const BRIDGE: &str = "/etc/network/interfaces.d/pve-sandbox";
/// Membership of PVE's cluster file system, which names this node.
pub(super) const MEMBERS: &str = "/etc/pve/.members";

/// Addresses of this machine.
#[derive(Debug, PartialEq, Eq)]
struct Addresses {
    /// Those that others may reach it by, the best one first.
    outer: Vec<IpAddr>,
    /// Those of its containers and bridges.
    inner: Vec<IpAddr>,
}

/// Returns what callers and nodes may reach this machine by: addresses first, the best one before all others, then
/// names.
pub(super) fn names() -> Vec<String> {
    let members = text::read(Path::new(MEMBERS)).unwrap_or_default();
    let addresses = addresses(own_address(&members).or_else(way_out));
    addresses.outer.iter().map(ToString::to_string).chain(host_names()).collect()
}

/// Returns the host names of this machine.
pub(super) fn host_names() -> Vec<String> {
    let host = unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    let Some(host) = host.filter(|host| !host.is_empty() && host != "localhost") else {
        return Vec::new();
    };
    let hosts = text::read(Path::new("/etc/hosts")).unwrap_or_default();
    let mut names = aliases(&hosts, &host);
    // /etc/hosts takes names that no certificate can have.
    names.retain(|name| ca::check_name(name).is_ok());
    names
}

/// Puts the names of a certificate in the order in which nodes use them; those at which `listen` serves nobody are last.
/// Never reads PVE's cluster file system, which may be stuck: the controller starts all the same.
pub(super) fn best_first(names: Vec<String>, listen: IpAddr) -> Vec<String> {
    let mut names = ordered(names, &addresses(way_out()));
    names.sort_by_key(|name| !serves(listen, name));
    names
}

/// Returns true where a server that listens on `listen` takes connections to a name. `0.0.0.0` takes none of IPv6;
/// `::` takes both kinds.
pub(super) fn serves(listen: IpAddr, name: &str) -> bool {
    listen != IpAddr::V4(Ipv4Addr::UNSPECIFIED) || name.parse::<Ipv6Addr>().is_err()
}

/// Returns true for a machine whose best address is one of IPv6.
pub(super) fn is_best_reached_by_ipv6() -> bool {
    names().first().is_some_and(|name| name.parse::<Ipv6Addr>().is_ok())
}

/// Puts what only this machine reaches last. The first of the rest stays where it is a name, which an operator has put
/// there, or an address by which others reach this machine: `setup` puts PVE's there. Else the best address is first.
fn ordered(mut names: Vec<String>, addresses: &Addresses) -> Vec<String> {
    let address = |name: &String| name.parse::<IpAddr>().ok();
    let is_inner =
        |name: &String| address(name).is_some_and(|known| addresses.inner.contains(&known));
    let first = names.first().and_then(address);
    names.sort_by_key(is_inner);
    if let Some(best) = addresses.outer.first()
        && first.is_some_and(|first| !addresses.outer.contains(&first))
        && let Some(place) = names.iter().position(|name| address(name).as_ref() == Some(best))
    {
        names[..=place].rotate_right(1);
    }
    names
}

fn addresses(best: Option<IpAddr>) -> Addresses {
    let interfaces = getifaddrs().inspect_err(|error| {
        tracing::warn!(%error, "the addresses of this machine cannot be read");
    });
    let found = interfaces.into_iter().flatten().filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        let address = v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))?;
        Some((interface.interface_name, address))
    });
    let ours = text::read(Path::new(BRIDGE)).unwrap_or_default();
    sorted(found.collect(), &bridges(&ours), best)
}

/// Sorts the addresses of interfaces. `bridges`: those of the sandboxes; `best`: the address that is preferred.
fn sorted(found: Vec<(String, IpAddr)>, bridges: &[&str], best: Option<IpAddr>) -> Addresses {
    let is_inner =
        |name: &str| INNER.iter().any(|start| name.starts_with(start)) || bridges.contains(&name);
    let global = found.into_iter().filter(|(_, address)| is_global(*address));
    let (inner, outer): (Vec<_>, Vec<_>) = global.partition(|(name, _)| is_inner(name));
    // One address may be on several interfaces.
    let unique = |found: Vec<(String, IpAddr)>| {
        found.into_iter().map(|(_, address)| address).collect::<BTreeSet<_>>()
    };
    let outer = unique(outer);
    let mut inner = unique(inner);
    inner.retain(|address| !outer.contains(address));
    let mut outer: Vec<_> = outer.into_iter().collect();
    outer.sort_by_key(|address| (Some(*address) != best, address.is_ipv6(), *address));
    Addresses { outer, inner: inner.into_iter().collect() }
}

/// Returns the interfaces that a file of ifupdown2 describes.
fn bridges(interfaces: &str) -> Vec<&str> {
    let words = interfaces.lines().map(str::split_whitespace);
    words
        .filter_map(|mut words| words.next().filter(|word| *word == "iface").and(words.next()))
        .collect()
}

/// Returns the address that PVE gives the node whose `.members` this is.
fn own_address(members: &str) -> Option<IpAddr> {
    let members: serde_json::Value = serde_json::from_str(members).ok()?;
    let own = members.get("nodename")?.as_str()?;
    members.get("nodelist")?.get(own)?.get("ip")?.as_str()?.parse().ok()
}

/// Returns the address of this machine on its way out. To connect a socket of UDP sends nothing.
fn way_out() -> Option<IpAddr> {
    // Addresses of documentation: nobody has them, so only the default route leads there.
    let tries = [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")];
    tries.into_iter().find_map(|(own, elsewhere)| {
        let socket = UdpSocket::bind(own).ok()?;
        socket.connect(elsewhere).ok()?;
        socket.local_addr().ok().map(|address| address.ip())
    })
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

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn on(interfaces: &[(&str, &str)]) -> Vec<(String, IpAddr)> {
        interfaces.iter().map(|(name, address)| ((*name).to_owned(), ip(address))).collect()
    }

    #[test]
    fn bridge_of_the_sandboxes_is_no_way_to_this_machine() {
        let ours =
            "# Written by hand\nauto vmbr7\niface vmbr7 inet static\n\taddress 10.100.1.1/24\n";
        assert_eq!(bridges(ours), ["vmbr7"]);
        let found = on(&[
            ("lo", "127.0.0.1"),
            ("vmbr7", "10.100.1.1"),
            ("docker0", "172.17.0.1"),
            ("vmbr0", "192.168.1.9"),
            ("vmbr0", "2001:db8::9"),
            ("eno2", "10.0.0.9"),
        ]);
        let texts = |all: &[IpAddr]| all.iter().map(ToString::to_string).collect::<Vec<_>>();
        let all = sorted(found.clone(), &bridges(ours), Some(ip("192.168.1.9")));
        assert_eq!(texts(&all.outer), ["192.168.1.9", "10.0.0.9", "2001:db8::9"]);
        assert_eq!(texts(&all.inner), ["10.100.1.1", "172.17.0.1"]);
        // A machine without the agent, and without a preference.
        let all = sorted(found, &bridges(""), None);
        assert_eq!(all.outer.first(), Some(&ip("10.0.0.9")));
        assert!(all.outer.contains(&ip("10.100.1.1")));
    }

    #[test]
    fn address_that_pve_gives_this_node_is_found() {
        let members = r#"{"nodename": "pve1", "nodelist": {"pve1": {"id": 1, "ip": "192.168.1.9"},
            "pve2": {"id": 2, "ip": "192.168.1.10"}}}"#;
        assert_eq!(own_address(members), Some(ip("192.168.1.9")));
        for none in
            ["", "{}", r#"{"nodename": "pve1"}"#, r#"{"nodename": "x", "nodelist": {"y": {}}}"#]
        {
            assert_eq!(own_address(none), None, "{none}");
        }
    }

    #[test]
    fn names_of_a_certificate_begin_with_what_nodes_reach() {
        let addresses = Addresses {
            outer: vec![ip("192.168.1.9"), ip("10.0.0.9")],
            inner: vec![ip("10.100.1.1")],
        };
        let ordered = |names: &[&str]| {
            ordered(names.iter().map(|name| (*name).to_owned()).collect(), &addresses)
        };
        // `setup` has chosen PVE's address; the default route leaves by the other one.
        assert_eq!(
            ordered(&["10.0.0.9", "10.100.1.1", "192.168.1.9", "pve1"]),
            ["10.0.0.9", "192.168.1.9", "pve1", "10.100.1.1"]
        );
        // A certificate of an earlier version, and one of a machine that has got another address.
        for first in ["10.100.1.1", "203.0.113.1"] {
            let names = ordered(&[first, "10.0.0.9", "192.168.1.9", "pve1"]);
            assert_eq!(names[0], "192.168.1.9", "{first}");
        }
        assert_eq!(ordered(&["10.100.1.1", "pve1"]), ["pve1", "10.100.1.1"]);
        let chosen = ["api.example.com", "192.168.1.9"];
        assert_eq!(ordered(&chosen), chosen, "an operator's choice stays");
        let elsewhere = ["203.0.113.1", "pve1"];
        assert_eq!(ordered(&elsewhere), elsewhere, "a machine that has moved");
        assert_eq!(ordered(&[]), [""; 0]);
    }

    #[test]
    fn names_that_the_listener_does_not_serve_are_last() {
        let any = |text: &str| text.parse().expect("an address");
        let names = ["2001:db8::1", "10.0.0.1", "pve1"].map(str::to_owned).to_vec();
        let mut v4 = names.clone();
        v4.sort_by_key(|name| !serves(any("0.0.0.0"), name));
        assert_eq!(v4, ["10.0.0.1", "pve1", "2001:db8::1"]);
        assert!(names.iter().all(|name| serves(any("::"), name)));
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
