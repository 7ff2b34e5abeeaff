//! Membership of the cluster, and the virtual files that show it. Pure.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use super::tree::Tree;

/// Files whose changes `.version` counts.
const VERSIONED: &[&str] = &[
    "corosync.conf",
    "corosync.conf.new",
    "storage.cfg",
    "user.cfg",
    "domains.cfg",
    "priv/shadow.cfg",
    "priv/tfa.cfg",
    "priv/token.cfg",
    "datacenter.cfg",
    "vzdump.cron",
    "vzdump.conf",
    "jobs.cfg",
    "ha/crm_commands",
    "ha/manager_status",
    "ha/resources.cfg",
    "ha/groups.cfg",
    "status.cfg",
    "replication.cfg",
    "firewall/cluster.fw",
];

/// One node as the cluster file system knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Number in the cluster.
    pub id: u8,
    /// Cluster address.
    pub ip: String,
    /// True while the node is booted.
    pub up: bool,
    /// Cut off from the others: it has no quorum, and they see it offline.
    pub cut: bool,
    /// True while the node's pmxcfs is stopped and its /etc/pve is empty.
    pub stopped: bool,
    /// True if the node's pmxcfs was started while its corosync was down: it knows of no cluster.
    pub unheard: bool,
}

/// Members by name, with the counter of their changes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Nodes by name.
    pub members: BTreeMap<String, Member>,
    /// Number of changes of the membership.
    pub version: u64,
}

impl Cluster {
    /// Returns whether `viewer` sees `other` online.
    pub fn online(&self, viewer: &str, other: &str) -> bool {
        let reaches =
            |name: &str| self.members.get(name).is_some_and(|m| m.up && !m.cut && !m.unheard);
        match self.members.get(other) {
            Some(member) if viewer == other => member.up,
            Some(_) => reaches(viewer) && reaches(other),
            None => false,
        }
    }

    /// Returns whether `viewer` belongs to a majority. A node alone in its cluster loses its quorum
    /// only by being cut off, which cannot happen to a real one but is useful in tests.
    pub fn quorate(&self, viewer: &str) -> bool {
        let seen = self.members.keys().filter(|other| self.online(viewer, other)).count();
        let heard = self.members.get(viewer).is_some_and(|m| !m.cut && !m.unheard);
        heard && seen * 2 > self.members.len()
    }

    /// Returns the text of `.members` on a node.
    pub fn members_file(&self, viewer: &str) -> String {
        if self.members.get(viewer).is_some_and(|m| m.unheard) {
            return format!("{{\n\"nodename\": \"{viewer}\",\n\"version\": 0\n}}\n");
        }
        let quorate = u8::from(self.quorate(viewer));
        let mut out = format!(
            "{{\n\"nodename\": \"{viewer}\",\n\"version\": {},\n\"cluster\": {{ \"name\": \"lab\", \
             \"version\": {}, \"nodes\": {}, \"quorate\": {quorate} }},\n\"nodelist\": {{\n",
            self.version + 1,
            self.members.len(),
            self.members.len(),
        );
        for (i, (name, member)) in self.members.iter().enumerate() {
            let online = u8::from(self.online(viewer, name));
            let comma = if i + 1 < self.members.len() { "," } else { "" };
            // write! to a String cannot fail.
            let _infallible = writeln!(
                out,
                "  \"{name}\": {{ \"id\": {}, \"online\": {online}, \"ip\": \"{}\"}}{comma}",
                member.id, member.ip,
            );
        }
        out.push_str("  }\n}\n");
        out
    }
}

/// Records which members are booted, and counts a change.
pub(super) fn members_up(cluster: &mut Cluster, up: impl Fn(&str) -> bool) {
    let mut changed = false;
    for (name, member) in &mut cluster.members {
        let now = up(name);
        changed |= member.up != now;
        member.up = now;
    }
    cluster.version += u64::from(changed);
}

/// Returns the text of `.vmlist`.
pub fn vmlist_file(tree: &Tree) -> String {
    let lines: Vec<String> = tree
        .guests()
        .iter()
        .map(|(vmid, guest)| {
            format!(
                "\"{vmid}\": {{ \"node\": \"{}\", \"type\": \"{}\", \"version\": {} }}",
                guest.node, guest.kind, guest.version
            )
        })
        .collect();
    let version = tree.vmlist_version();
    format!("{{\n\"version\": {version},\n\"ids\": {{\n{}}}\n\n}}\n", lines.join(",\n"))
}

/// Returns the text of `.version`.
pub fn version_file(tree: &Tree, cluster: &Cluster, started_s: u64) -> String {
    let mut out = format!(
        "{{\n\"starttime\": {started_s},\n\"clinfo\": {},\n\"vmlist\": {}",
        cluster.version,
        tree.vmlist_version()
    );
    for path in VERSIONED {
        // write! to a String cannot fail.
        let _infallible = write!(out, ",\n\"{path}\": {}", tree.file_version(path));
    }
    out.push_str(",\n\"kvstore\": {\n}\n}\n");
    out
}

#[cfg(test)]
mod tests {
    use super::super::tree::{ROOT, Tree};
    use super::*;

    fn three() -> Cluster {
        let member = |id: u8| Member {
            id,
            ip: format!("10.99.0.{id}"),
            up: true,
            cut: false,
            stopped: false,
            unheard: false,
        };
        Cluster {
            members: (1..=3).map(|id| (format!("node{id}"), member(id))).collect(),
            version: 3,
        }
    }

    #[test]
    fn members_file_is_written_as_pmxcfs_writes_it() {
        let mut cluster = three();
        cluster.members.get_mut("node3").expect("node3").up = false;
        let text = cluster.members_file("node1");
        let expected = r#"{
"nodename": "node1",
"version": 4,
"cluster": { "name": "lab", "version": 3, "nodes": 3, "quorate": 1 },
"nodelist": {
  "node1": { "id": 1, "online": 1, "ip": "10.99.0.1"},
  "node2": { "id": 2, "online": 1, "ip": "10.99.0.2"},
  "node3": { "id": 3, "online": 0, "ip": "10.99.0.3"}
  }
}
"#;
        assert_eq!(text, expected);
        serde_json::from_str::<serde_json::Value>(&text).expect("it is JSON");
    }

    #[test]
    fn quorum_counts_members_that_are_up_and_not_cut_off() {
        let mut cluster = three();
        cluster.members.get_mut("node2").expect("node2").cut = true;
        assert!(cluster.quorate("node1") && cluster.quorate("node3"));
        assert!(!cluster.quorate("node2"));
        assert!(!cluster.online("node1", "node2") && !cluster.online("node2", "node1"));
        assert!(cluster.online("node2", "node2"));
        cluster.members.get_mut("node3").expect("node3").up = false;
        assert!(!cluster.quorate("node1"), "one of three is no majority");
    }

    #[test]
    fn member_that_has_not_heard_of_corosync_looks_like_a_lone_node() {
        let mut cluster = three();
        cluster.members.get_mut("node1").expect("node1").unheard = true;
        let text = cluster.members_file("node1");
        assert_eq!(text, "{\n\"nodename\": \"node1\",\n\"version\": 0\n}\n");
        assert!(!cluster.quorate("node1") && cluster.quorate("node2"));
        assert!(!cluster.online("node2", "node1"));
    }

    #[test]
    fn vmlist_and_version_are_json() {
        let mut tree = Tree::new(std::time::UNIX_EPOCH);
        let now = std::time::UNIX_EPOCH;
        serde_json::from_str::<serde_json::Value>(&vmlist_file(&tree)).expect("empty vmlist");
        let nodes = tree.mkdir(ROOT, "nodes", now).expect("nodes");
        let node = tree.mkdir(nodes, "node1", now).expect("node");
        let lxc = tree.mkdir(node, "lxc", now).expect("lxc");
        tree.create(lxc, "9000.conf", now).expect("conf");
        tree.create(lxc, "100000.conf", now).expect("conf");
        let text = vmlist_file(&tree);
        let expected = r#"{
"version": 3,
"ids": {
"9000": { "node": "node1", "type": "lxc", "version": 1 },
"100000": { "node": "node1", "type": "lxc", "version": 2 }}

}
"#;
        assert_eq!(text, expected);
        let version = version_file(&tree, &three(), 17);
        serde_json::from_str::<serde_json::Value>(&version).expect("version");
    }
}
