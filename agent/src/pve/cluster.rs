//! Reads the cluster's state from pmxcfs: `.members`, `.vmlist`, and the signs beside them. Only
//! `Signs::read` touches files.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::ErrorKind::NotFound,
    net::IpAddr,
    os::unix::fs::PermissionsExt,
    path::Path,
};

use proto::{id::Vmid, name::NodeName};
use serde::Deserialize;

use super::{Cluster, Member};

/// File of pmxcfs with the configuration of corosync.
pub const COROSYNC_CONF: &str = "corosync.conf";

/// Content of `.members`. It has `nodename` alone on a node without a cluster, and also on a member
/// whose pmxcfs was started while corosync was down.
#[derive(Debug, Deserialize)]
struct Members {
    nodename: NodeName,
    cluster: Option<Corosync>,
    #[serde(default)]
    nodelist: BTreeMap<NodeName, Node>,
}

#[derive(Debug, Deserialize)]
struct Corosync {
    quorate: u8,
}

#[derive(Debug, Clone, Copy, Deserialize)]
struct Node {
    id: u32,
    #[serde(default)]
    online: u8,
    ip: Option<IpAddr>,
}

#[derive(Debug, Default, Deserialize)]
struct Guests {
    #[serde(default)]
    ids: BTreeMap<String, Guest>,
}

#[derive(Debug, Deserialize)]
struct Guest {
    node: NodeName,
    #[serde(default)]
    version: u64,
}

/// Signs that distinguish a node without a cluster from a member that lost its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signs {
    /// Whether /etc/pve has a cluster's configuration: then this node is a member.
    pub corosync_conf: bool,
    /// Whether /etc/pve has w bits: pmxcfs removes them from everything while it has no quorum.
    pub writable: bool,
}

impl Signs {
    /// Reads the signs of pmxcfs mounted at `root`. An unreadable sign counts as the bad one: a
    /// member that believes it has no cluster does harm, the reverse does none. Blocks: `root` is a
    /// FUSE file system.
    pub fn read(root: &Path) -> Self {
        let writable = |dir: &Path| match fs::metadata(dir) {
            Ok(found) => found.permissions().mode() & 0o222 != 0,
            Err(error) => error.kind() == NotFound,
        };
        Self {
            corosync_conf: root.join(COROSYNC_CONF).try_exists().unwrap_or(true),
            writable: writable(root) && writable(&root.join("nodes")),
        }
    }
}

/// Whether this node may change /etc/pve, and its number in the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quorum {
    /// The node belongs to the majority of its cluster; its number, if the cluster lists it.
    Quorate(Option<u32>),
    /// The node is in no cluster. Its number is 1.
    Alone,
    /// Nothing may be changed; the number is given if it is known nevertheless.
    Lost(Option<u32>),
}

/// Number of a node that is in no cluster. PVE gives it to the node that founds one, too.
const ALONE: u32 = 1;

impl Quorum {
    /// True when /etc/pve can be changed.
    pub const fn holds(self) -> bool {
        matches!(self, Self::Quorate(_) | Self::Alone)
    }

    /// Number of this node in its cluster, from 1, if it is known.
    pub const fn number(self) -> Option<u32> {
        match self {
            Self::Quorate(number) | Self::Lost(number) => number,
            Self::Alone => Some(ALONE),
        }
    }
}

/// Decides from `.members` and the signs beside it.
fn quorum(members: &Members, signs: Signs) -> Quorum {
    let number = members.nodelist.get(&members.nodename).map(|node| node.id);
    match &members.cluster {
        Some(corosync) if corosync.quorate == 1 && signs.writable => Quorum::Quorate(number),
        // Without the signs, pmxcfs may have had no contact with corosync since it started.
        None if !signs.corosync_conf && signs.writable => Quorum::Alone,
        Some(_) | None => Quorum::Lost(number),
    }
}

/// Identity of this node, by pmxcfs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Name of the node.
    pub node: NodeName,
    /// Number in the cluster, from 1; it stays the same when other nodes come and go. `None` while
    /// it is unknown.
    pub number: Option<u32>,
}

/// Reads the node's identity from `.members` and the signs beside it.
pub fn identity(members: &[u8], signs: Signs) -> Option<Identity> {
    let members: Members = serde_json::from_slice(members).ok()?;
    let number = quorum(&members, signs).number();
    Some(Identity { node: members.nodename, number })
}

/// Content of `ha/manager_status`, where a cluster has HA.
#[derive(Debug, Default, Deserialize)]
struct Manager {
    #[serde(default)]
    node_status: BTreeMap<NodeName, String>,
}

/// Reads the nodes' addresses on all links from `corosync.conf`. A link may have a name instead, which is left
/// out: whom a name leads to is not the cluster's to say.
pub fn links(corosync_conf: &[u8]) -> BTreeSet<IpAddr> {
    let text = String::from_utf8_lossy(corosync_conf);
    let addresses = text.lines().filter_map(|line| {
        let (key, value) = line.trim().split_once(':')?;
        let number = key.trim().strip_prefix("ring")?.strip_suffix("_addr")?;
        number.parse::<u8>().ok()?;
        value.trim().parse().ok()
    });
    addresses.collect()
}

/// Reads the cluster's state. Without `.members`, pmxcfs is down: not quorate, nothing known.
pub fn cluster(
    members: Option<&[u8]>,
    guests: Option<&[u8]>,
    manager: Option<&[u8]>,
    signs: Signs,
) -> Cluster {
    let Some(members) = members.and_then(|bytes| serde_json::from_slice::<Members>(bytes).ok())
    else {
        return Cluster::default();
    };
    let guests: Guests = guests.and_then(|g| serde_json::from_slice(g).ok()).unwrap_or_default();
    let manager: Manager = manager.and_then(|m| serde_json::from_slice(m).ok()).unwrap_or_default();
    let status = manager.node_status.get(&members.nodename);
    let maintenance = status.is_some_and(|status| status == "maintenance");
    let quorum = quorum(&members, signs);
    let mut nodes: BTreeMap<NodeName, Member> = members
        .nodelist
        .into_iter()
        .map(|(name, node)| (name, Member { ip: node.ip, online: node.online == 1 }))
        .collect();
    nodes.entry(members.nodename).or_insert(Member { ip: None, online: true });
    let guests = guests.ids.into_iter().filter_map(|(id, guest)| {
        let vmid: Vmid = id.parse().ok()?;
        Some(((vmid, guest.node), (vmid, guest.version)))
    });
    let (guests, versions) = guests.unzip();
    Cluster {
        quorate: quorum.holds(),
        number: quorum.number(),
        members: nodes,
        maintenance,
        links: BTreeSet::new(),
        guests,
        versions,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMBERS: &str = r#"{
"nodename": "pve2",
"version": 7,
"cluster": { "name": "testcl", "version": 2, "nodes": 2, "quorate": 0 },
"nodelist": {
  "pve1": { "id": 1, "online": 1, "ip": "10.99.0.11"},
  "pve2": { "id": 4, "online": 0 }
  }
}
"#;
    const GUESTS: &str = r#"{
"version": 326,
"ids": {
"910": { "node": "pve1", "type": "lxc", "version": 281 },
"601": { "node": "pve2", "type": "qemu", "version": 263 }}

}
"#;

    /// Signs of a healthy node without a cluster.
    const FINE: Signs = Signs { corosync_conf: false, writable: true };
    const BARE: &[u8] = b"{\n\"nodename\": \"pve1\",\n\"version\": 0\n}\n";

    #[test]
    fn all_links_of_all_nodes_are_read() {
        let text = "logging {\n  debug: off\n}\nnodelist {\n  node {\n    name: pve1\n    nodeid: 1\n    \
                    ring0_addr: 10.99.0.11\n    ring1_addr: 203.0.113.11\n  }\n  node {\n    name: pve2\n    \
                    ring0_addr: pve2.example.org\n    ring7_addr: 2001:db8::2\n  }\n}\ntotem {\n  \
                    interface {\n    linknumber: 0\n  }\n  version: 2\n}\n# ring0_addr: 10.0.0.1\n";
        let expected = ["10.99.0.11", "203.0.113.11", "2001:db8::2"];
        let expected = expected.map(|text| text.parse().expect("an address"));
        assert_eq!(links(text.as_bytes()), expected.into());
        assert!(links(b"").is_empty());
    }

    fn node(name: &str) -> NodeName {
        name.parse().expect("valid")
    }

    fn members(of: &str) -> Members {
        serde_json::from_str(of).expect("a file of pmxcfs")
    }

    #[test]
    fn member_without_corosync_is_not_taken_for_a_lone_node() {
        let bare = members(std::str::from_utf8(BARE).expect("text"));
        let signs = |corosync_conf, writable| Signs { corosync_conf, writable };
        assert_eq!(quorum(&bare, signs(false, true)), Quorum::Alone);
        // Observed on a real node: the same `.members`, and one of these signs or both.
        for (corosync_conf, writable) in [(true, false), (true, true), (false, false)] {
            let lost = quorum(&bare, signs(corosync_conf, writable));
            assert_eq!(lost, Quorum::Lost(None), "{corosync_conf} {writable}");
            assert!(!lost.holds() && lost.number().is_none());
            let cluster = cluster(Some(BARE), None, None, signs(corosync_conf, writable));
            assert!(!cluster.quorate && cluster.number.is_none());
            assert_eq!(cluster.members.len(), 1, "pmxcfs is not down");
            let identity = identity(BARE, signs(corosync_conf, writable)).expect("it has a name");
            assert_eq!((identity.node, identity.number), (node("pve1"), None));
        }
    }

    #[test]
    fn a_member_is_quorate_only_if_it_can_write() {
        let of = |quorate: u8, id: &str, writable| {
            let text = format!(
                r#"{{"nodename":"pve2","cluster":{{"quorate":{quorate}}},"nodelist":{{{id}}}}}"#
            );
            quorum(&members(&text), Signs { corosync_conf: true, writable })
        };
        let four = r#""pve2":{"id":4,"online":1}"#;
        assert_eq!(of(1, four, true), Quorum::Quorate(Some(4)));
        assert_eq!(of(1, four, false), Quorum::Lost(Some(4)));
        assert_eq!(of(0, four, true), Quorum::Lost(Some(4)));
        assert_eq!(of(2, four, true), Quorum::Lost(Some(4)), "pmxcfs writes 0 or 1");
        assert_eq!(of(1, "", true), Quorum::Quorate(None), "it is never number 1 by default");
    }

    #[test]
    fn quorum_signs_are_read_from_the_mount() {
        let root = tempfile::tempdir().expect("tempdir");
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
        };
        let nodes = root.path().join("nodes");
        fs::create_dir(&nodes).expect("mkdir");
        assert_eq!(Signs::read(root.path()), FINE);
        fs::write(root.path().join("corosync.conf"), "totem {}").expect("write");
        assert_eq!(Signs::read(root.path()), Signs { corosync_conf: true, writable: true });
        // pmxcfs removes the w bits of its own directories, but not always of the mount itself.
        mode(&nodes, 0o555);
        assert!(!Signs::read(root.path()).writable);
        mode(&nodes, 0o755);
        mode(root.path(), 0o555);
        assert!(!Signs::read(root.path()).writable);
        mode(root.path(), 0o755);
    }

    #[test]
    fn state_of_a_cluster_without_quorum_is_parsed() {
        let cluster = cluster(Some(MEMBERS.as_bytes()), Some(GUESTS.as_bytes()), None, FINE);
        assert!(!cluster.quorate);
        let ip = Some(IpAddr::from([10, 99, 0, 11]));
        assert_eq!(cluster.members[&node("pve1")], Member { ip, online: true });
        assert_eq!(cluster.members[&node("pve2")], Member { ip: None, online: false });
        let guests: Vec<_> = cluster.guests.iter().map(|(id, n)| (id.get(), n.as_str())).collect();
        assert_eq!(guests, [(601, "pve2"), (910, "pve1")]);
        let versions: Vec<_> = cluster.versions.iter().map(|(id, n)| (id.get(), *n)).collect();
        assert_eq!(versions, [(601, 263), (910, 281)]);
        let expected = Identity { node: node("pve2"), number: Some(4) };
        assert_eq!(identity(MEMBERS.as_bytes(), FINE), Some(expected));
    }

    #[test]
    fn lone_node_is_quorate_with_number_one() {
        let cluster = cluster(Some(BARE), None, None, FINE);
        assert!(cluster.quorate && cluster.guests.is_empty());
        assert_eq!(cluster.number, Some(1));
        assert_eq!(cluster.members[&node("pve1")], Member { ip: None, online: true });
        assert_eq!(identity(BARE, FINE), Some(Identity { node: node("pve1"), number: Some(1) }));
    }

    #[test]
    fn maintenance_follows_the_ha_manager_status_of_this_node() {
        let of = |status: &str| {
            let manager = format!(r#"{{"master_node":"pve1","node_status":{{{status}}}}}"#);
            cluster(Some(MEMBERS.as_bytes()), None, Some(manager.as_bytes()), FINE).maintenance
        };
        assert!(of(r#""pve1":"online","pve2":"maintenance""#));
        assert!(!of(r#""pve1":"maintenance","pve2":"online""#));
        assert!(!cluster(Some(MEMBERS.as_bytes()), None, Some(b"broken"), FINE).maintenance);
    }

    #[test]
    fn unreadable_members_mean_no_quorum() {
        for members in [None, Some(b"".as_slice()), Some(b"{}".as_slice())] {
            let cluster = cluster(members, None, None, FINE);
            assert!(!cluster.quorate && cluster.members.is_empty());
        }
    }
}
