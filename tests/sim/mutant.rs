//! The mutants: each leaves out, or does wrongly, one thing that an invariant depends on. Most are
//! in the parts that the daemons are given here (journal, store, PVE, firewall, clock, options). Two
//! are faults that the shipped code is told to make, because no given part can stand for them.

use agent::{journal::memory, pve::fake};
use controller::store;

/// One mutation and the invariant that it breaks.
#[derive(Debug)]
pub struct Mutant {
    /// Invariant that the mutation breaks.
    pub invariant: &'static str,
    /// Description of the mutation.
    pub what: &'static str,
    pub(crate) mutation: Mutation,
}

/// Part that contains the mutation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mutation {
    Journal(memory::Mutation),
    Pve(fake::Mutation),
    Store(store::memory::Mutation),
    /// Undos report success and do nothing.
    SkippedUndo,
    /// A cancelled creation is reported as cancelled, and lives on.
    IgnoredCancel,
    /// The reconciler runs only once, at the start.
    Asleep,
    /// The shim reports an order as not run after its deadline, and the helper runs it.
    GivenUp,
    /// A node has only a wall clock.
    WallAlone,
    /// Isolation rules are in force up to a pass of the reconciler later than reported.
    LateRules,
    /// An agent that starts opens ports to everybody that callers have hidden or guarded.
    Reopened,
}

const fn mutant(invariant: &'static str, what: &'static str, mutation: Mutation) -> Mutant {
    Mutant { invariant, what, mutation }
}

/// All mutants, at least one for each invariant.
pub const ALL: &[Mutant] = &[
    mutant("I1", "an undo is skipped", Mutation::SkippedUndo),
    mutant("I1", "a destruction does nothing", Mutation::Pve(fake::Mutation::Destroy)),
    mutant(
        "I1",
        "a dead clone's lock stays on its template",
        Mutation::Pve(fake::Mutation::Unlock),
    ),
    mutant("I2", "a creation is answered before it is durable", {
        Mutation::Journal(memory::Mutation::Answer)
    }),
    mutant("I1", "a node leaves a sandbox before another has taken it over", {
        Mutation::Journal(memory::Mutation::Exports)
    }),
    mutant("I2", "a node has no clock but the one on its wall", Mutation::WallAlone),
    mutant("I2", "a longer life is answered and not kept", {
        Mutation::Journal(memory::Mutation::Extensions)
    }),
    mutant("I2", "a member without quorum takes itself for a lone node", {
        Mutation::Pve(fake::Mutation::Alone)
    }),
    mutant(
        "I3",
        "the address of a stranger is leased",
        Mutation::Journal(memory::Mutation::Strangers),
    ),
    mutant("I3", "a vmid is leased twice", Mutation::Journal(memory::Mutation::Vmids)),
    mutant("I3", "an address is leased twice", Mutation::Journal(memory::Mutation::Addresses)),
    mutant(
        "I4",
        "request_ids are not looked up",
        Mutation::Store(store::memory::Mutation::Requests),
    ),
    mutant("I4", "a cancelled creation lives on", Mutation::IgnoredCancel),
    mutant("I4", "a node hears of a creation before the choice of it is durable", {
        Mutation::Store(store::memory::Mutation::Choices)
    }),
    mutant("I4", "what nodes hold is not remembered by an empty store", {
        Mutation::Store(store::memory::Mutation::Found)
    }),
    mutant("I5", "a container is entered unseen", Mutation::Pve(fake::Mutation::Entry)),
    mutant("I5", "a sandbox starts before its rules are in force", Mutation::LateRules),
    mutant("I6", "the journal syncs intents only", Mutation::Journal(memory::Mutation::Sync)),
    mutant("I6", "a hidden port is open after a restart of the agent", Mutation::Reopened),
    mutant("I7", "an end leaves no tombstone", Mutation::Journal(memory::Mutation::Tombstones)),
    mutant("I8", "containers are changed unseen", Mutation::Pve(fake::Mutation::Ownership)),
    mutant("I8", "marks that nobody knows are destroyed", Mutation::Pve(fake::Mutation::Strangers)),
    mutant(
        "I8",
        "a foreign volume is destroyed with the sandbox",
        Mutation::Pve(fake::Mutation::Volumes),
    ),
    mutant("I8", "a clone is made under a number where volumes stand", {
        Mutation::Pve(fake::Mutation::Site)
    }),
    mutant("I9", "the reconciler looks once", Mutation::Asleep),
    mutant("I9", "a controller that was replaced writes to the store", {
        Mutation::Store(store::memory::Mutation::Claim)
    }),
    mutant("I10", "an old controller is not refused", Mutation::Journal(memory::Mutation::Fence)),
    mutant("I10", "the epoch is forgotten", Mutation::Journal(memory::Mutation::Epoch)),
    mutant("I11", "a clone begins before its intent is durable", {
        Mutation::Journal(memory::Mutation::Intent)
    }),
    mutant("I12", "leases are miscounted", Mutation::Journal(memory::Mutation::Room)),
    mutant("I12", "ends are not told to the controller", Mutation::Journal(memory::Mutation::News)),
    mutant("I12", "a write that failed is answered as if it was made", {
        Mutation::Journal(memory::Mutation::Failures)
    }),
    mutant("I12", "the log leaves pauses out", Mutation::Store(store::memory::Mutation::Pauses)),
    mutant("I12", "the log tells twice what is said twice", {
        Mutation::Store(store::memory::Mutation::Again)
    }),
    mutant("I12", "the log is written later than what it tells of", {
        Mutation::Store(store::memory::Mutation::Behind)
    }),
    mutant("I13", "what is frozen counts as dead", Mutation::Pve(fake::Mutation::Frozen)),
    mutant("I13", "a pause takes no lock", Mutation::Pve(fake::Mutation::PauseLock)),
    mutant("I14", "what was given up runs all the same", Mutation::GivenUp),
];
