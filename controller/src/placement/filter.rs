//! Which nodes cannot take a creation, each with its reason.

use std::time::Duration;

use proto::{
    sandbox::v1::NodeLoad,
    spec::{Size, Spec},
};
use serde::{Deserialize, Serialize};

use super::{Limits, NodeView, Obstacle, STALE};

/// Why a node was out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Filtered {
    /// The caller wished another.
    NotWished,
    /// Its agent cannot be talked to.
    NotReady,
    /// Its agent has not reported since the controller started.
    NeverReported,
    /// Its agent let a call time out a moment ago.
    BreakerOpen,
    /// Its last report is too old for new work.
    ReportStale,
    /// Its last report is old, and others are current.
    ReportOld,
    /// It does not hold the snapshot.
    SnapshotMissing,
    /// Its cluster has no quorum.
    NoQuorum,
    /// It refused this creation a moment ago.
    Refused,
    /// This creation failed on it.
    FailedBefore,
    /// The request is larger than the whole node.
    TooLarge,
    /// The memory handed out has reached its sum.
    MemorySum,
    /// Too much of the memory is in use.
    MemoryUsed,
    /// Too little of the storage is free.
    StorageFull,
    /// No vmid is left.
    VmidsExhausted,
    /// No address is left.
    AddressesExhausted,
}

impl Filtered {
    /// UPPER_SNAKE, as it goes to callers and into records.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotWished => "NOT_WISHED",
            Self::NotReady => "NOT_READY",
            Self::NeverReported => "NEVER_REPORTED",
            Self::BreakerOpen => "BREAKER_OPEN",
            Self::ReportStale => "REPORT_STALE",
            Self::ReportOld => "REPORT_OLD",
            Self::SnapshotMissing => "SNAPSHOT_MISSING",
            Self::NoQuorum => "NO_QUORUM",
            Self::Refused => "REFUSED",
            Self::FailedBefore => "FAILED_BEFORE",
            Self::TooLarge => "TOO_LARGE",
            Self::MemorySum => "MEMORY_SUM",
            Self::MemoryUsed => "MEMORY_USED",
            Self::StorageFull => "STORAGE_FULL",
            Self::VmidsExhausted => "VMIDS_EXHAUSTED",
            Self::AddressesExhausted => "ADDRESSES_EXHAUSTED",
        }
    }

    pub(super) const fn obstacle(self) -> Obstacle {
        match self {
            Self::NotReady | Self::NeverReported | Self::BreakerOpen | Self::ReportStale => {
                Obstacle::Unreachable
            }
            Self::NoQuorum => Obstacle::NoQuorum,
            Self::FailedBefore => Obstacle::Failed,
            Self::TooLarge => Obstacle::TooLarge,
            Self::Refused
            | Self::MemorySum
            | Self::MemoryUsed
            | Self::StorageFull
            | Self::VmidsExhausted
            | Self::AddressesExhausted
            // Only ever beside a node that fits.
            | Self::ReportOld => Obstacle::Full,
            // Says nothing of its own: with these alone, nobody holds the snapshot.
            Self::NotWished | Self::SnapshotMissing => Obstacle::UnknownSnapshot,
        }
    }
}

/// A node that can take it.
pub(super) struct Fit<'a> {
    pub(super) node: &'a NodeView,
    pub(super) load: &'a NodeLoad,
    pub(super) age: Duration,
    pub(super) size: Size,
}

const MIB: u64 = 1024 * 1024;

/// Passes a node or says why not. What never changes is asked first, so that the reason is the one
/// that the caller can do something about.
pub(super) fn check<'a>(
    node: &'a NodeView,
    spec: &Spec,
    limits: &Limits,
) -> Result<Fit<'a>, (Filtered, String)> {
    let out = |filtered, detail: String| Err((filtered, detail));
    if let Some(wish) = &spec.node
        && *wish != node.name
    {
        return out(Filtered::NotWished, format!("{wish} was asked for"));
    }
    // An old report still tells which snapshots a node holds.
    if node.report.is_some() && node.need(spec).is_none() {
        return out(Filtered::SnapshotMissing, format!("does not hold {}", spec.snapshot));
    }
    if let Some(failed) = &node.failed {
        return out(Filtered::FailedBefore, format!("this creation failed here: {failed}"));
    }
    if let Some(why) = &node.down {
        return out(Filtered::NotReady, format!("its agent does not answer: {why}"));
    }
    let Some((load, age)) = &node.report else {
        return out(Filtered::NeverReported, "its agent has not reported yet".into());
    };
    if *age > STALE {
        return out(Filtered::ReportStale, format!("last reported {} s ago", age.as_secs()));
    }
    if node.breaker_open {
        return out(Filtered::BreakerOpen, "its agent let a call time out a moment ago".into());
    }
    if !load.quorate {
        return out(Filtered::NoQuorum, "its cluster has no quorum".into());
    }
    let size = node.need(spec).unwrap_or_default();
    memory(node, load, size, limits)?;
    if let Some(refused) = &node.refused {
        return out(Filtered::Refused, format!("refused it a moment ago: {refused}"));
    }
    let free = ratio(load.storage_free, load.storage_total);
    if load.storage_total > 0 && free < limits.storage_free_min {
        return out(Filtered::StorageFull, format!("{:.0} % of its storage is free", free * 100.0));
    }
    if load.vmids_free <= node.reserved.sandboxes {
        return out(Filtered::VmidsExhausted, "no vmid is left in its range".into());
    }
    let leases = spec.network == proto::spec::Network::Static;
    if leases && load.ips_free <= node.reserved.sandboxes {
        return out(Filtered::AddressesExhausted, "no address is left in its pool".into());
    }
    Ok(Fit { node, load, age: *age, size })
}

fn memory(
    node: &NodeView,
    load: &NodeLoad,
    size: Size,
    limits: &Limits,
) -> Result<(), (Filtered, String)> {
    let gib = |bytes: f64| bytes / (1024.0 * 1024.0 * 1024.0);
    let ask = as_f64(u64::from(size.memory_mib) * MIB);
    let room = as_f64(load.memory_total) * limits.memory_overcommit;
    if ask > room {
        let detail = format!("asks {:.1} GiB of {:.1} GiB in all", gib(ask), gib(room));
        return Err((Filtered::TooLarge, detail));
    }
    let given = as_f64(load.memory_allocated) + as_f64(node.reserved.memory_bytes);
    if given + ask > room {
        let detail = format!(
            "{:.1} of {:.1} GiB are handed out, {:.1} more do not fit",
            gib(given),
            gib(room),
            gib(ask)
        );
        return Err((Filtered::MemorySum, detail));
    }
    let used = 1.0 - ratio(load.memory_available, load.memory_total);
    if used >= limits.memory_used_max {
        return Err((
            Filtered::MemoryUsed,
            format!("{:.0} % of its memory is in use", used * 100.0),
        ));
    }
    Ok(())
}

/// Sizes and counts stay far below 2^52, where this is exact.
#[expect(clippy::cast_precision_loss, reason = "exact below 2^52; a score needs no more")]
pub(super) fn as_f64(number: u64) -> f64 {
    number as f64
}

pub(super) fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { as_f64(part) / as_f64(whole) }
}
