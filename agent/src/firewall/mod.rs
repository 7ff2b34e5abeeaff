//! Isolation of sandboxes on the node's bridges, by tables of nftables that are ours alone.
//!
//! `render` turns rules into the text for `nft` and is pure. `nft` applies them to the host, `memory`
//! to a variable, for the simulation. `names` is about sandboxes with an allow-list. A rule names interfaces of sandboxes only, so other guests of
//! the bridge are never filtered. The names are known before PVE makes the interfaces, so a sandbox
//! is isolated before its first packet.

mod listing;
pub mod memory;
pub mod names;
pub mod nft;
pub mod render;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use ipnet::Ipv4Net;
use proto::{id::Vmid, spec::Egress};

pub use names::Grant;

/// Port of the gateway's address at which the resolver answers sandboxes with an allow-list.
pub const RESOLVER_PORT: u16 = 10_053;

/// Most connections of a sandbox to name servers by TCP. Programs ask so only for answers that are too long for UDP,
/// and one after another. The name server of the bridge has 20 for all.
pub const NAME_CONNECTIONS_MAX: u32 = 4;

/// Networks that no sandbox reaches: private, link-local, shared, reserved and multicast ones.
const NEVER_PUBLIC: [(Ipv4Addr, u8); 10] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    (Ipv4Addr::new(224, 0, 0, 0), 3),
];

/// Reason why the rules are not in force.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// nft could not be started, or its pipes broke.
    #[error("nft could not be run (is the package nftables installed?): {0}")]
    Run(String),
    /// nft did not accept the rules.
    #[error("nft failed: {0}")]
    Refused(String),
    /// nft did not end in time.
    #[error("nft did not end in time")]
    Deadline,
    /// The interface is no bridge of Linux, so nftables sees none of its packets.
    #[error(
        "{0} is no Linux bridge (Open vSwitch?): nftables cannot filter it; connect sandboxes to a \
         Linux bridge, or switch isolation off (network.isolation)"
    )]
    NotABridge(String),
    /// A setting of a bridge could not be written.
    #[error("{path} could not be set: {why}")]
    Bridge {
        /// File of the setting.
        path: String,
        /// Error of the system.
        why: String,
    },
}

/// Result of an effect on the host's rules.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Addresses that the rules of all sandboxes of a node are about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grounds {
    /// Default route of the sandboxes.
    pub gateway: Ipv4Addr,
    /// Name servers that sandboxes may ask.
    pub name_servers: BTreeSet<Ipv4Addr>,
    /// DHCP server that sandboxes with DHCP may ask; `None`: no sandbox uses DHCP.
    pub dhcp_server: Option<Ipv4Addr>,
    /// Networks out of reach beside those that are never public: those of the nodes.
    pub closed: BTreeSet<Ipv4Net>,
    /// Networks within reach although they are private.
    pub reach: BTreeSet<Ipv4Net>,
    /// Most connections that the host tracks for a sandbox; `None`: no limit.
    pub connections: Option<u32>,
    /// Most of them that it has to name servers; `None`: no limit.
    pub name_connections: Option<u32>,
}

impl Grounds {
    /// Returns all networks out of reach. No two of them overlap.
    fn all_closed(&self) -> Vec<Ipv4Net> {
        let never = NEVER_PUBLIC.iter().filter_map(|(ip, prefix)| Ipv4Net::new(*ip, *prefix).ok());
        let all: Vec<_> = never.chain(self.closed.iter().map(Ipv4Net::trunc)).collect();
        Ipv4Net::aggregate(&all)
    }

    /// Returns true when a sandbox that is open reaches this address.
    pub fn is_within_reach(&self, address: Ipv4Addr) -> bool {
        let has = |networks: Vec<Ipv4Net>| networks.iter().any(|net| net.contains(&address));
        has(self.all_reach()) || !has(self.all_closed())
    }

    /// Returns the networks within reach. No two of them overlap.
    fn all_reach(&self) -> Vec<Ipv4Net> {
        let all: Vec<_> = self.reach.iter().map(Ipv4Net::trunc).collect();
        Ipv4Net::aggregate(&all)
    }
}

/// One sandbox, as far as the rules are concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// MAC of its interface. Without one, nothing that it sends gets anywhere.
    pub mac: Option<[u8; 6]>,
    /// Address that it may send from; `None`: it has none yet.
    pub ip: Option<Ipv4Addr>,
    /// Whether it may ask the DHCP server.
    pub dhcp: bool,
    /// Reach of a sandbox outside of itself.
    pub egress: Egress,
}

/// Rules of a node: all that the tables are made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// Addresses of the node and its network.
    pub grounds: Grounds,
    /// Bridges that sandboxes are connected to.
    pub bridges: BTreeSet<String>,
    /// Further default routes: those of containers that the agent did not make.
    pub routers: BTreeSet<Ipv4Addr>,
    /// Sandboxes by the vmid of their container.
    pub sandboxes: BTreeMap<Vmid, Entry>,
}

/// Names that the interface of a container has on a bridge: the end of its cable, and the port of
/// PVE's firewall bridge, if PVE puts one in between.
pub fn ports(vmid: Vmid) -> [String; 2] {
    [format!("veth{vmid}i0"), format!("fwpr{vmid}p0")]
}

/// Name of the bridge that PVE's firewall puts between a container and the node's bridge.
pub fn firewall_bridge(vmid: Vmid) -> String {
    format!("fwbr{vmid}i0")
}

/// The host's rules. No method has a default body: a fake that forgets one would filter the real
/// host.
#[async_trait::async_trait]
pub trait Firewall: Send + Sync + std::fmt::Debug {
    /// Checks that packets on this bridge can be filtered.
    ///
    /// # Errors
    /// When it is no Linux bridge.
    fn can_filter(&self, bridge: &str) -> Result<()>;

    /// Makes the host's rules equal to these in one step. Does nothing when these were applied last.
    ///
    /// # Errors
    /// When they are not in force. The former ones may be.
    async fn apply(&self, rules: &Rules) -> Result<()>;

    /// Checks that this host can keep a sandbox to an allow-list.
    ///
    /// # Errors
    /// When it cannot.
    async fn can_allow(&self, grounds: &Grounds) -> Result<()>;

    /// Lets sandboxes reach these addresses, as far as the lists of the rules in force allow the names.
    /// Returns the sandboxes and names that they do not allow, or not yet.
    ///
    /// # Errors
    /// When the host does not let them.
    async fn allow(&self, grants: &[Grant]) -> Result<BTreeSet<(Ipv4Addr, String)>>;

    /// Compares the host's rules with those that were applied last. Returns what differs, and then
    /// the next `apply` replaces them all.
    ///
    /// # Errors
    /// When the host's rules could not be read.
    async fn check(&self) -> Result<Option<String>>;

    /// Returns false when the rules that were applied limit connections, and this kernel cannot count them.
    fn counts_connections(&self) -> bool;
}
