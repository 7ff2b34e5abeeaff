//! PVE's own firewall of a node, by its files `cluster.fw` and `host.fw`: whether it drops what no rule accepts, and which
//! rules accept something. Pure.
//!
//! What the files name is not looked up: a rule for the networks of a name counts, and of PVE's macros those are known that
//! matter to sandboxes. Of the names in `/etc/services` that a rule may have as a port, those of `SERVICES` are known; a
//! rule with another one counts for nothing.

use std::{collections::BTreeMap, net::IpAddr, ops::RangeInclusive};

use ipnet::IpNet;

/// Names and numbers of the ports that matter to sandboxes, as in `/etc/services`.
const SERVICES: [(&str, u16); 4] = [("domain", 53), ("bootps", 67), ("http", 80), ("https", 443)];

/// Protocol of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    /// Returns the name in a rule.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "tcp" | "6" => Some(Self::Tcp),
            "udp" | "17" => Some(Self::Udp),
            _ => None,
        }
    }
}

/// Rule that accepts what comes in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accept {
    /// Protocol; `None`: any.
    protocol: Option<Protocol>,
    /// Ports; `None`: all.
    ports: Option<Vec<RangeInclusive<u16>>>,
    /// Interface that it comes in by; `None`: any.
    pub interface: Option<String>,
    /// Networks that it comes from; `None`: any, or those of a name.
    pub sources: Option<Vec<IpNet>>,
}

impl Accept {
    /// Reads the action and the options of a rule; `None` when it accepts nothing, or only a part that is of no use here.
    fn parse(action: &str, options: &[&str]) -> Option<Self> {
        let (protocol, port) = match action.to_ascii_uppercase().as_str() {
            "ACCEPT" => (None, None),
            "DNS(ACCEPT)" => (None, Some(53)),
            "HTTP(ACCEPT)" => (Some(Protocol::Tcp), Some(80)),
            "HTTPS(ACCEPT)" => (Some(Protocol::Tcp), Some(443)),
            _ => return None,
        };
        let ports = port.map(|port| vec![port..=port]);
        let mut accept = Self { protocol, ports, interface: None, sources: None };
        for option in options.chunks(2) {
            let [key, value] = option else { return None };
            match key.trim_start_matches('-') {
                "i" | "iface" => accept.interface = Some((*value).to_owned()),
                "p" | "proto" => accept.protocol = Some(Protocol::parse(value)?),
                "dport" => accept.ports = Some(ports_in(value)?),
                "source" => accept.sources = networks_in(value),
                "dest" | "log" => {}
                _ => return None,
            }
        }
        Some(accept)
    }

    fn is_for(&self, protocol: Protocol, port: u16) -> bool {
        let has = |ports: &Vec<RangeInclusive<u16>>| ports.iter().any(|some| some.contains(&port));
        self.protocol.is_none_or(|own| own == protocol) && self.ports.as_ref().is_none_or(has)
    }
}

/// Reads ports: numbers, ranges and names such as `53,8000:8010,https`.
fn ports_in(text: &str) -> Option<Vec<RangeInclusive<u16>>> {
    let range = |text: &str| {
        if let Some((_, port)) = SERVICES.iter().find(|(name, _)| *name == text) {
            return Some(*port..=*port);
        }
        let (first, last) = text.split_once(':').unwrap_or((text, text));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    text.split(',').map(range).collect()
}

/// Reads addresses and networks; `None` when one of them is a name, or a range.
fn networks_in(text: &str) -> Option<Vec<IpNet>> {
    let network = |text: &str| {
        let address = || text.parse::<IpAddr>().ok().map(IpNet::from);
        text.parse().ok().or_else(address)
    };
    text.split(',').map(network).collect()
}

/// Rule of a file.
enum Rule {
    Accept(Accept),
    /// All rules of a group of `cluster.fw`, for one interface or for all.
    Group {
        name: String,
        interface: Option<String>,
    },
}

impl Rule {
    /// Reads a line; `None` when it accepts nothing that comes in. A rule that is switched off begins with `|`.
    fn parse(line: &str) -> Option<Self> {
        let line = line.split('#').next().unwrap_or_default();
        let words: Vec<_> = line.split_whitespace().collect();
        let [kind, action, options @ ..] = words.as_slice() else { return None };
        match kind.to_ascii_lowercase().as_str() {
            "in" => Accept::parse(action, options).map(Self::Accept),
            "group" => {
                let interface = match options {
                    ["-i", interface] => Some((*interface).to_owned()),
                    _ => None,
                };
                Some(Self::Group { name: action.to_ascii_lowercase(), interface })
            }
            _ => None,
        }
    }

    /// Returns the rules that it stands for.
    fn expand(self, groups: &BTreeMap<String, Vec<Accept>>) -> Vec<Accept> {
        match self {
            Self::Accept(accept) => vec![accept],
            Self::Group { name, interface } => {
                let of_group = groups.get(&name).into_iter().flatten().cloned();
                let on = |accept: Accept| Accept {
                    interface: interface.clone().or(accept.interface),
                    ..accept
                };
                of_group.map(on).collect()
            }
        }
    }
}

/// Section of a file.
enum Section {
    Options,
    Rules,
    Group(String),
    Other,
}

impl Section {
    /// Reads a head line, without its brackets.
    fn parse(head: &str) -> Self {
        let head = head.trim().to_ascii_lowercase();
        match (head.as_str(), head.strip_prefix("group ")) {
            ("options", _) => Self::Options,
            ("rules", _) => Self::Rules,
            (_, Some(name)) => Self::Group(name.trim().to_owned()),
            (_, None) => Self::Other,
        }
    }
}

/// Content of a file.
#[derive(Default)]
struct Content {
    options: BTreeMap<String, String>,
    rules: Vec<Rule>,
    groups: BTreeMap<String, Vec<Accept>>,
}

impl Content {
    /// Reads a file. A section may be there more than once.
    fn parse(text: &str) -> Self {
        let (mut content, mut section) = (Self::default(), Section::Other);
        for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
            if let Some(head) = line.strip_prefix('[') {
                section = Section::parse(head.split(']').next().unwrap_or_default());
                continue;
            }
            match &section {
                Section::Options => {
                    if let Some((key, value)) = line.split_once(':') {
                        let (key, value) = (key.trim(), value.trim());
                        content.options.insert(key.to_ascii_lowercase(), value.to_owned());
                    }
                }
                Section::Rules => content.rules.extend(Rule::parse(line)),
                Section::Group(name) => {
                    if let Some(Rule::Accept(accept)) = Rule::parse(line) {
                        content.groups.entry(name.clone()).or_default().push(accept);
                    }
                }
                Section::Other => {}
            }
        }
        content
    }

    fn option(&self, key: &str) -> Option<&str> {
        self.options.get(key).map(String::as_str)
    }
}

/// PVE's own firewall of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostFirewall {
    drops: bool,
    accepts: Vec<Accept>,
}

impl HostFirewall {
    /// Reads the files of the cluster and of the node; empty where one is missing.
    pub fn parse(cluster: &str, host: &str) -> Self {
        let (cluster, host) = (Content::parse(cluster), Content::parse(host));
        // The cluster's is off unless it is on, and the node's on unless it is off.
        let is_on = cluster.option("enable") == Some("1") && host.option("enable") != Some("0");
        let policy = cluster.option("policy_in");
        let is_open = policy.is_some_and(|policy| policy.eq_ignore_ascii_case("ACCEPT"));
        let rules = host.rules.into_iter().chain(cluster.rules);
        Self {
            drops: is_on && !is_open,
            accepts: rules.flat_map(|rule| rule.expand(&cluster.groups)).collect(),
        }
    }

    /// Returns true when it is on, and drops what no rule accepts.
    pub fn drops(&self) -> bool {
        self.drops
    }

    /// Lists the rules that accept what comes in at a port, from somewhere.
    pub fn accepting(&self, protocol: Protocol, port: u16) -> impl Iterator<Item = &Accept> {
        self.accepts.iter().filter(move |accept| accept.is_for(protocol, port))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firewall_is_on_where_the_cluster_says_so_and_the_node_does_not_say_otherwise() {
        let drops = |cluster: &str, host: &str| HostFirewall::parse(cluster, host).drops();
        let on = "[OPTIONS]\n\nenable: 1\n";
        assert!(drops(on, ""));
        assert!(drops(
            "# a comment\n[options]\nebtables: 0\n enable:1 \n",
            "[OPTIONS]\nenable: 1\n"
        ));
        assert!(drops("[OPTIONS]\npolicy_in: REJECT\nenable: 1\n", ""));
        assert!(!drops("", ""));
        assert!(!drops("[OPTIONS]\nenable: 0\n", "[OPTIONS]\nenable: 1\n"));
        assert!(!drops(on, "[OPTIONS]\nenable: 0\n"));
        assert!(!drops("[OPTIONS]\nenable: 1\npolicy_in: ACCEPT\n", ""));
        assert!(!drops("enable: 1\n[RULES]\nenable: 1\n", ""), "elsewhere it is no option");
        // A time until which it is on for a trial, which is over.
        assert!(!drops("[OPTIONS]\nenable: 1700000000\n", ""));
    }

    /// Counts the rules that accept TCP at this port.
    fn accepting(cluster: &str, host: &str, port: u16) -> usize {
        HostFirewall::parse(cluster, host).accepting(Protocol::Tcp, port).count()
    }

    #[test]
    fn rules_accept_their_ports_and_no_others() {
        for (rule, port, expected) in [
            ("IN ACCEPT -p tcp -dport 7445", 7445, 1),
            ("IN ACCEPT -p tcp -dport 7445", 7446, 0),
            ("in ACCEPT --proto tcp --dport 53,7440:7450 -log nolog # why", 7445, 1),
            ("IN ACCEPT -source 10.0.0.0/8", 7445, 1),
            ("IN DNS(ACCEPT) -i vmbr1", 53, 1),
            ("IN HTTPS(ACCEPT)", 443, 1),
            ("IN SSH(ACCEPT)", 7445, 0),
            ("|IN ACCEPT -p tcp -dport 7445", 7445, 0),
            ("OUT ACCEPT -p tcp -dport 7445", 7445, 0),
            ("IN DROP -p tcp -dport 7445", 7445, 0),
            ("IN ACCEPT -p udp -dport 7445", 7445, 0),
            ("IN ACCEPT -p tcp -dport 7445 -sport 1", 7445, 0),
            ("IN ACCEPT -p tcp -dport", 7445, 0),
            ("IN", 7445, 0),
            ("# IN ACCEPT", 7445, 0),
        ] {
            let text = format!("[OPTIONS]\nenable: 1\n\n[RULES]\n\n{rule}\n");
            assert_eq!(accepting(&text, "", port), expected, "{rule}");
            assert_eq!(accepting("", &text, port), expected, "of the node: {rule}");
        }
        let twice = "[RULES]\nIN ACCEPT -p tcp -dport 1\n[RULES]\nIN ACCEPT -p tcp -dport 2\n";
        assert_eq!((accepting("", twice, 1), accepting("", twice, 2)), (1, 1));
        assert_eq!(accepting("[IPSET a]\nIN ACCEPT\n", "", 1), 0, "no rule");
    }

    #[test]
    fn ports_are_known_by_the_names_that_matter_to_sandboxes() {
        for (ports, port, expected) in [
            ("domain", 53, 1),
            ("bootps", 67, 1),
            ("http", 80, 1),
            ("http", 443, 0),
            ("7445,https", 443, 1),
            ("https,8000:8010", 8005, 1),
            ("domain:http", 53, 0),
            ("ssh", 22, 0),
        ] {
            let host = format!("[RULES]\nIN ACCEPT -p tcp -dport {ports}\n");
            assert_eq!(accepting("", &host, port), expected, "{ports}");
        }
    }

    #[test]
    fn rule_of_a_group_counts_where_the_group_is_used() {
        let cluster = "[RULES]\nGROUP other\n[group Ours] # agent\nIN ACCEPT -p tcp -dport 7445\n";
        assert_eq!(accepting(cluster, "", 7445), 0);
        let host = "[RULES]\nGROUP ours -i vmbr0\n";
        let firewall = HostFirewall::parse(cluster, host);
        let found: Vec<_> = firewall.accepting(Protocol::Tcp, 7445).collect();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].interface.as_deref(), Some("vmbr0"));
    }

    #[test]
    fn source_of_a_rule_is_known_unless_it_has_a_name() {
        let source = |rule: &str| {
            let firewall = HostFirewall::parse("", &format!("[RULES]\nIN ACCEPT -source {rule}\n"));
            let found: Vec<_> = firewall.accepting(Protocol::Udp, 53).collect();
            found[0].sources.clone().map(|all| all.iter().map(IpNet::to_string).collect::<Vec<_>>())
        };
        let known = source("10.0.0.0/8,192.0.2.1").expect("known");
        assert_eq!(known, ["10.0.0.0/8", "192.0.2.1/32"]);
        assert_eq!(source("+management"), None);
        assert_eq!(source("10.0.0.1-10.0.0.9"), None);
    }
}
