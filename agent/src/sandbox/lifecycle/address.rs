//! Addresses of sandboxes, and the check that a container is connected as its record says.
//!
//! An address is used only while the journal leases it. Nothing inside a container is trusted: its
//! root can put any address on its interface. With DHCP, the lease is the address that the DHCP
//! server was seen to acknowledge to the container's MAC, where no sandbox can have sent the reply.
//! It is in the journal before the first packet goes to it, and stays the same for the whole boot.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::Ipv4Addr,
    sync::Arc,
    time::Duration,
};

use ipnet::Ipv4Net;
use proto::{
    Reason,
    id::{SandboxId, SandboxRef, Vmid},
    spec::Network,
};
use tokio::time::{Instant, sleep};
use tracing::field::display;

use super::boot::Boot;
use crate::{
    journal::Record,
    pve::{
        ContainerConfig, Settings,
        config_file::{Interface, Ip},
    },
    sandbox::{Bridge, Dhcp, Error, Result, Sandboxes, core::queries},
};

/// Interval of checks for a DHCP reply while a sandbox boots; each reads only memory.
const LOOK: Duration = Duration::from_millis(20);
/// Interval of checks for replies to running sandboxes: renewals, and starts outside of the agent.
const FOLLOW: Duration = Duration::from_secs(10);

/// A hardware address.
pub type Mac = [u8; 6];

/// Acknowledgement by a DHCP server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// Address that was acknowledged.
    pub ip: Ipv4Addr,
    /// Time at which the reply was seen.
    pub seen: Instant,
}

/// Replies of the DHCP server, as this host sees them where no sandbox can have sent them.
pub trait DhcpReplies: Send + Sync + fmt::Debug {
    /// Checks that replies can be seen.
    ///
    /// # Errors
    /// A sentence that says why not, and what to do.
    fn ready(&self) -> Result<(), String>;

    /// Returns the last reply to this MAC whose lease has not expired.
    fn last(&self, mac: Mac) -> Option<Reply>;
}

impl Sandboxes {
    /// Sets the source of DHCP replies, without which DHCP is refused. Only the first call counts.
    pub fn watch_dhcp(&self, replies: Arc<dyn DhcpReplies>) {
        drop(self.dhcp.set(replies));
    }

    /// Decides how a sandbox that asked for `asked` gets its address on this node.
    pub(in crate::sandbox) fn network_of(&self, asked: Network) -> Result<Network> {
        let network = match (self.options.network.dhcp, asked) {
            (Dhcp::Refused | Dhcp::OnRequest, Network::Static) => Network::Static,
            (Dhcp::Refused, Network::Dhcp) => {
                let why = "this node gives addresses itself: its configuration does not allow DHCP \
                           (network.dhcp)";
                return Err(Error::new(Reason::DhcpRefused, why));
            }
            (Dhcp::OnRequest, Network::Dhcp) | (Dhcp::All, _) => Network::Dhcp,
        };
        if network == Network::Dhcp {
            self.replies()?.ready().map_err(|why| Error::new(Reason::DhcpRefused, why))?;
        }
        Ok(network)
    }

    /// Checks that DHCP replies on this bridge are seen.
    ///
    /// # Errors
    /// DHCP_REFUSED: replies are watched on one bridge only.
    pub(in crate::sandbox) fn check_dhcp_bridge(&self, bridge: &str) -> Result<()> {
        let watched = &self.options.network.name;
        if bridge == watched {
            return Ok(());
        }
        let why = format!(
            "it asks a DHCP server on bridge {bridge}, and replies are seen on {watched} alone: give it \
             a static address"
        );
        Err(Error::new(Reason::DhcpRefused, why))
    }

    fn replies(&self) -> Result<&Arc<dyn DhcpReplies>> {
        let why = "the replies of the DHCP server cannot be seen on this host";
        self.dhcp.get().ok_or_else(|| Error::new(Reason::DhcpRefused, why))
    }

    /// Reads network and address of an existing container from its config or from DHCP replies.
    ///
    /// # Errors
    /// DHCP_REFUSED when it asks a DHCP server and that is not allowed, or replies on its bridge
    /// are not seen; ADDRESS_CONFLICT when its address belongs to the host or to another container.
    pub(in crate::sandbox) async fn address_of(
        &self,
        vmid: Vmid,
        config: &ContainerConfig,
    ) -> Result<(Network, Option<Ipv4Addr>)> {
        let refused =
            |reason, why: String| Err(Error::new(reason, format!("container {vmid}: {why}")));
        let Some(net0) = config.net0() else { return Ok((Network::Static, None)) };
        match net0.ip {
            Ip::Manual => Ok((Network::Static, None)),
            Ip::Static(ip, _) => {
                if self.options.network.is_the_hosts(ip) {
                    let why = format!("{ip} is the address of the host or of its gateway");
                    return refused(Reason::AddressConflict, why);
                }
                // The address of another sandbox is refused by the journal.
                if let Some(other) = self.stranger_with(ip, vmid).await? {
                    let why = format!("container {other} has its address {ip}, too");
                    return refused(Reason::AddressConflict, why);
                }
                Ok((Network::Static, Some(ip)))
            }
            Ip::Dhcp => {
                if let Err(error) = self.network_of(Network::Dhcp) {
                    let why = format!(
                        "its address comes from a DHCP server, and {error}. Give it a static one: \
                         `pct set {vmid} --net0 ...,ip=ADDRESS/PREFIX,gw=GATEWAY`"
                    );
                    return refused(Reason::DhcpRefused, why);
                }
                if let Err(error) = self.check_dhcp_bridge(&net0.bridge) {
                    return refused(Reason::DhcpRefused, error.message);
                }
                let replies = self.replies()?;
                let reply = parse_mac(&net0.mac).and_then(|mac| replies.last(mac));
                let ip = match reply {
                    Some(reply) => {
                        let unfit = self.unfit(None, reply.ip).await;
                        unfit.iter().for_each(|unfit| unfit.log(None));
                        unfit.is_none().then_some(reply.ip)
                    }
                    None => None,
                };
                Ok((Network::Dhcp, ip))
            }
        }
    }

    /// Says why a sandbox must not get this address from DHCP; `None` when it may.
    async fn unfit(&self, id: Option<&SandboxId>, ip: Ipv4Addr) -> Option<Unfit> {
        if let Some(why) = self.options.network.unfit(ip) {
            return Some(Unfit { why, holder: None });
        }
        let live = self.live();
        let other = live.iter().find(|other| Some(&other.id) != id && other.lease() == Some(ip));
        if let Some(other) = other {
            let why = format!("{ip} is the address of another sandbox");
            return Some(Unfit { why, holder: Some(other.id) });
        }
        let strangers = self.taken_addresses().await;
        strangers.contains(&ip).then(|| Unfit {
            why: format!("{ip} is the address of a container of this node"),
            holder: None,
        })
    }

    /// Checks that the container is connected as its record says, and alone has its address.
    ///
    /// # Errors
    /// ADDRESS_CONFLICT, with what differs and what to do.
    pub(in crate::sandbox) async fn check_connection(
        &self,
        record: &Record,
        config: &ContainerConfig,
    ) -> Result<()> {
        if let Some(why) = differs(record, &self.settings(record), config.net0().as_ref()) {
            return Err(Error::new(Reason::AddressConflict, why));
        }
        let (Network::Static, Some(ip)) = (record.network, record.ip) else { return Ok(()) };
        match self.stranger_with(ip, record.vmid).await? {
            None => Ok(()),
            Some(other) => {
                let why = format!(
                    "container {other}, which is no sandbox, has {ip}, the address of {}: give it \
                     another, or remove it",
                    record.id
                );
                Err(Error::new(Reason::AddressConflict, why))
            }
        }
    }

    /// Finds a container other than `vmid` that is no sandbox and whose config has this address.
    async fn stranger_with(&self, ip: Ipv4Addr, vmid: Vmid) -> Result<Option<Vmid>> {
        let own: BTreeSet<Vmid> = self.live().iter().map(|record| record.vmid).collect();
        let configs = self.pve.configs().await?;
        let strangers = configs.iter().filter(|(other, config)| {
            **other != vmid && !own.contains(other) && !config.is_template()
        });
        let mut holders =
            strangers.filter(|(_, config)| config.static_addresses().any(|a| a == ip));
        Ok(holders.next().map(|(other, _)| *other))
    }

    /// Waits for the DHCP server's reply to a booting sandbox, and leases the address.
    pub(in crate::sandbox) async fn lease_from_dhcp(
        &self,
        boot: &Boot<'_>,
        until: Instant,
    ) -> Result<Ipv4Addr> {
        let Record { id, vmid, .. } = *boot.record;
        let replies = self.replies()?;
        let Some(mac) = self.mac_of(boot.record).await? else {
            let why =
                format!("net0 of container {vmid} has no hwaddr: DHCP replies cannot be told");
            return Err(Error::new(Reason::AddressConflict, why));
        };
        let ip = loop {
            if let Some(reply) = replies.last(mac).filter(|reply| reply.seen >= boot.begun) {
                break reply.ip;
            }
            if !self.pve.running(vmid).await {
                let why = format!("CT {vmid} stopped while it booted, before DHCP gave an address");
                return Err(Error::new(Reason::PctFailed, why));
            }
            if Instant::now() + LOOK >= until {
                let why = format!("no DHCP reply to CT {vmid} was seen in time");
                return Err(Error::new(Reason::ProbeTimeout, why));
            }
            sleep(LOOK).await;
        };
        if let Some(unfit) = self.unfit(Some(&id), ip).await {
            unfit.log(Some(&id));
            let Unfit { why, holder: _ } = unfit;
            let why =
                format!("the DHCP server gave CT {vmid} an address that it must not have: {why}");
            return Err(Error::new(Reason::AddressConflict, why));
        }
        self.grant(&id, boot.record.boot, ip).await?;
        Ok(ip)
    }

    /// Records an address from DHCP as the lease, unless the sandbox was booted again meanwhile.
    async fn grant(&self, id: &SandboxId, boot: u32, ip: Ipv4Addr) -> Result<()> {
        self.records
            .amend(id, |record| {
                if record.phase.ended() || record.boot != boot {
                    return Err(queries::deleted(&SandboxRef::Id(record.id)));
                }
                (record.ip, record.ip_granted) = (Some(ip), true);
                Ok(())
            })
            .await?;
        // Until then nothing gets through that it sends from its address.
        self.isolate().await?;
        tracing::info!(sandbox_id = %id, %ip, "address leased from a DHCP reply");
        Ok(())
    }

    /// Returns the MAC of a sandbox: by its record where the agent chose it, else by its config.
    async fn mac_of(&self, record: &Record) -> Result<Option<Mac>> {
        if !was_found(record) {
            return Ok(Some(self.settings(record).mac));
        }
        let net0 = self.pve.config(record.vmid).await?.and_then(|config| config.net0());
        Ok(net0.and_then(|net0| parse_mac(&net0.mac)))
    }

    /// Looks up the DHCP address of a sandbox started outside of the agent, if it may have it.
    pub(in crate::sandbox) async fn found_by_dhcp(&self, record: &Record) -> Option<Ipv4Addr> {
        let found = self.given_by_dhcp(record).await?;
        found.inspect_err(|unfit| unfit.log(Some(&record.id))).ok()
    }

    /// Looks up the address that DHCP gave a sandbox; an error when it must not have that.
    async fn given_by_dhcp(&self, record: &Record) -> Option<Result<Ipv4Addr, Unfit>> {
        let mac = self.mac_of(record).await.ok()??;
        let reply = self.dhcp.get()?.last(mac)?;
        let unfit = self.unfit(Some(&record.id), reply.ip).await;
        Some(unfit.map_or(Ok(reply.ip), Err))
    }

    /// Looks up an address that DHCP gave in the middle of a boot, where it differs from the lease.
    pub(in crate::sandbox) async fn given_otherwise(&self, record: &Record) -> Option<Ipv4Addr> {
        let lease = record.lease().filter(|_| record.network == Network::Dhcp)?;
        let mac = self.mac_of(record).await.ok()??;
        let reply = self.dhcp.get()?.last(mac)?;
        (reply.ip != lease).then_some(reply.ip)
    }

    /// Leases DHCP addresses for running sandboxes that have none, until the agent stops.
    pub async fn follow_dhcp(self: Arc<Self>) {
        let stop = self.tasks.stopping().clone();
        let mut logged = BTreeMap::new();
        while stop.run_until_cancelled(sleep(FOLLOW)).await.is_some() {
            let mut refused = BTreeMap::new();
            let lacks = |record: &Record| {
                record.network == Network::Dhcp && record.phase.is_up() && record.lease().is_none()
            };
            for record in self.live().into_iter().filter(|record| lacks(record)) {
                let ip = match self.given_by_dhcp(&record).await {
                    None => continue,
                    Some(Ok(ip)) => ip,
                    Some(Err(unfit)) => {
                        // Once: a client may ask for it again and again.
                        if logged.get(&record.id) != Some(&unfit) {
                            unfit.log(Some(&record.id));
                        }
                        refused.insert(record.id, unfit);
                        continue;
                    }
                };
                if let Err(error) = self.grant(&record.id, record.boot, ip).await {
                    tracing::warn!(sandbox_id = %record.id, %ip, %error, "address was not leased");
                }
            }
            logged = refused;
        }
    }
}

/// Reason why a sandbox must not get an address from DHCP.
#[derive(Debug, PartialEq, Eq)]
struct Unfit {
    /// Sentence that its team may read.
    why: String,
    /// Sandbox that has the address. It may be another team's, so the log alone names it.
    holder: Option<SandboxId>,
}

impl Unfit {
    /// Logs that the sandbox, where it has an id already, does not get the address.
    fn log(&self, id: Option<&SandboxId>) {
        let Self { why, holder } = self;
        let (sandbox_id, holder) = (id.map(display), holder.map(display));
        tracing::warn!(sandbox_id, why, holder, "DHCP reply was not used");
    }
}

impl Bridge {
    /// Says why DHCP must not give this address to a sandbox; `None` when it may.
    fn unfit(&self, ip: Ipv4Addr) -> Option<String> {
        let network = Ipv4Net::new(self.gateway, self.prefix).ok()?;
        let edge = ip == network.network() || ip == network.broadcast();
        if !network.contains(&ip) || edge {
            return Some(format!("{ip} is no host of the sandboxes' network {}", network.trunc()));
        }
        self.is_the_hosts(ip).then(|| format!("{ip} is the address of the host or of its gateway"))
    }

    fn is_the_hosts(&self, ip: Ipv4Addr) -> bool {
        ip == self.gateway || self.own.contains(&ip)
    }
}

/// Describes how the container's first interface differs from the record; `None` when it does not.
/// Pure. Ignores bridge and MAC of an adopted container, which its operator chose, and of a
/// recovered one, which were taken as found.
pub(in crate::sandbox) fn differs(
    record: &Record,
    expected: &Settings,
    net0: Option<&Interface>,
) -> Option<String> {
    let found = was_found(record);
    let fits = |net0: &Interface| {
        let address = match (record.network, record.ip, net0.ip) {
            (Network::Static, Some(ip), Ip::Static(is, _)) => ip == is,
            (Network::Static, Some(_), Ip::Dhcp | Ip::Manual) => false,
            (Network::Static, None, _) => true,
            (Network::Dhcp, _, is) => is == Ip::Dhcp,
        };
        let same = net0.bridge == expected.bridge && parse_mac(&net0.mac) == Some(expected.mac);
        address && (found || same)
    };
    let needs_none = record.network == Network::Static && record.ip.is_none();
    if needs_none || net0.is_some_and(fits) {
        return None;
    }
    let address = match (record.network, record.ip) {
        (Network::Static, Some(ip)) => format!("ip={ip}/{}", prefix(expected)),
        (Network::Static, None) => "no address".to_owned(),
        (Network::Dhcp, _) => "ip=dhcp".to_owned(),
    };
    let should = if found {
        address
    } else {
        let Settings { bridge, mac, .. } = expected;
        format!("bridge={bridge},hwaddr={},{address}", show_mac(*mac))
    };
    let is = net0.map_or("is not there".to_owned(), |net0| {
        let ip = match net0.ip {
            Ip::Static(ip, prefix) => format!("ip={ip}/{prefix}"),
            Ip::Dhcp => "ip=dhcp".to_owned(),
            Ip::Manual => "ip=manual".to_owned(),
        };
        format!("has bridge={},hwaddr={},{ip}", net0.bridge, net0.mac)
    });
    Some(format!("net0 of container {} {is}; by its record it has {should}", record.vmid))
}

/// True when the agent did not choose bridge and MAC. The template of a recovered sandbox is
/// unknown: its record has its own vmid there.
pub(in crate::sandbox) fn was_found(record: &Record) -> bool {
    record.adopted || record.template == record.vmid
}

fn prefix(settings: &Settings) -> String {
    match settings.address {
        crate::pve::Address::Static { prefix, .. } => prefix.to_string(),
        crate::pve::Address::Dhcp => "PREFIX".to_owned(),
    }
}

pub(in crate::sandbox) fn parse_mac(text: &str) -> Option<Mac> {
    let mut mac = [0; 6];
    let mut words = text.split(':');
    for byte in &mut mac {
        let word = words.next().filter(|word| word.len() == 2)?;
        *byte = u8::from_str_radix(word, 16).ok()?;
    }
    words.next().is_none().then_some(mac)
}

fn show_mac(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02X}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{journal::conformance::record, pve::Address};

    const MAC: Mac = [0x02, 0x50, 10, 100, 1, 7];

    fn bridge() -> Bridge {
        Bridge {
            name: "vmbr0".into(),
            prefix: 24,
            gateway: Ipv4Addr::new(10, 100, 1, 1),
            own: vec![Ipv4Addr::new(10, 100, 1, 9)],
            dhcp: Dhcp::All,
        }
    }

    #[test]
    fn address_of_the_host_or_outside_the_network_is_unfit() {
        let unfit = |last: [u8; 4]| bridge().unfit(last.into()).is_some();
        assert!(!unfit([10, 100, 1, 7]) && !unfit([10, 100, 1, 254]));
        for ip in [
            [10, 100, 1, 0],
            [10, 100, 1, 255],
            [10, 100, 1, 1],
            [10, 100, 1, 9],
            [10, 100, 2, 7],
            [127, 0, 0, 1],
            [0, 0, 0, 0],
            [169, 254, 0, 7],
        ] {
            assert!(unfit(ip), "{ip:?}");
        }
    }

    #[test]
    fn changed_net_line_differs_and_other_letter_case_does_not() {
        let ip = Ipv4Addr::new(10, 100, 1, 7);
        let gateway = Ipv4Addr::new(10, 100, 1, 1);
        let settings = |address| Settings {
            bridge: "vmbr0".into(),
            mac: MAC,
            address,
            link: Default::default(),
            cores: 1,
            memory_mib: 512,
        };
        let fixed = settings(Address::Static { ip, prefix: 24, gateway });
        let ours = Record { ip: Some(ip), ..record(1) };
        let says = |record: &Record, settings: &Settings, net0: &str| {
            let config = ContainerConfig::parse(format!("net0: {net0}\n").as_bytes());
            differs(record, settings, config.net0().as_ref())
        };
        let good = "name=eth0,bridge=vmbr0,hwaddr=02:50:0a:64:01:07,ip=10.100.1.7/24";
        assert_eq!(says(&ours, &fixed, good), None);
        assert_eq!(says(&ours, &fixed, &good.replace("/24", "/16")), None, "still its address");
        for (change, to) in [
            ("1.7/24", "1.8/24"),
            ("ip=10.100.1.7/24", "ip=dhcp"),
            ("ip=10.100.1.7/24", "ip=manual"),
            (",ip=10.100.1.7/24", ""),
            ("vmbr0", "vmbr1"),
            ("01:07", "01:08"),
            ("hwaddr=02:50:0a:64:01:07,", ""),
        ] {
            let changed = good.replace(change, to);
            let why =
                says(&ours, &fixed, &changed).unwrap_or_else(|| panic!("{changed} is as good"));
            assert!(why.contains("hwaddr=02:50:0A:64:01:07,ip=10.100.1.7/24"), "{why}");
        }
        assert!(differs(&ours, &fixed, None).is_some(), "no net0 at all");
        let adopted = Record { adopted: true, ..ours.clone() };
        assert_eq!(says(&adopted, &fixed, "bridge=vmbr9,ip=10.100.1.7/8"), None);
        assert!(says(&adopted, &fixed, "bridge=vmbr9,ip=10.100.1.8/8").is_some());
        let dynamic = Record { network: Network::Dhcp, ip: None, ..record(1) };
        let asks = settings(Address::Dhcp);
        assert_eq!(says(&dynamic, &asks, &good.replace("ip=10.100.1.7/24", "ip=dhcp")), None);
        assert!(says(&dynamic, &asks, good).is_some());
    }

    #[test]
    fn only_six_hex_bytes_parse_as_a_mac() {
        assert_eq!(parse_mac("02:50:0A:64:01:07"), Some(MAC));
        for text in
            ["", "02:50:0A:64:01", "02:50:0A:64:01:07:08", "+2:50:0A:64:01:07:", "2:5:A:64:1:7"]
        {
            assert_eq!(parse_mac(text), None, "{text}");
        }
        assert_eq!(parse_mac(&show_mac(MAC)), Some(MAC));
    }
}
