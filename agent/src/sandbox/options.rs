//! What the node's configuration says about sandboxes, and what a caller orders.

use std::{net::Ipv4Addr, time::Duration};

use proto::{
    id::{SandboxId, Vmid},
    lifetime::Wish,
    name::{Label, Port, SnapshotId, Team},
    spec::{Size, Spec},
};

use serde::Deserialize;

use crate::{journal::Record, pve::Link};

/// Fixed at start.
#[derive(Debug, Clone)]
pub struct Options {
    /// What can be cloned here. A snapshot may have several templates: the one with the shortest
    /// queue is taken.
    pub templates: Vec<Template>,
    /// Where sandboxes are connected.
    pub network: Bridge,
    /// Bounds.
    pub limits: Limits,
    /// How long sandboxes live.
    pub lifetimes: Lifetimes,
    /// What becomes of those that ran when the node was rebooted.
    pub on_reboot: OnReboot,
    /// What the operator says of the node.
    pub labels: Vec<Label>,
    /// The number in the cluster that the node's ranges of vmids and addresses were cut by; `None`
    /// where it did not matter.
    pub number: Option<u32>,
}

/// What becomes of sandboxes that ran when their node was rebooted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnReboot {
    /// They are started again, a few at a time.
    #[default]
    Start,
    /// They stay stopped until somebody starts them.
    Keep,
}

/// How long sandboxes live where nobody says so, and how long they are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lifetimes {
    /// What a sandbox gets unless it asks otherwise.
    pub default: Wish,
    /// What has been paused for so long is stopped; zero: never.
    pub paused_max: Duration,
    /// What has been stopped for so long is deleted; zero: never.
    pub stopped_max: Duration,
    /// Metadata that exempts a sandbox from these two.
    pub exempt: Option<(String, String)>,
}

impl Lifetimes {
    /// True when this sandbox is kept however long that is.
    pub fn exempts(&self, record: &Record) -> bool {
        self.exempt.as_ref().is_some_and(|(key, value)| record.metadata.get(key) == Some(value))
    }
}

/// A PVE container template that a snapshot is cloned from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// What users call it.
    pub snapshot: SnapshotId,
    /// The template on this node.
    pub vmid: Vmid,
    /// What a sandbox gets unless it asks otherwise.
    pub size: Size,
    /// How a sandbox of it shows that it is ready.
    pub probe: Probe,
    /// Bridge of its sandboxes, where that is not the node's.
    pub bridge: Option<String>,
    /// Settings of their interface; they count more than the template's.
    pub link: Link,
    /// True when the template may be privileged.
    pub privileged: bool,
}

/// How a sandbox shows that it is ready, beyond that it has its address and runs `true`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Probe {
    /// That is enough.
    #[default]
    None,
    /// An HTTP server in it answers with 2xx or 3xx.
    Http {
        /// Its port.
        port: Port,
        /// What is asked for; starts with a slash.
        path: String,
    },
    /// A command in it exits with 0.
    Command(Vec<String>),
}

/// Where sandboxes are connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    /// Its name.
    pub name: String,
    /// Prefix length of its network.
    pub prefix: u8,
    /// Default route.
    pub gateway: Ipv4Addr,
    /// The host's own addresses.
    pub own: Vec<Ipv4Addr>,
    /// Says which sandboxes may ask a DHCP server for an address.
    pub dhcp: Dhcp,
}

/// Says which sandboxes may ask a DHCP server for an address.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Dhcp {
    /// Nobody: the journal leases all addresses.
    #[default]
    Refused,
    /// Sandboxes whose order says so.
    OnRequest,
    /// Every sandbox, whatever its order says.
    All,
}

/// Bounds of what the node does at once, and of how long.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Creations that may wait for a turn at one template.
    pub clone_queue_max: usize,
    /// Containers that may boot at a time.
    pub starts_max: usize,
    /// Bytes of the storage that no clone may use up.
    pub storage_reserve_bytes: u64,
    /// Sum of the memory limits handed out, over the memory that is there. The controller's own limit
    /// is lower; this one holds when several controllers place at once.
    pub memory_overcommit: f64,
    /// Share of the memory that may be in use, with half of what is asked, when one more comes in.
    pub memory_used_max: f64,
    /// A creation, from its admission to its answer.
    pub create: Duration,
    /// One `pct clone`.
    pub clone: Duration,
    /// One `pct start`. An ext4 that was not unmounted takes 44 s to mount.
    pub start: Duration,
    /// From the start to the answer.
    pub answer: Duration,
    /// One `pct stop`.
    pub stop: Duration,
    /// Until nothing runs in a sandbox that is paused.
    pub freeze: Duration,
    /// One `pct destroy`.
    pub destroy: Duration,
    /// How long an operation waits for another one on the same sandbox.
    pub turn: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            clone_queue_max: 64,
            starts_max: 4,
            storage_reserve_bytes: 1 << 30,
            memory_overcommit: 2.0,
            memory_used_max: 0.97,
            create: Duration::from_secs(180),
            clone: Duration::from_secs(120),
            start: Duration::from_secs(90),
            answer: Duration::from_secs(60),
            stop: Duration::from_secs(60),
            freeze: Duration::from_secs(5),
            destroy: Duration::from_secs(60),
            turn: Duration::from_secs(180),
        }
    }
}

/// A checked creation, with the identity that the controller gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// Identity.
    pub id: SandboxId,
    /// Owner.
    pub team: Team,
    /// The controller's try, from 1.
    pub attempt: u32,
    /// SHA-256 of the request's body, hex.
    pub body_digest: String,
    /// What to make.
    pub spec: Spec,
}
