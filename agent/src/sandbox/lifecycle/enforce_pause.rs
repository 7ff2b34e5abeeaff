//! Enforces a sandbox's phase on its container, as far as pausing goes: PAUSED is frozen and
//! locked, any other phase is neither. Used by the reconciler, and after a resume.

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt;
use proto::{
    Reason,
    id::{SandboxId, SandboxRef},
};

use crate::{
    journal::{Phase, Record},
    sandbox::{Result, Sandboxes, core::operations::OperationKind},
};

impl Sandboxes {
    /// Enforces the pause state on its own task. Idempotent.
    ///
    /// # Errors
    /// When something prevents it, such as somebody else's lock; it can be tried again.
    pub async fn enforce_pause(
        self: &Arc<Self>,
        id: &SandboxId,
        wait: Duration,
    ) -> Result<Arc<Record>> {
        self.operate(id, OperationKind::EnforcePause, wait, |sandboxes, id| {
            sandboxes.enforce_pause_now(id).boxed()
        })
        .await
    }

    pub(in crate::sandbox) async fn enforce_pause_now(
        &self,
        id: &SandboxId,
    ) -> Result<Arc<Record>> {
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
                self.pve.release_pause_lock(record.vmid, id).await?;
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
