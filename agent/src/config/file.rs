//! The file, as it is written. Everything has a default; what stays open is detected.

use std::{net::SocketAddr, path::PathBuf};

use proto::{
    id::Vmid,
    lifetime::Action,
    name::{Label, NodeName, Port, SnapshotId},
};
use serde::Deserialize;

use crate::{
    pve::{interface::Rate, pct::Places},
    sandbox::{OnReboot, exec::shims::Backend},
};

/// The whole file.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct File {
    /// PVE's name of this node, where pmxcfs is to be contradicted; it never should be.
    pub node: Option<NodeName>,
    /// Where the controller reaches the agent.
    pub listen: Option<SocketAddr>,
    /// The journal and what else must survive.
    pub state_dir: Option<PathBuf>,
    /// Sockets and output of commands; gone after a reboot.
    pub run_dir: Option<PathBuf>,
    /// The storage that new templates go to.
    pub storage: Option<String>,
    /// What is said of the node, for creations that ask for it or want to avoid it.
    pub labels: Vec<Label>,
    /// Certificates towards the controller.
    pub tls: Tls,
    /// Where PVE's things are.
    pub pve: Places,
    /// Numbers of sandboxes.
    pub vmids: Vmids,
    /// Addresses of sandboxes.
    pub network: Network,
    /// What can be cloned here.
    pub template: Vec<Template>,
    /// Bounds.
    pub limits: Limits,
    /// How long sandboxes live.
    pub lifetime: Lifetime,
    /// What becomes of sandboxes that ran when the node was rebooted: `start`, or `keep` them stopped.
    pub on_reboot: OnReboot,
    /// What a sandbox's commands may use of the host.
    pub shim: Shim,
    /// How commands get into sandboxes: `lxc`, or `pct` where lxc-attach must not be used by hand.
    pub exec_backend: Backend,
    /// Where the host's boot has its name. A real node needs to say nothing.
    pub boot_id: Option<PathBuf>,
    /// Where the load is read.
    pub load: Load,
    /// The way in from the web.
    pub ingress: Ingress,
}

/// A certificate, its key and the CA of the other side; PEM.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tls {
    /// Certificates of the CA.
    pub ca: PathBuf,
    /// Own certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl Tls {
    fn named(name: &str) -> Self {
        // What `pve-sandbox-controller node-cert` writes.
        let path = |file| format!("/etc/pve-sandbox/tls/{name}{file}").into();
        Self { ca: path("ca.crt"), cert: path("node.crt"), key: path("node.key") }
    }
}

impl Default for Tls {
    fn default() -> Self {
        Self::named("")
    }
}

/// Numbers of sandboxes. A range for the cluster, of which each node hands out one stripe, so that
/// two never try the same number.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Vmids {
    /// First, inclusive.
    pub first: Vmid,
    /// Last, inclusive.
    pub last: Vmid,
    /// Stripes that it is cut into: as many as the cluster will ever have nodes.
    pub stripes: u32,
    /// This node's stripe, from 1; its number in the cluster by default.
    pub stripe: Option<u32>,
}

impl Default for Vmids {
    fn default() -> Self {
        // Away from what people number by hand, and from the clean-up of older tools.
        let vmid = |number| Vmid::try_from(number).unwrap_or(Vmid::MIN);
        Self { first: vmid(100_000), last: vmid(999_999), stripes: 16, stripe: None }
    }
}

/// Addresses of sandboxes.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    /// Their bridge.
    pub bridge: Option<String>,
    /// Their default route.
    pub gateway: Option<std::net::Ipv4Addr>,
    /// What of the bridge's network is theirs, as a network or as `first-last`.
    pub pool: Option<super::Pool>,
    /// Says which sandboxes may ask a DHCP server.
    pub dhcp: Option<Dhcp>,
    /// The DHCP server whose replies count; the gateway by default.
    pub dhcp_server: Option<std::net::Ipv4Addr>,
    /// How long an address rests before another sandbox gets it.
    pub quarantine_s: Option<u64>,
}

/// Says which sandboxes may ask a DHCP server: `false`, `true` or `"on_request"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Dhcp {
    /// None, or all of them.
    Switch(bool),
    /// Those that ask for it.
    Word(DhcpWord),
}

/// The only word that `dhcp` may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DhcpWord {
    /// Sandboxes whose order says so.
    OnRequest,
}

/// A PVE container template, and what users call it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// What users call it.
    pub snapshot: SnapshotId,
    /// The template on this node.
    pub vmid: Vmid,
    /// Cores of a sandbox unless it asks otherwise.
    #[serde(default = "one")]
    pub cores: u32,
    /// Its memory unless it asks otherwise.
    #[serde(default = "half_a_gib")]
    pub memory_mib: u32,
    /// How a sandbox of it shows that it is ready.
    #[serde(default)]
    pub probe: Probe,
    /// Bridge of its sandboxes instead of the node's. Addresses and gateway stay the node's.
    #[serde(default)]
    pub bridge: Option<String>,
    /// VLAN of their interface, 1 to 4094. As in the template where nothing is said; the same holds for
    /// the two below.
    #[serde(default)]
    pub tag: Option<u16>,
    /// Its bandwidth, MB/s.
    #[serde(default)]
    pub rate: Option<Rate>,
    /// PVE's firewall filters it.
    #[serde(default)]
    pub firewall: Option<bool>,
}

fn one() -> u32 {
    1
}

fn half_a_gib() -> u32 {
    512
}

/// How a sandbox shows that it is ready, beyond that it has its address and runs `true`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Probe {
    /// That is enough.
    #[default]
    None,
    /// An HTTP server in it answers.
    Http {
        /// Its port.
        port: Port,
        /// What is asked for.
        #[serde(default = "root")]
        path: String,
    },
    /// A command in it exits with 0.
    Command(Vec<String>),
}

fn root() -> String {
    "/".to_owned()
}

/// Bounds of what the node does at once, and of how long.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Calls of `pct` at a time; 0 means one per core: each loads half a second of Perl.
    pub pct_parallel_max: usize,
    /// Creations that may wait for a turn at one template.
    pub clone_queue_max: usize,
    /// Containers that may boot at a time.
    pub starts_max: usize,
    /// Room on the storage that no clone may use up.
    pub storage_reserve_mib: u64,
    /// Sum of the memory limits handed out, over the memory that is there.
    pub memory_overcommit: f64,
    /// Share of the memory that may be in use, with half of what is asked, when one more comes in.
    pub memory_used_max: f64,
    /// A creation, from its admission to its answer.
    pub create_s: u64,
    /// One `pct clone`.
    pub clone_s: u64,
    /// One `pct start`. An ext4 that was not unmounted takes 44 s to mount.
    pub start_s: u64,
    /// From the start to the answer.
    pub answer_s: u64,
    /// One `pct stop`.
    pub stop_s: u64,
    /// One `pct destroy`.
    pub destroy_s: u64,
    /// How long an operation waits for another one on the same sandbox.
    pub turn_s: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            pct_parallel_max: 0,
            clone_queue_max: 64,
            starts_max: 4,
            storage_reserve_mib: 1024,
            memory_overcommit: 2.0,
            memory_used_max: 0.97,
            create_s: 180,
            clone_s: 120,
            start_s: 90,
            answer_s: 60,
            stop_s: 60,
            destroy_s: 60,
            turn_s: 180,
        }
    }
}

/// What the process on the host that serves a sandbox's commands may use, and the outputs that it
/// keeps. Its use counts as the sandbox's.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Shim {
    /// Cores; 0.05 or more.
    pub cpu_cores: f64,
    /// Memory, MiB; 64 or more.
    pub memory_mib: u64,
    /// What the outputs of a sandbox's commands may take on the disk, MiB; 8 or more.
    pub output_mib: u64,
    /// The same of all sandboxes of the node, MiB.
    pub output_node_mib: u64,
}

impl Default for Shim {
    fn default() -> Self {
        Self { cpu_cores: 1.0, memory_mib: 256, output_mib: 64, output_node_mib: 1024 }
    }
}

/// How long sandboxes live where nobody says so, and how long they are kept. 0 is for ever.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Lifetime {
    /// Time to live of a sandbox that asks for none, seconds.
    pub ttl_s: u64,
    /// What is done then.
    pub ttl_action: Action,
    /// Time without use that counts as idle, seconds; at least 10.
    pub idle_s: u64,
    /// What is done then.
    pub idle_action: Action,
    /// What has been paused for so many seconds is stopped.
    pub paused_max_s: u64,
    /// What has been stopped for so many seconds is deleted.
    pub stopped_max_s: u64,
    /// Metadata that exempts a sandbox from the last two: `key=value`.
    pub exempt: String,
}

impl Lifetime {
    /// Key and value of `exempt`.
    ///
    /// # Errors
    /// A sentence, when it is neither empty nor such a pair.
    pub fn exemption(&self) -> Result<Option<(String, String)>, &'static str> {
        match self.exempt.split_once('=') {
            None if self.exempt.is_empty() => Ok(None),
            Some((key, value)) if !key.is_empty() => Ok(Some((key.into(), value.into()))),
            None | Some(_) => Err("must be key=value, or empty"),
        }
    }
}

/// Where the load is read. A real node needs none of this.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Load {
    /// procfs; `pve.proc` by default.
    pub proc: Option<PathBuf>,
    /// The cgroup that the whole node is in, where it is one.
    pub cgroup: crate::load::Cgroup,
}

/// The way in from the web.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ingress {
    /// Domain of the sandboxes' host names. Without one there is no way in.
    pub domain: Option<String>,
    /// Where clients reach the node's Caddy.
    pub public: Vec<SocketAddr>,
    /// Where other nodes reach it; without, a request must come to the owner's node.
    pub peer: Option<SocketAddr>,
    /// Clients come by https, although Caddy itself is reached in plain.
    pub https: bool,
    /// The agent's socket for route questions; `ingress.sock` in `run_dir` by default.
    pub socket: Option<PathBuf>,
    /// Group that may ask, which is Caddy's.
    pub group: Option<String>,
    /// Caddy's configuration, rendered by the agent.
    pub caddy_config: PathBuf,
    /// Certificates between the nodes' Caddys.
    pub tls: Tls,
}

impl Default for Ingress {
    fn default() -> Self {
        Self {
            domain: None,
            public: vec![SocketAddr::from(([127, 0, 0, 1], 8480))],
            peer: None,
            https: true,
            socket: None,
            group: None,
            caddy_config: "/etc/pve-sandbox/caddy.json".into(),
            tls: Tls::named("ingress-"),
        }
    }
}
