//! Judges the sandboxes' network: bridge, way out, name server, isolation. Pure.

use daemon::doctor::{Check, reach::Listener};

use super::{
    Host,
    facts::{NameServer, Node},
    look::DNS_UNIT,
};
use crate::{
    bridge::{self, NAT_TABLE},
    config::Config,
    firewall::render::{FAMILIES, TABLE},
};

/// Command that writes the files of the sandboxes' own bridge, and has them used.
const INIT: &str = "pve-sandbox-agent bridge init";

/// Judges all of it. `made`: the bridge that `bridge init` has made.
pub(super) fn check(config: &Config, node: &Node, made: Option<&str>, host: &Host) -> Vec<Check> {
    let mut checks = vec![bridge(config, node, made, host)];
    if node.bridge.is_ours {
        checks.push(nat(node, host));
        checks.push(forwarding(node));
    }
    checks.extend(name_server(config, node, host));
    checks.push(isolation(config, node));
    checks
}

fn bridge(config: &Config, node: &Node, made: Option<&str>, host: &Host) -> Check {
    let network = &config.network;
    let (name, gateway) = (&network.bridge, network.gateway);
    let on_it = node.bridge.address.map(|on| on.address);
    if !node.bridge.is_bridge {
        let found = "an interface, and no Linux bridge: no container can be connected to it";
        let remedy = match node.bridge.is_ours {
            true => format!(
                "ip -d link show {name} shows what has the name of the sandboxes' bridge: rename or remove that; then: \
                 ifup --force {name}"
            ),
            false => bridge::instead(made, &host.bridge.config),
        };
        return Check::failed("bridge", name, found, remedy);
    }
    if node.bridge.is_ours && on_it != Some(gateway) {
        let found = match on_it {
            Some(other) => format!("this node has {other} on it, and the gateway is {gateway}"),
            None => format!("the gateway's address {gateway} is not on it"),
        };
        let remedy = match node.bridge.made_address {
            Some(made) if made != gateway => {
                format!("set network.gateway = \"{made}\" in {}", host.bridge.config.display())
            }
            Some(_) | None => format!("ifup --force {name}"),
        };
        return Check::failed("bridge", name, found, remedy);
    }
    let found = format!("gateway {gateway}, addresses of sandboxes {}", network.pool);
    Check::ok("bridge", name, found)
}

fn nat(node: &Node, host: &Host) -> Check {
    let table = format!("ip {NAT_TABLE}");
    let (subject, file) = (format!("table {table}"), host.bridge.nat().display().to_string());
    let is_loaded = node.tables.as_ref().map(|tables| tables.contains(&table));
    match (is_loaded, node.bridge.has_nat) {
        (None, _) => unlisted("nat", subject),
        (Some(true), true) => Check::ok("nat", subject, "loaded"),
        (Some(true), false) => {
            let found =
                format!("loaded, but {file} is missing, by which the node's next start loads it");
            Check::warning("nat", subject, found, INIT)
        }
        (Some(false), has_file) => {
            let found = "not loaded: sandboxes have no way out";
            let remedy = if has_file { format!("nft -f {file}") } else { INIT.to_owned() };
            Check::failed("nat", subject, found, remedy)
        }
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
    let answer = node.bridge.name_server?;
    if !node.bridge.has_dns {
        let file = host.bridge.dns().display().to_string();
        return match answer {
            // The operator has put another in its place.
            NameServer::Other => None,
            NameServer::Ours => {
                let found = format!("it answers, but {file} is missing: it cannot start again");
                Some(Check::warning("name-server", subject, found, INIT))
            }
            NameServer::Silent => {
                let found = format!("{file} is missing: sandboxes cannot resolve names");
                Some(Check::failed("name-server", subject, found, INIT))
            }
        };
    }
    Some(match answer {
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
