//! Lock and counters of admission: what was admitted and has no record yet, what is reserved, and
//! what starts.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, MutexGuard},
    time::Duration,
};

use daemon::sync::Mutex;
use proto::{
    id::{SandboxId, Vmid},
    name::{RequestId, Team},
    spec::Size,
};
use tokio::time::Instant;

use super::decide::Summary;
use crate::sandbox::Order;

/// Time that a reservation lasts.
const RESERVED_FOR: Duration = Duration::from_secs(2);

/// Reservation for a creation that may come.
#[derive(Debug, Clone, Copy)]
struct Reservation {
    size: Size,
    template: Vmid,
    until: Instant,
}

/// Number of starts that the median is computed from.
const STARTS_KEPT: usize = 16;

/// Counters of admission, and its lock.
#[derive(Debug, Clone, Default)]
pub(crate) struct AdmissionLock(Arc<Mutex<Counts>>);

#[derive(Debug, Default)]
struct Counts {
    /// Admitted creations and their memory, bytes: until the intent is durable they have no record.
    creations: BTreeMap<SandboxId, (Summary, u64)>,
    /// Reservations: they count as admitted creations until they expire.
    reserved: BTreeMap<SandboxId, Reservation>,
    /// Memory of sandboxes whose growth is admitted and not in their records yet, bytes.
    growing: u64,
    /// Number of creations that wait, by template and team.
    queued: BTreeMap<Vmid, BTreeMap<Team, usize>>,
    starting: usize,
    start_ms: VecDeque<u32>,
}

impl AdmissionLock {
    /// Locks admission: no other creation is admitted while the guard lives. A reservation for `id`
    /// passes to the holder of the guard.
    pub(crate) fn lock(&self, id: &SandboxId) -> AdmissionGuard<'_> {
        let mut counts = self.counts_now();
        counts.reserved.remove(id);
        AdmissionGuard { admission: self, counts }
    }

    /// Cancels a reservation.
    pub(crate) fn cancel_reservation(&self, id: &SandboxId) {
        self.counts_now().reserved.remove(id);
    }

    /// Sizes of all reservations.
    pub(crate) fn reserved(&self) -> Vec<Size> {
        self.counts_now().reserved.values().map(|reserved| reserved.size).collect()
    }

    /// Counts a start until the returned value is dropped.
    pub(crate) fn count_start(&self) -> CountGuard {
        self.counts_now().starting += 1;
        CountGuard { admission: self.clone(), creation: None, queued: None }
    }

    /// Returns the admitted creation with this id.
    pub(crate) fn creation(&self, id: &SandboxId) -> Option<Summary> {
        self.counts_now().creations.get(id).map(|(known, _)| known.clone())
    }

    /// Numbers of creations that wait, reservations included, and of those that start.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let counts = self.counts_now();
        let queued: usize = counts.queued.values().flat_map(BTreeMap::values).sum();
        (queued + counts.reserved.len(), counts.starting)
    }

    /// Number of creations that wait for this template, reservations included.
    pub(crate) fn queued(&self, template: Vmid) -> usize {
        self.counts_now().queued(template)
    }

    /// Remembers the duration of a start.
    pub(crate) fn note_start(&self, duration: Duration) {
        let mut counts = self.counts_now();
        if counts.start_ms.len() == STARTS_KEPT {
            counts.start_ms.pop_front();
        }
        counts.start_ms.push_back(u32::try_from(duration.as_millis()).unwrap_or(u32::MAX));
    }

    /// Median duration of recent starts, milliseconds; 0 when there was none.
    pub(crate) fn start_ms(&self) -> u32 {
        self.counts_now().start_ms()
    }

    fn counts_now(&self) -> MutexGuard<'_, Counts> {
        let mut counts = self.0.lock();
        if !counts.reserved.is_empty() {
            let now = Instant::now();
            counts.reserved.retain(|_, reserved| now < reserved.until);
        }
        counts
    }
}

/// Guard of the admission lock.
#[derive(Debug)]
pub(crate) struct AdmissionGuard<'a> {
    admission: &'a AdmissionLock,
    counts: MutexGuard<'a, Counts>,
}

impl AdmissionGuard<'_> {
    pub(crate) fn by_id(&self, id: &SandboxId) -> Option<Summary> {
        self.counts.creations.get(id).map(|(known, _)| known.clone())
    }

    pub(crate) fn by_request(&self, team: &Team, request_id: &RequestId) -> Option<Summary> {
        let mut creations = self.counts.creations.values().map(|(known, _)| known);
        creations.find(|known| known.team == *team && known.request_id == *request_id).cloned()
    }

    /// Sum of the memory of admitted creations, reservations and growth, bytes.
    pub(crate) fn memory(&self) -> u64 {
        let inside: u64 = self.counts.creations.values().map(|(_, bytes)| bytes).sum();
        let reserved = self.counts.reserved.values();
        let reserved: u64 = reserved.map(|reserved| reserved.size.memory_bytes()).sum();
        inside + reserved + self.counts.growing
    }

    /// Admits the growth of a sandbox by `bytes`.
    pub(crate) fn grow(mut self, bytes: u64) -> GrowthGuard {
        self.counts.growing += bytes;
        GrowthGuard { admission: self.admission.clone(), bytes }
    }

    pub(crate) fn queued(&self, template: Vmid) -> usize {
        self.counts.queued(template)
    }

    /// Number of creations of this team that wait for this template, without reservations: those do
    /// not say their team.
    pub(crate) fn queued_of(&self, team: &Team, template: Vmid) -> usize {
        let teams = self.counts.queued.get(&template);
        teams.and_then(|teams| teams.get(team)).copied().unwrap_or_default()
    }

    /// Median duration of recent starts.
    pub(crate) fn start(&self) -> Duration {
        Duration::from_millis(self.counts.start_ms().into())
    }

    /// Reserves room for a creation that may come.
    pub(crate) fn reserve(mut self, id: SandboxId, size: Size, template: Vmid) {
        let until = Instant::now() + RESERVED_FOR;
        self.counts.reserved.insert(id, Reservation { size, template, until });
    }

    /// Admits a creation, at the end of the template's queue.
    pub(crate) fn admit(mut self, order: &Order, memory: u64, template: Vmid) -> CountGuard {
        self.counts.creations.insert(order.id, (order.into(), memory));
        let teams = self.counts.queued.entry(template).or_default();
        *teams.entry(order.team.clone()).or_default() += 1;
        CountGuard {
            admission: self.admission.clone(),
            creation: Some(order.id),
            queued: Some((template, order.team.clone())),
        }
    }
}

/// Counts the growth of a sandbox until it is dropped, however its task ends.
#[derive(Debug)]
pub(crate) struct GrowthGuard {
    admission: AdmissionLock,
    bytes: u64,
}

impl Drop for GrowthGuard {
    fn drop(&mut self) {
        self.admission.counts_now().growing -= self.bytes;
    }
}

/// Counts a creation or a start until it is dropped, however its task ends.
#[derive(Debug)]
pub(crate) struct CountGuard {
    admission: AdmissionLock,
    creation: Option<SandboxId>,
    /// Template that it waits for, and its team; `None` once it is starting.
    queued: Option<(Vmid, Team)>,
}

impl CountGuard {
    /// Leaves the queue and counts as starting.
    pub(crate) fn start(&mut self) {
        let mut counts = self.admission.counts_now();
        if let Some((template, team)) = self.queued.take() {
            counts.leave_queue(template, &team);
            counts.starting += 1;
        }
    }
}

impl Drop for CountGuard {
    fn drop(&mut self) {
        let mut counts = self.admission.counts_now();
        if let Some(id) = &self.creation {
            counts.creations.remove(id);
        }
        match &self.queued {
            Some((template, team)) => counts.leave_queue(*template, team),
            None => counts.starting -= 1,
        }
    }
}

impl Counts {
    /// Number of creations that wait for this template, reservations included.
    fn queued(&self, template: Vmid) -> usize {
        let reserved =
            self.reserved.values().filter(|reserved| reserved.template == template).count();
        let waiting = self.queued.get(&template).map_or(0, |teams| teams.values().sum());
        waiting + reserved
    }

    fn leave_queue(&mut self, template: Vmid, team: &Team) {
        let Some(teams) = self.queued.get_mut(&template) else { return };
        if let Some(queued) = teams.get_mut(team) {
            *queued -= 1;
        }
        teams.retain(|_, queued| *queued > 0);
        if teams.is_empty() {
            self.queued.remove(&template);
        }
    }

    fn start_ms(&self) -> u32 {
        let mut times: Vec<u32> = self.start_ms.iter().copied().collect();
        times.sort_unstable();
        times.get(times.len() / 2).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::tests::{id, order, vmid};

    #[test]
    fn creations_and_starts_are_counted_until_their_guards_drop() {
        let admission = AdmissionLock::default();
        let template = vmid(9000);
        let mut first = admission.lock(&order(1).id).admit(&order(1), 5, template);
        let second = admission.lock(&order(2).id).admit(&order(2), 7, template);
        assert_eq!((admission.counts(), admission.queued(template)), ((2, 0), 2));
        assert_eq!(admission.lock(&order(9).id).memory(), 12);
        let blue = Order { team: "blue".parse().expect("valid"), ..order(3) };
        let third = admission.lock(&blue.id).admit(&blue, 1, template);
        let of_teams = |admission: &AdmissionLock| {
            let guard = admission.lock(&order(9).id);
            [&order(1).team, &blue.team].map(|team| guard.queued_of(team, template))
        };
        assert_eq!((of_teams(&admission), admission.queued(template)), ([2, 1], 3));
        drop(third);
        assert_eq!(of_teams(&admission), [2, 0]);
        first.start();
        first.start();
        let started = admission.count_start();
        assert_eq!((admission.counts(), admission.queued(template)), ((1, 2), 1));
        assert_eq!(of_teams(&admission), [1, 0]);
        assert_eq!(admission.creation(&id(2)).map(|creation| creation.attempt), Some(1));
        drop((first, second, started));
        assert_eq!((admission.counts(), admission.creation(&id(2))), ((0, 0), None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_reservation_counts_until_it_is_used_cancelled_or_expired() {
        let admission = AdmissionLock::default();
        let template = vmid(9000);
        let size = Size { cpu_cores: 2, memory_mib: 64, disk_gib: 0 };
        let full = |admission: &AdmissionLock| {
            (admission.counts().0, admission.queued(template), admission.reserved().len())
        };
        for number in [1, 2, 3] {
            admission.lock(&id(number)).reserve(id(number), size, template);
        }
        assert_eq!(full(&admission), (3, 3, 3));
        assert_eq!(
            admission.lock(&id(1)).memory(),
            2 * size.memory_bytes(),
            "the own one does not count"
        );
        admission.cancel_reservation(&id(2));
        let counted = admission.lock(&id(3)).admit(&order(3), size.memory_bytes(), template);
        assert_eq!(full(&admission), (1, 1, 0), "that of the creation alone");
        admission.lock(&id(4)).reserve(id(4), size, template);
        tokio::time::advance(RESERVED_FOR - Duration::from_millis(1)).await;
        assert_eq!(full(&admission), (2, 2, 1));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(full(&admission), (1, 1, 0));
        drop(counted);
    }

    #[test]
    fn median_start_time_is_that_of_the_latest_starts() {
        let admission = AdmissionLock::default();
        assert_eq!(admission.start_ms(), 0);
        for seconds in 1..=32 {
            admission.note_start(Duration::from_secs(seconds));
        }
        assert_eq!(admission.start_ms(), 25_000);
    }
}
