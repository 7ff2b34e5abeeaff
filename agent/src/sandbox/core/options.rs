//! Sandbox options from the node's configuration, and the checked order of a creation.

use std::{net::Ipv4Addr, time::Duration};

use proto::{
    id::{SandboxId, Vmid},
    lifetime::LifetimePatch,
    name::{Label, Port, ServiceName, SnapshotId, Team},
    spec::{Size, Spec},
    visibility::Visibility,
};

use serde::Deserialize;

use crate::{
    journal::{PortRules, Record},
    pve::{
        ContainerConfig, IoMax, Link,
        forbidden::{self, Allowed},
    },
};

/// Options that are fixed when the agent starts.
#[derive(Debug, Clone)]
pub struct Options {
    /// Templates that can be cloned on this node. Of several for one snapshot, the shortest queue
    /// wins.
    pub templates: Vec<Template>,
    /// Network that sandboxes are connected to.
    pub network: Bridge,
    /// Bounds of concurrency, resources and time.
    pub limits: Limits,
    /// Default lifetime and retention of sandboxes.
    pub lifetimes: Lifetimes,
    /// Handling of sandboxes that ran when the node was rebooted.
    pub on_reboot: OnReboot,
    /// Labels that the operator gave the node.
    pub labels: Vec<Label>,
    /// Cluster number that the ranges of vmids and addresses come from; `None` where it does not
    /// matter.
    pub number: Option<u32>,
}

/// Handling of sandboxes that ran when their node was rebooted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnReboot {
    /// Starts them again, a few at a time.
    #[default]
    Start,
    /// Leaves them stopped until somebody starts them.
    Keep,
}

/// Default lifetime of sandboxes, and retention of paused and stopped ones.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lifetimes {
    /// Lifetime rules where the creation sets none.
    pub default: LifetimePatch,
    /// Bytes within a minute that a TCP connection may move and still be silent; zero: an open
    /// connection is a use, whatever it moves.
    pub silent_bytes: u64,
    /// Longest time paused, after which a sandbox is stopped; zero: no limit.
    pub paused_max: Duration,
    /// Longest time stopped, after which a sandbox is deleted; zero: no limit.
    pub stopped_max: Duration,
    /// Metadata (key, value) that exempts a sandbox from these two limits.
    pub exempt: Option<(String, String)>,
}

impl Lifetimes {
    /// True when the sandbox is exempt from both retention limits.
    pub fn exempts(&self, record: &Record) -> bool {
        self.exempt.as_ref().is_some_and(|(key, value)| record.metadata.get(key) == Some(value))
    }
}

/// A PVE container template that a snapshot is cloned from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// Name of the snapshot, as users give it.
    pub snapshot: SnapshotId,
    /// Vmid of the template on this node.
    pub vmid: Vmid,
    /// Size where the creation sets none.
    pub size: Size,
    /// Readiness probe of its sandboxes.
    pub probe: Probe,
    /// Bridge of its sandboxes; `None`: the node's bridge.
    pub bridge: Option<String>,
    /// Interface settings of its sandboxes; they override those of the template.
    pub link: Link,
    /// Lines of the template's config that the operator allows beyond the rules.
    pub allowed: Allowed,
    /// Ports that its sandboxes expose without a word of their callers.
    pub ports: DefaultPorts,
}

/// Ports that the sandboxes of a snapshot expose without a word of their callers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DefaultPorts {
    /// Services that they expose from their creation on.
    pub services: Vec<DefaultService>,
    /// True when they expose a port as soon as something listens on it.
    pub on_listen: bool,
}

/// Service that the sandboxes of a snapshot expose from their creation on.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DefaultService {
    /// Name of the service.
    pub name: ServiceName,
    /// Its port.
    pub port: Port,
    /// Visibility of the port; the controller's default if unset.
    #[serde(default)]
    pub visibility: Option<Visibility>,
}

impl Template {
    /// Reason for which no sandbox is made from the template, which has this config; `None`: it is
    /// fit. Pure.
    pub fn obstacle(&self, config: Option<&ContainerConfig>) -> Option<String> {
        let Some(config) = config else { return Some("is missing on this node".to_owned()) };
        if !config.is_template() {
            return Some("is an ordinary container: `pct template` makes it a template".to_owned());
        }
        let found = forbidden::lines(config, &self.allowed);
        (!found.is_empty()).then(|| format!("has forbidden lines: {}", forbidden::text(&found)))
    }
}

/// Readiness probe, beyond that the sandbox has its address and runs `true`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Probe {
    /// No further condition.
    #[default]
    None,
    /// An HTTP server in the sandbox answers with 2xx or 3xx.
    Http {
        /// Port of the server.
        port: Port,
        /// Path to request; starts with a slash.
        #[serde(default = "root")]
        path: String,
    },
    /// A command in the sandbox exits with 0.
    Command(Vec<String>),
}

fn root() -> String {
    "/".to_owned()
}

/// Network that sandboxes are connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    /// Name of the bridge.
    pub name: String,
    /// Prefix length of the network.
    pub prefix: u8,
    /// Default route.
    pub gateway: Ipv4Addr,
    /// Addresses of the host itself.
    pub own: Vec<Ipv4Addr>,
    /// Sandboxes that may ask a DHCP server for an address.
    pub dhcp: Dhcp,
}

/// Sandboxes that may ask a DHCP server for an address.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Dhcp {
    /// None: the journal leases all addresses.
    #[default]
    Refused,
    /// Sandboxes whose order asks for DHCP.
    OnRequest,
    /// Every sandbox, whatever its order says.
    All,
}

/// Bounds of concurrency, resources and time of the node's operations.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Most creations that wait for one template.
    pub clone_queue_max: usize,
    /// Most containers that boot at the same time.
    pub starts_max: usize,
    /// Most processes and threads of a sandbox.
    pub processes: u32,
    /// Most that a sandbox reads from and writes to a disk.
    pub io: IoMax,
    /// Bytes of the storage that no clone may use up.
    pub storage_reserve_bytes: u64,
    /// Largest sum of all memory limits, as a multiple of the host's memory. The controller's own
    /// limit is lower; this one holds when several controllers place at the same time.
    pub memory_overcommit: f64,
    /// Largest share of memory in use, with half of the new sandbox's, to admit it.
    pub memory_used_max: f64,
    /// Time limit of a creation, from its admission to its answer.
    pub create: Duration,
    /// Time limit of one `pct clone`.
    pub clone: Duration,
    /// Time limit of one `pct start`. An ext4 that was not unmounted takes 44 s to mount.
    pub start: Duration,
    /// Time limit from the start until the sandbox is ready.
    pub answer: Duration,
    /// Time that a sandbox gets to shut down by itself, unless its stop says otherwise.
    pub grace: Duration,
    /// Time limit of one `pct stop`.
    pub stop: Duration,
    /// Time limit until nothing runs in a sandbox that is paused.
    pub freeze: Duration,
    /// Time limit of one `pct destroy`.
    pub destroy: Duration,
    /// Longest wait of an operation for another one on the same sandbox.
    pub turn: Duration,
    /// Longest timeout of a command, and that of a command that sets none; `None`: no limit.
    pub exec: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            clone_queue_max: 128,
            starts_max: 4,
            processes: 4096,
            io: IoMax::default(),
            storage_reserve_bytes: 1 << 30,
            memory_overcommit: 2.0,
            memory_used_max: 0.97,
            create: Duration::from_secs(180),
            clone: Duration::from_secs(120),
            start: Duration::from_secs(90),
            answer: Duration::from_secs(60),
            grace: Duration::from_secs(10),
            stop: Duration::from_secs(60),
            freeze: Duration::from_secs(5),
            destroy: Duration::from_secs(60),
            turn: Duration::from_secs(180),
            exec: None,
        }
    }
}

/// Checked order of a creation, with the id that the controller assigned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// Id of the sandbox.
    pub id: SandboxId,
    /// Team that owns the sandbox.
    pub team: Team,
    /// Attempt of the controller, from 1.
    pub attempt: u32,
    /// SHA-256 of the request's body, hex.
    pub body_digest: String,
    /// Specification of the sandbox.
    pub spec: Spec,
    /// Rules for ports that the caller does not name; `None`, of an older controller: none of them is exposed.
    pub port_rules: Option<PortRules>,
}
