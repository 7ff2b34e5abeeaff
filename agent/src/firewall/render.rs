//! Text of the rules for `nft -f -`. Pure.
//!
//! Two tables; `names` has two more. `bridge` sees every frame of a sandbox's port: what it may send as (MAC, ARP, address,
//! DHCP), and where a frame may go that leaves by another port. `inet` sees what the host would take
//! or route: there connections that the host opened into a sandbox are told from the sandbox's own. A
//! bridge hands some frames (to LLDP's address) to the host as if its port were no port: none of them is
//! a sandbox's to send.
//! Sandboxes are elements of sets, so a change is one small transaction.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{Display, Write as _},
};

use proto::spec::Egress;

use super::{Entry, Grounds, Rules, firewall_bridge, ports};

/// Name of our tables; nobody else's are touched.
pub const TABLE: &str = "pve_sandbox";

/// Families of our tables.
pub const FAMILIES: [&str; 2] = ["bridge", "inet"];

/// Set of a table: family, name, and what its elements are.
type Set = (&'static str, &'static str, &'static str);

/// Offset and length of `chaddr` in a DHCP message behind its UDP header, in bits: the hardware
/// address that the client claims.
const CHADDR: &str = "@th,288,48";

const PORTS: Set = ("bridge", "ports", "type ifname");
const BOUND: Set = ("bridge", "bound", "type ifname . ether_addr . ipv4_addr");
const DHCP: Set = ("bridge", "dhcp_clients", "typeof iifname . ether saddr . @th,288,48");
const ROUTERS: Set = ("bridge", "routers", "type ipv4_addr");
const CLOSED_PORTS: Set = ("bridge", "closed_egress", "type ifname");
const HOST_PORTS: Set = ("inet", "ports", "type ifname");
/// Frames of the host on the last part of their way to a sandbox, behind the bridge of PVE's firewall. With
/// `bridge-nf-call-iptables`, which that firewall switches on, the kernel shows them to `inet` once more, as
/// if they had come from outside. A frame for the sandbox's own MAC is bridged, and never the host's to route.
const BEHIND: Set = ("inet", "behind_firewall", "type ifname . ether_addr . ipv4_addr");
const ADDRESSES: Set = ("inet", "addresses", "type ipv4_addr");
const CLOSED_ADDRESSES: Set = ("inet", "closed_egress", "type ipv4_addr");
const SETS: [Set; 9] =
    [PORTS, BOUND, DHCP, ROUTERS, CLOSED_PORTS, HOST_PORTS, BEHIND, ADDRESSES, CLOSED_ADDRESSES];

/// Elements of each set.
type Elements = BTreeMap<Set, BTreeSet<String>>;

/// Returns the transaction that replaces our tables by these rules.
pub fn whole(rules: &Rules) -> String {
    let mut text = String::new();
    for family in FAMILIES {
        // Deleting a table that does not exist is an error; declaring one that does is none.
        let _infallible = write!(text, "table {family} {TABLE}\ndelete table {family} {TABLE}\n");
    }
    let elements = elements(rules);
    for (family, chains) in
        [("bridge", bridge_chains(&rules.grounds)), ("inet", inet_chains(&rules.grounds))]
    {
        let _infallible = writeln!(text, "table {family} {TABLE} {{");
        for set in SETS.iter().filter(|(of, ..)| *of == family) {
            let (_, name, kind) = set;
            let _infallible = writeln!(text, "\tset {name} {{\n\t\t{kind}");
            if let Some(elements) = elements.get(set) {
                let _infallible = writeln!(text, "\t\telements = {{ {} }}", list(elements));
            }
            text.push_str("\t}\n");
        }
        text.push_str(&fixed(&rules.grounds));
        text.push_str(&chains);
        if family == "inet" {
            text.push_str(&counting(&rules.grounds));
        }
        text.push_str("}\n");
    }
    text
}

/// Returns a transaction that only a kernel that can count connections takes. Not to be applied.
pub fn counting_probe() -> String {
    let rule = counted("0.0.0.0/0", 1);
    format!(
        "table inet {TABLE}_probe {{\n{COUNTED_SET}\tchain {COUNTED} {{\n\t\t{COUNTED_HOOK}\n\t\t{rule}\n\t}}\n}}\n"
    )
}

/// Returns the transaction from the first rules to the second, empty when nothing of the tables
/// changes; `None` when only a replacement does it.
pub fn change(old: &Rules, new: &Rules) -> Option<String> {
    if old.grounds != new.grounds {
        return None;
    }
    let (old, new) = (elements(old), elements(new));
    let none = BTreeSet::new();
    let mut text = String::new();
    for set in SETS {
        let (family, name, _) = set;
        let (was, is) = (old.get(&set).unwrap_or(&none), new.get(&set).unwrap_or(&none));
        for (word, elements) in [("delete", was - is), ("add", is - was)] {
            if !elements.is_empty() {
                let elements = list(&elements);
                let _infallible =
                    writeln!(text, "{word} element {family} {TABLE} {name} {{ {elements} }}");
            }
        }
    }
    Some(text)
}

fn elements(rules: &Rules) -> Elements {
    let mut elements = Elements::new();
    let mut add = |set, element| elements.entry(set).or_default().insert(element);
    let Grounds { gateway, name_servers, dhcp_server, .. } = &rules.grounds;
    let routers = name_servers.iter().chain([gateway]).chain(dhcp_server).chain(&rules.routers);
    for router in routers {
        add(ROUTERS, router.to_string());
    }
    for (vmid, entry) in &rules.sandboxes {
        let Entry { mac, ip, dhcp, ref egress } = *entry;
        for port in ports(*vmid) {
            add(PORTS, format!("{port:?}"));
            add(HOST_PORTS, format!("{port:?}"));
            if *egress == Egress::None {
                add(CLOSED_PORTS, format!("{port:?}"));
            }
            let Some(mac) = mac else { continue };
            let bytes = mac.map(|byte| format!("{byte:02x}"));
            if let Some(ip) = ip {
                add(BOUND, format!("{port:?} . {} . {ip}", bytes.join(":")));
            }
            if dhcp {
                add(DHCP, format!("{port:?} . {} . 0x{}", bytes.join(":"), bytes.concat()));
            }
        }
        if let (Some(mac), Some(ip)) = (mac, ip) {
            let (bridge, bytes) = (firewall_bridge(*vmid), mac.map(|byte| format!("{byte:02x}")));
            add(BEHIND, format!("{bridge:?} . {} . {ip}", bytes.join(":")));
        }
        if let Some(ip) = ip {
            add(ADDRESSES, ip.to_string());
            if *egress == Egress::None {
                add(CLOSED_ADDRESSES, ip.to_string());
            }
        }
    }
    elements
}

/// Returns the sets that depend on the node alone; both tables have them.
fn fixed(grounds: &Grounds) -> String {
    let set = |name: &str, kind: &str, elements: String| {
        let elements = if elements.is_empty() {
            String::new()
        } else {
            format!("\t\telements = {{ {elements} }}\n")
        };
        format!("\tset {name} {{\n\t\ttype ipv4_addr\n{kind}{elements}\t}}\n")
    };
    let flags = "\t\tflags interval\n";
    [
        set("name_servers", "", list(&grounds.name_servers)),
        set("reach", flags, list(grounds.all_reach())),
        set("closed", flags, list(grounds.all_closed())),
    ]
    .concat()
}

/// Set of the sandboxes' addresses with their connections, and the chain that adds to it.
pub(super) const COUNTED: &str = "connections";
/// Set of the sandboxes' addresses with the rate of their new connections.
pub(super) const ARRIVALS: &str = "arrivals";
/// The kernel adds elements, and removes them with the last connection of an address or after a minute
/// without a new one. The size is that of the largest pool.
const COUNTED_SET: &str = "\tset connections {\n\t\ttype ipv4_addr\n\t\tsize 65535\n\t\tflags dynamic\n\t}\n\
     \tset arrivals {\n\t\ttype ipv4_addr\n\t\tsize 65535\n\t\tflags dynamic,timeout\n\t\ttimeout 1m\n\t}\n";
/// Behind the chain that drops: what goes nowhere is not tracked for long.
const COUNTED_HOOK: &str = "type filter hook prerouting priority -140; policy accept;";

/// Set of the sandboxes' addresses with the rate of their questions for names.
pub(super) const QUESTIONS: &str = "questions";
/// Rate of a sandbox's questions for names, in packets. A question that no server answers keeps one of the 10,000
/// places of the bridge's name server (bridge/render.rs) for 10 s, so one sandbox keeps 2,400 at most. What
/// programs ask at once fits: the libc asks twice for a name, so 200 names at once, and 100 more each second.
const QUESTION_RATE: &str = "limit rate over 200/second burst 400 packets";

/// Returns the set of [`question_rate`].
pub(super) fn question_set() -> String {
    format!(
        "\tset {QUESTIONS} {{\n\t\ttype ipv4_addr\n\t\tsize 65535\n\t\tflags dynamic,timeout\n\t\ttimeout 1m\n\t}}\n"
    )
}

/// Drops what a sandbox asks too fast.
pub(super) fn question_rate() -> String {
    format!("update @{QUESTIONS} {{ ip saddr {QUESTION_RATE} }} drop")
}

/// Set of the sandboxes' addresses with their connections to name servers.
pub(super) const NAME_CONNECTIONS: &str = "name_connections";

/// Returns the set of [`name_connections`], where there is that limit.
pub(super) fn name_connection_set(grounds: &Grounds) -> String {
    let set = "type ipv4_addr\n\t\tsize 65535\n\t\tflags dynamic";
    grounds
        .name_connections
        .map_or_else(String::new, |_| format!("\tset {NAME_CONNECTIONS} {{\n\t\t{set}\n\t}}\n"))
}

/// Returns the rule that drops one connection too many to name servers, which are `to`, if there is that limit. A
/// connection that asks nothing keeps one of the few that a name server has for all.
pub(super) fn name_connections(grounds: &Grounds, to: &str) -> String {
    grounds.name_connections.map_or_else(String::new, |max| {
        format!(
            "\t\t{to} {FIRST} add @{NAME_CONNECTIONS} {{ ip saddr ct count over {max} }} drop\n"
        )
    })
}

/// Selects the first packet of a connection. Only this one counts: the kernel would count each further one again until there is
/// a reply.
const FIRST: &str = "ct state new ct status & confirmed == 0";

/// Returns the set and the chain that bound what the host tracks for a sandbox: its table of
/// connections is shared by all. Replies, and connections into a sandbox, are the host's.
fn counting(grounds: &Grounds) -> String {
    grounds.connections.map_or_else(String::new, |max| {
        let rule = counted("@addresses", max);
        format!("{COUNTED_SET}\tchain {COUNTED} {{\n\t\t{COUNTED_HOOK}\n\t\t{rule}\n\t}}\n")
    })
}

/// The kernel looks at its list for each connection, and cleans it up at a bounded speed, so a rate comes first.
fn counted(from: &str, max: u32) -> String {
    let first = format!("iifname != \"lo\" ip saddr {from} {FIRST}");
    format!(
        "{first} update @{ARRIVALS} {{ ip saddr limit rate over 1000/second burst 4096 packets }} drop\n\t\t\
         {first} add @{COUNTED} {{ ip saddr ct count over {max} }} drop"
    )
}

fn bridge_chains(grounds: &Grounds) -> String {
    let (gateway, dhcp) = (grounds.gateway, dhcp(grounds));
    // With its lease a client asks the server, and towards its end everybody.
    let renewal = grounds.dhcp_server.map_or_else(String::new, |server| {
        format!(
            "\t\tudp sport 68 udp dport 67 ip daddr {{ {server}, 255.255.255.255 }} iifname . ether saddr . ip \
             saddr @bound iifname . ether saddr . {CHADDR} @dhcp_clients accept\n"
        )
    });
    format!(
        "\tchain arriving {{
		type filter hook prerouting priority -300; policy accept;
		iifname @ports jump source
	}}
	chain source {{
		ether type != {{ arp, ip }} drop
		arp htype 1 arp ptype 0x0800 arp hlen 6 arp plen 4 iifname . ether saddr . arp saddr ip @bound iifname . arp saddr ether . arp saddr ip @bound accept
		ether type != ip drop
		udp sport 67 drop
		ip protocol igmp drop
		ip daddr 224.0.0.0/4 drop
		udp sport 68 udp dport 67 ip saddr 0.0.0.0 ip daddr 255.255.255.255 iifname . ether saddr . {CHADDR} @dhcp_clients accept
{renewal}		udp dport 67 drop
		iifname . ether saddr . ip saddr @bound accept
		drop
	}}
	chain reserved {{
		type filter hook input priority -300; policy accept;
		iifname @ports ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00 drop
	}}
	chain crossing {{
		type filter hook forward priority -200; policy accept;
		iifname @ports jump destination
	}}
	chain destination {{
		oifname \"fwln*\" accept
		oifname @ports drop
		meta protocol arp arp daddr ip @routers accept
		meta protocol arp arp daddr ip @reach accept
		meta protocol != ip drop
{dhcp}		iifname @closed_egress drop
		ip daddr {gateway} icmp type echo-request accept
		ip daddr @name_servers meta l4proto {{ tcp, udp }} th dport 53 accept
		ip daddr @reach accept
		ip daddr @closed drop
	}}
"
    )
}

/// Selects what a sandbox answers on a connection that somebody else opened. No error by ICMP is among it (`related`):
/// root in a sandbox can send one about any connection that the host tracks, and so to whoever opened that one. Errors
/// on the way to a sandbox pass: they are not new, and come from no sandbox.
pub(super) const REPLY: &str = "ct state established ct direction reply";

fn inet_chains(grounds: &Grounds) -> String {
    let (gateway, dhcp) = (grounds.gateway, dhcp(grounds));
    let (questions, too_fast) = (question_set() + &name_connection_set(grounds), question_rate());
    let too_many = name_connections(grounds, "ip daddr @name_servers tcp dport 53");
    format!(
        "{questions}\tchain past_the_bridge {{
		type filter hook prerouting priority -310; policy accept;
		iifname @ports drop
	}}
	chain arriving {{
		type filter hook prerouting priority -150; policy accept;
		iifname . ether daddr . ip daddr @behind_firewall ip saddr != @addresses accept
		iifname != \"lo\" ip daddr @addresses ct state new drop
		iifname != \"lo\" ip saddr @addresses jump destination
	}}
	chain destination {{
		ip daddr @addresses drop
		{REPLY} accept
{dhcp}		ip saddr @closed_egress drop
		ip daddr {gateway} icmp type echo-request accept
		ip daddr @name_servers meta l4proto {{ tcp, udp }} th dport 53 {too_fast}
{too_many}		ip daddr @name_servers meta l4proto {{ tcp, udp }} th dport 53 accept
		fib daddr type != unicast drop
		ip daddr @reach accept
		ip daddr @closed drop
	}}
"
    )
}

/// Lets the DHCP server be asked, if there is one.
pub(super) fn dhcp(grounds: &Grounds) -> String {
    grounds.dhcp_server.map_or_else(String::new, |server| {
        format!("\t\tudp sport 68 udp dport 67 ip daddr {{ {server}, 255.255.255.255 }} accept\n")
    })
}

fn list(elements: impl IntoIterator<Item = impl Display>) -> String {
    let elements: Vec<String> = elements.into_iter().map(|element| element.to_string()).collect();
    elements.join(", ")
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;

    use super::*;
    use crate::firewall::tests::{entry, grounds, rules};

    #[test]
    fn tables_of_three_sandboxes() {
        let closed = Entry { egress: Egress::None, ..entry(3) };
        let unknown = Entry { ip: None, dhcp: true, ..entry(4) };
        assert_snapshot!(whole(&rules([
            (100_002, entry(2)),
            (100_003, closed),
            (100_004, unknown)
        ])));
    }

    #[test]
    fn change_names_only_what_differs() {
        let one = rules([(100_002, entry(2)), (100_003, entry(3))]);
        assert_eq!(change(&one, &one).as_deref(), Some(""));
        let closed = Entry { egress: Egress::None, ..entry(2) };
        let two = rules([(100_002, closed), (100_004, entry(4))]);
        assert_snapshot!(change(&one, &two).expect("the same node"), @r#"
        delete element bridge pve_sandbox ports { "fwpr100003p0", "veth100003i0" }
        add element bridge pve_sandbox ports { "fwpr100004p0", "veth100004i0" }
        delete element bridge pve_sandbox bound { "fwpr100003p0" . 02:50:0a:64:01:03 . 10.100.1.3, "veth100003i0" . 02:50:0a:64:01:03 . 10.100.1.3 }
        add element bridge pve_sandbox bound { "fwpr100004p0" . 02:50:0a:64:01:04 . 10.100.1.4, "veth100004i0" . 02:50:0a:64:01:04 . 10.100.1.4 }
        add element bridge pve_sandbox closed_egress { "fwpr100002p0", "veth100002i0" }
        delete element inet pve_sandbox ports { "fwpr100003p0", "veth100003i0" }
        add element inet pve_sandbox ports { "fwpr100004p0", "veth100004i0" }
        delete element inet pve_sandbox behind_firewall { "fwbr100003i0" . 02:50:0a:64:01:03 . 10.100.1.3 }
        add element inet pve_sandbox behind_firewall { "fwbr100004i0" . 02:50:0a:64:01:04 . 10.100.1.4 }
        delete element inet pve_sandbox addresses { 10.100.1.3 }
        add element inet pve_sandbox addresses { 10.100.1.4 }
        add element inet pve_sandbox closed_egress { 10.100.1.2 }
        "#);
        let moved = Rules { grounds: Grounds { dhcp_server: None, ..grounds() }, ..two };
        assert_eq!(change(&one, &moved), None);
    }

    #[test]
    fn sandbox_without_a_mac_or_an_address_sends_nothing() {
        let text = whole(&rules([(100_002, Entry { mac: None, ..entry(2) })]));
        assert!(text.contains("veth100002i0") && !text.contains("veth100002i0\" ."), "{text}");
    }
}
