//! Ends sandboxes as the rules of their lifetimes say: every second, with or without a controller.
//! `expiry` decides what is due and is pure; this module checks whether a sandbox that seems
//! idle is in use after all, and acts.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use proto::id::{SandboxId, SandboxRef};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use proto::{Cause, lifetime::Action};

use crate::{
    journal::Record,
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

#[derive(Debug)]
pub struct Expiry {
    sandboxes: Arc<Sandboxes>,
    execs: Execs,
    /// Sandboxes whose expiry failed, and when it is tried again.
    later: HashMap<SandboxId, Instant>,
}

impl Expiry {
    pub fn new(sandboxes: Arc<Sandboxes>, execs: Execs) -> Self {
        Self { sandboxes, execs, later: HashMap::new() }
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

    /// Expires a sandbox. True when that succeeded, false when it failed, `None` when it was not
    /// due after all.
    async fn expire_one(&self, record: Arc<Record>, due: Due) -> (SandboxId, Due, Option<bool>) {
        let id = record.id;
        if due.cause == Cause::Idle
            && let Some(unused) = self.unused(&record).await
            && unused < Duration::from_millis(record.lifetime.idle_ms)
        {
            self.sandboxes.used_before(&id, unused);
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

    /// Returns the time since the last use that nobody reports: an open connection to or from the
    /// sandbox, or a command that is active. `None` when there is neither.
    async fn unused(&self, record: &Record) -> Option<Duration> {
        if self.sandboxes.pve().connected(record.vmid).await {
            return Some(Duration::ZERO);
        }
        let name = SandboxRef::Id(record.id);
        match timeout(LIST, self.execs.inactive(&name)).await {
            Ok(Ok(inactive)) => inactive,
            // Its shim exists and does not answer: a command may be active.
            Ok(Err(_)) | Err(_) => Some(Duration::ZERO),
        }
    }
}
