//! Exposes ports because something in the sandbox listens on them, where the sandbox has that rule. The host reads the
//! table of sockets of the container's network namespace; nothing enters the sandbox.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use proto::{id::SandboxId, name::Port};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::{
    journal::{Phase, Record},
    sandbox::{Result, Sandboxes},
};

/// Shortest interval between two looks at a sandbox that has the rule. A look takes 3 ms of the host's CPU, because the
/// kernel goes through the sockets of all namespaces.
const TICK: Duration = Duration::from_secs(3);
/// Longest interval between two looks at a sandbox, unless there are too many.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Part of the time since a sandbox changed that passes between two looks at it: 3 s for 2 minutes, 30 s after 20.
const QUIET_PART: u32 = 40;
/// Most sandboxes that are looked at in one interval: about 4 % of a core.
const AT_ONCE: usize = 40;
/// Time after which the rest of them waits for the next interval.
const ALL: Duration = Duration::from_secs(10);
/// Longest wait for one table.
const LOOK: Duration = Duration::from_secs(5);

impl Sandboxes {
    /// Exposes what begins to listen, until the agent stops.
    pub async fn follow_listeners(self: Arc<Self>) {
        let stop = self.tasks.stopping().clone();
        let mut schedule = Schedule::default();
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = self.look_when_due(&mut schedule) => {}
            }
        }
    }

    /// Looks once at every running sandbox that has the rule. Returns the ports that were exposed.
    #[cfg(test)]
    pub async fn expose_listening(self: &Arc<Self>) -> Vec<(SandboxId, Port)> {
        let mut exposed = Vec::new();
        for record in self.ruled() {
            let ports = self.expose_listening_in(&record).await;
            exposed.extend(ports.into_iter().map(|port| (record.id, port)));
        }
        exposed
    }

    /// Returns the running sandboxes whose rule may open a port.
    fn ruled(&self) -> Vec<Arc<Record>> {
        let is_ruled = |record: &Arc<Record>| {
            let rule = record.access.listen.as_ref();
            record.phase == Phase::Running && rule.is_some_and(|rule| !rule.is_full())
        };
        self.live().into_iter().filter(is_ruled).collect()
    }

    async fn look_when_due(self: &Arc<Self>, schedule: &mut Schedule) {
        let begun = Instant::now();
        for record in schedule.due(begun, self.ruled()) {
            if begun.elapsed() > ALL {
                break;
            }
            self.expose_listening_in(&record).await;
            schedule.looked(&record.id, begun);
        }
    }

    /// Looks once at a sandbox. Returns the ports that were exposed.
    async fn expose_listening_in(self: &Arc<Self>, record: &Record) -> BTreeSet<Port> {
        let listeners = timeout(LOOK, self.pve.listeners(record.vmid)).await;
        let mut ports = new_ports(record, &listeners.unwrap_or_default());
        if ports.is_empty() {
            return ports;
        }
        match self.open_listening(&record.id, ports.clone()).await {
            Ok(after) => {
                ports.retain(|port| after.visibility(*port).is_some());
                for port in &ports {
                    tracing::info!(sandbox_id = %record.id, %port, "port is exposed: something listens on it");
                }
                ports
            }
            // The next look tries again.
            Err(error) => {
                tracing::warn!(sandbox_id = %record.id, %error, "a listening port was not exposed");
                BTreeSet::new()
            }
        }
    }

    async fn open_listening(
        self: &Arc<Self>,
        id: &SandboxId,
        ports: BTreeSet<Port>,
    ) -> Result<Arc<Record>> {
        self.amend_living(id, move |record| {
            // It may have stopped, or a caller may have hidden a port since the look.
            if record.phase == Phase::Running {
                for port in &ports {
                    record.open_listening(*port);
                }
            }
            Ok(())
        })
        .await
    }
}

/// Times of the next looks. A sandbox that changes is looked at often, one that does not less and less.
#[derive(Debug, Default)]
struct Schedule(BTreeMap<SandboxId, Watched>);

#[derive(Debug)]
struct Watched {
    revision: u64,
    /// Time at which its record was first seen with this revision.
    changed: Instant,
    next: Instant,
}

impl Schedule {
    /// Returns the sandboxes to look at now, at most 40: those first that have waited longest. All others than
    /// `records` are forgotten.
    fn due(&mut self, now: Instant, records: Vec<Arc<Record>>) -> Vec<Arc<Record>> {
        let ids: BTreeSet<_> = records.iter().map(|record| record.id).collect();
        self.0.retain(|id, _| ids.contains(id));
        let mut due = Vec::new();
        for record in records {
            let fresh = Watched { revision: record.revision, changed: now, next: now };
            let known = self.0.entry(record.id).or_insert(fresh);
            if known.revision != record.revision {
                let next = known.next.min(now);
                *known = Watched { revision: record.revision, changed: now, next };
            }
            // Ticks are not exact.
            if known.next <= now + TICK / 2 {
                due.push((known.next, record));
            }
        }
        due.sort_by_key(|(next, _)| *next);
        due.into_iter().take(AT_ONCE).map(|(_, record)| record).collect()
    }

    fn looked(&mut self, id: &SandboxId, now: Instant) {
        if let Some(known) = self.0.get_mut(id) {
            let quiet = now.saturating_duration_since(known.changed);
            known.next = now + (quiet / QUIET_PART).clamp(TICK, PAUSE_MAX);
        }
    }
}

/// Returns the ports that other hosts can reach and that the rule of the sandbox would open. Pure.
fn new_ports(record: &Record, listeners: &[SocketAddr]) -> BTreeSet<Port> {
    let reachable = listeners.iter().filter(|at| !at.ip().to_canonical().is_loopback());
    let ports: BTreeSet<Port> =
        reachable.filter_map(|at| Port::try_from(u32::from(at.port())).ok()).collect();
    // In a copy, so that a look at a sandbox with nothing new takes no lock and writes nothing.
    let mut after = record.clone();
    ports.into_iter().filter(|port| after.open_listening(*port)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::conformance;

    /// Counts the looks at each of so many sandboxes, by number, in a time after which they have been quiet.
    fn looks(count: u8, after: Duration, time: Duration, changed: Option<u8>) -> BTreeMap<u8, u32> {
        let mut records: Vec<_> = (0..count).map(conformance::record).collect();
        let (mut schedule, start) = (Schedule::default(), Instant::now());
        let (mut looks, mut passed) = (BTreeMap::new(), Duration::ZERO);
        while passed < after + time {
            if let Some(number) = changed {
                records[usize::from(number)].revision += 1;
            }
            let due = schedule.due(start + passed, records.iter().cloned().map(Arc::new).collect());
            assert!(due.len() <= AT_ONCE, "{}", due.len());
            for record in due {
                schedule.looked(&record.id, start + passed);
                let number = (0..count).find(|number| conformance::id(*number) == record.id);
                if passed >= after {
                    *looks.entry(number.expect("one of them")).or_default() += 1;
                }
            }
            passed += TICK;
        }
        looks
    }

    const MINUTE: Duration = Duration::from_mins(1);

    #[test]
    fn sandbox_that_does_not_change_is_looked_at_less_and_less() {
        assert_eq!(looks(1, Duration::ZERO, 2 * MINUTE, None), [(0, 40)].into());
        assert_eq!(looks(1, 30 * MINUTE, 10 * MINUTE, None), [(0, 20)].into());
        // A change is followed at once, and leaves the others alone.
        assert_eq!(looks(2, 30 * MINUTE, MINUTE, Some(1)), [(0, 2), (1, 20)].into());
    }

    #[test]
    fn of_too_many_all_have_their_turn() {
        let looks = looks(200, Duration::ZERO, MINUTE, Some(7));
        assert_eq!(looks.len(), 200);
        assert!(looks.values().all(|count| *count >= 3), "{looks:?}");
    }
}
