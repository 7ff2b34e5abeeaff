//! Connections that are not logged in yet. They are few, and a newcomer is never refused for those that only
//! wait: it takes the place of the oldest one of its own address, or of the address that has the most.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use daemon::sync::Mutex;
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

/// Most connections of one address that are not logged in.
const SOURCE_MAX: usize = 16;
/// Most of all addresses.
const ALL_MAX: usize = 256;

#[derive(Debug, Default)]
struct Table {
    next: u64,
    /// By their order of arrival.
    waiting: BTreeMap<u64, (IpAddr, CancellationToken)>,
}

impl Table {
    fn count(&self, source: IpAddr) -> usize {
        self.waiting.values().filter(|(other, _)| *other == source).count()
    }

    /// Returns the address that has the most.
    fn busiest(&self) -> Option<IpAddr> {
        let mut counts = BTreeMap::<IpAddr, usize>::new();
        for (source, _) in self.waiting.values() {
            *counts.entry(*source).or_default() += 1;
        }
        counts.into_iter().max_by_key(|(_, count)| *count).map(|(source, _)| source)
    }

    fn push_out_oldest(&mut self, source: IpAddr) {
        let oldest = self.waiting.iter().find(|(_, (other, _))| *other == source);
        if let Some(number) = oldest.map(|(number, _)| *number)
            && let Some((_, pushed_out)) = self.waiting.remove(&number)
        {
            pushed_out.cancel();
        }
    }
}

/// Connections that are not logged in yet. Clones share them.
#[derive(Debug, Clone, Default)]
pub(super) struct Arrivals(Arc<Mutex<Table>>);

/// Place of one connection, until it is dropped.
#[derive(Debug)]
pub(super) struct Arrival {
    all: Arrivals,
    number: u64,
    pushed_out: CancellationToken,
}

impl Arrivals {
    /// Takes a place, if need be that of another connection.
    pub(super) fn arrive(&self, address: IpAddr) -> Arrival {
        let source = network(address);
        let mut table = self.0.lock();
        if table.count(source) >= SOURCE_MAX {
            table.push_out_oldest(source);
        } else if table.waiting.len() >= ALL_MAX
            && let Some(busiest) = table.busiest()
        {
            table.push_out_oldest(busiest);
        }
        let (number, pushed_out) = (table.next, CancellationToken::new());
        table.next += 1;
        table.waiting.insert(number, (source, pushed_out.clone()));
        Arrival { all: self.clone(), number, pushed_out }
    }
}

impl Arrival {
    /// Waits until another connection has taken the place.
    pub(super) fn pushed_out(&self) -> WaitForCancellationFuture<'_> {
        self.pushed_out.cancelled()
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        self.all.0.lock().waiting.remove(&self.number);
    }
}

/// Returns the address, or of IPv6 the network of 64 bits, which one customer has.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(n: u8) -> IpAddr {
        [10, 0, 0, n].into()
    }

    #[test]
    fn newcomer_takes_the_place_of_the_oldest_of_its_address() {
        let all = Arrivals::default();
        let other = all.arrive(address(2));
        let mut own: Vec<_> = (0..SOURCE_MAX).map(|_| all.arrive(address(1))).collect();
        assert!(own.iter().all(|arrival| !arrival.pushed_out.is_cancelled()));
        own.push(all.arrive(address(1)));
        let pushed: Vec<_> = own.iter().map(|one| one.pushed_out.is_cancelled()).collect();
        assert!(pushed[0] && !pushed[1..].contains(&true));
        assert!(!other.pushed_out.is_cancelled());
        drop((own, other));
        assert!(all.0.lock().waiting.is_empty());
    }

    #[test]
    fn many_addresses_push_out_the_one_that_has_the_most() {
        let all = Arrivals::default();
        let greedy: Vec<_> = (0..SOURCE_MAX).map(|_| all.arrive(address(1))).collect();
        let rest: Vec<_> = (0..ALL_MAX - SOURCE_MAX)
            .map(|n| all.arrive([10, 1, u8::try_from(n % 200).expect("small"), 1].into()))
            .collect();
        let last = all.arrive(address(9));
        assert!(greedy[0].pushed_out.is_cancelled());
        assert!(rest.iter().chain([&last]).all(|one| !one.pushed_out.is_cancelled()));
    }

    #[test]
    fn network_of_an_address_is_what_one_customer_has() {
        let network = |text: &str| network(text.parse().expect("an address")).to_string();
        assert_eq!(network("2001:db8:1:2:3::4"), "2001:db8:1:2::");
        assert_eq!(network("::ffff:10.0.0.1"), "10.0.0.1");
    }
}
