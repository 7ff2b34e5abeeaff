//! The host: what PVE has, and what changes it. `pct` runs for what changes a container; files,
//! cgroups and /proc answer what only asks. The words of `pct` are known in this module alone.
//!
//! `pct::Pct` drives the real thing (or the lab's stand-in, which it cannot tell apart), `fake::FakePve`
//! keeps a cluster in memory for the simulation; one contract suite holds them to the same behaviour.

pub mod cgroup;
pub mod cluster;
pub mod command;
pub mod config_file;
pub mod container;
pub mod fake;
pub mod files;
#[cfg(test)]
mod golden;
pub mod hold;
pub mod interface;
pub mod known;
pub mod mark;
pub mod outcome;
pub mod ownership;
pub mod pct;
pub mod shim_cgroup;
pub mod storage;
pub mod tags;
pub mod volume;
pub mod worker;

use std::{collections::BTreeMap, net::Ipv4Addr, time::Duration};

use proto::{id::SandboxId, id::Vmid, name::NodeName};

pub use config_file::ContainerConfig;
pub use interface::Link;
pub use mark::Mark;
pub use volume::OwnVolumes;

/// What a caller can do about a failure; the text is `pct`'s own last line or ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ErrorKind {
    /// The vmid is taken, here or on another node: take the next.
    #[error("the vmid is taken: {0}")]
    VmidTaken(String),
    /// No such container on this node.
    #[error("no such container: {0}")]
    NotFound(String),
    /// Somebody holds PVE's lock on the container or its template; may be free soon.
    #[error("the container is locked: {0}")]
    Locked(String),
    /// It is running, and must not be, or the other way round.
    #[error("wrong state: {0}")]
    WrongState(String),
    /// The storage has no room.
    #[error("the storage is full: {0}")]
    StorageFull(String),
    /// The cluster has no quorum, or pmxcfs is down: nothing can be changed.
    #[error("no quorum: {0}")]
    NoQuorum(String),
    /// The container does not carry the mark that it must carry: it is not ours.
    #[error("not ours: {0}")]
    NotOurs(String),
    /// `pct` did not end in time. It was told to stop; what it did must be looked at.
    #[error("no answer within the deadline: {0}")]
    Deadline(String),
    /// Anything else that `pct` said.
    #[error("{0}")]
    Failed(String),
}

/// A failed operation on the host.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{op} {vmid} failed: {kind}")]
pub struct Error {
    /// The operation: clone, set, resize, hand over, start, stop, destroy, unlock, hold, release, freeze, thaw, read.
    pub op: &'static str,
    /// The container; for a clone, the new one.
    pub vmid: Vmid,
    /// What can be done about it.
    pub kind: ErrorKind,
}

/// One linked clone of a template.
#[derive(Debug, Clone)]
pub struct CloneOrder {
    /// Template to clone, on this node.
    pub template: Vmid,
    /// Number of the new container.
    pub vmid: Vmid,
    /// Who it is; its sandbox id is the hostname, and all of it is the description from the first
    /// write of the config on.
    pub mark: Mark,
}

/// A look at a number right before a clone to it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CloneSite {
    /// Storages that the clone's volumes will be on: those of the template's.
    pub storages: Vec<String>,
    /// Volumes of the number on any storage that can hold containers. All of them are somebody else's.
    pub volumes: Vec<String>,
}

/// How a sandbox is connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A leased address with the prefix length of the pool, and the gateway.
    Static {
        /// The address.
        ip: Ipv4Addr,
        /// Prefix length of the bridge's network, 8 to 30.
        prefix: u8,
        /// Default route.
        gateway: Ipv4Addr,
    },
    /// A DHCP server answers on the bridge.
    Dhcp,
}

/// Settings that a clone gets before its first start, in one `pct set`.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Bridge of its interface.
    pub bridge: String,
    /// MAC of its interface, derived from the address so that a reused address keeps its MAC.
    pub mac: [u8; 6],
    /// Its address.
    pub address: Address,
    /// Settings of its snapshot for the interface. The rest is kept as the template has it.
    pub link: Link,
    /// Cores; also the limit on CPU time.
    pub cores: u32,
    /// Memory, MiB. Swap is 0.
    pub memory_mib: u32,
}

/// The cluster as this node sees it, from `.members` and `.vmlist`.
#[derive(Debug, Clone, Default)]
pub struct Cluster {
    /// Changes are possible. False also when pmxcfs is down, and on a member that has not heard of
    /// its cluster since pmxcfs was started.
    pub quorate: bool,
    /// This node's number in its cluster, from 1, and 1 of a node that is in none; `None` while that
    /// cannot be told.
    pub number: Option<u32>,
    /// Nodes with their cluster address and whether they are online; at least this node.
    pub members: BTreeMap<NodeName, Member>,
    /// Every guest of the cluster, whatever its kind, and its node.
    pub guests: BTreeMap<Vmid, NodeName>,
    /// PVE's HA manager has this node in maintenance.
    pub maintenance: bool,
}

/// A node of the cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Member {
    /// Cluster address; absent when the node is offline.
    pub ip: Option<std::net::IpAddr>,
    /// Online by corosync.
    pub online: bool,
}

/// Room on a storage.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StorageRoom {
    /// Free, bytes.
    pub free: u64,
    /// In all, bytes.
    pub total: u64,
    /// Share of a thin pool's data that is in use, 0 to 1; 0 where there is none.
    pub thin_data: f64,
    /// The same of its metadata. Full, everything on the pool stops.
    pub thin_metadata: f64,
}

impl StorageRoom {
    /// Of a storage without a thin pool.
    pub const fn new(free: u64, total: u64) -> Self {
        Self { free, total, thin_data: 0.0, thin_metadata: 0.0 }
    }

    /// The worse of both in each respect.
    #[must_use]
    pub fn worse(self, other: Self) -> Self {
        let scarcer = if other.free < self.free { other } else { self };
        Self {
            thin_data: self.thin_data.max(other.thin_data),
            thin_metadata: self.thin_metadata.max(other.thin_metadata),
            ..scarcer
        }
    }
}

/// What a container uses now, read from its cgroup.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// CPU time that it has had, microseconds.
    pub cpu_us: u64,
    /// When it was read, nanoseconds of a clock of the node that only goes forward.
    pub at_ns: u64,
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// Its limit, bytes; 0: none, or none that is known.
    pub memory_max_bytes: u64,
    /// Swap, bytes.
    pub swap_bytes: u64,
    /// Processes and threads.
    pub pids: u32,
    /// PSI `some avg10` of cpu, percent.
    pub psi_cpu: f64,
    /// PSI `some avg10` of memory, percent.
    pub psi_memory: f64,
    /// PSI `some avg10` of io, percent.
    pub psi_io: f64,
    /// It is frozen.
    pub frozen: bool,
}

/// One PVE node. No method has a default body: a fake that forgets one would run the real thing.
///
/// Reads never fork; every change takes a deadline and is refused without quorum. None of them
/// frees a caller from the journal's rule: intent before effect.
#[async_trait::async_trait]
pub trait Pve: Send + Sync + std::fmt::Debug {
    /// PVE's name of this node.
    fn node(&self) -> &NodeName;

    /// The cluster now. Not an error when pmxcfs is down: then nothing is quorate, and an empty
    /// list of guests means nothing.
    async fn cluster(&self) -> Cluster;

    /// The config of a container of this node; `None` when there is none.
    async fn config(&self, vmid: Vmid) -> Result<Option<ContainerConfig>, Error>;

    /// The configs of all containers of this node.
    async fn configs(&self) -> Result<BTreeMap<Vmid, ContainerConfig>, Error>;

    /// True when the container's init runs, frozen or not.
    async fn running(&self, vmid: Vmid) -> bool;

    /// True when the container carries this mark. While /etc/pve cannot be read, also when the init
    /// that runs in it is the one that ran when it was last seen to carry it.
    async fn carries(&self, mark: &Mark) -> Result<bool, Error>;

    /// Pid of the container's init in the host's pid namespace.
    async fn init_pid(&self, vmid: Vmid) -> Option<u32>;

    /// True when the container runs and has this address on an interface. Says that its network is
    /// up, and nothing about whose the address is: root in a container can add any.
    async fn has_address(&self, vmid: Vmid, ip: Ipv4Addr) -> bool;

    /// Room on the storage that clones of `template` go to.
    async fn storage_room(&self, template: Vmid) -> Result<StorageRoom, Error>;

    /// Volumes on the node's storages that are named after this vmid, referenced or not.
    async fn volumes(&self, vmid: Vmid) -> Result<Vec<String>, Error>;

    /// Volumes of every number on the node's storages, referenced or not.
    async fn all_volumes(&self) -> Result<BTreeMap<Vmid, Vec<String>>, Error>;

    /// Looks at what stands under `vmid` before a clone of `template` to it. A storage that cannot be
    /// read is an error only where the clone would go there.
    async fn clone_site(&self, template: Vmid, vmid: Vmid) -> Result<CloneSite, Error>;

    /// Makes a linked clone. Holds PVE's lock on the template meanwhile, and PVE refuses a second
    /// one at once: callers queue per template.
    async fn clone_template(&self, order: &CloneOrder, deadline: Duration) -> Result<(), Error>;

    /// Writes the settings of a stopped container of ours.
    async fn configure(&self, vmid: Vmid, settings: &Settings) -> Result<(), Error>;

    /// Makes the root volume of a container of ours at least so large, GiB, with its file system. As
    /// large already is `Ok`; PVE makes none smaller. While the container runs this takes as long as any
    /// call of `pct`. On a volume of a stopped one with a file system of its own it takes half a minute,
    /// which is waited out without a turn that others need.
    async fn resize(&self, vmid: Vmid, gib: u32, deadline: Duration) -> Result<(), Error>;

    /// Gives a stopped container of ours to another node that is online and sees its volumes, too:
    /// they are all on shared storages. Its config is renamed from the one node's directory to the
    /// other's, which PVE's own cluster does in one step. There already is `Ok`.
    async fn hand_to(&self, vmid: Vmid, owner: &SandboxId, target: &NodeName) -> Result<(), Error>;

    /// Starts a container. `Ok` when its init runs; a container that runs already is `Ok`. A lock
    /// that was held while it was paused is taken off first.
    async fn start(&self, vmid: Vmid, deadline: Duration) -> Result<(), Error>;

    /// Stops a container at once. One that is stopped already is `Ok`. A paused one is thawed and
    /// its lock taken off first.
    async fn stop(&self, vmid: Vmid, deadline: Duration) -> Result<(), Error>;

    /// Destroys the container if, and only if, its config carries this sandbox's mark for this
    /// very vmid and is no template. The volumes that its config names go with it, then those of
    /// `volumes` that no config names; other volumes of the number are left. Clears locks that our own
    /// dead worker left, waits for a living one. Idempotent: `Ok` when nothing of the sandbox is left.
    /// Running containers are stopped first, paused ones are thawed.
    async fn destroy_owned(
        &self,
        vmid: Vmid,
        owner: &SandboxId,
        volumes: &OwnVolumes,
        deadline: Duration,
    ) -> Result<(), Error>;

    /// Takes PVE's `lock: disk` off a template when no worker that holds it lives. Only called for
    /// a template that the journal says our own dead clone has locked.
    async fn unlock_template(&self, template: Vmid) -> Result<(), Error>;

    /// Writes a mark into the description of a container that has none, and touches nothing else of
    /// it. There already is `Ok`.
    async fn mark(&self, mark: &Mark) -> Result<(), Error>;

    /// Takes this sandbox's mark off its container, and touches nothing else of it. Not there is
    /// `Ok`.
    async fn unmark(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error>;

    /// Takes PVE's config lock on this sandbox's container, so that no snapshot and no backup meets
    /// it frozen. Held already is `Ok`; somebody else's lock is respected. See `hold`.
    async fn hold(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error>;

    /// Gives that lock back, and never somebody else's. Not held is `Ok`.
    async fn release(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error>;

    /// Freezes all that runs in this sandbox's container. `Ok` when nothing in it runs any more;
    /// what does not freeze before the deadline is thawed again. Needs no quorum, and no /etc/pve: see
    /// `carries`.
    async fn freeze(&self, vmid: Vmid, owner: &SandboxId, deadline: Duration) -> Result<(), Error>;

    /// Thaws this sandbox's container, whoever froze it. One that is not frozen, or does not run, is
    /// `Ok`. Needs no quorum, and no /etc/pve.
    async fn thaw(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error>;

    /// Writes so much of a container's memory to swap, if the host has any; true when it did and
    /// there may be more. May take long.
    async fn reclaim(&self, vmid: Vmid, bytes: u64) -> bool;

    /// What a container uses; `None` when it does not run.
    async fn usage(&self, vmid: Vmid) -> Option<Usage>;

    /// True when the container has an open TCP connection with somebody outside of it, or when that
    /// cannot be told; false when it does not run.
    async fn connected(&self, vmid: Vmid) -> bool;

    /// Pids of all that runs in the container, in this host's pid namespace.
    async fn processes(&self, vmid: Vmid) -> Vec<u32>;

    /// True while nothing in the container gets to run: what is started in it would hang.
    async fn frozen(&self, vmid: Vmid) -> bool;

    /// Program and leading arguments that run a command inside a running container with a clean
    /// environment; `None` when there is no way in (the fake).
    fn enter(&self, vmid: Vmid) -> Option<Vec<std::ffi::OsString>>;
}
