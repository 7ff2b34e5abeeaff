//! Making a container what its sandbox's phase says, as far as a pause goes: PAUSED is frozen and
//! locked, everything else is neither. For the reconciler, and behind a resume.

use std::{sync::Arc, time::Duration};

use proto::{
    Reason,
    id::{SandboxId, SandboxRef},
};
use tokio::time::Instant;

use super::{
    Error, Sandboxes,
    flights::{Crew, Kind},
};
use crate::journal::{Phase, Record};

impl Sandboxes {
    /// Settles on a task of its own. True when it is repeated.
    ///
    /// # Errors
    /// When something is in the way, such as somebody else's lock; it can be tried again.
    pub async fn settle(
        self: &Arc<Self>,
        id: &SandboxId,
        wait: Duration,
    ) -> Result<Arc<Record>, Error> {
        let id = *id;
        let flight = self.launch(id, Kind::Settle, |sandboxes, crew| async move {
            sandboxes.settle_now(&id, &crew).await
        });
        self.outcome(flight, wait).await
    }

    pub(super) async fn settle_now(
        &self,
        id: &SandboxId,
        crew: &Crew,
    ) -> Result<Arc<Record>, Error> {
        let _turn = crew.turn(Instant::now() + self.options.limits.turn).await?;
        let record = self.living(&SandboxRef::Id(*id))?;
        match record.phase {
            Phase::Paused => match self.make_paused(&record).await {
                Ok(()) => {}
                // Nobody is there to hear of it: it runs on, and its record says why.
                Err(error) if error.reason == Reason::FreezeFailed => {
                    self.run_on(&record, &error).await?;
                }
                // A backup that an operator made possible, say. It stays what it is to be.
                Err(error) => return Err(error),
            },
            Phase::Running | Phase::Stopped => {
                self.pve.thaw(record.vmid, id).await?;
                self.pve.release(record.vmid, id).await?;
            }
            // Another operation has it, or will.
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
