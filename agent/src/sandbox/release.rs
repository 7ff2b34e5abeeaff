//! Releasing a sandbox: its record ends, and its container stays, as no sandbox. Undoes an
//! adoption, and ends a sandbox whose container is no longer its own, which the agent must not
//! remove.

use std::{sync::Arc, time::Duration};

use proto::{
    Cause, Progress, Reason,
    id::{SandboxId, SandboxRef, Vmid},
};
use tokio::time::Instant;

use super::{
    Error, Event, Sandboxes,
    drift::ContainerLocation,
    operations::{OperationContext, OperationKind},
};
use crate::journal::{Phase, Record};

impl Sandboxes {
    /// Releases the sandbox; thaws a paused one. Returns when that is done, or after `wait` with
    /// the record as it is then.
    ///
    /// # Errors
    /// When there is no such sandbox; NOT_ADOPTED when its container is its own and was made for
    /// it: delete it instead; or when the mark cannot be removed yet: the reconciler continues.
    pub async fn release(
        self: &Arc<Self>,
        id: &SandboxId,
        wait: Duration,
    ) -> Result<Arc<Record>, Error> {
        let id = *id;
        self.living_or_going(&id)?;
        let operation = self.launch(id, OperationKind::Release, |sandboxes, context| async move {
            sandboxes.release_now(&id, &context).await
        });
        self.outcome(operation, wait).await
    }

    async fn release_now(
        &self,
        id: &SandboxId,
        context: &OperationContext,
    ) -> Result<Arc<Record>, Error> {
        let _turn = context.turn(Instant::now() + self.options.limits.turn).await?;
        let record = self.living_or_going(id)?;
        if matches!(record.phase, Phase::Creating | Phase::Undoing) {
            let why = format!("{id} is being created: delete it");
            return Err(Error::new(Reason::NotAdopted, why));
        }
        let Some(place) = self.place(&record).await? else {
            let why = "without quorum nobody can tell where its container is";
            return Err(Error::new(Reason::NoQuorum, why).retry_after(Duration::from_secs(2)));
        };
        if matches!(place, ContainerLocation::Here { .. }) {
            if !record.adopted {
                let why = format!("container {} was made for {id}: delete it", record.vmid);
                return Err(Error::new(Reason::NotAdopted, why));
            }
            self.records
                .amend(id, |record| {
                    record.progress = Progress::Release;
                    Ok(())
                })
                .await?;
            self.pve.thaw(record.vmid, id).await?;
            self.pve.release(record.vmid, id).await?;
            self.pve.unmark(record.vmid, id).await?;
        }
        tracing::warn!(sandbox_id = %id, vmid = %record.vmid, "sandbox released, container kept");
        self.advance_because(id, Event::Released, Cause::Released, |record| record.failure = None)
            .await
    }

    /// Finds a live sandbox, also one that is being deleted: that can be released, too.
    pub(super) fn living_or_going(&self, id: &SandboxId) -> Result<Arc<Record>, Error> {
        self.records.live(id).ok_or_else(|| super::reads::not_found(&SandboxRef::Id(*id)))
    }

    /// Removes a mark that a power cut brought back after the release.
    ///
    /// # Errors
    /// When the config cannot be written.
    pub async fn unmark(&self, id: &SandboxId, vmid: Vmid) -> Result<(), Error> {
        self.pve.unmark(vmid, id).await.map_err(Error::from)
    }
}
