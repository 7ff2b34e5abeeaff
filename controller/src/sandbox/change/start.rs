//! Boots a stopped sandbox.

use proto::sandbox::v1::{EventKind, Phase, Sandbox};

use super::Change;
use crate::{
    placement::Growth,
    sandbox::{Caller, Result, Sandboxes, WAIT},
};

const START: Change =
    Change { asked: Some(EventKind::StartAsked), effects: &[EventKind::Started], is_bounded: true };

impl Sandboxes {
    /// Boots a sandbox. A running one stays as it is; one that takes long is STARTING.
    ///
    /// # Errors
    /// When there is none, it is being created or deleted, or its node does not do it; MEMORY_FULL,
    /// NO_CAPACITY or NEVER_FITS when its node has no room for it now.
    pub async fn start(&self, caller: &Caller, id: &str) -> Result<Sandbox> {
        let (entry, node) = self.on_node(&caller.team, id)?;
        let size = entry.sandbox.size.unwrap_or_default().into();
        let stopped = entry.sandbox.phase() == Phase::Stopped;
        let admit = || self.admit_growth(&node, &Growth::start(size));
        let _counted = stopped.then(admit).transpose()?;
        self.change(caller, id, START, |client, epoch, id| async move {
            client.start(epoch, &id, WAIT).await
        })
        .await
    }
}
