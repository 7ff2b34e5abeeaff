//! Resuming a paused sandbox.
//!
//! | step | undo |
//! |---|---|
//! | RUNNING in the journal, and beside it the thaw | none: the reconciler does what is missing |
//! | remove the lock, in the background | none: repeated by `enforce_pause` |

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt;
use proto::id::{SandboxId, SandboxRef};

use crate::{
    journal::{Phase, Record},
    sandbox::{
        Event, Result, Sandboxes,
        core::{operations::OperationKind, transitions::refused},
    },
};

impl Sandboxes {
    /// Thaws the sandbox on its own task; returns when it runs, or after `wait` with the record as
    /// it is then. A running sandbox stays as it is.
    ///
    /// # Errors
    /// When there is no such sandbox, it is neither paused nor running, or it could not be thawed:
    /// then the record says RUNNING, and the reconciler thaws it.
    pub async fn resume(self: &Arc<Self>, id: &SandboxId, wait: Duration) -> Result<Arc<Record>> {
        let record = self.living(&SandboxRef::Id(*id))?;
        if record.phase == Phase::Running && !self.busy().contains(id) {
            return Ok(record);
        }
        self.operate(id, OperationKind::Resume, wait, |sandboxes, id| {
            sandboxes.resume_now(id).boxed()
        })
        .await
    }

    async fn resume_now(self: &Arc<Self>, id: &SandboxId) -> Result<Arc<Record>> {
        let record = self.living(&SandboxRef::Id(*id))?;
        if record.phase == Phase::Running {
            return Ok(record);
        }
        if record.phase != Phase::Paused {
            return Err(refused(&record, Event::ResumeAsked));
        }
        let now = self.clock.moment();
        // In parallel: if a crash lets only one of them happen, the reconciler makes the host match
        // the record, and nobody has had an answer yet.
        let (record, thawed) = tokio::join!(
            self.advance(id, Event::ResumeAsked, |record| {
                record.failure = None;
                record.lifetime.renew(&now);
            }),
            self.pve.thaw(record.vmid, id),
        );
        let record = record?;
        thawed?;
        // Launched while this operation is under way, so that the sandbox is never idle and locked.
        self.enforce_pause_later(id);
        Ok(record)
    }

    /// Removes the lock in the background.
    fn enforce_pause_later(self: &Arc<Self>, id: &SandboxId) {
        drop(self.launch_in_turn(id, OperationKind::EnforcePause, |sandboxes, id| {
            sandboxes.enforce_pause_now(id).boxed()
        }));
    }
}
