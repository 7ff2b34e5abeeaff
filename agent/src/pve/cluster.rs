//! What pmxcfs tells of the cluster: `.members` and `.vmlist`. Pure.

use std::{collections::BTreeMap, net::IpAddr};

use proto::{id::Vmid, name::NodeName};
use serde::Deserialize;

use super::{Cluster, Member};

/// `.members`. A node that is in no cluster has a `nodename` and nothing else.
#[derive(Debug, Deserialize)]
struct Members {
    nodename: NodeName,
    cluster: Option<Quorum>,
    #[serde(default)]
    nodelist: BTreeMap<NodeName, Node>,
}

#[derive(Debug, Deserialize)]
struct Quorum {
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
}

/// Who this node is, by pmxcfs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its name.
    pub node: NodeName,
    /// Its number in the cluster, from 1; it keeps it when others come and go.
    pub number: u32,
}

/// Reads who this node is out of `.members`.
pub fn identity(members: &[u8]) -> Option<Identity> {
    let Members { nodename: node, nodelist, .. } = serde_json::from_slice(members).ok()?;
    let number = nodelist.get(&node).map_or(1, |node| node.id);
    Some(Identity { node, number })
}

/// `ha/manager_status`, where a cluster has HA.
#[derive(Debug, Default, Deserialize)]
struct Manager {
    #[serde(default)]
    node_status: BTreeMap<NodeName, String>,
}

/// Reads the cluster. Without `.members`, pmxcfs is down: nothing is quorate, and nothing known.
pub fn cluster(members: Option<&[u8]>, guests: Option<&[u8]>, manager: Option<&[u8]>) -> Cluster {
    let Some(members) = members.and_then(|bytes| serde_json::from_slice::<Members>(bytes).ok())
    else {
        return Cluster::default();
    };
    let guests: Guests = guests.and_then(|g| serde_json::from_slice(g).ok()).unwrap_or_default();
    let manager: Manager = manager.and_then(|m| serde_json::from_slice(m).ok()).unwrap_or_default();
    let status = manager.node_status.get(&members.nodename);
    let maintenance = status.is_some_and(|status| status == "maintenance");
    let mut nodes: BTreeMap<NodeName, Member> = members
        .nodelist
        .into_iter()
        .map(|(name, node)| (name, Member { ip: node.ip, online: node.online == 1 }))
        .collect();
    nodes.entry(members.nodename).or_insert(Member { ip: None, online: true });
    Cluster {
        // A node in no cluster has nobody to agree with.
        quorate: members.cluster.is_none_or(|cluster| cluster.quorate == 1),
        members: nodes,
        maintenance,
        guests: guests
            .ids
            .into_iter()
            .filter_map(|(id, guest)| Some((id.parse::<Vmid>().ok()?, guest.node)))
            .collect(),
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

    fn node(name: &str) -> NodeName {
        name.parse().expect("valid")
    }

    #[test]
    fn a_cluster_without_quorum() {
        let cluster = cluster(Some(MEMBERS.as_bytes()), Some(GUESTS.as_bytes()), None);
        assert!(!cluster.quorate);
        let ip = Some(IpAddr::from([10, 99, 0, 11]));
        assert_eq!(cluster.members[&node("pve1")], Member { ip, online: true });
        assert_eq!(cluster.members[&node("pve2")], Member { ip: None, online: false });
        let guests: Vec<_> = cluster.guests.iter().map(|(id, n)| (id.get(), n.as_str())).collect();
        assert_eq!(guests, [(601, "pve2"), (910, "pve1")]);
        let expected = Identity { node: node("pve2"), number: 4 };
        assert_eq!(identity(MEMBERS.as_bytes()), Some(expected));
    }

    #[test]
    fn a_node_alone() {
        let members = b"{\n\"nodename\": \"pve1\",\n\"version\": 0\n}\n";
        let cluster = cluster(Some(members), None, None);
        assert!(cluster.quorate && cluster.guests.is_empty());
        assert_eq!(cluster.members[&node("pve1")], Member { ip: None, online: true });
        assert_eq!(identity(members), Some(Identity { node: node("pve1"), number: 1 }));
    }

    #[test]
    fn maintenance_is_what_the_ha_manager_says_of_this_node() {
        let of = |status: &str| {
            let manager = format!(r#"{{"master_node":"pve1","node_status":{{{status}}}}}"#);
            cluster(Some(MEMBERS.as_bytes()), None, Some(manager.as_bytes())).maintenance
        };
        assert!(of(r#""pve1":"online","pve2":"maintenance""#));
        assert!(!of(r#""pve1":"maintenance","pve2":"online""#));
        assert!(!cluster(Some(MEMBERS.as_bytes()), None, Some(b"broken")).maintenance);
    }

    #[test]
    fn pmxcfs_down_is_not_an_empty_cluster() {
        for members in [None, Some(b"".as_slice()), Some(b"{}".as_slice())] {
            let cluster = cluster(members, None, None);
            assert!(!cluster.quorate && cluster.members.is_empty());
        }
    }
}
