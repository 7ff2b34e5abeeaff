//! Plans the actions that make the host match the journal. Pure.
//!
//! A container without a mark *and* a record in the journal is never touched, except the remnant
//! of a destruction under a vmid of this node. Absence proves nothing, and without quorum nothing
//! is done.

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
        drift::{
            detect::{ContainerLocation, Life, detect_drift},
            observe::{Container, Observed},
        },
    },
};

/// Number of orphans that one pass may always remove.
const ORPHANS_MAX: usize = 5;
/// Largest share of the marked containers that may be orphans, in percent; more suggests a wrong
/// journal.
const ORPHANS_MAX_PERCENT: usize = 20;

/// Intended state, from the journal.
#[derive(Debug, Clone, Default)]
pub struct Intended {
    /// Records of sandboxes that have not ended.
    pub live: Vec<Arc<Record>>,
    /// Tombstones of those that have.
    pub ended: Vec<Tombstone>,
    /// Sandboxes that an operation works on; they are left to it.
    pub busy: BTreeSet<SandboxId>,
    /// Templates whose lock a dead clone of ours has left.
    pub dead_clones: BTreeSet<Vmid>,
    /// Tombstones that ended before this time are forgotten, in milliseconds since 1970.
    pub forget_before_ms: u64,
    /// Range of vmids that this node hands out, inclusive.
    pub vmids: Option<(Vmid, Vmid)>,
    /// Current time and life of the node, which records may predate.
    pub life: Life,
}

/// Action of the reconciler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Remove `lock: disk` from a template.
    Unlock(Vmid),
    /// Undo a creation that no task works on.
    Undo(SandboxId),
    /// Continue a deletion.
    Delete(SandboxId),
    /// Continue a stop.
    Stop(SandboxId),
    /// Continue a start.
    Start(SandboxId),
    /// Freeze and lock, or thaw and unlock, as the phase requires.
    EnforcePause(SandboxId),
    /// End a change of a sandbox's size that was cut short.
    SettleSize(SandboxId),
    /// Observe a container that differs from its record, and record the result.
    RecordDrift(SandboxId),
    /// Write the mark of a container that is being adopted.
    Adopt(SandboxId),
    /// Remove the mark from a container that is being released.
    Release(SandboxId),
    /// Remove a mark that reappeared after its container had been released.
    Unmark {
        /// Sandbox of the mark.
        id: SandboxId,
        vmid: Vmid,
    },
    /// Destroy a container, or its remnant, that has come back after its sandbox ended.
    DestroyOrphan { id: SandboxId, vmid: Vmid },
    /// Remove a config that contains only the lock of an interrupted destruction, under a vmid of
    /// ours that no record knows any more: a later attempt has taken the record.
    RemoveRemnant(Vmid),
    /// Report a container with a mark that is not in the journal.
    Quarantine { vmid: Vmid, mark: Mark },
    /// Report that too many containers would have to be destroyed.
    TooManyOrphans { orphans: usize, marked: usize },
    /// Drop old tombstones.
    Forget {
        /// Tombstones that ended before this time, in milliseconds since 1970.
        before_ms: u64,
    },
}

/// Plans the actions, in the order of their execution.
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

/// Plans to remove locks that a dead clone of ours has left, and no other locks.
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
    if detect_drift(record, &place(record, observed), life).is_some() {
        return Some(Action::RecordDrift(record.id));
    }
    let ours = observed.containers.get(&record.vmid);
    let ours = ours.filter(|seen| is_its_own(record, seen));
    let enforce = |wrong: bool| wrong.then_some(Action::EnforcePause(record.id));
    match record.phase {
        Phase::Creating | Phase::Undoing => Some(Action::Undo(record.id)),
        Phase::Deleting => Some(Action::Delete(record.id)),
        Phase::Stopping => Some(Action::Stop(record.id)),
        Phase::Starting => Some(Action::Start(record.id)),
        Phase::Paused => enforce(ours.is_some_and(|seen| !seen.frozen || !seen.held)),
        // A crash in a resume, or in a pause that was to be undone; or a lock that survived a
        // reboot.
        Phase::Running | Phase::Stopped => enforce(ours.is_some_and(|s| s.frozen || s.noted))
            .or(ours.and(record.resizing).map(|_| Action::SettleSize(record.id))),
        Phase::Deleted | Phase::Failed => None,
    }
}

fn is_its_own(record: &Record, seen: &Container) -> bool {
    seen.mark.as_ref() == Some(&record.mark()) && !seen.template
}

fn place(record: &Record, observed: &Observed) -> ContainerLocation {
    match observed.containers.get(&record.vmid) {
        Some(seen) if is_its_own(record, seen) => {
            ContainerLocation::Here { running: seen.running, rebooted: false }
        }
        Some(_) => ContainerLocation::Taken,
        None => match observed.cluster.guests.get(&record.vmid) {
            Some(node) if Some(node) == observed.node.as_ref() => ContainerLocation::Taken,
            Some(node) => ContainerLocation::Elsewhere(node.clone()),
            None => ContainerLocation::Gone,
        },
    }
}

/// Plans actions for containers with a mark that no live record accounts for.
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
    let (mut orphans, mut strangers) = (Vec::new(), Vec::new());
    for (vmid, mark) in &marked {
        let id = mark.sandbox_id;
        let (record, tombstone) = (live.get(&id), ended.get(&id));
        if intended.busy.contains(&id) || record.is_some_and(|record| record.vmid == *vmid) {
            continue;
        }
        let over = tombstone.is_some_and(|t| t.vmid == *vmid && t.attempt == mark.attempt);
        // No attempt begins here before the previous one has been undone here.
        let last = record.map(|record| record.attempt).or(tombstone.map(|t| t.attempt));
        if tombstone.is_some_and(|tombstone| tombstone.released) {
            strangers.push(Action::Unmark { id, vmid: *vmid });
        } else if over && tombstone.is_some_and(|tombstone| tombstone.moved) {
            strangers.push(Action::Quarantine { vmid: *vmid, mark: Mark::clone(mark) });
        } else if over || last.is_some_and(|last| mark.attempt < last) {
            orphans.push(Action::DestroyOrphan { id, vmid: *vmid });
        } else {
            strangers.push(Action::Quarantine { vmid: *vmid, mark: Mark::clone(mark) });
        }
    }
    orphans.extend(remnants(intended, observed));
    let allowed = ORPHANS_MAX.max(marked.len() * ORPHANS_MAX_PERCENT / 100);
    if orphans.len() > allowed {
        let too_many = Action::TooManyOrphans { orphans: orphans.len(), marked: marked.len() };
        orphans = vec![too_many];
    }
    orphans.extend(strangers);
    orphans
}

/// Plans to remove what an interrupted destruction has left of a sandbox that had ended before.
fn remnants(intended: &Intended, observed: &Observed) -> Vec<Action> {
    let lives: BTreeSet<Vmid> = intended.live.iter().map(|record| record.vmid).collect();
    // A vmid may have had several owners: one of them is enough.
    let ended: BTreeMap<Vmid, SandboxId> =
        intended.ended.iter().map(|tombstone| (tombstone.vmid, tombstone.id)).collect();
    let ours =
        |vmid: Vmid| intended.vmids.is_some_and(|(first, last)| (first..=last).contains(&vmid));
    let left = observed.containers.iter().filter(|(vmid, c)| c.gutted && !lives.contains(vmid));
    left.filter_map(|(vmid, _)| match ended.get(vmid) {
        Some(id) => Some(Action::DestroyOrphan { id: *id, vmid: *vmid }),
        None => ours(*vmid).then_some(Action::RemoveRemnant(*vmid)),
    })
    .collect()
}

#[cfg(test)]
mod tests;
