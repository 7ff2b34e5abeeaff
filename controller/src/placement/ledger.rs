//! Reservations: what has been decided for a node and is not in its load report yet. Without them a
//! burst of creations would all go to the node that looked best before the first one.

use std::collections::BTreeMap;

use proto::{id::SandboxId, spec::Size};

use super::view::BOOT_CORES_MAX;

/// Sums of what is reserved on a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reserved {
    /// Number of creations.
    pub sandboxes: u32,
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// Cores handed out.
    pub cores: u32,
    /// Cores used while booting.
    pub boot_cores: u32,
}

impl Reserved {
    fn of(size: Size) -> Self {
        let cores = size.cpu_cores.max(1);
        Self {
            sandboxes: 1,
            memory_bytes: u64::from(size.memory_mib) << 20,
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
    node: u32,
    what: Reserved,
    /// Number of the node's report at the admission: it and later ones count the creation.
    admitted: Option<u64>,
}

/// All reservations, one per creation.
#[derive(Debug, Default)]
pub struct Ledger {
    by_id: BTreeMap<SandboxId, Reservation>,
    by_node: BTreeMap<u32, Account>,
}

/// Reservations on one node.
#[derive(Debug, Default)]
struct Account {
    sum: Reserved,
    ids: Vec<SandboxId>,
}

impl Ledger {
    /// Returns the sum of the reservations on a node.
    pub fn on(&self, node: u32) -> Reserved {
        self.by_node.get(&node).map(|account| account.sum).unwrap_or_default()
    }

    /// Returns the node with the reservation of a creation.
    pub fn node(&self, id: &SandboxId) -> Option<u32> {
        self.by_id.get(id).map(|held| held.node)
    }

    /// Reserves for a creation, and drops its earlier reservation.
    pub fn reserve(&mut self, id: SandboxId, node: u32, size: Size) {
        self.release(&id);
        let what = Reserved::of(size);
        let account = self.by_node.entry(node).or_default();
        account.sum.add(what);
        account.ids.push(id);
        self.by_id.insert(id, Reservation { node, what, admitted: None });
    }

    /// Records that the node took the creation; `seq` is its report number at that moment.
    pub fn admitted(&mut self, id: &SandboxId, seq: u64) {
        if let Some(reservation) = self.by_id.get_mut(id) {
            reservation.admitted = Some(seq);
        }
    }

    /// Drops the reservation of a creation that was refused or ended.
    pub fn release(&mut self, id: &SandboxId) {
        if let Some(old) = self.by_id.remove(id)
            && let Some(account) = self.by_node.get_mut(&old.node)
        {
            account.sum.sub(old.what);
            account.ids.retain(|held| held != id);
            if account.ids.is_empty() {
                self.by_node.remove(&old.node);
            }
        }
    }

    /// Drops reservations that a report includes, those admitted before it. The first report of a
    /// new connection includes all admitted ones, because the agent's numbers may have restarted.
    pub fn reported(&mut self, node: u32, seq: u64, first: bool) {
        let Some(account) = self.by_node.get(&node) else { return };
        let covered = |id: &&SandboxId| {
            let admitted = self.by_id.get(*id).and_then(|held| held.admitted);
            admitted.is_some_and(|admitted| first || seq >= admitted)
        };
        let covered: Vec<SandboxId> = account.ids.iter().filter(covered).copied().collect();
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

    #[test]
    fn reservation_lasts_until_a_report_includes_it() {
        let mut ledger = Ledger::default();
        ledger.reserve(id(1), 1, Size { cpu_cores: 2, memory_mib: 512, disk_gib: 0 });
        ledger.reported(1, 10, false);
        assert_eq!(ledger.on(1).sandboxes, 1, "not admitted yet");
        ledger.admitted(&id(1), 12);
        ledger.reported(1, 11, false);
        assert_eq!(ledger.on(1).sandboxes, 1, "made before the admission");
        ledger.reported(1, 12, false);
        assert_eq!(ledger.on(1), Reserved::default());
    }

    proptest! {
        #[test]
        fn ledger_sums_equal_a_recount(steps in prop::collection::vec((0u8..4, 0u8..6, 0u32..3, 1u32..9), 0..60)) {
            let mut ledger = Ledger::default();
            for (step, sandbox, on, cores) in steps {
                match step {
                    0 => ledger.reserve(id(sandbox), on, Size { cpu_cores: cores, memory_mib: 64, disk_gib: 0 }),
                    1 => ledger.admitted(&id(sandbox), u64::from(cores)),
                    2 => ledger.release(&id(sandbox)),
                    _ => ledger.reported(on, u64::from(cores), false),
                }
                for on in 0..3 {
                    let mut sum = Reserved::default();
                    for held in ledger.by_id.values().filter(|held| held.node == on) {
                        sum.add(held.what);
                    }
                    prop_assert_eq!(ledger.on(on), sum);
                }
            }
        }
    }
}
