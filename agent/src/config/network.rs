//! Decides which addresses sandboxes get. The pool must lie in the bridge's network.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::{Pool, Setting, Source, Sourced, Sources, file};
use crate::{
    detect::{self, Roots, Undecided},
    sandbox::Dhcp,
};

/// Network settings of sandboxes, complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// Bridge of the sandboxes.
    pub bridge: String,
    /// Default route of the sandboxes.
    pub gateway: Ipv4Addr,
    /// Prefix length of the bridge's network.
    pub prefix: u8,
    /// Addresses that may be leased: without the network's own addresses, the gateway's and the
    /// host's.
    pub pool: Pool,
    /// Addresses of this host.
    pub own: Vec<Ipv4Addr>,
    /// Sandboxes that may ask a DHCP server instead.
    pub dhcp: Dhcp,
    /// DHCP server whose replies count.
    pub dhcp_server: Ipv4Addr,
}

/// Returns the pool of a node whose bridge has no address: a /24 for each.
fn by_number(number: u32) -> Option<Ipv4Net> {
    let third = u8::try_from(number).ok()?;
    Ipv4Net::new(Ipv4Addr::new(10, 100, third, 0), 24).ok()
}

pub(super) fn complete(
    from: &mut Sources<'_>,
    file: &file::Network,
    number: Option<u32>,
    roots: Roots<'_>,
) -> Option<Network> {
    let said =
        from.said("network.bridge", from.flags.bridge.clone(), file.bridge.clone(), "PVE_BRIDGE");
    let bridge = from.or_detect("network.bridge", said, || detect::bridge(roots))?;
    if !is_bridge(&bridge.value, roots) {
        from.mistake("network.bridge", format!("there is no interface {:?}", bridge.value));
        return None;
    }
    from.show("network.bridge", Some(&bridge));
    let host = detect::on_bridge(roots, &bridge.value);
    let network = host.and_then(|host| Ipv4Net::new(host.address, host.prefix).ok());

    let said = from.said("network.gateway", from.flags.gateway, file.gateway, "PVE_GATEWAY");
    let gateway = from.or_detect("network.gateway", said, || {
        let uplink = detect::uplink(roots, &bridge.value);
        uplink.or(host.map(|host| host.address)).ok_or_else(|| {
            let text = format!("{} has no address: say which gateway sandboxes have", bridge.value);
            Undecided::None(text)
        })
    })?;
    from.show("network.gateway", Some(&gateway));

    let said = from.said("network.pool", from.flags.pool, file.pool, "PVE_IP_POOL_CIDR");
    let shared = detect::uplink(roots, &bridge.value).is_some();
    let pool = from.or_detect("network.pool", said, || by_default(network, number, shared))?;
    // Without its own address on the bridge, the host cannot tell the size of the network.
    let network = network.or_else(|| smallest(pool.value, gateway.value))?;
    if !pool.value.is_in(network) || !network.contains(&gateway.value) {
        let text = format!(
            "pool {} ({}) and gateway {} ({}) must lie in the network of {}, {}",
            pool.value,
            pool.source,
            gateway.value,
            gateway.source,
            bridge.value,
            network.trunc()
        );
        from.mistake("network.pool", text);
        return None;
    }
    let owned: Vec<Ipv4Addr> = host.map(|h| h.address).into_iter().chain([gateway.value]).collect();
    let Some(usable) = pool.value.without(network, &owned) else {
        from.mistake("network.pool", format!("{} leaves no address to lease", pool.value));
        return None;
    };
    from.show("network.pool", Some(&Sourced { value: usable, source: pool.source }));
    let (dhcp, dhcp_server) = dhcp(from, file, gateway.value);
    Some(Network {
        bridge: bridge.value,
        gateway: gateway.value,
        prefix: network.prefix_len(),
        pool: usable,
        own: detect::own_addresses(roots),
        dhcp,
        dhcp_server,
    })
}

fn dhcp(from: &mut Sources<'_>, file: &file::Network, gateway: Ipv4Addr) -> (Dhcp, Ipv4Addr) {
    let (dhcp, word) = match file.dhcp {
        None | Some(file::Dhcp::Switch(false)) => (Dhcp::Refused, "false"),
        Some(file::Dhcp::Switch(true)) => (Dhcp::All, "true"),
        Some(file::Dhcp::Word(file::DhcpWord::OnRequest)) => (Dhcp::OnRequest, "on_request"),
    };
    let source = if file.dhcp.is_some() { Source::File } else { Source::Default };
    from.settings.push(Setting { name: "network.dhcp", value: word.to_owned(), source });
    let server = file.dhcp_server.unwrap_or(gateway);
    if dhcp != Dhcp::Refused {
        let source = if file.dhcp_server.is_some() { Source::File } else { Source::Default };
        let value = server.to_string();
        from.settings.push(Setting { name: "network.dhcp_server", value, source });
    }
    (dhcp, server)
}

/// Chooses the default pool: the bridge's network, or the node's /24 of 10.100.0.0/16. Never a
/// network shared with others: which of its addresses are free is unknown here.
fn by_default(
    network: Option<Ipv4Net>,
    number: Option<u32>,
    shared: bool,
) -> Result<Pool, Undecided> {
    let own = number.and_then(by_number);
    match (network, own) {
        (Some(network), Some(own)) if network.contains(&own) => Ok(Pool::of(own)),
        (Some(network), _) if shared => Err(Undecided::None(format!(
            "the bridge is on a network that others share, {}: say which part of it is for \
             sandboxes, or connect them to another bridge",
            network.trunc()
        ))),
        (Some(network), _) => Ok(Pool::of(network)),
        (None, Some(own)) => Ok(Pool::of(own)),
        (None, None) => Err(Undecided::None(super::NUMBER_UNKNOWN.to_owned())),
    }
}

/// Returns the pool that the file or this host decides; `None` when the controller may choose one.
pub fn pool_of_host(file: &file::File, number: u32, roots: Roots<'_>) -> Option<Pool> {
    if file.network.pool.is_some() {
        return file.network.pool;
    }
    let bridge = file.network.bridge.clone().or_else(|| detect::bridge(roots).ok())?;
    let host = detect::on_bridge(roots, &bridge)?;
    let network = Ipv4Net::new(host.address, host.prefix).ok()?;
    let shared = detect::uplink(roots, &bridge).is_some();
    by_default(Some(network), Some(number).filter(|number| *number > 0), shared).ok()
}

/// Returns the smallest network that contains the pool and the gateway.
fn smallest(pool: Pool, gateway: Ipv4Addr) -> Option<Ipv4Net> {
    let networks = (8..=30).rev().filter_map(|prefix| Ipv4Net::new(gateway, prefix).ok());
    networks.map(|network| network.trunc()).find(|network| pool.is_in(*network))
}

/// Returns true when this is an interface of the host whose name can be written into a config.
pub(super) fn is_bridge(name: &str, roots: Roots<'_>) -> bool {
    is_interface(name) && roots.net.join(name).exists()
}

/// Returns true for a valid interface name without characters at which `pct` would split.
fn is_interface(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && !name.starts_with(['-', '.'])
}
