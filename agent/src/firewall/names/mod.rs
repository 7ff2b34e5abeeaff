//! Sandboxes that reach the names of a list alone: which addresses each has, and the text for `nft`.
//! Pure.
//!
//! Two tables of their own beside those of `render`: what they let through must pass those, too, so an
//! address that is closed to every sandbox stays closed whatever a name says. They are listed without
//! the addresses in them, of which sandboxes can make many. The kernel removes an address that
//! is not used for `IDLE`, and renews it with each packet, so a connection ends with its list only.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::Ipv4Addr,
    time::Duration,
};

use proto::{egress::AllowList, id::Vmid};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use super::{
    Grounds, RESOLVER_PORT, Rules, ports,
    render::{FAMILIES, dhcp},
};

/// Name of the tables.
pub const TABLE: &str = "pve_sandbox_names";
/// Set of the sandboxes with a list. Each has its list's digest as a comment, by which the next agent
/// knows that addresses were given under the same list.
pub(super) const LISTED: &str = "listed";
/// Set of pairs: a sandbox, and an address that it reaches.
pub(super) const ALLOWED: &str = "allowed";

/// Set of the sandboxes with the rate of their questions: the resolver's socket is one for all.
pub(super) const QUESTIONS: &str = "questions";

/// Time after its last use, or the last answer with it, for which an address is reached.
const IDLE: Duration = Duration::from_secs(15 * 60);
/// Most addresses of a sandbox; the one that was answered longest ago makes room.
pub(super) const ADDRESSES_MAX: usize = 1024;
/// Most names that are remembered with an address.
const NAMES_MAX: usize = 4;
/// Most pairs of a node: as many as a thousand sandboxes have.
const PAIRS_MAX: usize = 1024 * ADDRESSES_MAX;

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

/// List of a sandbox, by the sandbox's address.
type Lists = BTreeMap<Ipv4Addr, (Vmid, AllowList)>;

/// Lists of the sandboxes, and the addresses that each may have in the kernel; some may be gone there.
#[derive(Debug, Clone, Default)]
pub(super) struct Book {
    lists: Lists,
    given: BTreeMap<Ipv4Addr, BTreeMap<Ipv4Addr, Given>>,
    /// Pairs that no list allows any more and the kernel may have.
    gone: BTreeSet<Pair>,
    /// Number of the last grant.
    last: u64,
}

/// An address that a sandbox has.
#[derive(Debug, Clone)]
struct Given {
    /// Names that it was given for; none where an earlier agent gave it.
    names: BTreeSet<String>,
    number: u64,
    at: Instant,
}

/// Difference that grants make.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) add: BTreeSet<Pair>,
    pub(super) remove: BTreeSet<Pair>,
    /// Grants that no list of the rules allows.
    pub(super) refused: BTreeSet<(Ipv4Addr, String)>,
}

impl Book {
    /// Takes over the lists of these rules.
    pub(super) fn follow(&mut self, rules: &Rules) {
        let lists = lists(rules);
        for (sandbox, addresses) in &mut self.given {
            let (was, is) = (self.lists.get(sandbox), lists.get(sandbox));
            if was == is {
                continue;
            }
            let same = was.zip(is).filter(|((was, _), (is, _))| was == is);
            for (address, given) in addresses {
                given.names.retain(|name| same.is_some_and(|(_, (_, list))| list.allows(name)));
                if given.names.is_empty() {
                    self.gone.insert((*sandbox, *address));
                }
            }
        }
        self.lists = lists;
    }

    /// Returns the pairs that must go from the kernel; `remove` tells that they have gone.
    pub(super) const fn gone(&self) -> &BTreeSet<Pair> {
        &self.gone
    }

    /// Takes in what an earlier agent had given under the lists of now.
    pub(super) fn recall(&mut self, kernel: &Kernel, now: Instant) {
        for (sandbox, address) in kernel.allowed.keys() {
            let list = self.lists.get(sandbox);
            if list.map(digest).as_ref() == kernel.listed.get(sandbox) && list.is_some() {
                let given = Given { names: BTreeSet::new(), number: 0, at: now };
                let addresses = self.given.entry(*sandbox).or_default();
                if addresses.len() < ADDRESSES_MAX {
                    addresses.entry(*address).or_insert(given);
                }
            }
        }
    }

    /// Takes in grants, but for those that no list allows. What makes room is remembered until `remove`.
    pub(super) fn grant(&mut self, grants: &[Grant], now: Instant) -> Change {
        let mut change = Change::default();
        for Grant { sandbox, name, address } in grants {
            if !self.lists.get(sandbox).is_some_and(|(_, list)| list.allows(name)) {
                change.refused.insert((*sandbox, name.clone()));
                continue;
            }
            self.last += 1;
            let fresh = || Given { names: BTreeSet::new(), number: 0, at: now };
            let addresses = self.given.entry(*sandbox).or_default();
            let given = addresses.entry(*address).or_insert_with(fresh);
            (given.number, given.at) = (self.last, now);
            if given.names.len() < NAMES_MAX {
                given.names.insert(name.clone());
            }
            self.gone.remove(&(*sandbox, *address));
            change.add.insert((*sandbox, *address));
        }
        let sandboxes: BTreeSet<_> = change.add.iter().map(|(sandbox, _)| *sandbox).collect();
        for sandbox in sandboxes {
            let Some(addresses) = self.given.get(&sandbox) else { continue };
            let over = addresses.len().saturating_sub(ADDRESSES_MAX);
            let mut oldest: Vec<_> = addresses.iter().map(|(ip, one)| (one.number, *ip)).collect();
            oldest.sort_unstable();
            change.remove.extend(oldest.iter().take(over).map(|(_, ip)| (sandbox, *ip)));
        }
        change.add = &change.add - &change.remove;
        change
    }

    /// Forgets pairs: they are gone from the kernel.
    pub(super) fn remove(&mut self, pairs: &BTreeSet<Pair>) {
        for (sandbox, address) in pairs {
            self.gone.remove(&(*sandbox, *address));
            if let Some(addresses) = self.given.get_mut(sandbox) {
                addresses.remove(address);
            }
        }
        self.given.retain(|_, addresses| !addresses.is_empty());
    }

    /// Returns the pairs that new tables must have, and for how long: those that the kernel has, and
    /// those that were answered lately.
    fn alive(&self, kernel: &Kernel, now: Instant) -> BTreeMap<Pair, Duration> {
        let mut alive = BTreeMap::new();
        for (sandbox, addresses) in &self.given {
            for (address, given) in addresses {
                let pair = (*sandbox, *address);
                let lately = given.number > 0;
                let left = IDLE.saturating_sub(now.saturating_duration_since(given.at));
                let left = kernel.allowed.get(&pair).copied().or(lately.then_some(left));
                let left = left.filter(|left| *left >= Duration::from_secs(1));
                if let Some(left) = left.filter(|_| !self.gone.contains(&pair)) {
                    alive.insert(pair, left);
                }
            }
        }
        alive
    }

    /// Returns the addresses that a sandbox may have.
    #[cfg(test)]
    pub(super) fn addresses(&self, sandbox: Ipv4Addr) -> Vec<Ipv4Addr> {
        self.given.get(&sandbox).into_iter().flatten().map(|(address, _)| *address).collect()
    }
}

/// Sets of the tables as the kernel has them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Kernel {
    /// Digest of the list of each sandbox.
    listed: BTreeMap<Ipv4Addr, String>,
    /// Pairs, and how long each is there without being used.
    allowed: BTreeMap<Pair, Duration>,
}

impl Kernel {
    /// Parses the listings of the sets `LISTED` and `ALLOWED`. What is not understood is left out.
    pub(super) fn parse(listed: &str, allowed: &str) -> Self {
        let ip = |value: &Value| value.as_str()?.parse::<Ipv4Addr>().ok();
        let listed = elements(listed).into_iter().filter_map(|element| {
            Some((ip(&element["val"])?, element["comment"].as_str()?.to_owned()))
        });
        let allowed = elements(allowed).into_iter().filter_map(|element| {
            let pair = element["val"]["concat"].as_array()?;
            let [sandbox, address] = &pair[..] else { return None };
            let left = Duration::from_secs(element["expires"].as_u64()?).min(IDLE);
            Some(((ip(sandbox)?, ip(address)?), left))
        });
        Self { listed: listed.collect(), allowed: allowed.collect() }
    }
}

/// Elements of the only set of a listing that have more than a value.
fn elements(listing: &str) -> Vec<Value> {
    let parsed: Value = serde_json::from_str(listing).unwrap_or_default();
    let objects = parsed["nftables"].as_array().cloned().unwrap_or_default();
    let sets = objects.iter().filter_map(|object| object["set"]["elem"].as_array());
    sets.flatten().map(|element| element["elem"].clone()).collect()
}

fn lists(rules: &Rules) -> Lists {
    let of = rules
        .sandboxes
        .iter()
        .filter_map(|(vmid, entry)| Some((entry.ip?, (*vmid, entry.egress.list()?.clone()))));
    of.collect()
}

fn digest((vmid, list): &(Vmid, AllowList)) -> String {
    let digest = Sha256::digest(list.to_string());
    let hex: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("{vmid} {hex}")
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
    let (size, idle) = (PAIRS_MAX, IDLE.as_secs());
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
	set {QUESTIONS} {{
		type ipv4_addr
		size 65535
		flags dynamic,timeout
		timeout 1m
	}}
"
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
    text + &removal(&book.gone)
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
    format!(
        "\tchain asking {{
		type nat hook prerouting priority -110; policy accept;
		iifname != \"lo\" ip saddr @{LISTED} meta l4proto {{ tcp, udp }} th dport 53 dnat ip to {gateway}:{RESOLVER_PORT}
	}}
	chain by_name {{
		type filter hook prerouting priority -90; policy accept;
		iifname != \"lo\" ip saddr @{LISTED} jump named
	}}
	chain named {{
		ct state established,related ct direction reply accept
{dhcp}		meta l4proto {{ tcp, udp }} th dport {{ 53, {RESOLVER_PORT} }} update @{QUESTIONS} {{ ip saddr limit rate over 200/second burst 400 packets }} drop
		ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport {RESOLVER_PORT} ct status dnat accept
		meta l4proto {{ tcp, udp }} th dport 53 drop
		{allowed}
		drop
	}}
"
    )
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;
    use proto::spec::Egress;

    use super::*;
    use crate::firewall::{
        Entry,
        tests::{entry, rules},
    };

    fn listed(last: u8, names: &str) -> Entry {
        Entry { egress: names.parse::<Egress>().expect("an egress"), ..entry(last) }
    }

    fn ip(last: u8) -> Ipv4Addr {
        Ipv4Addr::new(93, 184, 216, last)
    }

    fn sandbox(last: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 100, 1, last)
    }

    fn grant(of: u8, name: &str, last: u8) -> Grant {
        Grant { sandbox: sandbox(of), name: name.to_owned(), address: ip(last) }
    }

    #[tokio::test(start_paused = true)]
    async fn tables_of_a_sandbox_with_a_list() {
        let unknown = Entry { ip: None, ..listed(4, "allow=a.b") };
        let rules = rules([
            (100_002, entry(2)),
            (100_003, listed(3, "allow=*.npmjs.org,github.com")),
            (100_004, unknown),
        ]);
        let (mut book, now) = (Book::default(), Instant::now());
        book.follow(&rules);
        book.grant(&[grant(3, "github.com", 34)], now);
        assert_snapshot!(whole(&rules, &book, &Kernel::default(), now));
    }

    #[tokio::test(start_paused = true)]
    async fn change_of_a_list_names_only_what_differs() {
        let one = rules([(100_002, listed(2, "allow=a.b,c.d")), (100_003, listed(3, "allow=a.b"))]);
        let two = rules([(100_002, listed(2, "allow=a.b")), (100_003, listed(3, "allow=a.b"))]);
        let (mut book, now) = (Book::default(), Instant::now());
        book.follow(&one);
        let grants = [grant(2, "a.b", 1), grant(2, "c.d", 2), grant(3, "a.b", 1)];
        assert_eq!(book.grant(&grants, now).add.len(), 3);
        assert_eq!(change(&one, &one, &book), "");
        book.follow(&two);
        assert_snapshot!(change(&one, &two, &book), @r#"
        delete element inet pve_sandbox_names listed { 10.100.1.2 }
        add element inet pve_sandbox_names listed { 10.100.1.2 comment "100002 2e7336dc8eba87ef" }
        add element bridge pve_sandbox_names allowed { 10.100.1.2 . 93.184.216.2 }
        add element inet pve_sandbox_names allowed { 10.100.1.2 . 93.184.216.2 }
        delete element bridge pve_sandbox_names allowed { 10.100.1.2 . 93.184.216.2 }
        delete element inet pve_sandbox_names allowed { 10.100.1.2 . 93.184.216.2 }
        "#);
        let open = rules([(100_002, entry(2))]);
        assert_eq!(change(&open, &open, &book), "");
        assert!(
            change(&open, &two, &book).contains("chain named"),
            "the first one makes the tables"
        );
        let gone = change(&two, &open, &book);
        assert!(gone.contains("delete table inet") && !gone.contains("chain"), "{gone}");
    }

    #[tokio::test(start_paused = true)]
    async fn tighter_list_takes_back_what_no_name_of_it_has() {
        let with =
            |names: &str| rules([(100_002, listed(2, names)), (100_003, listed(3, "allow=a.b"))]);
        let (mut book, now) = (Book::default(), Instant::now());
        book.follow(&with("allow=a.b,c.d"));
        let grants = [
            grant(2, "a.b", 1),
            grant(2, "c.d", 1),
            grant(2, "c.d", 2),
            grant(2, "e.f", 3),
            grant(9, "a.b", 4),
            grant(3, "a.b", 2),
        ];
        let change = book.grant(&grants, now);
        let pairs = [(2, 1), (2, 2), (3, 2)].map(|(of, last)| (sandbox(of), ip(last)));
        assert_eq!((change.add, change.remove), (pairs.into(), [].into()), "as far as allowed");
        let refused = [(2, "e.f"), (9, "a.b")].map(|(of, name)| (sandbox(of), name.to_owned()));
        assert_eq!(change.refused, refused.into());
        assert_eq!(book.gone().len(), 0);
        book.follow(&with("allow=a.b"));
        assert_eq!(*book.gone(), [(sandbox(2), ip(2))].into(), "`a.b` has the other one");
        // Until it is known to be gone, it stays on the list of what must go.
        book.follow(&with("allow=a.b,c.d"));
        assert_eq!(book.gone().len(), 1);
        assert!(!book.alive(&Kernel::default(), now).contains_key(&(sandbox(2), ip(2))));
        book.remove(&book.gone().clone());
        assert_eq!((book.gone().len(), book.addresses(sandbox(2))), (0, vec![ip(1)]));
        // An answer gives it back.
        book.follow(&with("allow=a.b"));
        book.follow(&with("allow=c.d"));
        assert_eq!(*book.gone(), [(sandbox(2), ip(1))].into());
        book.grant(&[grant(2, "c.d", 1)], now);
        assert_eq!(book.gone().len(), 0);
        // Another sandbox with the address starts with nothing.
        book.follow(&rules([(100_009, listed(2, "allow=c.d"))]));
        assert_eq!(book.gone().len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn addresses_of_a_sandbox_are_bounded() {
        let rules =
            rules([(100_002, listed(2, "allow=*.a.b")), (100_003, listed(3, "allow=*.a.b"))]);
        let (mut book, now) = (Book::default(), Instant::now());
        book.follow(&rules);
        book.grant(&[grant(3, "x.a.b", 1)], now);
        for number in 0..2000_u32 {
            let address = Ipv4Addr::from(0x0800_0000 + number);
            let grant = Grant { sandbox: sandbox(2), name: "x.a.b".into(), address };
            let change = book.grant(&[grant], now);
            let oldest = number.checked_sub(1024).map(|n| Ipv4Addr::from(0x0800_0000 + n));
            let removed: Vec<_> = change.remove.iter().map(|(_, address)| *address).collect();
            assert_eq!(removed, oldest.into_iter().collect::<Vec<_>>());
            book.remove(&change.remove);
        }
        assert_eq!(book.addresses(sandbox(2)).len(), ADDRESSES_MAX);
        assert_eq!(book.addresses(sandbox(3)), [ip(1)], "another's stay");
    }

    #[tokio::test(start_paused = true)]
    async fn next_agent_keeps_what_was_given_under_the_same_list() {
        let list = listed(2, "allow=a.b");
        let rules = rules([(100_002, list.clone()), (100_003, listed(3, "allow=a.b"))]);
        let text = digest(&(
            100_002_u32.try_into().expect("a vmid"),
            list.egress.list().expect("one").clone(),
        ));
        let listed = format!(
            r#"{{"nftables": [{{"metainfo": {{}}}}, {{"set": {{"name": "listed", "elem": [
            {{"elem": {{"val": "10.100.1.2", "comment": "{text}"}}}},
            {{"elem": {{"val": "10.100.1.3", "comment": "100003 0000000000000000"}}}}]}}}}]}}"#
        );
        let element = |of: u8, last: u8| {
            format!(
                r#"{{"elem": {{"val": {{"concat": ["10.100.1.{of}", "93.184.216.{last}"]}}, "timeout": 900, "expires": 80}}}}"#
            )
        };
        let allowed = format!(
            r#"{{"nftables": [{{"set": {{"name": "allowed", "elem": [{}, {}]}}}}]}}"#,
            element(2, 1),
            element(3, 1)
        );
        let kernel = Kernel::parse(&listed, &allowed);
        let (mut book, now) = (Book::default(), Instant::now());
        book.follow(&rules);
        book.recall(&kernel, now);
        let kept = Duration::from_secs(80);
        assert_eq!(book.alive(&kernel, now), [((sandbox(2), ip(1)), kept)].into());
        // Nobody knows its name any more, so the next list takes it back.
        book.follow(&rules_of("allow=a.b,c.d"));
        assert_eq!(*book.gone(), [(sandbox(2), ip(1))].into());
        assert_eq!(Kernel::parse("", "{"), Kernel::default());
    }

    fn rules_of(names: &str) -> Rules {
        rules([(100_002, listed(2, names))])
    }
}
