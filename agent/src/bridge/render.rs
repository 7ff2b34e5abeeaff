//! The files of the sandboxes' bridge. Pure.

use std::path::Path;

use ipnet::Ipv4Net;

use super::Bridge;

/// Table of the way out.
pub const NAT_TABLE: &str = "pve_sandbox_nat";

/// First line of each file.
const HEAD: &str = "# Written by `pve-sandbox-agent bridge init`, which writes it again.";

/// The bridge for ifupdown2. No port: it leads nowhere but to this node.
pub(super) fn interfaces(bridge: &Bridge, nat: &Path) -> String {
    let Bridge { name, address } = bridge;
    let nat = nat.display();
    format!(
        "{HEAD}\n\
         # The sandboxes' own network on this node. Their way out is the node's own address ({nat}).\n\
         auto {name}\n\
         iface {name} inet static\n\
         \taddress {address}\n\
         \tbridge-ports none\n\
         \tbridge-stp off\n\
         \tbridge-fd 0\n\
         \tpost-up echo 1 > /proc/sys/net/ipv4/ip_forward\n\
         \tpost-up nft -f {nat}\n\
         \tpost-down nft delete table ip {NAT_TABLE} || true\n"
    )
}

/// The way out: sandboxes' packets get the node's address.
pub(super) fn nat(bridge: &Bridge) -> String {
    let Bridge { name, address } = bridge;
    let network = address.trunc();
    format!(
        "{HEAD}\n\
         # Adding it first makes the removal work also where there is none; the whole file is one change.\n\
         table ip {NAT_TABLE}\n\
         delete table ip {NAT_TABLE}\n\
         table ip {NAT_TABLE} {{\n\
         \tchain postrouting {{\n\
         \t\ttype nat hook postrouting priority srcnat; policy accept;\n\
         \t\tip saddr {network} oifname != \"{name}\" masquerade\n\
         \t}}\n\
         }}\n"
    )
}

/// The name server: dnsmasq without its DHCP, which asks the node's own name servers.
pub(super) fn dns(bridge: &Bridge) -> String {
    let Bridge { name, address } = bridge;
    let address = address.addr();
    format!(
        "{HEAD}\n\
         # Answers on the sandboxes' bridge only.\n\
         interface={name}\n\
         except-interface=lo\n\
         listen-address={address}\n\
         bind-dynamic\n\
         # The node's own names and private addresses are nobody's business in a sandbox.\n\
         no-hosts\n\
         stop-dns-rebind\n\
         bogus-priv\n\
         domain-needed\n\
         cache-size=1000\n\
         # Of all sandboxes at once. One that no server answers stays for 10 s; the node's rules let a sandbox ask\n\
         # 200 times a second, so one alone leaves most places to others. A place takes less than 1 KiB.\n\
         dns-forward-max=10000\n"
    )
}

/// Returns the bridge that a file of [`interfaces`] describes.
pub(super) fn name_in(text: &str) -> Option<String> {
    let line = text.lines().find_map(|line| line.strip_prefix("iface "))?;
    line.split_whitespace().next().map(str::to_owned)
}

/// Returns the address of the bridge that a file of [`interfaces`] describes.
pub(super) fn address_in(text: &str) -> Option<Ipv4Net> {
    text.lines().find_map(|line| line.trim().strip_prefix("address "))?.trim().parse().ok()
}

/// Returns true when ifupdown2's file includes those of the directory.
pub(super) fn includes(interfaces: &str, dir: &Path) -> bool {
    interfaces.lines().any(|line| {
        let mut words = line.split_whitespace();
        let source = words.next();
        let path = words.next().unwrap_or("").trim_end_matches('*').trim_end_matches('/');
        matches!(source, Some("source" | "source-directory")) && Path::new(path) == dir
    })
}
