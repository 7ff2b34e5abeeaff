//! Sandboxes that reach the names of a list alone: which addresses each has, and the text for `nft`.
//! Pure.
//!
//! Two tables of their own beside those of `render`: what they let through must pass those, too, so an
//! address that is closed to every sandbox stays closed whatever a name says. They are listed without
//! the addresses in them, of which sandboxes can make many. The kernel removes an address that
//! is not used for `IDLE`, and renews it with each packet, so a connection ends with its list only.
//! `book` knows the addresses.

mod book;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::Ipv4Addr,
    time::Duration,
};

use tokio::time::Instant;

pub(super) use self::book::{Book, Change, Kernel};
use self::book::{digest, lists};
use super::{
    Grounds, RESOLVER_PORT, Rules, ports,
    render::{
        FAMILIES, REPLY, dhcp, name_connection_set, name_connections, question_rate, question_set,
    },
};

/// Name of the tables.
pub const TABLE: &str = "pve_sandbox_names";
/// Set of the sandboxes with a list. Each has its list's digest as a comment, by which the next agent
/// knows that addresses were given under the same list.
pub(super) const LISTED: &str = "listed";
/// Set of pairs: a sandbox, and an address that it reaches.
pub(super) const ALLOWED: &str = "allowed";

/// Time after its last use, or the last answer with it, for which an address is reached.
const IDLE: Duration = Duration::from_secs(15 * 60);
/// Most pairs of a node: more than there is memory for.
const PAIRS_MAX: usize = 128 << 10;

/// Zone of the kernel's table of connections for the questions of these sandboxes, and their answers. A flow that
/// was there before the sandbox had a list, or is there after it, is another one: each is led its own way.
const ZONE: u16 = RESOLVER_PORT;

/// A sandbox and an address.
type Pair = (Ipv4Addr, Ipv4Addr);

/// Address of a name that a sandbox has asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Address of the sandbox.
    pub sandbox: Ipv4Addr,
    /// Name that it has asked for, in lower case.
    pub name: String,
    /// Address that it gets.
    pub address: Ipv4Addr,
}

/// Returns true when any sandbox has a list, so that there are tables.
pub(super) fn are_needed(rules: &Rules) -> bool {
    rules.sandboxes.values().any(|entry| entry.egress.list().is_some())
}

/// Elements of `LISTED` in each family: the key, and the key with its comment.
fn listed(rules: &Rules, family: &str) -> BTreeMap<String, String> {
    if family == "inet" {
        let with = |(ip, list): (Ipv4Addr, _)| {
            (ip.to_string(), format!("{ip} comment {:?}", digest(&list)))
        };
        return lists(rules).into_iter().map(with).collect();
    }
    let of = rules.sandboxes.iter().filter(|(_, entry)| entry.egress.list().is_some());
    let ports = of.flat_map(|(vmid, _)| ports(*vmid)).map(|port| format!("{port:?}"));
    ports.map(|port| (port.clone(), port)).collect()
}

/// Returns the transaction that replaces the tables.
pub(super) fn whole(rules: &Rules, book: &Book, kernel: &Kernel, now: Instant) -> String {
    let mut text = String::new();
    for family in FAMILIES {
        // Deleting a table that does not exist is an error; declaring one that does is none.
        let _infallible = write!(text, "table {family} {TABLE}\ndelete table {family} {TABLE}\n");
    }
    if !are_needed(rules) {
        return text;
    }
    let alive = book.alive(kernel, now).into_iter().map(|((sandbox, address), left)| {
        format!("{sandbox} . {address} timeout {}s", left.as_secs())
    });
    let alive = elements_of(&alive.collect::<Vec<_>>());
    let grounds = &rules.grounds;
    for (family, kind, chains) in
        [("bridge", "ifname", bridge_chains(grounds)), ("inet", "ipv4_addr", inet_chains(grounds))]
    {
        let listed = elements_of(&listed(rules, family).into_values().collect::<Vec<_>>());
        let sets = sets(kind, &listed, &alive);
        let _infallible = write!(text, "table {family} {TABLE} {{\n{sets}{chains}}}\n");
    }
    text
}

/// Returns a transaction that only a kernel takes that has all that the tables need. Not to be applied.
pub(super) fn probe(grounds: &Grounds) -> String {
    let chains =
        [("bridge", "ifname", bridge_chains(grounds)), ("inet", "ipv4_addr", inet_chains(grounds))];
    let table = |(family, kind, chains): &(&str, &str, String)| {
        format!("table {family} {TABLE}_probe {{\n{}{chains}}}\n", sets(kind, "", ""))
    };
    chains.iter().map(table).collect()
}

/// Returns the sets of a table.
fn sets(kind: &str, listed: &str, allowed: &str) -> String {
    let (size, idle, questions) = (PAIRS_MAX, IDLE.as_secs(), question_set());
    format!(
        "\tset {LISTED} {{
		type {kind}
{listed}	}}
	set {ALLOWED} {{
		type ipv4_addr . ipv4_addr
		size {size}
		flags dynamic,timeout
		timeout {idle}s
{allowed}	}}
{questions}"
    )
}

fn elements_of(elements: &[String]) -> String {
    match elements {
        [] => String::new(),
        some => format!("\t\telements = {{ {} }}\n", some.join(", ")),
    }
}

/// Returns the transaction from the first rules to the second. The grounds are the same, and there are
/// tables where the first rules need some.
pub(super) fn change(old: &Rules, new: &Rules, book: &Book) -> String {
    if !are_needed(old) && !are_needed(new) {
        return String::new();
    }
    if !are_needed(old) || !are_needed(new) {
        return whole(new, book, &Kernel::default(), Instant::now());
    }
    let mut text = String::new();
    for family in FAMILIES {
        let (was, is) = (listed(old, family), listed(new, family));
        let differs =
            |one: &BTreeMap<String, String>, other: &BTreeMap<String, String>, key: bool| {
                let only = one.iter().filter(|(name, text)| other.get(*name) != Some(*text));
                only.map(|(name, text)| if key { name.clone() } else { text.clone() })
                    .collect::<Vec<_>>()
            };
        for (word, elements) in
            [("delete", differs(&was, &is, true)), ("add", differs(&is, &was, false))]
        {
            if !elements.is_empty() {
                let elements = elements.join(", ");
                let _infallible =
                    writeln!(text, "{word} element {family} {TABLE} {LISTED} {{ {elements} }}");
            }
        }
    }
    text + &removal(book.gone())
}

/// Returns the transaction that a change of pairs needs. The time of an address that is there starts
/// again.
pub(super) fn granting(change: &Change) -> String {
    let both = &change.add | &change.remove;
    removal(&both) + &elements_line("add", &change.add)
}

/// Returns the transaction that removes pairs. One may be gone already, which is no error only if it
/// is added first.
pub(super) fn removal(pairs: &BTreeSet<Pair>) -> String {
    elements_line("add", pairs) + &elements_line("delete", pairs)
}

fn elements_line(word: &str, pairs: &BTreeSet<Pair>) -> String {
    if pairs.is_empty() {
        return String::new();
    }
    let pairs: Vec<_> =
        pairs.iter().map(|(sandbox, address)| format!("{sandbox} . {address}")).collect();
    let pairs = pairs.join(", ");
    let line = |family| format!("{word} element {family} {TABLE} {ALLOWED} {{ {pairs} }}\n");
    FAMILIES.map(line).concat()
}

/// Lets through what is for an address of the sandbox, and renews that.
fn allowed() -> String {
    let (pair, idle) = ("ip saddr . ip daddr", IDLE.as_secs());
    format!(
        "meta l4proto {{ tcp, udp }} {pair} @{ALLOWED} update @{ALLOWED} {{ {pair} timeout {idle}s }} accept"
    )
}

/// Frames that leave by another port of the bridge. There is no resolver behind it: a name server that
/// a frame is for is another one.
fn bridge_chains(grounds: &Grounds) -> String {
    let (dhcp, allowed) = (dhcp(grounds), allowed());
    format!(
        "\tchain by_name {{
		type filter hook forward priority -190; policy accept;
		iifname @{LISTED} jump named
	}}
	chain named {{
		oifname \"fwln*\" accept
		ether type != ip accept
{dhcp}		meta l4proto {{ tcp, udp }} th dport 53 drop
		{allowed}
		drop
	}}
"
    )
}

/// Packets that the host takes or routes. The questions of these sandboxes are the resolver's, whatever
/// name server they are for; while it is down, nobody answers at its port.
fn inet_chains(grounds: &Grounds) -> String {
    let (dhcp, allowed, gateway) = (dhcp(grounds), allowed(), grounds.gateway);
    // The resolver's socket is one for all.
    let (set, too_fast) = (name_connection_set(grounds), question_rate());
    let too_many = name_connections(grounds, &format!("tcp dport {{ 53, {RESOLVER_PORT} }}"));
    format!(
        "{set}\tchain apart {{
		type filter hook prerouting priority -300; policy accept;
		iifname != \"lo\" ip saddr @{LISTED} meta l4proto {{ tcp, udp }} th dport {{ 53, {RESOLVER_PORT} }} ct zone set {ZONE}
	}}
	chain apart_answers {{
		type filter hook output priority -300; policy accept;
		ip daddr @{LISTED} meta l4proto {{ tcp, udp }} th sport {RESOLVER_PORT} ct zone set {ZONE}
	}}
	chain asking {{
		type nat hook prerouting priority -110; policy accept;
		iifname != \"lo\" ip saddr @{LISTED} meta l4proto {{ tcp, udp }} th dport 53 dnat ip to {gateway}:{RESOLVER_PORT}
	}}
	chain by_name {{
		type filter hook prerouting priority -90; policy accept;
		iifname != \"lo\" ip saddr @{LISTED} jump named
	}}
	chain named {{
		{REPLY} accept
{dhcp}		meta l4proto {{ tcp, udp }} th dport {{ 53, {RESOLVER_PORT} }} {too_fast}
{too_many}		ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport {RESOLVER_PORT} ct status dnat accept
		meta l4proto {{ tcp, udp }} th dport 53 drop
		{allowed}
		drop
	}}
"
    )
}
