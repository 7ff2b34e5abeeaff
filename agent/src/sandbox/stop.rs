//! Stopping a sandbox: its disk stays, its memory does not.

use std::{sync::Arc, time::Duration};

use proto::{
    id::{SandboxId, SandboxRef},
    reason,
};
use tokio::time::Instant;

use super::{
    Error, Event, Sandboxes,
    flights::{Crew, Kind},
};
use crate::journal::{Failure, Phase, Record};

impl Sandboxes {
    /// Stops the sandbox on a task of its own; answers when it is down, or after `wait` with the
    /// sandbox as it is by then. One that is stopped stays as it is.
    ///
    /// # Errors
    /// When there is no such sandbox, or it could not be stopped.
    pub async fn stop(
        self: &Arc<Self>,
        id: &SandboxId,
        wait: Duration,
    ) -> Result<Arc<Record>, Error> {
        let record = self.living(&SandboxRef::Id(*id))?;
        if record.phase == Phase::Stopped {
            return Ok(record);
        }
        let id = *id;
        let flight = self.launch(id, Kind::Stop, |sandboxes, crew| async move {
            sandboxes.stop_now(&id, &crew).await
        });
        self.outcome(id, flight, wait).await
    }

    async fn stop_now(&self, id: &SandboxId, crew: &Crew) -> Result<Arc<Record>, Error> {
        let limits = &self.options.limits;
        let _turn = crew.turn(Instant::now() + limits.turn).await?;
        let record = self.living(&SandboxRef::Id(*id))?;
        if record.phase == Phase::Stopped {
            return Ok(record);
        }
        let record = self.advance(id, Event::StopAsked, |record| record.failure = None).await?;
        self.pve.stop(record.vmid, limits.stop).await?;
        self.advance(id, Event::WentDown, |_| {}).await
    }

    /// Takes note of a sandbox that should run and does not, if that is so.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub async fn note_down(
        self: &Arc<Self>,
        id: &SandboxId,
        wait: Duration,
    ) -> Result<Arc<Record>, Error> {
        let id = *id;
        let flight = self.launch(id, Kind::Stop, |sandboxes, crew| async move {
            sandboxes.note_down_now(&id, &crew).await
        });
        self.outcome(id, flight, wait).await
    }

    async fn note_down_now(&self, id: &SandboxId, crew: &Crew) -> Result<Arc<Record>, Error> {
        let _turn = crew.turn(Instant::now() + self.options.limits.turn).await?;
        let record = self.living(&SandboxRef::Id(*id))?;
        // Looked at again with nobody at work: it may have been a stop of ours.
        if record.phase != Phase::Running || self.pve.running(record.vmid).await {
            return Ok(record);
        }
        self.advance(id, Event::FoundDown, |record| {
            record.failure = Some(Failure {
                reason: reason::SANDBOX_NOT_RUNNING.into(),
                message: "it was found stopped: it ended by itself, or its node was rebooted"
                    .into(),
                rollback: String::new(),
            });
        })
        .await
    }
}
