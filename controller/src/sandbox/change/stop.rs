//! Stops a sandbox: its disk is kept, its memory is not.

use std::sync::Arc;

use proto::{
    lifetime,
    sandbox::v1::{EventKind, Sandbox},
};

use super::Change;
use crate::sandbox::{Caller, Result, Sandboxes, WAIT};

const STOP: Change =
    Change { asked: Some(EventKind::StopAsked), effects: &[EventKind::Stopped], is_bounded: false };

impl Sandboxes {
    /// Stops a sandbox, with `grace` to shut down by itself; `None` is its node's default. A stopped one
    /// stays as it is; one that takes long is STOPPING.
    ///
    /// # Errors
    /// When `grace` is invalid, when there is no such sandbox, it is being created or deleted, or its node does not do it.
    pub async fn stop(
        self: &Arc<Self>,
        caller: &Caller,
        id: &str,
        grace: Option<prost_types::Duration>,
    ) -> Result<Sandbox> {
        let grace = lifetime::grace(grace)?;
        self.change(caller, id, STOP, move |calls, epoch, id| async move {
            calls.stop(epoch, &id, grace, WAIT).await
        })
        .await
    }
}
