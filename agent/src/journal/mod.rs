//! The agent's journal: the durable truth about the sandboxes of this node.
//!
//! A narrow trait with two implementations: `sqlite` (WAL, synchronous=FULL, one writer thread,
//! group commit) and `memory`, which can lose unsynced writes, so that the simulation runs the
//! shipped code. `Ok` from a write means that it survives a power cut.

#[cfg(test)]
pub(crate) mod conformance;
pub mod listen;
pub mod memory;
pub mod node;
pub mod ports;
pub mod record;
mod ring;
pub mod scheduling;
pub mod sqlite;
mod words;

use std::{collections::BTreeSet, net::Ipv4Addr};

use proto::id::{SandboxId, Vmid};

pub use listen::{ListenRule, PortRules};
pub use node::Node;
pub use ports::{Access, AccessKey, GuardedPort, OpenPort};
pub use record::{Failure, Lifetime, Phase, Record, WakeOn};

pub use memory::MemoryJournal;
pub use sqlite::SqliteJournal;

/// Result of a call to the journal.
type Result<T, E = Error> = std::result::Result<T, E>;

/// Failure of a call to the journal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The record was changed in between: read it again.
    #[error("the record of {id} is at revision {found}, not {expected}")]
    Conflict {
        /// The sandbox.
        id: SandboxId,
        /// Revision that the caller had.
        expected: u64,
        /// Present revision; 0 without a record.
        found: u64,
    },
    /// Every vmid of the node's range is in use or was used too recently.
    #[error("no vmid is left in the range {first}-{last}")]
    VmidsExhausted {
        /// First vmid of the range.
        first: Vmid,
        /// Last vmid of the range.
        last: Vmid,
    },
    /// Another sandbox that has not ended has the address.
    #[error("{ip} is the address of another sandbox")]
    AddressTaken {
        /// Address in question.
        ip: Ipv4Addr,
    },
    /// Every address of the pool is leased or in quarantine.
    #[error("no address is left in the pool")]
    AddressesExhausted,
    /// The disk is full; the rest of it is kept for writes that end something.
    #[error("the journal's disk is full: nothing new is begun until there is room")]
    Full,
    /// The disk or the file failed.
    #[error("the journal failed: {0}")]
    Storage(String),
}

/// Intent of a creation, before it has a vmid and an address.
#[derive(Debug, Clone)]
pub struct Intent {
    /// The record with a placeholder `vmid` (ignored) and no `ip`.
    pub record: Record,
    /// Whether to lease an address too.
    pub lease_address: bool,
    /// Vmids in use in the cluster: never leased, even if the journal has them as free.
    pub taken: BTreeSet<Vmid>,
    /// Addresses of containers that are not in this journal: never leased either.
    pub taken_ips: BTreeSet<Ipv4Addr>,
}

/// Ranges that the journal leases from. Fixed at start.
#[derive(Debug, Clone)]
pub struct Pools {
    /// This node's stripe of the vmid range, inclusive.
    pub vmids: (Vmid, Vmid),
    /// Addresses for sandboxes: a range of the bridge's network without the network, broadcast and
    /// gateway addresses. Inclusive.
    pub addresses: (Ipv4Addr, Ipv4Addr),
    /// Quarantine of an address after its sandbox has ended, milliseconds.
    pub address_quarantine_ms: u64,
}

/// Reads of the journal, for code that must not write it.
#[async_trait::async_trait]
pub trait Feed: Send + Sync + std::fmt::Debug {
    /// Random id of the journal file: another id means another history.
    fn id(&self) -> &str;

    /// Range of the vmids that are leased, inclusive.
    fn vmids(&self) -> (Vmid, Vmid);

    /// Reads one record, tombstones included.
    async fn get(&self, id: &SandboxId) -> Result<Option<Record>>;

    /// Reads all records, tombstones included, ordered by id.
    async fn all(&self) -> Result<Vec<Record>>;

    /// Reads the records changed after `revision`, in the order of their revision, at most `limit`.
    async fn changed_since(&self, revision: u64, limit: usize) -> Result<Vec<Record>>;

    /// Last revision that was written.
    async fn revision(&self) -> Result<u64>;

    /// Highest revision of a removed tombstone. `changed_since` an older revision would miss an
    /// end, so a reader that is further behind must read all records again.
    async fn horizon(&self) -> Result<u64>;

    /// Reads the operator's order for the node.
    async fn scheduling(&self) -> Result<scheduling::Scheduling>;

    /// Node that this journal belongs to; `None` before that was known.
    async fn node(&self) -> Result<Option<Node>>;

    /// Highest cancelled attempt of `id`; 0 when there is none.
    async fn cancelled(&self, id: &SandboxId) -> Result<u32>;

    /// Number of vmids and of addresses that can still be leased.
    async fn room(&self, now_ms: u64) -> Result<(u32, u32)>;

    /// Revision, for watchers: increases at every write. Starts at the current one.
    fn watch(&self) -> tokio::sync::watch::Receiver<u64>;
}

/// The journal. One writer; every method is one transaction.
#[async_trait::async_trait]
pub trait Journal: Feed {
    /// Leases a vmid (the ring's next that is neither taken nor leased) and an address, and writes
    /// the record, in one transaction. Returns the record as written. An existing record of this id
    /// is a conflict, unless it is the tombstone of an earlier attempt. `Full` when the disk is
    /// full: it takes only writes that end something then.
    async fn begin(&self, intent: Intent, now_ms: u64) -> Result<Record>;

    /// Writes the record of a container that existed before it, with its vmid and address. A
    /// conflict with any record of this id, or one of the same vmid, address or request that has
    /// not ended.
    async fn adopt(&self, record: &Record) -> Result<Record>;

    /// Writes a record from another node's journal, for a container that is on this node now. If
    /// its address is leased already, it gets one from this node's pool. Replaces the tombstone of
    /// a released sandbox or of an earlier attempt; otherwise as `adopt`.
    async fn import(
        &self,
        record: &Record,
        taken_ips: BTreeSet<Ipv4Addr>,
        now_ms: u64,
    ) -> Result<Record>;

    /// Leases another vmid to a creation, because PVE said that the first is taken. The old one is
    /// not leased again before the ring comes round.
    async fn next_vmid(&self, record: &Record, taken: BTreeSet<Vmid>) -> Result<Record>;

    /// Writes a record if it is still at `record.revision`; returns it at its new revision. A
    /// record whose phase has ended returns its vmid and its address. `AddressTaken` when its lease
    /// is new and another record that has not ended has it.
    async fn update(&self, record: &Record) -> Result<Record>;

    /// Removes tombstones that ended before `before_ms`. Returns their number.
    async fn forget(&self, before_ms: u64) -> Result<usize>;

    /// Raises the highest epoch seen to `epoch` if that is higher; returns the highest.
    async fn epoch(&self, epoch: u64) -> Result<u64>;

    /// Stores the operator's order for the node.
    async fn set_scheduling(&self, order: &scheduling::Scheduling) -> Result<()>;

    /// Stores the node that this journal belongs to.
    async fn set_node(&self, node: &Node) -> Result<()>;

    /// Records that attempts of `id` up to `attempt` are cancelled, also when no record exists.
    async fn cancel(&self, id: &SandboxId, attempt: u32, now_ms: u64) -> Result<()>;
}
