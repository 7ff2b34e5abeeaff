//! Admission of creations, and its counters. The decisions are pure; `Gate` counts.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use proto::{
    Reason,
    id::{SandboxId, Vmid},
    name::{RequestId, Team},
    spec::Size,
};
use tokio::time::Instant;

use super::{Error, Known, Limits, Order, Renumbered, Tombstone};
use crate::{
    journal::{Phase, intake::Intake},
    pve::StorageRoom,
};

/// Largest share of a thin pool in use: a full one stops everything on it.
const THIN_USED_MAX: f64 = 0.95;

/// Facts that a creation is admitted on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts {
    pub(super) stopping: bool,
    /// Scheduling state of the node, set by an operator.
    pub(super) intake: Intake,
    /// True when the cluster can be changed.
    pub(super) quorate: bool,
    /// Unconfirmed change of the node's number in the cluster.
    pub(super) renumbered: Option<Renumbered>,
    /// Room on the storage that the clone goes to.
    pub(super) room: StorageRoom,
    /// Creations that wait for a turn at the template.
    pub(super) queued: usize,
    /// Median duration of recent starts.
    pub(super) start: Duration,
    /// Memory of the host; `None` before it was sampled.
    pub(super) memory: Option<Memory>,
}

/// Memory figures that a creation is admitted on, bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Memory {
    /// Limit of the new sandbox.
    pub(super) asked: u64,
    /// Sum of the limits of all others that are admitted.
    pub(super) given: u64,
    /// Memory of the host.
    pub(super) total: u64,
    /// Memory of the host that is available.
    pub(super) available: u64,
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
pub(super) fn decide(facts: &Facts, limits: &Limits) -> Result<(), Error> {
    let soon = Duration::from_secs(2);
    if facts.stopping {
        return Err(Error::new(Reason::ShuttingDown, "the agent is stopping").retry_after(soon));
    }
    match facts.intake {
        Intake::Open => {}
        Intake::Cordoned => {
            return Err(Error::new(Reason::NodeCordoned, "the node is cordoned: no new sandboxes"));
        }
        Intake::Draining => {
            let message = "the node is being drained: no new sandboxes";
            return Err(Error::new(Reason::NodeCordoned, message));
        }
    }
    if !facts.quorate {
        let message = "the cluster has no quorum here, so nothing can be made";
        return Err(Error::new(Reason::NoQuorum, message).retry_after(soon));
    }
    if let Some(renumbered) = facts.renumbered {
        return Err(renumbered.refusal());
    }
    if facts.room.free < limits.storage_reserve_bytes {
        return Err(Error::new(
            Reason::StorageFull,
            format!(
                "the storage has {} MiB left, {} MiB are kept free",
                facts.room.free >> 20,
                limits.storage_reserve_bytes >> 20
            ),
        ));
    }
    let thin = facts.room.thin_data.max(facts.room.thin_metadata);
    if thin > THIN_USED_MAX {
        let message =
            format!("{:.0} % of the thin pool or of its metadata is in use", thin * 100.0);
        return Err(Error::new(Reason::StorageFull, message));
    }
    if let Some(why) = facts.memory.and_then(|memory| memory.full(limits)) {
        return Err(Error::new(Reason::MemoryFull, why).retry_after(soon));
    }
    if facts.queued >= limits.clone_queue_max {
        return Err(Error::new(
            Reason::QueueFull,
            format!("{} creations wait for this template already", facts.queued),
        )
        .retry_after(facts.start.max(Duration::from_secs(1))));
    }
    Ok(())
}

/// Decision about an order, from what is known of its id and its request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Recall {
    /// Nothing is known: create it.
    New,
    /// Created, or being created: the same answer.
    Same(SandboxId),
}

/// Looks an order up. One sandbox per request, one creation per attempt.
pub(super) fn recall(
    order: &Order,
    by_id: Option<Summary>,
    by_request: Option<Summary>,
) -> Result<Recall, Error> {
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

fn same_id(asked: &Summary, known: &Summary) -> Result<Recall, Error> {
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
            format!("attempt {} of {id} is still here: call it off first", known.attempt),
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
pub(super) struct Summary {
    id: SandboxId,
    pub(super) attempt: u32,
    phase: Phase,
    team: Team,
    request_id: RequestId,
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

/// Time that a reservation is kept for a creation that may come.
const SEAT_KEPT: Duration = Duration::from_secs(2);

/// Reservation for a creation that may come.
#[derive(Debug, Clone, Copy)]
struct Kept {
    size: Size,
    template: Vmid,
    until: Instant,
}

/// Number of starts that the median is computed from.
const STARTS_KEPT: usize = 16;

/// Counters of admission, and its lock.
#[derive(Debug, Clone, Default)]
pub(super) struct Gate(Arc<Mutex<Counts>>);

#[derive(Debug, Default)]
struct Counts {
    /// Admitted creations and their memory, bytes: until the intent is durable they have no record.
    creations: BTreeMap<SandboxId, (Summary, u64)>,
    /// Reservations: they count as admitted creations until they expire.
    kept: BTreeMap<SandboxId, Kept>,
    /// Number of creations that wait, by template.
    queued: BTreeMap<Vmid, usize>,
    starting: usize,
    start_ms: VecDeque<u32>,
}

impl Gate {
    /// Locks admission: no other creation is admitted while the guard lives. A reservation for `id`
    /// passes to the holder of the guard.
    pub(super) fn hold(&self, id: &SandboxId) -> Held<'_> {
        let mut counts = self.lock();
        counts.kept.remove(id);
        Held { gate: self, counts }
    }

    /// Cancels a reservation.
    pub(super) fn give_back(&self, id: &SandboxId) {
        self.lock().kept.remove(id);
    }

    /// Sizes of all reservations.
    pub(super) fn kept(&self) -> Vec<Size> {
        self.lock().kept.values().map(|kept| kept.size).collect()
    }

    /// Counts a start until the returned value is dropped.
    pub(super) fn start(&self) -> Seat {
        self.lock().starting += 1;
        Seat { gate: self.clone(), creation: None, queued: None }
    }

    /// Returns the admitted creation with this id.
    pub(super) fn creation(&self, id: &SandboxId) -> Option<Summary> {
        self.lock().creations.get(id).map(|(known, _)| known.clone())
    }

    /// Numbers of creations that wait, reservations included, and of those that start.
    pub(super) fn counts(&self) -> (usize, usize) {
        let counts = self.lock();
        (counts.queued.values().sum::<usize>() + counts.kept.len(), counts.starting)
    }

    /// Number of creations that wait for this template, reservations included.
    pub(super) fn queued(&self, template: Vmid) -> usize {
        self.lock().queued(template)
    }

    /// Remembers the duration of a start.
    pub(super) fn took(&self, duration: Duration) {
        let mut counts = self.lock();
        if counts.start_ms.len() == STARTS_KEPT {
            counts.start_ms.pop_front();
        }
        counts.start_ms.push_back(u32::try_from(duration.as_millis()).unwrap_or(u32::MAX));
    }

    /// Median duration of recent starts, milliseconds; 0 when there was none.
    pub(super) fn start_ms(&self) -> u32 {
        self.lock().start_ms()
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !counts.kept.is_empty() {
            let now = Instant::now();
            counts.kept.retain(|_, kept| now < kept.until);
        }
        counts
    }
}

/// Guard of the admission lock.
#[derive(Debug)]
pub(super) struct Held<'a> {
    gate: &'a Gate,
    counts: MutexGuard<'a, Counts>,
}

impl Held<'_> {
    pub(super) fn by_id(&self, id: &SandboxId) -> Option<Summary> {
        self.counts.creations.get(id).map(|(known, _)| known.clone())
    }

    pub(super) fn by_request(&self, team: &Team, request_id: &RequestId) -> Option<Summary> {
        let mut creations = self.counts.creations.values().map(|(known, _)| known);
        creations.find(|known| known.team == *team && known.request_id == *request_id).cloned()
    }

    /// Sum of the memory limits of admitted creations and reservations, bytes.
    pub(super) fn memory(&self) -> u64 {
        let inside: u64 = self.counts.creations.values().map(|(_, bytes)| bytes).sum();
        inside + self.counts.kept.values().map(|kept| kept.size.memory_bytes()).sum::<u64>()
    }

    pub(super) fn queued(&self, template: Vmid) -> usize {
        self.counts.queued(template)
    }

    /// Median duration of recent starts.
    pub(super) fn start(&self) -> Duration {
        Duration::from_millis(self.counts.start_ms().into())
    }

    /// Stores a reservation for a creation that may come.
    pub(super) fn keep(mut self, id: SandboxId, size: Size, template: Vmid) {
        let until = Instant::now() + SEAT_KEPT;
        self.counts.kept.insert(id, Kept { size, template, until });
    }

    /// Admits a creation, at the end of the template's queue.
    pub(super) fn admit(mut self, order: &Order, memory: u64, template: Vmid) -> Seat {
        self.counts.creations.insert(order.id, (order.into(), memory));
        *self.counts.queued.entry(template).or_default() += 1;
        Seat { gate: self.gate.clone(), creation: Some(order.id), queued: Some(template) }
    }
}

/// Place of a creation or start in the counters. Dropped, however its task ends, it is freed.
#[derive(Debug)]
pub(super) struct Seat {
    gate: Gate,
    creation: Option<SandboxId>,
    /// Template that it waits for; `None` once it is starting.
    queued: Option<Vmid>,
}

impl Seat {
    /// Leaves the queue and counts as starting.
    pub(super) fn starts(&mut self) {
        let mut counts = self.gate.lock();
        if let Some(template) = self.queued.take() {
            counts.leave_queue(template);
            counts.starting += 1;
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut counts = self.gate.lock();
        if let Some(id) = &self.creation {
            counts.creations.remove(id);
        }
        match self.queued {
            Some(template) => counts.leave_queue(template),
            None => counts.starting -= 1,
        }
    }
}

impl Counts {
    /// Number of creations that wait for this template, reservations included.
    fn queued(&self, template: Vmid) -> usize {
        let kept = self.kept.values().filter(|kept| kept.template == template).count();
        self.queued.get(&template).copied().unwrap_or_default() + kept
    }

    fn leave_queue(&mut self, template: Vmid) {
        if let Some(queued) = self.queued.get_mut(&template) {
            *queued -= 1;
            if *queued == 0 {
                self.queued.remove(&template);
            }
        }
    }

    fn start_ms(&self) -> u32 {
        let mut times: Vec<u32> = self.start_ms.iter().copied().collect();
        times.sort_unstable();
        times.get(times.len() / 2).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
