//! Boots a stopped sandbox.

use std::{sync::Arc, time::Duration};

use proto::{
    Reason,
    id::{SandboxId, SandboxRef},
    sandbox::v1::{EventKind, Phase, Sandbox},
};
use tokio::time::timeout;

use super::Change;
use crate::{
    inventory::Entry,
    node::{GrowthGuard, SandboxCalls},
    placement::Growth,
    sandbox::{Caller, Result, Sandboxes, WAIT},
};

const START: Change =
    Change { asked: Some(EventKind::StartAsked), effects: &[EventKind::Started], is_bounded: true };

/// Longest time for which a start counts that its node has not begun: an agent waits at most 180 s for the end of
/// other work on the sandbox, and as long for one of its places for starts.
const HELD_MAX: Duration = Duration::from_secs(2 * 180 + 10);

impl Sandboxes {
    /// Boots a sandbox. A running one stays as it is; one that takes long is STARTING, or still STOPPED while it
    /// waits for its turn on the node.
    ///
    /// # Errors
    /// When there is none, it is being created or deleted, or its node does not do it; MEMORY_FULL,
    /// NO_CAPACITY or NEVER_FITS when its node has no room for it now.
    pub async fn start(self: &Arc<Self>, caller: &Caller, id: &str) -> Result<Sandbox> {
        let id = self.find(&caller.team, id)?.id;
        // A task of its own: when the caller hangs up, the node boots it all the same, and what it is to have
        // counts until then.
        let (this, caller) = (self.clone(), caller.clone());
        let permit = caller.permit.clone();
        self.to_its_end(permit, async move { this.start_counted(&caller, id).await }).await
    }

    /// Boots a sandbox whose size is reserved until its node counts it.
    async fn start_counted(self: &Arc<Self>, caller: &Caller, id: SandboxId) -> Result<Sandbox> {
        let name = id.to_string();
        let (before, node) = self.on_node(&caller.team, &name)?;
        let size = before.sandbox.size.unwrap_or_default().into();
        let admit = || self.admit_growth(&node, &Growth::start(id, size));
        let stopped = before.sandbox.phase() == Phase::Stopped;
        let mut counted = stopped.then(admit).transpose()?;
        let start =
            |calls: SandboxCalls, epoch, id| async move { calls.start(epoch, &id, WAIT).await };
        let mut change = std::pin::pin!(self.change(caller, &name, START, start));
        let answer = tokio::select! {
            answer = change.as_mut() => answer,
            () = self.until_begun(&before), if counted.is_some() => {
                // From here on the node counts it: with the reservation it would count twice.
                drop(counted.take());
                change.await
            }
        };
        // What still waits on the node may boot as asked for.
        let waits = match &answer {
            Ok(sandbox) => sandbox.phase() == Phase::Stopped,
            Err(error) => error.reason == Reason::OutcomeUnknown,
        };
        if let Some(counted) = counted.filter(|_| waits) {
            self.count_until_begun(before, counted);
        }
        answer
    }

    /// Counts the size of a sandbox that was stopped `before` until its node has begun to boot it.
    fn count_until_begun(self: &Arc<Self>, before: Entry, counted: GrowthGuard) {
        let this = self.clone();
        self.tasks.spawn(async move {
            let _counted = counted;
            // Whatever comes first: the begin, the longest time, or the end of the controller.
            let begun = async { timeout(HELD_MAX, this.until_begun(&before)).await.ok() };
            this.stop.run_until_cancelled(begun).await;
        });
    }

    /// Waits until a sandbox that was stopped `before` has begun to boot, or does so no more on that node.
    async fn until_begun(&self, before: &Entry) {
        let mut changes = self.nodes.cache.watch(before.id);
        // A boot that fails soon is seen by its number alone.
        let waits = |now: Entry| {
            now.node == before.node
                && now.sandbox.phase() == Phase::Stopped
                && now.sandbox.boot == before.sandbox.boot
        };
        loop {
            changes.mark_unchanged();
            let now = self.nodes.cache.get(&SandboxRef::Id(before.id));
            if !now.is_some_and(waits) || changes.changed().await.is_err() {
                return;
            }
        }
    }
}
