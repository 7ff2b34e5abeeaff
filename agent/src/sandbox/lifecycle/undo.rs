//! Rollback of a creation: when it fails, when it is cancelled, and after a crash in its middle.

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt;
use proto::{
    Reason,
    id::{SandboxId, Vmid},
};

use crate::{
    journal::{Failure, Record},
    pve::{self, ErrorKind},
    saga::Saga,
    sandbox::{Error, Event, Result, Sandboxes, core::operations::OperationKind},
};

/// Text in the record of a rollback that removed something.
const REMOVED: &str = "the container and its volumes were removed";

impl Sandboxes {
    /// Rolls back a failed creation; records the failure and the rollback.
    pub(in crate::sandbox) async fn give_up(
        &self,
        saga: Saga<'_, Error>,
        id: &SandboxId,
        error: Error,
    ) -> Result<Arc<Record>> {
        tracing::warn!(sandbox_id = %id, reason = %error.reason, %error, "creation failed, undoing it");
        // Nothing is rolled back unless the failure is recorded: after a restart the journal
        // decides.
        self.advance(id, Event::CreateFailed, |record| {
            record.failure.get_or_insert_with(|| failure(&error));
        })
        .await?;
        let outcome = saga.unwind().await.map(|undone| if undone == 0 { "" } else { REMOVED });
        self.record_undo(id, outcome).await
    }

    /// Rolls back a creation that no task works on any more; does nothing when there is none.
    ///
    /// # Errors
    /// When the rollback failed; the record stays and it can be tried again.
    pub async fn undo(self: &Arc<Self>, id: &SandboxId, wait: Duration) -> Result<Arc<Record>> {
        self.operate(id, OperationKind::Undo, wait, |sandboxes, id| sandboxes.undo_now(id).boxed())
            .await
    }

    async fn undo_now(&self, id: &SandboxId) -> Result<Arc<Record>> {
        let record = self.living_or_going(id)?;
        if !record.phase.is_creation() {
            return Ok(record);
        }
        let cut_short = Error::new(
            Reason::ShuttingDown,
            format!(
                "the agent stopped in the middle of the creation, at step {}",
                record.progress.name()
            ),
        );
        let record = self
            .advance(id, Event::CreateFailed, |record| {
                record.failure.get_or_insert_with(|| failure(&cut_short));
            })
            .await?;
        let outcome = self.destroy_clone(record.id, record.vmid).await;
        self.record_undo(id, outcome.map(|()| REMOVED)).await
    }

    async fn record_undo(&self, id: &SandboxId, outcome: Result<&str>) -> Result<Arc<Record>> {
        match outcome {
            Ok(rollback) => {
                tracing::info!(sandbox_id = %id, rollback, "creation undone");
                let record =
                    self.advance(id, Event::Undone, |record| note(record, rollback)).await?;
                self.isolate_after_change(id).await;
                Ok(record)
            }
            Err(error) => {
                tracing::error!(sandbox_id = %id, %error, "creation not undone, trying again later");
                let rollback = format!("failed, is tried again: {error}");
                self.records.change(id, |record| note(record, &rollback)).await
            }
        }
    }

    /// Removes the container that a creation made under this vmid, if it did. Succeeds also when
    /// nothing was made, and when it is repeated.
    pub(in crate::sandbox) async fn destroy_clone(&self, id: SandboxId, vmid: Vmid) -> Result<()> {
        let record = self.records.index.live(&id).filter(|record| record.vmid == vmid);
        let volumes = record.map(|record| record.volumes.clone()).unwrap_or_default();
        let removed =
            self.pve.destroy_owned(vmid, &id, &volumes, self.options.limits.destroy).await;
        match removed {
            // The clone was never made, so the container there belongs to somebody else.
            Err(pve::Error { kind: ErrorKind::NotOurs(_), .. }) if !self.is_cloned(id, vmid) => {
                Ok(())
            }
            other => other.map_err(Error::from),
        }
    }

    fn is_cloned(&self, id: SandboxId, vmid: Vmid) -> bool {
        let record = self.records.index.live(&id);
        record.is_some_and(|record| record.vmid == vmid && record.progress.is_past_clone())
    }
}

/// Converts an error to the form that records keep.
pub(crate) fn failure(error: &Error) -> Failure {
    Failure { reason: error.reason, message: error.message.clone(), rollback: String::new() }
}

fn note(record: &mut Record, rollback: &str) {
    if let Some(failure) = &mut record.failure {
        rollback.clone_into(&mut failure.rollback);
    }
}
