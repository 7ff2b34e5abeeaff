//! Shell lines that join nodes by root's ssh, which the nodes of a PVE cluster have among themselves. They
//! are printed, never run: only an operator starts something on other machines.

use std::net::IpAddr;

use proto::name::NodeName;

/// A node that is to join.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// PVE's name of it.
    pub node: NodeName,
    /// Address of it; `None`: its name must do.
    pub address: Option<IpAddr>,
}

/// Returns lines for a shell of root on this machine. Each node gets a token of its own, which is good once.
/// `own` is the node that this machine is, if it is to join, too.
pub fn join_loop(own: Option<&NodeName>, others: &[Host]) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(own) = own {
        lines.push(format!("sandboxctl node token {own} | sh"));
    }
    if others.is_empty() {
        return lines;
    }
    let word = |host: &Host| {
        let address = host.address.map_or_else(|| host.node.to_string(), |ip| ip.to_string());
        format!("{}={address}", host.node)
    };
    let words: Vec<_> = others.iter().map(word).collect();
    lines.push(format!("for node in {}; do", words.join(" ")));
    // PVE knows the key of a node by its name: clusters from before 8.2 in one file for all, later ones in a file for
    // each node, which ssh must be told of. Through a pipe the token is in nobody's arguments here, and a token that
    // was refused runs nothing there.
    let body = [
        "  sandboxctl node token ${node%=*} | ssh -o HostKeyAlias=${node%=*} \\",
        "    -o UserKnownHostsFile=\"/root/.ssh/known_hosts /etc/pve/nodes/${node%=*}/ssh_known_hosts\" \\",
        "    root@${node#*=} sh",
        "done",
    ];
    lines.extend(body.map(str::to_owned));
    lines
}
