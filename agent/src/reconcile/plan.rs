//! What is to be done so that the host is as the journal says. Pure.
//!
//! Nothing without a mark *and* a place in the journal is ever touched, but the empty rest of a removal
//! under a number of this node's; absence proves nothing; and without quorum nothing is done at all.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use proto::id::{SandboxId, Vmid};

use proto::Progress;

use crate::{
    journal::{Phase, Record},
    pve::Mark,
    sandbox::{
        Tombstone,
        look::{self, Life, Place},
        observe::{Container, Observed},
    },
};

/// Removals of orphans in a pass that are always allowed.
const SWEEPS_MAX: usize = 5;
/// Share of the marked containers that may be orphans, percent; more looks like a wrong journal.
const SWEEPS_MAX_PERCENT: usize = 20;

/// What the journal says.
#[derive(Debug, Clone, Default)]
pub struct Intended {
    /// Those that live.
    pub live: Vec<Arc<Record>>,
    /// Tombstones.
    pub ended: Vec<Tombstone>,
    /// Those that an operation works on: left to it.
    pub busy: BTreeSet<SandboxId>,
    /// Templates that a clone of ours has left in the middle.
    pub dead_clones: BTreeSet<Vmid>,
    /// Tombstones from before are forgotten.
    pub forget_before_ms: u64,
    /// The numbers that are this node's to give, inclusive.
    pub vmids: Option<(Vmid, Vmid)>,
    /// The node's present life.
    pub life: Life,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Take `lock: disk` off a template.
    Unlock(Vmid),
    /// Undo a creation that nobody works on.
    Undo(SandboxId),
    /// Go on deleting.
    Delete(SandboxId),
    /// Go on stopping.
    Stop(SandboxId),
    /// Go on starting.
    Start(SandboxId),
    /// Freeze and lock, or thaw and unlock, as the phase says.
    Settle(SandboxId),
    /// Look at a container that is not as its record says, and take note.
    Look(SandboxId),
    /// Write the mark of a container that is being adopted.
    Adopt(SandboxId),
    /// Take the mark off a container that is being given back.
    Release(SandboxId),
    /// Take a mark off that came back after its container had been given back.
    Unmark {
        /// Whose it was.
        id: SandboxId,
        /// The container.
        vmid: Vmid,
    },
    /// Destroy a container that has come back after its end, or what is left of it.
    Sweep {
        /// Whose it was.
        id: SandboxId,
        /// The container.
        vmid: Vmid,
    },
    /// Remove a config that holds nothing but the lock of a destruction that was cut off, under a
    /// number of ours that no record knows any more: a later attempt has taken the record.
    Clear(Vmid),
    /// Report a container that carries a mark and stands in no journal.
    Quarantine {
        /// The container.
        vmid: Vmid,
        /// Its mark.
        mark: Mark,
    },
    /// Report that too many containers would have to be swept.
    TooMany {
        /// How many.
        sweeps: usize,
        /// Of so many that carry a mark.
        marked: usize,
    },
    /// Drop old tombstones.
    Forget {
        /// Older than this.
        before_ms: u64,
    },
}

/// Plans, in the order in which it is to be done.
pub fn plan(intended: &Intended, observed: &Observed) -> Vec<Action> {
    // An empty list of configs without quorum means that pmxcfs is down, not that nothing exists.
    if !observed.cluster.quorate {
        return Vec::new();
    }
    let mut actions = unlocks(intended, observed);
    let idle = intended.live.iter().filter(|record| !intended.busy.contains(&record.id));
    actions.extend(idle.filter_map(|record| of_record(record, observed, &intended.life)));
    actions.extend(of_marks(intended, observed));
    if intended.ended.iter().any(|ended| ended.ended_ms < intended.forget_before_ms) {
        actions.push(Action::Forget { before_ms: intended.forget_before_ms });
    }
    actions
}

/// A lock that a dead clone of ours has left, and no other lock.
fn unlocks(intended: &Intended, observed: &Observed) -> Vec<Action> {
    let left = |vmid: &&Vmid| {
        let template = observed.containers.get(vmid).filter(|container| container.template);
        template.is_some_and(|container| container.lock.as_deref() == Some("disk"))
    };
    intended.dead_clones.iter().filter(left).copied().map(Action::Unlock).collect()
}

fn of_record(record: &Record, observed: &Observed, life: &Life) -> Option<Action> {
    if record.progress.is_adopting() {
        return Some(Action::Adopt(record.id));
    }
    if record.progress == Progress::Release {
        return Some(Action::Release(record.id));
    }
    if look::seen(record, &place(record, observed), life).is_some() {
        return Some(Action::Look(record.id));
    }
    let ours = observed.containers.get(&record.vmid);
    let ours = ours.filter(|seen| is_its_own(record, seen));
    let settle = |wrong: bool| wrong.then_some(Action::Settle(record.id));
    match record.phase {
        Phase::Creating | Phase::Undoing => Some(Action::Undo(record.id)),
        Phase::Deleting => Some(Action::Delete(record.id)),
        Phase::Stopping => Some(Action::Stop(record.id)),
        Phase::Starting => Some(Action::Start(record.id)),
        Phase::Paused => settle(ours.is_some_and(|seen| !seen.frozen || !seen.held)),
        // A crash in a resume, or in the pause that was to be undone; a lock that a reboot outlived.
        Phase::Running | Phase::Stopped => settle(ours.is_some_and(|s| s.frozen || s.noted)),
        Phase::Deleted | Phase::Failed => None,
    }
}

fn is_its_own(record: &Record, seen: &Container) -> bool {
    seen.mark.as_ref() == Some(&record.mark()) && !seen.template
}

fn place(record: &Record, observed: &Observed) -> Place {
    match observed.containers.get(&record.vmid) {
        Some(seen) if is_its_own(record, seen) => Place::Here { running: seen.running },
        Some(_) => Place::Taken,
        None => match observed.cluster.guests.get(&record.vmid) {
            Some(node) if Some(node) == observed.node.as_ref() => Place::Taken,
            Some(node) => Place::Elsewhere(node.clone()),
            None => Place::Gone,
        },
    }
}

/// Containers with a mark that no living record accounts for.
fn of_marks(intended: &Intended, observed: &Observed) -> Vec<Action> {
    let live: BTreeMap<SandboxId, &Record> =
        intended.live.iter().map(|record| (record.id, &**record)).collect();
    let ended: BTreeMap<SandboxId, &Tombstone> =
        intended.ended.iter().map(|tombstone| (tombstone.id, tombstone)).collect();
    let marked: Vec<(Vmid, &Mark)> = observed
        .containers
        .iter()
        .filter_map(|(vmid, container)| Some((*vmid, container.is_marked_as(*vmid)?)))
        .collect();
    let (mut sweeps, mut strangers) = (Vec::new(), Vec::new());
    for (vmid, mark) in &marked {
        let id = mark.sandbox_id;
        let (record, tombstone) = (live.get(&id), ended.get(&id));
        if intended.busy.contains(&id) || record.is_some_and(|record| record.vmid == *vmid) {
            continue;
        }
        let over = tombstone.is_some_and(|t| t.vmid == *vmid && t.attempt == mark.attempt);
        // No attempt begins here before the one before it has been undone here.
        let last = record.map(|record| record.attempt).or(tombstone.map(|t| t.attempt));
        if tombstone.is_some_and(|tombstone| tombstone.released) {
            strangers.push(Action::Unmark { id, vmid: *vmid });
        } else if over && tombstone.is_some_and(|tombstone| tombstone.moved) {
            strangers.push(Action::Quarantine { vmid: *vmid, mark: Mark::clone(mark) });
        } else if over || last.is_some_and(|last| mark.attempt < last) {
            sweeps.push(Action::Sweep { id, vmid: *vmid });
        } else {
            strangers.push(Action::Quarantine { vmid: *vmid, mark: Mark::clone(mark) });
        }
    }
    sweeps.extend(gutted(intended, observed));
    let allowed = SWEEPS_MAX.max(marked.len() * SWEEPS_MAX_PERCENT / 100);
    if sweeps.len() > allowed {
        let too_many = Action::TooMany { sweeps: sweeps.len(), marked: marked.len() };
        sweeps = vec![too_many];
    }
    sweeps.extend(strangers);
    sweeps
}

/// What a destruction of ours that was cut off has left, of a sandbox that had ended before.
fn gutted(intended: &Intended, observed: &Observed) -> Vec<Action> {
    let lives: BTreeSet<Vmid> = intended.live.iter().map(|record| record.vmid).collect();
    // A number has had several owners: one look is enough.
    let ended: BTreeMap<Vmid, SandboxId> =
        intended.ended.iter().map(|tombstone| (tombstone.vmid, tombstone.id)).collect();
    let ours =
        |vmid: Vmid| intended.vmids.is_some_and(|(first, last)| (first..=last).contains(&vmid));
    let left = observed.containers.iter().filter(|(vmid, c)| c.gutted && !lives.contains(vmid));
    left.filter_map(|(vmid, _)| match ended.get(vmid) {
        Some(id) => Some(Action::Sweep { id: *id, vmid: *vmid }),
        None => ours(*vmid).then_some(Action::Clear(*vmid)),
    })
    .collect()
}

#[cfg(test)]
mod tests;
