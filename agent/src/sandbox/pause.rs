//! Pausing a sandbox: frozen where it stands. Its memory is kept, nothing in it runs.
//!
//! There is one phase for it. PAUSED is written first and says what is to be; the lock and the
//! freeze follow; when they fail it is thawed and RUNNING again. So after a crash at any step the
//! reconciler has nothing to find out: it makes the host what the phase says (`settle`).

use std::{sync::Arc, time::Duration};

use proto::{
    Cause, Reason,
    id::{SandboxId, SandboxRef},
};
use tokio::time::Instant;

use super::{
    Error, Event, Sandboxes,
    flights::{Crew, Kind, Standing},
    undo,
};
use crate::{
    journal::{Phase, Record},
    pve::ErrorKind,
};

/// Memory is written to swap in pieces, so that a resume does not wait for long.
const PIECE: u64 = 32 << 20;
/// How long a pause may go on writing memory to swap.
const RECLAIM: Duration = Duration::from_secs(60);

impl Sandboxes {
    /// Freezes the sandbox on a task of its own; answers when nothing in it runs, or after `wait`
    /// with the sandbox as it is by then. One that is paused stays as it is.
    ///
    /// # Errors
    /// FREEZE_FAILED when something in it does not freeze: it runs on, unless it was to be stopped
    /// then. CONTAINER_LOCKED when a backup or a snapshot is being made of it. SANDBOX_BUSY when the
    /// wait was over before it was frozen.
    pub async fn pause(
        self: &Arc<Self>,
        id: &SandboxId,
        or_stop: bool,
        wait: Duration,
    ) -> Result<Arc<Record>, Error> {
        self.pause_because(id, or_stop, Cause::ASKED, wait).await
    }

    pub(super) async fn pause_because(
        self: &Arc<Self>,
        id: &SandboxId,
        or_stop: bool,
        cause: Cause,
        wait: Duration,
    ) -> Result<Arc<Record>, Error> {
        // Not if it is being resumed: then the pause comes after that.
        let record = self.living(&SandboxRef::Id(*id))?;
        if record.phase == Phase::Paused && !self.busy().contains(id) {
            return Ok(record);
        }
        let id = *id;
        let kind = if or_stop { Kind::PauseOrStop } else { Kind::Pause };
        let flight = self.launch(id, kind, |sandboxes, crew| async move {
            sandboxes.pause_now(&id, or_stop, cause, &crew).await
        });
        match flight.ended(wait).await {
            Standing::Done(result) => result,
            Standing::UnderWay => self.not_paused_yet(&id).await,
        }
    }

    /// PAUSED is written before it is so: while the pause is under way that is no answer.
    async fn not_paused_yet(&self, id: &SandboxId) -> Result<Arc<Record>, Error> {
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
        crew: &Crew,
    ) -> Result<Arc<Record>, Error> {
        let _turn = crew.turn(Instant::now() + self.options.limits.turn).await?;
        let record = self.living(&SandboxRef::Id(*id))?;
        if record.phase == Phase::Paused || self.is_moot(&record, cause) {
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
                tracing::warn!(sandbox_id = %id, %error, "not frozen, so it is stopped");
                self.stop_in_turn(id, cause, Some(undo::failure(&error))).await
            }
            Err(error) => {
                self.run_on(&record, &error).await?;
                Err(error)
            }
        }
    }

    /// Lock first, so that no snapshot begins on what is frozen a moment later. On an error it is
    /// not frozen.
    pub(super) async fn make_paused(&self, record: &Record) -> Result<(), Error> {
        match self.pve.hold(record.vmid, &record.id).await {
            Ok(()) => {}
            // Nobody else can lock it either; the reconciler does it when there is quorum again.
            Err(error) if matches!(error.kind, ErrorKind::NoQuorum(_)) => {
                tracing::warn!(sandbox_id = %record.id, %error, "is frozen without a lock so far");
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

    /// Undoes a pause that failed: thawed, unlocked, and then recorded, with the reason. As long as
    /// the thaw fails the record says PAUSED, and the reconciler tries again.
    pub(super) async fn run_on(&self, record: &Record, why: &Error) -> Result<(), Error> {
        tracing::warn!(sandbox_id = %record.id, reason = %why.reason, error = %why, "pause failed");
        match self.pve.thaw(record.vmid, &record.id).await {
            Ok(()) => {}
            // Nobody knows whose it is, so it was not frozen either.
            Err(error)
                if why.reason == Reason::NoQuorum
                    && matches!(error.kind, ErrorKind::NoQuorum(_)) => {}
            // It is nobody's business of ours any more; the reconciler says so.
            Err(error) if matches!(error.kind, ErrorKind::NotOurs(_) | ErrorKind::NotFound(_)) => {}
            Err(error) => return Err(error.into()),
        }
        self.advance(&record.id, Event::FreezeFailed, |record| {
            record.failure = Some(undo::failure(why));
        })
        .await?;
        if let Err(error) = self.pve.release(record.vmid, &record.id).await {
            tracing::warn!(sandbox_id = %record.id, %error, "its lock stays for now");
        }
        Ok(())
    }

    /// Writes its memory to swap, where there is any, for as long as it is paused.
    fn reclaim_later(self: &Arc<Self>, record: &Record) {
        let (sandboxes, id, vmid) = (Arc::clone(self), record.id, record.vmid);
        let revision = record.revision;
        self.tasks.spawn(async move {
            let until = Instant::now() + RECLAIM;
            let (mut pieces, mut left) = (0_u64, true);
            while left && Instant::now() < until && !sandboxes.tasks.stopping().is_cancelled() {
                let still = sandboxes.index.live(&id).is_some_and(|record| {
                    record.phase == Phase::Paused && record.revision == revision
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
