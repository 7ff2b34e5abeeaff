//! Detects values on a PVE host that the configuration leaves open. Roots are parameters; no
//! process is started, and ambiguity is an error that lists the candidates.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::Ipv4Addr,
    path::Path,
};

use ipnet::Ipv4Net;
use nix::sys::statvfs::statvfs;
use proto::{
    id::Vmid,
    name::{NodeName, SnapshotId},
};

use crate::{
    pve::{
        Cluster, ContainerConfig,
        cluster::{self, Identity, Signs},
        pmxcfs,
        storage::{self, Place, Storage},
        template_mark::TemplateMark,
    },
    sys::read,
};

/// Root directories for the detection.
#[derive(Debug, Clone, Copy)]
pub struct Roots<'a> {
    /// Root of pmxcfs.
    pub pve: &'a Path,
    /// Root of procfs.
    pub proc: &'a Path,
    /// Path of `/sys/class/net`.
    pub net: &'a Path,
}

/// Reason why a value could not be detected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Undecided {
    #[error("{0}")]
    None(String),
    #[error("{what} is ambiguous: {}", candidates.join(", "))]
    Several { what: &'static str, candidates: Vec<String> },
}

/// Address of this host on a bridge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OnBridge {
    /// Address.
    pub address: Ipv4Addr,
    /// Prefix length of the bridge's network.
    pub prefix: u8,
}

/// Detects this node's identity. Only pmxcfs is authoritative: the host name may have changed since
/// the node joined.
pub fn identity(roots: Roots<'_>) -> Result<Identity, Undecided> {
    let path = roots.pve.join(pmxcfs::MEMBERS);
    let members = read::whole(&path, read::LARGE).ok();
    let identity = members.and_then(|members| cluster::identity(&members, Signs::read(roots.pve)));
    identity.ok_or_else(|| {
        let path = path.display();
        Undecided::None(format!("{path} does not name this node: is pve-cluster running?"))
    })
}

/// Reads the cluster as this node sees it; without members: pmxcfs is down.
pub fn cluster(roots: Roots<'_>) -> Cluster {
    let members = read::whole(&roots.pve.join(pmxcfs::MEMBERS), read::LARGE).ok();
    cluster::cluster(members.as_deref(), None, None, Signs::read(roots.pve))
}

/// Detects the bridge for sandboxes: vmbr0, else the only bridge of PVE.
pub fn bridge(roots: Roots<'_>) -> Result<String, Undecided> {
    let mut bridges: Vec<String> = fs::read_dir(roots.net)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.path().join("bridge").is_dir())
        .filter_map(|entry| entry.file_name().into_string().ok())
        // Skip bridges of PVE's firewall, Docker and the like: nobody chose them.
        .filter(|name| {
            !["fwbr", "br-", "docker", "lxcbr", "virbr"].iter().any(|p| name.starts_with(p))
        })
        .collect();
    bridges.sort();
    if bridges.iter().any(|name| name == "vmbr0") {
        return Ok("vmbr0".to_owned());
    }
    match <[String; 1]>::try_from(bridges) {
        Ok([bridge]) => Ok(bridge),
        Err(none) if none.is_empty() => Err(Undecided::None("the host has no bridge".to_owned())),
        Err(candidates) => Err(Undecided::Several { what: "the bridge", candidates }),
    }
}

/// Returns this host's own address on a bridge; `None` when it has none.
pub fn on_bridge(roots: Roots<'_>, bridge: &str) -> Option<OnBridge> {
    let routes = read::whole_text(&roots.proc.join("net/route"), read::LARGE).ok()?;
    let addresses = local_addresses(&read::text(&roots.proc.join("net/fib_trie"), read::LARGE));
    let connected =
        routes_of(&routes).filter(|r| r.interface == bridge && r.gateway.is_unspecified());
    connected.filter(|route| route.prefix > 0).find_map(|route| {
        let inside = |address: &&Ipv4Addr| network(**address, route.prefix) == route.destination;
        let address = *addresses.iter().find(inside)?;
        Some(OnBridge { address, prefix: route.prefix })
    })
}

/// Lists all addresses of this host except loopback's.
pub fn own_addresses(roots: Roots<'_>) -> Vec<Ipv4Addr> {
    let text = read::text(&roots.proc.join("net/fib_trie"), read::LARGE);
    local_addresses(&text).into_iter().collect()
}

/// Lists the networks that the host has a route to, each with the interface: those that it is on, those behind a
/// gateway, and those that it rejects (`*`). Of several next hops the kernel shows the first. Routes that are wider
/// than any private network are left out: VPNs set such ones (0.0.0.0/1) in place of the default route.
pub fn routed(roots: Roots<'_>) -> Vec<(String, Ipv4Net)> {
    let text = read::text(&roots.proc.join("net/route"), read::LARGE);
    let networks = routes_of(&text).filter(|route| route.prefix >= 8).filter_map(|route| {
        Some((route.interface.to_owned(), Ipv4Net::new(route.destination, route.prefix).ok()?))
    });
    networks.collect()
}

/// Returns the next hop of the host's default route, if it leaves by this bridge: then the bridge
/// is on a network of others.
pub fn uplink(roots: Roots<'_>, bridge: &str) -> Option<Ipv4Addr> {
    let routes = read::whole_text(&roots.proc.join("net/route"), read::LARGE).ok()?;
    let default = routes_of(&routes).find(|r| r.prefix == 0 && r.interface == bridge)?;
    Some(default.gateway)
}

/// Lists the name servers of IPv4 that the host asks, by its `resolv.conf`. One on its loopback is
/// nothing to a container.
pub fn name_servers(resolv_conf: &Path) -> Vec<Ipv4Addr> {
    let text = read::text(resolv_conf, read::SMALL);
    let named = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    let servers = named.filter_map(|rest| rest.split_whitespace().next()?.parse().ok());
    servers.filter(|server: &Ipv4Addr| !server.is_loopback()).collect()
}

/// Detects the storage for new templates: the one with the most free space that holds containers, and that clones them
/// linked if any does. Clones go to the storage of their template.
pub fn storage(roots: Roots<'_>, node: &NodeName) -> Result<String, Undecided> {
    let text = read::text(&roots.pve.join(pmxcfs::STORAGES), read::LARGE);
    let mut fit: Vec<_> =
        storage::parse(&text).into_iter().filter(|s| s.holds_containers(node)).collect();
    let is_linked = fit.iter().any(Storage::links_clones);
    // However much room another has: each sandbox would be a whole copy there.
    if is_linked {
        fit.retain(Storage::links_clones);
    }
    if fit.len() == 1 {
        return Ok(fit.remove(0).name);
    }
    if fit.is_empty() {
        let text = "storage.cfg has no storage with `rootdir` in its content for this node";
        return Err(Undecided::None(text.to_owned()));
    }
    let room = |place| match place {
        Place::Flat(path) | Place::Images(path) => {
            statvfs(&path).ok().map(|found| found.blocks_available() * found.fragment_size())
        }
        // Cannot be measured without starting a program.
        Place::Thin { .. } | Place::Other => None,
    };
    let rooms: Option<Vec<u64>> = fit.iter().map(|storage| room(storage.place())).collect();
    let most = rooms.and_then(|rooms| rooms.into_iter().enumerate().max_by_key(|(_, room)| *room));
    match most {
        Some((at, _)) => Ok(fit.swap_remove(at).name),
        None => {
            let candidates: Vec<_> = fit.into_iter().map(|storage| storage.name).collect();
            if is_linked {
                return Err(Undecided::Several { what: "the storage", candidates });
            }
            // No candidates: to name one of these in the configuration would mend nothing.
            let names = candidates.join(", ");
            Err(Undecided::None(format!("none of the storages {names} supports linked clones")))
        }
    }
}

/// Says what an operator does where no storage for new templates is detected. `fit`: those of which one is to be named.
pub fn storage_remedy(fit: &[String]) -> String {
    match fit.first() {
        Some(first) => {
            format!("set storage = \"{first}\", or another of them, at the top of agent.toml")
        }
        None => "add rootdir to the content of a storage that supports linked clones (zfspool, lvmthin, rbd, btrfs): pvesm \
                 set STORAGE --content ...,rootdir; or add one: pvesm add zfspool NAME --pool POOL --content \
                 rootdir,images"
            .to_owned(),
    }
}

/// Lists the templates of this node that carry the mark of `template init`, by vmid.
pub fn templates(roots: Roots<'_>, node: &NodeName) -> BTreeMap<Vmid, TemplateMark> {
    let templates: BTreeMap<_, _> =
        configs(roots.pve, node).into_iter().filter(|(_, config)| config.is_template()).collect();
    for (vmid, snapshot) in reserved(&templates) {
        tracing::warn!(
            %vmid,
            %snapshot,
            "template is not offered: no template may have this snapshot; write another one into the line \
             pve-sandbox-template of its notes"
        );
    }
    let marked = templates
        .iter()
        .filter_map(|(vmid, config)| Some((*vmid, TemplateMark::find(&config.description()?)?)));
    marked.collect()
}

/// Lists the templates that are not offered because of the snapshot that their mark names.
fn reserved(templates: &BTreeMap<Vmid, ContainerConfig>) -> BTreeMap<Vmid, SnapshotId> {
    let of_one = |(vmid, config): (&Vmid, &ContainerConfig)| {
        let description = config.description()?;
        let is_offered = TemplateMark::find(&description).is_some();
        let snapshot = TemplateMark::reserved(&description).filter(|_| !is_offered)?;
        Some((*vmid, snapshot))
    };
    templates.iter().filter_map(of_one).collect()
}

/// Reads the configs of a node's containers below the root of pmxcfs; leaves out unreadable ones.
pub fn configs(pve: &Path, node: &NodeName) -> BTreeMap<Vmid, ContainerConfig> {
    let files = fs::read_dir(pve.join(pmxcfs::configs(node))).into_iter().flatten().flatten();
    let configs = files.filter_map(|file| {
        let vmid = file.file_name().to_str()?.strip_suffix(".conf")?.parse().ok()?;
        let bytes = read::whole(&file.path(), read::LARGE).ok()?;
        Some((vmid, ContainerConfig::parse(&bytes)))
    });
    configs.collect()
}

/// Finds this host's addresses in its own `fib_trie`: a leaf, and below it the mark that it is
/// local.
fn local_addresses(fib_trie: &str) -> BTreeSet<Ipv4Addr> {
    let mut found = BTreeSet::new();
    let mut leaf = None;
    for line in fib_trie.lines().map(str::trim) {
        if let Some(address) = line.strip_prefix("|-- ") {
            leaf = address.parse::<Ipv4Addr>().ok();
        } else if line.starts_with("/32 host LOCAL") {
            found.extend(leaf.filter(|address| !address.is_loopback()));
        }
    }
    found
}

struct Route<'a> {
    interface: &'a str,
    destination: Ipv4Addr,
    gateway: Ipv4Addr,
    prefix: u8,
}

fn routes_of(text: &str) -> impl Iterator<Item = Route<'_>> {
    text.lines().skip(1).filter_map(|line| {
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        // The kernel prints the address in memory order.
        let address = |at: usize| {
            let number = u32::from_str_radix(words.get(at)?, 16).ok()?;
            Some(Ipv4Addr::from(number.to_le_bytes()))
        };
        Some(Route {
            interface: words.first()?,
            destination: address(1)?,
            gateway: address(2)?,
            prefix: u8::try_from(u32::from(address(7)?).leading_ones()).ok()?,
        })
    })
}

fn network(address: Ipv4Addr, prefix: u8) -> Ipv4Addr {
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
    Ipv4Addr::from(u32::from(address) & mask)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::PathBuf;

    use super::*;

    /// Files of a host, which tests can change.
    pub(crate) struct Host(pub(crate) tempfile::TempDir);

    const ROUTES: &str = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\tFE00630A\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t0000630A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
vmbr0\t0003640A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
";

    impl Host {
        /// Creates node 3 of a cluster: a private bridge 10.100.3.1/24, uplink elsewhere.
        pub(crate) fn new() -> Self {
            let host = Self(tempfile::tempdir().expect("tempdir"));
            let members = r#"{"nodename":"node3","cluster":{"quorate":1},
                "nodelist":{"node1":{"id":1,"online":1},"node3":{"id":3,"online":1}}}"#;
            host.write("pve/.members", members);
            host.write(
                "pve/storage.cfg",
                "dir: local\n\tpath /x\n\tcontent iso\n\n\
                zfspool: local-zfs\n\tpool rpool/data\n\tcontent images,rootdir\n",
            );
            host.write("net/vmbr0/bridge/x", "");
            host.write("net/eth0/x", "");
            host.write("proc/net/route", ROUTES);
            host.write(
                "proc/net/fib_trie",
                "|-- 10.99.0.3\n/32 host LOCAL\n\
                |-- 10.100.3.1\n/32 host LOCAL\n",
            );
            host
        }

        pub(crate) fn write(&self, path: &str, text: &str) {
            let path = self.path(path);
            fs::create_dir_all(path.parent().expect("below the root")).expect("mkdir");
            fs::write(path, text).expect("write");
        }

        pub(crate) fn path(&self, path: &str) -> PathBuf {
            self.0.path().join(path)
        }
    }

    fn with<T>(host: &Host, look: impl FnOnce(Roots<'_>) -> T) -> T {
        let (pve, proc, net) = (host.path("pve"), host.path("proc"), host.path("net"));
        look(Roots { pve: &pve, proc: &proc, net: &net })
    }

    #[test]
    fn identity_bridge_and_storage_of_a_cluster_node_are_detected() {
        let host = Host::new();
        let node: NodeName = "node3".parse().expect("valid");
        with(&host, |roots| {
            let expected = Identity { node: node.clone(), number: Some(3) };
            assert_eq!(identity(roots), Ok(expected));
            assert_eq!(bridge(roots).as_deref(), Ok("vmbr0"));
            let expected = OnBridge { address: Ipv4Addr::new(10, 100, 3, 1), prefix: 24 };
            assert_eq!(on_bridge(roots, "vmbr0"), Some(expected));
            assert_eq!(on_bridge(roots, "vmbr1"), None);
            assert_eq!(uplink(roots, "vmbr0"), None);
            assert_eq!(uplink(roots, "eth0"), Some(Ipv4Addr::new(10, 99, 0, 254)));
            assert_eq!(storage(roots, &node).as_deref(), Ok("local-zfs"));
        });
    }

    #[test]
    fn name_servers_of_the_host_are_those_that_a_container_reaches() {
        let host = Host::new();
        let text = "# x\nsearch a\nnameserver 127.0.0.53\nnameserver 10.0.0.3\n\
            nameserver fe80::1\n nameserver\t192.0.2.3 # y\n";
        host.write("resolv.conf", text);
        let found = name_servers(&host.path("resolv.conf"));
        assert_eq!(found, [Ipv4Addr::new(10, 0, 0, 3), Ipv4Addr::new(192, 0, 2, 3)]);
        assert!(name_servers(&host.path("none")).is_empty());
    }

    #[test]
    fn only_bridge_is_detected_without_vmbr0() {
        let host = Host::new();
        fs::rename(host.path("net/vmbr0"), host.path("net/vmbr7")).expect("rename");
        host.write("net/fwbr100i0/bridge/x", "");
        with(&host, |roots| assert_eq!(bridge(roots).as_deref(), Ok("vmbr7")));
        host.write("net/vmbr8/bridge/x", "");
        with(&host, |roots| {
            let error = bridge(roots).expect_err("two").to_string();
            assert_eq!(error, "the bridge is ambiguous: vmbr7, vmbr8");
        });
    }

    #[test]
    fn ambiguous_storages_are_listed_in_the_error() {
        let host = Host::new();
        host.write("pve/storage.cfg", "rbd: a\n\tcontent rootdir\n\nrbd: b\n\tcontent rootdir\n");
        let node: NodeName = "node3".parse().expect("valid");
        with(&host, |roots| {
            let error = storage(roots, &node).expect_err("two").to_string();
            assert_eq!(error, "the storage is ambiguous: a, b");
        });
        let remedy = storage_remedy(&["a".to_owned(), "b".to_owned()]);
        assert_eq!(remedy, "set storage = \"a\", or another of them, at the top of agent.toml");
        assert!(storage_remedy(&[]).contains("pvesm set STORAGE --content ...,rootdir"));
    }

    #[test]
    fn storages_without_linked_clones_are_no_candidates() {
        let host = Host::new();
        let text = "lvm: a\n\tvgname a\n\tcontent rootdir\n\n\
            lvm: b\n\tvgname b\n\tcontent rootdir\n\n";
        host.write("pve/storage.cfg", text);
        let node: NodeName = "node3".parse().expect("valid");
        let told = with(&host, |roots| storage(roots, &node)).expect_err("none is fit");
        let expected = "none of the storages a, b supports linked clones";
        assert_eq!(told, Undecided::None(expected.to_owned()));
    }

    #[test]
    fn storage_that_links_clones_is_chosen_before_one_with_more_room() {
        let host = Host::new();
        let node: NodeName = "node3".parse().expect("valid");
        let dir = format!("dir: big\n\tpath {}\n\tcontent rootdir\n\n", host.path("").display());
        for linked in [
            "lvmthin: thin\n\tvgname pve\n\tthinpool data\n\tcontent images,rootdir\n\n",
            "zfspool: thin\n\tpool rpool/none\n\tcontent images,rootdir\n\n",
        ] {
            // In either order.
            for text in [format!("{dir}{linked}"), format!("{linked}{dir}")] {
                host.write("pve/storage.cfg", &text);
                with(&host, |roots| assert_eq!(storage(roots, &node).as_deref(), Ok("thin")));
            }
        }
        // Without any that links them, the others are what there is.
        host.write("pve/storage.cfg", &dir);
        with(&host, |roots| assert_eq!(storage(roots, &node).as_deref(), Ok("big")));
    }

    #[test]
    fn templates_are_found_by_their_mark() {
        let host = Host::new();
        let node: NodeName = "node3".parse().expect("valid");
        with(&host, |roots| assert!(templates(roots, &node).is_empty(), "no directory"));
        let mark = "#pve-sandbox-template%3Av1 snapshot=debian cores=1 memory_mib=512 http=8000/\n";
        host.write("pve/nodes/node3/lxc/9000.conf", &format!("{mark}template: 1\n"));
        host.write("pve/nodes/node3/lxc/100001.conf", &format!("{mark}hostname: a-clone\n"));
        host.write("pve/nodes/node3/lxc/9001.conf", "#a note\ntemplate: 1\n");
        host.write("pve/nodes/node3/lxc/9002.conf.tmp", &format!("{mark}template: 1\n"));
        host.write("pve/nodes/node1/lxc/9003.conf", &format!("{mark}template: 1\n"));
        with(&host, |roots| {
            let found = templates(roots, &node);
            let all: Vec<_> = found.iter().map(|(vmid, mark)| (vmid.get(), mark.cores)).collect();
            assert_eq!(all, [(9000, 1)]);
        });
    }

    #[test]
    fn template_with_a_reserved_snapshot_is_not_offered_and_is_named() {
        let host = Host::new();
        let node: NodeName = "node3".parse().expect("valid");
        for (vmid, snapshot) in [(9000, "debian"), (9001, "adopted"), (9002, "recovered")] {
            let mark =
                format!("#pve-sandbox-template%3Av1 snapshot={snapshot} cores=1 memory_mib=512");
            let path = format!("pve/nodes/node3/lxc/{vmid}.conf");
            host.write(&path, &format!("{mark}\ntemplate: 1\n"));
        }
        let offered = with(&host, |roots| templates(roots, &node));
        assert_eq!(offered.keys().map(|vmid| vmid.get()).collect::<Vec<_>>(), [9000]);
        let named = reserved(&configs(&host.path("pve"), &node));
        let named: Vec<_> =
            named.iter().map(|(vmid, snapshot)| (vmid.get(), snapshot.as_str())).collect();
        assert_eq!(named, [(9001, "adopted"), (9002, "recovered")]);
    }

    #[test]
    fn identity_is_undecided_while_pmxcfs_is_down() {
        let host = Host::new();
        fs::remove_file(host.path("pve/.members")).expect("remove");
        with(&host, |roots| assert!(matches!(identity(roots), Err(Undecided::None(_)))));
    }
}
