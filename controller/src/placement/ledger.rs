//! What has been decided for a node and is not in its load report yet. Without it, all creations of
//! a burst would go to the node that looked best before the first of them.

use std::collections::BTreeMap;

use proto::{id::SandboxId, name::NodeName, spec::Size};

use super::score::BOOT_CORES_MAX;

/// Sums of what is reserved on a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reserved {
    /// Creations.
    pub sandboxes: u32,
    /// Memory.
    pub memory_bytes: u64,
    /// Cores given.
    pub cores: u32,
    /// Cores that booting takes.
    pub boot_cores: u32,
}

impl Reserved {
    fn of(size: Size) -> Self {
        let cores = size.cpu_cores.max(1);
        Self {
            sandboxes: 1,
            memory_bytes: u64::from(size.memory_mib) * 1024 * 1024,
            cores,
            boot_cores: cores.min(BOOT_CORES_MAX),
        }
    }

    fn add(&mut self, other: Self) {
        self.sandboxes += other.sandboxes;
        self.memory_bytes += other.memory_bytes;
        self.cores += other.cores;
        self.boot_cores += other.boot_cores;
    }

    fn sub(&mut self, other: Self) {
        self.sandboxes -= other.sandboxes;
        self.memory_bytes -= other.memory_bytes;
        self.cores -= other.cores;
        self.boot_cores -= other.boot_cores;
    }
}

#[derive(Debug)]
struct Reservation {
    node: NodeName,
    what: Reserved,
    /// Number of the node's report after the admission; a later one counts it.
    admitted: Option<u64>,
}

/// All reservations, one a creation.
#[derive(Debug, Default)]
pub struct Ledger {
    by_id: BTreeMap<SandboxId, Reservation>,
    by_node: BTreeMap<NodeName, Reserved>,
}

impl Ledger {
    /// What is reserved on a node.
    pub fn on(&self, node: &NodeName) -> Reserved {
        self.by_node.get(node).copied().unwrap_or_default()
    }

    /// Reserves for a creation, in place of what was reserved for it before.
    pub fn reserve(&mut self, id: SandboxId, node: NodeName, size: Size) {
        self.release(&id);
        let what = Reserved::of(size);
        self.by_node.entry(node.clone()).or_default().add(what);
        self.by_id.insert(id, Reservation { node, what, admitted: None });
    }

    /// The node took it; its report number at that moment was `seq`.
    pub fn admitted(&mut self, id: &SandboxId, seq: u64) {
        if let Some(reservation) = self.by_id.get_mut(id) {
            reservation.admitted = Some(seq);
        }
    }

    /// The node refused it, or it ended.
    pub fn release(&mut self, id: &SandboxId) {
        if let Some(old) = self.by_id.remove(id)
            && let Some(sum) = self.by_node.get_mut(&old.node)
        {
            sum.sub(old.what);
        }
    }

    /// A report came: what was admitted before it is in it. The first report of a new connection
    /// counts everything that was admitted, because the agent's numbers may have started anew.
    pub fn reported(&mut self, node: &NodeName, seq: u64, first: bool) {
        if self.on(node).sandboxes == 0 {
            return;
        }
        let covered: Vec<SandboxId> = self
            .by_id
            .iter()
            .filter(|(_, held)| held.node == *node)
            .filter(|(_, held)| held.admitted.is_some_and(|admitted| first || seq > admitted))
            .map(|(id, _)| *id)
            .collect();
        for id in covered {
            self.release(&id);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(n: u8) -> SandboxId {
        SandboxId::new(u64::from(n), &[n; 10])
    }

    fn node(n: u8) -> NodeName {
        format!("n{n}").parse().expect("name")
    }

    #[test]
    fn a_reservation_stands_until_a_later_report_has_seen_it() {
        let mut ledger = Ledger::default();
        ledger.reserve(id(1), node(1), Size { cpu_cores: 2, memory_mib: 512 });
        ledger.reported(&node(1), 10, false);
        assert_eq!(ledger.on(&node(1)).sandboxes, 1, "not admitted yet");
        ledger.admitted(&id(1), 10);
        ledger.reported(&node(1), 10, false);
        assert_eq!(ledger.on(&node(1)).sandboxes, 1, "the same report");
        ledger.reported(&node(1), 11, false);
        assert_eq!(ledger.on(&node(1)), Reserved::default());
    }

    proptest! {
        #[test]
        fn the_sums_equal_a_recount(steps in prop::collection::vec((0u8..4, 0u8..6, 0u8..3, 1u32..9), 0..60)) {
            let mut ledger = Ledger::default();
            for (step, sandbox, on, cores) in steps {
                match step {
                    0 => ledger.reserve(id(sandbox), node(on), Size { cpu_cores: cores, memory_mib: 64 }),
                    1 => ledger.admitted(&id(sandbox), u64::from(cores)),
                    2 => ledger.release(&id(sandbox)),
                    _ => ledger.reported(&node(on), u64::from(cores), false),
                }
                for on in 0..3 {
                    let mut sum = Reserved::default();
                    for held in ledger.by_id.values().filter(|held| held.node == node(on)) {
                        sum.add(held.what);
                    }
                    prop_assert_eq!(ledger.on(&node(on)), sum);
                }
            }
        }
    }
}
