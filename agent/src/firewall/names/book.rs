//! Addresses that sandboxes with a list have: what names were answered with, as far as the lists allow, and
//! no more than there is memory for. Also what the kernel has of them. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    time::Duration,
};

use data_encoding::HEXLOWER;
use proto::{egress::AllowList, id::Vmid};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use super::{Grant, IDLE, Pair};
use crate::firewall::Rules;

/// Most addresses of a sandbox; the one that was answered longest ago makes room.
pub(super) const ADDRESSES_MAX: usize = 512;
/// Most bytes of the addresses and names of a sandbox, and of all. Beyond that the oldest address of the
/// sandbox, or of the one that has the most, makes room: names are long where somebody wants them long.
pub(super) const BYTES_MAX: (usize, usize) = (128 << 10, 16 << 20);
/// Bytes that an address takes, and those that a name takes beside its text: nearly.
const ADDRESS_BYTES: usize = 160;
const NAME_BYTES: usize = 48;
/// Most names that are remembered with an address.
const NAMES_MAX: usize = 4;
/// List of a sandbox, by the sandbox's address.
type Lists = BTreeMap<Ipv4Addr, (Vmid, AllowList)>;

/// Lists of the sandboxes, and the addresses that each may have in the kernel; some may be gone there.
#[derive(Debug, Clone, Default)]
pub(in crate::firewall) struct Book {
    lists: Lists,
    pub(super) given: BTreeMap<Ipv4Addr, Addresses>,
    /// Pairs that no list allows any more and the kernel may have.
    gone: BTreeSet<Pair>,
    /// Number of the last grant.
    last: u64,
}

/// Addresses of a sandbox.
#[derive(Debug, Clone, Default)]
pub(super) struct Addresses {
    pub(super) all: BTreeMap<Ipv4Addr, Given>,
    /// Bytes that they take.
    pub(super) bytes: usize,
}

impl Addresses {
    fn weigh(&mut self) {
        self.bytes = self.all.values().map(Given::bytes).sum();
    }

    /// Returns the addresses with their bytes, the one that was answered longest ago at the end.
    fn newest_first(&self) -> Vec<(Ipv4Addr, usize)> {
        let mut all: Vec<_> = self.all.iter().collect();
        all.sort_unstable_by_key(|(address, given)| std::cmp::Reverse((given.number, **address)));
        all.into_iter().map(|(address, given)| (*address, given.bytes())).collect()
    }
}

/// An address that a sandbox has.
#[derive(Debug, Clone)]
pub(super) struct Given {
    /// Names that it was given for; none where an earlier agent gave it.
    names: BTreeSet<String>,
    number: u64,
    at: Instant,
}

impl Given {
    pub(super) fn bytes(&self) -> usize {
        ADDRESS_BYTES + self.names.iter().map(|name| NAME_BYTES + name.len()).sum::<usize>()
    }
}

/// Difference that grants make.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::firewall) struct Change {
    pub(in crate::firewall) add: BTreeSet<Pair>,
    pub(in crate::firewall) remove: BTreeSet<Pair>,
    /// Grants that no list of the rules allows.
    pub(in crate::firewall) refused: BTreeSet<(Ipv4Addr, String)>,
}

impl Book {
    /// Takes over the lists of these rules.
    pub(in crate::firewall) fn follow(&mut self, rules: &Rules) {
        let lists = lists(rules);
        for (sandbox, addresses) in &mut self.given {
            let (was, is) = (self.lists.get(sandbox), lists.get(sandbox));
            if was == is {
                continue;
            }
            let same = was.zip(is).filter(|((was, _), (is, _))| was == is);
            for (address, given) in &mut addresses.all {
                given.names.retain(|name| same.is_some_and(|(_, (_, list))| list.allows(name)));
                if given.names.is_empty() {
                    self.gone.insert((*sandbox, *address));
                }
            }
            addresses.weigh();
        }
        self.lists = lists;
    }

    /// Returns the pairs that must go from the kernel; `remove` tells that they have gone.
    pub(in crate::firewall) const fn gone(&self) -> &BTreeSet<Pair> {
        &self.gone
    }

    /// Takes in what an earlier agent had given under the lists of now.
    pub(in crate::firewall) fn recall(&mut self, kernel: &Kernel, now: Instant) {
        for (sandbox, address) in kernel.allowed.keys() {
            let list = self.lists.get(sandbox);
            if list.map(digest).as_ref() == kernel.listed.get(sandbox) && list.is_some() {
                let given = Given { names: BTreeSet::new(), number: 0, at: now };
                let addresses = self.given.entry(*sandbox).or_default();
                if addresses.all.len() < ADDRESSES_MAX {
                    addresses.all.entry(*address).or_insert(given);
                    addresses.weigh();
                }
            }
        }
        let sandboxes = self.given.keys().copied().collect();
        self.remove(&self.surplus(&sandboxes));
    }

    /// Takes in grants, but for those that no list allows. What makes room is remembered until `remove`.
    pub(in crate::firewall) fn grant(&mut self, grants: &[Grant], now: Instant) -> Change {
        let mut change = Change::default();
        for Grant { sandbox, name, address } in grants {
            if !self.lists.get(sandbox).is_some_and(|(_, list)| list.allows(name)) {
                change.refused.insert((*sandbox, name.clone()));
                continue;
            }
            self.last += 1;
            let fresh = || Given { names: BTreeSet::new(), number: 0, at: now };
            let addresses = self.given.entry(*sandbox).or_default();
            let given = addresses.all.entry(*address).or_insert_with(fresh);
            (given.number, given.at) = (self.last, now);
            if given.names.len() < NAMES_MAX {
                given.names.insert(name.clone());
            }
            addresses.weigh();
            self.gone.remove(&(*sandbox, *address));
            change.add.insert((*sandbox, *address));
        }
        let sandboxes = change.add.iter().map(|(sandbox, _)| *sandbox).collect();
        change.remove = self.surplus(&sandboxes);
        change.add = &change.add - &change.remove;
        change
    }

    /// Returns the pairs that are too many: of each of these sandboxes, and of all together.
    fn surplus(&self, changed: &BTreeSet<Ipv4Addr>) -> BTreeSet<Pair> {
        let mut surplus = BTreeSet::new();
        let mut bytes: BTreeMap<_, _> =
            self.given.iter().map(|(sandbox, of)| (*sandbox, of.bytes)).collect();
        let mut queues: BTreeMap<Ipv4Addr, Vec<(Ipv4Addr, usize)>> = BTreeMap::new();
        // Takes the oldest address of a sandbox; returns its bytes.
        let mut take = |sandbox: Ipv4Addr, left: &mut usize| {
            let of = self.given.get(&sandbox)?;
            let queue = queues.entry(sandbox).or_insert_with(|| of.newest_first());
            let (address, size) = queue.pop()?;
            *left -= size;
            surplus.insert((sandbox, address));
            Some(size)
        };
        for sandbox in changed {
            let (Some(left), Some(of)) = (bytes.get_mut(sandbox), self.given.get(sandbox)) else {
                continue;
            };
            let mut count = of.all.len();
            while (count > ADDRESSES_MAX || *left > BYTES_MAX.0) && take(*sandbox, left).is_some() {
                count -= 1;
            }
        }
        let mut all: usize = bytes.values().sum();
        while all > BYTES_MAX.1 {
            let largest = bytes.iter_mut().max_by_key(|(_, bytes)| **bytes);
            let taken = largest.and_then(|(sandbox, left)| take(*sandbox, left));
            let Some(taken) = taken else { break };
            all -= taken;
        }
        surplus
    }

    /// Forgets pairs: they are gone from the kernel.
    pub(in crate::firewall) fn remove(&mut self, pairs: &BTreeSet<Pair>) {
        for (sandbox, address) in pairs {
            self.gone.remove(&(*sandbox, *address));
            if let Some(addresses) = self.given.get_mut(sandbox)
                && let Some(given) = addresses.all.remove(address)
            {
                addresses.bytes -= given.bytes();
            }
        }
        self.given.retain(|_, addresses| !addresses.all.is_empty());
    }

    /// Returns the pairs that new tables must have, and for how long: those that the kernel has, and
    /// those that were answered lately.
    pub(super) fn alive(&self, kernel: &Kernel, now: Instant) -> BTreeMap<Pair, Duration> {
        let mut alive = BTreeMap::new();
        for (sandbox, addresses) in &self.given {
            for (address, given) in &addresses.all {
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
    pub(in crate::firewall) fn addresses(&self, sandbox: Ipv4Addr) -> Vec<Ipv4Addr> {
        self.given.get(&sandbox).into_iter().flat_map(|of| of.all.keys().copied()).collect()
    }
}

/// Sets of the tables as the kernel has them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::firewall) struct Kernel {
    /// Digest of the list of each sandbox.
    listed: BTreeMap<Ipv4Addr, String>,
    /// Pairs, and how long each is there without being used.
    allowed: BTreeMap<Pair, Duration>,
}

impl Kernel {
    /// Parses the listings of the sets `LISTED` and `ALLOWED`. What is not understood is left out.
    pub(in crate::firewall) fn parse(listed: &str, allowed: &str) -> Self {
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

pub(super) fn lists(rules: &Rules) -> Lists {
    let of = rules
        .sandboxes
        .iter()
        .filter_map(|(vmid, entry)| Some((entry.ip?, (*vmid, entry.egress.list()?.clone()))));
    of.collect()
}

pub(super) fn digest((vmid, list): &(Vmid, AllowList)) -> String {
    let digest = Sha256::digest(list.to_string());
    format!("{vmid} {}", HEXLOWER.encode(&digest[..8]))
}
