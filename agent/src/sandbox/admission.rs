//! Who may come in, and how many there are. The decisions are pure; the gate counts.

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

/// Share of a thin pool that may be in use: one that is full stops everything that is on it.
const THIN_USED_MAX: f64 = 0.95;

/// What a creation is admitted on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts {
    /// The agent is stopping.
    pub(super) stopping: bool,
    /// What an operator wants of the node.
    pub(super) intake: Intake,
    /// The cluster can be changed.
    pub(super) quorate: bool,
    /// The node's number in the cluster is not the one that its ranges go by.
    pub(super) renumbered: Option<Renumbered>,
    /// Room on the storage that the clone goes to.
    pub(super) room: StorageRoom,
    /// Creations that wait for a turn at the template.
    pub(super) queued: usize,
    /// What a start took lately.
    pub(super) start: Duration,
    /// The memory; `None` before the host was looked at.
    pub(super) memory: Option<Memory>,
}

/// The memory that a creation is admitted on, bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Memory {
    /// What the sandbox may use.
    pub(super) asked: u64,
    /// The sum of what all others that are in may use.
    pub(super) given: u64,
    /// What there is.
    pub(super) total: u64,
    /// What can be had of it.
    pub(super) available: u64,
}

impl Memory {
    /// Why one more does not fit.
    #[expect(clippy::cast_precision_loss, reason = "exact below 2^52 bytes")]
    fn full(&self, limits: &Limits) -> Option<String> {
        let Self { asked, given, total, available } = *self;
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        if (given + asked) as f64 > limits.memory_overcommit * total as f64 {
            return Some(format!(
                "{:.1} GiB of {:.1} are handed out, {:.1} more are too much",
                gib(given),
                gib(total),
                gib(asked)
            ));
        }
        let used = total.saturating_sub(available) + asked / 2;
        (used as f64 > limits.memory_used_max * total as f64)
            .then(|| format!("{:.1} GiB of {:.1} can be had", gib(available), gib(total)))
    }
}

/// Whether the node takes one more.
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

/// What is to be done about an order, by what is known of its id and of its request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Recall {
    /// Nothing is known: make it.
    New,
    /// It was made, or is being made: the same answer.
    Same(SandboxId),
}

/// Recalls. One sandbox for a request, one creation for an attempt.
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

/// What matters of a creation that is known already, or under way.
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
    /// The body of a sandbox that was recovered is not known any more: any will do.
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

/// How long a seat is kept for a creation that may come.
const SEAT_KEPT: Duration = Duration::from_secs(2);

/// A seat that is kept.
#[derive(Debug, Clone, Copy)]
struct Kept {
    size: Size,
    template: Vmid,
    until: Instant,
}

/// How many starts the median is of.
const STARTS_KEPT: usize = 16;

/// Counts who is in.
#[derive(Debug, Clone, Default)]
pub(super) struct Gate(Arc<Mutex<Counts>>);

#[derive(Debug, Default)]
struct Counts {
    /// Creations that are in, with their memory: they have no record before their intent is durable.
    creations: BTreeMap<SandboxId, (Summary, u64)>,
    /// Seats for creations that may come: they count as if they were in, until their time is over.
    kept: BTreeMap<SandboxId, Kept>,
    /// Waiting for a turn, by template.
    queued: BTreeMap<Vmid, usize>,
    starting: usize,
    start_ms: VecDeque<u32>,
}

impl Gate {
    /// Holds the gate: nobody comes in beside whoever holds it. A seat that is kept for `id` is
    /// whoever's who holds it.
    pub(super) fn hold(&self, id: &SandboxId) -> Held<'_> {
        let mut counts = self.lock();
        counts.kept.remove(id);
        Held { gate: self, counts }
    }

    /// Gives back a seat that is kept.
    pub(super) fn give_back(&self, id: &SandboxId) {
        self.lock().kept.remove(id);
    }

    /// What the seats that are kept would be given.
    pub(super) fn kept(&self) -> Vec<Size> {
        self.lock().kept.values().map(|kept| kept.size).collect()
    }

    /// Lets a start in.
    pub(super) fn start(&self) -> Seat {
        self.lock().starting += 1;
        Seat { gate: self.clone(), creation: None, queued: None }
    }

    /// The creation of this id that is in.
    pub(super) fn creation(&self, id: &SandboxId) -> Option<Summary> {
        self.lock().creations.get(id).map(|(known, _)| known.clone())
    }

    /// Waiting and starting.
    pub(super) fn counts(&self) -> (usize, usize) {
        let counts = self.lock();
        (counts.queued.values().sum::<usize>() + counts.kept.len(), counts.starting)
    }

    /// Waiting for this template.
    pub(super) fn queued(&self, template: Vmid) -> usize {
        self.lock().queued(template)
    }

    /// Remembers what a start took.
    pub(super) fn took(&self, duration: Duration) {
        let mut counts = self.lock();
        if counts.start_ms.len() == STARTS_KEPT {
            counts.start_ms.pop_front();
        }
        counts.start_ms.push_back(u32::try_from(duration.as_millis()).unwrap_or(u32::MAX));
    }

    /// Median of what starts took lately, milliseconds; 0 when there was none.
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

/// The gate while somebody is at it.
#[derive(Debug)]
pub(super) struct Held<'a> {
    gate: &'a Gate,
    counts: MutexGuard<'a, Counts>,
}

impl Held<'_> {
    /// The creation of this id that is in.
    pub(super) fn by_id(&self, id: &SandboxId) -> Option<Summary> {
        self.counts.creations.get(id).map(|(known, _)| known.clone())
    }

    /// The creation for this request that is in.
    pub(super) fn by_request(&self, team: &Team, request_id: &RequestId) -> Option<Summary> {
        let mut creations = self.counts.creations.values().map(|(known, _)| known);
        creations.find(|known| known.team == *team && known.request_id == *request_id).cloned()
    }

    /// Bytes that the creations which are in, or may come, may use.
    pub(super) fn memory(&self) -> u64 {
        let inside: u64 = self.counts.creations.values().map(|(_, bytes)| bytes).sum();
        inside + self.counts.kept.values().map(|kept| kept.size.memory_bytes()).sum::<u64>()
    }

    /// Waiting for this template.
    pub(super) fn queued(&self, template: Vmid) -> usize {
        self.counts.queued(template)
    }

    /// What a start took lately.
    pub(super) fn start(&self) -> Duration {
        Duration::from_millis(self.counts.start_ms().into())
    }

    /// Keeps a seat for a creation that may come.
    pub(super) fn keep(mut self, id: SandboxId, size: Size, template: Vmid) {
        let until = Instant::now() + SEAT_KEPT;
        self.counts.kept.insert(id, Kept { size, template, until });
    }

    /// Lets a creation in, at the end of the template's queue.
    pub(super) fn admit(mut self, order: &Order, memory: u64, template: Vmid) -> Seat {
        self.counts.creations.insert(order.id, (order.into(), memory));
        *self.counts.queued.entry(template).or_default() += 1;
        Seat { gate: self.gate.clone(), creation: Some(order.id), queued: Some(template) }
    }
}

/// A place among those that are in. Dropped, however its task ends, it counts no more.
#[derive(Debug)]
pub(super) struct Seat {
    gate: Gate,
    creation: Option<SandboxId>,
    /// The template that it waits for; `None` once it is starting.
    queued: Option<Vmid>,
}

impl Seat {
    /// Its turn has come.
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
    /// Waiting for this template, or kept a seat to do so.
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
