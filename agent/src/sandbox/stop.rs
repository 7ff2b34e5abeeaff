//! Stopping a sandbox: its disk stays, its memory does not.

use std::{sync::Arc, time::Duration};

use proto::id::{SandboxId, SandboxRef};
use tokio::time::Instant;

use super::{
    Cause, Error, Event, Sandboxes,
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
        self.stop_because(id, Cause::Asked, wait).await
    }

    pub(super) async fn stop_because(
        self: &Arc<Self>,
        id: &SandboxId,
        cause: Cause,
        wait: Duration,
    ) -> Result<Arc<Record>, Error> {
        let record = self.living(&SandboxRef::Id(*id))?;
        if record.phase == Phase::Stopped {
            return Ok(record);
        }
        let id = *id;
        let flight = self.launch(id, Kind::Stop, |sandboxes, crew| async move {
            sandboxes.stop_now(&id, cause, &crew).await
        });
        self.outcome(flight, wait).await
    }

    async fn stop_now(
        &self,
        id: &SandboxId,
        cause: Cause,
        crew: &Crew,
    ) -> Result<Arc<Record>, Error> {
        let _turn = crew.turn(Instant::now() + self.options.limits.turn).await?;
        let record = self.living(&SandboxRef::Id(*id))?;
        if record.phase == Phase::Stopped || self.is_moot(&record, cause) {
            return Ok(record);
        }
        self.stop_in_turn(id, cause, None).await
    }

    /// Stops it in a turn that the caller has; `why`, if it was not asked for as such.
    pub(super) async fn stop_in_turn(
        &self,
        id: &SandboxId,
        cause: Cause,
        why: Option<Failure>,
    ) -> Result<Arc<Record>, Error> {
        let record = self
            .advance_because(id, Event::StopAsked, cause, |record| record.failure = why.clone())
            .await?;
        self.stop_container(&record).await?;
        self.advance(id, Event::WentDown, |_| {}).await
    }

    /// Stops the container, if it is the sandbox's own. What is not there does not run.
    pub(super) async fn stop_container(&self, record: &Record) -> Result<(), Error> {
        match self.pve.config(record.vmid).await? {
            Some(config) if config.mark() == Some(record.mark()) => {
                let stopped = self.pve.stop(record.vmid, self.options.limits.stop).await;
                stopped.map_err(Error::from)
            }
            Some(_) | None => Ok(()),
        }
    }
}
