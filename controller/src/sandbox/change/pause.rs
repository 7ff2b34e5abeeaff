//! Pauses and resumes sandboxes: their memory is kept.

use std::sync::Arc;

use proto::sandbox::v1::{EventKind, Sandbox};

use super::Change;
use crate::sandbox::{Caller, Result, Sandboxes, WAIT};

/// Pause: a sandbox that does not freeze may be stopped instead.
const PAUSE: Change = Change {
    asked: Some(EventKind::PauseAsked),
    effects: &[EventKind::Paused, EventKind::Stopped],
    is_bounded: false,
};
const RESUME: Change = Change {
    asked: Some(EventKind::ResumeAsked),
    effects: &[EventKind::Resumed],
    is_bounded: true,
};

impl Sandboxes {
    /// Pauses a sandbox. A paused one stays as it is.
    ///
    /// # Errors
    /// FREEZE_FAILED when a process in it does not freeze, unless `or_stop`; when there is none, it
    /// does not run, or its node does not do it.
    pub async fn pause(
        self: &Arc<Self>,
        caller: &Caller,
        id: &str,
        or_stop: bool,
    ) -> Result<Sandbox> {
        self.change(caller, id, PAUSE, move |calls, epoch, id| async move {
            calls.pause(epoch, &id, or_stop, WAIT).await
        })
        .await
    }

    /// Resumes a sandbox. A running one stays as it is.
    ///
    /// # Errors
    /// When there is none, it is neither paused nor running, or its node does not do it.
    pub async fn resume(self: &Arc<Self>, caller: &Caller, id: &str) -> Result<Sandbox> {
        self.change(caller, id, RESUME, |calls, epoch, id| async move {
            calls.resume(epoch, &id, WAIT).await
        })
        .await
    }
}
