//! Stopping a sandbox: its disk is kept, its memory is lost.

use std::{sync::Arc, time::Duration};

use proto::{
    Cause, Reason,
    id::{SandboxId, SandboxRef},
};
use tokio::time::Instant;

use super::{
    Error, Event, Sandboxes,
    operations::{OperationContext, OperationKind},
    undo,
};
use crate::{
    journal::{Failure, Phase, Record},
    pve::hold,
};

impl Sandboxes {
    /// Stops the sandbox on its own task; returns when it is down, or after `wait` with the record
    /// as it is then. A stopped sandbox stays as it is.
    ///
    /// # Errors
    /// When there is no such sandbox, or it could not be stopped: the message says whether it stays
    /// as it is (CONTAINER_LOCKED while somebody else holds PVE's lock on it, NO_QUORUM while
    /// pmxcfs is unavailable), or whether the stop is tried again.
    pub async fn stop(
        self: &Arc<Self>,
        id: &SandboxId,
        wait: Duration,
    ) -> Result<Arc<Record>, Error> {
        self.stop_because(id, Cause::ASKED, wait).await
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
        let operation = self.launch(id, OperationKind::Stop, |sandboxes, context| async move {
            sandboxes.stop_now(&id, cause, &context).await
        });
        self.outcome(operation, wait).await
    }

    async fn stop_now(
        &self,
        id: &SandboxId,
        cause: Cause,
        context: &OperationContext,
    ) -> Result<Arc<Record>, Error> {
        let _turn = context.turn(Instant::now() + self.options.limits.turn).await?;
        let record = self.living(&SandboxRef::Id(*id))?;
        if record.phase == Phase::Stopped || self.no_longer_due(&record, cause) {
            return Ok(record);
        }
        self.stop_in_turn(id, cause, None).await
    }

    /// Stops the sandbox in the caller's turn; `why` is set if a stop as such was not requested.
    pub(super) async fn stop_in_turn(
        &self,
        id: &SandboxId,
        cause: Cause,
        why: Option<Failure>,
    ) -> Result<Arc<Record>, Error> {
        let record = self.living(&SandboxRef::Id(*id))?;
        if record.phase != Phase::Stopping {
            self.check_stoppable(&record).await?;
        }
        let record = self
            .advance_because(id, Event::StopAsked, cause, |record| record.failure = why.clone())
            .await?;
        match self.stop_container(&record).await {
            Ok(()) => self.advance(id, Event::WentDown, |_| {}).await,
            Err(error) => Err(self.stop_failed(&record, error).await?),
        }
    }

    /// Refuses a stop that PVE would refuse, because somebody else holds its lock on the container
    /// or the config cannot be read. Writes nothing: the sandbox stays as it is.
    async fn check_stoppable(&self, record: &Record) -> Result<(), Error> {
        let Record { id, vmid, .. } = record;
        let as_it_is = |error: Error| {
            let message = format!("{}; {id} stays as it is: stop it again", error.message);
            Error { message, ..error }
        };
        let config = self.pve.config(*vmid).await.map_err(|error| as_it_is(error.into()))?;
        let foreign = config.filter(|config| {
            config.mark() == Some(record.mark()) && !hold::leaves(config) && config.lock().is_some()
        });
        match foreign.as_ref().and_then(|config| config.lock()) {
            Some(lock) if self.pve.running(*vmid).await => {
                let message = format!("CT {vmid} is locked ({lock})");
                let error = Error::new(Reason::ContainerLocked, message);
                Err(as_it_is(error.retry_after(Duration::from_secs(2))))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Handles a stop that failed after its intent was written; returns the error for the caller.
    /// Takes the stop back if a lock came in between and the container runs; else continues it.
    async fn stop_failed(&self, record: &Record, error: Error) -> Result<Error, Error> {
        let Record { id, vmid, .. } = record;
        let runs_on = error.reason == Reason::ContainerLocked
            && self.pve.running(*vmid).await
            && !self.pve.frozen(*vmid).await;
        if !runs_on {
            let message = format!("{}; that is tried again until {id} is down", error.message);
            return Ok(Error { message, ..error });
        }
        let failure = undo::failure(&error);
        self.advance(id, Event::StopRefused, |record| record.failure = Some(failure.clone()))
            .await?;
        Ok(Error { message: format!("{}; {id} runs on: stop it again", error.message), ..error })
    }

    /// Stops the container, if it is the sandbox's own. A missing container does not run.
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
