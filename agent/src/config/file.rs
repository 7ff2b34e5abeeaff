//! Format of the configuration file. Every field has a default; missing values are detected.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use proto::{
    id::Vmid,
    lifetime::Action,
    name::{Label, NodeName, SnapshotId},
};
use serde::Deserialize;

use super::{Certificate, Wake};
use crate::{
    journal::SqliteJournal,
    pve::{HostPaths, interface::Rate, template_mark::TemplateMark},
    sandbox::{DefaultService, OnReboot, Probe, exec::shims::Backend},
};

/// Configuration file as it is written: what it leaves out is completed from elsewhere.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct File {
    /// PVE's name of this node; set it only to contradict pmxcfs, which should never be necessary.
    pub node: Option<NodeName>,
    /// Address where the controller reaches the agent.
    pub listen: Option<SocketAddr>,
    /// Directory for the journal and other state that must survive a reboot.
    pub state_dir: Option<PathBuf>,
    /// Directory for sockets and the output of commands; its content is gone after a reboot.
    pub run_dir: Option<PathBuf>,
    /// Storage that new templates go to.
    pub storage: Option<String>,
    /// Labels of the node, which creations can require or avoid.
    pub labels: Vec<Label>,
    /// Certificates for the controller's connections.
    pub tls: Tls,
    /// Host paths of PVE.
    pub pve: HostPaths,
    /// Range of the sandboxes' vmids.
    pub vmids: Vmids,
    /// Addresses of sandboxes.
    pub network: Network,
    /// Templates that can be cloned on this node.
    pub template: Vec<Template>,
    /// Limits on concurrency and duration.
    pub limits: Limits,
    /// Default lifetime of sandboxes, and how long they are kept paused or stopped.
    pub lifetime: Lifetime,
    /// Action after a reboot of the node for sandboxes that ran before: `start` them, or `keep`
    /// them stopped.
    pub on_reboot: OnReboot,
    /// Limits on the host resources that serve a sandbox's commands.
    pub shim: Shim,
    /// Method by which commands enter sandboxes: `lxc`, or `pct` where lxc-attach must not be used
    /// directly.
    pub exec_backend: Backend,
    /// File with the boot id of the host. Not needed on a real node.
    pub boot_id: Option<PathBuf>,
    /// Paths where the load is read.
    pub load: Load,
    /// Way in from the web.
    pub ingress: Ingress,
}

/// Certificate, its key, and the CA of the other side; PEM files.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tls {
    /// File with the certificates of the CA.
    pub ca: PathBuf,
    /// File with our own certificate.
    pub cert: PathBuf,
    /// File with its private key.
    pub key: PathBuf,
}

impl Tls {
    fn named(name: &str) -> Self {
        // These are the files that `pve-sandbox-controller node-cert` writes.
        let path = |file| format!("/etc/pve-sandbox/tls/{name}{file}").into();
        Self { ca: path("ca.crt"), cert: path("node.crt"), key: path("node.key") }
    }
}

impl Default for Tls {
    fn default() -> Self {
        Self::named("")
    }
}

/// Range of the sandboxes' vmids in the whole cluster. Each node hands out one stripe of it, so
/// that two nodes never try the same number.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Vmids {
    /// First vmid, inclusive.
    pub first: Vmid,
    /// Last vmid, inclusive.
    pub last: Vmid,
    /// Number of stripes: as many as the cluster will ever have nodes.
    pub stripes: u32,
    /// Stripe of this node, from 1; its number in the cluster by default.
    pub stripe: Option<u32>,
}

impl Default for Vmids {
    fn default() -> Self {
        // Away from numbers that people choose by hand, and from the clean-up of older tools.
        let vmid = |number| Vmid::try_from(number).unwrap_or(Vmid::MIN);
        Self { first: vmid(100_000), last: vmid(999_999), stripes: 16, stripe: None }
    }
}

/// Addresses of sandboxes.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    /// Bridge of the sandboxes.
    pub bridge: Option<String>,
    /// Default route of the sandboxes.
    pub gateway: Option<std::net::Ipv4Addr>,
    /// Part of the bridge's network for sandboxes, as a network or as `first-last`.
    pub pool: Option<super::Pool>,
    /// Sandboxes that may ask a DHCP server.
    pub dhcp: Option<Dhcp>,
    /// DHCP server whose replies count; the gateway by default.
    pub dhcp_server: Option<std::net::Ipv4Addr>,
    /// Time for which a released address is not leased to another sandbox, in seconds.
    pub quarantine_s: Option<u64>,
    /// Whether sandboxes are isolated from each other, this host and its networks; they are by
    /// default.
    pub isolation: Option<bool>,
    /// Name servers that sandboxes may ask; the gateway and the host's own by default.
    pub name_servers: Option<Vec<std::net::Ipv4Addr>>,
    /// Private networks that sandboxes may reach.
    #[serde(default)]
    pub reach: Vec<super::Reach>,
}

/// Setting of which sandboxes may ask a DHCP server: `false`, `true` or `"on_request"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Dhcp {
    /// No sandbox, or all of them.
    Switch(bool),
    /// Those that ask for it.
    Word(DhcpWord),
}

/// Only word that `dhcp` may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DhcpWord {
    /// Sandboxes whose creation asks for it.
    OnRequest,
}

/// PVE container template, with the name that users give it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// Snapshot name that users give it.
    pub snapshot: SnapshotId,
    /// VMID of the template on this node.
    pub vmid: Vmid,
    /// Default number of cores of a sandbox.
    #[serde(default = "one")]
    pub cores: u32,
    /// Default memory of a sandbox, in MiB.
    #[serde(default = "half_a_gib")]
    pub memory_mib: u32,
    /// Readiness probe of its sandboxes.
    #[serde(default)]
    pub probe: Probe,
    /// Bridge of its sandboxes instead of the node's. Addresses and gateway remain the node's.
    #[serde(default)]
    pub bridge: Option<String>,
    /// VLAN of the interface, 1 to 4094. If unset, the value in the template applies; the same
    /// holds for the next two fields.
    #[serde(default)]
    pub tag: Option<u16>,
    /// Bandwidth of the interface, in MB/s.
    #[serde(default)]
    pub rate: Option<Rate>,
    /// True when PVE's firewall filters the interface.
    #[serde(default)]
    pub firewall: Option<bool>,
    /// Allows a privileged template: root in its sandboxes is close to root on the node.
    #[serde(default)]
    pub privileged: bool,
    /// Allows every line of the template's config that is forbidden otherwise (bind mounts, devices,
    /// hook scripts, features, raw LXC lines): root in its sandboxes may then harm the node.
    #[serde(default)]
    pub allow_unsafe: bool,
    /// Directories of the node that the template may mount, read-only and with an id map.
    #[serde(default)]
    pub read_only_caches: Vec<PathBuf>,
    /// Services that its sandboxes expose from their creation on.
    #[serde(default)]
    pub services: Vec<DefaultService>,
    /// True when its sandboxes expose a port as soon as something listens on it.
    #[serde(default)]
    pub expose_on_listen: bool,
}

impl File {
    /// Returns the path of the journal.
    pub fn journal(&self) -> PathBuf {
        super::journal_in(self.state_dir.as_deref().unwrap_or(Path::new(super::STATE_DIR)))
    }

    /// Returns true when the journal has a sandbox that has not ended, and also when it cannot be read.
    pub fn has_sandboxes(&self) -> bool {
        SqliteJournal::has_live(&self.journal()).unwrap_or(true)
    }
}

impl Template {
    /// Settings of a template that carries its mark itself.
    pub fn marked(vmid: Vmid, mark: TemplateMark) -> Self {
        let TemplateMark { snapshot, cores, memory_mib, http } = mark;
        let probe = http.map_or(Probe::None, |(port, path)| Probe::Http { port, path });
        Self {
            snapshot,
            vmid,
            cores,
            memory_mib,
            probe,
            bridge: None,
            tag: None,
            rate: None,
            firewall: None,
            privileged: false,
            allow_unsafe: false,
            read_only_caches: Vec::new(),
            services: Vec::new(),
            expose_on_listen: false,
        }
    }
}

fn one() -> u32 {
    1
}

fn half_a_gib() -> u32 {
    512
}

/// Limits on what the node does concurrently, and time budgets in seconds.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Most concurrent calls of `pct`; 0 means one per core: each call loads half a second of Perl.
    pub pct_parallel_max: usize,
    /// Most creations that may wait for a turn at one template. A team gets a share of them: half, if there is no
    /// other.
    pub clone_queue_max: usize,
    /// Most containers that may boot at the same time.
    pub starts_max: usize,
    /// Storage space that no clone may use up, in MiB.
    pub storage_reserve_mib: u64,
    /// Ratio of the sum of all memory limits to the memory of the node.
    pub memory_overcommit: f64,
    /// Share of the memory that may be in use when a sandbox is admitted, half of its own memory
    /// included.
    pub memory_used_max: f64,
    /// Most processes and threads of a sandbox, 64 or more. 4096 is what OpenShift gives a pod.
    pub pids: u32,
    /// Most that a sandbox reads from a disk, MiB a second; 0 means no limit. So for the next three.
    /// The defaults leave a boot and a build alone, and half of a SATA SSD to others.
    pub io_read_mibps: u64,
    /// Most that a sandbox writes to a disk, MiB a second.
    pub io_write_mibps: u64,
    /// Most requests of a sandbox to read from a disk, a second.
    pub io_read_iops: u64,
    /// Most requests of a sandbox to write to a disk, a second.
    pub io_write_iops: u64,
    /// Most connections that the node tracks for a sandbox, 64 or more. The node's table, which all
    /// share, has 262144 places on most machines.
    pub connections: u32,
    /// Creation, from its admission to its answer.
    pub create_s: u64,
    /// One `pct clone`.
    pub clone_s: u64,
    /// One `pct start`. An ext4 that was not unmounted takes 44 s to mount.
    pub start_s: u64,
    /// Time from the start to the answer.
    pub answer_s: u64,
    /// Time that a sandbox gets to shut down by itself before it is killed, at most 600; 0 kills it
    /// at once. A stop may set another.
    pub grace_s: u64,
    /// One `pct stop`.
    pub stop_s: u64,
    /// One `pct destroy`.
    pub destroy_s: u64,
    /// Wait of an operation for another one on the same sandbox.
    pub turn_s: u64,
    /// Longest timeout of a command, and that of a command that sets none; 0 means no limit.
    pub exec_s: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            pct_parallel_max: 0,
            clone_queue_max: 128,
            starts_max: 4,
            storage_reserve_mib: 1024,
            memory_overcommit: 2.0,
            memory_used_max: 0.97,
            pids: 4096,
            io_read_mibps: 256,
            io_write_mibps: 128,
            io_read_iops: 20_000,
            io_write_iops: 10_000,
            connections: 4096,
            create_s: 180,
            clone_s: 120,
            start_s: 90,
            answer_s: 60,
            grace_s: 10,
            stop_s: 60,
            destroy_s: 60,
            turn_s: 180,
            exec_s: 0,
        }
    }
}

/// Limits of the host process that serves a sandbox's commands, and of the outputs that it keeps.
/// Its usage counts as the sandbox's.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Shim {
    /// CPU cores; 0.05 or more.
    pub cpu_cores: f64,
    /// Memory, MiB; 64 or more.
    pub memory_mib: u64,
    /// Most disk space for the outputs of a sandbox's commands, in MiB; 8 or more.
    pub output_mib: u64,
    /// Most disk space for the outputs of all sandboxes of the node, in MiB.
    pub output_node_mib: u64,
}

impl Default for Shim {
    fn default() -> Self {
        Self { cpu_cores: 1.0, memory_mib: 256, output_mib: 64, output_node_mib: 1024 }
    }
}

/// Default lifetime of sandboxes, and how long they are kept paused or stopped. 0 means for ever.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Lifetime {
    /// Default time to live of a sandbox, in seconds.
    pub ttl_s: u64,
    /// Action at the end of the time to live.
    pub ttl_action: Action,
    /// Time without use after which a sandbox is idle, in seconds; at least 10.
    pub idle_s: u64,
    /// Action when a sandbox is idle.
    pub idle_action: Action,
    /// Default CPU use beyond which a sandbox is not idle, percent of one core; 0: not looked at.
    pub idle_cpu: u32,
    /// Bytes that a TCP connection must move within a minute to count as a use; 0: each open
    /// connection counts.
    pub silent_bytes: u64,
    /// Time after which a paused sandbox is stopped, in seconds.
    pub paused_max_s: u64,
    /// Time after which a stopped sandbox is deleted, in seconds.
    pub stopped_max_s: u64,
    /// Metadata that exempts a sandbox from the last two limits: `key=value`.
    pub exempt: String,
}

impl Default for Lifetime {
    fn default() -> Self {
        Self {
            ttl_s: 0,
            ttl_action: Action::default(),
            idle_s: 0,
            idle_action: Action::default(),
            idle_cpu: 0,
            // The pings and keep-alives of an editor that nobody touches are some 400 bytes a minute.
            silent_bytes: 1024,
            paused_max_s: 0,
            stopped_max_s: 0,
            exempt: String::new(),
        }
    }
}

impl Lifetime {
    /// Parses `exempt` into key and value.
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

/// Paths where the load is read. A real node needs none of this.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Load {
    /// Root of procfs; `pve.proc` by default.
    pub proc: Option<PathBuf>,
    /// Cgroup that contains the whole node, where the node itself is a container.
    pub cgroup: crate::load::Cgroup,
}

/// Way in from the web: names, addresses and rules of the node's Caddy.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ingress {
    /// Domain of the sandboxes' host names. Without one there is no ingress.
    pub domain: Option<String>,
    /// Addresses where clients reach the node's Caddy.
    pub public: Vec<SocketAddr>,
    /// Address where other nodes reach the node's Caddy; without it, a request must come to the
    /// owner's node.
    pub peer: Option<SocketAddr>,
    /// True when clients use https, although Caddy itself is reached by plain HTTP.
    pub https: bool,
    /// True when pages of sandboxes may be shown in frames of other sites, whatever they say themselves.
    pub frames: bool,
    /// True when scripts of other sites may read and call servers that say nothing about that.
    pub cors: bool,
    /// Pages of other sites that may send requests in the name of a user who has a session for a sandbox, and not
    /// only show it in a frame: origins such as `https://app.example.com`.
    pub parent_origins: Vec<String>,
    /// Socket of the agent for route questions; `ingress.sock` in `run_dir` by default.
    pub socket: Option<PathBuf>,
    /// Group that may connect to the socket: Caddy's.
    pub group: Option<String>,
    /// File for Caddy's configuration, which the agent renders.
    pub caddy_config: PathBuf,
    /// File for a line about each web request; empty: none is written.
    pub access_log: PathBuf,
    /// Certificates for connections between the nodes' Caddys.
    pub tls: Tls,
    /// Certificate with which Caddy itself serves https; `None` where a proxy or a tunnel in front does.
    pub certificate: Option<Certificate>,
    /// Bounds of requests that wait for their sandbox.
    pub wake: Wake,
}

impl Default for Ingress {
    fn default() -> Self {
        Self {
            domain: None,
            public: vec![SocketAddr::from(([127, 0, 0, 1], 8480))],
            peer: None,
            https: true,
            frames: true,
            cors: true,
            parent_origins: Vec::new(),
            socket: None,
            group: None,
            caddy_config: "/etc/pve-sandbox/caddy.json".into(),
            access_log: "/var/log/pve-sandbox-ingress/access.log".into(),
            tls: Tls::named("ingress-"),
            certificate: None,
            wake: Wake::default(),
        }
    }
}
