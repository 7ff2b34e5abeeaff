//! Pausing a sandbox: freezes it. Its memory is kept, and nothing in it runs.
//!
//! | step | undo |
//! |---|---|
//! | PAUSED in the journal, as the intended state | RUNNING with the failure |
//! | lock the container in PVE | remove the lock |
//! | freeze it | thaw it |
//!
//! After a crash at any step the reconciler only makes the host match the phase (`enforce_pause`).

use std::{sync::Arc, time::Duration};

use proto::{
    Cause, Reason,
    id::{SandboxId, SandboxRef},
};
use tokio::time::Instant;

use super::{stop::Stop, undo};
use crate::{
    journal::{Phase, Record},
    pve::ErrorKind,
    sandbox::{
        Error, Event, Result, Sandboxes,
        core::operations::{OperationContext, OperationKind, OperationState},
    },
};

/// Bytes of memory written to swap at a time, so that a resume does not wait for long.
const PIECE: u64 = 32 << 20;
/// Longest time of writing memory to swap after a pause.
const RECLAIM: Duration = Duration::from_secs(60);

impl Sandboxes {
    /// Freezes the sandbox on its own task; returns when nothing in it runs, or after `wait` with
    /// the record as it is then. A paused sandbox stays as it is.
    ///
    /// # Errors
    /// FREEZE_FAILED when something in it does not freeze: it keeps running, unless `or_stop` asks
    /// to stop it then. CONTAINER_LOCKED when a backup or a snapshot of it is being made.
    /// SANDBOX_BUSY when the wait was over before it was frozen.
    pub async fn pause(
        self: &Arc<Self>,
        id: &SandboxId,
        or_stop: bool,
        wait: Duration,
    ) -> Result<Arc<Record>> {
        self.pause_because(id, or_stop, Cause::ASKED, wait).await
    }

    pub(in crate::sandbox) async fn pause_because(
        self: &Arc<Self>,
        id: &SandboxId,
        or_stop: bool,
        cause: Cause,
        wait: Duration,
    ) -> Result<Arc<Record>> {
        // Not while it is being resumed: then the pause comes after the resume.
        let record = self.living(&SandboxRef::Id(*id))?;
        if record.phase == Phase::Paused && !self.busy().contains(id) {
            return Ok(record);
        }
        let kind = if or_stop { OperationKind::PauseOrStop } else { OperationKind::Pause };
        let is_paused: fn(&Record) -> bool = if or_stop {
            |record| matches!(record.phase, Phase::Paused | Phase::Stopped)
        } else {
            |record| record.phase == Phase::Paused
        };
        let id = *id;
        let work = move |sandboxes: Arc<Self>, context: OperationContext| async move {
            sandboxes.pause_now(&id, or_stop, cause, &context).await
        };
        let operation = self.launch_because(cause, (id, kind), is_paused, work);
        match operation.ended(wait).await {
            OperationState::Done(result) => result,
            OperationState::UnderWay => self.not_paused_yet(&id).await,
        }
    }

    /// Refuses to report PAUSED while the pause is under way: it is written before it is true.
    async fn not_paused_yet(&self, id: &SandboxId) -> Result<Arc<Record>> {
        let record = self.get(&SandboxRef::Id(*id)).await?;
        if record.phase != Phase::Paused {
            return Ok(record);
        }
        let message = format!("{id} is still being paused; ask again");
        Err(Error::new(Reason::SandboxBusy, message).retry_after(Duration::from_secs(1)))
    }

    async fn pause_now(
        self: &Arc<Self>,
        id: &SandboxId,
        or_stop: bool,
        cause: Cause,
        context: &OperationContext,
    ) -> Result<Arc<Record>> {
        let _turn = context.turn(Instant::now() + self.options.limits.turn).await?;
        let record = self.living(&SandboxRef::Id(*id))?;
        if record.phase == Phase::Paused || self.no_longer_due(&record, cause) {
            return Ok(record);
        }
        let record = self
            .advance_because(id, Event::PauseAsked, cause, |record| record.failure = None)
            .await?;
        match self.make_paused(&record).await {
            Ok(()) => {
                self.reclaim_later(&record);
                Ok(record)
            }
            Err(error) if or_stop && error.reason == Reason::FreezeFailed => {
                tracing::warn!(sandbox_id = %id, %error, "sandbox could not be frozen, stopping it");
                let (why, grace) = (Some(undo::failure(&error)), self.options.limits.grace);
                self.stop_in_turn(id, Stop { cause, why, grace, hurry: context.cancelled() }).await
            }
            Err(error) => {
                self.run_on(&record, &error).await?;
                Err(error)
            }
        }
    }

    /// Locks the container, then freezes it. Locks first, so that no snapshot begins of a container
    /// that is frozen a moment later. On an error it is not frozen.
    pub(in crate::sandbox) async fn make_paused(&self, record: &Record) -> Result<()> {
        match self.pve.acquire_pause_lock(record.vmid, &record.id).await {
            Ok(()) => {}
            // Nobody else can lock it either; the reconciler locks it when there is quorum again.
            Err(error) if matches!(error.kind, ErrorKind::NoQuorum(_)) => {
                tracing::warn!(sandbox_id = %record.id, %error, "sandbox is frozen without a lock for now");
            }
            Err(error) => return Err(error.into()),
        }
        let frozen = self.pve.freeze(record.vmid, &record.id, self.options.limits.freeze).await;
        frozen.map_err(|error| {
            if matches!(error.kind, ErrorKind::Deadline(_)) {
                let message = format!("{} was not frozen: {error}", record.id);
                return Error::new(Reason::FreezeFailed, message);
            }
            error.into()
        })
    }

    /// Rolls back a failed pause: thaws, records RUNNING and the reason, and unlocks. While the
    /// thaw fails the record says PAUSED, and the reconciler tries again.
    pub(in crate::sandbox) async fn run_on(&self, record: &Record, why: &Error) -> Result<()> {
        tracing::warn!(sandbox_id = %record.id, reason = %why.reason, error = %why, "pause failed");
        match self.pve.thaw(record.vmid, &record.id).await {
            Ok(()) => {}
            // Without quorum the owner is unknown, so it was not frozen either.
            Err(error)
                if why.reason == Reason::NoQuorum
                    && matches!(error.kind, ErrorKind::NoQuorum(_)) => {}
            // The container is not ours any more; the reconciler reports that.
            Err(error) if matches!(error.kind, ErrorKind::NotOurs(_) | ErrorKind::NotFound(_)) => {}
            Err(error) => return Err(error.into()),
        }
        self.advance(&record.id, Event::FreezeFailed, |record| {
            record.failure = Some(undo::failure(why));
        })
        .await?;
        if let Err(error) = self.pve.release_pause_lock(record.vmid, &record.id).await {
            tracing::warn!(sandbox_id = %record.id, %error, "lock of the failed pause stays for now");
        }
        Ok(())
    }

    /// Writes the memory to swap in the background, if there is swap, while the sandbox is paused.
    fn reclaim_later(self: &Arc<Self>, record: &Record) {
        let (sandboxes, id, vmid) = (Arc::clone(self), record.id, record.vmid);
        let since = record.since.clone();
        self.tasks.spawn(async move {
            let until = Instant::now() + RECLAIM;
            let (mut pieces, mut left) = (0_u64, true);
            while left && Instant::now() < until && !sandboxes.tasks.stopping().is_cancelled() {
                // Other writes of the record, such as another name, do not end the pause.
                let still = sandboxes.records.index.live(&id).is_some_and(|record| {
                    record.phase == Phase::Paused && record.since == since
                });
                left = still && sandboxes.pve.reclaim(vmid, PIECE).await;
                pieces += u64::from(left);
            }
            if pieces > 0 {
                tracing::info!(sandbox_id = %id, mib = pieces * (PIECE >> 20), "memory went to swap");
            }
        });
    }
}
