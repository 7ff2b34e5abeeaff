//! Deletes a sandbox, at any point of its life. Final.

use std::sync::Arc;

use proto::{
    Reason,
    id::SandboxId,
    sandbox::v1::{EventKind, Phase, Sandbox},
};
use tokio::time::{Instant, timeout_at};

use super::Change;
use crate::{
    inventory::Entry,
    node::Origin,
    sandbox::{Caller, Error, RETRY, Result, Sandboxes, WAIT},
};

const DELETE: Change = Change {
    asked: Some(EventKind::DeleteAsked),
    effects: &[EventKind::Deleted],
    is_bounded: false,
};

impl Sandboxes {
    /// Deletes a sandbox. Deleting a deleted one succeeds; one that takes long is DELETING.
    ///
    /// # Errors
    /// When there is none, or its node cannot be asked: it is not deleted then.
    pub async fn delete(self: &Arc<Self>, caller: &Caller, id: &str) -> Result<Sandbox> {
        let deadline = Instant::now() + WAIT;
        let mut entry = self.find(&caller.team, id)?;
        // One deletion cancels a creation, which may take long. The others wait here: whoever hangs up leaves nothing
        // behind.
        let mut turn = None;
        if entry.creating {
            let next = timeout_at(deadline, self.cancelling.lock(entry.id)).await;
            turn = Some(next.map_err(|_| being_cancelled(&entry.id))?);
            entry = self.entry(&entry.id)?;
        }
        // A task of its own: the store must not know alone that a creation is cancelled, and what comes up all the same
        // is deleted.
        let (this, caller) = (Arc::clone(self), caller.clone());
        let deleted = self.to_its_end(caller.permit.clone(), async move {
            let _turn = turn;
            this.delete_entry(&caller, entry, deadline).await
        });
        deleted.await
    }

    async fn delete_entry(
        &self,
        caller: &Caller,
        mut entry: Entry,
        deadline: Instant,
    ) -> Result<Sandbox> {
        self.may_change()?;
        if !entry.ended() {
            self.log_request(caller, &entry, DELETE);
        }
        if entry.creating {
            entry = self.cancel_creation(entry, deadline).await?;
        }
        if entry.ended() {
            return Ok(self.nodes.cache.view(&entry));
        }
        let node = self.reachable(&entry)?;
        let epoch = self.nodes.epoch.get();
        let wait = deadline.saturating_duration_since(Instant::now());
        let deleted = match node.client.calls(Origin::Caller, &entry.team) {
            Ok(calls) => calls.delete(epoch, &entry.id, wait).await,
            Err(full) => Err(full),
        };
        let answer = match deleted {
            // There is nothing to delete, and the owner no longer wants it.
            Err(error) if error.is_not_found() => {
                tracing::warn!(sandbox_id = %entry.id, node = %node.name,
                    "sandbox deleted that its node does not know");
                let mut sandbox = entry.sandbox.clone();
                sandbox.set_phase(Phase::Deleted);
                Ok(sandbox)
            }
            answer => answer,
        };
        let answer = answer.map(|sandbox| (sandbox, ()));
        self.finish_change(&entry, &node, DELETE, answer).await.map(|(sandbox, ())| sandbox)
    }

    /// Cancels a creation and waits until nothing of it is left, or until it turns out to be up.
    async fn cancel_creation(&self, entry: Entry, deadline: Instant) -> Result<Entry> {
        // Durable first: after a restart the creation must not be carried out.
        self.store.cancel(&entry.id).await?;
        if let Some(creation) = self.creations.lock().get(&entry.id) {
            creation.cancel();
        }
        let mut changes = self.nodes.cache.watch(entry.id);
        loop {
            changes.mark_unchanged();
            let entry = self.entry(&entry.id)?;
            if !entry.creating {
                return Ok(entry);
            }
            if entry.node.is_some() {
                self.reachable(&entry)?;
            }
            let changed = tokio::select! {
                changed = timeout_at(deadline, changes.changed()) => changed.is_ok(),
                () = self.stop.cancelled() => false,
            };
            if !changed {
                return Err(being_cancelled(&entry.id));
            }
        }
    }

    fn entry(&self, id: &SandboxId) -> Result<Entry> {
        let name = proto::id::SandboxRef::Id(*id);
        self.nodes.cache.get(&name).ok_or_else(|| Error::not_found(&name))
    }
}

/// Builds the error about a creation whose cancellation takes longer than its caller may wait.
fn being_cancelled(id: &SandboxId) -> Error {
    let message = format!("{id} is being cancelled; ask again");
    Error::new(Reason::OutcomeUnknown, message).retry(RETRY)
}
