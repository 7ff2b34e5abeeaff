//! Ends sandboxes as the rules of their lifetimes say: every second, with or without a controller.
//! `expiry` decides what is due and is pure; this module checks whether a sandbox that seems
//! idle is in use after all, and acts.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use proto::id::{SandboxId, SandboxRef};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use proto::{Cause, lifetime::Action};

use super::meter::{self, Reading, Thresholds};
use crate::{
    journal::{Phase, Record},
    pve::Connection,
    sandbox::{Due, Sandboxes, exec::Execs},
};

/// Interval between two passes.
const TICK: Duration = Duration::from_secs(1);
/// Most concurrent operations: expiry must not crowd out callers.
const PARALLEL: usize = 4;
/// Longest wait for one operation: it then continues by itself, and an operation that hangs does
/// not delay the expiry of others.
const WAIT: Duration = Duration::from_secs(20);
/// Longest wait for a stop to begin: it gives its sandbox time to shut down, and others are due too.
const STOP_WAIT: Duration = Duration::from_secs(1);
/// Pause before a failed expiry is tried again.
const AGAIN: Duration = Duration::from_secs(60);
/// Longest wait for a shim to list its commands.
const LIST: Duration = Duration::from_secs(5);

/// Task that ends, stops and pauses sandboxes as their lifetimes say.
#[derive(Debug)]
pub struct Expiry {
    sandboxes: Arc<Sandboxes>,
    execs: Execs,
    /// Sandboxes whose expiry failed, and when it is tried again.
    later: HashMap<SandboxId, Instant>,
    /// Last readings of the running sandboxes that have an idle rule.
    readings: HashMap<SandboxId, Reading>,
}

impl Expiry {
    /// Makes the task; `run` runs it.
    pub fn new(sandboxes: Arc<Sandboxes>, execs: Execs) -> Self {
        Self { sandboxes, execs, later: HashMap::new(), readings: HashMap::new() }
    }

    /// Runs a pass every second until the agent stops.
    pub async fn run(mut self) {
        let stop = self.sandboxes.tasks().stopping().clone();
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
                _ = self.pass() => {}
            }
        }
    }

    /// Runs one pass. Returns what was done.
    pub async fn pass(&mut self) -> Vec<(SandboxId, Due)> {
        let now = Instant::now();
        self.later.retain(|_, at| *at > now);
        self.read_meters(now).await;
        let due = self.sandboxes.due();
        let due = due.into_iter().filter(|(record, _)| !self.later.contains_key(&record.id));
        let done: Vec<_> = stream::iter(due)
            .map(|(record, due)| self.expire_one(record, due))
            .buffer_unordered(PARALLEL)
            .collect()
            .await;
        let mut done_with = Vec::new();
        for (id, due, done) in done {
            match done {
                Some(true) => done_with.push((id, due)),
                Some(false) => drop(self.later.insert(id, Instant::now() + AGAIN)),
                None => {}
            }
        }
        done_with
    }

    /// Reads what the sandboxes with an idle rule move and use, each once in its window.
    async fn read_meters(&mut self, now: Instant) {
        let live = self.sandboxes.live();
        let ruled =
            |record: &Arc<Record>| record.phase == Phase::Running && record.lifetime.idle_ms > 0;
        let ruled: HashMap<_, _> =
            live.into_iter().filter(ruled).map(|record| (record.id, record)).collect();
        self.readings.retain(|id, _| ruled.contains_key(id));
        let is_due = |record: &Arc<Record>| {
            let last = self.readings.get(&record.id);
            last.is_none_or(|last| now.duration_since(last.at) >= meter::window(&record.lifetime))
        };
        let due: Vec<_> = ruled.into_values().filter(is_due).collect();
        let readings: Vec<_> = stream::iter(due)
            .map(|record| self.look(record))
            .buffer_unordered(PARALLEL)
            .collect()
            .await;
        self.readings.extend(readings);
    }

    /// Reads a sandbox's meters, and records a use if they show one since the last reading.
    async fn look(&self, record: Arc<Record>) -> (SandboxId, Reading) {
        let (id, pve) = (record.id, self.sandboxes.pve());
        let cpu_percent = record.lifetime.idle_cpu;
        let cpu_us = async {
            let usage = if cpu_percent > 0 { pve.usage(record.vmid).await } else { None };
            usage.map(|usage| usage.cpu_us)
        };
        let (connections, cpu_us) = tokio::join!(pve.connections(record.vmid), cpu_us);
        let bytes = |all: Vec<Connection>| all.iter().map(|one| (one.id, one.bytes)).collect();
        let now = Reading { at: Instant::now(), connections: connections.map(bytes), cpu_us };
        let silent_bytes = self.sandboxes.options().lifetimes.silent_bytes;
        let rules = Thresholds { silent_bytes, cpu_percent };
        if let Some(sign) = meter::sign(self.readings.get(&id), &now, rules) {
            tracing::debug!(sandbox_id = %id, ?sign, "sandbox is in use");
            self.sandboxes.used(&id);
        }
        (id, now)
    }

    /// Expires a sandbox. True when that succeeded, false when it failed, `None` when it was not
    /// due after all.
    async fn expire_one(&self, record: Arc<Record>, due: Due) -> (SandboxId, Due, Option<bool>) {
        let id = record.id;
        if due.cause == Cause::Idle && self.is_used(&record).await {
            return (id, due, None);
        }
        tracing::info!(sandbox_id = %id, cause = due.cause.name(), action = ?due.action, "sandbox expired");
        let wait = if due.action == Action::Stop { STOP_WAIT } else { WAIT };
        let done = self.sandboxes.expire(&id, due, wait).await;
        if let Err(error) = &done {
            tracing::warn!(sandbox_id = %id, %error, "sandbox could not be expired");
        }
        (id, due, Some(done.is_ok()))
    }

    /// True when a sandbox that seems idle is in use: it has moved bytes or used CPU time since the
    /// last reading, or a command is active. The use is recorded.
    async fn is_used(&self, record: &Arc<Record>) -> bool {
        let idle = Duration::from_millis(record.lifetime.idle_ms);
        // The reading is not kept: the next one is compared with the one before, over a whole window.
        self.look(Arc::clone(record)).await;
        if self.sandboxes.unused(&record.id) < idle {
            return true;
        }
        let name = SandboxRef::Id(record.id);
        let unused = match timeout(LIST, self.execs.inactive(&name)).await {
            Ok(Ok(inactive)) => inactive,
            // Its shim exists and does not answer: a command may be active.
            Ok(Err(_)) | Err(_) => Some(Duration::ZERO),
        };
        match unused {
            Some(unused) if unused < idle => {
                self.sandboxes.used_before(&record.id, unused);
                true
            }
            Some(_) | None => false,
        }
    }
}
