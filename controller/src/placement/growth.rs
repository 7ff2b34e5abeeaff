//! Decides whether a node has room for a sandbox of its own that grows or starts: the bounds that a creation
//! has, for what is added. Without this they would hold at the creation alone.

use proto::{Reason, id::SandboxId, spec::Size};

use super::{
    Limits, NodeView,
    filter::{self, Room},
};

/// Growth of a sandbox that a node has already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Growth {
    /// Size before.
    from: Size,
    /// Size after.
    to: Size,
    /// Whether the node's sums have the sandbox: one that is stopped counts once it starts.
    counts: bool,
    /// Sandbox that starts: however often it is asked to, it takes its room once.
    starts: Option<SandboxId>,
}

impl Growth {
    /// New size of a sandbox, which counts in its node's sums unless it is stopped.
    pub const fn resize(from: Size, to: Size, counts: bool) -> Self {
        Self { from, to, counts, starts: None }
    }

    /// Start of a stopped sandbox: all that it has counts from now on. Its disk is there.
    pub const fn start(id: SandboxId, size: Size) -> Self {
        let from = Size { cpu_cores: 0, memory_mib: 0, disk_gib: size.disk_gib };
        Self { from, to: size, counts: true, starts: Some(id) }
    }

    /// Returns the sandbox that starts.
    pub(super) const fn starts(&self) -> Option<SandboxId> {
        self.starts
    }

    /// Returns what is added to the sums of the node.
    pub(super) const fn more(&self) -> Size {
        if self.counts { self.beyond() } else { Size { cpu_cores: 0, memory_mib: 0, disk_gib: 0 } }
    }

    /// Returns by how much each part grows.
    const fn beyond(&self) -> Size {
        Size {
            cpu_cores: self.to.cpu_cores.saturating_sub(self.from.cpu_cores),
            memory_mib: self.to.memory_mib.saturating_sub(self.from.memory_mib),
            disk_gib: self.to.disk_gib.saturating_sub(self.from.disk_gib),
        }
    }
}

/// Refusal of a growth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoRoom {
    /// Machine-readable reason.
    pub reason: Reason,
    /// Explanation for people, which follows the name of the node.
    pub message: String,
}

/// Accepts a growth, or says what the node lacks. What does not grow is not looked at: a node that is over a
/// bound that was lowered may still change other things.
pub(super) fn check(node: &NodeView, growth: &Growth, limits: &Limits) -> Result<(), NoRoom> {
    if node.reported_ms.is_none() {
        // Nothing is known of it. The node itself has the last word.
        return Ok(());
    }
    let refuse = |reason, message| Err(NoRoom { reason, message });
    let gib = |bytes: f64| bytes / (1024.0 * 1024.0 * 1024.0);
    let (beyond, whole) = (growth.beyond(), Room::with(node, growth.to, limits));
    let more = growth.more();
    if beyond.memory_mib > 0 {
        if whole.memory_asked > whole.memory {
            let all = gib(whole.memory);
            let message = format!("gives {all:.1} GiB to all of its sandboxes together");
            return refuse(Reason::NeverFits, message);
        }
        let asked = f64::from(more.memory_mib) * 1024.0 * 1024.0;
        if asked > 0.0 && whole.memory_given + asked > whole.memory {
            let [given, all, asked] = [whole.memory_given, whole.memory, asked].map(gib);
            let message = format!(
                "has given {given:.1} of {all:.1} GiB to sandboxes; {asked:.1} GiB more do not fit"
            );
            return refuse(Reason::MemoryFull, message);
        }
        if asked > 0.0 && filter::is_memory_used(node, limits) {
            let share = 100.0 * node.load.memory_used_share();
            let message = format!("has {share:.0} % of its memory in use");
            return refuse(Reason::MemoryFull, message);
        }
    }
    if beyond.cpu_cores > 0 {
        if whole.cores_asked > whole.cores {
            let message =
                format!("gives {:.0} cores to all of its sandboxes together", whole.cores);
            return refuse(Reason::NeverFits, message);
        }
        let asked = f64::from(more.cpu_cores);
        if asked > 0.0 && whole.cores_given + asked > whole.cores {
            let (given, all) = (whole.cores_given, whole.cores);
            let message = format!(
                "has given {given:.0} of {all:.0} cores to sandboxes; {asked:.0} more do not fit"
            );
            return refuse(Reason::NoCapacity, message);
        }
    }
    if beyond.disk_gib > 0 && filter::is_storage_full(node, limits) {
        return refuse(Reason::StorageFull, "has too little room on its storage".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::{Load, Reserved};

    const GIB: f64 = (1u64 << 30) as f64;

    fn size(cpu_cores: u32, memory_mib: u32, disk_gib: u32) -> Size {
        Size { cpu_cores, memory_mib, disk_gib }
    }

    /// A node of 8 cores and 16 GiB, of which 6 cores and 10 GiB are given.
    fn node() -> NodeView {
        NodeView {
            reported_ms: Some(0),
            load: Load {
                cores: 8.0,
                cores_allocated: 6.0,
                memory_total: 16.0 * GIB,
                memory_used: 8.0 * GIB,
                memory_allocated: 10.0 * GIB,
                storage_free: Some(0.5),
                ..Load::default()
            },
            ..NodeView::default()
        }
    }

    fn limits() -> Limits {
        Limits { memory_overcommit: 1.0, cpu_overcommit: 1.0, ..Limits::default() }
    }

    fn start(size: Size) -> Growth {
        Growth::start(SandboxId::new(1, &[1; 10]), size)
    }

    fn reason(node: &NodeView, growth: Growth) -> Option<Reason> {
        check(node, &growth, &limits()).err().map(|refused| refused.reason)
    }

    #[test]
    fn growth_has_the_bounds_of_a_creation() {
        let (node, has) = (node(), size(2, 2048, 8));
        let to = |size| Growth::resize(has, size, true);
        for (growth, expected) in [
            (to(size(4, 8 * 1024, 9)), None),
            (to(size(5, 2048, 8)), Some(Reason::NoCapacity)),
            (to(size(9, 2048, 8)), Some(Reason::NeverFits)),
            (to(size(2, 8 * 1024 + 1, 8)), Some(Reason::MemoryFull)),
            (to(size(2, 16 * 1024 + 1, 8)), Some(Reason::NeverFits)),
            (start(size(2, 6 * 1024, 8)), None),
            (start(size(3, 1024, 8)), Some(Reason::NoCapacity)),
            (start(size(1, 6 * 1024 + 1, 8)), Some(Reason::MemoryFull)),
            // Of a stopped sandbox, only what could never start.
            (Growth::resize(has, size(8, 16 * 1024, 9), false), None),
            (Growth::resize(has, size(9, 1024, 8), false), Some(Reason::NeverFits)),
        ] {
            assert_eq!(reason(&node, growth), expected, "{growth:?}");
        }
    }

    #[test]
    fn what_shrinks_or_stays_is_admitted_on_a_full_node() {
        let mut full = node();
        full.load.cores_allocated = 20.0;
        full.load.memory_allocated = 40.0 * GIB;
        full.load.memory_used = 16.0 * GIB;
        full.load.storage_free = Some(0.0);
        let has = size(10, 20 * 1024, 8);
        assert_eq!(reason(&full, Growth::resize(has, size(9, 19 * 1024, 8), true)), None);
        assert_eq!(reason(&full, Growth::resize(has, has, true)), None);
        let disk = Growth::resize(has, size(10, 20 * 1024, 9), true);
        assert_eq!(reason(&full, disk), Some(Reason::StorageFull));
    }

    #[test]
    fn used_memory_and_reservations_count() {
        let mut node = node();
        let grows = Growth::resize(size(1, 512, 8), size(2, 1024, 8), true);
        assert_eq!(reason(&node, grows), None);
        node.reserved = Reserved { cores: 2, ..Reserved::default() };
        assert_eq!(reason(&node, grows), Some(Reason::NoCapacity));
        node.reserved = Reserved { memory_bytes: 6 << 30, ..Reserved::default() };
        assert_eq!(reason(&node, grows), Some(Reason::MemoryFull));
        node.reserved = Reserved::default();
        node.load.memory_used = 15.0 * GIB;
        assert_eq!(reason(&node, grows), Some(Reason::MemoryFull));
        let cores = Growth::resize(size(1, 512, 8), size(2, 512, 8), true);
        assert_eq!(reason(&node, cores), None, "it takes no memory");
    }

    #[test]
    fn cores_have_no_bound_unless_one_is_set_and_an_unknown_node_refuses_nothing() {
        let mut node = node();
        let grows = Growth::resize(size(1, 512, 8), size(64, 512, 8), true);
        assert_eq!(check(&node, &grows, &Limits::default()), Ok(()));
        node.reported_ms = None;
        assert_eq!(reason(&node, grows), None);
    }
}
