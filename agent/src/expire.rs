//! Sees to it that sandboxes end as the rules of their lifetimes say: every second, whether or not a
//! controller is there. What is due is decided by `sandbox::due`, which is pure; here it is looked
//! whether one that seems idle is in use after all, and done.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use proto::id::{SandboxId, SandboxRef};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use proto::Cause;

use crate::{
    journal::Record,
    sandbox::{Due, Sandboxes, exec::Execs},
};

/// Between two looks.
const TICK: Duration = Duration::from_secs(1);
/// Operations at a time: what is due must not crowd out what callers want.
const PARALLEL: usize = 4;
/// How long one of them is waited for: it goes on alone after that, and one that hangs keeps nobody
/// else's time from coming.
const WAIT: Duration = Duration::from_secs(20);
/// After one that failed.
const AGAIN: Duration = Duration::from_secs(60);
/// How long a shim may take to list its commands.
const LIST: Duration = Duration::from_secs(5);

/// The driver.
#[derive(Debug)]
pub struct Expiry {
    sandboxes: Arc<Sandboxes>,
    execs: Execs,
    /// Those that failed, and when they are tried again.
    later: HashMap<SandboxId, Instant>,
}

impl Expiry {
    /// Of these sandboxes.
    pub fn new(sandboxes: Arc<Sandboxes>, execs: Execs) -> Self {
        Self { sandboxes, execs, later: HashMap::new() }
    }

    /// Looks every second until the agent is to stop.
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

    /// One look. Returns what was done.
    pub async fn pass(&mut self) -> Vec<(SandboxId, Due)> {
        let now = Instant::now();
        self.later.retain(|_, at| *at > now);
        let due = self.sandboxes.due();
        let due = due.into_iter().filter(|(record, _)| !self.later.contains_key(&record.id));
        let done: Vec<_> = stream::iter(due)
            .map(|(record, due)| self.see_to(record, due))
            .buffer_unordered(PARALLEL)
            .collect()
            .await;
        let mut seen_to = Vec::new();
        for (id, due, done) in done {
            match done {
                Some(true) => seen_to.push((id, due)),
                Some(false) => drop(self.later.insert(id, Instant::now() + AGAIN)),
                None => {}
            }
        }
        seen_to
    }

    /// True when it was done, false when it failed, nothing when it was not due after all.
    async fn see_to(&self, record: Arc<Record>, due: Due) -> (SandboxId, Due, Option<bool>) {
        let id = record.id;
        if due.cause == Cause::Idle && self.in_use(&record).await {
            self.sandboxes.used(&id);
            return (id, due, None);
        }
        tracing::info!(sandbox_id = %id, cause = due.cause.name(), action = ?due.action, "its time has come");
        let done = self.sandboxes.expire(&id, due, WAIT).await;
        if let Err(error) = &done {
            tracing::warn!(sandbox_id = %id, %error, "it lives on for now");
        }
        (id, due, Some(done.is_ok()))
    }

    /// Somebody is connected to it, or it to somebody, or a command runs in it.
    async fn in_use(&self, record: &Record) -> bool {
        if self.sandboxes.pve().connected(record.vmid).await {
            return true;
        }
        let name = SandboxRef::Id(record.id);
        match timeout(LIST, self.execs.list(&name)).await {
            Ok(Ok(list)) => list.iter().any(|exec| exec.exit.is_none() && exec.lost.is_empty()),
            // Its shim is there and does not answer: nobody can tell that nothing runs.
            Ok(Err(_)) | Err(_) => true,
        }
    }
}
