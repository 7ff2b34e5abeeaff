//! What a decision looks at: numbers, one flat record a node, nothing that is allocated. Reports are
//! turned into it when they come, so that a decision has nothing left to read or convert.

use proto::{
    sandbox::v1::NodeLoad,
    spec::{Network, Size},
};

use super::Reserved;

/// Cores that a booting sandbox keeps busy at most.
pub(super) const BOOT_CORES_MAX: u32 = 4;
/// What a booting sandbox is taken to use where its node does not tell.
pub(super) const BOOT_CORES: f64 = 2.0;

/// What is known of one node.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct NodeView {
    /// Place of its name among the names of all nodes: of equal scores the first name wins.
    pub rank: u32,
    /// Its agent cannot be talked to.
    pub down: bool,
    /// After a call that timed out: no new work before this, milliseconds, and then one creation to
    /// try it with; `None` when all is well.
    pub breaker_until_ms: Option<u64>,
    /// When its last report came, milliseconds; `None` before the first.
    pub reported_ms: Option<u64>,
    /// That report.
    pub load: Load,
    /// Decided for it and not in that report yet.
    pub reserved: Reserved,
}

impl NodeView {
    /// Age of its report, milliseconds; `None` before the first.
    pub fn age_ms(&self, now_ms: u64) -> Option<u64> {
        self.reported_ms.map(|at| now_ms.saturating_sub(at))
    }

    /// No new work for now.
    pub fn breaker_open(&self, now_ms: u64) -> bool {
        self.breaker_until_ms.is_some_and(|until| now_ms < until)
    }
}

/// A load report in numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Load {
    /// Cores that it may use.
    pub cores: f64,
    /// Share of them in use, 0 to 1.
    pub cpu_busy: f64,
    /// Share of time that work waited for a core, 0 to 1.
    pub psi_cpu: f64,
    /// Share of time in which all work waited for memory, 0 to 1.
    pub psi_memory_full: f64,
    /// Share of time in which all work waited for a disk, 0 to 1.
    pub psi_io_full: f64,
    /// Cores that others than sandboxes use; `None` when its agent cannot tell.
    pub foreign_cores: Option<f64>,
    /// Memory that others than sandboxes use, bytes; `None` when its agent cannot tell.
    pub foreign_memory: Option<f64>,
    /// Cores that booting sandboxes are about to use, or use and do not show yet.
    pub young_cores: f64,
    /// Cores handed out.
    pub cores_allocated: f64,
    /// Memory in all, bytes.
    pub memory_total: f64,
    /// Memory that new work cannot have, bytes.
    pub memory_used: f64,
    /// Memory handed out, bytes.
    pub memory_allocated: f64,
    /// Creations and starts, under way and waiting.
    pub starting: f64,
    /// Starts that it does at once.
    pub start_slots: f64,
    /// What a start took lately, milliseconds; 0 when unknown.
    pub start_ms: f64,
    /// Share of the storage that is free; `None` when unknown.
    pub storage_free: Option<f64>,
    /// Share of the fuller of the thin pool's data and metadata that is in use; 0 without a pool.
    pub thin_used: f64,
    /// VMIDs left.
    pub vmids_free: u32,
    /// Addresses left.
    pub ips_free: u32,
    /// Its cluster has quorum.
    pub quorate: bool,
    /// It is to get no new work.
    pub cordoned: bool,
    /// It is being emptied.
    pub draining: bool,
    /// PVE has it in maintenance.
    pub maintenance: bool,
    /// Its number in the cluster has changed, and nobody has confirmed it.
    pub renumbered: bool,
    /// Its labels, a bit each.
    pub labels: u64,
}

impl Load {
    /// Share of the memory that new work cannot have.
    pub fn memory_used_share(&self) -> f64 {
        if self.memory_total > 0.0 { self.memory_used / self.memory_total } else { 1.0 }
    }
}

/// The labels are not in it: which bit is which is the fleet's to say.
impl From<&NodeLoad> for Load {
    fn from(report: &NodeLoad) -> Self {
        let share = |percent: f64| (percent / 100.0).clamp(0.0, 1.0);
        let cores = if report.cores > 0.0 { report.cores } else { 0.1 };
        let starting = f64::from(report.starting) + f64::from(report.queued);
        let slots = match report.start_slots {
            0 => (cores / 8.0).max(2.0),
            told => f64::from(told),
        };
        Self {
            cores,
            cpu_busy: report.cpu_busy.clamp(0.0, 1.0),
            psi_cpu: share(report.psi_cpu),
            psi_memory_full: share(report.psi_memory_full),
            psi_io_full: share(report.psi_io_full),
            foreign_cores: report.foreign_cores,
            foreign_memory: report.foreign_memory.map(as_f64),
            young_cores: report.young_cores.unwrap_or(starting * BOOT_CORES),
            cores_allocated: f64::from(report.cores_allocated),
            memory_total: as_f64(report.memory_total),
            memory_used: as_f64(report.memory_total.saturating_sub(report.memory_available)),
            memory_allocated: as_f64(report.memory_allocated),
            starting,
            start_slots: slots,
            start_ms: f64::from(report.start_ms),
            storage_free: (report.storage_total > 0)
                .then(|| as_f64(report.storage_free) / as_f64(report.storage_total)),
            thin_used: report.thin_data_used.max(report.thin_metadata_used),
            vmids_free: report.vmids_free,
            ips_free: report.ips_free,
            quorate: report.quorate,
            cordoned: report.cordoned,
            draining: report.draining,
            maintenance: report.maintenance,
            renumbered: report.renumbered_to > 0,
            labels: 0,
        }
    }
}

/// A node that holds a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holder {
    /// The node.
    pub node: u32,
    /// What the snapshot gives a sandbox there.
    pub size: Size,
    /// Creations that wait for it there.
    pub queued: u32,
    /// How many may.
    pub queue_max: u32,
    /// Its blocks are in the node's memory already.
    pub cached: bool,
}

/// What a creation has met on a node before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Before {
    /// It refused it a moment ago.
    Refused,
    /// It failed it.
    Failed,
}

/// Labels of nodes that a creation cares for, a bit each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Affinity {
    /// A node must have all of them.
    pub required: u64,
    /// A node must have none of them.
    pub forbidden: u64,
    /// Better with each of them.
    pub wished: u64,
    /// Worse with each of them.
    pub shunned: u64,
}

/// What is to be placed.
#[derive(Clone, Copy)]
pub struct Ask<'a> {
    /// What it is given; 0 where the snapshot decides.
    pub size: Size,
    /// How it gets its address.
    pub network: Network,
    /// The only node that will do.
    pub wish: Option<u32>,
    /// Labels that it cares for.
    pub affinity: Affinity,
    /// Nodes that it has met; a few.
    pub met: &'a [(u32, Before)],
    /// Living sandboxes of its team on a node.
    pub team: &'a dyn Fn(u32) -> u32,
}

impl std::fmt::Debug for Ask<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ask")
            .field("size", &self.size)
            .field("network", &self.network)
            .field("wish", &self.wish)
            .field("affinity", &self.affinity)
            .field("met", &self.met)
            .finish_non_exhaustive()
    }
}

impl Ask<'_> {
    /// What it has met there.
    pub(super) fn before(&self, node: u32) -> Option<Before> {
        self.met.iter().find(|(met, _)| *met == node).map(|(_, before)| *before)
    }
}

/// What holds for all nodes at the moment of a decision.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Now {
    /// The time, milliseconds, by the clock that reports are stamped with.
    pub ms: u64,
    /// How often agents report, milliseconds.
    pub period_ms: u64,
    /// What sandboxes use of what they are given.
    pub habits: super::Habits,
}

impl Now {
    /// A report is current below this age, milliseconds: two may get lost.
    pub const fn fresh_ms(&self) -> u64 {
        3 * self.period_ms
    }
}

/// Sizes and counts stay far below 2^52, where this is exact.
#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
pub(super) const fn as_f64(number: u64) -> f64 {
    number as f64
}
