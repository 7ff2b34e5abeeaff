//! Deleting a sandbox, for good and from every phase.
//!
//! | step | undo |
//! |---|---|
//! | cancel a creation or a start, do not wait for a shutdown | none |
//! | DELETING in the journal | none: from here on it is certain to end |
//! | destroy the container and its own volumes | none: repeated by the reconciler |
//! | DELETED in the journal, a tombstone | none |

use std::{sync::Arc, time::Duration};

use proto::id::{SandboxId, SandboxRef};
use tokio::time::Instant;

use proto::Cause;

use super::undo;
use crate::{
    journal::{Phase, Record},
    sandbox::{
        Error, Event, Known, Result, Sandboxes,
        core::{
            operations::{OperationContext, OperationKind},
            queries,
        },
    },
};

impl Sandboxes {
    /// Deletes the sandbox on its own task; returns when it is gone, or after `wait` with the
    /// record as it is then. A deleted sandbox stays deleted; a creation is rolled back first.
    ///
    /// # Errors
    /// When there is no such sandbox, or it could not be removed yet: it stays DELETING for the
    /// reconciler.
    pub async fn delete(self: &Arc<Self>, id: &SandboxId, wait: Duration) -> Result<Arc<Record>> {
        self.delete_because(id, Cause::ASKED, wait).await
    }

    pub(in crate::sandbox) async fn delete_because(
        self: &Arc<Self>,
        id: &SandboxId,
        cause: Cause,
        wait: Duration,
    ) -> Result<Arc<Record>> {
        let name = SandboxRef::Id(*id);
        match self.known(&name) {
            None => return Err(queries::not_found(&name)),
            Some(Known::Ended(ended)) if ended.phase == Phase::Deleted => {
                return self.get(&name).await;
            }
            Some(Known::Ended(_) | Known::Live(_)) => {}
        }
        let id = *id;
        let kind = OperationKind::Delete;
        let is_gone = |record: &Record| record.phase.ended();
        let work = move |sandboxes: Arc<Self>, context: OperationContext| async move {
            sandboxes.delete_now(&id, cause, &context).await
        };
        let operation = self.launch_because(cause, (id, kind), is_gone, work);
        self.outcome(operation, wait).await
    }

    async fn delete_now(
        &self,
        id: &SandboxId,
        cause: Cause,
        context: &OperationContext,
    ) -> Result<Arc<Record>> {
        let limits = &self.options.limits;
        if cause == Cause::ASKED {
            self.cancel_operations(id).await?;
        }
        let _turn = context.turn(Instant::now() + limits.turn).await?;
        if cause != Cause::ASKED {
            let record = self.living(&SandboxRef::Id(*id))?;
            if self.no_longer_due(&record, cause) {
                return Ok(record);
            }
        }
        let record = self.advance_because(id, Event::DeleteAsked, cause, |_| {}).await?;
        if record.phase.ended() {
            return Ok(record);
        }
        // `destroy_owned` checks mark, vmid and sandbox_id once more, right before it destroys.
        let Record { vmid, volumes, .. } = &*record;
        if let Err(error) = self.pve.destroy_owned(*vmid, id, volumes, limits.destroy).await {
            let error = Error::from(error);
            tracing::error!(sandbox_id = %id, vmid = %record.vmid, %error, "sandbox was not removed");
            self.records
                .change(id, |record| {
                    record.failure = Some(undo::failure(&error));
                })
                .await?;
            let message = format!("{}; that is tried again until {id} is gone", error.message);
            return Err(Error { message, ..error });
        }
        let record = self.advance(id, Event::Removed, |record| record.failure = None).await?;
        self.isolate_after_change(id).await;
        Ok(record)
    }

    /// Cancels a creation or a start: undoing is faster than waiting for the end. A stop under way
    /// no longer waits for the sandbox to shut down.
    async fn cancel_operations(&self, id: &SandboxId) -> Result<()> {
        if let Some(creation) = self.admission.creation(id) {
            // Durable first: a crash from here on must not bring the creation up again.
            self.records.cancel(id, creation.attempt, self.now_ms()).await?;
        }
        for kind in [
            OperationKind::Create,
            OperationKind::Start,
            OperationKind::Stop,
            OperationKind::PauseOrStop,
        ] {
            if let Some(operation) = self.operations.find(id, kind) {
                operation.cancel();
            }
        }
        Ok(())
    }
}
