//! Boots a stopped sandbox.

use proto::sandbox::v1::{EventKind, Sandbox};

use super::Change;
use crate::sandbox::{Caller, Result, Sandboxes, WAIT};

const START: Change =
    Change { asked: Some(EventKind::StartAsked), effects: &[EventKind::Started], is_bounded: true };

impl Sandboxes {
    /// Boots a sandbox. A running one stays as it is; one that takes long is STARTING.
    ///
    /// # Errors
    /// When there is none, it is being created or deleted, or its node does not do it.
    pub async fn start(&self, caller: &Caller, id: &str) -> Result<Sandbox> {
        self.change(caller, id, START, |client, epoch, id| async move {
            client.start(epoch, &id, WAIT).await
        })
        .await
    }
}
