//! The line of a sandbox's first interface, and checks of a template's interfaces. Pure.
//!
//! A clone has its template's line. Its settings for isolation and for the link (`firewall`, `tag`,
//! `rate`, `mtu`, `trunks`, ...) are kept, unknown ones of a later PVE too; only the properties
//! that identify this sandbox's interface are replaced.

use std::fmt;

use super::{Address, ContainerConfig, Settings};

/// Properties that identify a sandbox's interface: never copied from the template.
const OWN: [&str; 5] = ["name", "bridge", "hwaddr", "ip", "gw"];

/// Bandwidth limit of an interface, MB/s, exact to a thousandth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(try_from = "f64")]
pub struct Rate(u32);

/// Error: the number is no valid rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be 0.001 to 100000 MB/s")]
pub struct NoRate;

impl TryFrom<f64> for Rate {
    type Error = NoRate;

    fn try_from(rate: f64) -> Result<Self, NoRate> {
        let thousandths = (rate * 1000.0).round();
        if !(1.0..=100_000_000.0).contains(&thousandths) {
            return Err(NoRate);
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "in range")]
        Ok(Self(thousandths as u32))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, rest) = (self.0 / 1000, self.0 % 1000);
        if rest == 0 {
            return write!(f, "{whole}");
        }
        write!(f, "{whole}.{}", format!("{rest:03}").trim_end_matches('0'))
    }
}

/// Settings of a snapshot for the interfaces of its sandboxes; absent ones stay as in the template.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// VLAN tag, 1 to 4094.
    pub tag: Option<u16>,
    /// Bandwidth limit.
    pub rate: Option<Rate>,
    /// Whether PVE's firewall filters the interface.
    pub firewall: Option<bool>,
}

/// Builds the value of `net0` from the present one. Always sets `hwaddr`: without it PVE would
/// choose another MAC at every change.
pub fn net0(settings: &Settings, before: Option<&str>) -> String {
    let Settings { bridge, mac, address, link, .. } = settings;
    let mac: Vec<String> = mac.iter().map(|byte| format!("{byte:02X}")).collect();
    let mut parts = vec![
        "name=eth0".to_owned(),
        format!("bridge={bridge}"),
        format!("hwaddr={}", mac.join(":")),
    ];
    match address {
        Address::Static { ip, prefix, gateway } => {
            parts.extend([format!("ip={ip}/{prefix}"), format!("gw={gateway}")]);
        }
        Address::Dhcp => parts.push("ip=dhcp".to_owned()),
    }
    let Link { tag, rate, firewall } = link;
    let said = [
        ("firewall", firewall.map(|on| u8::from(on).to_string())),
        ("rate", rate.map(|rate| rate.to_string())),
        ("tag", tag.map(|tag| tag.to_string())),
    ];
    let mut ours = OWN.to_vec();
    for (key, value) in said {
        if let Some(value) = value {
            parts.push(format!("{key}={value}"));
            ours.push(key);
        }
    }
    let kept = before.unwrap_or("").split(',').map(str::trim).filter(|part| !part.is_empty());
    let mut typed = false;
    for part in kept {
        let key = part.split('=').next().unwrap_or(part).trim();
        if !ours.contains(&key) {
            typed |= key == "type";
            parts.push(part.to_owned());
        }
    }
    if !typed {
        parts.push("type=veth".to_owned());
    }
    parts.join(",")
}

/// Error text, with the line, for a template whose clones would share a static address; `None` when
/// there is none. PVE copies a static address to every clone; only the IPv4 address of `net0` is
/// replaced.
pub fn shared_address(template: &ContainerConfig) -> Option<String> {
    template.settings().find_map(|(key, value)| {
        let fixed = |name: &str| {
            let words = ["dhcp", "manual", "auto"];
            let mut pairs = value.split(',').filter_map(|pair| pair.split_once('='));
            pairs.any(|(key, value)| key.trim() == name && !words.contains(&value.trim()))
        };
        let is_shared = match key.strip_prefix("net") {
            Some("0") => fixed("ip6"),
            Some(number) if number.parse::<u32>().is_ok() => fixed("ip") || fixed("ip6"),
            // Lines that PVE passes to LXC unchanged.
            _ => key.starts_with("lxc.net.") && key.ends_with(".address"),
        };
        is_shared.then(|| {
            format!(
                "its line \"{key}: {value}\" has a static address, which all clones would share: \
                 take the address out, or use dhcp"
            )
        })
    })
}

/// Finds a line of a container for an interface beside `net0`, also one that PVE passes to LXC
/// unchanged, or makes at the next boot; `None` when there is none.
pub fn further(container: &ContainerConfig) -> Option<String> {
    let mut lines = container.settings_with_pending().filter(|(key, _)| {
        let number = key.strip_prefix("net").and_then(|number| number.parse::<u32>().ok());
        number.is_some_and(|number| number > 0) || key.starts_with("lxc.net.")
    });
    lines.next().map(|(key, value)| format!("{key}: {value}"))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use insta::assert_snapshot;

    use super::*;

    fn settings(link: Link) -> Settings {
        let (ip, gateway) = (Ipv4Addr::new(10, 100, 1, 2), Ipv4Addr::new(10, 100, 1, 1));
        Settings {
            bridge: "vmbr0".to_owned(),
            mac: [0x02, 0, 10, 100, 1, 2],
            address: Address::Static { ip, prefix: 24, gateway },
            link,
            cores: 2,
            memory_mib: 512,
        }
    }

    /// Values of `net0` as PVE's own tools and GUI write them.
    const LINES: &[&str] = &[
        "name=eth0,bridge=vmbr0,hwaddr=BC:24:11:00:00:01,ip=dhcp,type=veth",
        "name=eth0,bridge=vmbr0,firewall=1,hwaddr=BC:24:11:EB:A5:13,ip=dhcp,tag=42,type=veth",
        "name=eth0,bridge=vmbr1,firewall=1,gw=192.0.2.1,hwaddr=BC:24:11:EB:A5:13,ip=192.0.2.9/24,ip6=auto,mtu=1400,rate=12.5,type=veth",
        "name=wan0,bridge=vnet7,host-managed=1,hwaddr=BC:24:11:EB:A5:13,ip=manual,ip6=dhcp,link_down=1,trunks=10;20;30,type=veth",
        "name=eth0,bridge=vmbr0,hwaddr=BC:24:11:EB:A5:13,ip=dhcp,queues=4,some-new-key=a=b,type=veth",
    ];

    #[test]
    fn template_settings_are_kept_under_our_identity() {
        let lines: Vec<_> =
            LINES.iter().map(|line| net0(&settings(Link::default()), Some(line))).collect();
        assert_snapshot!(lines.join("\n"), @r"
        name=eth0,bridge=vmbr0,hwaddr=02:00:0A:64:01:02,ip=10.100.1.2/24,gw=10.100.1.1,type=veth
        name=eth0,bridge=vmbr0,hwaddr=02:00:0A:64:01:02,ip=10.100.1.2/24,gw=10.100.1.1,firewall=1,tag=42,type=veth
        name=eth0,bridge=vmbr0,hwaddr=02:00:0A:64:01:02,ip=10.100.1.2/24,gw=10.100.1.1,firewall=1,ip6=auto,mtu=1400,rate=12.5,type=veth
        name=eth0,bridge=vmbr0,hwaddr=02:00:0A:64:01:02,ip=10.100.1.2/24,gw=10.100.1.1,host-managed=1,ip6=dhcp,link_down=1,trunks=10;20;30,type=veth
        name=eth0,bridge=vmbr0,hwaddr=02:00:0A:64:01:02,ip=10.100.1.2/24,gw=10.100.1.1,queues=4,some-new-key=a=b,type=veth
        ");
        // Writing a line over itself changes nothing.
        for line in lines {
            assert_eq!(net0(&settings(Link::default()), Some(&line)), line);
        }
    }

    #[test]
    fn snapshot_link_overrides_template_link() {
        let rate = Some(Rate::try_from(2.25).expect("a rate"));
        let link = Link { tag: Some(7), rate, firewall: Some(false) };
        let line = net0(&settings(link), Some(LINES[1]));
        assert_snapshot!(line, @"name=eth0,bridge=vmbr0,hwaddr=02:00:0A:64:01:02,ip=10.100.1.2/24,gw=10.100.1.1,firewall=0,rate=2.25,tag=7,type=veth");
    }

    #[test]
    fn interface_line_is_generated_without_a_template_line() {
        let dhcp = Settings { address: Address::Dhcp, ..settings(Link::default()) };
        for before in [None, Some(""), Some(",")] {
            let expected = "name=eth0,bridge=vmbr0,hwaddr=02:00:0A:64:01:02,ip=dhcp,type=veth";
            assert_eq!(net0(&dhcp, before), expected);
        }
        // The template's gateway is useless without its address.
        let line = net0(&dhcp, Some("name=eth0,bridge=vmbr0,gw=192.0.2.1,ip=192.0.2.9/24,tag=3"));
        assert_snapshot!(line, @"name=eth0,bridge=vmbr0,hwaddr=02:00:0A:64:01:02,ip=dhcp,tag=3,type=veth");
    }

    #[test]
    fn rate_is_formatted_as_pve_formats_numbers() {
        let said = |rate: f64| Rate::try_from(rate).map(|rate| rate.to_string()).ok();
        for (rate, text) in [(10.0, "10"), (0.5, "0.5"), (12.125, "12.125"), (0.001, "0.001")] {
            assert_eq!(said(rate).as_deref(), Some(text));
        }
        for bad in [0.0, -1.0, 0.0001, 1e9, f64::NAN, f64::INFINITY] {
            assert_eq!(said(bad), None, "{bad}");
        }
    }

    #[test]
    fn further_interface_is_found_before_the_boot_that_makes_it() {
        let found = |text: &str| further(&ContainerConfig::parse(text.as_bytes()));
        let line = "net1: name=eth1,bridge=vmbr1";
        assert_eq!(found(&format!("net0: x\n{line}\n")).as_deref(), Some(line));
        assert_eq!(found(&format!("net0: x\n[pve:pending]\n{line}\n")).as_deref(), Some(line));
        assert_eq!(found(&format!("net0: x\n[old]\n{line}\n")), None, "a snapshot is not booted");
    }

    #[test]
    fn shared_address_is_reported_with_its_line() {
        let told = |line: &str| {
            let text =
                format!("net0: {}\n{line}\nrootfs: a:b\n[old]\nnet5: ip=1.2.3.4/8\n", LINES[0]);
            shared_address(&ContainerConfig::parse(text.as_bytes()))
        };
        for line in [
            "net1: name=eth1,bridge=vmbr1,hwaddr=BC:24:11:00:00:02,ip=10.0.0.5/24,type=veth",
            "net1: name=eth1,bridge=vmbr1,ip6=fd00::5/64",
            "net9: name=eth9,ip=10.0.0.5/24,gw=10.0.0.1",
            "net31: ip6=fd00::5/64,name=eth1,ip=dhcp",
            "net0: name=eth0,bridge=vmbr0,ip=dhcp,ip6=fd00::5/64",
            "lxc.net.1.ipv4.address: 10.0.0.5/24",
        ] {
            let why = told(line).unwrap_or_else(|| panic!("{line}"));
            assert!(why.contains(line), "{why}");
        }
        for line in [
            "net1: name=eth1,bridge=vmbr1,ip=dhcp,ip6=auto",
            "net1: name=eth1,bridge=vmbr1,ip=manual,ip6=manual",
            "net1: name=eth1,bridge=vmbr1",
            "net0: name=eth0,bridge=vmbr0,ip=10.0.0.5/24,gw=10.0.0.1",
            "nameserver: 10.0.0.5",
            "lxc.net.1.type: veth",
        ] {
            assert_eq!(told(line), None, "{line}");
        }
    }
}
