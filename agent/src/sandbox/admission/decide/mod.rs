//! Decides whether the node admits a creation. Pure: `lock` counts what was admitted.

use std::{cmp::Ordering, time::Duration};

use daemon::shares::may_take;
use proto::{
    Reason,
    id::SandboxId,
    name::{RequestId, Team},
};

use crate::{
    journal::{Phase, scheduling::SchedulingState},
    pve::StorageRoom,
    sandbox::{Error, Known, Limits, Order, Renumbered, Result, Tombstone},
};

/// Largest share of a thin pool in use: a full one stops everything on it.
const THIN_USED_MAX: f64 = 0.95;

/// Delay before a retry, where nothing is known about the cause.
const SOON: Duration = Duration::from_secs(2);

/// Facts that a creation is admitted on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Facts {
    pub(crate) stopping: bool,
    /// Scheduling state of the node, set by an operator.
    pub(crate) scheduling: SchedulingState,
    /// True when the cluster can be changed.
    pub(crate) quorate: bool,
    /// Unconfirmed change of the node's number in the cluster.
    pub(crate) renumbered: Option<Renumbered>,
    /// Room on the storage that the clone goes to.
    pub(crate) room: StorageRoom,
    /// Creations that wait for a turn at the template.
    pub(crate) queued: usize,
    /// Creations of the team that asks among them; `None` where the team is not known.
    pub(crate) queued_of_team: Option<usize>,
    /// Median duration of recent starts.
    pub(crate) start: Duration,
    /// Memory of the host; `None` before it was sampled.
    pub(crate) memory: Option<Memory>,
}

impl Facts {
    /// Says why one more creation cannot wait for the template; `None` when it can.
    fn queue_full(&self, limits: &Limits) -> Option<String> {
        let free = limits.clone_queue_max.saturating_sub(self.queued);
        if free == 0 {
            return Some(format!("{} creations wait for this template already", self.queued));
        }
        let of_team = self.queued_of_team.filter(|of_team| !may_take(*of_team, free))?;
        Some(format!(
            "{of_team} creations of this team wait for this template already; \
             the {free} free places are left for other teams"
        ))
    }
}

/// Memory figures that a creation is admitted on, bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Memory {
    /// Limit of the new sandbox, or what its limit grows by.
    pub(crate) asked: u64,
    /// Sum of the limits of all others that are admitted.
    pub(crate) given: u64,
    /// Memory of the host.
    pub(crate) total: u64,
    /// Memory of the host that is available.
    pub(crate) available: u64,
}

impl Memory {
    /// Says why one more sandbox does not fit; `None` when it does.
    #[expect(clippy::cast_precision_loss, reason = "exact below 2^52 bytes")]
    fn full(&self, limits: &Limits) -> Option<String> {
        let Self { asked, given, total, available } = *self;
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        if (given + asked) as f64 > limits.memory_overcommit * total as f64 {
            return Some(format!(
                "{:.1} of {:.1} GiB are given to sandboxes already; {:.1} GiB more do not fit",
                gib(given),
                gib(total),
                gib(asked)
            ));
        }
        let used = total.saturating_sub(available) + asked / 2;
        (used as f64 > limits.memory_used_max * total as f64)
            .then(|| format!("only {:.1} of {:.1} GiB are available", gib(available), gib(total)))
    }
}

/// Decides whether the node admits one more creation.
pub(crate) fn decide(facts: &Facts, limits: &Limits) -> Result<()> {
    if facts.stopping {
        return Err(Error::new(Reason::ShuttingDown, "the agent is stopping").retry_after(SOON));
    }
    match facts.scheduling {
        SchedulingState::Schedulable => {}
        SchedulingState::Cordoned => {
            return Err(Error::new(Reason::NodeCordoned, "the node is cordoned: no new sandboxes"));
        }
        SchedulingState::Draining => {
            let message = "the node is being drained: no new sandboxes";
            return Err(Error::new(Reason::NodeCordoned, message));
        }
    }
    if !facts.quorate {
        let message = "the cluster has no quorum here, so nothing can be made";
        return Err(Error::new(Reason::NoQuorum, message).retry_after(SOON));
    }
    if let Some(renumbered) = facts.renumbered {
        return Err(renumbered.refusal());
    }
    check_room(&facts.room, limits)?;
    if let Some(why) = facts.memory.and_then(|memory| memory.full(limits)) {
        return Err(Error::new(Reason::MemoryFull, why).retry_after(SOON));
    }
    if let Some(why) = facts.queue_full(limits) {
        let later = facts.start.max(Duration::from_secs(1));
        return Err(Error::new(Reason::QueueFull, why).retry_after(later));
    }
    Ok(())
}

/// Refuses what needs room on a storage that has none left.
pub(crate) fn check_room(room: &StorageRoom, limits: &Limits) -> Result<()> {
    if room.free < limits.storage_reserve_bytes {
        return Err(Error::new(
            Reason::StorageFull,
            format!(
                "the storage has {} MiB left, {} MiB are kept free",
                room.free >> 20,
                limits.storage_reserve_bytes >> 20
            ),
        ));
    }
    let thin = room.thin_data.max(room.thin_metadata);
    if thin > THIN_USED_MAX {
        let message =
            format!("{:.0} % of the thin pool or of its metadata is in use", thin * 100.0);
        return Err(Error::new(Reason::StorageFull, message));
    }
    Ok(())
}

/// Decides whether the node admits more memory for one of its sandboxes, up to `wanted` bytes.
#[expect(clippy::cast_precision_loss, reason = "exact below 2^52 bytes")]
pub(crate) fn decide_growth(memory: Memory, wanted: u64, limits: &Limits) -> Result<()> {
    if wanted as f64 > limits.memory_overcommit * memory.total as f64 {
        let gib = (memory.total as f64 * limits.memory_overcommit) / (1u64 << 30) as f64;
        let message = format!("this node gives {gib:.1} GiB to all of its sandboxes together");
        return Err(Error::new(Reason::NeverFits, message));
    }
    memory
        .full(limits)
        .map_or(Ok(()), |why| Err(Error::new(Reason::MemoryFull, why).retry_after(SOON)))
}

/// Decision about an order, from what is known of its id and its request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Recall {
    /// Nothing is known: create it.
    New,
    /// Created, or being created: the same answer.
    Same(SandboxId),
}

/// Looks an order up. One sandbox per request, one creation per attempt.
pub(crate) fn recall(
    order: &Order,
    by_id: Option<Summary>,
    by_request: Option<Summary>,
) -> Result<Recall> {
    let asked = Summary::from(order);
    if let Some(known) = by_id {
        return same_id(&asked, &known);
    }
    match by_request.filter(|known| known.phase != Phase::Failed) {
        Some(known) if known.is_of_body(&asked) => Ok(Recall::Same(known.id)),
        Some(_) => Err(Error::new(
            Reason::RequestIdReused,
            format!("{} was used with another body", order.spec.request_id),
        )),
        None => Ok(Recall::New),
    }
}

fn same_id(asked: &Summary, known: &Summary) -> Result<Recall> {
    let id = asked.id;
    let request = |of: &Summary| (of.team.clone(), of.request_id.clone());
    if request(known) != request(asked) || !known.is_of_body(asked) {
        let message = format!("{id} was made for another request");
        return Err(Error::new(Reason::RequestIdReused, message));
    }
    match (known.attempt.cmp(&asked.attempt), known.phase) {
        (Ordering::Equal, _) => Ok(Recall::Same(id)),
        (Ordering::Less, Phase::Failed) => Ok(Recall::New),
        (Ordering::Less, Phase::Deleted) => {
            Err(Error::new(Reason::SandboxDeleted, format!("{id} has been deleted")))
        }
        (Ordering::Less, _) => Err(Error::new(
            Reason::SandboxBusy,
            format!("attempt {} of {id} is still here: cancel it first", known.attempt),
        )
        .retry_after(Duration::from_secs(1))),
        (Ordering::Greater, _) => Err(Error::new(
            Reason::CreateCancelled,
            format!("attempt {} of {id} came before this one", known.attempt),
        )),
    }
}

/// Facts about a creation that is known already, or under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Summary {
    id: SandboxId,
    pub(crate) attempt: u32,
    phase: Phase,
    pub(super) team: Team,
    pub(super) request_id: RequestId,
    body_digest: String,
}

impl Summary {
    /// Compares the bodies. That of a recovered sandbox is unknown: any body matches.
    fn is_of_body(&self, asked: &Self) -> bool {
        self.body_digest.is_empty() || self.body_digest == asked.body_digest
    }
}

impl From<&Order> for Summary {
    fn from(order: &Order) -> Self {
        Self {
            id: order.id,
            attempt: order.attempt,
            phase: Phase::Creating,
            team: order.team.clone(),
            request_id: order.spec.request_id.clone(),
            body_digest: order.body_digest.clone(),
        }
    }
}

impl From<Known> for Summary {
    fn from(known: Known) -> Self {
        let tombstone = match known {
            Known::Live(record) => Tombstone::from(&*record),
            Known::Ended(tombstone) => tombstone,
        };
        Self {
            id: tombstone.id,
            attempt: tombstone.attempt,
            phase: tombstone.phase,
            team: tombstone.team,
            request_id: tombstone.request_id,
            body_digest: tombstone.body_digest,
        }
    }
}

#[cfg(test)]
mod tests;
