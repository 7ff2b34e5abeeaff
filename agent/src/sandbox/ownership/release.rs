//! Releasing a sandbox: its record ends, and its container stays, as no sandbox. Undoes an
//! adoption, and ends a sandbox whose container is no longer its own, which the agent must not
//! remove.
//!
//! | step | undo |
//! |---|---|
//! | release noted in the journal | none: repeated by the reconciler |
//! | thaw, remove the lock, remove the mark | none: repeated by the reconciler |
//! | the record ends as released | none |

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt;
use proto::{
    Cause, Progress, Reason,
    id::{SandboxId, SandboxRef, Vmid},
};

use crate::{
    journal::Record,
    sandbox::{
        Error, Event, Result, Sandboxes,
        core::{operations::OperationKind, queries},
        drift::detect::ContainerLocation,
    },
};

impl Sandboxes {
    /// Releases the sandbox; thaws a paused one. Returns when that is done, or after `wait` with
    /// the record as it is then.
    ///
    /// # Errors
    /// When there is no such sandbox; NOT_ADOPTED when its container is its own and was made for
    /// it: delete it instead; or when the mark cannot be removed yet: the reconciler continues.
    pub async fn release(self: &Arc<Self>, id: &SandboxId, wait: Duration) -> Result<Arc<Record>> {
        self.living_or_going(id)?;
        self.operate(id, OperationKind::Release, wait, |sandboxes, id| {
            sandboxes.release_now(id).boxed()
        })
        .await
    }

    async fn release_now(&self, id: &SandboxId) -> Result<Arc<Record>> {
        let record = self.living_or_going(id)?;
        if record.phase.is_creation() {
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
            self.records.change(id, |record| record.progress = Progress::Release).await?;
            self.pve.thaw(record.vmid, id).await?;
            self.pve.release_pause_lock(record.vmid, id).await?;
            self.pve.unmark(record.vmid, id).await?;
        }
        tracing::warn!(sandbox_id = %id, vmid = %record.vmid, "sandbox released, container kept");
        let record = self
            .advance_because(id, Event::Released, Cause::Released, |record| record.failure = None)
            .await?;
        self.isolate_after_change(id).await;
        Ok(record)
    }

    /// Finds a live sandbox, also one that is being deleted: that can be released, too.
    pub(in crate::sandbox) fn living_or_going(&self, id: &SandboxId) -> Result<Arc<Record>> {
        self.records.index.live(id).ok_or_else(|| queries::not_found(&SandboxRef::Id(*id)))
    }

    /// Removes a mark that a power cut brought back after the release.
    ///
    /// # Errors
    /// When the config cannot be written.
    pub async fn unmark(&self, id: &SandboxId, vmid: Vmid) -> Result<()> {
        self.pve.unmark(vmid, id).await.map_err(Error::from)
    }
}
