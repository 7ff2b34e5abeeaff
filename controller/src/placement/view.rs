//! Inputs of a decision: numbers, one flat record per node, no allocations. Reports are converted
//! on arrival, so that a decision has nothing left to parse.

use proto::{
    sandbox::v1::NodeLoad,
    spec::{Network, Size},
};

use super::Reserved;

/// Most cores that a booting sandbox keeps busy.
pub(super) const BOOT_CORES_MAX: u32 = 4;
/// Cores assumed for a booting sandbox where its node does not report them.
pub(super) const BOOT_CORES: f64 = 2.0;

/// State of one node.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct NodeView {
    /// Position of its name among all names: with equal scores the first name wins.
    pub rank: u32,
    /// Whether its agent cannot be reached.
    pub down: bool,
    /// Time before which it gets no new work after a call that timed out, milliseconds; after it,
    /// one creation tries the node. `None` while closed.
    pub breaker_until_ms: Option<u64>,
    /// Whether its vmids are those of another node, too, which comes first.
    pub vmids_overlap: bool,
    /// Time of its last report, milliseconds; `None` before the first.
    pub reported_ms: Option<u64>,
    /// Last report.
    pub load: Load,
    /// Reservations that the report does not include yet.
    pub reserved: Reserved,
}

impl NodeView {
    /// Returns the age of its report, milliseconds; `None` before the first.
    pub fn age_ms(&self, now_ms: u64) -> Option<u64> {
        self.reported_ms.map(|at| now_ms.saturating_sub(at))
    }

    /// Returns true while a timed-out call keeps new work away.
    pub fn breaker_open(&self, now_ms: u64) -> bool {
        self.breaker_until_ms.is_some_and(|until| now_ms < until)
    }
}

/// A load report in numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Load {
    /// Usable cores.
    pub cores: f64,
    /// Share of them in use, 0 to 1.
    pub cpu_busy: f64,
    /// Share of time that work waited for a core, 0 to 1.
    pub psi_cpu: f64,
    /// Share of time in which all work waited for memory, 0 to 1.
    pub psi_memory_full: f64,
    /// Share of time in which all work waited for a disk, 0 to 1.
    pub psi_io_full: f64,
    /// Cores that other processes than sandboxes use; `None` when its agent cannot tell.
    pub foreign_cores: Option<f64>,
    /// Memory that other processes than sandboxes use, bytes; `None` when its agent cannot tell.
    pub foreign_memory: Option<f64>,
    /// Cores that booting sandboxes use or will use and that the measured load does not show yet.
    pub booting_cores: f64,
    /// Cores handed out.
    pub cores_allocated: f64,
    /// Total memory, bytes.
    pub memory_total: f64,
    /// Memory that is not available to new work, bytes.
    pub memory_used: f64,
    /// Memory handed out, bytes.
    pub memory_allocated: f64,
    /// Creations and starts, running and waiting.
    pub starting: f64,
    /// Starts that it carries out at once.
    pub start_slots: f64,
    /// Recent duration of a start, milliseconds; 0 when unknown.
    pub start_ms: f64,
    /// Share of the storage that is free; `None` when unknown.
    pub storage_free: Option<f64>,
    /// Share of the fuller of the thin pool's data and metadata that is in use; 0 without a pool.
    pub thin_used: f64,
    /// Number of free vmids.
    pub vmids_free: u32,
    /// Number of free addresses.
    pub ips_free: u32,
    /// Its cluster has quorum.
    pub quorate: bool,
    /// Whether it is cordoned.
    pub cordoned: bool,
    /// Whether it is being drained.
    pub draining: bool,
    /// PVE has it in maintenance.
    pub maintenance: bool,
    /// Its number in the cluster has changed, and nobody has confirmed it.
    pub renumbered: bool,
    /// Labels, one bit each.
    pub labels: u64,
}

impl Load {
    /// Returns the share of the memory that is not available to new work.
    pub fn memory_used_share(&self) -> f64 {
        if self.memory_total > 0.0 { self.memory_used / self.memory_total } else { 1.0 }
    }
}

/// Converts a report, without its labels: only the fleet knows their bits.
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
            booting_cores: report.booting_cores.unwrap_or(starting * BOOT_CORES),
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
    /// Index of the node.
    pub node: u32,
    /// Default size of a sandbox of the snapshot there.
    pub size: Size,
    /// Creations that wait for the snapshot there.
    pub queued: u32,
    /// Limit of `queued`.
    pub queue_max: u32,
    /// Whether its blocks are in the node's memory already.
    pub cached: bool,
}

/// Earlier outcome of a creation on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PriorOutcome {
    /// The node refused it a short time ago.
    Refused,
    /// The node failed it.
    Failed,
}

/// Labels of nodes that a creation refers to, one bit each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Affinity {
    /// Labels that a node must have.
    pub required: u64,
    /// Labels that a node must not have.
    pub forbidden: u64,
    /// Preferred labels.
    pub preferred: u64,
    /// Labels to avoid.
    pub avoided: u64,
}

/// Placement request.
#[derive(Clone, Copy)]
pub struct Ask<'a> {
    /// Size; 0 where the snapshot decides.
    pub size: Size,
    /// Kind of address assignment.
    pub network: Network,
    /// Required node.
    pub required: Option<u32>,
    /// Labels that it refers to.
    pub affinity: Affinity,
    /// Earlier outcomes on nodes; a few.
    pub prior: &'a [(u32, PriorOutcome)],
    /// Returns the number of living sandboxes of its team on a node.
    pub team: &'a dyn Fn(u32) -> u32,
    /// Returns the number of creations of its team that wait for a clone on a node, as far as the controller knows.
    pub queued: &'a dyn Fn(u32) -> u32,
}

impl std::fmt::Debug for Ask<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ask")
            .field("size", &self.size)
            .field("network", &self.network)
            .field("required", &self.required)
            .field("affinity", &self.affinity)
            .field("prior", &self.prior)
            .finish_non_exhaustive()
    }
}

impl Ask<'_> {
    /// Returns the earlier outcome on a node.
    pub(super) fn before(&self, node: u32) -> Option<PriorOutcome> {
        self.prior.iter().find(|(prior, _)| *prior == node).map(|(_, before)| *before)
    }
}

/// Values that are the same for all nodes in one decision.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Now {
    /// Time, milliseconds, by the clock that stamps reports.
    pub ms: u64,
    /// Period of the agents' reports, milliseconds.
    pub period_ms: u64,
    /// Learnt usage of sandboxes.
    pub usage_model: super::UsageModel,
}

impl Now {
    /// Returns the age below which a report is current, milliseconds: two may get lost.
    pub const fn fresh_ms(&self) -> u64 {
        3 * self.period_ms
    }
}

/// Converts exactly: sizes and counts stay far below 2^52.
#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
pub(super) const fn as_f64(number: u64) -> f64 {
    number as f64
}
