//! The mutants: each leaves out, or does wrongly, one thing that an invariant depends on. Most are
//! in the parts that the daemons are given here (journal, store, PVE, clock, options). A few are in
//! the shipped code, as `agent::saga::Lapse`, because no given part can stand for them.

use agent::{journal::memory, pve::fake, saga};
use controller::store;

/// One mutation and the invariant that it breaks.
#[derive(Debug)]
pub struct Mutant {
    /// Invariant that the mutation breaks.
    pub invariant: &'static str,
    /// Description of the mutation.
    pub what: &'static str,
    pub(crate) lapse: Lapse,
}

/// Part that contains the mutation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lapse {
    Agent(saga::Lapse),
    Journal(memory::Lapse),
    Pve(fake::Lapse),
    Store(store::memory::Lapse),
    /// The reconciler runs only once, at the start.
    Asleep,
    /// The shim reports an order as not run after its deadline, and the helper runs it.
    GivenUp,
    /// A node has only a wall clock.
    WallAlone,
}

const fn mutant(invariant: &'static str, what: &'static str, lapse: Lapse) -> Mutant {
    Mutant { invariant, what, lapse }
}

/// All mutants, at least one for each invariant.
pub const ALL: &[Mutant] = &[
    mutant("I1", "an undo is skipped", Lapse::Agent(saga::Lapse::Undo)),
    mutant("I1", "a destruction does nothing", Lapse::Pve(fake::Lapse::Destroy)),
    mutant("I1", "a dead clone's lock stays on its template", Lapse::Pve(fake::Lapse::Unlock)),
    mutant("I2", "a creation is answered before it is durable", {
        Lapse::Journal(memory::Lapse::Answer)
    }),
    mutant("I1", "a node leaves a sandbox before another has taken it over", {
        Lapse::Agent(saga::Lapse::Leave)
    }),
    mutant("I2", "a node has no clock but the one on its wall", Lapse::WallAlone),
    mutant("I2", "a longer life is answered and not kept", {
        Lapse::Journal(memory::Lapse::Extensions)
    }),
    mutant("I2", "a member without quorum takes itself for a lone node", {
        Lapse::Pve(fake::Lapse::Alone)
    }),
    mutant("I3", "the address of a stranger is leased", Lapse::Journal(memory::Lapse::Strangers)),
    mutant("I3", "a vmid is leased twice", Lapse::Journal(memory::Lapse::Vmids)),
    mutant("I3", "an address is leased twice", Lapse::Journal(memory::Lapse::Addresses)),
    mutant("I4", "request_ids are not looked up", Lapse::Store(store::memory::Lapse::Requests)),
    mutant("I4", "what is called off lives on", Lapse::Agent(saga::Lapse::CallOff)),
    mutant("I4", "a node hears of a creation before the choice of it is durable", {
        Lapse::Store(store::memory::Lapse::Choices)
    }),
    mutant("I4", "what nodes hold is not remembered by an empty store", {
        Lapse::Store(store::memory::Lapse::Found)
    }),
    mutant("I5", "a container is entered unseen", Lapse::Agent(saga::Lapse::Entry)),
    mutant("I6", "the journal syncs intents only", Lapse::Journal(memory::Lapse::Sync)),
    mutant("I7", "an end leaves no tombstone", Lapse::Journal(memory::Lapse::Tombstones)),
    mutant("I8", "containers are changed unseen", Lapse::Pve(fake::Lapse::Ownership)),
    mutant("I8", "marks that nobody knows are destroyed", Lapse::Pve(fake::Lapse::Strangers)),
    mutant(
        "I8",
        "a foreign volume is destroyed with the sandbox",
        Lapse::Pve(fake::Lapse::Volumes),
    ),
    mutant("I8", "a clone is made under a number where volumes stand", {
        Lapse::Agent(saga::Lapse::Site)
    }),
    mutant("I9", "the reconciler looks once", Lapse::Asleep),
    mutant("I9", "a controller that was replaced writes to the store", {
        Lapse::Store(store::memory::Lapse::Claim)
    }),
    mutant("I10", "an old controller is not refused", Lapse::Agent(saga::Lapse::Fence)),
    mutant("I10", "the epoch is forgotten", Lapse::Journal(memory::Lapse::Epoch)),
    mutant("I11", "a clone begins before its intent is durable", {
        Lapse::Journal(memory::Lapse::Intent)
    }),
    mutant("I12", "leases are miscounted", Lapse::Journal(memory::Lapse::Room)),
    mutant("I12", "ends are not told to the controller", Lapse::Journal(memory::Lapse::News)),
    mutant("I12", "a write that failed is answered as if it was made", {
        Lapse::Journal(memory::Lapse::Failures)
    }),
    mutant("I12", "the log leaves pauses out", Lapse::Store(store::memory::Lapse::Pauses)),
    mutant("I12", "the log tells twice what is said twice", {
        Lapse::Store(store::memory::Lapse::Again)
    }),
    mutant("I12", "the log is written later than what it tells of", {
        Lapse::Store(store::memory::Lapse::Behind)
    }),
    mutant("I13", "what is frozen counts as dead", Lapse::Pve(fake::Lapse::Frozen)),
    mutant("I13", "a pause takes no lock", Lapse::Pve(fake::Lapse::Hold)),
    mutant("I14", "what was given up runs all the same", Lapse::GivenUp),
];
