//! Excludes nodes that cannot take a creation, each with its reason.

use daemon::shares::may_take;
use proto::{
    sandbox::v1 as wire,
    spec::{Network, Size},
};
use serde::{Deserialize, Serialize};

use super::{Ask, Holder, Limits, NodeView, Now, Obstacle, PriorOutcome, STALE_MS, view::as_f64};

/// Largest share of the time in which all work waits for memory, or for a disk. Above it more work
/// makes everything slower.
const MEMORY_STALL_MAX: f64 = 0.1;
const IO_STALL_MAX: f64 = 0.4;
/// Share of a thin pool that may be in use: a full pool stops everything on it.
const THIN_USED_MAX: f64 = 0.95;

/// Reason for the exclusion of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Filtered {
    /// The caller requested another node.
    #[serde(alias = "NOT_WISHED")]
    NotRequested,
    /// Its agent cannot be reached.
    NotReady,
    /// Its agent has not reported since the controller started.
    NeverReported,
    /// Its agent let a call time out a short time ago.
    BreakerOpen,
    /// Its last report is too old for new work.
    ReportStale,
    /// Its last report is old, and others are current.
    ReportOld,
    /// The node refused a reservation, and other nodes gave one.
    #[serde(alias = "NO_BID")]
    NoReservation,
    /// The node does not hold the snapshot.
    SnapshotMissing,
    /// Its cluster has no quorum.
    NoQuorum,
    /// Cordoned: the node gets no new work.
    Cordoned,
    /// The node is being drained.
    Draining,
    /// PVE has it in maintenance.
    Maintenance,
    /// Its number in the cluster has changed, and nobody has confirmed it.
    Renumbered,
    /// Its vmids are those of another node, too.
    VmidsOverlap,
    /// A label that is required is missing, or one that is forbidden is there.
    Labels,
    /// The node refused this creation a short time ago.
    Refused,
    /// This creation failed on it.
    FailedBefore,
    /// The request is larger than the whole node.
    TooLarge,
    /// The cores handed out have reached their limit.
    CpuSum,
    /// The memory handed out has reached its limit.
    MemorySum,
    /// Too much of the memory is in use.
    MemoryUsed,
    /// All work on it waits for memory or a disk for much of the time.
    Stalled,
    /// Too many creations wait for the snapshot, or too many of the team.
    QueueFull,
    /// Too little of the storage is free.
    StorageFull,
    /// No vmid is left.
    VmidsExhausted,
    /// No address is left.
    AddressesExhausted,
}

impl Filtered {
    /// Returns the reason as callers see it.
    pub const fn wire(self) -> wire::Filtered {
        match self {
            Self::NotRequested => wire::Filtered::NotRequested,
            Self::NotReady => wire::Filtered::NotReady,
            Self::NeverReported => wire::Filtered::NeverReported,
            Self::BreakerOpen => wire::Filtered::BreakerOpen,
            Self::ReportStale => wire::Filtered::ReportStale,
            Self::ReportOld => wire::Filtered::ReportOld,
            Self::NoReservation => wire::Filtered::NoReservation,
            Self::SnapshotMissing => wire::Filtered::SnapshotMissing,
            Self::NoQuorum => wire::Filtered::NoQuorum,
            Self::Cordoned => wire::Filtered::Cordoned,
            Self::Draining => wire::Filtered::Draining,
            Self::Maintenance => wire::Filtered::Maintenance,
            Self::Renumbered => wire::Filtered::Renumbered,
            Self::VmidsOverlap => wire::Filtered::VmidsOverlap,
            Self::Labels => wire::Filtered::Labels,
            Self::Refused => wire::Filtered::Refused,
            Self::FailedBefore => wire::Filtered::FailedBefore,
            Self::TooLarge => wire::Filtered::TooLarge,
            Self::CpuSum => wire::Filtered::CpuSum,
            Self::MemorySum => wire::Filtered::MemorySum,
            Self::MemoryUsed => wire::Filtered::MemoryUsed,
            Self::Stalled => wire::Filtered::Stalled,
            Self::QueueFull => wire::Filtered::QueueFull,
            Self::StorageFull => wire::Filtered::StorageFull,
            Self::VmidsExhausted => wire::Filtered::VmidsExhausted,
            Self::AddressesExhausted => wire::Filtered::AddressesExhausted,
        }
    }

    pub(super) const fn obstacle(self) -> Obstacle {
        match self {
            Self::NotReady | Self::NeverReported | Self::BreakerOpen | Self::ReportStale => {
                Obstacle::Unreachable
            }
            Self::NoQuorum => Obstacle::NoQuorum,
            Self::FailedBefore => Obstacle::Failed,
            Self::TooLarge | Self::Labels => Obstacle::Unfit,
            Self::Cordoned
            | Self::Draining
            | Self::Maintenance
            | Self::Renumbered
            | Self::VmidsOverlap => Obstacle::Withdrawn,
            Self::Refused
            | Self::CpuSum
            | Self::MemorySum
            | Self::MemoryUsed
            | Self::Stalled
            | Self::QueueFull
            | Self::StorageFull
            | Self::VmidsExhausted
            | Self::AddressesExhausted
            // Only ever beside a node that fits.
            | Self::ReportOld
            | Self::NoReservation => Obstacle::Full,
            // Not decisive alone: with only these, no node holds the snapshot.
            Self::NotRequested | Self::SnapshotMissing => Obstacle::UnknownSnapshot,
        }
    }
}

/// Accepts a node that holds the snapshot, or returns why not. Permanent reasons are checked first,
/// so that the caller gets the one that it can act on.
pub(super) fn check(
    node: &NodeView,
    holder: &Holder,
    ask: &Ask<'_>,
    limits: &Limits,
    now: &Now,
) -> Result<(), Filtered> {
    let load = &node.load;
    let out_if = |out, why| if out { Err(why) } else { Ok(()) };
    out_if(ask.required.is_some_and(|required| required != holder.node), Filtered::NotRequested)?;
    let before = ask.before(holder.node);
    out_if(before == Some(PriorOutcome::Failed), Filtered::FailedBefore)?;
    out_if(node.down, Filtered::NotReady)?;
    let age_ms = node.age_ms(now.ms).ok_or(Filtered::NeverReported)?;
    out_if(age_ms > STALE_MS, Filtered::ReportStale)?;
    out_if(node.breaker_open(now.ms), Filtered::BreakerOpen)?;
    out_if(!load.quorate, Filtered::NoQuorum)?;
    out_if(load.draining, Filtered::Draining)?;
    out_if(load.cordoned, Filtered::Cordoned)?;
    out_if(load.maintenance, Filtered::Maintenance)?;
    out_if(load.renumbered, Filtered::Renumbered)?;
    out_if(node.vmids_overlap, Filtered::VmidsOverlap)?;
    let affinity = &ask.affinity;
    let fits = load.labels & affinity.required == affinity.required
        && load.labels & affinity.forbidden == 0;
    out_if(!fits, Filtered::Labels)?;
    room(node, holder, ask, limits)?;
    out_if(before == Some(PriorOutcome::Refused), Filtered::Refused)?;
    let stalled = load.psi_memory_full > MEMORY_STALL_MAX || load.psi_io_full > IO_STALL_MAX;
    out_if(stalled, Filtered::Stalled)?;
    out_if(is_queue_full(node, holder, ask), Filtered::QueueFull)?;
    out_if(is_storage_full(node, limits), Filtered::StorageFull)?;
    out_if(load.vmids_free <= node.reserved.sandboxes, Filtered::VmidsExhausted)?;
    let leases = ask.network == Network::Static;
    out_if(leases && load.ips_free <= node.reserved.sandboxes, Filtered::AddressesExhausted)
}

/// Returns true when no more creations of this team may wait for the snapshot. The node shares the places of its queue
/// among the teams, and would refuse.
fn is_queue_full(node: &NodeView, holder: &Holder, ask: &Ask<'_>) -> bool {
    if holder.queue_max == 0 {
        return false;
    }
    let waiting = holder.queued.saturating_add(node.reserved.sandboxes);
    let free = holder.queue_max.saturating_sub(waiting);
    // The team has at most all that wait. Its count is looked up only where that does not decide.
    if free == 0 || may_take(waiting as usize, free as usize) {
        return free == 0;
    }
    // Some may wait for other snapshots.
    let of_team = (ask.queued)(holder.node).min(waiting);
    !may_take(of_team as usize, free as usize)
}

/// Capacity that can be handed out, and that is handed out.
pub(super) struct Room {
    pub(super) memory_asked: f64,
    pub(super) memory_given: f64,
    pub(super) memory: f64,
    pub(super) cores_asked: f64,
    pub(super) cores_given: f64,
    pub(super) cores: f64,
}

impl Room {
    pub(super) fn of(node: &NodeView, holder: &Holder, ask: &Ask<'_>, limits: &Limits) -> Self {
        Self::with(node, ask.size.or(holder.size), limits)
    }

    /// Room of a node for what needs this size.
    pub(super) fn with(node: &NodeView, size: Size, limits: &Limits) -> Self {
        let (load, reserved) = (&node.load, &node.reserved);
        Self {
            memory_asked: as_f64(u64::from(size.memory_mib) << 20),
            memory_given: load.memory_allocated + as_f64(reserved.memory_bytes),
            memory: load.memory_total * limits.memory_overcommit,
            cores_asked: f64::from(size.cpu_cores.max(1)),
            cores_given: load.cores_allocated + f64::from(reserved.cores),
            cores: if limits.cpu_overcommit > 0.0 {
                load.cores * limits.cpu_overcommit
            } else {
                f64::INFINITY
            },
        }
    }
}

fn room(node: &NodeView, holder: &Holder, ask: &Ask<'_>, limits: &Limits) -> Result<(), Filtered> {
    let room = Room::of(node, holder, ask, limits);
    if room.memory_asked > room.memory || room.cores_asked > room.cores {
        return Err(Filtered::TooLarge);
    }
    if room.memory_given + room.memory_asked > room.memory {
        return Err(Filtered::MemorySum);
    }
    if room.cores_given + room.cores_asked > room.cores {
        return Err(Filtered::CpuSum);
    }
    if is_memory_used(node, limits) {
        return Err(Filtered::MemoryUsed);
    }
    Ok(())
}

/// Returns true when too much of the node's memory is in use.
pub(super) fn is_memory_used(node: &NodeView, limits: &Limits) -> bool {
    node.load.memory_used >= limits.memory_used_max * node.load.memory_total
}

/// Returns true when too little of the node's storage is free.
pub(super) fn is_storage_full(node: &NodeView, limits: &Limits) -> bool {
    let load = &node.load;
    load.storage_free.is_some_and(|free| free < limits.storage_free_min)
        || load.thin_used > THIN_USED_MAX
}
