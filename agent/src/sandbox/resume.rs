//! Resuming a paused sandbox: thaws it, then removes its lock.

use std::{sync::Arc, time::Duration};

use proto::id::{SandboxId, SandboxRef};
use tokio::time::Instant;

use super::{
    Error, Event, Sandboxes,
    operations::{OperationContext, OperationKind},
    write::refused,
};
use crate::journal::{Phase, Record};

impl Sandboxes {
    /// Thaws the sandbox on its own task; returns when it runs, or after `wait` with the record as
    /// it is then. A running sandbox stays as it is.
    ///
    /// # Errors
    /// When there is no such sandbox, it is neither paused nor running, or it could not be thawed:
    /// then the record says RUNNING, and the reconciler thaws it.
    pub async fn resume(
        self: &Arc<Self>,
        id: &SandboxId,
        wait: Duration,
    ) -> Result<Arc<Record>, Error> {
        let record = self.living(&SandboxRef::Id(*id))?;
        if record.phase == Phase::Running && !self.busy().contains(id) {
            return Ok(record);
        }
        let id = *id;
        let operation = self.launch(id, OperationKind::Resume, |sandboxes, context| async move {
            sandboxes.resume_now(&id, &context).await
        });
        self.outcome(operation, wait).await
    }

    async fn resume_now(
        self: &Arc<Self>,
        id: &SandboxId,
        context: &OperationContext,
    ) -> Result<Arc<Record>, Error> {
        let _turn = context.turn(Instant::now() + self.options.limits.turn).await?;
        let record = self.living(&SandboxRef::Id(*id))?;
        if record.phase == Phase::Running {
            return Ok(record);
        }
        if record.phase != Phase::Paused {
            return Err(refused(&record, Event::ResumeAsked));
        }
        let now = self.clock.moment();
        // In parallel: if a crash lets only one of them happen, the reconciler makes the host match
        // the record, and nobody has had an answer yet.
        let (record, thawed) = tokio::join!(
            self.advance(id, Event::ResumeAsked, |record| {
                record.failure = None;
                record.lifetime.renew(&now);
            }),
            self.pve.thaw(record.vmid, id),
        );
        let record = record?;
        thawed?;
        // Launched while this operation is under way, so that the sandbox is never idle and locked.
        self.enforce_pause_later(id);
        Ok(record)
    }

    /// Removes the lock in the background.
    fn enforce_pause_later(self: &Arc<Self>, id: &SandboxId) {
        let id = *id;
        let operation =
            self.launch(id, OperationKind::EnforcePause, |sandboxes, context| async move {
                sandboxes.enforce_pause_now(&id, &context).await
            });
        drop(operation);
    }
}
