//! What was seen of this node.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use daemon::doctor::{certificate, reach::Listener};
use proto::{id::Vmid, name::SnapshotId};

use crate::{
    detect::OnBridge,
    hand_edits::Edits,
    ingress::{caddy::Obstacle, listeners::Listener as WebListener, version::Version},
    pve::{Cluster, host_firewall::HostFirewall},
    sys::privileges::Missing,
    tunnel,
};

/// Observations that need no configuration, and those that do.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Time, milliseconds since 1970.
    pub now_ms: u64,
    /// Whether this process is root.
    pub is_root: bool,
    /// Whether the clock is synchronised; `None` where nothing knows.
    pub synchronised: Option<bool>,
    /// Cluster, as pmxcfs shows it; without members: pmxcfs is down.
    pub cluster: Cluster,
    /// Name of the bridge that the configuration file names.
    pub named_bridge: Option<String>,
    /// Name in the file of the bridge that `bridge init` has made.
    pub made_bridge: Option<String>,
    /// Observations of a node whose configuration is complete.
    pub node: Option<Node>,
}

impl Facts {
    /// Returns the time, with what is known about the clock.
    pub(super) fn now(&self) -> certificate::Now {
        certificate::Now { ms: self.now_ms, synchronised: self.synchronised }
    }
}

/// Observations of a node whose configuration is complete.
#[derive(Debug, Clone)]
pub struct Node {
    /// Programs that are needed.
    pub programs: Vec<Program>,
    /// Certificate of the agent.
    pub certificate: certificate::Facts,
    /// Certificate of the hop between the nodes' Caddys, where one is needed.
    pub hop: Option<certificate::Facts>,
    /// Bridge of the sandboxes.
    pub bridge: Bridge,
    /// PVE's own firewall of this node.
    pub firewall: HostFirewall,
    /// Addresses that a controller on this machine listens on, if one is set up here.
    pub controller: Vec<SocketAddr>,
    /// Tables of nftables, such as `inet pve_sandbox`; `None` when they cannot be listed.
    pub tables: Option<BTreeSet<String>>,
    /// Storages that are used, or that new templates go to.
    pub storages: Vec<Storage>,
    /// Names of storages that linked clones can be made on.
    pub fit_storages: Vec<String>,
    /// Templates that are configured, or carry the mark.
    pub templates: Vec<Template>,
    /// Limits that the kernel can hold sandboxes to.
    pub limits: Limits,
    /// Bounds of the kernel that all sandboxes share.
    pub kernel: Kernel,
    /// Addresses and vmids that containers of this node have.
    pub taken: Taken,
    /// Ingress, where it is configured.
    pub ingress: Option<Ingress>,
    /// Certificate of the operator's own, where there is one in files.
    pub own: Option<certificate::Facts>,
    /// Tunnel, where one was set up, or why its settings cannot be read.
    pub tunnel: Result<Option<tunnel::look::Facts>, String>,
    /// Configuration files that were changed by hand within the last day, and that the agent put back.
    pub edits: Edits,
    /// Free space of the agent's directory, bytes.
    pub room: Option<u64>,
    /// The agent that should run.
    pub agent: Agent,
}

/// A program that is needed.
#[derive(Debug, Clone)]
pub struct Program {
    /// Path.
    pub path: PathBuf,
    /// Debian package that has it.
    pub package: &'static str,
    /// Whether it is there and can be run.
    pub is_there: bool,
}

/// Bridge of the sandboxes.
#[derive(Debug, Clone, Default)]
pub struct Bridge {
    /// Whether it is a Linux bridge.
    pub is_bridge: bool,
    /// Address of this node on it.
    pub address: Option<OnBridge>,
    /// Whether `bridge init` has made it: then its gateway, NAT and name server are this node's.
    pub is_ours: bool,
    /// Address that `bridge init` has given to the bridge that it has made.
    pub made_address: Option<Ipv4Addr>,
    /// Whether the file with the rules of its way out is there.
    pub has_nat: bool,
    /// Whether the file with the configuration of its name server is there.
    pub has_dns: bool,
    /// Whether the kernel forwards packets.
    pub forwards: bool,
    /// Answer at the address of its name server; `None` where `bridge init` has not made the bridge.
    pub name_server: Option<NameServer>,
}

/// Answer at the address of the sandboxes' name server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameServer {
    /// The dnsmasq of the unit answers.
    Ours,
    /// Something answers that is not that.
    Other,
    /// Nothing answers.
    Silent,
}

/// Limits that the kernel can hold sandboxes to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits {
    /// Whether it can limit processes.
    pub processes: bool,
    /// Whether it can limit the use of disks.
    pub io: bool,
    /// Whether it can count connections; `None` when it cannot be asked.
    pub connections: Option<bool>,
}

/// Bounds of the kernel that all sandboxes share.
#[derive(Debug, Clone, Default)]
pub struct Kernel {
    /// Memory of the host, bytes; `None` when it cannot be read.
    pub memory: Option<u64>,
    /// Bounds that can be read, by their names for `sysctl`.
    pub bounds: BTreeMap<&'static str, u64>,
}

/// Addresses and vmids that containers of this node have, sandboxes or not.
#[derive(Debug, Clone, Default)]
pub struct Taken {
    /// Static addresses.
    pub addresses: BTreeSet<Ipv4Addr>,
    /// Vmids.
    pub vmids: BTreeSet<Vmid>,
}

/// A storage.
#[derive(Debug, Clone)]
pub struct Storage {
    /// Name.
    pub name: String,
    /// Type; `None` when it is not in `storage.cfg`.
    pub kind: Option<String>,
    /// Whether it holds containers of this node.
    pub holds_containers: bool,
    /// Whether it clones a template linked.
    pub links_clones: bool,
    /// Whether a template is on it.
    pub has_template: bool,
    /// Whether PVE says that it is active; `None` when PVE did not answer.
    pub is_active: Option<bool>,
}

/// A template.
#[derive(Debug, Clone)]
pub struct Template {
    /// Snapshot that it is for.
    pub snapshot: SnapshotId,
    /// Vmid.
    pub vmid: Vmid,
    /// File with its config.
    pub path: PathBuf,
    /// State.
    pub state: TemplateState,
    /// Whether agent.toml names it.
    pub in_file: bool,
    /// Line of `template init` in its description.
    pub mark: TemplateLine,
}

/// Line of `template init` in a template's description.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TemplateLine {
    /// There is none.
    Missing,
    /// The description is nothing else.
    Alone,
    /// Somebody has written other lines, too.
    AmongOthers,
}

/// State of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TemplateState {
    /// Sandboxes can be made from it; the storage of its root volume.
    Fit(Option<String>),
    /// There is no such container.
    Missing,
    /// The container is no template.
    Ordinary,
    /// The container has lines that are forbidden: their keys, and the whole sentence.
    Forbidden(Vec<String>, String),
    /// Its config cannot be read.
    Unreadable(String),
}

/// Ingress.
#[derive(Debug, Clone)]
pub struct Ingress {
    /// Reasons why Caddy or the agent's route server would not start, or why the settings are no good.
    pub obstacles: Result<Vec<Obstacle>, String>,
    /// Caddy's configuration.
    pub written: Written,
    /// Time of its last change, milliseconds since 1970.
    pub written_ms: Option<u64>,
    /// Start of the Caddy that runs with it, milliseconds since 1970; `None` when no process is found.
    pub started_ms: Option<u64>,
    /// Answers of the addresses where clients reach Caddy.
    pub public: Vec<(SocketAddr, WebAnswer)>,
    /// Answers of the addresses where Caddy serves https, with the certificate that it shows (DER).
    pub secure: Vec<(SocketAddr, WebAnswer, Vec<u8>)>,
    /// Whether Caddy has the module for the DNS provider; `None` where none is needed, or Caddy does not tell.
    pub has_dns_module: Option<bool>,
    /// Whether the agent's route server answers.
    pub routes: bool,
    /// Whether the Caddy that the agent has started reads these files; `None` where the agent starts none.
    pub used: Option<bool>,
    /// Version of Caddy, if it tells one.
    pub version: Option<Version>,
    /// Reason that the agent has left why Caddy is not as it should be.
    pub problem: Option<String>,
    /// Other programs that listen where clients reach Caddy.
    pub strays: Vec<(SocketAddr, WebListener)>,
}

/// Caddy's configuration on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// None is there.
    Missing,
    /// The file has the settings and the proof of the agent.
    Current,
    /// The file has others.
    Other,
}

/// Answer of an address to a request for a sandbox that cannot exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WebAnswer {
    /// Nobody listens there.
    Nobody,
    /// Somebody listens, and gives no answer in time: Caddy waits for the agent.
    Silent,
    /// The agent's answer, passed on by Caddy.
    Ours,
    /// Caddy does not know the domain: it runs with another configuration.
    OtherDomain,
    /// Not an answer of this ingress.
    Other,
    /// Somebody listens, and gives no certificate.
    NoTls,
}

/// The agent that should run.
#[derive(Debug, Clone, Default)]
pub struct Agent {
    /// Listener where the agent should be; `None` when that cannot be asked without a certificate.
    pub listener: Option<Listener>,
    /// Certificate on the disk, DER.
    pub on_disk: Vec<u8>,
    /// Whether the program of the agent that runs was replaced since it was started.
    pub is_replaced: bool,
    /// Whether a boot starts its unit; `None` where that is unknown, or the unit does not run.
    pub starts_at_boot: Option<bool>,
    /// Capabilities that it needs and lacks.
    pub missing: Vec<Missing>,
}
