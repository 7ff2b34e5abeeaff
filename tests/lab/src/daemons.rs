//! The lab's services as data, on the machine and on each node. A daemon whose program or
//! configuration is missing is left out, so that the lab comes up without it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::forward::Forward;
use crate::layout::{HUB_IP, Layout, NETNS, NODE_LOGS, NodeId};
use crate::settings::Settings;
use crate::supervise::{Restart, Service};
use crate::{lxcfs, way_out};

/// Service on the machine that serves /etc/pve.
pub const PMXCFS: &str = "pmxcfs";
/// Service on the machine that shows sandboxes their own limits in /proc.
pub const LXCFS: &str = "lxcfs";
/// Service on the machine that carries connections of sandboxes to the world outside.
pub const WAY_OUT: &str = "way-out";
/// Service on the machine that opens the lab's ports on the loopback.
pub const FORWARD: &str = "forward";
/// The controller, in the lab's network.
pub const CONTROLLER: &str = "controller";
/// The agent on each node.
pub const AGENT: &str = "agent";
/// The node's Caddy.
pub const CADDY: &str = "caddy";
/// The DHCP server on a node's bridge.
pub const DHCP: &str = "dhcp";

/// `CPUWeight=` of the units of the agent and of its Caddy.
const DAEMON_WEIGHT: u32 = 1000;

/// Path of the controller's configuration, below the lab's directory.
pub const CONTROLLER_CONFIG: &str = "controller/controller.toml";
/// Path of the agent's configuration, inside a node.
pub const AGENT_CONFIG: &str = "/etc/pve-sandbox/agent.toml";
/// Path of Caddy's configuration, inside a node.
pub const CADDY_CONFIG: &str = "/etc/pve-sandbox/caddy.json";

/// Path of `lxc-attach`. In a node the stand-in has this path, and Debian's program another one.
pub const LXC_ATTACH: &str = "/usr/bin/lxc-attach";

/// A program of the workspace and its place in a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Program {
    /// File name in the build directory.
    pub name: &'static str,
    /// Path in a node; none for a program that stays on the machine.
    pub in_node: Option<&'static str>,
    /// Service that runs the program and is restarted after a rebuild.
    pub service: Option<&'static str>,
}

/// The programs of the workspace that the lab uses.
pub const PROGRAMS: [Program; 6] = [
    Program { name: "pct", in_node: Some("/usr/sbin/pct"), service: None },
    // The same program acts by the name under which it is called.
    Program { name: "pct", in_node: Some("/usr/sbin/pvesm"), service: None },
    Program { name: "pct", in_node: Some(LXC_ATTACH), service: None },
    Program {
        name: "pve-sandbox-agent",
        in_node: Some("/usr/bin/pve-sandbox-agent"),
        service: Some(AGENT),
    },
    Program { name: "sandboxctl", in_node: Some("/usr/bin/sandboxctl"), service: None },
    Program { name: "pve-sandbox-controller", in_node: None, service: Some(CONTROLLER) },
];

/// Returns the ports on the machine's loopback: 7443 and 2222 (SSH) lead to the controller, 8480 to the first
/// node's Caddy, 8482 and so on to the Caddies of the others.
pub fn forwards(nodes: &[NodeId]) -> Vec<Forward> {
    let at = |from: u16, to: String| format!("127.0.0.1:{from}={to}").parse::<Forward>().ok();
    let controller = [7443, 2222].map(|port| at(port, format!("{HUB_IP}:{port}")));
    let caddies = nodes.iter().map(|node| {
        let number = u16::from(node.number());
        let port = if number == 1 { 8480 } else { 8480 + number };
        at(port, format!("{}:8480", node.ip()))
    });
    controller.into_iter().chain(caddies).flatten().collect()
}

/// Returns the lab's own services on the machine; the lab starts them in its own order.
pub fn of_the_lab(layout: &Layout, settings: &Settings) -> Vec<Service> {
    let lab = |name: &str, words: &[&str]| -> Service {
        let mut argv = vec![shown(&layout.binary()), "--lab-dir".to_owned(), shown(layout.dir())];
        argv.extend(words.iter().map(|word| (*word).to_owned()));
        Service {
            name: name.to_owned(),
            argv,
            env: BTreeMap::new(),
            log: layout.logs().join(format!("{name}.log")),
            restart: Restart::No,
            notify: true,
            autostart: false,
            netns: None,
            cpu_weight: None,
        }
    };
    let nodes = settings.node_ids();
    let mut services = vec![lab(PMXCFS, &["pmxcfs", "serve"])];
    services.extend(nodes.iter().map(|node| lab(&node.name(), &["node-launch", &node.name()])));
    let forwards: Vec<String> = forwards(&nodes).iter().map(Forward::to_string).collect();
    let words: Vec<&str> =
        std::iter::once("forward").chain(forwards.iter().map(String::as_str)).collect();
    services.push(lab(FORWARD, &words));
    services.push(Service { notify: false, argv: lxcfs::argv(layout), ..lab(LXCFS, &[]) });
    services.push(Service {
        notify: false,
        argv: way_out::argv(),
        restart: Restart::Always,
        ..lab(WAY_OUT, &[])
    });
    services
}

/// Returns the daemons on the machine, in the lab's network.
pub fn on_the_machine(layout: &Layout) -> Vec<Service> {
    let program = layout.dir().join("bin/pve-sandbox-controller");
    let config = layout.dir().join(CONTROLLER_CONFIG);
    if !program.exists() || !config.exists() {
        return Vec::new();
    }
    vec![Service {
        name: CONTROLLER.to_owned(),
        argv: vec![shown(&program), "run".to_owned(), "--config".to_owned(), shown(&config)],
        env: BTreeMap::new(),
        log: layout.logs().join("controller.log"),
        restart: Restart::Always,
        notify: true,
        autostart: true,
        netns: Some(NETNS.to_owned()),
        // On a machine of its own: as much as a node.
        cpu_weight: Some(100),
    }]
}

/// Returns the daemons of a node. `root` is the node's root as the machine sees it.
pub fn on_a_node(node: NodeId, root: &Path) -> Vec<Service> {
    let there = |path: &str| root.join(path.trim_start_matches('/')).exists();
    let net = node.containers_net();
    let mut services = Vec::new();
    // The range is at the end of the node's /24, away from the addresses that are leased first.
    services.push(in_node(
        DHCP,
        &[
            "/usr/sbin/dnsmasq",
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--port=0",
            "--user=root",
            "--log-facility=-",
            "--pid-file=",
            "--interface=vmbr0",
            "--bind-interfaces",
            "--dhcp-authoritative",
            // Otherwise dnsmasq pings each address for three seconds before it leases it.
            "--no-ping",
            "--dhcp-leasefile=/run/lab/dhcp.leases",
            // The shortest lease there is: tests in a loop would use all addresses up.
            &format!("--dhcp-range={net}.240,{net}.254,2m"),
        ],
    ));
    if there("/usr/bin/pve-sandbox-agent") && there(AGENT_CONFIG) {
        let mut agent =
            in_node(AGENT, &["/usr/bin/pve-sandbox-agent", "run", "--config", AGENT_CONFIG]);
        agent.notify = true;
        agent.cpu_weight = Some(DAEMON_WEIGHT);
        services.push(agent);
    }
    if there("/usr/bin/caddy") && there(AGENT_CONFIG) {
        // The agent writes the configuration before it is ready. No systemd runs a node, so the lab owns Caddy.
        let script = format!(
            "until [ -s {CADDY_CONFIG} ]; do sleep 0.1; done; exec /usr/bin/caddy run --config {CADDY_CONFIG}"
        );
        let mut caddy = in_node(CADDY, &["/bin/sh", "-c", &script]);
        caddy.notify = true;
        caddy.cpu_weight = Some(DAEMON_WEIGHT);
        services.push(caddy);
    }
    services
}

fn in_node(name: &str, argv: &[&str]) -> Service {
    Service {
        name: name.to_owned(),
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        env: BTreeMap::new(),
        log: PathBuf::from(NODE_LOGS).join(format!("{name}.log")),
        restart: Restart::Always,
        notify: false,
        autostart: true,
        netns: None,
        cpu_weight: None,
    }
}

fn shown(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::DAEMON_WEIGHT;

    #[test]
    fn daemons_of_a_node_have_the_weight_of_their_units() {
        for unit in [
            include_str!("../../../systemd/pve-sandbox-agent.service"),
            include_str!("../../../systemd/pve-sandbox-ingress.service"),
        ] {
            let weight = format!("CPUWeight={DAEMON_WEIGHT}");
            assert!(unit.lines().any(|line| line == weight), "{unit}");
        }
    }
}
