//! Settings of this node's connector, as `tunnel setup` leaves them: what the agent renders cloudflared's
//! configuration from. No secret is in them.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    path::Path,
    str::FromStr,
};

use daemon::{
    replace::{Access, replace},
    text,
};
use proto::id::Invalid;
use serde::{Deserialize, Serialize};

use super::{
    MARK,
    ids::{CloudId, TunnelId},
};
use crate::ingress::decide::Domain;

/// Address where cloudflared tells whether it is connected, unless the file says otherwise. Beside those of
/// Caddy, and none of those that cloudflared takes by itself.
pub const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 8482);

/// Settings of this node's connector.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Name of the tunnel.
    pub name: String,
    /// Its identifier.
    pub tunnel: TunnelId,
    /// Account that it belongs to.
    pub account: CloudId,
    /// Zone of the domain.
    pub zone: CloudId,
    /// Name of the zone, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone_name: Option<String>,
    /// Domain whose wildcard record leads to the tunnel.
    pub domain: Hostname,
    /// Controller whose gRPC-Web face is published, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub controller: Option<Controller>,
    /// Address where cloudflared tells whether it is connected.
    #[serde(default = "metrics")]
    pub metrics: SocketAddr,
    /// Remains of earlier setups of this node at Cloudflare, the oldest first: `teardown --everything` removes them,
    /// too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<Footprint>,
}

/// Most entries of [`Settings::earlier`].
pub const EARLIER_MAX: usize = 16;

/// Place of one setup at Cloudflare: its tunnel, and the zone with the records that lead there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Footprint {
    /// Name of the tunnel.
    pub name: String,
    /// Its identifier.
    pub tunnel: TunnelId,
    /// Account that it belongs to.
    pub account: CloudId,
    /// Zone of the records.
    pub zone: CloudId,
    /// Name of the zone, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone_name: Option<String>,
    /// Domain of the sandboxes.
    pub domain: Hostname,
}

impl Footprint {
    /// Returns true when both are the same tunnel and zone, whatever their domains.
    pub fn is_same_place(&self, other: &Self) -> bool {
        self.tunnel == other.tunnel && self.zone == other.zone
    }
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, tunnel, zone, zone_name, .. } = self;
        let zone = zone_name.clone().unwrap_or_else(|| zone.to_string());
        write!(f, "the tunnel {name} ({tunnel}) and its DNS records in the zone {zone}")
    }
}

fn metrics() -> SocketAddr {
    METRICS
}

impl Settings {
    /// Reads the settings; `None` where no tunnel was set up.
    ///
    /// # Errors
    /// When the file cannot be read or is no such file.
    pub fn read(path: &Path) -> io::Result<Option<Self>> {
        let Some(text) = text::read_if_there(path)? else { return Ok(None) };
        let parsed = serde_json::from_str(&text);
        parsed.map(Some).map_err(|error| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display()))
        })
    }

    /// Returns what this setup has at Cloudflare.
    pub fn footprint(&self) -> Footprint {
        Footprint {
            name: self.name.clone(),
            tunnel: self.tunnel.clone(),
            account: self.account.clone(),
            zone: self.zone.clone(),
            zone_name: self.zone_name.clone(),
            domain: self.domain.clone(),
        }
    }

    /// Writes the settings.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(io::Error::other)?;
        replace(path, format!("{text}\n").as_bytes(), Access::PRIVATE)
    }
}

/// Returns the name of the tunnel of a domain: the same on each node, and no other domain's.
pub fn name_of(domain: &Hostname) -> String {
    format!("{MARK}-{}", domain.as_str().replace('.', "-"))
}

/// Returns true for the name of a tunnel that we have made.
pub fn is_ours(name: &str) -> bool {
    name.starts_with(MARK)
}

/// Host name in lower case, as the domain of sandboxes is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hostname(Domain);

impl Hostname {
    /// Returns the text.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }

    /// Returns the name of the record that all hosts below it share.
    pub fn wildcard(&self) -> String {
        format!("*.{}", self.as_str())
    }

    /// Returns true when it is this zone's name or below it.
    pub fn is_in(&self, zone: &str) -> bool {
        let rest = self.as_str().strip_suffix(zone);
        rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    }
}

impl FromStr for Hostname {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        text.parse().map(Self).map_err(|_| {
            Invalid::new(
                "host name",
                "must be a domain name in lower case, such as `a.example.com`",
            )
        })
    }
}

impl TryFrom<String> for Hostname {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl From<Hostname> for String {
    fn from(host: Hostname) -> Self {
        host.0.to_string()
    }
}

impl fmt::Display for Hostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The controller's public name, and where the connectors reach it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Controller {
    /// Public name.
    pub host: Hostname,
    /// Address.
    pub address: Address,
}

/// Address of a server: host and port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Address {
    host: String,
    port: u16,
}

impl Address {
    /// Returns the port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl FromStr for Address {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let invalid = || Invalid::new("address", "must be host:port, such as `192.0.2.11:7443`");
        let (host, port) = text.rsplit_once(':').ok_or_else(invalid)?;
        let port = port.parse().ok().filter(|port| *port > 0).ok_or_else(invalid)?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let is_ip =
            bare.unwrap_or(host).parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6() == bare.is_some());
        if !is_ip && (bare.is_some() || host.parse::<Hostname>().is_err()) {
            return Err(invalid());
        }
        Ok(Self { host: host.to_owned(), port })
    }
}

impl TryFrom<String> for Address {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// Ports of PVE and of a node that are never published: its API, its daemon, its consoles, ssh.
const FORBIDDEN: &[(u16, &str)] =
    &[(8006, "PVE's API"), (85, "PVE's daemon"), (3128, "PVE's consoles"), (22, "ssh")];

/// Checks that a controller may be published: a name of its own, and no port of PVE or of the agents.
///
/// # Errors
/// A sentence that says why not, and what to give.
pub fn check_controller(
    controller: &Controller,
    domain: &Hostname,
    own: &[(u16, &str)],
) -> Result<(), String> {
    let Controller { host, address } = controller;
    let port = address.port();
    if let Some((_, what)) = FORBIDDEN.iter().chain(own).find(|(other, _)| *other == port) {
        return Err(format!(
            "port {port} is {what}, which is never published; --controller-address is where the controller's \
             API listens, such as 192.0.2.11:7443"
        ));
    }
    let label = host.as_str().split('.').next().unwrap_or_default();
    let is_of_sandbox = label.starts_with("port-")
        || label.contains("--")
        || label.split('-').next().is_some_and(|first| first.parse::<u16>().is_ok());
    if host == domain || is_of_sandbox {
        return Err(format!(
            "{host} can be the name of a sandbox; give the controller another, such as api.{domain}"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(text: &str) -> Hostname {
        text.parse().expect("a host name")
    }

    fn controller(name: &str, address: &str) -> Controller {
        Controller { host: host(name), address: address.parse().expect("an address") }
    }

    #[test]
    fn settings_are_read_as_they_were_written() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("settings.json");
        assert_eq!(Settings::read(&path).expect("none"), None);
        let settings = Settings {
            name: name_of(&host("sbx.example.com")),
            tunnel: "f70ff985-a4ef-4643-bbbc-4a0ed4fc8415".parse().expect("an id"),
            account: "023e105f4ecef8ad9ca31a8372d0c353".parse().expect("an id"),
            zone: "023e105f4ecef8ad9ca31a8372d0c354".parse().expect("an id"),
            zone_name: None,
            domain: host("sbx.example.com"),
            controller: Some(controller("api.example.com", "[2001:db8::1]:7443")),
            metrics: METRICS,
            earlier: Vec::new(),
        };
        assert_eq!(settings.name, "pve-sandbox-sbx-example-com");
        settings.write(&path).expect("written");
        let text = std::fs::read_to_string(&path).expect("read");
        assert!(!text.contains("earlier"), "as versions before wrote it: {text}");
        assert_eq!(Settings::read(&path).expect("read").as_ref(), Some(&settings));
        let moved = Settings { earlier: vec![settings.footprint()], ..settings };
        moved.write(&path).expect("written");
        assert_eq!(Settings::read(&path).expect("read"), Some(moved));
        std::fs::write(&path, "{}").expect("written");
        let error = Settings::read(&path).expect_err("not whole").to_string();
        assert!(error.contains("settings.json"), "{error}");
    }

    #[test]
    fn neither_pve_nor_an_agent_is_published_as_the_controller() {
        let domain = host("example.com");
        let own = [(7445, "this node's agent")];
        let check =
            |name: &str, address: &str| check_controller(&controller(name, address), &domain, &own);
        check("api.example.com", "192.0.2.11:7443").expect("the controller");
        check("api.example.com", "controller.internal:443").expect("the controller");
        for (address, what) in [
            ("192.0.2.11:8006", "PVE's API"),
            ("localhost:85", "PVE's daemon"),
            ("192.0.2.11:3128", "consoles"),
            ("192.0.2.11:22", "ssh"),
            ("192.0.2.11:7445", "agent"),
        ] {
            let why = check("api.example.com", address).expect_err(address);
            assert!(why.contains(what), "{why}");
        }
        for name in [
            "example.com",
            "port-80-vm-100001.example.com",
            "8080-x.example.com",
            "box--red.example.com",
        ] {
            check(name, "192.0.2.11:7443").expect_err(name);
        }
        for bad in [
            "",
            "host",
            "host:0",
            "host:70000",
            "1.2.3.4",
            "[::1]",
            "::1:80",
            "a b:80",
            "[1.2.3.4]:80",
            "a\"b:80",
        ] {
            bad.parse::<Address>().expect_err(bad);
        }
    }

    #[test]
    fn zone_of_a_host_is_a_suffix_of_whole_labels() {
        let name = host("a.example.com");
        assert!(name.is_in("example.com") && name.is_in("a.example.com"));
        assert!(!name.is_in("ample.com") && !name.is_in("b.example.com"));
    }
}
