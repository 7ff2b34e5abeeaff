//! Letting go of a sandbox: its record ends, its container stays as it is and is nobody's sandbox any
//! more. The way back from an adoption, and the way out for a sandbox whose container is not its own
//! any more, which nothing of ours may remove.

use std::{sync::Arc, time::Duration};

use proto::{
    Cause, Progress, Reason,
    id::{SandboxId, SandboxRef, Vmid},
};
use tokio::time::Instant;

use super::{
    Error, Event, Sandboxes,
    flights::{Crew, Kind},
    look::Place,
};
use crate::journal::{Phase, Record};

impl Sandboxes {
    /// Lets go of it; a paused one is thawed. Answers when that is done, or after `wait` with the
    /// sandbox as it is by then.
    ///
    /// # Errors
    /// When there is no such sandbox; NOT_ADOPTED when its container is its own and was made for it:
    /// that one is deleted; or when the mark cannot be taken off yet, and the reconciler goes on.
    pub async fn release(
        self: &Arc<Self>,
        id: &SandboxId,
        wait: Duration,
    ) -> Result<Arc<Record>, Error> {
        let id = *id;
        self.living_or_going(&id)?;
        let flight = self.launch(id, Kind::Release, |sandboxes, crew| async move {
            sandboxes.release_now(&id, &crew).await
        });
        self.outcome(flight, wait).await
    }

    async fn release_now(&self, id: &SandboxId, crew: &Crew) -> Result<Arc<Record>, Error> {
        let _turn = crew.turn(Instant::now() + self.options.limits.turn).await?;
        let record = self.living_or_going(id)?;
        if matches!(record.phase, Phase::Creating | Phase::Undoing) {
            let why = format!("{id} is being created: delete it");
            return Err(Error::new(Reason::NotAdopted, why));
        }
        let Some(place) = self.place(&record).await? else {
            let why = "without quorum nobody can tell where its container is";
            return Err(Error::new(Reason::NoQuorum, why).retry_after(Duration::from_secs(2)));
        };
        if matches!(place, Place::Here { .. }) {
            if !record.adopted {
                let why = format!("container {} was made for {id}: delete it", record.vmid);
                return Err(Error::new(Reason::NotAdopted, why));
            }
            self.amend(id, |record| {
                record.progress = Progress::Release;
                Ok(())
            })
            .await?;
            self.pve.thaw(record.vmid, id).await?;
            self.pve.release(record.vmid, id).await?;
            self.pve.unmark(record.vmid, id).await?;
        }
        tracing::warn!(sandbox_id = %id, vmid = %record.vmid, "its container was let go");
        self.advance_because(id, Event::Released, Cause::Released, |record| record.failure = None)
            .await
    }

    /// One that is being deleted may be let go, too.
    pub(super) fn living_or_going(&self, id: &SandboxId) -> Result<Arc<Record>, Error> {
        self.index.live(id).ok_or_else(|| super::reads::not_found(&SandboxRef::Id(*id)))
    }

    /// A power cut can bring the mark back after the end: it is taken off again.
    ///
    /// # Errors
    /// When the config cannot be written.
    pub async fn unmark(&self, id: &SandboxId, vmid: Vmid) -> Result<(), Error> {
        self.pve.unmark(vmid, id).await.map_err(Error::from)
    }
}
