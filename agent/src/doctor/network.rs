//! Judges the sandboxes' network: bridge, way out, name server, isolation. Pure.

use daemon::doctor::{Check, reach::Listener};

use super::{
    Host,
    facts::{NameServer, Node},
    look::DNS_UNIT,
};
use crate::{
    bridge::NAT_TABLE,
    config::Config,
    firewall::render::{FAMILIES, TABLE},
};

pub(super) fn check(config: &Config, node: &Node, host: &Host) -> Vec<Check> {
    let mut checks = vec![bridge(config, node, host)];
    if node.bridge.is_ours {
        checks.push(nat(node, host));
        checks.push(forwarding(node));
    }
    checks.extend(name_server(config, node, host));
    checks.push(isolation(config, node));
    checks
}

fn bridge(config: &Config, node: &Node, host: &Host) -> Check {
    let network = &config.network;
    let (name, gateway) = (&network.bridge, network.gateway);
    let on_it = node.bridge.address.map(|on| on.address);
    if !node.bridge.is_bridge {
        let found = "an interface, and no Linux bridge: no container can be connected to it";
        let path = host.bridge.config.display();
        let remedy = format!("pve-sandbox-agent bridge init; or set network.bridge in {path}");
        return Check::failed("bridge", name, found, remedy);
    }
    if node.bridge.is_ours && on_it != Some(gateway) {
        let found = match on_it {
            Some(other) => format!("this node has {other} on it, and the gateway is {gateway}"),
            None => format!("the gateway's address {gateway} is not on it"),
        };
        return Check::failed("bridge", name, found, format!("ifup --force {name}"));
    }
    let found = format!("gateway {gateway}, addresses of sandboxes {}", network.pool);
    Check::ok("bridge", name, found)
}

fn nat(node: &Node, host: &Host) -> Check {
    let (table, file) = (format!("ip {NAT_TABLE}"), host.bridge.nat());
    let subject = format!("table {table}");
    match &node.tables {
        Some(tables) if tables.contains(&table) => Check::ok("nat", subject, "loaded"),
        Some(_) => {
            let found = "not loaded: sandboxes have no way out";
            Check::failed("nat", subject, found, format!("nft -f {}", file.display()))
        }
        None => unlisted("nat", subject),
    }
}

fn unlisted(name: &'static str, subject: String) -> Check {
    Check::warning(name, subject, "nft does not list its tables", "nft list tables")
}

fn forwarding(node: &Node) -> Check {
    let subject = "net.ipv4.ip_forward";
    match node.bridge.forwards {
        true => Check::ok("forwarding", subject, "on"),
        false => {
            let found = "off: sandboxes have no way out";
            Check::failed("forwarding", subject, found, format!("sysctl -w {subject}=1"))
        }
    }
}

fn name_server(config: &Config, node: &Node, host: &Host) -> Option<Check> {
    let address = super::name_server(config, host);
    let (subject, restart) = (address.to_string(), format!("systemctl restart {DNS_UNIT}"));
    Some(match node.bridge.name_server? {
        NameServer::Ours => Check::ok("name-server", subject, "it answers"),
        NameServer::Silent => Check::failed(
            "name-server",
            subject,
            "no answer: sandboxes cannot resolve names",
            format!("systemctl enable {DNS_UNIT}; {restart}"),
        ),
        NameServer::Other => Check::failed(
            "name-server",
            subject,
            format!(
                "something answers that is not the dnsmasq of {DNS_UNIT}, which cannot listen there"
            ),
            format!(
                "ss -lunp 'sport = :{}' shows what does: have it listen on addresses of its own, and not on all; then: \
                 {restart}",
                address.port()
            ),
        ),
    })
}

fn isolation(config: &Config, node: &Node) -> Check {
    if !config.isolation.enabled {
        let found = "switched off: sandboxes reach each other, this host and its networks";
        let remedy =
            "set network.isolation = true in agent.toml; systemctl restart pve-sandbox-agent";
        return Check::warning("isolation", "network.isolation", found, remedy);
    }
    let subject = format!("tables {TABLE}");
    let Some(tables) = &node.tables else { return unlisted("isolation", subject) };
    let missing = FAMILIES.iter().filter(|family| !tables.contains(&format!("{family} {TABLE}")));
    let missing: Vec<_> = missing.copied().collect();
    let runs = matches!(node.agent.listener, Some(Listener::Accepted(_)));
    match (missing.is_empty(), runs) {
        (true, _) => Check::ok("isolation", subject, "loaded"),
        (false, true) => Check::failed(
            "isolation",
            subject,
            format!("not loaded for {}: the agent puts them back within 10 s", missing.join(", ")),
            "systemctl restart pve-sandbox-agent",
        ),
        (false, false) => Check::warning(
            "isolation",
            subject,
            format!("not loaded for {}: the agent loads them at its start", missing.join(", ")),
            "systemctl start pve-sandbox-agent",
        ),
    }
}
