//! Judges what is left of this node's addresses and numbers for new sandboxes. Pure.

use std::{collections::BTreeSet, net::Ipv4Addr};

use daemon::doctor::Check;
use proto::id::Vmid;

use super::facts::Taken;
use crate::{config::Network, sandbox::Dhcp};

const NAME: &str = "pool";
/// A range of which less than this part is left is soon used up.
const FEW: u64 = 10;
/// Most addresses that are shown.
const SHOWN_MAX: usize = 3;
const RESTART: &str = "systemctl restart pve-sandbox-agent";

/// Numbers of a range, and how many of them somebody has.
#[derive(Debug, Clone, Copy)]
struct Range {
    all: u64,
    used: u64,
}

impl Range {
    fn free(self) -> u64 {
        self.all.saturating_sub(self.used)
    }
}

pub(super) fn check(network: &Network, vmids: (Vmid, Vmid), taken: &Taken) -> Vec<Check> {
    let (addresses, numbers) = (addresses(network, taken), numbers(vmids, taken));
    let pool = format!("network.pool {}", network.pool);
    let wider = format!(
        "sandboxctl ls shows what has them; delete what nobody needs, or set network.pool in agent.toml to more \
         of the network of {}, and {RESTART}",
        network.bridge
    );
    let (first, last) = vmids;
    let more = format!(
        "sandboxctl ls shows what has them; delete what nobody needs, or set a wider range in vmids in agent.toml \
         on every node, and {RESTART}"
    );
    let mut found: Vec<Check> = Vec::new();
    // Where every sandbox asks a DHCP server, none takes an address of the pool.
    if network.dhcp != Dhcp::All {
        found.extend(few(&pool, addresses, "addresses", &wider));
        found.extend(own(&pool, network));
    }
    found.extend(few(&format!("vmids {first}-{last}"), numbers, "numbers", &more));
    if found.is_empty() {
        let (of, all) = (addresses.free(), addresses.all);
        let found = format!(
            "{of} of {all} addresses and {} of {} numbers are free",
            numbers.free(),
            numbers.all
        );
        return vec![Check::ok(NAME, pool, found)];
    }
    found
}

/// Most sandboxes for which there are addresses and numbers.
pub(super) fn most(network: &Network, vmids: (Vmid, Vmid)) -> u64 {
    let none = Taken::default();
    let numbers = numbers(vmids, &none).all;
    if network.dhcp == Dhcp::All { numbers } else { numbers.min(addresses(network, &none).all) }
}

fn addresses(network: &Network, taken: &Taken) -> Range {
    let pool = network.pool;
    let all = u64::from(u32::from(pool.last)).saturating_sub(u32::from(pool.first).into()) + 1;
    let used: BTreeSet<_> = taken.addresses.iter().chain(&network.own).collect();
    let used = used.into_iter().filter(|address| pool.contains(**address)).count();
    Range { all, used: used as u64 }
}

fn numbers((first, last): (Vmid, Vmid), taken: &Taken) -> Range {
    let all = u64::from(last.get()).saturating_sub(first.get().into()) + 1;
    Range { all, used: taken.vmids.range(first..=last).count() as u64 }
}

fn few(subject: &str, range: Range, what: &str, remedy: &str) -> Option<Check> {
    let (free, all) = (range.free(), range.all);
    match free {
        0 => {
            let found = format!("none of {all} {what} is free: no sandbox can be made here");
            Some(Check::failed(NAME, subject, found, remedy))
        }
        _ if free < all / FEW => {
            let found = format!("{free} of {all} {what} are free");
            Some(Check::warning(NAME, subject, found, remedy))
        }
        _ => None,
    }
}

/// Finds addresses of the host itself in the pool. None of them is leased, and each is one less than the
/// pool seems to have.
fn own(subject: &str, network: &Network) -> Option<Check> {
    let inside = network.own.iter().filter(|own| network.pool.contains(**own));
    let shown: Vec<_> = inside.take(SHOWN_MAX).map(Ipv4Addr::to_string).collect();
    (!shown.is_empty()).then(|| {
        let found =
            format!("{} in it: an address of this host, which no sandbox gets", shown.join(", "));
        let remedy = format!("set network.pool in agent.toml to a range without it, and {RESTART}");
        Check::warning(NAME, subject, found, remedy)
    })
}

#[cfg(test)]
mod tests {
    use daemon::doctor::State;

    use super::*;

    fn network(pool: &str) -> Network {
        Network {
            bridge: "vmbr1".to_owned(),
            gateway: [10, 100, 1, 1].into(),
            prefix: 24,
            pool: pool.parse().expect("a pool"),
            own: vec![[10, 100, 1, 1].into(), [192, 0, 2, 5].into()],
            dhcp: Dhcp::Refused,
            dhcp_server: [10, 100, 1, 1].into(),
        }
    }

    fn vmid(number: u32) -> Vmid {
        Vmid::try_from(number).expect("a vmid")
    }

    /// Containers with these numbers, and the addresses 10.100.1.2 and so on.
    fn taken(vmids: std::ops::Range<u32>) -> Taken {
        let addresses = (2..).zip(vmids.clone()).map(|(last, _)| [10, 100, 1, last].into());
        Taken { addresses: addresses.collect(), vmids: vmids.map(vmid).collect() }
    }

    fn states(checks: &[Check]) -> Vec<(&str, State)> {
        checks.iter().map(|check| (check.subject.as_str(), check.state)).collect()
    }

    #[test]
    fn pool_without_a_free_address_is_found_and_a_wider_one_mends_it() {
        let (stripe, held) = ((vmid(100_000), vmid(199_999)), taken(100_000..100_004));
        let found = check(&network("10.100.1.2-10.100.1.5"), stripe, &held);
        assert_eq!(states(&found), [("network.pool 10.100.1.2-10.100.1.5", State::Failed)]);
        assert!(found[0].found.starts_with("none of 4 addresses"), "{found:?}");
        let remedy = found[0].remedy.as_deref().unwrap_or_default();
        assert!(remedy.contains("network.pool in agent.toml to more of the network of vmbr1"));
        let wider = check(&network("10.100.1.2-10.100.1.254"), stripe, &held);
        assert_eq!(wider[0].found, "249 of 253 addresses and 99996 of 100000 numbers are free");
        assert_eq!((wider.len(), wider[0].state), (1, State::Ok));
        // Addresses of a DHCP server are none of the pool.
        let dhcp = Network { dhcp: Dhcp::All, ..network("10.100.1.2-10.100.1.5") };
        assert_eq!(check(&dhcp, stripe, &held)[0].state, State::Ok);
    }

    #[test]
    fn range_that_is_nearly_used_up_is_a_warning() {
        let pool = network("10.100.1.2-10.100.1.254");
        let few = check(&pool, (vmid(100_000), vmid(100_019)), &taken(100_000..100_019));
        assert_eq!(states(&few), [("vmids 100000-100019", State::Warning)]);
        let none = check(&pool, (vmid(100_000), vmid(100_018)), &taken(100_000..100_019));
        assert_eq!(states(&none), [("vmids 100000-100018", State::Failed)]);
        let enough = check(&pool, (vmid(100_000), vmid(100_019)), &taken(100_000..100_010));
        assert_eq!(enough[0].state, State::Ok);
    }

    #[test]
    fn address_of_the_host_in_the_pool_is_a_warning_until_the_pool_is_without_it() {
        let stripe = (vmid(100_000), vmid(199_999));
        let two = Network {
            own: vec![[10, 100, 1, 1].into(), [10, 100, 1, 100].into()],
            ..network("10.100.1.2-10.100.1.254")
        };
        let found = check(&two, stripe, &Taken::default());
        assert_eq!(found[0].state, State::Warning);
        assert!(found[0].found.starts_with("10.100.1.100 in it"), "{found:?}");
        let without = Network { pool: "10.100.1.101-10.100.1.254".parse().expect("a pool"), ..two };
        assert_eq!(check(&without, stripe, &Taken::default())[0].state, State::Ok);
    }

    #[test]
    fn most_sandboxes_follow_from_the_smaller_range() {
        let pool = network("10.100.1.2-10.100.1.254");
        assert_eq!(most(&pool, (vmid(100_000), vmid(199_999))), 253);
        assert_eq!(most(&pool, (vmid(100_000), vmid(100_009))), 10);
        let dhcp = Network { dhcp: Dhcp::All, ..pool };
        assert_eq!(most(&dhcp, (vmid(100_000), vmid(199_999))), 100_000);
    }
}
