//! Judges PVE's own firewall of this node: whether it lets in what the sandboxes, the controller and the other nodes send to
//! this host. Pure.

use std::{collections::BTreeSet, net::SocketAddr, path::Path};

use daemon::doctor::Check;
use ipnet::{IpNet, Ipv4Net};

use super::facts::Node;
use crate::{
    config::Config,
    firewall::RESOLVER_PORT,
    pve::{
        Cluster,
        host_firewall::{Accept, HostFirewall, Protocol},
        pmxcfs,
    },
    sandbox::Dhcp,
};

const NAME: &str = "firewall";
/// Port of a name server.
const DNS: u16 = 53;
/// Port of a DHCP server.
const DHCP: u16 = 67;

/// Network of the sandboxes, of which this node is the gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sandboxes {
    bridge: String,
    network: Ipv4Net,
}

impl Sandboxes {
    /// Returns true when a rule is for what they send.
    fn are_in(&self, rule: &Accept) -> bool {
        let network = IpNet::V4(self.network);
        rule.interface.as_ref().is_none_or(|interface| *interface == self.bridge)
            && rule
                .sources
                .as_ref()
                .is_none_or(|all| all.iter().any(|some| some.contains(&network)))
    }

    /// Returns true when a rule is for what they send, and for nothing else.
    fn are_all_of(&self, rule: &Accept) -> bool {
        let network = IpNet::V4(self.network);
        rule.interface.as_ref().is_some_and(|interface| *interface == self.bridge)
            || rule
                .sources
                .as_ref()
                .is_some_and(|all| all.iter().all(|some| network.contains(some)))
    }
}

/// Ports of this host that somebody must reach.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Opening {
    /// The caller, and its purpose.
    who: &'static str,
    protocol: Protocol,
    ports: BTreeSet<u16>,
    /// Whether sandboxes connect, and nobody else.
    is_for_sandboxes: bool,
}

impl Opening {
    /// Returns what a firewall keeps closed of it.
    fn closed_by(mut self, firewall: &HostFirewall, sandboxes: Option<&Sandboxes>) -> Option<Self> {
        let counts = |rule: &Accept| match sandboxes {
            Some(sandboxes) if self.is_for_sandboxes => sandboxes.are_in(rule),
            Some(sandboxes) => !sandboxes.are_all_of(rule),
            None => true,
        };
        self.ports.retain(|port| !firewall.accepting(self.protocol, *port).any(counts));
        (!self.ports.is_empty()).then_some(self)
    }

    fn listed(&self, between: &str) -> String {
        self.ports.iter().map(u16::to_string).collect::<Vec<_>>().join(between)
    }

    /// Returns the rule that opens it.
    fn rule(&self, sandboxes: Option<&Sandboxes>) -> String {
        let own = sandboxes.filter(|_| self.is_for_sandboxes);
        let interface = own.map(|own| format!(" -i {}", own.bridge)).unwrap_or_default();
        let (protocol, ports) = (self.protocol.name(), self.listed(","));
        format!("IN ACCEPT{interface} -p {protocol} -dport {ports}")
    }
}

pub(super) fn check(config: &Config, node: &Node, cluster: &Cluster) -> Option<Check> {
    // Off, as PVE has it unless somebody switches it on.
    if !node.firewall.drops() {
        return None;
    }
    let network = &config.network;
    let is_gateway = network.own.contains(&network.gateway);
    let sandboxes = Ipv4Net::new(network.gateway, network.prefix).ok().filter(|_| is_gateway);
    let sandboxes =
        sandboxes.map(|net| Sandboxes { bridge: network.bridge.clone(), network: net.trunc() });
    let mut openings = outer(config, node, cluster);
    if sandboxes.is_some() {
        openings.extend(inner(config));
    }
    let file = config.pve.root.join(pmxcfs::host_firewall(&config.node.value));
    Some(judge(&node.firewall, sandboxes.as_ref(), openings, &file))
}

/// Judges the firewall. `file`: where rules of this node go.
fn judge(
    firewall: &HostFirewall,
    sandboxes: Option<&Sandboxes>,
    openings: Vec<Opening>,
    file: &Path,
) -> Check {
    let closed = openings.into_iter().filter_map(|opening| opening.closed_by(firewall, sandboxes));
    let closed: Vec<_> = closed.collect();
    if closed.is_empty() {
        return Check::ok(NAME, "PVE's own", "it is on, and lets in what this node needs");
    }
    let shown = closed
        .iter()
        .map(|one| format!("{} {} ({})", one.protocol.name(), one.listed(", "), one.who));
    let shown: Vec<_> = shown.collect();
    let found = format!("it is on, and no rule of it lets in {}", shown.join("; "));
    let rules: Vec<_> = closed.iter().map(|one| one.rule(sandboxes)).collect();
    let remedy = format!(
        "add below [RULES] in {} (docs/install.md, Ports): {}",
        file.display(),
        rules.join("; ")
    );
    Check::warning(NAME, "PVE's own", found, remedy)
}

/// Lists what sandboxes ask this host, their gateway, for.
fn inner(config: &Config) -> Vec<Opening> {
    let network = &config.network;
    let opening = |who, protocol, ports: BTreeSet<u16>| Opening {
        who,
        protocol,
        ports,
        is_for_sandboxes: true,
    };
    // Questions of sandboxes with an allow-list are led to the resolver.
    let names = BTreeSet::from([DNS]);
    let names: BTreeSet<u16> =
        names.into_iter().chain(config.isolation.enabled.then_some(RESOLVER_PORT)).collect();
    let who = "sandboxes, for names";
    let mut all =
        vec![opening(who, Protocol::Udp, names.clone()), opening(who, Protocol::Tcp, names)];
    if network.dhcp != Dhcp::Refused && network.own.contains(&network.dhcp_server) {
        all.push(opening("sandboxes, for their address", Protocol::Udp, [DHCP].into()));
    }
    all
}

/// Lists what others than sandboxes connect to.
fn outer(config: &Config, node: &Node, cluster: &Cluster) -> Vec<Opening> {
    let ingress = &config.ingress;
    let mut all = vec![opening("the controller, to the agent", [config.listen.value])];
    if ingress.domain.is_some() {
        let peer = ingress.peer.filter(|_| cluster.members.len() > 1);
        all.push(opening("the Caddys of the other nodes", peer));
        let own = ingress.certificate.iter();
        let own = own.flat_map(|own| own.listen.iter().copied().chain(own.redirects()));
        all.push(opening("clients of web pages", ingress.public.iter().copied().chain(own)));
    }
    let controller = node.controller.iter().copied();
    all.push(opening("callers and nodes, to the controller on this host", controller));
    all.into_iter().flatten().collect()
}

/// Returns what has to be open for these listen addresses; `None` when only this host reaches them.
fn opening(who: &'static str, listen: impl IntoIterator<Item = SocketAddr>) -> Option<Opening> {
    let reached = listen.into_iter().filter(|address| !address.ip().is_loopback());
    let ports: BTreeSet<u16> = reached.map(|address| address.port()).collect();
    let opening = Opening { who, protocol: Protocol::Tcp, ports, is_for_sandboxes: false };
    (!opening.ports.is_empty()).then_some(opening)
}

#[cfg(test)]
mod tests {
    use daemon::doctor::State;

    use super::*;

    const ON: &str = "[OPTIONS]\nenable: 1\n";

    fn sandboxes() -> Sandboxes {
        Sandboxes {
            bridge: "vmbr1".to_owned(),
            network: "10.100.1.0/24".parse().expect("a network"),
        }
    }

    fn openings() -> Vec<Opening> {
        let names = |protocol| Opening {
            who: "sandboxes, for names",
            protocol,
            ports: [53, 10_053].into(),
            is_for_sandboxes: true,
        };
        let agent = opening("the controller, to the agent", ["0.0.0.0:7445".parse().expect("one")]);
        let hop = opening("the Caddys", ["10.0.0.1:8481".parse().expect("one")]);
        let mut all = vec![names(Protocol::Udp), names(Protocol::Tcp)];
        all.extend(agent.into_iter().chain(hop));
        all
    }

    /// Judges a node with these rules.
    fn judged(rules: &str) -> Check {
        let firewall = HostFirewall::parse(ON, &format!("[RULES]\n{rules}\n"));
        let file = Path::new("/etc/pve/nodes/n1/host.fw");
        judge(&firewall, Some(&sandboxes()), openings(), file)
    }

    /// Returns the rules that the remedy adds.
    fn added(check: &Check) -> String {
        let remedy = check.remedy.as_deref().unwrap_or_default();
        let (place, rules) = remedy.split_once("): ").expect("a place, and rules");
        assert!(place.contains("/etc/pve/nodes/n1/host.fw"), "{place}");
        rules.replace("; ", "\n")
    }

    #[test]
    fn closed_ports_are_told_with_who_connects_and_the_rules_of_the_remedy_open_them() {
        let found = judged("");
        assert_eq!((found.name, found.state), ("firewall", State::Warning));
        for part in [
            "udp 53, 10053 (sandboxes, for names)",
            "tcp 53, 10053 (sandboxes, for names)",
            "tcp 7445 (the controller, to the agent)",
            "tcp 8481 (the Caddys)",
        ] {
            assert!(found.found.contains(part), "{part}: {found:?}");
        }
        assert_eq!(
            added(&found),
            "IN ACCEPT -i vmbr1 -p udp -dport 53,10053\n\
             IN ACCEPT -i vmbr1 -p tcp -dport 53,10053\n\
             IN ACCEPT -p tcp -dport 7445\n\
             IN ACCEPT -p tcp -dport 8481"
        );
        assert_eq!(judged(&added(&found)).state, State::Ok);
    }

    #[test]
    fn rules_of_the_operators_own_count_where_they_let_in_who_connects() {
        let agent = "IN ACCEPT -source 192.0.2.1 -p tcp -dport 7445\n";
        let hop = "IN ACCEPT -source +nodes -p tcp -dport 8481\n";
        let names = "IN DNS(ACCEPT) -i vmbr1\nIN ACCEPT -source 10.100.0.0/16 -dport 10053\n";
        assert_eq!(judged(&format!("{agent}{hop}{names}")).state, State::Ok);
        // Without one of them, only that is closed.
        let closed = added(&judged(&format!("{agent}{hop}IN DNS(ACCEPT)\n")));
        assert_eq!(
            closed,
            "IN ACCEPT -i vmbr1 -p udp -dport 10053\nIN ACCEPT -i vmbr1 -p tcp -dport 10053"
        );
        // All that the sandboxes send, and nothing of others; and the other way round.
        for all in ["IN ACCEPT -i vmbr1", "IN ACCEPT -source 10.100.1.0/24"] {
            let closed = added(&judged(all));
            assert_eq!(closed, "IN ACCEPT -p tcp -dport 7445\nIN ACCEPT -p tcp -dport 8481");
        }
        for others in ["IN ACCEPT -i vmbr0", "IN ACCEPT -source 192.0.2.0/24"] {
            let closed = added(&judged(others));
            assert!(!closed.contains("7445") && closed.lines().count() == 2, "{closed}");
        }
    }

    #[test]
    fn address_that_only_this_host_reaches_needs_no_rule() {
        let of = |listen: &str| opening("x", [listen.parse().expect("an address")]);
        assert_eq!(of("127.0.0.1:8480"), None);
        assert_eq!(of("[::1]:8480"), None);
        assert!(of("0.0.0.0:8480").is_some());
        assert_eq!(opening("x", None), None);
    }
}
