//! The agent's journal: the durable truth about the sandboxes of this node.
//!
//! A narrow trait with two implementations: `sqlite` (WAL, synchronous=FULL, one writer thread,
//! group commit) and `memory`, which can lose what was not synced, so that the simulation runs the
//! shipped code. `Ok` from a write means: it survives a power cut.

#[cfg(test)]
pub(crate) mod conformance;
pub mod intake;
pub mod memory;
pub mod node;
pub mod record;
mod ring;
pub mod sqlite;
mod words;

use proto::id::{SandboxId, Vmid};

pub use node::Node;
pub use record::{Failure, Lifetime, Phase, Record, WakeOn};

pub use memory::MemoryJournal;
pub use sqlite::SqliteJournal;

/// The journal could not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The record was changed in between: read it again.
    #[error("the record of {id} is at revision {found}, not {expected}")]
    Conflict {
        /// The sandbox.
        id: SandboxId,
        /// Revision that the caller had.
        expected: u64,
        /// Revision that is there; 0 when there is none.
        found: u64,
    },
    /// Every vmid of the node's range is in use or was used too lately.
    #[error("no vmid is left in the range {first}-{last}")]
    VmidsExhausted {
        /// First of the range.
        first: Vmid,
        /// Last of the range.
        last: Vmid,
    },
    /// A living sandbox has the address.
    #[error("{ip} is the address of another sandbox")]
    AddressTaken {
        /// The address.
        ip: std::net::Ipv4Addr,
    },
    /// Every address of the pool is leased or in quarantine.
    #[error("no address is left in the pool")]
    AddressesExhausted,
    /// The disk is full, and what is left of it is for ends.
    #[error("the journal's disk is full: nothing new is begun until there is room")]
    Full,
    /// The disk, or the file.
    #[error("the journal failed: {0}")]
    Storage(String),
}

/// A creation's intent, before it has a number and an address.
#[derive(Debug, Clone)]
pub struct Intent {
    /// The record with a placeholder `vmid` (ignored) and no `ip`.
    pub record: Record,
    /// Lease an address too.
    pub lease_address: bool,
    /// Vmids that the cluster holds now: never leased, whatever the journal thinks.
    pub taken: std::collections::BTreeSet<Vmid>,
    /// Addresses that containers have which are not of this journal: never leased either.
    pub taken_ips: std::collections::BTreeSet<std::net::Ipv4Addr>,
}

/// What the journal leases out of. Fixed at start.
#[derive(Debug, Clone)]
pub struct Pools {
    /// This node's stripe of the vmid range, inclusive.
    pub vmids: (Vmid, Vmid),
    /// Addresses that sandboxes may get: a range of the bridge's network without the network, the
    /// broadcast and the gateway's address. Inclusive.
    pub addresses: (std::net::Ipv4Addr, std::net::Ipv4Addr),
    /// How long an address rests after its sandbox has ended, milliseconds.
    pub address_quarantine_ms: u64,
}

/// The journal. One writer; every method is one transaction.
#[async_trait::async_trait]
pub trait Journal: Send + Sync + std::fmt::Debug {
    /// Random per journal file: another id means another history.
    fn id(&self) -> &str;

    /// The vmids that are leased out, inclusive.
    fn vmids(&self) -> (Vmid, Vmid);

    /// Leases a vmid (the ring's next that is neither taken nor leased) and an address, and writes
    /// the record, in one transaction. Returns the record as written. A record of this id that is
    /// there already is a conflict, unless it is the tombstone of an earlier attempt. Full when the
    /// disk is: ends are written then, and no beginnings.
    async fn begin(&self, intent: Intent, now_ms: u64) -> Result<Record, Error>;

    /// Writes a record with the vmid and the address that it has, for a container that was there
    /// before it. A conflict when a record of this id, or a living one of this vmid, address or
    /// request, is there.
    async fn adopt(&self, record: &Record) -> Result<Record, Error>;

    /// Writes a record that the journal of another node had, for a container that is here now. Where
    /// its address is leased, it gets one of this node's pool. Also over the tombstone of one that
    /// was let go or of an earlier attempt; else as `adopt`.
    async fn take_over(
        &self,
        record: &Record,
        taken_ips: std::collections::BTreeSet<std::net::Ipv4Addr>,
        now_ms: u64,
    ) -> Result<Record, Error>;

    /// Gives a creation another vmid, because PVE said that the first is taken. The old one is not
    /// leased again before the ring comes round.
    async fn next_vmid(
        &self,
        record: &Record,
        taken: std::collections::BTreeSet<Vmid>,
    ) -> Result<Record, Error>;

    /// Writes a record if it is still at `record.revision`; returns it at its new revision. A record
    /// whose phase has ended gives its vmid and its address back. `AddressTaken` when its lease is new
    /// and another living record has it.
    async fn update(&self, record: &Record) -> Result<Record, Error>;

    /// Removes tombstones that ended before `before_ms`. Returns how many.
    async fn forget(&self, before_ms: u64) -> Result<usize, Error>;

    /// One record, tombstones included.
    async fn get(&self, id: &SandboxId) -> Result<Option<Record>, Error>;

    /// All records, tombstones included, ordered by id.
    async fn all(&self) -> Result<Vec<Record>, Error>;

    /// Records changed after `revision`, in the order of their revision, at most `limit`.
    async fn changed_since(&self, revision: u64, limit: usize) -> Result<Vec<Record>, Error>;

    /// The last revision that was written.
    async fn revision(&self) -> Result<u64, Error>;

    /// Highest revision of a tombstone that was forgotten: `changed_since` an older one would miss
    /// an end, so whoever has an older one must read all anew.
    async fn horizon(&self) -> Result<u64, Error>;

    /// Raises the highest epoch seen to `epoch` if it is higher; returns the highest.
    async fn epoch(&self, epoch: u64) -> Result<u64, Error>;

    /// What an operator wants of the node.
    async fn intake(&self) -> Result<intake::Order, Error>;

    /// Remembers what an operator wants of the node.
    async fn set_intake(&self, order: &intake::Order) -> Result<(), Error>;

    /// Which node this journal belongs to; `None` before that was known.
    async fn node(&self) -> Result<Option<Node>, Error>;

    /// Remembers which node this journal belongs to.
    async fn set_node(&self, node: &Node) -> Result<(), Error>;

    /// Remembers that attempts of `id` up to `attempt` are off, although no record may exist.
    async fn cancel(&self, id: &SandboxId, attempt: u32, now_ms: u64) -> Result<(), Error>;

    /// Highest attempt of `id` that was called off; 0 when none was.
    async fn cancelled(&self, id: &SandboxId) -> Result<u32, Error>;

    /// Vmids and addresses that could still be leased.
    async fn room(&self, now_ms: u64) -> Result<(u32, u32), Error>;

    /// Counts up at every write; wakes watchers. Starts at the current revision.
    fn watch(&self) -> tokio::sync::watch::Receiver<u64>;
}
