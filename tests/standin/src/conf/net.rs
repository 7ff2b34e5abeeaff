//! `netN` lines: comma-separated properties, written back in PVE's order.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::values::Complaint;

/// Properties of one network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Net(pub BTreeMap<String, String>);

const KNOWN: &[&str] = &[
    "name",
    "bridge",
    "firewall",
    "gw",
    "gw6",
    "host-managed",
    "hwaddr",
    "ip",
    "ip6",
    "link_down",
    "mtu",
    "rate",
    "tag",
    "trunks",
    "type",
];

impl Net {
    /// Parses `key=value,...`.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let pairs = text.split(',').filter_map(|part| part.split_once('='));
        Self(pairs.map(|(k, v)| (k.trim().to_owned(), v.trim().to_owned())).collect())
    }

    /// Returns one property.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// Formats the line: `name` and `bridge` first, the others by name.
    #[must_use]
    pub fn text(&self) -> String {
        let first = ["name", "bridge"];
        let head = first.iter().filter_map(|key| self.0.get_key_value(*key));
        let rest = self.0.iter().filter(|(key, _)| !first.contains(&key.as_str()));
        let parts: Vec<String> = head.chain(rest).map(|(k, v)| format!("{k}={v}")).collect();
        parts.join(",")
    }

    /// Sets a new hardware address.
    pub fn renew_hwaddr(&mut self) {
        self.0.insert("hwaddr".to_owned(), random_hwaddr());
    }
}

/// Checks a line from the command line and adds what PVE adds: a type, and a new hardware address
/// if none is given, even when the interface had one.
pub fn check(text: &str) -> Result<String, Complaint> {
    if text.split(',').any(|part| !part.contains('=')) {
        return Err(property_error("format error", text));
    }
    let mut net = Net::parse(text);
    if let Some(unknown) = net.0.keys().find(|key| !KNOWN.contains(&key.as_str())) {
        let what = format!(
            "net.{unknown}: property is not defined in schema and the schema does not allow additional properties"
        );
        return Err(Complaint::plain(format!("invalid format - format error\n{what}\n")));
    }
    let bad = |key: &str, what: &str| property_error(&format!("net.{key}: {what}"), text);
    if net.get("name").is_none_or(|n| !is_interface_name(n)) {
        return Err(bad("name", "property is missing and it is not optional"));
    }
    if net.get("ip").is_some_and(|ip| !matches!(ip, "dhcp" | "manual") && !is_cidr4(ip)) {
        let what = "invalid format - value does not look like a valid ipv4 network configuration";
        return Err(bad("ip", what));
    }
    if net.get("ip6").is_some_and(|ip| !matches!(ip, "dhcp" | "manual" | "auto") && !is_cidr6(ip)) {
        let what = "invalid format - value does not look like a valid ipv6 network configuration";
        return Err(bad("ip6", what));
    }
    for key in ["gw", "gw6"] {
        if net.get(key).is_some_and(|gw| gw.parse::<IpAddr>().is_err()) {
            return Err(bad(key, "invalid format - value does not look like a valid IP address"));
        }
    }
    match net.get("hwaddr") {
        None => net.renew_hwaddr(),
        Some(mac) if is_hwaddr(mac) => {
            let upper = mac.to_ascii_uppercase();
            net.0.insert("hwaddr".to_owned(), upper);
        }
        Some(_) => {
            let what = "invalid format - value does not look like a valid unicast MAC address";
            return Err(bad("hwaddr", what));
        }
    }
    net.0.insert("type".to_owned(), "veth".to_owned());
    Ok(net.text())
}

fn property_error(what: &str, _text: &str) -> Complaint {
    Complaint { text: format!("invalid format - format error\n{what}"), blank_line: true }
}

fn is_interface_name(name: &str) -> bool {
    (1..=15).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/')
}

fn is_cidr4(text: &str) -> bool {
    let Some((ip, bits)) = text.split_once('/') else { return false };
    ip.parse::<Ipv4Addr>().is_ok() && bits.parse::<u8>().is_ok_and(|b| (1..=32).contains(&b))
}

fn is_cidr6(text: &str) -> bool {
    let Some((ip, bits)) = text.split_once('/') else { return false };
    ip.parse::<Ipv6Addr>().is_ok() && bits.parse::<u8>().is_ok_and(|b| (1..=128).contains(&b))
}

fn is_hwaddr(text: &str) -> bool {
    let parts: Vec<&str> = text.split(':').collect();
    let octet = |p: &&str| p.len() == 2 && u8::from_str_radix(p, 16).is_ok();
    let unicast = parts.first().and_then(|p| u8::from_str_radix(p, 16).ok());
    parts.len() == 6 && parts.iter().all(octet) && unicast.is_some_and(|b| b & 1 == 0)
}

/// Returns a new hardware address with Proxmox's prefix.
#[must_use]
pub fn random_hwaddr() -> String {
    let mut low = [0_u8; 3];
    if getrandom::fill(&mut low).is_err() {
        // A test program need not stop without randomness: the process id tells clones apart.
        low.copy_from_slice(&std::process::id().to_be_bytes()[1..]);
    }
    format!("BC:24:11:{:02X}:{:02X}:{:02X}", low[0], low[1], low[2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_are_written_in_pves_order() {
        let given = "name=eth0,bridge=vmbr0,ip=10.99.2.1/16,gw=10.99.0.11,firewall=1,\
            hwaddr=bc:24:11:eb:a5:13";
        assert_eq!(
            check(given).as_deref(),
            Ok("name=eth0,bridge=vmbr0,firewall=1,gw=10.99.0.11,hwaddr=BC:24:11:EB:A5:13,\
                ip=10.99.2.1/16,type=veth")
        );
    }

    #[test]
    fn missing_hwaddr_is_generated_each_time() {
        let made = || Net::parse(&check("name=eth0,bridge=vmbr0").unwrap()).0["hwaddr"].clone();
        let (one, two) = (made(), made());
        assert!(one.starts_with("BC:24:11:") && one != two, "{one} {two}");
    }

    #[test]
    fn invalid_interface_lines_are_refused() {
        for bad in [
            "eth0",
            "bridge=vmbr0",
            "name=eth0,ip=10.0.0.1",
            "name=eth0,gw=x",
            "name=eth0,hwaddr=zz",
            "name=eth0,evil=1",
            "name=eth0,ip=10.0.0.1/24\nlxc.x=1",
        ] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }
}
