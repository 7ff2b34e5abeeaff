//! What sandboxes reach by the configuration.

use std::{collections::BTreeSet, fmt, net::Ipv4Addr, str::FromStr};

use ipnet::Ipv4Net;
use serde::Deserialize;

use super::{Config, Setting, Source, Sources, file, network::Network};
use crate::firewall::{Grounds, NAME_CONNECTIONS_MAX};

/// Most name servers, and most networks within reach.
const LISTED_MAX: usize = 64;
/// Shortest prefix of a network within reach: anything shorter is most of the world.
const PREFIX_MIN: u8 = 8;

/// Network that sandboxes may reach: an address, or a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Reach(Ipv4Net);

/// Error of a text that is no such network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("must be an address or a network of IPv4, such as 10.0.0.0/24, with a prefix of 8 or more")]
pub struct NoReach;

impl FromStr for Reach {
    type Err = NoReach;

    fn from_str(text: &str) -> Result<Self, NoReach> {
        let network = text.parse().or_else(|_| text.parse().map(Ipv4Addr::into));
        let network: Ipv4Net = network.map_err(|_| NoReach)?;
        if network.prefix_len() < PREFIX_MIN {
            return Err(NoReach);
        }
        Ok(Self(network.trunc()))
    }
}

impl TryFrom<String> for Reach {
    type Error = NoReach;

    fn try_from(text: String) -> Result<Self, NoReach> {
        text.parse()
    }
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Isolation of the sandboxes, complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Isolation {
    /// Whether sandboxes are isolated.
    pub enabled: bool,
    /// Name servers that sandboxes may ask; `None`: the gateway and the host's own.
    pub name_servers: Option<BTreeSet<Ipv4Addr>>,
    /// Private networks that sandboxes may reach.
    pub reach: Vec<Reach>,
}

pub(super) fn complete(from: &mut Sources<'_>, file: &file::Network) -> Isolation {
    let (enabled, source) = match file.isolation {
        Some(enabled) => (enabled, Source::File),
        None => (true, Source::Default),
    };
    let value = match enabled {
        true => "true",
        false => "false: SANDBOXES REACH EACH OTHER, THIS HOST AND ITS NETWORKS",
    };
    let mut show = |name, value| from.settings.push(Setting { name, value, source });
    show("network.isolation", value.to_owned());
    let source = Source::File;
    let mut show = |name, value| from.settings.push(Setting { name, value, source });
    if let Some(servers) = &file.name_servers {
        show("network.name_servers", list(servers));
    }
    if !file.reach.is_empty() {
        show("network.reach", list(&file.reach));
    }
    let few = file.name_servers.as_ref().is_none_or(|servers| servers.len() <= LISTED_MAX);
    from.must(few, "network.name_servers", "must be at most 64");
    from.must(file.reach.len() <= LISTED_MAX, "network.reach", "must be at most 64");
    Isolation {
        enabled,
        name_servers: file.name_servers.as_ref().map(|servers| servers.iter().copied().collect()),
        reach: file.reach.clone(),
    }
}

impl Config {
    /// Returns the addresses that isolation is about; `None` where it is switched off. `host` are the
    /// name servers that the host itself asks, which PVE gives to containers, too.
    pub fn grounds(&self, host: &[Ipv4Addr]) -> Option<Grounds> {
        let Network { gateway, prefix, own, dhcp, dhcp_server, .. } = &self.network;
        let isolation = &self.isolation;
        let by_default = || host.iter().copied().chain([*gateway]).collect();
        let network = Ipv4Net::new(*gateway, *prefix).map(|network| network.trunc());
        isolation.enabled.then(|| Grounds {
            gateway: *gateway,
            name_servers: isolation.name_servers.clone().unwrap_or_else(by_default),
            dhcp_server: (*dhcp != crate::sandbox::Dhcp::Refused).then_some(*dhcp_server),
            closed: own.iter().copied().map(Ipv4Net::from).chain(network).collect(),
            reach: isolation.reach.iter().map(|reach| reach.0).collect(),
            connections: Some(self.limits.connections),
            name_connections: Some(NAME_CONNECTIONS_MAX),
        })
    }
}

fn list(all: &[impl ToString]) -> String {
    all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reach_is_an_address_or_a_network() {
        let reach = |text: &str| text.parse::<Reach>().map(|reach| reach.to_string()).ok();
        assert_eq!(reach("10.0.0.5").as_deref(), Some("10.0.0.5/32"));
        assert_eq!(reach("10.0.0.5/24").as_deref(), Some("10.0.0.0/24"));
        for bad in ["", "0.0.0.0/0", "10.0.0.0/7", "fe80::1", "10.0.0.0/33", "example.com"] {
            assert_eq!(reach(bad), None, "{bad}");
        }
    }
}
