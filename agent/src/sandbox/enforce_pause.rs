//! Enforces a sandbox's phase on its container, as far as pausing goes: PAUSED is frozen and
//! locked, any other phase is neither. Used by the reconciler, and after a resume.

use std::{sync::Arc, time::Duration};

use proto::{
    Reason,
    id::{SandboxId, SandboxRef},
};
use tokio::time::Instant;

use super::{
    Error, Sandboxes,
    operations::{OperationContext, OperationKind},
};
use crate::journal::{Phase, Record};

impl Sandboxes {
    /// Enforces the pause state on its own task. Idempotent.
    ///
    /// # Errors
    /// When something prevents it, such as somebody else's lock; it can be tried again.
    pub async fn enforce_pause(
        self: &Arc<Self>,
        id: &SandboxId,
        wait: Duration,
    ) -> Result<Arc<Record>, Error> {
        let id = *id;
        let operation =
            self.launch(id, OperationKind::EnforcePause, |sandboxes, context| async move {
                sandboxes.enforce_pause_now(&id, &context).await
            });
        self.outcome(operation, wait).await
    }

    pub(super) async fn enforce_pause_now(
        &self,
        id: &SandboxId,
        context: &OperationContext,
    ) -> Result<Arc<Record>, Error> {
        let _turn = context.turn(Instant::now() + self.options.limits.turn).await?;
        let record = self.living(&SandboxRef::Id(*id))?;
        match record.phase {
            Phase::Paused => match self.make_paused(&record).await {
                Ok(()) => {}
                // No caller waits for this: the sandbox keeps running, and its record says why.
                Err(error) if error.reason == Reason::FreezeFailed => {
                    self.run_on(&record, &error).await?;
                }
                // For example a backup that an operator made possible. The intended phase stays.
                Err(error) => return Err(error),
            },
            Phase::Running | Phase::Stopped => {
                self.pve.thaw(record.vmid, id).await?;
                self.pve.release(record.vmid, id).await?;
            }
            // Another operation works on it, or will.
            Phase::Creating
            | Phase::Undoing
            | Phase::Starting
            | Phase::Stopping
            | Phase::Deleting
            | Phase::Deleted
            | Phase::Failed => {}
        }
        self.living(&SandboxRef::Id(*id))
    }
}
