//! Interface to the PVE host. `pct` runs for changes of a container; reads use files, cgroups and
//! /proc. The syntax and the messages of `pct` are known in this module alone.
//!
//! `pct::Pct` drives a real node (or the lab's stand-in, which it cannot tell apart),
//! `fake::FakePve` keeps a cluster in memory for the simulation; one contract suite holds both to
//! the same behaviour.

pub mod block_device;
mod boot_watch;
pub mod cgroup;
pub mod cluster;
pub mod command;
pub mod config_file;
pub mod container;
mod controller;
pub mod fake;
pub mod files;
pub mod forbidden;
#[cfg(test)]
mod golden;
pub mod host_firewall;
pub mod host_paths;
pub mod interface;
pub mod io_limit;
pub mod known;
pub mod looks;
pub mod mark;
pub mod operation;
pub mod outcome;
pub mod ownership;
pub mod pause_lock;
pub mod pct;
pub mod pmxcfs;
pub mod process_limit;
pub mod shim_cgroup;
pub mod shim_io;
pub mod storage;
pub mod tags;
pub mod template_mark;
pub mod volume;
pub mod worker;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use futures_util::stream::BoxStream;
use proto::{
    id::{SandboxId, Vmid},
    name::{NodeName, Port},
    spec::Size,
};

pub use config_file::ContainerConfig;
pub use host_paths::HostPaths;
pub use interface::Link;
pub use io_limit::{IoLimited, IoMax};
pub use known::Init;
pub use mark::Mark;
pub use operation::Operation;
pub use process_limit::Limited;
pub use volume::OwnVolumes;

pub use crate::sys::sock_diag::Connection;

/// Reason of a failure, by what a caller can do about it; the text is `pct`'s last line or ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ErrorKind {
    /// The vmid is in use, here or on another node: take the next.
    #[error("the vmid is taken: {0}")]
    VmidTaken(String),
    /// No such container on this node.
    #[error("no such container: {0}")]
    NotFound(String),
    /// Another process holds PVE's lock on the container or its template; it may be free soon.
    #[error("the container is locked: {0}")]
    Locked(String),
    /// The container runs and must not, or the other way round.
    #[error("wrong state: {0}")]
    WrongState(String),
    /// The storage is full.
    #[error("the storage is full: {0}")]
    StorageFull(String),
    /// The cluster has no quorum, or pmxcfs is down: nothing can be changed.
    #[error("no quorum: {0}")]
    NoQuorum(String),
    /// The container does not carry the mark that it must carry: it is not ours.
    #[error("not ours: {0}")]
    NotOurs(String),
    /// `pct` did not end in time and was told to stop; the caller must check what it did.
    #[error("no answer within the deadline: {0}")]
    Deadline(String),
    /// Any other failure that `pct` reported.
    #[error("{0}")]
    Failed(String),
}

/// Result of a step of an operation.
type Result<T, E = ErrorKind> = std::result::Result<T, E>;

/// A failed operation on the host.
#[derive(Debug, Clone)]
pub struct Error {
    /// Operation that failed.
    pub op: Operation,
    /// Container; for a clone, the new one. `None` when the operation is on all of them.
    pub vmid: Option<Vmid>,
    /// Reason, by what can be done about it.
    pub kind: ErrorKind,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { op, vmid, kind } = self;
        match vmid {
            Some(vmid) => write!(f, "{op} {vmid} failed: {kind}"),
            None => write!(f, "could not {op}: {kind}"),
        }
    }
}

impl std::error::Error for Error {}

/// Order to make one linked clone of a template.
#[derive(Debug, Clone)]
pub struct CloneOrder {
    /// Template to clone, on this node.
    pub template: Vmid,
    /// Vmid of the new container.
    pub vmid: Vmid,
    /// Identity of the container: its sandbox id is the hostname, and the whole mark is the
    /// description before the first volume is made.
    pub mark: Mark,
}

/// State of a vmid right before a clone to it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CloneSite {
    /// Storages that the clone's volumes will be on: those of the template.
    pub storages: Vec<String>,
    /// Volumes of this vmid on any storage that can hold containers. None of them is ours.
    pub volumes: Vec<String>,
}

/// Network address of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// Leased address with the prefix length of the pool, and the gateway.
    Static {
        /// The address.
        ip: Ipv4Addr,
        /// Prefix length of the bridge's network, 8 to 30.
        prefix: u8,
        /// Default route.
        gateway: Ipv4Addr,
    },
    /// Address from a DHCP server on the bridge.
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
    /// Interface settings of its snapshot. Everything else stays as the template has it.
    pub link: Link,
    /// Cores; also the limit on CPU time.
    pub cores: u32,
    /// Memory, MiB. Swap is 0.
    pub memory_mib: u32,
}

/// The cluster as this node sees it, from `.members` and `.vmlist`.
#[derive(Debug, Clone, Default)]
pub struct Cluster {
    /// Whether changes are possible. False also when pmxcfs is down, and on a member that has had
    /// no contact with its cluster since pmxcfs started.
    pub quorate: bool,
    /// Number of this node in its cluster, from 1; 1 for a node without a cluster. `None` while it
    /// is unknown.
    pub number: Option<u32>,
    /// Nodes of the cluster; at least this node.
    pub members: BTreeMap<NodeName, Member>,
    /// Addresses of all nodes on all links of corosync, beside those of `members`.
    pub links: BTreeSet<IpAddr>,
    /// All guests of the cluster, of any kind, with their node.
    pub guests: BTreeMap<Vmid, NodeName>,
    /// Version of each guest's config, as this node's pmxcfs counts it: every write, on any node, gives the config a number
    /// that no config has had since pmxcfs started. Then it begins at 1 again.
    pub versions: BTreeMap<Vmid, u64>,
    /// Whether PVE's HA manager has this node in maintenance.
    pub maintenance: bool,
}

/// A node of the cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Member {
    /// Cluster address; absent when the node is offline.
    pub ip: Option<IpAddr>,
    /// Whether corosync says that the node is online.
    pub online: bool,
}

/// Space on a storage.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StorageRoom {
    /// Free space, bytes.
    pub free: u64,
    /// Total space, bytes.
    pub total: u64,
    /// Share of a thin pool's data that is in use, 0 to 1; 0 without a thin pool.
    pub thin_data: f64,
    /// Share of its metadata that is in use, 0 to 1. At 1 everything on the pool stops.
    pub thin_metadata: f64,
}

impl StorageRoom {
    /// Space of a storage without a thin pool.
    pub const fn new(free: u64, total: u64) -> Self {
        Self { free, total, thin_data: 0.0, thin_metadata: 0.0 }
    }

    /// Combines the smaller free space and the higher usage of the thin pools.
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

/// Resource usage of a container, read from its cgroup.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// CPU time used so far, microseconds.
    pub cpu_us: u64,
    /// Time of the reading, nanoseconds of the node's monotonic clock.
    pub at_ns: u64,
    /// Memory used, bytes.
    pub memory_bytes: u64,
    /// Part of it that the kernel frees when it is needed: cached files, bytes.
    pub reclaimable_bytes: u64,
    /// Memory limit, bytes; 0 when there is none or it is unknown.
    pub memory_max_bytes: u64,
    /// Swap used, bytes.
    pub swap_bytes: u64,
    /// Number of processes and threads.
    pub pids: u32,
    /// PSI `some avg10` of cpu, percent.
    pub psi_cpu: f64,
    /// PSI `some avg10` of memory, percent.
    pub psi_memory: f64,
    /// PSI `some avg10` of io, percent.
    pub psi_io: f64,
    /// Whether the container is frozen.
    pub frozen: bool,
}

/// One PVE node. No method has a default body: a fake that forgets one would run the real thing.
///
/// Reads never fork. Every change has a deadline and, unless noted otherwise, is refused without
/// quorum. Callers must still follow the journal's rule: record the intent before the effect.
#[async_trait::async_trait]
pub trait Pve: Send + Sync + std::fmt::Debug {
    /// PVE's name of this node.
    fn node(&self) -> &NodeName;

    /// State of the cluster. With pmxcfs down this is no error: nothing is quorate then, and the
    /// empty list of guests means nothing.
    async fn cluster(&self) -> Cluster;

    /// Config of a container of this node; `None` when there is no such container.
    async fn config(&self, vmid: Vmid) -> Result<Option<ContainerConfig>, Error>;

    /// Configs of all containers of this node.
    async fn configs(&self) -> Result<BTreeMap<Vmid, ContainerConfig>, Error>;

    /// True when the container's init runs, frozen or not.
    async fn running(&self, vmid: Vmid) -> bool;

    /// True when the container carries this mark. While /etc/pve cannot be read, also when its init
    /// is still the process that ran when the mark was last read.
    async fn carries(&self, mark: &Mark) -> Result<bool, Error>;

    /// Init of the container, if it runs.
    async fn init(&self, vmid: Vmid) -> Option<Init>;

    /// True when the container runs and has this address on an interface. Shows that its network is
    /// up, not that the address is its own: root in a container can add any.
    async fn has_address(&self, vmid: Vmid, ip: Ipv4Addr) -> bool;

    /// Space on the storage that clones of `template` go to.
    async fn storage_room(&self, template: Vmid) -> Result<StorageRoom, Error>;

    /// Volumes on the node's storages that are named after this vmid, in a config or not.
    async fn volumes(&self, vmid: Vmid) -> Result<Vec<String>, Error>;

    /// Volumes of all vmids on the node's storages, in a config or not.
    async fn all_volumes(&self) -> Result<BTreeMap<Vmid, Vec<String>>, Error>;

    /// Finds the volumes that exist under `vmid` before a clone of `template` to it. A storage that
    /// cannot be read is an error only where the clone would go there.
    async fn clone_site(&self, template: Vmid, vmid: Vmid) -> Result<CloneSite, Error>;

    /// Makes a linked clone. PVE locks the template meanwhile and refuses a second clone at once:
    /// callers queue per template.
    async fn clone_template(&self, order: &CloneOrder, deadline: Duration) -> Result<(), Error>;

    /// Writes the settings of a stopped sandbox container.
    async fn configure(&self, vmid: Vmid, settings: &Settings) -> Result<(), Error>;

    /// Grows the root volume of a sandbox container and its file system to at least `gib` GiB. A
    /// volume that is large enough already is `Ok`; PVE cannot shrink one. While the container runs
    /// this takes as long as any call of `pct`. With a stopped container whose volume has its own
    /// file system it takes half a minute, without keeping other commands waiting.
    async fn resize(&self, vmid: Vmid, gib: u32, deadline: Duration) -> Result<(), Error>;

    /// Gives this sandbox's container the cores and the memory of `size`, at once where it runs. Its disk
    /// stays as it is.
    async fn set_limits(&self, vmid: Vmid, owner: &SandboxId, size: Size) -> Result<(), Error>;

    /// Moves a stopped sandbox container to another node, which is online and sees its volumes: all
    /// of them are on shared storages. Its config is renamed from the one node's directory to the
    /// other's, one atomic step in pmxcfs. A container that is there already is `Ok`.
    async fn move_config_to(
        &self,
        vmid: Vmid,
        owner: &SandboxId,
        target: &NodeName,
    ) -> Result<(), Error>;

    /// Starts a container. `Ok` when its init runs, also when it ran already. Removes the lock of a
    /// pause first.
    async fn start(&self, vmid: Vmid, deadline: Duration) -> Result<(), Error>;

    /// Limits the processes, threads and cgroups of a running container, whose own cgroup is new at each of its
    /// boots. Needs neither quorum nor /etc/pve.
    async fn limit_processes(&self, vmid: Vmid, max: u32) -> Result<Limited, Error>;

    /// Limits what a running container reads from and writes to the disks under its volumes; like the
    /// limit on processes, its cgroup forgets it at each boot. Needs neither quorum nor /etc/pve.
    async fn limit_io(&self, vmid: Vmid, max: IoMax) -> Result<IoLimited, Error>;

    /// Marks of the containers that boot from now on, each as soon as its cgroup is there and before its init
    /// runs. Ends when boots can no longer be watched, and may miss some: also look from time to time.
    fn boots(&self) -> io::Result<BoxStream<'static, Mark>>;

    /// Asks the init of this sandbox's container to shut down, by the signal that `pct shutdown`
    /// sends, and does not wait. `Ok` when it does not run; WrongState while its init does not take
    /// the signal, as one that was just started. Needs neither quorum nor /etc/pve.
    async fn halt(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error>;

    /// Tells this init, while it shuts down, to look which processes have ended, by the signal that
    /// the kernel sends it for its own children. An init waits for every process of its container,
    /// and is told nothing of those that entered from outside, as commands do: systemd's then looks
    /// again after 10 s only.
    async fn recheck_ended(&self, init: Init);

    /// Stops a container at once. `Ok` when it is stopped already. A paused one is thawed and its
    /// lock removed first; only that needs quorum.
    async fn stop(&self, vmid: Vmid, deadline: Duration) -> Result<(), Error>;

    /// Destroys the container only if its config is no template and carries this sandbox's mark for
    /// this vmid. The volumes that its config names are removed, then those of `volumes` that no
    /// config names; other volumes of the vmid stay. Clears locks that our own dead worker left,
    /// waits for a living one. Stops running containers and thaws paused ones first. Idempotent:
    /// `Ok` when nothing of the sandbox is left.
    async fn destroy_owned(
        &self,
        vmid: Vmid,
        owner: &SandboxId,
        volumes: &OwnVolumes,
        deadline: Duration,
    ) -> Result<(), Error>;

    /// Removes PVE's `lock: disk` from a template when no worker that holds it is alive. Only
    /// called for a template that, by the journal, our own dead clone has locked.
    async fn unlock_template(&self, template: Vmid) -> Result<(), Error>;

    /// Writes a mark and its tag into the config of a container that has none, and changes nothing
    /// else. A mark that is there already is `Ok`.
    async fn mark(&self, mark: &Mark) -> Result<(), Error>;

    /// Removes this sandbox's mark and its tag from its container, and changes nothing else. `Ok`
    /// when there is none.
    async fn unmark(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error>;

    /// Takes PVE's config lock on this sandbox's container, so that no snapshot or backup runs
    /// while it is frozen. `Ok` when held already; a lock of somebody else is an error. See `pause_lock`.
    async fn acquire_pause_lock(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error>;

    /// Releases that lock, and never somebody else's. `Ok` when it is not held.
    async fn release_pause_lock(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error>;

    /// Freezes all processes of this sandbox's container. `Ok` when all are frozen; if they are not
    /// before the deadline, they are thawed again. Needs neither quorum nor /etc/pve: see
    /// `carries`.
    async fn freeze(&self, vmid: Vmid, owner: &SandboxId, deadline: Duration) -> Result<(), Error>;

    /// Thaws this sandbox's container, whoever froze it. `Ok` when it is not frozen or does not
    /// run. Needs neither quorum nor /etc/pve.
    async fn thaw(&self, vmid: Vmid, owner: &SandboxId) -> Result<(), Error>;

    /// Writes `bytes` of a container's memory to swap, if the host has swap; true when it did and
    /// there may be more. May take long.
    async fn reclaim(&self, vmid: Vmid, bytes: u64) -> bool;

    /// Resource usage of a container; `None` when it does not run.
    async fn usage(&self, vmid: Vmid) -> Option<Usage>;

    /// Open TCP connections of the container with peers outside of it, and what they have moved so
    /// far; `None` when it may have some and that cannot be known. None of them when it does not run.
    async fn connections(&self, vmid: Vmid) -> Option<Vec<Connection>>;

    /// True when something in the container listens on this TCP port of its loopback interface, which
    /// nobody else reaches; false when that is unknown.
    async fn listens_on_loopback(&self, vmid: Vmid, port: Port) -> bool;

    /// Addresses that TCP sockets in the container listen on, by port; empty when that is unknown.
    async fn listeners(&self, vmid: Vmid) -> Vec<SocketAddr>;

    /// Pids of all processes in the container, in this host's pid namespace.
    async fn processes(&self, vmid: Vmid) -> Vec<u32>;

    /// True while the container is frozen: a process started in it would hang.
    async fn frozen(&self, vmid: Vmid) -> bool;

    /// Program and leading arguments that run a command inside a running container with a clean
    /// environment; `None` when there is no way in (the fake).
    fn enter(&self, vmid: Vmid) -> Option<Vec<std::ffi::OsString>>;
}
