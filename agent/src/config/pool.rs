//! Range of addresses: a network, or `first-last`.

use std::{fmt, net::Ipv4Addr, str::FromStr};

use ipnet::Ipv4Net;
use serde::Deserialize;

/// Range of addresses, inclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Pool {
    /// First address.
    pub first: Ipv4Addr,
    /// Last address.
    pub last: Ipv4Addr,
}

/// Error of a text that is not a range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("must be a network, such as 10.100.1.0/24, or first-last")]
pub struct Invalid;

impl Pool {
    /// Returns all addresses of a network.
    pub fn of(network: Ipv4Net) -> Self {
        Self { first: network.network(), last: network.broadcast() }
    }

    /// Returns true when the whole range lies in a network.
    pub fn is_in(&self, network: Ipv4Net) -> bool {
        network.contains(&self.first) && network.contains(&self.last)
    }

    /// Returns true when the address is in the range.
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        (self.first..=self.last).contains(&address)
    }

    /// Removes the network's first and last address and the owned ones, and returns the longest
    /// remaining range. `None` when nothing remains.
    pub fn without(self, network: Ipv4Net, owned: &[Ipv4Addr]) -> Option<Self> {
        let mut taken: Vec<u32> = [network.network(), network.broadcast()]
            .iter()
            .chain(owned)
            .map(|a| u32::from(*a))
            .collect();
        taken.sort_unstable();
        let (first, last) = (u32::from(self.first), u32::from(self.last));
        let mut best: Option<(u32, u32)> = None;
        let mut start = first;
        // A sentinel after the end closes the last range.
        for stop in
            taken.into_iter().filter(|t| (first..=last).contains(t)).chain([last.checked_add(1)?])
        {
            let longer = |(a, b): (u32, u32)| stop.saturating_sub(start) > b - a + 1;
            if stop > start && best.is_none_or(longer) {
                best = Some((start, stop - 1));
            }
            start = stop + 1;
        }
        best.map(|(first, last)| Self { first: first.into(), last: last.into() })
    }
}

impl FromStr for Pool {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        if let Ok(network) = text.parse::<Ipv4Net>() {
            return Ok(Self::of(network));
        }
        let (first, last) = text.split_once('-').ok_or(Invalid)?;
        let address = |text: &str| text.trim().parse::<Ipv4Addr>().map_err(|_| Invalid);
        let pool = Self { first: address(first)?, last: address(last)? };
        if pool.first <= pool.last { Ok(pool) } else { Err(Invalid) }
    }
}

impl TryFrom<String> for Pool {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}
