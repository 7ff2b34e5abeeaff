//! Stopping a sandbox: its disk is kept, its memory is lost. It gets some time to shut down by itself.
//!
//! | step | undo |
//! |---|---|
//! | check that PVE will accept a stop | nothing was written |
//! | STOPPING in the journal | RUNNING again, if a lock came in between and the container runs |
//! | thaw the container, ask its init to shut down, wait | none: repeated after a crash |
//! | kill the container, if it still runs | none: repeated by the reconciler until it is down |
//! | STOPPED in the journal | none |

use std::{sync::Arc, time::Duration};

use proto::{
    Cause, Reason,
    id::{SandboxId, SandboxRef},
    sandbox::v1::StopResult,
};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::undo;
use crate::{
    journal::{Failure, Phase, Record},
    pve::{ErrorKind, pause_lock},
    sandbox::{
        Error, Event, Sandboxes,
        core::operations::{self, OperationContext, OperationKind},
    },
};

/// Interval between two looks at a container that shuts down.
const LOOK: Duration = Duration::from_millis(100);

/// A stop, with what is left of its sandbox's life in its hands.
#[derive(Debug)]
pub(in crate::sandbox) struct Stop<'a> {
    pub(in crate::sandbox) cause: Cause,
    /// Failure that made a stop of another operation.
    pub(in crate::sandbox) why: Option<Failure>,
    /// Time that the sandbox gets to shut down by itself.
    pub(in crate::sandbox) grace: Duration,
    /// Cancelled when the sandbox is to be killed at once, because somebody deletes it.
    pub(in crate::sandbox) hurry: &'a CancellationToken,
}

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
        self.stop_because(id, Cause::ASKED, None, wait).await
    }

    /// Stops the sandbox as `stop` does, with `grace` to shut down by itself in place of the node's
    /// default. A shorter time applies to a stop that is under way, too.
    ///
    /// # Errors
    /// As `stop`.
    pub async fn stop_within(
        self: &Arc<Self>,
        id: &SandboxId,
        grace: Duration,
        wait: Duration,
    ) -> Result<Arc<Record>, Error> {
        self.stop_because(id, Cause::ASKED, Some(grace), wait).await
    }

    pub(in crate::sandbox) async fn stop_because(
        self: &Arc<Self>,
        id: &SandboxId,
        cause: Cause,
        grace: Option<Duration>,
        wait: Duration,
    ) -> Result<Arc<Record>, Error> {
        let record = self.living(&SandboxRef::Id(*id))?;
        if record.phase == Phase::Stopped {
            return Ok(record);
        }
        let id = *id;
        if let Some(grace) = grace.filter(|_| record.phase == Phase::Stopping) {
            self.shorten_grace(&id, grace).await?;
        }
        let grace = grace.unwrap_or(self.options.limits.grace);
        let kind = OperationKind::Stop;
        let is_down = |record: &Record| record.phase == Phase::Stopped;
        let work = move |sandboxes: Arc<Self>, context: OperationContext| async move {
            sandboxes.stop_now(&id, cause, grace, &context).await
        };
        let operation = self.launch_because(cause, (id, kind), is_down, work);
        if grace.is_zero() {
            // Also for a stop that was asked for before, and still waits for its turn.
            operation.cancel();
        }
        self.outcome(operation, wait).await
    }

    async fn shorten_grace(self: &Arc<Self>, id: &SandboxId, grace: Duration) -> Result<(), Error> {
        let now = self.clock.moment();
        self.amend_living(id, move |record| {
            let later = record.halt_by.as_ref().is_some_and(|by| !by.reached(&now.after(grace)));
            if record.phase == Phase::Stopping && later {
                record.halt_by = Some(now.after(grace));
            }
            Ok(())
        })
        .await
        .map(drop)
    }

    async fn stop_now(
        &self,
        id: &SandboxId,
        cause: Cause,
        grace: Duration,
        context: &OperationContext,
    ) -> Result<Arc<Record>, Error> {
        let _turn = context.turn(Instant::now() + self.options.limits.turn).await?;
        let record = self.living(&SandboxRef::Id(*id))?;
        if record.phase == Phase::Stopped || self.no_longer_due(&record, cause) {
            return Ok(record);
        }
        self.stop_in_turn(id, Stop { cause, why: None, grace, hurry: context.cancelled() }).await
    }

    /// Stops the sandbox in the caller's turn.
    pub(in crate::sandbox) async fn stop_in_turn(
        &self,
        id: &SandboxId,
        stop: Stop<'_>,
    ) -> Result<Arc<Record>, Error> {
        let record = self.living(&SandboxRef::Id(*id))?;
        // One that a crash cut short goes on, with what is left of its time.
        let begins = record.phase != Phase::Stopping;
        if begins {
            self.check_stoppable(&record).await?;
        }
        let by = (!stop.grace.is_zero()).then(|| self.clock.moment().after(stop.grace));
        let record = self
            .advance_because(id, Event::StopAsked, stop.cause, |record| {
                if begins {
                    record.failure.clone_from(&stop.why);
                    record.halt_by.clone_from(&by);
                }
            })
            .await?;
        let result = self.shut_down(&record, stop.hurry).await?;
        match self.stop_container(&record).await {
            Ok(()) => self.advance(id, Event::WentDown, |record| record.stop_result = result).await,
            Err(error) => Err(self.stop_failed(&record, error).await?),
        }
    }

    /// Asks the container to shut down, and waits for it, at most until the record's `halt_by`. Holds
    /// neither a turn of `pct` nor PVE's lock. Returns how it ended, or is to end.
    ///
    /// # Errors
    /// When the agent stops: the next one goes on.
    async fn shut_down(
        &self,
        record: &Record,
        hurry: &CancellationToken,
    ) -> Result<StopResult, Error> {
        let Record { id, vmid, .. } = record;
        if !self.pve.running(*vmid).await {
            return Ok(StopResult::Unspecified);
        }
        if record.halt_by.is_none() {
            return Ok(StopResult::Killed);
        }
        if let Err(error) = self.pve.thaw(*vmid, id).await {
            tracing::warn!(sandbox_id = %id, %error, "sandbox could not be thawed to shut down");
            return Ok(StopResult::Killed);
        }
        let mut asked = false;
        let mut init = None;
        let mut by = None;
        let mut deadline = Instant::now();
        loop {
            if !asked {
                match self.pve.halt(*vmid, id).await {
                    Ok(()) => {
                        asked = true;
                        init = self.pve.init(*vmid).await;
                    }
                    // Not yet: it has just been started.
                    Err(error) if matches!(error.kind, ErrorKind::WrongState(_)) => {}
                    Err(error) => {
                        tracing::warn!(sandbox_id = %id, %error, "sandbox could not be asked to shut down");
                        return Ok(StopResult::Killed);
                    }
                }
            }
            if !self.pve.running(*vmid).await {
                return Ok(StopResult::ShutDown);
            }
            if let Some(init) = init {
                self.pve.recheck_ended(init).await;
            }
            // Another call may have shortened it meanwhile.
            let now = self.living(&SandboxRef::Id(*id))?;
            if now.halt_by != by {
                by.clone_from(&now.halt_by);
                let left = by.as_ref().map(|by| by.left(&self.clock.moment()));
                deadline = Instant::now() + left.unwrap_or_default();
            }
            if Instant::now() >= deadline {
                tracing::info!(sandbox_id = %id, "sandbox did not shut down in time, killing it");
                return Ok(StopResult::Killed);
            }
            tokio::select! {
                biased;
                () = hurry.cancelled() => return Ok(StopResult::Killed),
                () = self.tasks.stopping().cancelled() => return Err(operations::lost()),
                () = sleep(LOOK) => {}
            }
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
            config.mark() == Some(record.mark())
                && !pause_lock::is_noted(config)
                && config.lock().is_some()
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
    /// Takes the stop back if a lock came in between and the container runs as before; else continues
    /// it, as when the container was asked to shut down.
    async fn stop_failed(&self, record: &Record, error: Error) -> Result<Error, Error> {
        let Record { id, vmid, .. } = record;
        let runs_on = error.reason == Reason::ContainerLocked
            && record.halt_by.is_none()
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
    pub(in crate::sandbox) async fn stop_container(&self, record: &Record) -> Result<(), Error> {
        match self.pve.config(record.vmid).await? {
            Some(config) if config.mark() == Some(record.mark()) => {
                let stopped = self.pve.stop(record.vmid, self.options.limits.stop).await;
                stopped.map_err(Error::from)
            }
            Some(_) | None => Ok(()),
        }
    }
}
