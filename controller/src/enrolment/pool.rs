//! Ranges of addresses of the nodes' sandboxes: a network, or `first-last`.

use std::{fmt, net::Ipv4Addr, str::FromStr};

use proto::id::Invalid;

/// Range of addresses, inclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pool {
    first: Ipv4Addr,
    last: Ipv4Addr,
}

impl Pool {
    /// Returns true when two ranges have an address in common.
    pub(super) fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// Returns the /24 of 10.100.0.0/16 with a number.
    fn numbered(number: u8) -> Self {
        let address = |last| Ipv4Addr::new(10, 100, number, last);
        Self { first: address(0), last: address(255) }
    }
}

impl FromStr for Pool {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let invalid =
            || Invalid::new("pool", "must be a network such as 10.100.1.0/24, or first-last");
        let address = |text: &str| text.trim().parse::<Ipv4Addr>().map_err(|_| invalid());
        if let Some((network, prefix)) = text.split_once('/') {
            let prefix = prefix.parse::<u32>().ok().filter(|prefix| (8..=32).contains(prefix));
            let host = u32::MAX.checked_shr(prefix.ok_or_else(invalid)?).unwrap_or(0);
            let network = address(network)?.to_bits() & !host;
            return Ok(Self { first: network.into(), last: (network | host).into() });
        }
        let (first, last) = text.split_once('-').ok_or_else(invalid)?;
        let pool = Self { first: address(first)?, last: address(last)? };
        if pool.first <= pool.last { Ok(pool) } else { Err(invalid()) }
    }
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// Returns a free /24 of 10.100.0.0/16: the one with the node's number if it is free, else the lowest.
pub(super) fn free(number: u32, taken: &[Pool]) -> Option<String> {
    let preferred = u8::try_from(number).ok().filter(|number| *number > 0);
    let free = |number: &u8| !taken.iter().any(|pool| pool.overlaps(Pool::numbered(*number)));
    let number = preferred.into_iter().chain(1..=254).find(free)?;
    Some(format!("10.100.{number}.0/24"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(text: &str) -> Pool {
        text.parse().expect(text)
    }

    #[test]
    fn ranges_overlap_if_they_have_an_address_in_common() {
        let one = pool("10.100.1.0/24");
        for other in
            ["10.100.1.255-10.100.2.9", "10.0.0.0/8", "10.100.1.7-10.100.1.7", "10.100.1.9/24"]
        {
            assert!(one.overlaps(pool(other)) && pool(other).overlaps(one), "{other}");
        }
        for other in ["10.100.2.0/24", "10.100.0.0-10.100.0.255"] {
            assert!(!one.overlaps(pool(other)), "{other}");
        }
        for bad in ["", "x", "10.0.0.0/33", "10.0.0.0/0", "10.0.0.9-10.0.0.1", "10.0.0.1"] {
            assert!(bad.parse::<Pool>().is_err(), "{bad}");
        }
    }

    #[test]
    fn node_gets_the_network_of_its_number_or_the_lowest_that_is_free() {
        assert_eq!(free(3, &[]).as_deref(), Some("10.100.3.0/24"));
        assert_eq!(free(3, &[pool("10.100.3.128/25")]).as_deref(), Some("10.100.1.0/24"));
        assert_eq!(free(0, &[pool("10.100.1.0/24")]).as_deref(), Some("10.100.2.0/24"));
        assert_eq!(free(9999, &[]).as_deref(), Some("10.100.1.0/24"));
        assert_eq!(free(1, &[pool("10.100.0.0/16")]), None);
    }
}
