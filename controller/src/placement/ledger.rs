//! Reservations: what has been decided for a node and is not in its load report yet. Without them a
//! burst of creations would all go to the node that looked best before the first one, and many sandboxes
//! that grow at once would all get the same room.

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

    /// Growth of a sandbox that the node has already.
    fn of_growth(more: Size) -> Self {
        Self {
            memory_bytes: u64::from(more.memory_mib) << 20,
            cores: more.cpu_cores,
            ..Self::default()
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

/// Subject of a reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Creation(SandboxId),
    /// Growth of a sandbox, by the number of its admission.
    Growth(u64),
}

#[derive(Debug)]
struct Reservation {
    node: u32,
    what: Reserved,
    /// Number of the node's report at the admission: it and later ones count the creation.
    admitted: Option<u64>,
    /// Sandbox that starts, if it is the growth of one.
    starts: Option<SandboxId>,
    /// Calls whose end the reservation waits for: a start that is asked for again has several.
    holders: u32,
}

/// All reservations, one per creation and one per growth.
#[derive(Debug, Default)]
pub struct Ledger {
    by_subject: BTreeMap<Subject, Reservation>,
    by_node: BTreeMap<u32, Account>,
    /// Number of the last growth.
    last_growth: u64,
}

/// Reservations on one node.
#[derive(Debug, Default)]
struct Account {
    sum: Reserved,
    subjects: Vec<Subject>,
}

impl Ledger {
    /// Returns the sum of the reservations on a node.
    pub fn on(&self, node: u32) -> Reserved {
        self.by_node.get(&node).map(|account| account.sum).unwrap_or_default()
    }

    /// Returns the node with the reservation of a creation.
    pub fn node(&self, id: &SandboxId) -> Option<u32> {
        self.by_subject.get(&Subject::Creation(*id)).map(|held| held.node)
    }

    /// Reserves for a creation, and drops its earlier reservation.
    pub fn reserve(&mut self, id: SandboxId, node: u32, size: Size) {
        self.insert(Subject::Creation(id), node, (Reserved::of(size), None));
    }

    /// Reserves what a sandbox of a node takes more, the one that `starts` if it does; returns the number of that
    /// growth.
    pub fn grow(&mut self, node: u32, more: Size, starts: Option<SandboxId>) -> u64 {
        self.last_growth += 1;
        let what = Reserved::of_growth(more);
        self.insert(Subject::Growth(self.last_growth), node, (what, starts));
        self.last_growth
    }

    /// Shares the reservation of a start that the node has not begun; returns its number. `None`: there is none of
    /// that size.
    pub fn share_start(&mut self, node: u32, id: &SandboxId, more: Size) -> Option<u64> {
        let what = Reserved::of_growth(more);
        for subject in &self.by_node.get(&node)?.subjects {
            if let Subject::Growth(number) = subject
                && let Some(held) = self.by_subject.get_mut(subject)
                && (held.starts, held.what, held.admitted) == (Some(*id), what, None)
            {
                held.holders += 1;
                return Some(*number);
            }
        }
        None
    }

    fn insert(
        &mut self,
        subject: Subject,
        node: u32,
        (what, starts): (Reserved, Option<SandboxId>),
    ) {
        self.remove(&subject);
        let account = self.by_node.entry(node).or_default();
        account.sum.add(what);
        account.subjects.push(subject);
        let held = Reservation { node, what, admitted: None, starts, holders: 1 };
        self.by_subject.insert(subject, held);
    }

    /// Records that the node took the creation; `seq` is its report number at that moment.
    pub fn admitted(&mut self, id: &SandboxId, seq: u64) {
        self.include(&Subject::Creation(*id), seq);
    }

    /// Records that a call of a growth has ended. After the last one the node's report with this number, and each
    /// later one, includes the growth.
    pub fn grown(&mut self, number: u64, seq: u64) {
        let subject = Subject::Growth(number);
        let Some(held) = self.by_subject.get_mut(&subject) else { return };
        held.holders = held.holders.saturating_sub(1);
        if held.holders == 0 {
            self.include(&subject, seq);
        }
    }

    fn include(&mut self, subject: &Subject, seq: u64) {
        if let Some(reservation) = self.by_subject.get_mut(subject) {
            reservation.admitted = Some(seq);
        }
    }

    /// Drops the reservation of a creation that was refused or ended.
    pub fn release(&mut self, id: &SandboxId) {
        self.remove(&Subject::Creation(*id));
    }

    fn remove(&mut self, subject: &Subject) {
        if let Some(old) = self.by_subject.remove(subject)
            && let Some(account) = self.by_node.get_mut(&old.node)
        {
            account.sum.sub(old.what);
            account.subjects.retain(|held| held != subject);
            if account.subjects.is_empty() {
                self.by_node.remove(&old.node);
            }
        }
    }

    /// Drops reservations that a report includes, those admitted before it. The first report of a
    /// new connection includes all admitted ones, because the agent's numbers may have restarted.
    pub fn reported(&mut self, node: u32, seq: u64, first: bool) {
        let Some(account) = self.by_node.get(&node) else { return };
        let covered = |subject: &&Subject| {
            let admitted = self.by_subject.get(*subject).and_then(|held| held.admitted);
            admitted.is_some_and(|admitted| first || seq >= admitted)
        };
        let covered: Vec<Subject> = account.subjects.iter().filter(covered).copied().collect();
        for subject in covered {
            self.remove(&subject);
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

    #[test]
    fn growth_adds_to_the_creation_of_its_sandbox_and_ends_by_itself() {
        let mut ledger = Ledger::default();
        let size = Size { cpu_cores: 2, memory_mib: 512, disk_gib: 0 };
        ledger.reserve(id(1), 1, size);
        let number = ledger.grow(1, size, None);
        let both = Reserved { sandboxes: 1, memory_bytes: 1 << 30, cores: 4, boot_cores: 2 };
        assert_eq!(ledger.on(1), both);
        ledger.release(&id(1));
        ledger.grown(number, 7);
        ledger.reported(1, 6, false);
        assert_eq!(ledger.on(1).cores, 2, "the report was made before");
        ledger.reported(1, 7, false);
        assert_eq!(ledger.on(1), Reserved::default());
    }

    #[test]
    fn start_that_is_asked_for_again_is_reserved_once_until_its_last_call_ends() {
        let mut ledger = Ledger::default();
        let size = Size { cpu_cores: 2, memory_mib: 512, disk_gib: 0 };
        assert_eq!(ledger.share_start(1, &id(1), size), None);
        let number = ledger.grow(1, size, Some(id(1)));
        assert_eq!(ledger.share_start(1, &id(1), size), Some(number));
        assert_eq!(ledger.share_start(1, &id(2), size), None, "another sandbox");
        assert_eq!(ledger.share_start(2, &id(1), size), None, "another node");
        assert_eq!(ledger.on(1).cores, 2);
        ledger.grown(number, 5);
        ledger.reported(1, 9, false);
        assert_eq!(ledger.on(1).cores, 2, "a call is under way");
        ledger.grown(number, 11);
        assert_eq!(ledger.share_start(1, &id(1), size), None, "it has ended");
        ledger.reported(1, 11, false);
        assert_eq!(ledger.on(1), Reserved::default());
    }

    proptest! {
        #[test]
        fn ledger_sums_equal_a_recount(steps in prop::collection::vec((0u8..6, 0u8..6, 0u32..3, 1u32..9), 0..60)) {
            let mut ledger = Ledger::default();
            let mut growths = Vec::new();
            for (step, sandbox, on, cores) in steps {
                match step {
                    0 => ledger.reserve(id(sandbox), on, Size { cpu_cores: cores, memory_mib: 64, disk_gib: 0 }),
                    1 => ledger.admitted(&id(sandbox), u64::from(cores)),
                    2 => ledger.release(&id(sandbox)),
                    3 => growths.push(ledger.grow(on, Size { cpu_cores: cores, memory_mib: 64, disk_gib: 0 }, None)),
                    4 => growths.pop().into_iter().for_each(|number| ledger.grown(number, u64::from(cores))),
                    _ => ledger.reported(on, u64::from(cores), false),
                }
                for on in 0..3 {
                    let mut sum = Reserved::default();
                    for held in ledger.by_subject.values().filter(|held| held.node == on) {
                        sum.add(held.what);
                    }
                    prop_assert_eq!(ledger.on(on), sum);
                }
            }
        }
    }
}
