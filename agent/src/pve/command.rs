//! The commands of `pct` in use, and their arguments. Pure.
//!
//! Everything that comes from a caller has a validated type: no value starts with a dash, holds a
//! comma where `pct` splits at commas, or ends a line.

use std::ffi::OsString;

use proto::{id::Vmid, spec::Size};

use super::{CloneOrder, Operation, Settings, interface};

/// Command of `pct`.
#[derive(Debug, Clone)]
pub enum Command<'a> {
    /// Makes a linked clone, PVE's default for a template.
    Clone(&'a CloneOrder),
    /// Writes all settings in one call, because each call costs PVE more than half a second. The
    /// last field is the `net0` line to replace.
    Set(Vmid, &'a Settings, Option<&'a str>),
    /// Sets cores and memory, of a running container at once.
    Limits(Vmid, Size),
    /// Grows the root volume to this size, GiB.
    Resize(Vmid, u32),
    /// Boots.
    Start(Vmid),
    /// Stops at once.
    Stop(Vmid),
    /// Destroys; stops a running container first.
    Destroy(Vmid),
    /// Removes PVE's lock.
    Unlock(Vmid),
}

impl Command<'_> {
    /// Operation that the command is for.
    pub fn op(&self) -> Operation {
        match self {
            Self::Clone(_) => Operation::Clone,
            Self::Set(..) => Operation::Set,
            Self::Limits(..) => Operation::SetLimits,
            Self::Resize(..) => Operation::Resize,
            Self::Start(_) => Operation::Start,
            Self::Stop(_) => Operation::Stop,
            Self::Destroy(_) => Operation::Destroy,
            Self::Unlock(_) => Operation::Unlock,
        }
    }

    /// Sub-command of `pct`.
    fn name(&self) -> &'static str {
        match self {
            Self::Clone(_) => "clone",
            Self::Set(..) | Self::Limits(..) => "set",
            Self::Resize(..) => "resize",
            Self::Start(_) => "start",
            Self::Stop(_) => "stop",
            Self::Destroy(_) => "destroy",
            Self::Unlock(_) => "unlock",
        }
    }

    /// Container of the command; of a clone, the new one.
    pub fn vmid(&self) -> Vmid {
        match self {
            Self::Clone(order) => order.vmid,
            Self::Set(vmid, ..)
            | Self::Limits(vmid, _)
            | Self::Resize(vmid, _)
            | Self::Start(vmid)
            | Self::Stop(vmid)
            | Self::Destroy(vmid)
            | Self::Unlock(vmid) => *vmid,
        }
    }

    /// Arguments of `pct`.
    pub fn arguments(&self) -> Vec<OsString> {
        let mut arguments = vec![self.name().to_owned()];
        match self {
            Self::Clone(order) => {
                arguments.push(order.template.to_string());
                arguments.push(order.vmid.to_string());
                option(&mut arguments, "--hostname", order.mark.sandbox_id);
                // In the config before there is a volume.
                option(&mut arguments, "--description", &order.mark);
            }
            Self::Set(vmid, settings, net0) => {
                arguments.push(vmid.to_string());
                option(&mut arguments, "--net0", interface::net0(settings, *net0));
                limits(&mut arguments, settings.cores, settings.memory_mib);
                option(&mut arguments, "--swap", 0);
                // After a reboot the agent starts the sandboxes, not PVE.
                option(&mut arguments, "--onboot", 0);
            }
            Self::Limits(vmid, size) => {
                arguments.push(vmid.to_string());
                limits(&mut arguments, size.cpu_cores, size.memory_mib);
            }
            Self::Resize(vmid, gib) => {
                arguments.extend([vmid.to_string(), "rootfs".to_owned(), format!("{gib}G")]);
            }
            Self::Destroy(vmid) => {
                arguments.push(vmid.to_string());
                // Destroys the volumes that the config names, and no other: see `super::volume`.
                option(&mut arguments, "--force", 1);
            }
            Self::Start(vmid) | Self::Stop(vmid) | Self::Unlock(vmid) => {
                arguments.push(vmid.to_string());
            }
        }
        arguments.into_iter().map(OsString::from).collect()
    }
}

/// PVE pins a container with `cores` alone to CPUs, and only every ten seconds; `cpulimit` is exact.
fn limits(arguments: &mut Vec<String>, cores: u32, memory_mib: u32) {
    option(arguments, "--cores", cores);
    option(arguments, "--cpulimit", cores);
    option(arguments, "--memory", memory_mib);
}

fn option(arguments: &mut Vec<String>, name: &str, value: impl std::fmt::Display) {
    arguments.push(name.to_owned());
    arguments.push(value.to_string());
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use insta::assert_snapshot;
    use proptest::prelude::*;
    use proto::id::SandboxId;

    use super::*;
    use crate::pve::{Address, Link, Mark};

    fn vmid(number: u32) -> Vmid {
        Vmid::try_from(number).expect("in range")
    }

    fn order(team: &str, request_id: &str) -> Option<CloneOrder> {
        let mark = Mark {
            sandbox_id: SandboxId::new(1_700_000_000_000, &[7; 10]),
            vmid: vmid(100_000),
            attempt: 1,
            team: team.parse().ok()?,
            request_id: request_id.parse().ok()?,
        };
        Some(CloneOrder { template: vmid(9000), vmid: vmid(100_000), mark })
    }

    fn settings(address: Address) -> Settings {
        let mac = [0x02, 0, 10, 100, 1, 2];
        let (bridge, link) = ("vmbr0".to_owned(), Link::default());
        Settings { bridge, mac, address, link, cores: 2, memory_mib: 512 }
    }

    fn shell(command: &Command<'_>) -> String {
        let quoted = |argument: &OsString| {
            let text = argument.to_string_lossy();
            if text.contains(' ') { format!("'{text}'") } else { text.into_owned() }
        };
        command.arguments().iter().map(quoted).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn pct_commands_have_the_expected_arguments() {
        let order = order("acme", "r-1").expect("valid");
        let (ip, gateway) = (Ipv4Addr::new(10, 100, 1, 2), Ipv4Addr::new(10, 100, 1, 1));
        let fixed = settings(Address::Static { ip, prefix: 24, gateway });
        let dhcp = settings(Address::Dhcp);
        let id = vmid(100_000);
        let commands = [
            Command::Clone(&order),
            Command::Set(id, &fixed, None),
            Command::Set(id, &dhcp, Some("name=eth0,bridge=vmbr9,firewall=1,tag=7,type=veth")),
            Command::Limits(id, Size { cpu_cores: 4, memory_mib: 2048, disk_gib: 20 }),
            Command::Resize(id, 20),
            Command::Start(id),
            Command::Stop(id),
            Command::Destroy(id),
            Command::Unlock(id),
        ];
        let lines: Vec<_> = commands.iter().map(shell).collect();
        assert_snapshot!(lines.join("\n"), @r"
        clone 9000 100000 --hostname pvelxc-01hf7uaq00es3oe1o70s3ge1o7 --description 'pve-sandbox:v1 id=pvelxc-01hf7uaq00es3oe1o70s3ge1o7 vmid=100000 attempt=1 team=acme request=r-1'
        set 100000 --net0 name=eth0,bridge=vmbr0,hwaddr=02:00:0A:64:01:02,ip=10.100.1.2/24,gw=10.100.1.1,type=veth --cores 2 --cpulimit 2 --memory 512 --swap 0 --onboot 0
        set 100000 --net0 name=eth0,bridge=vmbr0,hwaddr=02:00:0A:64:01:02,ip=dhcp,firewall=1,tag=7,type=veth --cores 2 --cpulimit 2 --memory 512 --swap 0 --onboot 0
        set 100000 --cores 4 --cpulimit 4 --memory 2048
        resize 100000 rootfs 20G
        start 100000
        stop 100000
        destroy 100000 --force 1
        unlock 100000
        ");
    }

    proptest! {
        #[test]
        fn caller_names_never_become_options_or_lines(
            team in "(\\PC|[a-z\n-]){1,4}", request_id in "(\\PC|[a-z\n-]){1,4}",
        ) {
            if let Some(order) = order(&team, &request_id) {
                let arguments = Command::Clone(&order).arguments();
                prop_assert_eq!(arguments.len(), 7);
                for (place, argument) in arguments.iter().enumerate() {
                    let text = argument.to_str().expect("text");
                    prop_assert!(!text.contains(|c: char| c.is_control()));
                    prop_assert_eq!(text.starts_with('-'), place == 3 || place == 5);
                }
            }
        }
    }
}
